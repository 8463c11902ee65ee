"""Make the dataset folder of COVID-QU-Ex (chest X-rays with lung masks) from the archive.

    python data_scripts/covid_qu_ex.py --archive ~/Downloads/archive.zip --out data/covid_qu_ex

--mirror takes a folder `covid_qu_ex` with the unpacked files.
"""

import argparse
import re
from collections.abc import Sequence

from common import binary_mask, find, grey_image, run, unpacked
from medclip_prompts import PromptSets, published_lists
from near_duplicates import repeats_of_held_out

from lib.data import DatasetWriter, PromptColumn
from lib.files import DataError

WHERE = "from https://www.kaggle.com/datasets/anasmohammedtahir/covidqu (free account)"
SPLITS = {"Train": "train", "Val": "val", "Test": "test"}
KINDS = {"COVID-19": "covid", "Non-COVID": "pneumonia", "Normal": "normal"}
CARD = {
    "title": "COVID-QU-Ex, chest X-rays with lungs",
    "modality": "chest radiography",
    "dims": 2,
    "classes": {"lungs": 1},
    "level": "R",
    "licence": "The Kaggle card as remembered: CC BY-SA 4.0; its images come from sources with their own terms.",
    "citation": (
        "Tahir AM, Chowdhury MEH, Khandakar A, et al. COVID-19 infection localization and severity grading from chest "
        "X-ray images. Computers in Biology and Medicine 139:105002 (2021). doi:10.1016/j.compbiomed.2021.105002"
    ),
    "source": WHERE.split()[1],
}
NOTES = [
    "MedCLIP-SAMv2 uses 16,280 / 1,372 / 957 of these images and does not name them: its split cannot be rebuilt.",
    "Patients are known only where the file name starts with sub-S; elsewhere patient_id is the case id. Near-"
    "duplicates were not looked for.",
    "The COVID-19 images are those of QaTa-COV19: never train on one and test on the other.",
    "The lung masks were drawn by networks and corrected by hand, so they favour networks.",
    "'pneumonia' in the prompts is the class Non-COVID, viral or bacterial; the paper's list for it is that of viral "
    "pneumonia.",
    "The pixel size is unknown: spacing 1 means pixels.",
]


def patient_of(name: str) -> str:
    """The patient in a file name, e.g. sub-S09345_ses-E18_run-1 -> S09345; the name itself where there is none."""
    return found[1] if (found := re.match(r"sub-(S\d+)", name)) else name


def build(args: argparse.Namespace) -> None:
    """Write the folder with the dataset's own splits, less images of patients that a more held-out split has too."""
    with unpacked(args) as (folder, origin):
        # The archive holds a second part, of infections, with the same folder names below.
        root = find(folder, "Lung Segmentation Data")
        images = sorted(path for path in root.rglob("*.png") if path.parent.name == "images")
        parts = [(path.parents[2].name, path.parents[1].name) for path in images]
        if not images or (
            odd := [p for p, (s, k) in zip(images, parts, strict=True) if s not in SPLITS or k not in KINDS]
        ):
            shown = odd[0] if images else root
            raise DataError(
                f"{shown} does not lie in Train, Val or Test / {' or '.join(KINDS)} / images: keep the folders."
            )
        patients, splits = [patient_of(path.stem) for path in images], [SPLITS[split] for split, _ in parts]
        left_out = set(repeats_of_held_out(patients, splits))
        sets = PromptSets("xray", published_lists(args))
        print(f"reading {len(images)} images, leaving out {len(left_out)} of patients of a more held-out split")
        card = CARD | {
            "splits": "The dataset's own, by image; training images of validation and test patients are left out.",
            "prompts": {
                "class@pathology": PromptColumn(role="class", origin="class-oracle", source="the folder of the image"),
                **sets.columns,
            },
            "notes": [*NOTES, f"Left out as of patients of a more held-out split: {len(left_out)} images.", origin],
        }
        with DatasetWriter(args.out, card, overwrite=args.overwrite) as writer:
            for i, (path, (_, kind)) in enumerate(zip(images, parts, strict=True)):
                if i in left_out:
                    continue
                drawn = path.parents[1] / "lung masks" / path.name
                if not drawn.is_file():
                    raise DataError(f"{path} has no mask in 'lung masks': give the original archive.")
                writer.add(
                    case_id=re.sub(r"[^A-Za-z0-9._-]", "_", path.stem),
                    patient_id=patients[i],
                    split=splits[i],
                    image=grey_image(path, path),
                    mask=binary_mask(drawn, drawn, above=127),
                    spacing=(1, 1),
                    prompts={"class@pathology": f"{kind}.", **sets.of(KINDS[kind])},
                )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; a mirror is read like an unpacked archive."""
    run("covid_qu_ex", build, __doc__, WHERE, argv=argv)


if __name__ == "__main__":
    main()
