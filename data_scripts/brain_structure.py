"""Make the dataset folder of brain tissues (T1-weighted MR; gray matter, white matter, fluid) from a folder.

    python data_scripts/brain_structure.py --archive ~/Downloads/brain_structure --out data/brain_structure

DuPLUS names this set and does not say where it is from. Hermes's conversion reads scans of DLBS, SALD and IXI with
maps of probabilities: {train,valid,test}/image/N_img.nii and {train,valid,test}/mask/N_probmask_graymatter.nii,
..._whitematter.nii and ..._csf.nii. A folder of your own has images/N.nii.gz and labels/N.nii.gz (1, 2, 3 in this
order).
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace

from common import run, unpacked
from volumes import Layout, Structure, find_scans, structures, write

BRAIN = Layout(
    name="brain_structure",
    title="Brain tissues in T1-weighted MR",
    modality="MR",
    region="brain",
    scan="T1-weighted magnetic resonance imaging",
    structures=structures("gray matter", "white matter", Structure("cerebrospinal fluid", released="csf", key="csf")),
    image="images/{case}.nii",
    mask="labels/{case}.nii",
    splits="Ours, by volume, seeded: train/val/test 70/10/20 %.",
    licence="That of the scans in the folder (DLBS, SALD and IXI each have their own): not verified.",
    citation=(
        "Gao Y, Li Z, Liu D, et al. Training like a medical resident: context-prior learning toward universal medical "
        "image segmentation. CVPR 2024."
    ),
    where=(
        "from https://github.com/yhygao/universal-medical-image-segmentation (its conversion tells the files' names), "
        "or a folder laid out as the first lines of this script say"
    ),
    notes=("Patients are not named: each scan counts as one.",),
)
MAPS = replace(
    BRAIN,
    image="{part}/image/{case}_img.nii",
    mask=tuple(f"{{part}}/mask/{{case}}_probmask_{tissue}.nii" for tissue in ("graymatter", "whitematter", "csf")),
    parts={"train": "train", "valid": "val", "test": "test"},
    splits="Those of the folder.",
    notes=(
        *BRAIN.notes,
        "The masks are maps of probabilities by a program, not drawn by hand; a voxel is of the likeliest tissue "
        "wherever one is above zero, as in Hermes.",
    ),
)


def build(args: argparse.Namespace) -> None:
    """Write the folder from maps of probabilities where there are some, else from labels."""
    with unpacked(args) as (folder, origin):
        layout = MAPS if any(folder.rglob("*_probmask_*.nii*")) else BRAIN
        scans, _ = find_scans(folder, layout)
        write(args, layout, scans, [origin])


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    run(BRAIN.name, build, __doc__, BRAIN.where, argv=argv)


if __name__ == "__main__":
    main()
