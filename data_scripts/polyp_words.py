"""Prompt columns that the polyp datasets share, and their texts from a row of a mirror."""

import numpy as np
from common import MEDCLIPSEG, MEDCLIPSEG_TEXTS, medclipseg_columns
from mask_words import polyp_sentence

from lib.data import PromptColumn

MEDVLSM = "MedVLSM (github.com/naamiinepal/medvlsm, dc36a3a, MIT)"
TEXTS = f"Texts: {MEDVLSM}; {MEDCLIPSEG}."
TARGET = "A polyp in a colonoscopy image."
FROM_MASK = {
    "target": PromptColumn(role="target", origin="template", source="the same for every image"),
    "local@mask": PromptColumn(
        role="local", origin="mask-derived", source="number, size, shape and place, computed from the mask"
    ),
}
FROM_MIRROR = {
    "local": PromptColumn(
        role="local",
        origin="template",
        source=f"{MEDVLSM}, P3: colour and shape as a model that answers questions on images saw them, often wrongly",
    ),
    **FROM_MASK,
    "local@p9": PromptColumn(
        role="local", origin="mask-derived", source=f"{MEDVLSM}, first P9 prompt: P6 and what a polyp is"
    ),
    **medclipseg_columns("MedVLSM's P6: number, size and place from the mask, colour and shape as in local"),
}
NOTES = [
    "In MedVLSM's and MedCLIPSeg's texts the horizontal thirds follow the image height, so 'right' begins at about "
    "half the width; in local@mask they follow the width.",
    "The pixel size is unknown: spacing 1 means pixels.",
]
MIRRORED = ("text_p3", "text_p9", *MEDCLIPSEG_TEXTS.values())


def from_mask(mask: np.ndarray) -> dict[str, str | None]:
    """The prompts that every image can have."""
    return {"target": TARGET, "local@mask": polyp_sentence(mask)}


def from_row(row: dict[str, str], mask: np.ndarray) -> dict[str, str | None]:
    """All prompts of a mirrored image; blanks that MedCLIPSeg left in altered captions are closed up."""
    published = {column: " ".join(row[text].split()) for column, text in MEDCLIPSEG_TEXTS.items()}
    return from_mask(mask) | published | {"local": row["text_p3"], "local@p9": row["text_p9"].split(" | ")[0]}
