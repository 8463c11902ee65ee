"""Sentences written from a mask: prompts that know the answer, to measure what such prompts are worth."""

from dataclasses import dataclass

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


@dataclass(frozen=True)
class Seen:
    """What a mask tells of its lesions: how many, and size, shape and place of the largest."""

    number: int
    size: str
    shape: str
    place: str

    @classmethod
    def of(cls, mask: np.ndarray) -> "Seen | None":
        """Measure a mask; None if it is empty.

        Number: 8-connected parts of at least 0.05 % of the image; the rest describes the largest part.
        Size by share of the image: small < 8 % <= medium < 30 % <= large (where MedVLSM's prompts change).
        Shape: irregular if solidity < 0.9, else circle if minor axis / major axis >= 0.8, else oval.
        Place: thirds of the width and of the height in which the centroid lies (MedVLSM's horizontal thirds follow
        the height instead).
        """
        parts = regionprops(label(mask, structure=np.ones((3, 3)))[0])
        if not parts:
            return None
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
        return cls(number, size, shape, f"{vertical} {horizontal}".strip() or "center")

    @property
    def count(self) -> str:
        return NUMBERS[self.number] if self.number < len(NUMBERS) else "Many"


def lesion_sentence(mask: np.ndarray) -> str:
    """A sentence on number, size, shape and place of breast tumours, in the manner of MedVLSM's P6 prompts."""
    seen = Seen.of(mask)
    if seen is None:
        return "No tumor in the breast ultrasound image."
    if seen.number == 1:
        template = TEMPLATES["breast_ultrasound"]["local@mask"]
        return render(template, size=seen.size, shape=seen.shape, position=seen.place)
    return (
        f"{seen.count} tumors in the breast ultrasound image, the largest one {seen.size}, {seen.shape}-shaped and "
        f"at the {seen.place}."
    )


def polyp_sentence(mask: np.ndarray) -> str | None:
    """The same of polyps, worded as MedVLSM's P6 without the colour: 'one small oval polyp, located in top left …'."""
    seen = Seen.of(mask)
    return seen and f"{seen.count.lower()} {seen.size} {seen.shape} polyp, located in {seen.place} of the image"
