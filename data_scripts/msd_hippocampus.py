"""Make the dataset folder of MSD Task04 (T1 MR of the hippocampus, 2 parts) from a mirror or the archive.

python data_scripts/msd_hippocampus.py --mirror ../shared/data --out data/msd_hippocampus
python data_scripts/msd_hippocampus.py --archive ~/Downloads/Task04_Hippocampus.tar --out data/msd_hippocampus
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace

from common import run
from volumes import Layout, Scan, build, mirror_rows, structures, write

HIPPOCAMPUS = Layout(
    name="msd_hippocampus",
    title="MSD Task04, MR of the hippocampus in 2 parts",
    modality="MR",
    region="brain",
    scan="T1-weighted magnetic resonance imaging",
    structures=structures("anterior hippocampus", "posterior hippocampus"),
    image="imagesTr/{case}.nii",
    mask="labelsTr/{case}.nii",
    splits="Ours, by volume, seeded: train/val/test 70/10/20 %.",
    licence='CC BY-SA 4.0 (medicaldecathlon.com: "permissive copyright-license (CC-BY-SA 4.0)").',
    citation=(
        "Antonelli M, Reinke A, Bakas S, et al. The Medical Segmentation Decathlon. Nat Commun 13:4128 (2022). "
        "Simpson AL, et al. arXiv:1902.09063."
    ),
    where="from http://medicaldecathlon.com (Task04_Hippocampus.tar)",
    notes=(
        "Patients are not named: each volume counts as one, so that two of one patient could be in different splits.",
        "The volumes are cut out around the hippocampus, and their grey values came on very different scales.",
    ),
)


def from_mirror(args: argparse.Namespace) -> None:
    """Write the folder from a mirror, with its splits."""
    folder, rows = mirror_rows(args.mirror, "msd_hippocampus", ("case_id", "split", "image", "mask"))
    scans = [
        Scan(row["case_id"], row["case_id"], folder / row["image"], (folder / row["mask"],), row["split"])
        for row in rows
    ]
    layout = replace(HIPPOCAMPUS, splits="The mirror's, seeded, by volume.")
    copy = "Images: github.com/udacity/nd320-c3-3d-imaging-starter, 895fee6, through a mirror that holds part of them."
    write(args, layout, scans, [copy])


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    run(
        HIPPOCAMPUS.name,
        lambda args: from_mirror(args) if args.mirror else build(HIPPOCAMPUS, args),
        __doc__,
        HIPPOCAMPUS.where,
        argv=argv,
    )


if __name__ == "__main__":
    main()
