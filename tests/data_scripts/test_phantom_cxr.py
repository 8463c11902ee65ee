"""The chest X-ray phantom: its words, its zones, and that swapping left and right in a report has a right answer."""

from functools import cache

import numpy as np
import pytest
from phantom import cxr
from phantom.cxr import Opacity, involving, readings_of, regenerate, report_of
from phantoms import main
from scipy.ndimage import label

from lib.data import load_dataset

SIZE = 64


@cache
def images(number: int = 160) -> tuple[dict, ...]:
    return tuple(readings_of(i, seed=0, size=SIZE) for i in range(1, number + 1))


def cases() -> dict:
    return {case_id: p for readings in images() for case_id, p in readings.items()}


def swap(report: str) -> str:
    return report.replace("left", "LEFT").replace("right", "left").replace("LEFT", "right")


# --- words -----------------------------------------------------------------------------------------------


def test_the_report_speaks_as_lvit_does():
    both = (Opacity("left", ("upper", "middle", "lower")), Opacity("right", ("middle", "lower")))
    assert report_of(both) == (
        "Bilateral pulmonary infection, two infected areas, all left lung and middle lower right lung."
    )
    assert involving(both) == (
        "Bilateral pulmonary infection involving two regions with involvement of all left lung and the middle lower "
        "right lung"
    )
    assert report_of((Opacity("left", ("lower",)),)) == (
        "Unilateral pulmonary infection, one infected area, lower left lung."
    )
    apart = (Opacity("right", ("upper",)), Opacity("right", ("lower",)))
    assert report_of(apart) == "Unilateral pulmonary infection, two infected areas, upper lower right lung."


def test_sides_number_and_attributes_agree_with_what_was_drawn():
    for p in cases().values():
        meant = p.descriptors["opacities"]
        assert p.prompts["report"] in (None, report_of(meant))
        if meant:
            assert p.prompts["attribute.number"] == cxr.NUMBERS[len(meant)]
            assert p.prompts["attribute.side"] == ("both" if len({o.side for o in meant}) == 2 else meant[0].side)


# --- truth -----------------------------------------------------------------------------------------------


def test_every_case_is_an_image_in_range_with_a_mask_of_its_size():
    for p in cases().values():
        assert p.image.shape == p.mask.shape == p.distractor.shape == (SIZE, SIZE)
        assert p.image.dtype == np.float32 and p.image.min() >= 0 and p.image.max() <= 1
        assert set(np.unique(p.mask)) <= {0, 1} and not (p.mask & p.distractor).any()
        assert set(p.prompts) == set(cxr.CXR_PROMPTS)


def test_the_mask_lies_on_the_sides_and_in_the_zones_that_are_named():
    for p in cases().values():
        sides = {opacity.side for opacity in p.descriptors["opacities"]}
        rows, columns = np.nonzero(p.mask)
        left = columns < SIZE / 2
        assert (left.mean() > 0.9) if sides == {"left"} else (left.mean() < 0.1) if sides == {"right"} else True
        zones = {zone for opacity in p.descriptors["opacities"] for zone in opacity.zones}
        if len(zones) == 1:
            apex, height = p.descriptors["lungs"]
            top = apex + cxr.ZONES.index(*zones) * height
            inside = (rows / SIZE > top - 0.02) & (rows / SIZE < top + height + 0.02)
            assert inside.mean() > 0.85


def test_the_mask_has_as_many_parts_as_the_report_counts():
    agreed = [
        label(p.mask, np.ones((3, 3)))[1] == len(p.descriptors["opacities"])
        for p in cases().values()
        if p.descriptors["opacities"]
    ]
    assert np.mean(agreed) > 0.95


def test_an_opacity_is_brighter_than_the_same_place_of_a_clear_lung():
    infected = [p for p in cases().values() if len(p.descriptors["opacities"]) == 1 and not p.distractor.any()]
    gaps = [p.image[p.mask > 0].mean() - p.image[:, ::-1][p.mask > 0].mean() for p in infected]
    assert np.mean(gaps) > 0.08


# --- twins -----------------------------------------------------------------------------------------------


def test_swapping_left_and_right_in_the_report_is_the_report_of_the_twin():
    twins = [r for r in images() if any(name.endswith("_swapped") for name in r)]
    assert len(twins) > 20
    for readings in twins:
        one, two = readings.values()
        assert one.image is two.image
        assert two.prompts["report"] == swap(one.prompts["report"]) == one.prompts["report@swapped"]
        assert np.array_equal(one.distractor, two.mask) and np.array_equal(two.distractor, one.mask)
        assert one.mask.any() and two.mask.any()


def test_another_zone_of_the_same_lung_is_the_other_kind_of_twin():
    twins = [r for r in images() if any(name.endswith("_other") for name in r)]
    assert len(twins) > 8
    for readings in twins:
        one, two = readings.values()
        assert one.prompts["attribute.side"] == two.prompts["attribute.side"]
        assert one.prompts["attribute.zones"] != two.prompts["attribute.zones"]
        assert one.prompts["report@other"] == two.prompts["report"]


def test_named_and_other_opacity_have_the_same_prior_and_the_same_look():
    pairs = [next(iter(r.values())) for r in images() if len(r) == 2]
    left = np.mean([np.nonzero(p.mask)[1].mean() < SIZE / 2 for p in pairs])
    larger = np.mean([p.mask.sum() > p.distractor.sum() for p in pairs])
    gap = np.mean([p.image[p.mask > 0].mean() - p.image[p.distractor > 0].mean() for p in pairs])
    assert abs(left - 0.5) < 0.16 and abs(larger - 0.5) < 0.16 and abs(gap) < 0.03


def test_without_a_report_every_opacity_is_meant():
    silent = [p for p in cases().values() if p.prompts["report"] is None]
    assert silent and not any(p.distractor.any() for p in silent)


@pytest.mark.parametrize("ambiguous, text_share", [(0.0, 0.5), (1.0, 0.9)])
def test_shares_are_those_asked_for(ambiguous, text_share):
    drawn = [readings_of(i, 3, 48, ambiguous=ambiguous, text_share=text_share) for i in range(1, 121)]
    told = [r for r in drawn if next(iter(r.values())).prompts["report"]]
    assert np.mean([len(r) == 2 for r in told]) == ambiguous
    assert abs(len(told) / len(drawn) - text_share) < 0.13


# --- folder, seeds, bad input ----------------------------------------------------------------------------


def test_a_case_can_be_drawn_again_by_its_id():
    case_id, p = next((name, p) for name, p in cases().items() if name.endswith("_swapped"))
    again = regenerate(case_id, 0, SIZE)
    assert np.array_equal(p.image, again.image) and np.array_equal(p.mask, again.mask)
    with pytest.raises(ValueError, match="'cxr_00001_swapped' has no such reading"):
        regenerate("cxr_00001_swapped", 0, SIZE, ambiguous=0.0)
    with pytest.raises(ValueError, match="Case id 'bus_00001' is not one of this phantom"):
        regenerate("bus_00001")


def test_the_written_folder_loads_keeps_twins_together_and_is_the_same_every_time(tmp_path):
    prints = []
    for name in ("a", "b"):
        folder = tmp_path / name / "phantom_cxr"
        assert main(["cxr", "--out", str(folder), "--n", "30", "--size", "48", "--seed", "2"]) == 0
        prints.append(load_dataset(folder).card.fingerprint)
    assert prints[0] == prints[1]
    dataset = load_dataset(folder)
    home = {case.case_id: (case.patient_id, case.split) for case in dataset.cases}
    twins = [name for name in home if name.count("_") == 2]
    assert twins and all(home[name] == home[name.rsplit("_", 1)[0]] for name in twins)
    assert len(home) == 30 + len(twins) and set(dataset.card.counts) == {"train", "val", "test"}


@pytest.mark.parametrize(
    "options, said",
    [
        (["--ambiguous", "1.5"], "ambiguous is 1.5, expected a share between 0 and 1"),
        (["--text-share", "-0.1"], "text_share is -0.1, expected a share between 0 and 1"),
        (["--size", "32"], "size is 32, expected at least 48 pixels"),
        (["--n", "9"], "n is 9, expected at least 10 images"),
    ],
)
@pytest.mark.parametrize("kind", ["cxr", "polyp"])
def test_a_bad_parameter_gives_one_sentence_and_leaves_nothing(kind, options, said, tmp_path, capsys):
    assert main([kind, "--out", str(tmp_path / "x"), "--n", "10", "--size", "48", *options]) == 2
    message = capsys.readouterr().err
    assert said in message and message.count("\n") == 1
    assert not list(tmp_path.iterdir())
