"""Make the dataset folder of Breast-Lesions-USG (BrEaST; BI-RADS descriptors of every lesion) from the archive.

    python data_scripts/breast_lesions_usg.py --download --out data/breast_lesions_usg
    python data_scripts/breast_lesions_usg.py --archive ~/Downloads/BrEaST-Lesions_USG-images_and_masks-Dec-15-2023.zip

The clinical table (BrEaST-Lesions-USG-clinical-data-*.xlsx, or the same saved as CSV) must lie beside the archive
or in the folder; --mirror takes a folder `breast_lesions_usg` with the unpacked files.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from common import (
    CLASS_COLUMN,
    LESION_COLUMN,
    PIXEL_COLUMN,
    WORDS,
    Download,
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

from lib.data import DataError, DatasetWriter, PromptColumn
from lib.text import render

PAGE = "https://www.cancerimagingarchive.net/collection/breast-lesions-usg/"
FILES = "https://www.cancerimagingarchive.net/wp-content/uploads"
# Checksums as recorded by public projects that use these files; a file that differs is refused.
DOWNLOADS = (
    Download(
        f"{FILES}/BrEaST-Lesions_USG-images_and_masks-Dec-15-2023.zip",
        "c32e49cdfa54042e065582d0cb35978b5fc5e5b5e461b33bf773fb50cfdad355",
    ),
    Download(
        f"{FILES}/BrEaST-Lesions-USG-clinical-data-Dec-15-2023.xlsx",
        "89a8874496a6f1f93960390b963f7369b90f7e72ee08a738f2d17e37f5eff8bf",
    ),
)
COLUMNS = (
    *("CaseID", "Image_filename", "Mask_tumor_filename", "Tissue_composition", "Shape", "Margin"),
    *("Echogenicity", "Posterior_features", "Halo", "Calcifications", "Skin_thickening", "BIRADS"),
    "Classification",
)
CARD = {
    "title": "Breast-Lesions-USG (BrEaST), breast ultrasound with BI-RADS descriptors",
    "modality": "breast ultrasound",
    "dims": 2,
    "classes": {"tumor": 1},
    "level": "R",
    "licence": "CC BY 4.0",
    "citation": (
        "Pawłowska A, Ćwierz-Pieńkowska A, Domalik A, et al. Curated benchmark dataset for ultrasound based breast "
        "lesion analysis. Scientific Data 11:148 (2024). doi:10.1038/s41597-024-02984-z. "
        "Data: doi:10.7937/9WKK-Q141 (The Cancer Imaging Archive)."
    ),
    "source": PAGE,
    "splits": "Ours: train/val/test 70/10/20 %, seeded, stratified by class; each case is one patient.",
    "prompts": {
        "global": PromptColumn(role="global", origin="metadata", source="tissue composition of the clinical table"),
        "local": PromptColumn(
            role="local", origin="human", source="a radiologist's BI-RADS descriptors in the clinical table"
        ),
        "local@mask": LESION_COLUMN,
        "global@mask": PIXEL_COLUMN,
        "class@pathology": CLASS_COLUMN,
    },
    "notes": [
        "The mask is the tumour's; masks of other findings (Mask_other_filename) are not used, as the descriptors "
        "are of the tumour. Normal cases have an empty mask and no local prompt.",
        "The table's pixel size is not used, as its unit is not stated there: spacing 1 means pixels.",
    ],
}


def known(value: str) -> str:
    """A cell of the table in plain words, empty where it says that there is nothing to say."""
    value = value.strip()
    if value.lower() in ("", "no", "nan") or value.lower().startswith(("not applicable", "not available")):
        return ""
    return value.replace("&", " and ").replace("_", " ").replace(" - ", ", ")


def local_prompt(row: dict[str, str]) -> str | None:
    """The BI-RADS descriptors of the tumour in one sentence."""
    posterior, calcifications = known(row["Posterior_features"]), known(row["Calcifications"])
    findings = (
        f"posterior {posterior}" if posterior else "",
        f"calcifications {calcifications}" if calcifications else "",
        "echogenic halo" if known(row["Halo"]) else "",
        "skin thickening" if known(row["Skin_thickening"]) else "",
    )
    return render(
        WORDS["local"],
        shape=known(row["Shape"]),
        margin=known(row["Margin"]),
        echo=known(row["Echogenicity"]),
        posterior=", ".join(finding for finding in findings if finding),
        birads=known(row["BIRADS"]),
    )


def global_prompt(row: dict[str, str]) -> str | None:
    """The tissue composition in one sentence."""
    tissue = known(row["Tissue_composition"]).replace(": ", " ")
    return render(WORDS["global"], tissue=tissue, device=None, side=None)


def clinical_table(folder: Path, beside: Path) -> Path:
    """The clinical table in the unpacked folder or beside the archive."""
    places = (*folder.rglob("*clinical*"), *beside.glob("*clinical*"))
    tables = sorted(path for path in places if path.suffix.lower() in (".xlsx", ".csv"))
    if not tables:
        raise DataError(
            f"{beside} holds no clinical table (BrEaST-Lesions-USG-clinical-data-*.xlsx): put it beside the archive; "
            f"it is on {PAGE}."
        )
    return tables[0]


def build(args: argparse.Namespace) -> None:
    """Write the folder from the images, masks and clinical table."""
    with unpacked(args) as (folder, origin):
        beside = args.out.parent / "downloads" if args.download else (args.archive or folder).parent
        table = clinical_table(folder, beside)
        rows = read_table(table)
        require(rows, COLUMNS, table)
        root = find(folder, rows[0]["Image_filename"]).parent
        labels = [row["Classification"].strip().lower() for row in rows]
        split = make_splits([row["CaseID"] for row in rows], labels)
        print(f"reading {len(rows)} images")
        card = CARD | {"notes": [*CARD["notes"], origin]}
        with DatasetWriter(args.out, card, overwrite=args.overwrite) as writer:
            for row, label in zip(rows, labels, strict=True):
                path = root / row["Image_filename"]
                image = grey_image(path, path)
                masks = [root / name.strip() for name in row["Mask_tumor_filename"].split("&") if known(name)]
                drawn = [binary_mask(mask, mask) for mask in masks]
                mask = np.logical_or.reduce(drawn) if drawn else np.zeros(image.shape, bool)
                if mask.any() == (label == "normal"):
                    raise DataError(f"{path} is classified as {label} and its tumour mask says otherwise.")
                writer.add(
                    case_id=path.stem,
                    patient_id=row["CaseID"],
                    split=split[row["CaseID"]],
                    image=image,
                    mask=mask,
                    spacing=(1, 1),
                    prompts={
                        "global": global_prompt(row),
                        "local": None if label == "normal" else local_prompt(row),
                        "local@mask": lesion_sentence(mask),
                        "global@mask": pixel_sentence(mask),
                        "class@pathology": class_prompt(label),
                    },
                )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    run("breast_lesions_usg", build, __doc__, f"from {PAGE}", DOWNLOADS, argv)


if __name__ == "__main__":
    main()
