"""Make the dataset folder of BUS-BRA (breast ultrasound, biopsy-proven lesions) from a mirror or the archive.

python data_scripts/bus_bra.py --mirror ../shared/data --out data/bus_bra
python data_scripts/bus_bra.py --download --out data/bus_bra
python data_scripts/bus_bra.py --archive ~/Downloads/BUSBRA.zip --out data/bus_bra
"""

import argparse
import re
from collections.abc import Sequence

from common import (
    CLASS_COLUMN,
    LESION_COLUMN,
    MEDCLIPSEG,
    MEDCLIPSEG_COLUMNS,
    MEDCLIPSEG_TEXTS,
    PIXEL_COLUMN,
    WORDS,
    Download,
    Mirror,
    binary_mask,
    class_prompt,
    find,
    grey_image,
    make_splits,
    read_table,
    require,
    run,
    unpacked,
)
from mask_words import lesion_sentence, pixel_sentence
from medclip_prompts import PromptSets, published_lists

from lib.data import DataError, DatasetWriter, PromptColumn
from lib.text import render

WHERE = "from https://zenodo.org/records/8231412 (no account needed)"
# The checksum that torch_em and other public projects pin for this file.
ARCHIVE = Download(
    "https://zenodo.org/records/8231412/files/BUSBRA.zip",
    "ba3e6ed19cc37c682d8d39e25435bbf8a555a12cb7e641b5f2117685c95580ff",
)
CARD = {
    "title": "BUS-BRA, breast ultrasound with biopsy-proven lesions",
    "modality": "breast ultrasound",
    "dims": 2,
    "classes": {"tumor": 1},
    "level": "R",
    "licence": (
        'LICENSE.txt of the dataset: "Permission is hereby granted, free of charge, to any person obtaining a copy '
        'of this dataset ... to use, copy, modify, merge, publish, and/or distribute copies of the Dataset"; '
        '"All documents and papers that uses the Dataset are required to cite the following article".'
    ),
    "citation": (
        "Gómez-Flores W, Gregorio-Calas MJ, Pereira WCA. BUS-BRA: A Breast Ultrasound Dataset for Assessing "
        "Computer-aided Diagnosis Systems. Medical Physics, 2023. doi:10.1002/mp.16812"
    ),
}
METADATA = {
    "global": PromptColumn(role="global", origin="metadata", source="breast side and device of the table"),
    "local": PromptColumn(role="local", origin="metadata", source="BI-RADS category of the table"),
    "local@histology": PromptColumn(
        role="local",
        origin="class-oracle",
        source="BI-RADS and histology of the table; the histology is known only after biopsy and tells the class",
    ),
    "local@mask": LESION_COLUMN,
    "global@mask": PIXEL_COLUMN,
    "class@pathology": CLASS_COLUMN,
}
NOTES = [
    "BI-RADS runs from 2 to 5 and is one category per image; there is no lesion descriptor.",
    "The pixel size is unknown: spacing 1 means pixels.",
]


def global_prompt(side: str, device: str) -> str | None:
    """Side and device in words, e.g. 'Breast ultrasound, GE Logiq 7 at 10-14 MHz, left breast.'"""
    device = re.sub(r"\s*@\s*([\d.]+-[\d.]+)\s*MHz", r" at \1 MHz", device.strip())
    side = side.strip().lower()
    return render(WORDS["global"], tissue=None, device=device, side=side if side in ("left", "right") else None)


def local_prompt(birads: str, histology: str = "") -> str | None:
    """BI-RADS, and the histology where it is asked for."""
    if histology:
        return f"Ultrasound of a breast mass, {histology.strip().lower()}, BI-RADS {birads}."
    return render(WORDS["local"], shape=None, margin=None, echo=None, posterior=None, birads=birads)


def from_mirror(args: argparse.Namespace) -> None:
    """Write the folder from a mirror, with its split by patient."""
    columns = ("birads", "histology", "side", "device", *MEDCLIPSEG_TEXTS.values())
    mirror = Mirror(args.mirror, "bus_bra", columns)
    sets = PromptSets("breast", published_lists(args))
    print(f"reading {len(mirror.rows)} images from {mirror.folder}")
    card = {
        **CARD,
        "source": (
            "Images and table: github.com/solutionbeyondnumbers/Ultra-net-codes-, ad75b72 (a copy of "
            f"https://zenodo.org/records/8231412), through a mirror (longer side 352, JPEG). Texts: {MEDCLIPSEG}."
        ),
        "splits": (
            "The mirror's, by patient, from the dataset's own 5 folds: test = fold 1, val = about half of fold 2, "
            "train = the rest."
        ),
        "prompts": METADATA | MEDCLIPSEG_COLUMNS | sets.columns,
        "notes": [
            *NOTES,
            "The mirror holds a seeded part by patient of the training images, JPEG-coded, longer side 352, and "
            "150 test images of the original are not in it.",
            "The MedCLIPSeg captions were made from class and mask position; their own split is by image.",
        ],
    }
    with DatasetWriter(args.out, card, overwrite=args.overwrite) as writer:
        for row in mirror.rows:
            mask = mirror.mask(row)
            writer.add(
                case_id=row["case_id"],
                patient_id=row["patient_id"],
                split=row["split"],
                image=mirror.image(row),
                mask=mask,
                spacing=(1, 1),
                prompts={
                    "global": global_prompt(row["side"], row["device"]),
                    "local": local_prompt(row["birads"]),
                    "local@histology": local_prompt(row["birads"], row["histology"]),
                    "local@mask": lesion_sentence(mask),
                    "global@mask": pixel_sentence(mask),
                    "class@pathology": class_prompt(row["label"]),
                    **{column: row[text] for column, text in MEDCLIPSEG_TEXTS.items()},
                    **sets.of(row["label"]),
                },
            )


def from_archive(args: argparse.Namespace) -> None:
    """Write the folder from BUSBRA.zip, with the dataset's own folds."""
    with unpacked(args) as (folder, origin):
        table = find(folder, "bus_data.csv")
        root = table.parent
        rows, folds = read_table(table), read_table(root / "5-fold-cv.csv")
        require(rows, ("ID", "Case", "Histology", "Pathology", "BIRADS", "Device", "Side"), table)
        require(folds, ("ID", "kFold"), root / "5-fold-cv.csv")
        fold = {row["ID"]: int(row["kFold"]) for row in folds}
        if unknown := [row["ID"] for row in rows if row["ID"] not in fold]:
            raise DataError(f"{root / '5-fold-cv.csv'} has no fold for '{unknown[0]}': give the whole archive.")
        split = {row["Case"]: "test" if fold[row["ID"]] == 1 else "train" for row in rows}
        second = [row for row in rows if fold[row["ID"]] == 2]
        halves = make_splits([r["Case"] for r in second], [r["Pathology"] for r in second], (0.5, 0.5, 0))
        split |= {patient: half for patient, half in halves.items() if half == "val"}
        sets = PromptSets("breast", published_lists(args))
        print(f"reading {len(rows)} images of {len(split)} patients")
        card = {
            **CARD,
            "source": "https://zenodo.org/records/8231412",
            "splits": (
                "By patient, from the dataset's own 5 folds: test = fold 1, val = half of fold 2 (seeded, stratified "
                "by class), train = the rest."
            ),
            "prompts": METADATA | sets.columns,
            "notes": [*NOTES, origin],
        }
        with DatasetWriter(args.out, card, overwrite=args.overwrite) as writer:
            for row in rows:
                image = root / "Images" / f"{row['ID']}.png"
                drawn = root / "Masks" / f"{row['ID'].replace('bus_', 'mask_')}.png"
                mask = binary_mask(drawn, drawn)
                writer.add(
                    case_id=row["ID"],
                    patient_id=row["Case"],
                    split=split[row["Case"]],
                    image=grey_image(image, image),
                    mask=mask,
                    spacing=(1, 1),
                    prompts={
                        "global": global_prompt(row["Side"], row["Device"]),
                        "local": local_prompt(row["BIRADS"]),
                        "local@histology": local_prompt(row["BIRADS"], row["Histology"]),
                        "local@mask": lesion_sentence(mask),
                        "global@mask": pixel_sentence(mask),
                        "class@pathology": class_prompt(row["Pathology"]),
                        **sets.of(row["Pathology"]),
                    },
                )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    build = {True: from_mirror, False: from_archive}
    run("bus_bra", lambda args: build[bool(args.mirror)](args), __doc__, WHERE, (ARCHIVE,), argv)


if __name__ == "__main__":
    main()
