"""Make the dataset folder of Malenia's public lesions from the Medical Segmentation Decathlon, LiTS and KiTS.

    python data_scripts/msd_lesions.py --archive ~/Downloads/lesions --out data/msd_lesions
    python data_scripts/msd_lesions.py --archive ~/Downloads/lesions --extent inf --out data/msd_lesions_whole

The folder holds what there is of Task03_Liver (or LiTS), Task06_Lung, Task07_Pancreas, Task10_Colon and KiTS23 as their
archives unpack, and annotations_of_lesion_descriptions.xlsx, the attribute table released with Malenia.
--extent MM: edge of the cube that is cut out about the lesions, 240 by default; inf keeps whole volumes.
"""

import argparse
import math
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from common import make_splits, run, unpacked
from lesion_words import COLUMNS, Row, read_codes, rows_of, told, usual_of
from volumes import SOFT, Layout, Scan, Structure, find_scans, grey, grey_note, read_masks, read_pair

from lib.data import DatasetWriter
from lib.files import DataError

NAME = "msd_lesions"
EXTENT_MM = 240.0  # 160 voxels of 1.5 mm, the grid of the chapter's profile "paper"
LUNG = (-1000.0, 400.0)  # HU; tells lung, nodules and vessels apart
WHERE = (
    "a folder with the unpacked archives of http://medicaldecathlon.com (Task03, 06, 07 and 10), "
    "https://github.com/neheller/kits23 or LiTS, and annotations_of_lesion_descriptions.xlsx of "
    "https://github.com/Yankai96/Malenia"
)
SEEN = {  # class -> its words in the table
    "renal_cell_carcinoma": "renal cell carcinoma",
    "hepatocellular_carcinoma": "hepatocellular carcinoma",
    "lung_cancer": "lung cancer",
    "colorectal_cancer": "colorectal cancer",
}
UNSEEN = {
    "pancreatic_cancer": "pancreatic cancer",
    "pancreatic_cyst": "pancreatic cyst",
    "renal_cyst": "renal cyst",
}
DISEASES = SEEN | UNSEEN


@dataclass(frozen=True)
class Source:
    """A released set: how its files are named, and which label is the lesion of which diseases.

    row: the id of a case in the attribute table, of which {case} is the number; labels: value in the mask files ->
    the diseases that it may be, of which the table tells which.
    """

    image: str
    mask: str
    row: str
    labels: dict[int, tuple[str, ...]]
    others: tuple[int, ...] = ()  # labels of organs
    window: tuple[float, float] = SOFT


def _task(name: str, *diseases: str, lesion: int = 2, window: tuple[float, float] = SOFT) -> Source:
    files = f"imagesTr/{name}_{{case}}.nii", f"labelsTr/{name}_{{case}}.nii", f"{name}_{{case}}"
    return Source(*files, {lesion: diseases}, tuple(range(1, lesion)), window)


SOURCES = {
    "liver": _task("liver", "hepatocellular_carcinoma"),
    "lits": Source(
        "volume-{case}.nii", "segmentation-{case}.nii", "liver_{case}", {2: ("hepatocellular_carcinoma",)}, (1,)
    ),
    "lung": _task("lung", "lung_cancer", lesion=1, window=LUNG),
    "pancreas": _task("pancreas", "pancreatic_cancer", "pancreatic_cyst"),
    "colon": _task("colon", "colorectal_cancer", lesion=1),
    "kits": Source(
        "case_{case}/imaging.nii",
        "case_{case}/segmentation.nii",
        "case_{case}",
        {2: ("renal_cell_carcinoma",), 3: ("renal_cyst",)},
        (1,),
    ),
}
NOTES = (
    f"Unseen diseases, in no training or validation volume: {', '.join(UNSEEN)}. Malenia does not say which of its "
    "twelve were unseen: these three are ours, of the seven whose attributes are public.",
    "Volumes without a row in the attribute table were left out, but for kidneys with a cyst that has none: those are "
    "in no training or validation volume either.",
    "A disease that is known to be absent from a volume has an empty mask there: of a pancreas with a cancer the cyst, "
    "and the other way round; of a kidney what its labels lack. Other diseases have no mask.",
    "An absent disease has the attributes that are usual in it, without location and enhancement.",
    "What is usual in an unseen disease is told by all of its rows, also those of test volumes: there are no others.",
    "LiTS and Task03_Liver are the same volumes in the same order, as far as is known: where both are given, the first "
    "is left out. Task08_HepaticVessel has no rows in the attribute table and is not read.",
    f"{grey_note('CT')[:-1]}; of lungs to [{LUNG[0]:g}, {LUNG[1]:g}] HU.",
)


@dataclass(frozen=True)
class Found:
    """A volume with what the table says of it: class -> its row, None where the disease is absent."""

    scan: Scan
    source: Source
    rows: dict[str, Row | None]
    split: str = ""


def numbered(name: str) -> str:
    """The id of a row as the files have it: pancreas_001.nii.gz is pancreas_001."""
    return re.sub(r"\.nii(\.gz)?$", "", name.strip())


def layout_of(name: str, source: Source) -> Layout:
    """How `lib` of the volume scripts reads a source."""
    parts = [Structure(f"label {value}", values=(value,), key=f"label_{value}") for value in source.labels]
    return Layout(
        name=name, title=name, modality="CT", region="body", structures=tuple(parts), licence="", citation="",
        where=WHERE, splits="", image=source.image, mask=source.mask, prefix=source.row.partition("{")[0],
        ignored={value: "organ" for value in source.others},
    )  # fmt: skip


def volumes(folder: Path, table: dict[str, dict[str, Row]]) -> Iterator[Found]:
    """The volumes of a folder that the table knows, with their rows."""
    there = []
    for name, source in SOURCES.items():
        if name == "lits" and "liver" in there:
            continue
        lesions = {disease for diseases in source.labels.values() for disease in diseases}
        try:
            scans, _ = find_scans(folder, layout_of(name, source))
        except DataError as error:
            if f"holds no '{source.image}'" not in str(error):
                raise
            continue  # this set is not in the folder
        there.append(name)
        for scan in scans:
            rows = {disease: table[disease].get(scan.case_id) for disease in DISEASES if disease in lesions}
            if any(rows.values()):
                yield Found(scan, source, rows)
    if not there:
        raise DataError(f"{folder} holds none of {', '.join(SOURCES)}: give {WHERE}.")


def masks_of(found: Found, labels: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The mask of each disease of a volume, from those of its labels: empty where it is known to be absent."""
    masks = {}
    for value, diseases in found.source.labels.items():
        mask = labels[f"label_{value}"]
        for disease in diseases:
            named = len(diseases) == 1 or found.rows[disease] is not None
            masks[disease] = mask if named else np.zeros_like(mask)
    return masks


def present(found: Found) -> set[str]:
    """The diseases that a volume shows; its files are opened only if one of them is unseen."""
    if UNSEEN.keys().isdisjoint(found.rows):
        return set(found.rows)
    labels, _ = read_masks(found.scan, layout_of("", found.source))
    return {name for name, mask in masks_of(found, labels).items() if mask.any()}


def view_of(lesions: np.ndarray, spacing: Sequence[float], extent: float, name: str) -> tuple[slice, ...]:
    """The part of a volume that is kept: a cube of `extent` mm in which the lesions lie anywhere, by the name's seed.

    lesions: [D, H, W] bool; where they take up more than the cube, one of their voxels is in its middle.
    """
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    found = np.argwhere(lesions)
    if not len(found):
        found = np.array([lesions.shape]) // 2
    voxel = found[rng.integers(len(found))]
    view = []
    for axis, size in enumerate(lesions.shape):
        edge = size if extent >= size * spacing[axis] else max(1, math.floor(extent / spacing[axis]))
        first, last = max(0, found[:, axis].max() + 1 - edge), min(found[:, axis].min(), size - edge)
        start = rng.integers(first, last + 1) if first <= last else np.clip(voxel[axis] - edge // 2, 0, size - edge)
        view.append(slice(int(start), int(start) + edge))
    return tuple(view)


def build(args: argparse.Namespace, extent: float = EXTENT_MM) -> None:
    """Read volumes and table, and write the dataset folder; one volume at a time is in memory."""
    with unpacked(args) as (folder, origin):
        codes = read_codes(folder)
        table = {
            name: {numbered(row.patient): row for row in rows_of(codes, words)} for name, words in DISEASES.items()
        }
        every = list(volumes(folder, table))
        if not every:
            raise DataError(f"{folder} has no volume that the attribute table knows: give {WHERE}.")
        held = {one.scan.case_id for one in every if not UNSEEN.keys().isdisjoint(present(one))}
        free = [one for one in every if one.scan.case_id not in held]
        drawn = make_splits([one.scan.case_id for one in free], [next(iter(one.rows)) for one in free])
        every = [replace(one, split=drawn.get(one.scan.case_id, "test")) for one in every]
        tested = {one.scan.case_id for one in every if one.split == "test"}
        usual = {
            name: usual_of(list(rows.values()), DISEASES[name], tested if name in SEEN else ())
            for name, rows in table.items()
            if rows
        }
        _write(args, extent, every, usual, origin)


def _write(args: argparse.Namespace, extent: float, every: Sequence[Found], usual: dict, origin: str) -> None:
    cut = (
        "Volumes are whole."
        if math.isinf(extent)
        else f"A volume is a cube of at most {extent:g} mm in which the lesions lie anywhere, at a place drawn by the "
        "volume's name: that there is a lesion in it is known, where it lies is not. Malenia's own cut is not known."
    )
    card = {
        "title": "Lesions of seven diseases with their attributes, from MSD, LiTS and KiTS",
        "modality": "CT",
        "dims": 3,
        "classes": {name: number for number, name in enumerate(DISEASES, start=1)},
        "level": "R",
        "licence": "MSD: CC BY-SA 4.0; KiTS: CC BY-NC-SA 4.0; LiTS: recalled as CC BY-NC-ND 4.0, not verified; "
        "attributes and reports: MIT (Malenia).",
        "citation": "Antonelli M, et al. The Medical Segmentation Decathlon. Nat Commun 13, 4128 (2022). Heller N, et "
        "al. The KiTS21 challenge. arXiv:2307.01984. Jiang Y, et al. Malenia. ICLR 2025, arXiv:2410.15744.",
        "source": "http://medicaldecathlon.com, https://github.com/neheller/kits23, https://github.com/Yankai96/Malenia",
        "splits": "By volume, ours, seeded, 70/10/20 %; every volume with an unseen disease is for testing.",
        "prompts": COLUMNS,
        "notes": [*NOTES, cut, origin],
    }
    print(f"reading {len(every)} volumes")
    with DatasetWriter(args.out, card, overwrite=args.overwrite) as writer:
        for one in every:
            image, labels, spacing = read_pair(one.scan, layout_of("", one.source))
            view = view_of(np.any([*labels.values()], axis=0), spacing, extent, one.scan.case_id)
            masks = {name: mask[view] for name, mask in masks_of(one, labels).items()}
            said = {name: one.rows[name] if mask.any() else None for name, mask in masks.items()}
            writer.add_volume(
                case_id=one.scan.case_id,
                patient_id=one.scan.case_id,
                split=one.split,
                image=grey(image[view], "CT", one.scan.image, one.source.window),
                masks=masks,
                spacing=spacing,
                prompts={name: told(said[name], *usual[name], DISEASES[name]) for name in masks},
            )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--extent", type=_millimetres, default=EXTENT_MM)
    chosen, rest = parser.parse_known_args(argv)
    run(NAME, partial(build, extent=chosen.extent), __doc__, WHERE, argv=rest)


def _millimetres(text: str) -> float:
    if not (extent := float(text)) > 0:
        raise argparse.ArgumentTypeError(f"'{text}' is no extent: give mm above 0, or inf.")
    return extent


if __name__ == "__main__":
    main()
