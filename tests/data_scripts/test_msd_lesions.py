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


def test_what_is_usual_is_not_read_off_test_patients_of_seen_diseases(archive, tmp_path):
    with open(archive / "attributes.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for one in rows:  # those that show a cyst too, and are tested for it
        if one["lesion"] == "renal cell carcinoma":
            one["shape_code"] = "2" if one["id"] in ("case_00000", "case_00001") else one["shape_code"]
    tested = [one for one in rows if one["shape_code"] == "2"]
    rows += [one | {"id": name} for one in tested for name in ("case_00000", "case_00001")] * 4
    with open(archive / "attributes.csv", "w", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)
    run(archive, tmp_path / "out")
    made = {case.case_id: case for case in load_dataset(tmp_path / "out").cases}
    tumor, cyst = made["case_00000.renal_cell_carcinoma"], made["case_00000.renal_cyst"]
    assert tumor.prompts["attribute.shape"] == "The shape of the lesion is irregular."
    assert tumor.prompts["attribute.shape@known"] == "The shape of the lesion is round-like."
    assert cyst.prompts["attribute.shape@known"] == "The shape of the lesion is round-like."  # its only row


def test_a_cube_about_the_lesions_is_kept(archive, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(archive, whole, "--extent", "inf")
    run(archive, cut, "--extent", "20")
    before, after = load_dataset(whole), load_dataset(cut)
    shape = {case.case_id: nibabel.load(case.mask).shape for case in (*before.cases, *after.cases)}
    assert set(shape.values()) == {(10, 10, 4)}  # 20 mm of 10 x 12 x 8 voxels of 2 x 2 x 5 mm
    kept = sizes(after)
    assert all(kept[name] == voxels for name, voxels in sizes(before).items())  # they fit in
    assert "20 mm" in " ".join(after.card.notes) and "whole" in " ".join(before.card.notes)


def test_lesions_lie_anywhere_in_the_cube():
    lesions = np.zeros((40, 40, 40), bool)
    lesions[18:22, 18:22, 18:22] = True
    views = [script.view_of(lesions, (1.0, 1.0, 1.0), 20.0, f"case_{number}") for number in range(60)]
    assert views[0] == script.view_of(lesions, (1.0, 1.0, 1.0), 20.0, "case_0")
    assert all(lesions[view].sum() == 64 and lesions[view].shape == (20, 20, 20) for view in views)
    starts = np.array([[axis.start for axis in view] for view in views])
    assert (starts.min(0) <= 4).all() and (starts.max(0) >= 16).all()
    lesions[1, 1, 1] = lesions[38, 38, 38] = True  # more than the cube holds
    assert all(lesions[script.view_of(lesions, (1.0, 1.0, 1.0), 20.0, f"case_{number}")].any() for number in range(20))
    nothing = script.view_of(np.zeros_like(lesions), (1.0, 1.0, 1.0), 20.0, "case")
    assert [axis.stop - axis.start for axis in nothing] == [20, 20, 20]
    assert script.view_of(lesions, (1.0, 1.0, 1.0), float("inf"), "case") == (slice(0, 40),) * 3


def test_an_image_without_its_masks_is_not_passed_over(archive, tmp_path):
    (archive / "Task07_Pancreas/labelsTr").rename(tmp_path / "elsewhere")
    with pytest.raises(SystemExit, match=r"holds no 'labelsTr/pancreas_\{case\}\.nii'"):
        run(archive, tmp_path / "out")


def test_a_mask_on_another_grid_is_refused(archive, tmp_path):
    mask = archive / "kits23/case_00003/segmentation.nii.gz"
    moved = np.diag([2.0, 2.0, 5.0, 1.0])
    moved[0, 3] = 40
    nibabel.save(nibabel.Nifti1Image(np.asarray(nibabel.load(mask).dataobj), moved), mask)
    with pytest.raises(SystemExit, match=r"lie 40\.0 mm apart"):
        run(archive, tmp_path / "out")


def test_an_extent_of_nothing_is_refused(archive, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(archive, tmp_path / "out", "--extent", "0")
    assert "give mm above 0, or inf" in capsys.readouterr().err


def test_a_mirror_and_an_archive_give_the_same(archive, tmp_path, zipped):
    zipped(archive)
    script.main(["--mirror", str(archive), "--out", str(tmp_path / "a")])
    script.main(["--archive", str(archive.with_suffix(".zip")), "--out", str(tmp_path / "b")])
    one, other = (load_dataset(tmp_path / name) for name in "ab")
    assert [(case.case_id, case.split, case.prompts) for case in one.cases] == [
        (case.case_id, case.split, case.prompts) for case in other.cases
    ]
    assert sizes(one) == sizes(other)
    assert "sha256" in other.card.notes[-1]


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
