"""Make the dataset folder of two volumes (CT and MR) with what TotalSegmentator outlined in them, from a mirror.

    python data_scripts/totalsegmentator_samples.py --mirror ../shared/data --out data/totalsegmentator_samples

--archive takes a folder laid out as the mirror: images/, masks/, metadata.csv and class_map_total.json.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from common import run, unpacked
from volumes import Layout, Scan, Structure, mirror_rows, read_nifti, write

from lib.files import DataError

SMALLEST = 300  # voxels; what is smaller is cut off by the edge of the volume or a speck
MAPS = {"CT": ("CT", "total"), "MRI": ("MR", "total_mr")}  # in the table -> modality, and its list of numbers
SAMPLES = Layout(
    name="totalsegmentator_samples",
    title="TotalSegmentator's sample volumes with its own outlines (pseudo-labels)",
    modality="CT",
    region="abdomen",
    structures=(),
    splits="Test only: two volumes, and no patient of another set.",
    licence="Apache-2.0 (the repository they are in).",
    citation=(
        "Wasserthal J, Breit HC, Meyer MT, et al. TotalSegmentator: robust segmentation of 104 anatomic structures in "
        "CT images. Radiol Artif Intell 5(5) (2023). doi:10.1148/ryai.230024"
    ),
    where="from https://github.com/wasserth/TotalSegmentator (tests/reference_files)",
    notes=(
        "The masks are pseudo-labels: what TotalSegmentator answered, kept as references for its tests, and not drawn "
        "or checked by people. A score here says how near a model comes to TotalSegmentator.",
        f"Structures of fewer than {SMALLEST} voxels are background here.",
    ),
)


def words(name: str) -> str:
    """The plain words of a structure, e.g. kidney_right -> right kidney."""
    *parts, last = name.replace("autochthon", "autochthonous_back_muscle").split("_")
    return " ".join([last, *parts] if last in ("left", "right") and parts else [*parts, last])


def numbers(path: Path, which: str) -> dict[int, str]:
    """Label -> structure, from the map of all classes."""
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))[which]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path} has no list '{which}' of labels: copy the mirror again.") from error
    return {int(number): name for number, name in listed.items()}


def build(args: argparse.Namespace) -> None:
    """Write the folder, each volume with the structures that are large enough in it."""
    with unpacked(args) as (place, origin):
        folder, rows = mirror_rows(place, SAMPLES.name, ("id", "image", "mask", "split", "modality"))
        scans = []
        for row in rows:
            if row["modality"] not in MAPS:
                raise DataError(f"{folder / 'metadata.csv'} has the modality '{row['modality']}': expected CT or MRI.")
            modality, which = MAPS[row["modality"]]
            mask = folder / row["mask"]
            known = numbers(folder / "class_map_total.json", which)
            values, counts = np.unique(read_nifti(mask)[0].astype(int), return_counts=True)
            large = {value for value, count in zip(values.tolist(), counts, strict=True) if count >= SMALLEST}
            chosen = tuple(
                Structure(words(name), (value,), key=name) for value, name in known.items() if value in large
            )
            ignored = frozenset(known) - large
            scan = Scan(row["id"], row["id"], folder / row["image"], (mask,), "test", modality)
            scans.append(replace(scan, structures=chosen, ignored=ignored))
        every = {one.name: one for scan in scans for one in scan.structures}
        write(args, replace(SAMPLES, structures=tuple(every.values())), scans, [origin])


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    run(SAMPLES.name, build, __doc__, SAMPLES.where, argv=argv)


if __name__ == "__main__":
    main()
