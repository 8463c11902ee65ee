"""Make the dataset folder of CVC-ClinicDB (colonoscopy frames with polyps, an external test) from a mirror or archive.

python data_scripts/cvc_clinicdb.py --mirror ../shared/data --out data/cvc_clinicdb
python data_scripts/cvc_clinicdb.py --archive ~/Downloads/archive.zip --out data/cvc_clinicdb
"""

import argparse
from collections.abc import Sequence

from common import Mirror, binary_mask, colour_image, find, read_table, require, run, unpacked
from polyp_words import FROM_MASK, FROM_MIRROR, MIRRORED, NOTES, TEXTS, from_mask, from_row

from lib.data import DatasetWriter

WHERE = "from https://www.kaggle.com/datasets/balraj98/cvcclinicdb (free account)"
CARD = {
    "title": "CVC-ClinicDB, polyps in colonoscopy",
    "modality": "colonoscopy",
    "dims": 2,
    "classes": {"polyp": 1},
    "level": "R",
    "licence": (
        'The page as remembered: "Use of this database is completely restricted for research and educational '
        'purposes. The use of this database is forbidden for commercial purposes."'
    ),
    "citation": (
        "Bernal J, Sánchez FJ, Fernández-Esparrach G, Gil D, Rodríguez C, Vilariño F. WM-DOVA maps for accurate polyp "
        "highlighting in colonoscopy. Comput Med Imaging Graph 43:99-111 (2015). "
        "doi:10.1016/j.compmedimag.2015.02.007"
    ),
    "splits": "All cases are test cases: the set serves as external test of models trained on Kvasir-SEG.",
}
PATIENTS = (
    "patient_id is the video sequence; some sequences may show the same patient. Splits by frame, as MedVLSM and "
    "MedCLIPSeg make them, leak."
)


def from_mirror(args: argparse.Namespace) -> None:
    """Write the folder from a mirror."""
    mirror = Mirror(args.mirror, "cvc_clinicdb", ("sequence", *MIRRORED))
    print(f"reading {len(mirror.rows)} images from {mirror.folder}")
    card = {
        **CARD,
        "source": (
            "Images: github.com/krishnakaushik25/Medical-Image-Segmentation-DL, f8944a0, through a mirror (JPEG 92; "
            f"eight frames at most of each sequence). {TEXTS}"
        ),
        "prompts": FROM_MIRROR,
        "notes": [PATIENTS, *NOTES],
    }
    with DatasetWriter(args.out, card, overwrite=args.overwrite) as writer:
        for row in mirror.rows:
            mask = mirror.mask(row)
            writer.add(
                case_id=row["case_id"],
                patient_id=f"sequence_{int(row['sequence']):02d}",
                split="test",
                image=mirror.image(row, colour=True),
                mask=mask,
                spacing=(1, 1),
                prompts=from_row(row, mask),
            )


def from_archive(args: argparse.Namespace) -> None:
    """Write the folder from the archive, whose metadata.csv tells the sequence of each frame."""
    with unpacked(args) as (folder, origin):
        table = find(folder, "metadata.csv")
        rows = read_table(table)
        require(rows, ("frame_id", "sequence_id", "png_image_path", "png_mask_path"), table)
        print(f"reading {len(rows)} images")
        card = {**CARD, "source": WHERE.split()[1], "prompts": FROM_MASK, "notes": [PATIENTS, *NOTES, origin]}
        with DatasetWriter(args.out, card, overwrite=args.overwrite) as writer:
            for row in rows:
                image, drawn = table.parent / row["png_image_path"], table.parent / row["png_mask_path"]
                mask = binary_mask(drawn, drawn, above=127)
                writer.add(
                    case_id=f"cvc_{int(row['frame_id']):03d}",
                    patient_id=f"sequence_{int(row['sequence_id']):02d}",
                    split="test",
                    image=colour_image(image, image),
                    mask=mask,
                    spacing=(1, 1),
                    prompts=from_mask(mask),
                )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    run("cvc_clinicdb", lambda args: (from_mirror if args.mirror else from_archive)(args), __doc__, WHERE, argv=argv)


if __name__ == "__main__":
    main()
