"""Sentences from masks: each word against a mask that shows it."""

import numpy as np
import pytest
from mask_words import lesion_sentence, pixel_sentence, polyp_sentence


def ellipse(height, width, row, column, radius_row, radius_column):
    rows, columns = np.mgrid[:height, :width]
    return ((rows - row) / radius_row) ** 2 + ((columns - column) / radius_column) ** 2 <= 1


def test_pixel_sentence_gives_box_and_centroid():
    mask = np.zeros((50, 100), bool)
    mask[10:21, 60:81] = True
    assert pixel_sentence(mask) == "Ultrasound shows a tumor approximately 21×11 pixels near (70, 15)."
    assert pixel_sentence(np.zeros((5, 5), bool)) is None


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (ellipse(90, 120, 45, 60, 10, 10), "One small circle-shaped tumor at the center "),
        (ellipse(90, 120, 15, 20, 8, 16), "One small oval-shaped tumor at the top left "),
        (ellipse(90, 120, 75, 60, 14, 40), "One medium oval-shaped tumor at the bottom "),
        (ellipse(90, 120, 45, 100, 44, 40), "One large "),
        (ellipse(90, 120, 45, 60, 30, 30) & ~ellipse(90, 120, 45, 75, 26, 26), "One medium irregular-shaped tumor"),
    ],
)
def test_one_lesion_is_described(mask, words):
    assert lesion_sentence(mask).startswith(words)


def test_horizontal_thirds_follow_the_width():
    assert "at the center" in lesion_sentence(ellipse(60, 300, 30, 160, 5, 5))
    assert "at the right" in lesion_sentence(ellipse(60, 300, 30, 210, 5, 5))


def test_several_lesions_are_counted_and_specks_are_not():
    mask = ellipse(90, 120, 45, 60, 10, 10) | ellipse(90, 120, 10, 10, 4, 4)
    mask[80, 100] = True
    assert lesion_sentence(mask) == (
        "Two tumors in the breast ultrasound image, the largest one small, circle-shaped and at the center."
    )
    assert lesion_sentence(np.zeros((9, 9), bool)) == "No tumor in the breast ultrasound image."


def test_polyps_are_told_in_the_words_of_medvlsm():
    two = ellipse(90, 120, 15, 20, 12, 12) | ellipse(90, 120, 80, 100, 5, 5)
    assert polyp_sentence(two) == "two small circle polyp, located in top left of the image"
    assert polyp_sentence(np.zeros((9, 9), bool)) is None
