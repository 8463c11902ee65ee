"""Soft-tissue sarcoma: three modalities a patient, from the publisher's files and from the mirror."""

import csv
import shutil

import numpy as np
import pytest
import sarcoma_multimodal
from volume_files import save_nifti, scan

from lib.data import _decode, load_dataset

KINDS = ("CT", "MR_T1", "PET")


@pytest.fixture
def archive(tmp_path):
    """A folder in the layout of ibsi_validation/nifti: 10 patients, three grids each."""
    folder = tmp_path / "nifti"
    for number in range(10):
        for kind, spacing in zip(KINDS, ((3.3, 1, 1), (3.3, 1.2, 1.2), (3.3, 5.5, 5.5)), strict=True):
            image, mask = scan((1,), modality=kind[:2] if kind != "PET" else kind, seed=number)
            save_nifti(folder / f"STS_{number:03d}/{kind}_image.nii.gz", image, spacing, "LPS")
            save_nifti(folder / f"STS_{number:03d}/{kind}_mask.nii.gz", mask, spacing, "LPS")
    return folder


def test_a_patients_modalities_stay_together(archive, tmp_path):
    sarcoma_multimodal.main(["--archive", str(archive), "--out", str(tmp_path / "sarcoma_multimodal")])
    dataset = load_dataset(tmp_path / "sarcoma_multimodal", verify=True)
    assert dataset.card.counts == {"train": 21, "val": 3, "test": 6}
    case = dataset.cases[1]
    assert (case.case_id, case.patient_id, case.target) == ("STS_000_MR_T1.tumor", "STS_000", "tumor")
    assert case.prompts["context"] == "A T1-weighted magnetic resonance imaging scan of the extremity."
    assert case.prompts["context@wrong"] == "A positron emission tomography scan of the extremity."
    assert case.prompts["target@other"] is None
    assert [c.spacing[1] for c in dataset.cases[:3]] == pytest.approx([1, 1.2, 5.5])
    assert dataset.card.modality == "CT, MR, PET"


def test_an_archive_without_one_modality_is_refused(archive, tmp_path):
    for path in archive.rglob("PET_*"):
        path.unlink()
    with pytest.raises(SystemExit, match=r"holds no '\{patient\}/PET_image\.nii'"):
        sarcoma_multimodal.main(["--archive", str(archive), "--out", str(tmp_path / "sarcoma_multimodal")])


@pytest.fixture
def mirror(mirrors, tmp_path):
    source, part = mirrors / "sts_ct_pet_mr", tmp_path / "mirror/sts_ct_pet_mr"
    if not source.is_dir():
        pytest.skip(f"There is no mirror of the sarcomas at {source}: set MIRROR_DIR to have it tested.")
    with open(source / "metadata.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["patient"] in ("STS_025",)]
    for row in rows:
        for kind in ("image", "mask"):
            (part / row[kind]).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / row[kind], part / row[kind])
    write_rows(part, rows)
    return part, rows


def write_rows(folder, rows):
    with open(folder / "metadata.csv", "w", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)


def test_the_mirror_becomes_a_folder_with_one_tumor_in_three_pictures(mirror, tmp_path):
    part, rows = mirror
    sarcoma_multimodal.main(["--mirror", str(part.parent), "--out", str(tmp_path / "sarcoma_multimodal")])
    dataset = load_dataset(tmp_path / "sarcoma_multimodal", verify=True)
    assert dataset.card.counts == {"test": 3}
    images, masks = zip(*(_decode(case, 1) for case in dataset.cases), strict=True)
    assert [mask.sum() for mask in masks] == [int(row["mask_voxels"]) for row in rows]
    ml = [mask.sum() * np.prod(case.spacing) / 1000 for mask, case in zip(masks, dataset.cases, strict=True)]
    assert max(ml) < 2 * min(ml)  # the same tumour, outlined on three grids
    ct, mr, pet = images
    assert pet[0][masks[2] > 0].mean() > 1.5 * pet[0][masks[2] == 0].mean()  # it takes up sugar


def test_a_volume_of_another_kind_is_named(mirror, tmp_path):
    part, rows = mirror
    write_rows(part, [rows[0] | {"id": "STS_025_US"}, *rows[1:]])
    with pytest.raises(SystemExit, match="has the volume 'STS_025_US': expected CT, MR_T1 or PET"):
        sarcoma_multimodal.main(["--mirror", str(part), "--out", str(tmp_path / "sarcoma_multimodal")])
