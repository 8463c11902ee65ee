"""Sentences written from a mask: prompts that know the answer, to measure what such prompts are worth."""

import numpy as np
from scipy.ndimage import label
from skimage.measure import regionprops

from lib.text import TEMPLATES, render

NUMBERS = ("No", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine")


def pixel_sentence(mask: np.ndarray) -> str | None:
    """XBusNet's global prompt: width and height of the bounding box and the centroid, in pixels."""
    rows, columns = np.nonzero(mask)
    if not len(rows):
        return None
    width, height = np.ptp(columns) + 1, np.ptp(rows) + 1
    return render(
        TEMPLATES["breast_ultrasound"]["global@mask"],
        width=int(width),
        height=int(height),
        x=round(columns.mean()),
        y=round(rows.mean()),
    )


def lesion_sentence(mask: np.ndarray) -> str:
    """A sentence on number, size, shape and place, in the manner of MedVLSM's P6 prompts.

    Number: 8-connected parts of at least 0.05 % of the image; the rest describes the largest part.
    Size by share of the image: small < 8 % <= medium < 30 % <= large (where MedVLSM's BUSI prompts change).
    Shape: irregular if solidity < 0.9, else circle if minor axis / major axis >= 0.8, else oval.
    Place: thirds of the width and of the height in which the centroid lies (MedVLSM's horizontal thirds follow
    the height instead).
    """
    parts = regionprops(label(mask, structure=np.ones((3, 3)))[0])
    if not parts:
        return "No tumor in the breast ultrasound image."
    largest = max(parts, key=lambda part: part.area)
    number = max(sum(part.area >= 5e-4 * mask.size for part in parts), 1)
    share = largest.area / mask.size
    size = "small" if share < 0.08 else "medium" if share < 0.3 else "large"
    if largest.solidity < 0.9:
        shape = "irregular"
    else:
        round_enough = largest.axis_minor_length >= 0.8 * largest.axis_major_length
        shape = "circle" if round_enough else "oval"
    vertical, horizontal = (
        names[min(int(3 * centre / extent), 2)]
        for names, centre, extent in zip(
            (("top", "", "bottom"), ("left", "", "right")), largest.centroid, mask.shape, strict=True
        )
    )
    place = f"{vertical} {horizontal}".strip() or "center"
    if number == 1:
        return render(TEMPLATES["breast_ultrasound"]["local@mask"], size=size, shape=shape, position=place)
    count = NUMBERS[number] if number < len(NUMBERS) else "Many"
    return f"{count} tumors in the breast ultrasound image, the largest one {size}, {shape}-shaped and at the {place}."
