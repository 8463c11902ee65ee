"""Make the dataset folder of M&Ms (cine MR of the heart, 3 structures) from the archive.

python data_scripts/mnms.py --archive ~/Downloads/OpenDataset.zip --out data/mnms
"""

from collections.abc import Sequence

from volumes import Layout, run_layout, structures

MNMS = Layout(
    name="mnms",
    title="M&Ms, cine MR of the heart with 3 structures",
    modality="MR",
    region="cardiac region",
    scan="cine magnetic resonance imaging",
    structures=structures("left ventricle", "myocardium", "right ventricle"),
    image="{part}/{patient}/{patient}_sa.nii",
    mask="{part}/{patient}/{patient}_sa_gt.nii",
    parts={"Labeled": "train", "Validation": "val", "Testing": "test"},
    cine=True,
    splits=(
        "The release's, by patient. Hermes, from which DuPLUS has its splits, tests on Validation and Testing together "
        "and takes seven training patients for validation."
    ),
    licence="For research, after registration; licence recalled as open with attribution, not verified.",
    citation="Campello VM, Gkontra P, Izquierdo C, et al. Multi-centre, multi-vendor and multi-disease cardiac "
    "segmentation: the M&Ms challenge. IEEE TMI 40 (2021).",
    where="from https://www.ub.edu/mnms (registration): OpenDataset",
    notes=(
        "A volume is a frame with outlines, of which the release has two a patient (end of diastole and of systole).",
        "Short-axis slices lie aslant in the body, so that its axes are only near those of the array.",
    ),
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    run_layout(MNMS, __doc__, argv)


if __name__ == "__main__":
    main()
