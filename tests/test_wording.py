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
    assert len(texts) == 4 and REPORT not in texts and all(text.startswith("Bilateral") for text in texts)
    assert wrong_number("One tumor.", random.Random(1))[0].isupper()


@pytest.mark.parametrize("name", REWRITES)
def test_every_rewriting_takes_an_empty_text(name):
    assert isinstance(REWRITES[name]("", random.Random(0)), str)
