"""Make the dataset folder of the COVID-19 chest X-ray structures (lungs drawn by radiologists) from a mirror.

    python data_scripts/covid_cxr_structures.py --mirror ../shared/data --out data/covid_cxr_structures

The originals are github.com/GeneralBlockchain/covid-19-chest-xray-segmentations-dataset; only the mirror's selection of
images whose licence allows adaptation is read.
"""

import argparse
from collections.abc import Sequence

import numpy as np
from common import Mirror, run
from medclip_prompts import PromptSets, published_lists

from lib.data import DatasetWriter, PromptColumn
from lib.files import DataError

WHERE = "not read here: give --mirror"
LUNGS = ("left_lung", "right_lung")
CARD = {
    "title": "COVID-19 chest X-ray structures, lungs",
    "modality": "chest radiography",
    "dims": 2,
    "classes": {"lungs": 1},
    "level": "R",
    "licence": "By image: CC BY, CC BY-SA or CC BY-NC-SA, see the mirror's table; the masks CC BY 4.0.",
    "citation": (
        "Cohen JP, Morrison P, Dao L. COVID-19 Image Data Collection. arXiv:2003.11597 (2020); arXiv:2006.11988. "
        "Masks: General Blockchain Inc."
    ),
    "source": (
        "github.com/GeneralBlockchain/covid-19-chest-xray-segmentations-dataset, 377a494, through a mirror (longer "
        "side 768 at most, JPEG)."
    ),
    "splits": "The mirror's, by patient.",
}
NOTES = [
    "33 images of 26 patients: too few for anything but a look at how a model fares on other X-rays.",
    "The mask is what is drawn of the left and the right lung; opacities, mediastinum and tubes are not used.",
    "'pneumonia' in the prompts is any other infection (Pneumocystis, Streptococcus, Legionella) or ARDS; the paper's "
    "list for it is that of viral pneumonia.",
    "The pixel size is unknown: spacing 1 means pixels.",
]


def build(args: argparse.Namespace) -> None:
    """Write the folder with the union of both lungs as the target."""
    if not args.mirror:
        raise DataError("This script reads only the mirror's selection of images: give --mirror.")
    mirror = Mirror(args.mirror, "covid_cxr_structures", ("classes", "text"))
    sets = PromptSets("xray", published_lists(args))
    print(f"reading {len(mirror.rows)} images from {mirror.folder}")
    drawn = {row["case_id"]: _lungs(row) for row in mirror.rows}
    halves = ", ".join(case_id for case_id, files in drawn.items() if len(files) < 2) or "none"
    card = CARD | {
        "prompts": {
            "report": PromptColumn(role="report", origin="human", source="the collection's clinical note"),
            "class@pathology": PromptColumn(role="class", origin="class-oracle", source="the diagnosis of the patient"),
            **sets.columns,
        },
        "notes": [*NOTES, f"Only one lung is drawn, as the other is opaque or was left out: {halves}."],
    }
    with DatasetWriter(args.out, card, overwrite=args.overwrite) as writer:
        for row in mirror.rows:
            parts = [mirror.mask(row | {"mask": file}) for file in drawn[row["case_id"]]]
            writer.add(
                case_id=row["case_id"],
                patient_id=row["patient_id"],
                split=row["split"],
                image=mirror.image(row),
                mask=np.logical_or.reduce(parts),
                spacing=(1, 1),
                prompts={
                    "report": " ".join(row["text"].split()),
                    "class@pathology": row["label"],
                    **sets.of("covid" if "COVID-19" in row["label"] else "pneumonia"),
                },
            )


def _lungs(row: dict[str, str]) -> list[str]:
    """The mask files of the lungs of a row, in which structures and files are listed side by side."""
    structures, files = row["classes"].split(";"), row["mask"].split(";")
    if len(structures) != len(files) or not set(LUNGS) & set(structures):
        raise DataError(
            f"Case '{row['case_id']}' has {len(files)} masks for the structures '{row['classes']}': expected one each, "
            "with a lung among them; copy the mirror again."
        )
    return [file for structure, file in zip(structures, files, strict=True) if structure in LUNGS]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    run("covid_cxr_structures", build, __doc__, WHERE, argv=argv)


if __name__ == "__main__":
    main()
