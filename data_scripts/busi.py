"""Make the dataset folder of BUSI (breast ultrasound; benign, malignant and normal) from a mirror or the archive.

python data_scripts/busi.py --mirror ../shared/data --out data/busi
python data_scripts/busi.py --archive ~/Downloads/archive.zip --out data/busi
"""

import argparse
import re
from collections.abc import Sequence

import numpy as np
from common import (
    CLASS_COLUMN,
    LESION_COLUMN,
    MEDCLIPSEG,
    MEDCLIPSEG_COLUMNS,
    MEDCLIPSEG_TEXTS,
    PIXEL_COLUMN,
    Mirror,
    binary_mask,
    class_prompt,
    find,
    grey_image,
    make_splits,
    run,
    unpacked,
)
from mask_words import lesion_sentence, pixel_sentence
from medclip_prompts import PromptSets, published_lists
from near_duplicates import duplicate_groups, name_groups, repeats_of_held_out

from lib.data import SPLITS, DataError, DatasetWriter, PromptColumn

WHERE = "from https://www.kaggle.com/datasets/aryashah2k/breast-ultrasound-images-dataset (free account)"
MEDVLSM = "MedVLSM (github.com/naamiinepal/medvlsm, dc36a3a, MIT)"
NO_METADATA = "empty: BUSI comes without metadata, and its classes are pathology, which is withheld here"
CARD = {
    "title": "BUSI, breast ultrasound images",
    "modality": "breast ultrasound",
    "dims": 2,
    "classes": {"tumor": 1},
    "level": "R",
    "licence": (
        'Kaggle card as remembered "CC0: Public Domain"; a third-party table gives "Database Contents License '
        '(DbCL) v1.0"; the authors ask for a citation.'
    ),
    "citation": (
        "Al-Dhabyani W, Gomaa M, Khaled H, Fahmy A. Dataset of breast ultrasound images. "
        "Data in Brief 28:104863 (2020). doi:10.1016/j.dib.2019.104863"
    ),
}
NOTES = [
    "There are no patient ids: patient_id is the group of near-duplicates, else the case id, so two images of one "
    "patient that do not look alike can still be in different splits.",
    "Known flaws: near-duplicates (some labelled benign here and malignant there), burned-in labels, callipers "
    "and crosses; duplicates by cropping or mirroring may remain.",
    "All masks of an image are united; masks of normal images are black on purpose.",
    "The pixel size is unknown: spacing 1 means pixels.",
]


def from_mirror(args: argparse.Namespace) -> None:
    """Write the folder from a mirror, whose split is kept but for training images that resemble held-out ones."""
    mirror = Mirror(args.mirror, "busi", ("text_p2", "text_p6", *MEDCLIPSEG_TEXTS.values()))
    print(f"reading {len(mirror.rows)} images from {mirror.folder}")
    case_ids = [row["case_id"] for row in mirror.rows]
    images = [mirror.image(row) for row in mirror.rows]
    patients = name_groups(case_ids, duplicate_groups(images))
    left_out = [case_ids[i] for i in repeats_of_held_out(patients, [row["split"] for row in mirror.rows])]
    sets = PromptSets("breast", published_lists(args))
    print(f"leaving out {len(left_out)} images that nearly repeat one of a more held-out split")
    prompts = {
        "global": PromptColumn(role="global", origin="metadata", source=NO_METADATA),
        "local": PromptColumn(role="local", origin="metadata", source=NO_METADATA),
        "local@mask": PromptColumn(
            role="local", origin="mask-derived", source=f"{MEDVLSM}, first P6 prompt, which also names the class"
        ),
        "local@class": PromptColumn(role="local", origin="class-oracle", source=f"{MEDVLSM}, first P2 prompt"),
        "global@mask": PIXEL_COLUMN,
        **MEDCLIPSEG_COLUMNS,
        "class@pathology": CLASS_COLUMN,
        **sets.columns,
    }
    card = {
        **CARD,
        "source": (
            "Images: github.com/yirutsai/Breast-ultrasound-dataset, 6c0fac8, through a mirror (longer side 352, "
            f"JPEG). Texts: {MEDVLSM}; {MEDCLIPSEG}."
        ),
        "splits": (
            "The mirror's: seeded, stratified by class, near-duplicates together; less the training and "
            "validation images that nearly repeat an image of a more held-out split."
        ),
        "prompts": prompts,
        "notes": [
            *NOTES,
            "The mirror states no licence of its own; its images are JPEG-coded, longer side 352, and 60 test "
            "images of the original are not in it.",
            f"Left out as near-duplicates of more held-out images ({len(left_out)}): {', '.join(left_out)}.",
            "Side words are of the image, and the horizontal thirds behind them follow its height, so 'right' "
            "begins at about half the width.",
        ],
    }
    with DatasetWriter(args.out, card, overwrite=args.overwrite) as writer:
        for row, image, patient in zip(mirror.rows, images, patients, strict=True):
            if row["case_id"] in left_out:
                continue
            mask = mirror.mask(row)
            writer.add(
                case_id=row["case_id"],
                patient_id=patient,
                split=row["split"],
                image=image,
                mask=mask,
                spacing=(1, 1),
                prompts={
                    "local@mask": row["text_p6"].split(" | ")[0],
                    "local@class": row["text_p2"].split(" | ")[0],
                    "global@mask": pixel_sentence(mask),
                    **{column: row[text] for column, text in MEDCLIPSEG_TEXTS.items()},
                    "class@pathology": class_prompt(row["label"]),
                    **sets.of(row["label"]),
                },
            )


def from_archive(args: argparse.Namespace) -> None:
    """Write the folder from Dataset_BUSI_with_GT, splitting by groups of near-duplicates."""
    with unpacked(args) as (folder, origin):
        root = find(folder, "benign").parent
        files = {}
        for label in ("benign", "malignant", "normal"):
            for path in sorted((root / label).glob("*.png")):
                if match := re.fullmatch(r"(\w+) \((\d+)\)", path.stem):
                    files[f"{match[1]}_{int(match[2]):03d}"] = (label, path)
        if not files:
            raise DataError(f"{root} holds no images named like 'benign (1).png': give the original archive.")
        print(f"reading {len(files)} images")
        images = [grey_image(path, path) for _, path in files.values()]
        labels = [label for label, _ in files.values()]
        patients = name_groups(list(files), duplicate_groups(images))
        split = make_splits(patients, labels)
        sets = PromptSets("breast", published_lists(args))
        print(f"found {len(patients) - len(set(patients))} images that nearly repeat another one")
        prompts = {
            "global": PromptColumn(role="global", origin="metadata", source=NO_METADATA),
            "local": PromptColumn(role="local", origin="metadata", source=NO_METADATA),
            "local@mask": LESION_COLUMN,
            "local@class": PromptColumn(
                role="local", origin="class-oracle", source="the class, in the words of MedVLSM's P2"
            ),
            "global@mask": PIXEL_COLUMN,
            "class@pathology": CLASS_COLUMN,
            **sets.columns,
        }
        card = {
            **CARD,
            "source": WHERE.removeprefix("from ").split(" ")[0],
            "splits": (f"Ours: {'/'.join(SPLITS)} 70/10/20 %, seeded, stratified by class, near-duplicates together."),
            "prompts": prompts,
            "notes": [*NOTES, origin],
        }
        with DatasetWriter(args.out, card, overwrite=args.overwrite) as writer:
            for (case_id, (label, path)), image, patient in zip(files.items(), images, patients, strict=True):
                masks = [p for p in path.parent.iterdir() if p.name.startswith(f"{path.stem}_mask")]
                if not masks:
                    raise DataError(f"{path} has no mask beside it: give the original archive.")
                mask = np.logical_or.reduce([binary_mask(file, file) for file in masks])
                known = "No" if label == "normal" else label.capitalize()
                writer.add(
                    case_id=case_id,
                    patient_id=patient,
                    split=split[patient],
                    image=image,
                    mask=mask,
                    spacing=(1, 1),
                    prompts={
                        "local@mask": lesion_sentence(mask),
                        "local@class": f"{known} tumor in the breast ultrasound image.",
                        "global@mask": pixel_sentence(mask),
                        "class@pathology": class_prompt(label),
                        **sets.of(label),
                    },
                )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    run("busi", lambda args: (from_mirror if args.mirror else from_archive)(args), __doc__, WHERE, argv=argv)


if __name__ == "__main__":
    main()
