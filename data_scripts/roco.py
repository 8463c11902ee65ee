"""Make the dataset folder of ROCO (radiological figures with captions, no masks: for retrieval) from its repository.

    git clone https://github.com/razorx89/roco-dataset && cd roco-dataset && python scripts/fetch.py
    python data_scripts/roco.py --archive roco-dataset --out data/roco

The images come from PubMed Central by the second command. The mirror holds captions only, so it is not enough.
"""

import argparse
from collections.abc import Sequence

import numpy as np
from common import colour_image, read_table, require, run, unpacked
from medclip_prompts import UNLABELLED, clean_caption
from near_duplicates import repeats_of_held_out

from lib.data import DatasetWriter, PromptColumn
from lib.files import DataError

WHERE = "a clone of https://github.com/razorx89/roco-dataset after its scripts/fetch.py (no account needed)"
SPLITS = {"train": "train", "validation": "val", "test": "test"}
CARD = {
    "title": "ROCO, radiology objects in context",
    "modality": "mixed radiology",
    "dims": 2,
    "classes": {"unlabelled": 1},
    "level": "R",
    "licence": "By article, see the repository's licences.txt: CC BY, BY-NC, BY-NC-SA, BY-NC-ND and others.",
    "citation": (
        "Pelka O, Koitka S, Rückert J, Nensa F, Friedrich CM. Radiology Objects in COntext (ROCO). LABELS 2018, LNCS "
        "11043, 180-189. doi:10.1007/978-3-030-01364-6_20"
    ),
    "source": "https://github.com/razorx89/roco-dataset",
    "splits": "ROCO's own, by figure; figures whose article has one in a more held-out split are left out.",
    "prompts": {
        "report": PromptColumn(role="report", origin="human", source="the figure's caption, cleaned as the paper does")
    },
}


def build(args: argparse.Namespace) -> None:
    """Write the folder from the radiology part, with the article as the patient."""
    with unpacked(args) as (folder, origin):
        tables = {split: path for split in SPLITS for path in folder.rglob(f"{split}/radiology/captions.txt")}
        found, short, absent = [], 0, 0
        for split, table in tables.items():
            rows = read_table(table.with_name("licences.txt"))
            require(rows, ("ROCO_ID", "PMC_ID"), table.with_name("licences.txt"))
            article = {row["ROCO_ID"]: row["PMC_ID"].split("_")[0] for row in rows}
            for line in table.read_text(encoding="utf-8", errors="replace").splitlines():
                name, _, text = line.partition("\t")
                path, text = table.parent / "images" / f"{name.strip()}.jpg", clean_caption(text)
                short += text is None
                absent += text is not None and not path.is_file()
                if text and path.is_file():
                    found.append((path, article.get(path.stem, path.stem), SPLITS[split], text))
        if not found:
            raise DataError(
                f"{folder} holds no images of ROCO (a mirror has its captions only): clone "
                "https://github.com/razorx89/roco-dataset, run its scripts/fetch.py and give the clone as --archive."
            )
        left_out = set(
            repeats_of_held_out([article for _, article, _, _ in found], [split for _, _, split, _ in found])
        )
        print(f"reading {len(found)} figures; {short} captions are too short and {absent} images were not fetched")
        notes = [
            UNLABELLED,
            "patient_id is the article (PMC number), of which several figures may show one patient.",
            f"Left out: {short} with a short caption, {absent} whose image was not fetched, {len(left_out)} of an "
            "article in a more held-out split.",
            origin,
        ]
        with DatasetWriter(args.out, CARD | {"notes": notes}, overwrite=args.overwrite) as writer:
            for i, (path, article, split, text) in enumerate(found):
                if i in left_out:
                    continue
                image = colour_image(path, path)
                writer.add(
                    case_id=path.stem,
                    patient_id=article,
                    split=split,
                    image=image,
                    mask=np.zeros(image.shape[:2], bool),
                    spacing=(1, 1),
                    prompts={"report": text},
                )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; a mirror is read like a clone."""
    run("roco", build, __doc__, WHERE, argv=argv)


if __name__ == "__main__":
    main()
