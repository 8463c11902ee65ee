"""Make a dataset folder of BraTS 2021 (brain MR with glioma, 3 parts) in one of its four sequences, from the archive.

python data_scripts/brats.py --sequence t1ce --archive ~/Downloads/BraTS2021_Training_Data.tar --out data/brats_t1ce
"""

from collections.abc import Sequence
from dataclasses import replace

from volumes import Layout, Structure, choose, run_layout, structures

SEQUENCES = {
    "t1ce": "contrast-enhanced T1-weighted",
    "flair": "T2-weighted FLAIR",
    "t1": "T1-weighted",
    "t2": "T2-weighted",
}
BRATS = Layout(
    name="brats",
    title="BraTS 2021, brain MR with the parts of gliomas",
    modality="MR",
    region="brain",
    structures=structures(
        Structure("enhancing tumor", (4,)), Structure("edema", (2,)), Structure("necrotic core", (1,))
    ),
    mask="{case}/{case}_seg.nii",
    splits="Ours, by patient, seeded: train/val/test 70/10/20 %.",
    licence="For research, after registration and agreement; recalled, not verified.",
    citation="Baid U, Ghodasara S, Mohan S, et al. The RSNA-ASNR-MICCAI BraTS 2021 benchmark. arXiv:2107.02314.",
    where="from https://www.synapse.org/Synapse:syn25829067 (account and agreement)",
    notes=("The scans have no skull; the four sequences of a patient share a grid.",),
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    sequence, rest = choose("--sequence", SEQUENCES, argv)
    layout = replace(
        BRATS,
        name=f"brats_{sequence}",
        image=f"{{case}}/{{case}}_{sequence}.nii",
        scan=f"{SEQUENCES[sequence]} magnetic resonance imaging",
    )
    run_layout(layout, __doc__, rest)


if __name__ == "__main__":
    main()
