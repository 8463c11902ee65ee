"""Lesions of MSD, LiTS and KiTS: which volumes are read, what their masks are called, and what may be trained on."""

import csv

import msd_lesions as script
import nibabel
import numpy as np
import pytest
from msd_lesions import SEEN, UNSEEN, numbered

from lib.attributes import TABLE
from lib.data import load_dataset

REPORT = "Contrast-enhanced CT: A round hypodense lesion is seen in the {}, with well-defined margins."
CODES = ("enhancement", "location", "shape", "density", "variation", "surface", "relation")


def row(lesion, name, density=1):
    codes = dict(zip(CODES, (2, 1, 1, density, 1, 1, 1), strict=True))
    coded = {f"{TABLE[attribute]}_code": str(code) for attribute, code in codes.items()}
    return {"lesion": lesion, "id": name, "report": REPORT.format("organ")} | coded


def write(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, np.diag([2.0, 2.0, 5.0, 1.0])), path)


def pair(folder, image, mask, *labels, size=(10, 12, 8)):
    """A volume in HU and its labels, a box each."""
    rng = np.random.default_rng(len(labels))
    marks = np.zeros(size, np.uint8)
    for number, label in enumerate(labels):
        marks[2 + 3 * number : 4 + 3 * number, 3:7, 2:5] = label
    write(folder / image, rng.normal(40, 10, size).astype(np.int16))
    write(folder / mask, marks)


@pytest.fixture
def archive(tmp_path):
    """A few volumes of each set, and the table."""
    folder, rows = tmp_path / "lesions", []
    for number in range(8):
        pair(
            folder, f"Task03_Liver/imagesTr/liver_{number}.nii.gz", f"Task03_Liver/labelsTr/liver_{number}.nii.gz", 1, 2
        )
        rows.append(row("hepatocellular carcinoma", f"liver_{number}.nii", 1 + number % 2))
    pair(folder, "LiTS/volume-0.nii", "LiTS/segmentation-0.nii", 1, 2)
    for number, lesion in ((1, "pancreatic cancer"), (2, "pancreatic cyst"), (3, None)):
        name = f"pancreas_{number:03d}"
        pair(folder, f"Task07_Pancreas/imagesTr/{name}.nii.gz", f"Task07_Pancreas/labelsTr/{name}.nii.gz", 1, 2)
        rows += [row(lesion, f"{name}.nii")] if lesion else []
    for number in range(6):
        name = f"case_{number:05d}"
        labels = (1, 2, 3) if number in (0, 1) else (1, 2)
        pair(folder, f"kits23/{name}/imaging.nii.gz", f"kits23/{name}/segmentation.nii.gz", *labels)
        rows.append(row("renal cell carcinoma", name, 2))
    rows += [row("renal cyst", "case_00000"), row("lung cancer", "Example 1"), row("colorectal cancer", "1")]
    with open(folder / "attributes.csv", "w", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)
    return folder


def run(folder, out, *options):
    script.main(["--archive", str(folder), "--out", str(out), *options])


@pytest.fixture
def made(archive, tmp_path):
    run(archive, tmp_path / "out")
    return load_dataset(tmp_path / "out")


def sizes(dataset):
    return {case.case_id: int((np.asarray(nibabel.load(case.mask).dataobj) > 0).sum()) for case in dataset.cases}


def test_each_volume_has_the_diseases_that_are_known_of_it(made):
    found = {}
    for case in made.cases:
        found.setdefault(case.volume.rpartition("/")[2].partition(".")[0], []).append(case.target)
    assert "pancreas_003" not in str(sorted(found))  # no row in the table
    count = {name: sum(case.target == name for case in made.cases) for name in SEEN | UNSEEN}
    assert count == {
        "renal_cell_carcinoma": 6, "hepatocellular_carcinoma": 8, "lung_cancer": 0, "colorectal_cancer": 0,
        "pancreatic_cancer": 2, "pancreatic_cyst": 2, "renal_cyst": 6,
    }  # fmt: skip


def test_unseen_diseases_are_in_test_volumes_only(made):
    voxels = sizes(made)
    for case in made.cases:
        if case.target in UNSEEN and case.split != "test":
            assert voxels[case.case_id] == 0
    split = {case.case_id.partition(".")[0]: case.split for case in made.cases}
    assert split["case_00000"] == split["case_00001"] == "test"  # the second has a cyst and no row of it
    assert split["pancreas_001"] == split["pancreas_002"] == "test"
    assert {"train", "val", "test"} == set(split.values())


def test_the_pancreas_mass_is_what_the_table_calls_it(made):
    voxels = sizes(made)
    assert voxels["pancreas_001.pancreatic_cancer"] > 0 == voxels["pancreas_001.pancreatic_cyst"]
    assert voxels["pancreas_002.pancreatic_cyst"] > 0 == voxels["pancreas_002.pancreatic_cancer"]


def test_prompts_tell_of_the_lesion_and_of_its_disease(made):
    cases = {case.case_id: case for case in made.cases}
    own, absent = cases["liver_0.hepatocellular_carcinoma"], cases["case_00002.renal_cyst"]
    assert own.prompts["attribute.location"] == "The lesion is in the left liver."
    assert own.prompts["class"] == "hepatocellular carcinoma" and own.prompts["report"].startswith("Contrast")
    assert absent.prompts["attribute.location"] is None is absent.prompts["attribute.enhancement@known"]
    assert absent.prompts["attribute.density@known"] == "The lesion is hypodense."
    assert own.spacing == (5.0, 2.0, 2.0)


def test_numbers_of_the_table_are_those_of_the_files():
    assert [numbered(name) for name in ("pancreas_001.nii", "liver_2.nii.gz", "case_00003")] == [
        "pancreas_001", "liver_2", "case_00003",
    ]  # fmt: skip


def test_bad_folders_are_one_sentence(archive, tmp_path):
    def refused(folder):
        with pytest.raises(SystemExit) as excinfo:
            run(folder, tmp_path / "none")
        said = str(excinfo.value)
        assert said.endswith(".") and not (tmp_path / "none").exists()
        return said

    table = (archive / "attributes.csv").read_bytes()
    (archive / "attributes.csv").unlink()
    assert "holds no attribute table" in refused(archive)
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "attributes.csv").write_bytes(table)
    assert "holds none of liver" in refused(empty)
    pair(empty, "labelsTr/lung_900.nii.gz", "imagesTr/lung_900.nii.gz", 1)
    assert "no volume that the attribute table knows" in refused(empty)
