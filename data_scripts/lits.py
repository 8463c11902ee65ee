"""Make the dataset folder of LiTS (abdominal CT with liver and its tumors) from the archive.

python data_scripts/lits.py --archive ~/Downloads/LiTS --out data/lits
"""

from collections.abc import Sequence

from volumes import HERMES, Layout, run_layout, structures

VAL = "0 23 3 16 98 25"
TEST = "1 13 7 33 127 56 118 70 26 81 78 32 20 40 122 99 71 60 42 9 28 93 39 18 77 90"
LITS = Layout(
    name="lits",
    title="LiTS, abdominal CT with liver and liver tumors",
    modality="CT",
    region="abdomen",
    structures=structures("liver", "liver tumor"),
    image="volume-{case}.nii",
    mask="segmentation-{case}.nii",
    prefix="volume-",
    held_out={"val": VAL.split(), "test": TEST.split()},
    splits=f"Validation and test: those of {HERMES}, from the 131 scans with masks.",
    licence="Recalled as CC BY-NC-ND 4.0, not verified.",
    citation="Bilic P, Christ P, Li HB, et al. The liver tumor segmentation benchmark. Med Image Anal 84 (2023).",
    where="from https://competitions.codalab.org/competitions/17094 (free account): the two training batches",
    notes=(
        "The mask of the liver leaves out the tumors in it.",
        "Patients are not named: each scan counts as one.",
    ),
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    run_layout(LITS, __doc__, argv)


if __name__ == "__main__":
    main()
