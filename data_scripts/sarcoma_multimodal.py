"""Make the dataset folder of soft-tissue sarcoma (the same patients in CT, T1 MR and FDG-PET) from a mirror or archive.

python data_scripts/sarcoma_multimodal.py --mirror ../shared/data --out data/sarcoma_multimodal
python data_scripts/sarcoma_multimodal.py --archive ~/Downloads/data_sets/ibsi_validation/nifti \
    --out data/sarcoma_multimodal
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace

from common import run, unpacked
from volumes import Layout, Scan, find_scans, mirror_rows, structures, write

from lib.files import DataError

KINDS = {  # as files name them -> modality, and what T1 calls the scan where that is more
    "CT": ("CT", None),
    "MR_T1": ("MR", "T1-weighted magnetic resonance imaging"),
    "PET": ("PET", None),
}
SARCOMA = Layout(
    name="sarcoma_multimodal",
    title="Soft-tissue sarcoma in CT, MR and PET",
    modality="CT",
    region="extremity",
    structures=structures("tumor"),
    splits="Ours, by patient, seeded: train/val/test 70/10/20 %; a patient's three modalities stay together.",
    licence="Creative Commons Attribution 3.0 Unported (README of ibsi_validation).",
    citation=(
        "Vallières M, Freeman CR, Skamene SR, El Naqa I. A radiomics model from joint FDG-PET and MRI texture features "
        "for the prediction of lung metastases in soft-tissue sarcomas of the extremities. Phys Med Biol 60 (2015). "
        "doi:10.7937/K9/TCIA.2015.7GO2GSKS; prepared by A. Zwanenburg for the IBSI; Clark K, et al. J Digit Imaging 26 "
        "(2013)."
    ),
    where="from https://github.com/theibsi/data_sets (ibsi_validation/nifti)",
    notes=(
        "PET is in SUV; MR was corrected for its bias field and normalised to fat by the publisher.",
        "The volumes are cut out 5 cm around the tumor, and the three of a patient have grids of their own.",
        "A tumor is in every volume, so a model is never asked to find none.",
    ),
)


def from_mirror(args: argparse.Namespace) -> None:
    """Write the folder from a mirror, with its splits."""
    columns = ("id", "patient", "split", "image", "mask")
    folder, rows = mirror_rows(args.mirror, "sts_ct_pet_mr", columns)
    scans = []
    for row in rows:
        kind = row["id"].removeprefix(f"{row['patient']}_")
        if kind not in KINDS:
            raise DataError(f"{folder / 'metadata.csv'} has the volume '{row['id']}': expected CT, MR_T1 or PET.")
        modality, words = KINDS[kind]
        files = folder / row["image"], (folder / row["mask"],)
        scans.append(Scan(row["id"], row["patient"], *files, row["split"], modality, words))
    layout = replace(SARCOMA, splits="The mirror's, by patient: a patient's three modalities stay together.")
    copy = "Images: github.com/theibsi/data_sets, 6da9602, through a mirror that holds the patients with small files."
    write(args, layout, scans, [copy])


def from_archive(args: argparse.Namespace) -> None:
    """Write the folder from the publisher's files, STS_NNN/CT_image.nii.gz with CT_mask.nii.gz and so on."""
    with unpacked(args) as (folder, origin):
        scans = []
        for kind, (modality, words) in KINDS.items():
            files = {"image": f"{{patient}}/{kind}_image.nii", "mask": f"{{patient}}/{kind}_mask.nii"}
            found, _ = find_scans(folder, replace(SARCOMA, **files))
            scans += [replace(s, case_id=f"{s.patient}_{kind}", modality=modality, scan=words) for s in found]
        write(args, SARCOMA, sorted(scans, key=lambda scan: scan.case_id), [origin])


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    run(
        SARCOMA.name,
        lambda args: (from_mirror if args.mirror else from_archive)(args),
        __doc__,
        SARCOMA.where,
        argv=argv,
    )


if __name__ == "__main__":
    main()
