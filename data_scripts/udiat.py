"""Make the dataset folder of UDIAT (Breast Ultrasound Dataset B) from the archive that its authors send on request.

    python data_scripts/udiat.py --archive ~/Downloads/DatasetB.zip --out data/udiat

--mirror takes a folder `udiat` with the unpacked files.
"""

import argparse
from collections.abc import Sequence

from common import (
    CLASS_COLUMN,
    LESION_COLUMN,
    PIXEL_COLUMN,
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
from medclip_prompts import MEDCLIPSAM_COLUMN, PromptSets, published_lists, published_prompts

from lib.data import DataError, DatasetWriter

PAGE = "http://www2.docm.mmu.ac.uk/STAFF/M.Yap/dataset.php"
CARD = {
    "title": "UDIAT, breast ultrasound dataset B",
    "modality": "breast ultrasound",
    "dims": 2,
    "classes": {"tumor": 1},
    "level": "R",
    "licence": "On request from the authors, for research; may not be passed on (as remembered: read their agreement).",
    "citation": (
        "Yap MH, Pons G, Martí J, Ganau S, Sentís M, Zwiggelaar R, Davison AK, Martí R. Automated Breast Ultrasound "
        "Lesions Detection Using Convolutional Neural Networks. IEEE Journal of Biomedical and Health Informatics "
        "22(4):1218-1226 (2018). doi:10.1109/JBHI.2017.2731873"
    ),
    "source": PAGE,
    "splits": "Ours: train/val/test 70/10/20 %, seeded, stratified by class.",
    "prompts": {
        "local@mask": LESION_COLUMN,
        "global@mask": PIXEL_COLUMN,
        "class@pathology": CLASS_COLUMN,
    },
    "notes": [
        "There are no patient ids here: each image counts as a patient.",
        "The pixel size is unknown: spacing 1 means pixels.",
    ],
}


def build(args: argparse.Namespace) -> None:
    """Write the folder from original/, GT/ and DatasetB.xlsx."""
    with unpacked(args) as (folder, origin):
        root = find(folder, "original").parent
        table = find(root, "DatasetB.*")
        rows = read_table(table)
        require(rows, ("Image", "Type"), table)
        label = {f"{int(float(row['Image'])):06d}": row["Type"].strip().lower() for row in rows}
        images = sorted((root / "original").glob("*.png"))
        if unknown := [path for path in images if path.stem not in label]:
            raise DataError(f"{table} has no row for {unknown[0]}: give the original archive.")
        split = make_splits([path.stem for path in images], [label[path.stem] for path in images])
        print(f"reading {len(images)} images")
        sets, published = PromptSets("breast", published_lists(args)), published_prompts(args, "breast")
        told = {"global@medclipsam": MEDCLIPSAM_COLUMN} if published else {}
        card = CARD | {"prompts": CARD["prompts"] | sets.columns | told, "notes": [*CARD["notes"], origin]}
        with DatasetWriter(args.out, card, overwrite=args.overwrite) as writer:
            for path in images:
                mask = binary_mask(root / "GT" / path.name, root / "GT" / path.name)
                writer.add(
                    case_id=path.stem,
                    patient_id=path.stem,
                    split=split[path.stem],
                    image=grey_image(path, path),
                    mask=mask,
                    spacing=(1, 1),
                    prompts={
                        "local@mask": lesion_sentence(mask),
                        "global@mask": pixel_sentence(mask),
                        "class@pathology": class_prompt(label[path.stem]),
                        **sets.of(label[path.stem]),
                        **{column: published.get(path.stem) for column in told},
                    },
                )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    run("udiat", build, __doc__, f"on request, see {PAGE}", argv=argv)


if __name__ == "__main__":
    main()
