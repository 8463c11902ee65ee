"""HECKTOR 2022: PET on the grid of the masks or CT, records as sentences, and time to relapse."""

import csv

import hecktor
import numpy as np
import pytest
from volume_files import save_nifti, scan

from lib.data import _decode, load_dataset

HEADER = (
    "PatientID,Task 1,Task 2,CenterID,Gender,Age,Weight,Tobacco,Alcohol,Performance status,"
    '"HPV status (0=-, 1=+)",Surgery,Chemotherapy'
)


def write_table(path, header, rows):
    with open(path, "w", newline="") as file:
        file.write(header + "\n")
        csv.writer(file).writerows(rows)


@pytest.fixture
def archive(tmp_path):
    """A folder in the layout of hecktor2022_training: 12 patients, PET on a coarser grid than CT and masks."""
    folder = tmp_path / "hecktor2022_training"
    for number in range(12):
        name = f"CHUM-{number:03d}"
        ct, mask = scan((1, 2), (8, 10, 10), "CT", seed=number)
        save_nifti(folder / f"imagesTr/{name}__CT.nii.gz", ct, (3, 1, 1), "LPS")
        save_nifti(folder / f"labelsTr/{name}.nii.gz", mask, (3, 1, 1), "LPS")
        hot = np.full((9, 6, 6), 0.5, np.float32)
        hot[1] = 10  # the slice at 3 mm, where all is that is outlined
        save_nifti(folder / f"imagesTr/{name}__PT.nii.gz", hot, (3, 4, 4), "LPS", shift=(-4, -4, 0))
    clinical = [[f"CHUM-{n:03d}", 1, 1, 1, "M", 61, 80.0, 1.0, "", 1.0, 0.0, 0.0, 1.0] for n in range(11)]
    write_table(folder / "hecktor2022_clinical_info_training.csv", HEADER, clinical)
    endpoint = [[f"CHUM-{n:03d}", 1, 1, n % 2, 100 + n] for n in range(10)]
    write_table(folder / "hecktor2022_endpoint_training.csv", "PatientID,Task 2,CenterID,Relapse,RFS", endpoint)
    return folder


def run(archive, tmp_path, modality="pet"):
    out = tmp_path / f"hecktor_{modality}"
    hecktor.main(["--modality", modality, "--archive", str(archive), "--out", str(out)])
    return load_dataset(out, verify=True)


def test_pet_comes_onto_the_grid_of_the_masks(archive, tmp_path):
    dataset = run(archive, tmp_path)
    image, mask = _decode(dataset.cases[0], 1)
    assert image.shape == (1, 8, 10, 10) and dataset.cases[0].spacing == (3, 1, 1)
    assert mask.sum() == 3 and image[0][mask > 0] == pytest.approx(np.sqrt(10 / 15), abs=0.01)
    assert image[0, 4] == pytest.approx(np.sqrt(0.5 / 15), abs=0.01)
    assert dataset.cases[0].prompts["context"] == "A positron emission tomography scan of the head and neck."


def test_records_and_outcomes_are_those_of_the_patient(archive, tmp_path):
    dataset = run(archive, tmp_path, "ct")
    cases = {case.case_id: case for case in dataset.cases}
    assert cases["CHUM-003.GTVp"].outcome == cases["CHUM-003.GTVn"].outcome == (103, True)
    assert cases["CHUM-004.GTVp"].outcome == (104, False)
    assert cases["CHUM-010.GTVp"].outcome is None and cases["CHUM-011.GTVp"].prompts["report"] is None
    assert cases["CHUM-000.GTVp"].prompts["report"] == (
        "Patient with a tumor of the head and neck, 61 years, male, 80 kg, smoker, performance status 1, "
        "HPV negative, without surgery, treated with radiotherapy, with chemotherapy."
    )
    assert any("5 of 10 patients relapsed" in note for note in dataset.card.notes)


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        (["CHUM-000", 1, 1, 1, -4], "gives patient 'CHUM-000' the follow-up '-4'"),
        (["CHUM-000", 1, 1, 7, 40], "gives patient 'CHUM-000' the outcome '7'"),
    ],
)
def test_endpoints_that_cannot_be_are_refused(archive, tmp_path, row, sentence):
    write_table(archive / "hecktor2022_endpoint_training.csv", "PatientID,Task 2,CenterID,Relapse,RFS", [row])
    with pytest.raises(SystemExit, match=sentence):
        run(archive, tmp_path)


def test_a_table_without_a_column_or_with_words_for_numbers_is_refused(archive, tmp_path):
    table = archive / "hecktor2022_clinical_info_training.csv"
    table.write_text(table.read_text().replace("Tobacco", "Snuff"))
    with pytest.raises(SystemExit, match="lacks the column 'Tobacco'"):
        run(archive, tmp_path)
    table.write_text(table.read_text().replace("Snuff", "Tobacco").replace("M,61,", "M,old,"))
    with pytest.raises(SystemExit, match="gives patient 'CHUM-000' the Age 'old'"):
        run(archive, tmp_path)
    table.unlink()
    with pytest.raises(SystemExit, match=r"holds no 'hecktor2022_clinical_info_training\.csv'"):
        run(archive, tmp_path)
