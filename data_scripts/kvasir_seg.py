"""Make the dataset folder of Kvasir-SEG (colonoscopy frames with polyps) from a mirror or the archive.

python data_scripts/kvasir_seg.py --mirror ../shared/data --out data/kvasir_seg
python data_scripts/kvasir_seg.py --download --out data/kvasir_seg
python data_scripts/kvasir_seg.py --archive ~/Downloads/kvasir-seg.zip --out data/kvasir_seg
"""

import argparse
from collections.abc import Sequence

from common import Download, Mirror, binary_mask, colour_image, find, grey_image, make_splits, run, unpacked
from near_duplicates import duplicate_groups, name_groups, repeats_of_held_out
from polyp_words import FROM_MASK, FROM_MIRROR, MIRRORED, NOTES, TEXTS, from_mask, from_row

from lib.data import DatasetWriter
from lib.files import DataError

WHERE = "from https://datasets.simula.no/kvasir-seg (no account needed)"
# The checksum that torch_em pins for this file.
ARCHIVE = Download(
    "https://datasets.simula.no/downloads/kvasir-seg.zip",
    "03b30e21d584e04facf49397a2576738fd626815771afbbf788f74a7153478f7",
)
CARD = {
    "title": "Kvasir-SEG, polyps in colonoscopy",
    "modality": "colonoscopy",
    "dims": 2,
    "classes": {"polyp": 1},
    "level": "R",
    "licence": (
        'The page as remembered: "restricted for use for research and educational purposes only"; other use needs '
        "written consent."
    ),
    "citation": (
        "Jha D, Smedsrud PH, Riegler MA, et al. Kvasir-SEG: A Segmented Polyp Dataset. MMM 2020, LNCS 11962, 451-462. "
        "doi:10.1007/978-3-030-37734-2_37"
    ),
}
NO_PATIENTS = (
    "There are no patient ids: patient_id is the group of near-duplicates, else the case id, so frames of one polyp "
    "that do not look alike can still be in different splits."
)
# Beyond these limits the first pairs of different scenes appear: 42 bits, correlation 0.95.
ALIKE = dict(bits=36, correlation=0.97)


def from_mirror(args: argparse.Namespace) -> None:
    """Write the folder from a mirror, whose split is kept but for images that nearly repeat a held-out one."""
    mirror = Mirror(args.mirror, "kvasir_seg", MIRRORED)
    print(f"reading {len(mirror.rows)} images from {mirror.folder}")
    case_ids = [row["case_id"] for row in mirror.rows]
    groups = duplicate_groups([mirror.image(row) for row in mirror.rows], **ALIKE)
    patients = name_groups(case_ids, groups)
    left_out = repeats_of_held_out(patients, [row["split"] for row in mirror.rows])
    named = ", ".join(case_ids[i] for i in left_out) or "none"
    card = {
        **CARD,
        "source": (
            f"Images: github.com/ivezakis/effisegnet, 82503a5, through a mirror (352×352, aspect ratio lost). {TEXTS}"
        ),
        "splits": "EffiSegNet's 800/100/100 as far as the mirror holds them, by image; near-duplicates on one side.",
        "prompts": FROM_MIRROR,
        "notes": [
            NO_PATIENTS,
            f"Left out as near-duplicates of more held-out images ({len(left_out)}): {named}.",
            "The published texts exist only where the mirror could match an image to its Kvasir id.",
            "Many frames carry the endoscope's overlay with the date of the examination.",
            *NOTES,
        ],
    }
    with DatasetWriter(args.out, card, overwrite=args.overwrite) as writer:
        for i, (row, patient) in enumerate(zip(mirror.rows, patients, strict=True)):
            if i in left_out:
                continue
            mask = mirror.mask(row)
            writer.add(
                case_id=row["case_id"],
                patient_id=patient,
                split=row["split"],
                image=mirror.image(row, colour=True),
                mask=mask,
                spacing=(1, 1),
                prompts=from_row(row, mask),
            )


def from_archive(args: argparse.Namespace) -> None:
    """Write the folder from kvasir-seg.zip, splitting 80/10/10 by groups of near-duplicates."""
    with unpacked(args) as (folder, origin):
        root = find(folder, "masks").parent
        images = sorted((root / "images").glob("*.jpg"))
        if not images:
            raise DataError(f"{root / 'images'} holds no JPEG images: give the original archive.")
        print(f"reading {len(images)} images")
        case_ids = [path.stem for path in images]
        patients = name_groups(case_ids, duplicate_groups([grey_image(path, path) for path in images], **ALIKE))
        split = make_splits(patients, ["polyp"] * len(images), (0.8, 0.1, 0.1))
        card = {
            **CARD,
            "source": "https://datasets.simula.no/kvasir-seg",
            "splits": "Ours: train/val/test 80/10/10 %, seeded, near-duplicates together.",
            "prompts": FROM_MASK,
            "notes": [NO_PATIENTS, *NOTES, origin],
        }
        with DatasetWriter(args.out, card, overwrite=args.overwrite) as writer:
            for path, patient in zip(images, patients, strict=True):
                drawn = root / "masks" / path.name
                mask = binary_mask(drawn, drawn, above=127)  # saved as JPEG, so not quite black and white
                writer.add(
                    case_id=path.stem,
                    patient_id=patient,
                    split=split[patient],
                    image=colour_image(path, path),
                    mask=mask,
                    spacing=(1, 1),
                    prompts=from_mask(mask),
                )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    build = {True: from_mirror, False: from_archive}
    run("kvasir_seg", lambda args: build[bool(args.mirror)](args), __doc__, WHERE, (ARCHIVE,), argv)


if __name__ == "__main__":
    main()
