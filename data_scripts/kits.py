"""Make the dataset folder of KiTS19 or KiTS23 (abdominal CT with kidneys and their tumors) from the archive.

    python data_scripts/kits.py --archive ~/Downloads/kits19/data --out data/kits

The images are not in the repository: its own script fetches them into the folders of the cases.
"""

from collections.abc import Sequence

from volumes import HERMES, Layout, Structure, run_layout, structures

VAL = "1 161 18 37 55 110 127 89 40"
TEST = (
    "43 196 10 159 46 184 13 19 195 144 17 188 51 170 58 26 193 44 165 134 118 104 31 32 71 179 93 72 97 70 54 22 167 "
    "92 108 181 146 6 131 76 49 178"
)


def cases(numbers: str) -> tuple[str, ...]:
    """The folders of cases, e.g. 43 -> case_00043."""
    return tuple(f"case_{int(number):05d}" for number in numbers.split())


KITS = Layout(
    name="kits",
    title="KiTS, abdominal CT with kidneys and kidney tumors",
    modality="CT",
    region="abdomen",
    structures=structures(
        Structure("right kidney and left kidney", released="rightkidney and leftkidney", key="kidneys"), "kidney tumor"
    ),
    image="{case}/imaging.nii",
    mask="{case}/segmentation.nii",
    ignored={3: "cyst, from KiTS21 on"},
    held_out={"val": cases(VAL), "test": cases(TEST)},
    splits=f"Validation and test: those of {HERMES}, by patient; cases that only KiTS23 has are for training.",
    licence="CC BY-NC-SA 4.0 (data/LICENSE of the kits19 repository).",
    citation=(
        "Heller N, Sathianathen N, Kalapara A, et al. The KiTS19 challenge data: 300 kidney tumor cases with clinical "
        "context, CT semantic segmentations, and surgical outcomes. arXiv:1904.00445."
    ),
    where="from https://github.com/neheller/kits19 (or kits23): its folder of cases after its script for images ran",
    notes=("The mask of the kidneys leaves out the tumors in them.",),
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    run_layout(KITS, __doc__, argv)


if __name__ == "__main__":
    main()
