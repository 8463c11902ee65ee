"""Make the dataset folder of CHAOS (abdominal MR in three sequences, 4 organs) from a conversion to NIfTI.

    python data_scripts/chaos.py --archive ~/Downloads/CHAOS --out data/chaos

The release has DICOM slices with PNG masks, which this project does not read. Convert it first, each mask slice beside
the image slice of the same number: T1/N_InPhase.nii.gz, T1/N_OutPhase.nii.gz and T1/N_gt.nii.gz, T2/N.nii.gz and
T2/N_gt.nii.gz for patient N, with the values of the PNG files.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace

from common import run, unpacked
from volumes import HERMES, Layout, Structure, find_scans, structures, write

CHAOS = Layout(
    name="chaos",
    title="CHAOS, abdominal MR in three sequences with 4 organs",
    modality="MR",
    region="abdomen",
    structures=structures(
        Structure("liver", (63,)),
        Structure("right kidney", (126,)),
        Structure("left kidney", (189,)),
        Structure("spleen", (252,)),
    ),
    prefix="patient",
    held_out={"val": ("22",), "test": ("31", "5", "32", "36")},
    splits=f"Validation and test: those of {HERMES}, by patient; a patient's three sequences stay together.",
    licence="Recalled as CC BY-SA 4.0, not verified.",
    citation="Kavur AE, Gezer NS, Barış M, et al. CHAOS challenge. Med Image Anal 69 (2021).",
    where=(
        "from https://zenodo.org/records/3431873 (Train_Sets), converted to NIfTI as the first lines of this script say"
    ),
)
SEQUENCES = {
    "t1_in": ("T1/{case}_InPhase.nii", "T1/{case}_gt.nii", "T1-weighted in-phase"),
    "t1_out": ("T1/{case}_OutPhase.nii", "T1/{case}_gt.nii", "T1-weighted out-of-phase"),
    "t2": ("T2/{case}.nii", "T2/{case}_gt.nii", "T2-weighted"),
}


def build(args: argparse.Namespace) -> None:
    """Write the folder with the three sequences of each patient."""
    with unpacked(args) as (folder, origin):
        volumes = []
        for name, (image, mask, words) in SEQUENCES.items():
            scans, _ = find_scans(folder, replace(CHAOS, image=image, mask=mask))
            volumes += [
                replace(scan, case_id=f"{scan.case_id}_{name}", scan=f"{words} magnetic resonance imaging")
                for scan in scans
            ]
        write(args, CHAOS, volumes, [origin])


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    run(CHAOS.name, build, __doc__, CHAOS.where, argv=argv)


if __name__ == "__main__":
    main()
