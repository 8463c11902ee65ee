"""Make the dataset folder of QaTa-COV19 (chest X-rays with COVID-19 infection and captions) from a mirror or archive.

python data_scripts/qata_cov19.py --mirror ../shared/data --out data/qata_cov19
python data_scripts/qata_cov19.py --archive ~/Downloads/QaTa-COV19 --out data/qata_cov19
"""

import argparse
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from common import Mirror, binary_mask, grey_image, make_splits, run, unpacked
from lvit import CAPTIONS, REPORT, captioned
from near_duplicates import duplicate_groups, name_groups, repeats_of_held_out

from lib.data import DatasetWriter, PromptColumn
from lib.text import TEMPLATES, render

WHERE = (
    "from https://www.kaggle.com/datasets/aysendegerli/qatacov19-dataset (free account), unpacked, with "
    f"the {CAPTIONS} inside"
)
TARGET = render(TEMPLATES["chest_xray"]["target"], finding="COVID-19 infection")
SGSEG = "SGSeg (github.com/ShuchangYe-bib/SGSeg, 15f47b2, MIT; Ye S et al., MICCAI 2024)"
# LViT's 1,429 validation images of the 7,145 that are not test.
VALIDATION = 0.2
CARD = {
    "title": "QaTa-COV19 v2, chest X-rays with infection and captions",
    "modality": "chest radiography",
    "dims": 2,
    "classes": {"infection": 1},
    "level": "R",
    "licence": (
        "The Kaggle card as remembered: CC BY-SA 4.0; many images stem from BIMCV-COVID19+, which has its own terms: "
        "research use, cite, do not redistribute."
    ),
    "citation": (
        "Degerli A, Kiranyaz S, Chowdhury MEH, Gabbouj M. OSegNet. ICIP 2022. Captions: Li Z et al. LViT. IEEE TMI "
        "2023."
    ),
    "splits": (
        "Test: the official one, by patient. Validation: 20 % of the rest (LViT's share), drawn with seed 0, by "
        "patient where known, near-duplicates together; train: what remains."
    ),
}
TARGET_COLUMN = PromptColumn(role="target", origin="template", source="the same for every image")
NOTES = [
    "'Left lung' in the captions is the left of the image, which is the patient's right.",
    "Files named covid_N have no patient id: patient_id is there the group of near-duplicates, else the case id, so "
    "leaks through them cannot be excluded. All are training images by origin, none is a test image.",
    "The pixel size is unknown: spacing 1 means pixels.",
]
# Beyond these limits the first pairs of different patients appear: 21 bits, correlation 0.97.
ALIKE = dict(bits=18, correlation=0.985)


@dataclass(frozen=True)
class Radiograph:
    """One image as its source has it; patient is "" where unknown, and held_out tells the official test."""

    case_id: str
    patient: str
    held_out: bool
    image: np.ndarray
    read_mask: Callable[[], np.ndarray]
    prompts: dict[str, str]


def write(args: argparse.Namespace, card: dict, radiographs: Iterable[Radiograph]) -> None:
    """Split and write; training images that nearly repeat a test image are left out."""
    cases = list(radiographs)
    print(f"read {len(cases)} images, looking for near-duplicates")
    case_ids = [case.case_id for case in cases]
    groups = duplicate_groups([case.image for case in cases], **ALIKE)
    patients = name_groups(case_ids, groups, [case.patient for case in cases])
    official = ["test" if case.held_out else "train" for case in cases]
    left_out = repeats_of_held_out(patients, official)
    rest = [i for i, split in enumerate(official) if split == "train" and i not in left_out]
    origins = [re.split(r"[_-]", case_ids[i])[0] for i in rest]
    carved = make_splits([patients[i] for i in rest], origins, (1 - VALIDATION, VALIDATION, 0))
    named = ", ".join(case_ids[i] for i in left_out) or "none"
    notes = [*card["notes"], f"Left out as near-duplicates of test images ({len(left_out)}): {named}."]
    with DatasetWriter(args.out, {**card, "notes": notes}, overwrite=args.overwrite) as writer:
        for i, (case, patient) in enumerate(zip(cases, patients, strict=True)):
            if i in left_out:
                continue
            writer.add(
                case_id=case.case_id,
                patient_id=patient,
                split="test" if case.held_out else carved[patient],
                image=case.image,
                mask=case.read_mask(),
                spacing=(1, 1),
                prompts=case.prompts | {"target": TARGET},
            )


def from_mirror(args: argparse.Namespace) -> None:
    """Write the folder from a mirror, whose train and val are pooled before validation is carved."""
    mirror = Mirror(args.mirror, "qata_cov19", ("text", "text_lvit"))
    print(f"reading {len(mirror.rows)} images from {mirror.folder}")
    card = {
        **CARD,
        "source": (
            "Images: SGSeg's copy (github.com/ShuchangYe-bib/SGSeg, 15f47b2), 224×224, through a mirror (JPEG). "
            "Captions: SGSeg's and, as MedCLIPSeg distributes it (8d7ef36), LViT's."
        ),
        "prompts": {
            "report": PromptColumn(
                role="report",
                origin="mask-derived",
                source=f"{SGSEG}: LViT's caption, spell-checked and reworded, with the infected zones counted",
            ),
            "report@lvit": REPORT,
            "target": TARGET_COLUMN,
        },
        "notes": [*NOTES, "The mirror holds a seeded part by patient of the images; 400 test images are not in it."],
    }
    write(
        args,
        card,
        (
            Radiograph(
                case_id=row["case_id"],
                patient=row["patient_id"],
                held_out=row["split"] == "test",
                image=mirror.image(row),
                read_mask=lambda row=row: mirror.mask(row),
                prompts={"report": row["text"], "report@lvit": " ".join(row["text_lvit"].split())},
            )
            for row in mirror.rows
        ),
    )


def from_archive(args: argparse.Namespace) -> None:
    """Write the folder from the original images with LViT's captions."""
    with unpacked(args) as (folder, origin):
        cases = captioned(folder)
        print(f"reading {len(cases)} images")
        card = {
            **CARD,
            "source": WHERE.split()[1],
            "prompts": {"report": REPORT, "target": TARGET_COLUMN},
            "notes": [*NOTES, origin],
        }
        write(
            args,
            card,
            (
                Radiograph(
                    case_id=case.case_id,
                    patient="".join(re.findall(r"^sub-(s\d+)", case.case_id)),
                    held_out=case.split == "test",
                    image=grey_image(case.image, case.image),
                    read_mask=lambda case=case: binary_mask(case.mask, case.mask),
                    prompts={"report": case.text},
                )
                for case in cases
            ),
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    run("qata_cov19", lambda args: (from_mirror if args.mirror else from_archive)(args), __doc__, WHERE, argv=argv)


if __name__ == "__main__":
    main()
