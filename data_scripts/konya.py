"""Make the dataset folder of Kónya's chest CT (slices with lungs) from the archive.

    python data_scripts/konya.py --archive ~/Downloads/archive.zip --out data/konya

--mirror takes a folder `konya` with the unpacked files.
"""

import argparse
from collections.abc import Sequence

import numpy as np
from common import colour_image, find, grey_image, make_splits, read_table, require, run, unpacked
from medclip_prompts import PromptSets, published_lists

from lib.data import DatasetWriter
from lib.files import DataError

WHERE = "from https://www.kaggle.com/datasets/polomarco/chest-ct-segmentation (free account)"
# The paper's 7,959 / 3,010 / 1,800 slices of 107 patients.
SHARES = (0.623, 0.236, 0.141)
DRAWN = 239  # as the data's own loader cuts off what JPEG left around the structures
CARD = {
    "title": "Kónya's chest CT, lungs",
    "modality": "chest CT",
    "dims": 2,
    "classes": {"lungs": 1},
    "level": "R",
    "licence": "See the Kaggle card; the scans are of the OSIC Pulmonary Fibrosis Progression challenge, for research.",
    "citation": "Kónya S, et al. CT Lung & Heart & Trachea segmentation. Kaggle (2020).",
    "source": WHERE.split()[1],
    "splits": "Ours, by patient, seeded, in the shares of MedCLIP-SAMv2, which splits by patient and names none.",
}
NOTES = [
    "The masks were saved as JPEG with lungs, heart and trachea in the three colours; the lungs are the colour that "
    "covers most over the whole set.",
    "Slices without lungs have an empty mask.",
    "The pixel size is unknown: spacing 1 means pixels.",
]


def patient_of(name: str) -> str:
    """The patient of a slice, e.g. ID00007637202177411956430_12.jpg -> ID00007637202177411956430."""
    return name.split("_")[0]


def build(args: argparse.Namespace) -> None:
    """Write the folder from train.csv and the folders of images and masks."""
    with unpacked(args) as (folder, origin):
        table = find(folder, "train.csv")
        rows = read_table(table)
        require(rows, ("ImageId", "MaskId"), table)
        files = {path.name: path for path in sorted(folder.rglob("*.jpg"))}
        if lacking := [name for row in rows for name in (row["ImageId"], row["MaskId"]) if name not in files]:
            raise DataError(f"{table} lists '{lacking[0]}', which {folder} does not hold: give the whole archive.")
        patients = [patient_of(row["ImageId"]) for row in rows]
        split = make_splits(patients, ["scan"] * len(rows), SHARES)
        print(f"reading {len(rows)} slices of {len(split)} patients")
        masks = {}
        for row in rows:
            path = files[row["MaskId"]]
            masks[row["ImageId"]] = np.packbits(colour_image(path, path) > DRAWN, axis=-1)  # 17,000 at once: as bits
        covered = sum(np.unpackbits(mask, axis=-1, count=3).sum((0, 1), dtype=np.int64) for mask in masks.values())
        lungs = int(np.argmax(covered))
        sets = PromptSets("ct", published_lists(args))
        card = CARD | {
            "prompts": sets.columns,
            "notes": [*NOTES, f"That colour is the {('red', 'green', 'blue')[lungs]} one.", origin],
        }
        with DatasetWriter(args.out, card, overwrite=args.overwrite) as writer:
            for row, patient in zip(rows, patients, strict=True):
                path = files[row["ImageId"]]
                writer.add(
                    case_id=path.stem,
                    patient_id=patient,
                    split=split[patient],
                    image=grey_image(path, path),
                    mask=np.unpackbits(masks[row["ImageId"]], axis=-1, count=3)[..., lungs],
                    spacing=(1, 1),
                    prompts=sets.of(),
                )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; a mirror is read like an unpacked archive."""
    run("konya", build, __doc__, WHERE, argv=argv)


if __name__ == "__main__":
    main()
