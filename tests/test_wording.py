"""Rewritings that drop or exchange one thing; the others are tested through lib.text's perturbations."""

import random

import pytest

from lib.wording import REWRITES, swapped_side, vague, wrong_number

REPORT = "Bilateral pulmonary infection, two infected areas, all left lung and middle lower right lung."
BUS = "One large oval-shaped tumor at the top left in the breast ultrasound image."


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (REPORT, "Pulmonary infection."),
        (BUS, "Tumor in the breast ultrasound image."),
        ("Ultrasound of a breast mass, irregular shape.", "Ultrasound of a breast mass."),
        ("Left.", "Left."),  # nothing would remain
    ],
)
def test_a_vague_text_says_what_but_not_how_or_where(text, wanted):
    assert vague(text, random.Random(0)) == wanted


def test_sides_are_swapped_and_swapped_back():
    swapped = swapped_side(REPORT, random.Random(0))
    assert swapped.endswith("all right lung and middle lower left lung.")
    assert swapped_side(swapped, random.Random(0)) == REPORT


def test_a_wrong_number_is_never_the_right_one():
    texts = {wrong_number(REPORT, random.Random(seed)) for seed in range(20)}
    assert len(texts) == 5 and REPORT not in texts and all(text.startswith("Bilateral") for text in texts)
    assert wrong_number("One tumor.", random.Random(1))[0].isupper()


LVIT = "Bilateral pulmonary infection involving two regions with involvement of all left lung and the middle right lung"


@pytest.mark.parametrize("text", [REPORT, LVIT, "unilateral pulmonary infection, one infected area, lower right lung."])
def test_a_report_is_reworded_as_a_radiologist_would_read_it(text):
    for seed in range(10):
        rng = random.Random(seed)
        assert "one infected areas" not in (wrong := wrong_number(text, rng)) and wrong != text
        assert (
            vague(text, rng) == "Pulmonary infection."
            or text[0].islower()
            and vague(text, rng) == "pulmonary infection."
        )
        zones = [text_.partition("left lung")[0] for text_ in (text, REWRITES["wrong_attribute"](text, rng))]
        assert zones[0] != zones[1]


def test_six_is_a_number_too():
    text = "bilateral pulmonary infection, six infected areas, all left lung and all right lung."
    assert "six" not in wrong_number(text, random.Random(0))


@pytest.mark.parametrize("name", REWRITES)
def test_every_rewriting_takes_an_empty_text(name):
    assert isinstance(REWRITES[name]("", random.Random(0)), str)
