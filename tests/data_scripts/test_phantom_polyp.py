"""The colonoscopy phantom: its words, its polyps, and that only the words tell which ones are meant."""

from functools import cache

import numpy as np
import pytest
from phantom import polyp
from phantom.polyp import WORDS, Look, place_of, readings_of, regenerate, sentence
from phantoms import main
from PIL import Image

from lib.data import load_dataset

SIZE = 64


@cache
def images(number: int = 160) -> tuple[dict, ...]:
    return tuple(readings_of(i, seed=0, size=SIZE) for i in range(1, number + 1))


def cases() -> dict:
    return {case_id: p for readings in images() for case_id, p in readings.items()}


def pairs() -> list[tuple]:
    return [tuple(readings.values()) for readings in images() if len(readings) == 2]


def said_of(text: str) -> tuple[list[str], str]:
    """The words before 'polyp' and the places after it."""
    head, _, places = text.removesuffix(" of the image").partition(" polyp")
    return head.split(), places.removeprefix(", located in ")


def test_sentences_are_those_of_medvlsm():
    look = Look("small", "red", "oval", 1)
    assert sentence(look, ["top left"]) == "one small red oval polyp, located in top left of the image"
    assert sentence(look, None, ("size", "shape")) == "one small oval polyp"
    two = Look("small", "white", "round", 2)
    assert sentence(two, ["top", "center"]) == "two small white round polyp, located in top, center of the image"
    assert [place_of(at) for at in ((0.1, 0.1), (0.5, 0.5), (0.9, 0.5), (0.5, 0.7))] == [
        "top left",
        "center",
        "bottom",
        "right",
    ]


def test_every_case_is_a_colour_image_in_range_with_a_mask_of_its_size():
    for p in cases().values():
        assert p.image.shape == (SIZE, SIZE, 3) and p.mask.shape == p.distractor.shape == (SIZE, SIZE)
        assert p.image.dtype == np.float32 and p.image.min() >= 0 and p.image.max() <= 1
        assert set(np.unique(p.mask)) <= {0, 1} and not (p.mask & p.distractor).any()
        assert set(p.prompts) == set(polyp.POLYP_PROMPTS)


def test_sizes_are_as_named():
    shares = {"small": [], "medium": [], "large": []}
    for p in cases().values():
        if p.descriptors["look"] and p.descriptors["look"].number == 1:
            shares[p.descriptors["look"].size].append(p.mask.mean())
    # Where MedVLSM changes its word: 8 % and 30 % of the image.
    assert max(shares["small"]) < 0.08 < min(shares["medium"]) < max(shares["medium"]) < 0.3
    assert np.mean(shares["large"]) > 0.3


def test_colours_are_told_apart():
    seen: dict[str, list] = {}
    for p in cases().values():
        if p.descriptors["look"]:
            seen.setdefault(p.descriptors["look"].colour, []).append(p.image[p.mask > 0].mean(axis=0))
    mean = {colour: np.mean(values, axis=0) for colour, values in seen.items()}
    assert mean["red"][0] > 1.8 * mean["red"][1] and mean["white"][2] > 1.4 * mean["yellow"][2]
    assert mean["brown"].sum() < 0.75 * mean["white"].sum()


def test_places_are_those_of_the_mask():
    for p in cases().values():
        if p.descriptors["look"] and p.descriptors["look"].number == 1 and p.descriptors["look"].shape == "round":
            rows, columns = np.nonzero(p.mask)
            near = {place_of(((rows.mean() + d) / SIZE, (columns.mean() + a) / SIZE)) for d in (-2, 2) for a in (-2, 2)}
            assert p.descriptors["places"][0] in near | {place_of((rows.mean() / SIZE, columns.mean() / SIZE))}


def test_twins_share_the_image_and_exchange_the_masks():
    assert len(pairs()) > 40
    for one, two in pairs():
        assert one.image is two.image and one.mask.any() and two.mask.any()
        assert np.array_equal(one.distractor, two.mask) and np.array_equal(two.distractor, one.mask)
        assert one.prompts["local@other"] == two.prompts["local"] != one.prompts["local"]


def test_each_description_fits_one_of_the_two_groups_only():
    alike = 0
    for one, two in pairs():
        this, that = one.descriptors["look"], two.descriptors["look"]
        words, places = said_of(one.prompts["local"])
        if not this.differs(that):
            alike += 1
            assert places and places == ", ".join(one.descriptors["places"])
        else:
            assert len(this.differs(that)) >= 2
            assert any(getattr(this, name) in words for name in this.differs(that))
    assert 0.15 < alike / len(pairs()) < 0.45


def test_some_descriptions_leave_out_the_place_and_some_a_word():
    told = [p.prompts["local"] for p in cases().values() if p.prompts["local"]]
    assert 0.3 < np.mean([" located in " in text for text in told]) < 0.8
    assert 0.05 < np.mean([len(said_of(text)[0]) == len(WORDS) for text in told]) < 0.4


def test_without_text_every_polyp_is_meant():
    silent = [p for p in cases().values() if p.prompts["local"] is None]
    assert silent and not any(p.distractor.any() for p in silent)
    assert all(p.prompts["local@mask"] is None for p in silent)


def test_named_and_other_group_have_the_same_prior():
    left = np.mean([np.nonzero(one.mask)[1].mean() < SIZE / 2 for one, _ in pairs()])
    larger = np.mean([one.mask.sum() > two.mask.sum() for one, two in pairs()])
    assert abs(left - 0.5) < 0.16 and abs(larger - 0.5) < 0.16


def test_the_written_folder_loads_in_colour_and_any_case_can_be_drawn_again(tmp_path):
    folder = tmp_path / "phantom_polyp"
    assert main(["polyp", "--out", str(folder), "--n", "20", "--size", "48", "--seed", "2"]) == 0
    dataset = load_dataset(folder)
    assert np.asarray(Image.open(dataset.cases[0].image)).shape == (48, 48, 3)
    for case in dataset.cases[::6]:
        p = regenerate(case.case_id, seed=2, size=48)
        assert np.array_equal(np.asarray(Image.open(case.image)), np.round(p.image * 255).astype(np.uint8))
        assert np.array_equal(np.asarray(Image.open(case.mask)) > 0, p.mask > 0) and case.prompts == p.prompts


def test_an_alien_case_id_is_refused():
    with pytest.raises(ValueError, match="Case id 'cxr_00001' is not one of this phantom"):
        regenerate("cxr_00001")
