"""Make the dataset folder of MosMedData+ (CT slices with COVID-19 infection and captions) from the archive.

python data_scripts/mosmed.py --archive ~/Downloads/MosMedDataPlus --out data/mosmed
"""

import argparse
import re
from collections.abc import Sequence

from common import binary_mask, grey_image, make_splits, run, unpacked
from lvit import CAPTIONS, REPORT, captioned

from lib.data import DatasetWriter, PromptColumn

WHERE = (
    "from https://www.kaggle.com/datasets/maedemaftouni/covid19-ct-scan-lesion-segmentation-dataset (free account), "
    f"unpacked, with the {CAPTIONS} inside"
)
# LViT's 273 validation slices of the 2,456 that are not test, for copies that come without a validation table.
VALIDATION = 273 / 2456
CARD = {
    "title": "MosMedData+, CT slices with infection and captions",
    "modality": "chest CT",
    "dims": 2,
    "classes": {"infection": 1},
    "level": "R",
    "licence": "MosMedData: CC BY-NC-ND 3.0; the other parts have terms of their own: research use, cite.",
    "citation": (
        "Morozov SP et al. MosMedData. arXiv:2005.06465. Maftouni M et al. A robust ensemble-deep learning model for "
        "COVID-19 diagnosis. IISE Annual Conference 2021. Captions: Li Z et al. LViT. IEEE TMI 2023."
    ),
    "source": WHERE.split()[1],
    "prompts": {
        "report": REPORT,
        "target": PromptColumn(role="target", origin="template", source="the same for every image"),
    },
}
TARGET = "COVID-19 infection on a CT slice of the lungs."


def scan_of(case_id: str) -> str:
    """The scan of a slice: its name without the slice number, e.g. morozov_study_0258_24 -> morozov_study_0258."""
    return re.sub(r"[_-]\d+$", "", case_id)


def from_archive(args: argparse.Namespace) -> None:
    """Write the folder with the splits of LViT's tables, which are by slice."""
    with unpacked(args) as (folder, origin):
        cases = captioned(folder)
        splits = {case.case_id: case.split for case in cases}
        if "val" not in splits.values():
            trained = [case.case_id for case in cases if case.split == "train"]
            splits |= make_splits(trained, ["slice"] * len(trained), (1 - VALIDATION, VALIDATION, 0))
        seen = {scan_of(name) for name, split in splits.items() if split != "test"}
        tested = [name for name, split in splits.items() if split == "test"]
        shared = sum(scan_of(name) in seen for name in tested)
        print(f"writing {len(cases)} slices; {shared} of {len(tested)} test slices are of scans seen in training")
        notes = [
            f"LViT splits by slice: {shared} of the {len(tested)} test slices are of a scan that train or val has too, "
            "so test scores flatter. patient_id is the case id, as the splits could not stand otherwise.",
            "The pixel size is unknown: spacing 1 means pixels.",
            origin,
        ]
        card = {**CARD, "splits": "LViT's, by slice and not by patient.", "notes": notes}
        with DatasetWriter(args.out, card, overwrite=args.overwrite) as writer:
            for case in cases:
                writer.add(
                    case_id=case.case_id,
                    patient_id=case.case_id,
                    split=splits[case.case_id],
                    image=grey_image(case.image, case.image),
                    mask=binary_mask(case.mask, case.mask),
                    spacing=(1, 1),
                    prompts={"report": case.text, "target": TARGET},
                )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; a mirror is read like an unpacked archive."""
    run("mosmed", from_archive, __doc__, WHERE, argv=argv)


if __name__ == "__main__":
    main()
