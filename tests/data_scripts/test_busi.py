"""BUSI: folders from the mirror and from the original archive, and its near-duplicates."""

import csv

import busi
import numpy as np
import pytest
from common import Mirror
from near_duplicates import duplicate_groups
from PIL import Image

from lib.data import ImageCache, load_dataset


@pytest.fixture
def archive(tmp_path, scene, save, zipped):
    """A zip in the layout of Dataset_BUSI_with_GT: 10 + 10 + 10 images, of which two pairs nearly repeat."""
    folder = tmp_path / "Dataset_BUSI_with_GT"
    for label in ("benign", "malignant", "normal"):
        for number in range(1, 11):
            image, mask = scene(empty=label == "normal")
            stem = folder / label / f"{label} ({number})"
            if number == 10 and label != "normal":  # the first image again, a little brighter
                first = np.asarray(Image.open(folder / label / f"{label} (1).png"))[..., 0]
                image = np.clip(first.astype(int) + 9, 0, 255).astype(np.uint8)
            save(stem.with_name(stem.name + ".png"), np.stack([image] * 3, -1))
            save(stem.with_name(stem.name + "_mask.png"), mask)
    # A second lesion of the same image, in a file of its own.
    second = np.zeros((60, 80), bool)
    second[:5, :5] = True
    save(folder / "benign" / "benign (2)_mask_1.png", second)
    return zipped(folder)


def test_archive_becomes_a_valid_folder_with_duplicates_together(archive, tmp_path, capsys):
    busi.main(["--archive", str(archive), "--out", str(tmp_path / "busi")])
    dataset = load_dataset(tmp_path / "busi", verify=True)
    assert len(dataset.cases) == 30
    patients = {case.case_id: case.patient_id for case in dataset.cases}
    assert patients["benign_010"] == patients["benign_001"] == "group-benign_001"
    assert patients["malignant_010"] == patients["malignant_001"] == "group-malignant_001"
    assert len(set(patients.values())) == 28
    assert "busi: train" in capsys.readouterr().out.replace("BUSI, breast ultrasound images", "busi")


def test_all_masks_of_an_image_are_united_and_normals_are_empty(archive, tmp_path):
    busi.main(["--archive", str(archive), "--out", str(tmp_path / "busi")])
    cases = {case.case_id: case for case in load_dataset(tmp_path / "busi").cases}
    cache = ImageCache.load([cases["benign_002"], cases["benign_003"], cases["normal_001"]], (60, 80))
    assert cache.masks[0, 0, :5, :5].all() and cache.masks[0].sum() > 25
    assert not cache.masks[1, 0, :5, :5].any()
    assert not cache.masks[2].any()


def test_prompts_of_the_archive_say_what_they_know(archive, tmp_path):
    busi.main(["--archive", str(archive), "--out", str(tmp_path / "busi")])
    dataset = load_dataset(tmp_path / "busi")
    prompts = {case.case_id: case.prompts for case in dataset.cases}
    assert prompts["malignant_002"]["class@pathology"] == "Malignant tumor."
    assert prompts["malignant_002"]["local@class"] == "Malignant tumor in the breast ultrasound image."
    assert prompts["normal_002"]["local@mask"] == "No tumor in the breast ultrasound image."
    assert prompts["normal_002"]["global@mask"] is None
    assert all(p["global"] is None and p["local"] is None for p in prompts.values())
    assert (
        prompts["malignant_002"]["global@p1"] == "malignant breast tumor"
        and "global@p4" not in prompts["malignant_002"]
    )
    assert dataset.card.prompts["class@pathology"].origin == "class-oracle"
    assert dataset.card.prompts["local@mask"].origin == "mask-derived"


def test_the_split_of_an_archive_is_the_same_every_time(archive, tmp_path):
    for name in ("a", "b"):
        busi.main(["--archive", str(archive), "--out", str(tmp_path / name / "busi")])
    first, second = (load_dataset(tmp_path / name / "busi") for name in ("a", "b"))
    assert first.card.fingerprint == second.card.fingerprint


def test_a_wrong_checksum_stops_before_anything_is_written(archive, tmp_path):
    with pytest.raises(SystemExit, match="has the sha256 .* and not abc"):
        busi.main(["--archive", str(archive), "--out", str(tmp_path / "busi"), "--sha256", "abc"])
    assert not (tmp_path / "busi").exists()


def test_an_archive_of_something_else_is_refused(tmp_path, save, zipped):
    save(tmp_path / "holiday" / "beach.png", np.zeros((4, 4), np.uint8))
    with pytest.raises(SystemExit, match="holds no 'benign'"):
        busi.main(["--archive", str(zipped(tmp_path / "holiday")), "--out", str(tmp_path / "busi")])
    assert not (tmp_path / "busi").exists()


def test_an_image_without_its_mask_is_named(archive, tmp_path, zipped):
    import shutil

    folder = tmp_path / "Dataset_BUSI_with_GT"
    (folder / "benign" / "benign (4)_mask.png").unlink()
    with pytest.raises(SystemExit, match=r"benign \(4\)\.png has no mask"):
        busi.main(["--archive", str(folder), "--out", str(tmp_path / "busi")])
    shutil.rmtree(folder)


def test_every_duplicate_pair_of_the_mirror_is_found(mirrors):
    mirror = Mirror(mirrors, "busi", ("duplicate_group",))
    # Groups among the benign images only: a fifth of the pixels to decode and most of the groups.
    rows = [row for row in mirror.rows if row["label"] == "malignant"]
    groups = duplicate_groups([mirror.image(row) for row in rows])
    listed: dict[str, set[int]] = {}
    for row, group in zip(rows, groups, strict=True):
        if row["duplicate_group"]:
            listed.setdefault(row["duplicate_group"], set()).add(int(group))
    assert len(listed) > 10
    assert [name for name, found in listed.items() if len(found) > 1] == []


def test_mirror_becomes_a_folder_without_duplicates_across_splits(mirrors, tmp_path, save):
    # A part of the mirror that holds a test image, its undeclared near-duplicate in train, and others.
    wanted = {"malignant_010", "malignant_112", "benign_001", "benign_005", "normal_001"}
    full = Mirror(mirrors, "busi", ())
    rows = [row for row in full.rows if row["case_id"] in wanted]
    small = tmp_path / "mirror" / "busi"
    for row in rows:
        for kind in ("image", "mask"):
            (small / row[kind]).parent.mkdir(parents=True, exist_ok=True)
            (small / row[kind]).write_bytes((full.folder / row[kind]).read_bytes())
    with open(small / "metadata.csv", "w", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)
    for given in (small, small.parent):  # the dataset's folder or its parent
        busi.main(["--mirror", str(given), "--out", str(tmp_path / "busi"), "--overwrite"])
    dataset = load_dataset(tmp_path / "busi", verify=True)
    assert {case.case_id for case in dataset.cases} == wanted - {"malignant_010"}
    assert any("malignant_010" in note for note in dataset.card.notes)
    prompts = {case.case_id: case.prompts for case in dataset.cases}
    assert prompts["benign_001"]["local@mask"].startswith("One small circle-shaped benign tumor at the top")
    assert prompts["benign_001"]["local@class"] == "Benign tumor in the breast ultrasound image."
    assert prompts["benign_001"]["global@mask"] == "Ultrasound shows a tumor approximately 31×16 pixels near (197, 92)."
    assert "as remembered" in dataset.card.licence


def test_a_mirror_that_is_not_there_is_named(tmp_path):
    with pytest.raises(SystemExit, match="holds no mirror of 'busi'"):
        busi.main(["--mirror", str(tmp_path), "--out", str(tmp_path / "busi")])
