"""The brain phantom: its words, its tumours, and that neither the centre nor the bounding box gives them away."""

from functools import cache

import numpy as np
import pytest
from phantom import brain
from phantom.brain import Patient, brain_mri, caption, regenerate
from phantoms import main

from lib.data import load_dataset

SIZE = 64


@cache
def cases(number: int = 240, **options: float) -> tuple:
    return tuple(regenerate(f"brain_{i:05d}", 0, SIZE, **options) for i in range(1, number + 1))


def with_tumor() -> list:
    return [p for p in cases() if p.mask.any()]


def dice(one: np.ndarray, two: np.ndarray) -> float:
    return 2 * (one & two).sum() / (one.sum() + two.sum())


# --- words -----------------------------------------------------------------------------------------------


def test_captions_name_the_kind_and_vary_within_bounds():
    texts = [p.prompts["report"] for p in cases() if p.prompts["report"]]
    for p in cases():
        if p.prompts["report"] and p.mask.any():
            assert p.descriptors["kind"] in p.prompts["report"]
    assert abs(len(texts) / len(cases()) - 0.8) < 0.1
    assert {text.split()[0] for text in texts} == {"Contrast-enhanced", "Coronal", "There"}


def test_four_thousand_captions_have_at_most_two_thousand_wordings():
    rng, said = np.random.default_rng(0), [p.descriptors for p in with_tumor()]
    drawn = [{name: d[name] for name in brain.DRAWN} for d in said]
    texts = {caption(rng, [drawn[rng.integers(len(drawn))]]) for _ in range(4000)}
    assert 300 < len(texts) <= 2000


def test_a_caption_reads_well():
    said = {"kind": "glioma", "size": "large", "side": "left", "height": "upper"}
    said |= {"look": "ring-enhancing", "edema": " with edema"}
    texts = {caption(np.random.default_rng(i), [said]) for i in range(200)}
    whole = "a large ring-enhancing glioma in the upper left brain with edema"
    assert f"Contrast-enhanced T1 MRI of the brain showing {whole}." in texts
    assert "Coronal brain MRI after contrast: a large glioma in the upper left brain with edema." in texts


def test_prompt_sets_name_the_class_that_is_drawn():
    for p in cases():
        kind = p.descriptors["kind"]
        assert set(p.prompts) == set(brain.BRAIN_PROMPTS)
        assert kind in p.prompts["global@p1"] and p.prompts["global@p0"] == "brain tumor"
        assert p.prompts["class@pathology"] == ("No tumor." if kind == "normal" else f"{kind.capitalize()} tumor.")
        assert (p.prompts["local@mask"] is None) == (kind == "normal") == (not p.mask.any())


# --- truth -----------------------------------------------------------------------------------------------


def test_every_case_is_an_image_in_range_with_a_mask_of_its_size():
    for p in cases():
        assert p.image.shape == p.mask.shape == p.distractor.shape == (SIZE, SIZE)
        assert p.image.dtype == np.float32 and p.image.min() >= 0 and p.image.max() <= 1
        assert set(np.unique(p.mask)) <= {0, 1} and not p.distractor.any()
    assert 0.02 < np.mean([not p.mask.any() for p in cases()]) < 0.12
    assert {p.descriptors["kind"] for p in cases()} == {*brain.KINDS, "normal"}


def test_tumors_stand_out_and_are_large_enough_to_see():
    rest = [p.image[20:44, 20:44][p.mask[20:44, 20:44] == 0].mean() for p in with_tumor()]
    gaps = [p.image[p.mask > 0].mean() - brain for p, brain in zip(with_tumor(), rest, strict=True)]
    assert np.mean(gaps) > 0.15
    assert min(p.mask.sum() for p in with_tumor()) >= 12


def test_kinds_lie_where_they_grow():
    middle = {
        kind: np.array([np.argwhere(p.mask).mean(0) / SIZE for p in with_tumor() if p.descriptors["kind"] == kind])
        for kind in brain.KINDS
    }
    assert np.abs(middle["pituitary"][:, 1] - 0.5).mean() < 0.06 < np.abs(middle["glioma"][:, 1] - 0.5).mean()
    assert middle["meningioma"][:, 0].mean() < middle["glioma"][:, 0].mean() < middle["pituitary"][:, 0].mean()
    for p in with_tumor():
        if p.descriptors["side"] != "midline":
            across = np.nonzero(p.mask)[1].mean() / SIZE
            assert (across < 0.56) if p.descriptors["side"] == "left" else (across > 0.44)


def test_filling_the_bounding_box_is_not_a_good_mask():
    scores = {kind: [] for kind in brain.KINDS}
    for p in with_tumor():
        rows, columns = np.nonzero(p.mask)
        box = np.zeros_like(p.mask)
        box[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] = 1
        scores[p.descriptors["kind"]].append(dice(p.mask, box))
    assert all(0.55 < np.mean(found) < 0.77 for found in scores.values())  # neither boxes nor threads


def test_neither_a_centre_disc_nor_the_mean_mask_does_well():
    far = np.hypot(*(np.mgrid[:SIZE, :SIZE] - SIZE / 2))
    mean = np.mean([p.mask for p in with_tumor()], axis=0)
    guesses = [far < radius for radius in range(4, 28, 2)] + [mean > share * mean.max() for share in (0.2, 0.4, 0.6)]
    assert max(np.mean([dice(p.mask, guess) for p in with_tumor()]) for guess in guesses) < 0.25


def test_of_two_tumors_only_the_class_names_the_one_that_is_meant():
    pairs = [p for p in cases(60, ambiguous=1.0) if p.distractor.any()]
    assert len(pairs) > 45
    for p in pairs:
        assert not (p.mask & p.distractor).any() and p.mask.any()
        other = p.descriptors["other"]["kind"]
        assert other != p.descriptors["kind"] and p.prompts["class@other"] == f"{other.capitalize()} tumor."
        assert p.prompts["report"] is None or other in p.prompts["report"]


# --- folder, seeds, bad input ----------------------------------------------------------------------------


def test_a_patient_keeps_the_head_and_a_case_can_be_drawn_again():
    one = regenerate("brain_00003", 0, SIZE)
    assert np.array_equal(one.image, cases()[2].image) and np.array_equal(one.mask, cases()[2].mask)
    with pytest.raises(ValueError, match="Case id 'bus_00001' is not one of this phantom"):
        regenerate("bus_00001")
    drawn = brain_mri(np.random.default_rng(1), 48, patient=Patient.draw(np.random.default_rng(0)))
    assert drawn.image.shape == (48, 48)


def test_the_written_folder_loads_and_is_the_same_every_time(tmp_path):
    prints = []
    for name in ("a", "b"):
        folder = tmp_path / name / "phantom_brain"
        assert main(["brain", "--out", str(folder), "--n", "30", "--size", "48", "--seed", "2"]) == 0
        prints.append(load_dataset(folder, verify=True).card.fingerprint)
    assert prints[0] == prints[1]
    assert set(load_dataset(folder).card.counts) == {"train", "val", "test"}


@pytest.mark.parametrize(
    "options, said",
    [
        (["--ambiguous", "1.5"], "ambiguous is 1.5, expected a share between 0 and 1"),
        (["--text-share", "-0.1"], "text_share is -0.1, expected a share between 0 and 1"),
        (["--size", "32"], "size is 32, expected at least 48 pixels"),
        (["--n", "9"], "n is 9, expected at least 10 images"),
    ],
)
def test_a_bad_parameter_gives_one_sentence_and_leaves_nothing(options, said, tmp_path, capsys):
    assert main(["brain", "--out", str(tmp_path / "x"), "--n", "10", "--size", "48", *options]) == 2
    message = capsys.readouterr().err
    assert said in message and message.count("\n") == 1
    assert not list(tmp_path.iterdir())
