"""Make the dataset folder of autoPET (whole-body FDG-PET with tumors) from the archive.

    python data_scripts/autopet.py --archive ~/Downloads/FDG-PET-CT-Lesions --out data/autopet

Give the NIfTI release, or what its own script made of the DICOM files: PATIENT/STUDY/SUV.nii.gz and SEG.nii.gz.
"""

from collections.abc import Sequence

from volumes import Layout, run_layout, structures

AUTOPET = Layout(
    name="autopet",
    title="autoPET, whole-body FDG-PET with tumors",
    modality="PET",
    region="whole body",
    structures=structures("tumor"),
    image="{patient}/{study}/SUV.nii",
    mask="{patient}/{study}/SEG.nii",
    splits="Ours, by patient, seeded: train/val/test 70/10/20 %.",
    licence="Recalled as a restricted licence of The Cancer Imaging Archive (agreement), not verified.",
    citation=(
        "Gatidis S, Hepp T, Früh M, et al. A whole-body FDG-PET/CT dataset with manually annotated tumor lesions. "
        "Sci Data 9 (2022). doi:10.7937/gkr0-xv29"
    ),
    where="from https://doi.org/10.7937/gkr0-xv29 (agreement)",
    notes=("About half of the studies show no tumor: their masks are empty.",),
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    run_layout(AUTOPET, __doc__, argv)


if __name__ == "__main__":
    main()
