"""Make the dataset folder of MedPix (images with captions, no masks: for contrastive fine-tuning) from the archive.

    python data_scripts/medpix.py --archive ~/Downloads/medpix_dataset.zip --out data/medpix

--mirror takes a folder `medpix` with the unpacked files.
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from common import colour_image, find, make_splits, read_table, require, run, unpacked
from medclip_prompts import UNLABELLED, clean_caption

from lib.data import DatasetWriter, PromptColumn

WHERE = "from the MedPix link on https://github.com/HealthX-Lab/MedCLIP-SAMv2 (Google Drive)"
CARD = {
    "title": "MedPix, radiological images with captions",
    "modality": "mixed radiology",
    "dims": 2,
    "classes": {"unlabelled": 1},
    "level": "R",
    "licence": "MedPix (National Library of Medicine): for education and research; images stay with their authors.",
    "citation": "MedPix, National Library of Medicine, https://medpix.nlm.nih.gov; as prepared by Koleilat T et al.",
    "source": WHERE.removeprefix("from ").replace("the MedPix link on ", ""),
    "splits": "Ours: train/val 85/15 % as in MedCLIP-SAMv2, seeded, images with the same caption together.",
    "prompts": {
        "report": PromptColumn(role="report", origin="human", source="the author's caption, cleaned as the paper does")
    },
}


def build(args: argparse.Namespace) -> None:
    """Write the folder from medpix_dataset.csv and its images."""
    with unpacked(args) as (folder, origin):
        table = find(folder, "medpix_dataset.csv")
        rows = read_table(table)
        require(rows, ("filename", "Caption"), table)
        captions = {row["filename"]: text for row in rows if (text := clean_caption(row["Caption"] or ""))}
        first: dict[str, str] = {}  # caption -> the case that had it first, which stands for the patient
        patients = [first.setdefault(text, case_id(name)) for name, text in captions.items()]
        split = make_splits(patients, ["pair"] * len(patients), (0.85, 0.15, 0))
        print(f"reading {len(captions)} images; {len(rows) - len(captions)} rows have a caption that is too short")
        notes = [UNLABELLED, "There are no patient ids: images with the same caption count as one patient.", origin]
        with DatasetWriter(args.out, CARD | {"notes": notes}, overwrite=args.overwrite) as writer:
            for (name, text), patient in zip(captions.items(), patients, strict=True):
                path = table.parent / name
                if not path.is_file():
                    path = find(folder, Path(name).name)  # the table may name a folder of its author's machine
                image = colour_image(path, path)
                writer.add(
                    case_id=case_id(name),
                    patient_id=patient,
                    split=split[patient],
                    image=image,
                    mask=np.zeros(image.shape[:2], bool),
                    spacing=(1, 1),
                    prompts={"report": text},
                )


def case_id(name: str) -> str:
    """A file name as a case id."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", Path(name).stem)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; a mirror is read like an unpacked archive."""
    run("medpix", build, __doc__, WHERE, argv=argv)


if __name__ == "__main__":
    main()
