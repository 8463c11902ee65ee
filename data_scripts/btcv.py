"""Make the dataset folder of BTCV (abdominal CT, 13 organs) from the archive.

python data_scripts/btcv.py --archive ~/Downloads/RawData.zip --out data/btcv
"""

from collections.abc import Sequence

from volumes import HERMES, Layout, Structure, run_layout, structures

BTCV = Layout(
    name="btcv",
    title="BTCV (BCV), abdominal CT with 13 organs",
    modality="CT",
    region="abdomen",
    structures=structures(
        "spleen",
        "right kidney",
        "left kidney",
        "gallbladder",
        "esophagus",
        "liver",
        "stomach",
        "aorta",
        "postcava",
        Structure("portal vein and splenic vein", released="portal vein and splenic vein"),
        "pancreas",
        "right adrenal gland",
        "left adrenal gland",
    ),
    image="img/img{case}.nii",
    mask="label/label{case}.nii",
    prefix="img",
    held_out={"val": ("0032",), "test": ("0006", "0038", "0022", "0034", "0026", "0031")},
    splits=f"Validation and test: those of {HERMES}.",
    licence="For research, after registration and agreement; recalled as CC BY 4.0, not verified.",
    citation=(
        "Landman B, Xu Z, Iglesias JE, et al. MICCAI Multi-Atlas Labeling Beyond the Cranial Vault: workshop and "
        "challenge (2015)."
    ),
    where="from https://www.synapse.org/Synapse:syn3193805 (account and agreement): RawData.zip of the abdomen",
    notes=("Postcava is another word for the inferior vena cava.",),
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    run_layout(BTCV, __doc__, argv)


if __name__ == "__main__":
    main()
