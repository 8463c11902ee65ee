"""Make the semi-synthetic CT of KiTS19: real kidney and tumor masks and real attributes, but SIMULATED intensities.

python data_scripts/kits19_semisynthetic.py --mirror ../shared/data --out data/kits19_semisynthetic
python data_scripts/kits19_semisynthetic.py --mirror ../shared/data --size 32 --out data/kits19_semisynthetic_32
python data_scripts/kits19_semisynthetic.py --archive ~/Downloads/kits19_and_malenia
"""

import argparse
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from common import find, make_splits, run, unpacked
from lesion_words import COLUMNS, Row, read_codes, rows_of, told, usual_of
from phantom.bits import same_bits
from phantom.kidney import EXTENT_MM, WINDOW, simulate
from scipy.ndimage import affine_transform, binary_dilation, gaussian_filter, label
from threadpoolctl import threadpool_limits
from tqdm import tqdm
from volumes import mirror_rows, read_nifti, spacing_of

from lib.data import DatasetWriter
from lib.files import DataError

NAME = "kits19_semisynthetic"
MIRRORED = "kits19_masks_clinical_malenia"
WHERE = (
    "a folder with data/case_*/segmentation.nii.gz of https://github.com/neheller/kits19 and, beside it, "
    "annotations_of_lesion_descriptions.xlsx of https://github.com/Yankai96/Malenia"
)
TUMOR, CYST = "renal_cell_carcinoma", "renal_cyst"  # seen, and unseen
DISEASES = {TUMOR: "renal cell carcinoma", CYST: "renal cyst"}  # class -> its words, in the released table too
SIZES = (48, 32)
FILLS = 4  # further fillings of a tumor of a training or validation patient, by rows of other patients
CYSTS = 2  # fillings of a test patient's tumor as a cyst
SMALL_MM = 60.0  # the longest a lesion may be to be put into a second patient's kidney

LICENCE = "CC BY-NC-SA 4.0 (masks: data/LICENSE of kits19); attributes and reports: MIT (Malenia)."
CITATION = (
    "Heller N, Sathianathen N, Kalapara A, et al. The KiTS19 challenge data. arXiv:1904.00445. Jiang Y, et al. "
    "Unleashing the potential of vision-language pre-training for 3D zero-shot lesion segmentation via mask-attribute "
    "alignment (Malenia). ICLR 2025, arXiv:2410.15744."
)


@dataclass(frozen=True)
class Patient:
    """A kidney with a tumor, on the grid that is written.

    kidney: [S, S, S] bool, without the tumor; tumor: [S, S, S] bool; midline: column of the patient's middle, in voxels
    from the first one; row: what the released table says of the tumor.
    """

    name: str
    split: str
    kidney: np.ndarray
    tumor: np.ndarray
    midline: float
    row: Row


class Filling(NamedTuple):
    """A lesion to be simulated: its class, its mask, and the row that tells what it shows."""

    disease: str
    mask: np.ndarray
    row: Row


# ---------------------------------------------------------------------------------------------------------
# Masks
# ---------------------------------------------------------------------------------------------------------


def read_crop(path: Path, size: int) -> tuple[np.ndarray, np.ndarray, float]:
    """The kidney that holds the tumor, and the tumor, in a cube of `size` voxels about both; and the midline."""
    labels, affine = read_nifti(path)
    spacing = spacing_of(affine)
    if not set(np.unique(labels)) <= {0, 1, 2}:
        raise DataError(f"{path} holds labels other than 0, 1 (kidney) and 2 (tumor): give KiTS19's segmentation.")
    tumor = labels == 2
    if not tumor.any():
        raise DataError(f"{path} outlines no tumor: give KiTS19's segmentation.")
    pieces, _ = label(labels > 0)
    own = pieces == np.bincount(pieces[tumor]).argmax()
    middle = np.array([(at.min() + at.max()) / 2 for at in np.nonzero(own)])
    step = EXTENT_MM / size / np.array(spacing)  # voxels of the mask in one of the grid
    offset = middle - step * (size - 1) / 2

    def regrid(mask: np.ndarray) -> np.ndarray:
        low = np.maximum(np.floor(offset - 3 * step).astype(int), 0)
        high = np.ceil(offset + step * size + 3 * step).astype(int) + 1
        part = mask[tuple(slice(a, max(b, a + 1)) for a, b in zip(low, high, strict=True))].astype(np.float32)
        part = gaussian_filter(part, np.maximum(0.4 * (step - 1), 0), mode="nearest")  # or thin parts would be missed
        return affine_transform(part, step, offset - low, (size,) * 3, order=1) > 0.5

    tumor = regrid(tumor)
    return regrid(labels > 0) & ~tumor, tumor, float(((labels.shape[2] - 1) / 2 - offset[2]) / step[2])


# ---------------------------------------------------------------------------------------------------------
# The released table
# ---------------------------------------------------------------------------------------------------------


def sided(row: Row, place: str) -> Row:
    """A row told of a kidney on the given side, in its report too."""
    if row.attributes.location == place:
        return row
    side, other = place.split()[0], row.attributes.location.split()[0]
    report = re.sub(rf"\b{other} (?=kidney|renal)", f"{side} ", row.report)
    return Row(row.patient, replace(row.attributes, location=place), report)


def balanced(rng: np.random.Generator, rows: Sequence[Row], like: Row, number: int) -> list[Row]:
    """Draw rows of the same shape, as many of each combination of density, variation and surface; on the same side."""

    def look(row: Row) -> tuple[str | None, ...]:
        return tuple(getattr(row.attributes, name) for name in ("density", "variation", "surface"))

    fitting = [row for row in rows if row.attributes.shape == like.attributes.shape] or list(rows)
    counts = Counter(map(look, fitting))
    odds = np.array([1 / counts[look(row)] for row in fitting])
    chosen = rng.choice(len(fitting), number, replace=number > len(fitting), p=odds / odds.sum())
    return [sided(fitting[index], like.attributes.location) for index in chosen]


# ---------------------------------------------------------------------------------------------------------
# Volumes
# ---------------------------------------------------------------------------------------------------------


def fillings_of(
    rng: np.random.Generator, patient: Patient, tumors: Sequence[Row], cysts: Sequence[Row], donors: Sequence[Patient]
) -> list[list[Filling]]:
    """What the volumes of a patient hold: the own tumor; further fillings; in testing cysts, alone and beside it."""
    own = Filling(TUMOR, patient.tumor, patient.row)
    if patient.split != "test":
        return [[own], *([own._replace(row=row)] for row in balanced(rng, tumors, patient.row, FILLS))]
    volumes = [[own], *([Filling(CYST, patient.tumor, row)] for row in balanced(rng, cysts, patient.row, CYSTS))]
    for index in rng.permutation(len(donors)):
        donor = donors[index]
        if donor.name != patient.name and (mask := _moved(rng, donor.tumor, patient)) is not None:
            row = balanced(rng, cysts, donor.row, 1)[0]
            return [*volumes, [own, Filling(CYST, mask, sided(row, patient.row.attributes.location))]]
    return volumes


def _moved(rng: np.random.Generator, mask: np.ndarray, patient: Patient) -> np.ndarray | None:
    """Another patient's mask in this kidney, half in it and clear of the tumor; None where there is no room."""
    size = len(mask)
    found = np.argwhere(mask)
    extent = np.ptp(found, axis=0) + 1
    if extent.max() * EXTENT_MM / size > SMALL_MM or not patient.kidney.any():
        return None
    form = mask[tuple(slice(a, a + n) for a, n in zip(found.min(0), extent, strict=True))]
    clear = binary_dilation(patient.tumor, iterations=2)
    places = np.argwhere(patient.kidney)
    for _ in range(60):
        low = places[rng.integers(len(places))] - extent // 2
        if (low < 1).any() or (low + extent >= size).any():
            continue
        moved = np.zeros_like(mask)
        moved[tuple(slice(a, a + n) for a, n in zip(low, extent, strict=True))] = form
        if not (moved & clear).any() and 0.4 < patient.kidney[moved].mean() < 0.95:
            return moved
    return None


def build(args: argparse.Namespace, size: int) -> None:
    """Read masks and rows, and write the volumes."""
    if args.mirror:
        folder, listed = mirror_rows(args.mirror, MIRRORED, ("id", "split", "mask"))
        texts = next((p for p in (args.mirror / "texts", folder.parent / "texts") if p.is_dir()), None)
        if texts is None:
            raise DataError(f"{args.mirror} holds no texts/malenia_attributes: give the parent folder of all mirrors.")
        masks = {row["id"]: (folder / row["mask"], row["split"]) for row in listed}
        _write(args, size, masks, read_codes(texts), "Built from a mirror: 40 of the patients, its split kept.")
        return
    with unpacked(args) as (folder, origin):
        paths = {path.parent.name: path for path in sorted(folder.rglob("segmentation.nii.gz"))}
        if not paths:
            find(folder, "segmentation.nii.gz")
        codes = read_codes(folder)
        known = {row.patient for row in rows_of(codes, DISEASES[TUMOR])}
        names = [name for name in paths if name in known]
        if not names:
            raise DataError(f"{folder} has masks of no patient of the attribute table: give KiTS19's data folder.")
        split = make_splits(names, ["tumor"] * len(names), (0.6, 0.15, 0.25))
        _write(args, size, {name: (paths[name], split[name]) for name in names}, codes, origin)


def _write(
    args: argparse.Namespace,
    size: int,
    masks: dict[str, tuple[Path, str]],
    codes: list[dict[str, str]],
    origin: str,
) -> None:
    tumors, cysts = (rows_of(codes, DISEASES[name]) for name in (TUMOR, CYST))
    own = {row.patient: row for row in tumors}
    patients = []
    for name, (path, split) in tqdm(masks.items(), "reading", disable=None):
        if name not in own:
            raise DataError(f"The attribute table has no tumor of patient '{name}': leave out the mask, or add a row.")
        kidney, tumor, midline = read_crop(path, size)
        if tumor.sum() >= 10:  # else it is too small to be a lesion on this grid
            patients.append(Patient(name, split, kidney, tumor, midline, own[name]))
    tested = {patient.name for patient in patients if patient.split == "test"}
    held = {patient.name for patient in patients if patient.split != "train"}
    others = [row for row in tumors if row.patient not in held]
    usual = {name: usual_of(rows, DISEASES[name], tested) for name, rows in ((TUMOR, tumors), (CYST, cysts))}
    donors = [patient for patient in patients if patient.split == "test"]
    card = {
        "title": f"KiTS19 kidneys with simulated CT intensities, {size}³",
        "modality": "abdominal CT with contrast, intensities SIMULATED",
        "dims": 3,
        "classes": {name: number for number, name in enumerate(DISEASES, start=1)},
        "level": "S",
        "licence": LICENCE,
        "citation": CITATION,
        "source": "https://github.com/neheller/kits19, https://github.com/Yankai96/Malenia",
        "splits": "By patient; that of the mirror, or ours, seeded, 60/15/25 %.",
        "prompts": COLUMNS,
        "notes": [
            *NOTES,
            f"{len(masks) - len(patients)} patients were left out, as their tumor has under 10 voxels.",
            origin,
        ],
    }
    with threadpool_limits(1), DatasetWriter(args.out, card, overwrite=args.overwrite) as writer:
        for number, patient in enumerate(tqdm(patients, "simulating", disable=None)):
            rng = np.random.default_rng([0, 40, number])
            for index, fillings in enumerate(fillings_of(rng, patient, others, cysts, donors), start=1):
                lesions = [(filling.mask, filling.row.attributes) for filling in fillings]
                kidney = patient.kidney & ~np.any([mask for mask, _ in lesions], axis=0)
                image = simulate(rng, kidney, lesions, patient.midline)
                rows = {filling.disease: filling for filling in fillings}
                empty = np.zeros_like(patient.tumor)
                writer.add_volume(
                    case_id=f"{patient.name}_{index}",
                    patient_id=patient.name,
                    split=patient.split,
                    image=np.round(image * 255).astype(np.uint8),
                    masks={name: (rows[name].mask if name in rows else empty).astype(np.uint8) for name in DISEASES},
                    spacing=(EXTENT_MM / size,) * 3,
                    prompts={
                        name: told(rows[name].row if name in rows else None, *usual[name], words)
                        for name, words in DISEASES.items()
                    },
                )


NOTES = [
    "The intensities are SIMULATED from the attributes: masks, attributes and reports are real, no CT was used. "
    "Nothing in the simulation depends on the disease but through its attributes.",
    f"Unseen diseases, in no training or validation volume: {CYST}. Seen ones: {TUMOR}.",
    "KiTS19 outlines no cysts: a cyst here is the tumor mask of a test patient, filled by a released cyst row of the "
    "same shape; its outline is a real lesion's of the kidney and its look is that of a real cyst in words, but never "
    "of one patient.",
    f"Volume 1 of a patient is the tumor by its own row. A training or validation patient has {FILLS} more, filled by "
    "rows of other patients that are not held out, of the same shape and evenly over the combinations of density, "
    "variation and surface: among the released tumors 155 of 162 are heterogeneous and 160 have an ill-defined margin, "
    "so that the values of a cyst would hardly be met in training.",
    f"A test patient has {CYSTS} volumes more in which the tumor is filled as a cyst, and one with the tumor and "
    "beside it a second test patient's mask as a cyst, where there is room.",
    "A row used for another patient is told of this patient's side, in its report too.",
    "The relation to other organs is simulated: where it is close, soft tissue lies against the lesion.",
    "Both diseases have a mask in every volume, empty where absent; attribute.location is empty just there. An absent "
    "disease has the attributes that are usual in it and the report of a typical lesion of another patient, read "
    "without place and scan.",
    f"A cube of {EXTENT_MM:g} mm about the kidney with the tumor; stored in [0, 1] from "
    f"[{WINDOW[0]:g}, {WINDOW[1]:g}] HU.",
    "Axes run from the feet to the head, from back to front and from the patient's left to the right.",
]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--size", type=int, choices=SIZES, default=SIZES[0])
    chosen, rest = parser.parse_known_args(argv)
    make: Callable[[argparse.Namespace], None] = partial(build, size=chosen.size)
    run(NAME, make, f"{__doc__}\n--size {' or '.join(map(str, SIZES))}: edge of the cube in voxels", WHERE, argv=rest)


if __name__ == "__main__":
    same_bits()
    main()
