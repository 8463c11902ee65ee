"""What the scripts of volumes share: NIfTI in one orientation, grey scales, words, layouts, and one walk for all sets.

Arrays are [D, H, W]: slices from the feet to the head, rows from back to front, columns from the patient's left to the
right, as the axes of the file come closest to.
"""

import argparse
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
from common import make_splits, read_table, require, run, unpacked
from volume_words import COLUMNS, volume_prompts

from lib.data import DatasetWriter, PromptColumn
from lib.files import DataError

SOFT = (-175.0, 250.0)  # HU; tells soft tissues apart
WIDE = (-991.0, 500.0)  # HU; shows air and bone too (the limits of Hermes, from which DuPLUS has its data)
TOP_SUV = 15.0
HERMES = "Hermes (github.com/yhygao/universal-medical-image-segmentation, 033e16a), from which DuPLUS has its splits"
FREE = "Please outline the {} for me, wherever you see it."
SYNONYMS = {
    "anterior hippocampus": "head of the hippocampus",
    "aorta": "main artery",
    "bladder": "vesica urinaria",
    "brainstem": "truncus encephali",
    "cerebrospinal fluid": "liquor cerebrospinalis",
    "colon": "large intestine",
    "duodenum": "first part of the small intestine",
    "esophagus": "gullet",
    "gallbladder": "vesica fellea",
    "gray matter": "substantia grisea",
    "heart": "cardiac silhouette",
    "inferior vena cava": "postcava",
    "kidney tumor": "renal mass",
    "left kidney": "sinistral renal organ",
    "left lung": "sinistral pulmonary organ",
    "left ventricle": "left cardiac chamber",
    "liver": "hepatic parenchyma",
    "liver tumor": "hepatic lesion",
    "myocardium": "heart muscle",
    "pancreas": "pancreatic gland",
    "pituitary": "hypophysis",
    "posterior hippocampus": "body and tail of the hippocampus",
    "postcava": "inferior vena cava",
    "right kidney": "dextral renal organ",
    "right kidney and left kidney": "both renal organs",
    "right lung": "dextral pulmonary organ",
    "right ventricle": "right cardiac chamber",
    "spinal cord": "medulla spinalis",
    "spleen": "lien",
    "stomach": "gaster",
    "trachea": "windpipe",
    "tumor": "neoplasm",
    "white matter": "substantia alba",
}


# ---------------------------------------------------------------------------------------------------------
# What a set of volumes is
# ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Structure:
    """What is outlined: its name in words, the values it has in mask files, and how DuPLUS's prompts spell it."""

    words: str
    values: tuple[int, ...] = ()
    released: str | None = None  # None: the words run together
    key: str = ""

    @property
    def name(self) -> str:
        """The class: its key, or the words without spaces."""
        return self.key or re.sub(r"[^A-Za-z0-9]+", "_", self.words)


def structures(*listed: str | Structure) -> tuple[Structure, ...]:
    """Structures whose values, where not given, are their places in the list, from 1 on."""
    known = (one if isinstance(one, Structure) else Structure(one) for one in listed)
    return tuple(replace(one, values=one.values or (place,)) for place, one in enumerate(known, start=1))


@dataclass(frozen=True)
class Layout:
    """A released set of volumes: what it shows, how its files are named, and what its card says.

    image and mask are paths with names in braces, such as "images{part}/amos_{case}.nii", found at any depth and also
    with .gz: {part} tells the split (`parts`), {patient} the patient where it is not the volume, and all but {part}
    make up the volume's id, with `prefix` in front. A tuple of masks holds a map of probabilities for each structure.
    `held_out` names the values of {case} that go into val and test, and what it leaves is for training. A set with
    neither is split by patient in the given shares.
    """

    name: str
    title: str
    modality: str  # CT, MR or PET
    region: str
    structures: tuple[Structure, ...]
    licence: str
    citation: str
    where: str  # starts with "from URL"
    splits: str
    image: str = ""
    mask: str | tuple[str, ...] = ""
    prefix: str = ""
    scan: str | None = None  # what T1 calls the scan where that is more than the modality
    window: tuple[float, float] = SOFT
    parts: dict[str, str] = field(default_factory=dict)
    held_out: dict[str, Sequence[str]] = field(default_factory=dict)
    shares: tuple[float, float, float] = (0.7, 0.1, 0.2)
    ignored: dict[int, str] = field(default_factory=dict)  # values of mask files that are background here
    cine: bool = False  # files with a fourth axis, time, of which some frames are outlined
    onto_mask: bool = False  # the image has a grid of its own and is brought onto that of the mask
    columns: dict[str, PromptColumn] = field(default_factory=dict)  # beside those of every set of volumes
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Scan:
    """One volume as its source has it; what is empty is as the layout says, or unknown."""

    case_id: str
    patient: str
    image: Path
    masks: tuple[Path, ...]
    split: str = ""
    modality: str = ""
    scan: str | None = None
    frame: int | None = None
    structures: tuple[Structure, ...] = ()  # those that are outlined in this volume
    ignored: frozenset[int] = frozenset()
    prompts: dict[str, str | None] = field(default_factory=dict)
    outcome: tuple[float, bool] | None = None


# ---------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------


def read_nifti(path: Path, frame: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Read a volume, or a frame of one with a time axis, in canonical orientation.

    Returns the array [D, H, W] and the affine [4, 4] from (column, row, slice) to mm (right, front, head).
    """
    import nibabel

    image, affine = _opened(path)
    shape = tuple(n for axis, n in enumerate(image.shape) if axis < 3 or n > 1)
    if frame is None and len(shape) != 3:
        raise DataError(f"{path} has the shape {image.shape}: expected a volume with three axes.")
    try:
        array = np.asanyarray(image.dataobj[..., frame] if frame is not None else image.dataobj)
    except Exception as error:  # a file cut short has as many errors as there are readers
        raise DataError(f"{path} cannot be read to its end: get it again.") from error
    array = array.reshape(image.shape[:3])
    turn = nibabel.io_orientation(affine)
    turned = nibabel.orientations.apply_orientation(array, turn)
    return turned.transpose(), affine @ nibabel.orientations.inv_ornt_aff(turn, array.shape)


def _opened(path: Path):
    """Open a NIfTI file whose header tells sizes and orientation: the image, and its affine."""
    import nibabel
    from nibabel.openers import ImageOpener

    try:
        image = nibabel.load(path)
        with ImageOpener(path) as file:
            # nibabel mends a header while it loads: a size that is missing becomes 1 mm without a word.
            header = type(image.header).from_fileobj(file, check=False)
        sizes = np.asarray(header["pixdim"][1:4], float)
        coded = int(header["sform_code"]) > 0 or int(header["qform_code"]) > 0
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing: give the whole folder or archive.") from error
    except Exception as error:
        raise DataError(f"{path} cannot be read as NIfTI: get it again from its source.") from error
    edges = np.linalg.norm(image.affine[:3, :3], axis=0)
    for mm in (sizes, edges):
        if not (np.isfinite(mm).all() and (mm > 0).all()):
            raise DataError(
                f"{path} gives its voxels the size {' x '.join(f'{n:g}' for n in mm)} mm: expected three positive "
                "numbers, so repair its header."
            )
    if not coded:
        raise DataError(
            f"{path} does not say how it lies in the patient (sform and qform codes are 0): set its orientation."
        )
    return image, image.affine


def spacing_of(affine: np.ndarray) -> tuple[float, ...]:
    """The mm between slices, rows and columns."""
    return tuple(float(mm) for mm in np.linalg.norm(affine[:3, :3], axis=0)[::-1])


def read_masks(scan: Scan, layout: Layout) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The masks of a volume, class -> [D, H, W] bool, and their affine."""
    wanted = scan.structures or layout.structures
    read = [read_nifti(path, scan.frame) for path in scan.masks]
    values, affine = read[0]
    for path, (other, its) in zip(scan.masks[1:], read[1:], strict=True):
        _check_grid(path, other.shape, its, scan.masks[0], values.shape, affine)
    if len(read) > 1:
        maps = np.stack([np.zeros_like(values), *(array for array, _ in read)])
        values = maps.argmax(0)  # none: the background; above nothing: the likeliest
        return {one.name: values == place for place, one in enumerate(wanted, start=1)}, affine
    whole = np.issubdtype(values.dtype, np.integer)
    labels = values if whole else np.rint(values).astype(np.int32)
    known = {0, *layout.ignored, *scan.ignored, *(value for one in wanted for value in one.values)}
    if not (whole or np.allclose(values, labels, atol=1e-3)) or labels.min() < 0:
        raise DataError(f"{scan.masks[0]} holds values that are no whole numbers from 0 on: give the file of labels.")
    if unknown := set(np.flatnonzero(np.bincount(labels.ravel())).tolist()) - known:
        raise DataError(
            f"{scan.masks[0]} has the label {min(unknown)}, which is none of {layout.name}'s "
            f"({', '.join(f'{value} {one.words}' for one in wanted for value in one.values)}): give the release that "
            "this script was written for."
        )
    return {one.name: np.isin(labels, one.values) for one in wanted}, affine


def read_pair(scan: Scan, layout: Layout) -> tuple[np.ndarray, dict[str, np.ndarray], tuple[float, ...]]:
    """An image [D, H, W], its masks on the same grid (class -> [D, H, W] bool), and the mm of its voxels."""
    image, affine = read_nifti(scan.image, scan.frame)
    masks, target = read_masks(scan, layout)
    shape = next(iter(masks.values())).shape
    if layout.onto_mask and image.shape != shape:
        image, affine = _onto(image, affine, shape, target), target
    _check_grid(scan.masks[0], shape, target, scan.image, image.shape, affine)
    return image, masks, spacing_of(affine)


def _check_grid(
    path: Path, shape: tuple[int, ...], affine: np.ndarray, other: Path, its_shape: tuple[int, ...], its: np.ndarray
) -> None:
    if shape != its_shape:
        raise DataError(
            f"{path} has {' x '.join(map(str, shape))} voxels and {other} {' x '.join(map(str, its_shape))}: "
            "a mask must lie on the grid of its image, so resample it or get the pair again."
        )
    corners = np.array([(*corner, 1) for corner in product(*((0, n - 1) for n in shape[::-1]))])
    apart = np.linalg.norm(corners @ (affine - its)[:3].T, axis=1).max()
    if apart > min(spacing_of(affine)) / 2:
        raise DataError(
            f"{path} and {other} lie {apart:.1f} mm apart: a mask must lie on the grid of its image, so resample it "
            "or, if only its header is wrong, copy that of the image."
        )


def _onto(image: np.ndarray, affine: np.ndarray, shape: tuple[int, ...], target: np.ndarray) -> np.ndarray:
    """Bring a volume onto another grid, linearly, [D, H, W] float32; 0 where it does not reach."""
    from scipy.ndimage import affine_transform

    step = np.linalg.inv(affine) @ target  # columns first, where arrays have slices first
    return affine_transform(
        image.astype(np.float32), step[:3, :3][::-1, ::-1], step[:3, 3][::-1], output_shape=shape, order=1
    )


# ---------------------------------------------------------------------------------------------------------
# Grey
# ---------------------------------------------------------------------------------------------------------


def grey(image: np.ndarray, modality: str, path: Path, window: tuple[float, float] = SOFT) -> np.ndarray:
    """Scale a volume by what is known of its modality, [D, H, W] uint8.

    CT is clipped to a window of HU, MR from the 0.5th to the 99.5th percentile of its nonzero voxels; of PET the square
    root of the SUV is taken, up to 15.
    """
    image = image.astype(np.float32)
    if not np.isfinite(image).all():
        raise DataError(f"{path} has voxels that are no finite numbers: repair it or get it again.")
    if modality == "PET":
        image, window = np.sqrt(image.clip(0, TOP_SUV)), (0.0, TOP_SUV**0.5)
    elif modality == "MR" and image.any():
        window = tuple(np.percentile(image[image != 0], (0.5, 99.5)))
    low, high = window
    scaled = ((image.clip(low, high) - low) / (high - low)) if high > low else np.zeros_like(image)
    if scaled.min() == scaled.max():
        raise DataError(f"{path} is of one grey in its {modality} window: check that it is a {modality} volume.")
    return np.round(scaled * 255).astype(np.uint8)


def grey_note(modality: str, window: tuple[float, float] = SOFT) -> str:
    """What a card says of how grey values came about."""
    return {
        "CT": f"CT is clipped to [{window[0]:g}, {window[1]:g}] HU",
        "MR": "MR is scaled from the 0.5th to the 99.5th percentile of the nonzero voxels of each volume",
        "PET": f"PET is the square root of SUV/{TOP_SUV:g}, clipped to [0, 1]",
    }[modality] + ", and kept in 256 steps."


# ---------------------------------------------------------------------------------------------------------
# The walk
# ---------------------------------------------------------------------------------------------------------


def find_scans(folder: Path, layout: Layout) -> tuple[list[Scan], int]:
    """The volumes of an unpacked release that have masks, in the order of their names, and how many have none."""
    masks = layout.mask if isinstance(layout.mask, tuple) else (layout.mask,)
    images, *labels = (_named(folder, template) for template in (layout.image, *masks))
    if not images or not all(labels):
        lacking = layout.image if not images else masks[[bool(found) for found in labels].index(False)]
        raise DataError(f"{folder} holds no '{lacking}' (or .gz): give the files as they come {layout.where}.")
    for found in labels:
        if alone := sorted(found.keys() - images.keys()):
            raise DataError(f"{found[alone[0]]} has no image beside it ('{layout.image}'): give the whole archive.")
    scans = []
    for key in sorted(images):
        paths = tuple(found[key] for found in labels if key in found)
        if not paths:
            continue
        if len(paths) < len(labels):
            raise DataError(f"{images[key]} has {len(paths)} of its {len(labels)} masks: give the whole archive.")
        said = dict(key)
        part, number = said.pop("part", ""), said.get("case", "")
        if layout.parts and part not in layout.parts:
            raise DataError(f"{images[key]} is in the part '{part}': expected one of {', '.join(layout.parts)}.")
        rest = layout.parts.get(part, "train" if layout.held_out else "")
        split = next((split for split, cases in layout.held_out.items() if number in cases), rest)
        case_id = layout.prefix + re.sub(r"[^A-Za-z0-9._-]+", "-", "_".join(said.values()))
        scan = Scan(case_id, said.get("patient", case_id), images[key], paths, split)
        scans.extend(_outlined_frames(scan) if layout.cine else [scan])
    return scans, len(images.keys() - set().union(*labels))


def _named(folder: Path, template: str) -> dict[tuple[tuple[str, str], ...], Path]:
    """The files whose paths end as a template says, by what stands for the names in braces."""
    seen: set[str] = set()

    def part(match: re.Match) -> str:
        again = match[1] in seen
        seen.add(match[1])
        return f"(?P={match[1]})" if again else f"(?P<{match[1]}>[^/]+?)"

    pattern = re.compile(r"(?:.*/)?" + re.sub(r"\\\{(\w+)\\\}", part, re.escape(template)) + r"(?:\.gz)?")
    files = {}
    for path in sorted(folder.rglob("*.nii*")):
        inside = path.relative_to(folder)
        if path.name.startswith(".") or "__MACOSX" in inside.parts:
            continue
        if match := pattern.fullmatch(inside.as_posix()):
            files[tuple(sorted(match.groupdict().items()))] = path
    return files


def _outlined_frames(scan: Scan) -> list[Scan]:
    image, _ = _opened(scan.masks[0])
    if len(image.shape) != 4:
        raise DataError(f"{scan.masks[0]} has the shape {image.shape}: expected a fourth axis, the frames in time.")
    frames = np.flatnonzero(np.asanyarray(image.dataobj).any((0, 1, 2)))
    if not len(frames):
        raise DataError(f"{scan.masks[0]} has no frame with an outline: get it again.")
    return [replace(scan, case_id=f"{scan.case_id}_frame{frame:02d}", frame=int(frame)) for frame in frames]


def write(args: argparse.Namespace, layout: Layout, scans: Sequence[Scan], notes: Sequence[str] = ()) -> None:
    """Write a dataset folder of volumes, of which only one at a time is in memory."""
    open_scans = [scan for scan in scans if not scan.split]
    strata = [str(scan.outcome and scan.outcome[1]) for scan in open_scans]
    drawn = make_splits([scan.patient for scan in open_scans], strata, layout.shares)
    modalities = dict.fromkeys(scan.modality or layout.modality for scan in scans)
    card = {
        "title": layout.title,
        "modality": ", ".join(modalities),
        "dims": 3,
        "classes": {one.name: number for number, one in enumerate(layout.structures, start=1)},
        "level": "R",
        "licence": layout.licence,
        "citation": layout.citation,
        "source": layout.where.removeprefix("from ").split(" ")[0],
        "splits": layout.splits,
        "prompts": {**COLUMNS, **layout.columns},
        "notes": [
            *layout.notes,
            *(grey_note(modality, layout.window) for modality in modalities),
            "Volumes are turned to the nearest axes of the body: slices from the feet to the head, rows from back to "
            "front, columns from the patient's left to the right.",
            *(f"Label {value} ({what}) is background here." for value, what in layout.ignored.items()),
            *notes,
        ],
    }
    print(f"reading {len(scans)} volumes")
    with DatasetWriter(args.out, card, overwrite=args.overwrite) as writer:
        for number, scan in enumerate(scans, start=1):
            _add(writer, layout, scan, scan.split or drawn[scan.patient])
            if number % 50 == 0:
                print(f"{number} of {len(scans)} volumes written")


def _add(writer: DatasetWriter, layout: Layout, scan: Scan, split: str) -> None:
    modality = scan.modality or layout.modality
    wanted = scan.structures or layout.structures
    image, masks, spacing = read_pair(scan, layout)
    writer.add_volume(
        case_id=scan.case_id,
        patient_id=scan.patient,
        split=split,
        image=grey(image, modality, scan.image, layout.window),
        masks=masks,
        spacing=spacing,
        prompts={
            one.name: volume_prompts(
                modality,
                layout.region,
                one.words,
                wanted[(place + 1) % len(wanted)].words if len(wanted) > 1 else None,
                scan=scan.scan or layout.scan,
                released=one.released,
                synonym=SYNONYMS.get(one.words),
                free=FREE.format(one.words),
            )
            | scan.prompts
            for place, one in enumerate(wanted)
        },
        outcome=scan.outcome,
    )


def build(layout: Layout, args: argparse.Namespace) -> None:
    """Write the dataset folder of a released set; a mirror is read like an unpacked archive."""
    with unpacked(args) as (folder, origin):
        scans, unlabelled = find_scans(folder, layout)
        left_out = [f"{unlabelled} volumes have no masks and were left out."] if unlabelled else []
        write(args, layout, scans, [*left_out, origin])


def run_layout(layout: Layout, description: str, argv: Sequence[str] | None = None) -> None:
    """Run the command line of a set that needs no more than its layout."""
    run(layout.name, partial(build, layout), description, layout.where, argv=argv)


def choose(option: str, choices: Iterable[str], argv: Sequence[str] | None) -> tuple[str, list[str]]:
    """Take an option that the common command line does not have, the first choice by default; also what remains."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    choices = list(choices)
    parser.add_argument(option, choices=choices, default=choices[0], dest="chosen")
    known, rest = parser.parse_known_args(argv)
    return known.chosen, rest


def mirror_rows(path: Path, name: str, columns: Sequence[str]) -> tuple[Path, list[dict[str, str]]]:
    """The folder of a mirrored set of volumes, and the rows of its metadata.csv, which must have these columns."""
    folder = next((place for place in (path / name, path) if (place / "metadata.csv").is_file()), None)
    if folder is None:
        raise DataError(f"{path} holds no mirror of '{name}' (a folder with metadata.csv): check --mirror.")
    rows = read_table(folder / "metadata.csv")
    require(rows, columns, folder / "metadata.csv")
    return folder, rows


def survival(table: Path, patient: str, days: str, event: str, happened: str, censored: str) -> tuple[float, bool]:
    """An outcome from two cells of a clinical table: how long, and whether it came."""
    try:
        time = float(days)
    except ValueError:
        time = float("nan")
    if not 0 <= time < float("inf"):
        raise DataError(f"{table} gives patient '{patient}' the follow-up '{days}': expected days, 0 or more.")
    if event not in (happened, censored):
        raise DataError(
            f"{table} gives patient '{patient}' the outcome '{event}': expected '{happened}' or '{censored}'."
        )
    return time, event == happened
