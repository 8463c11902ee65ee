"""Cheng's brain tumours: folders from the mirror and, with h5py, from the original MATLAB files."""

import sys
import zipfile

import figshare_brain_tumor
import numpy as np
import pytest

from lib.data import ImageCache, load_dataset


@pytest.fixture
def archive(tmp_path, scene):
    """A folder of two zips with 30 slices of 10 patients in the layout of the original files."""
    h5py = pytest.importorskip("h5py", reason="h5py is not installed: the original MATLAB files are not tested.")
    folder = tmp_path / "1512427"
    folder.mkdir()
    for part in range(2):
        with zipfile.ZipFile(folder / f"brainTumorDataPublic_{part}.zip", "w") as archive:
            for number in range(15 * part + 1, 15 * part + 16):
                image, mask = scene()
                with h5py.File(tmp_path / "one.mat", "w") as file:
                    cj = file.create_group("cjdata")
                    cj["image"], cj["tumorMask"] = image.T.astype(np.int16) * 5, mask.T.astype(np.uint8)
                    cj["label"] = np.array([[float(1 + number % 3)]])
                    cj["PID"] = np.array([[ord(c)] for c in f"MR{number // 3:03d}"], np.uint16)
                archive.write(tmp_path / "one.mat", f"{number}.mat")
    return folder


def build(source, tmp_path):
    figshare_brain_tumor.main([*source, "--out", str(tmp_path / "figshare_brain_tumor")])
    return load_dataset(tmp_path / "figshare_brain_tumor", verify=True)


def test_original_files_are_read_out_of_their_zips_and_split_by_patient(archive, tmp_path):
    dataset = build(["--archive", str(archive)], tmp_path)
    assert len(dataset.cases) == 30 and set(dataset.card.counts) == {"train", "val", "test"}
    case = next(case for case in dataset.cases if case.case_id == "brain_0007")
    assert case.patient_id == "MR002" and case.prompts["class@pathology"] == "Glioma tumor."
    assert case.prompts["global@p1"] == "glioma tumor" and "global@p4" not in case.prompts
    cache = ImageCache.load([case], (60, 80))
    assert cache.masks.any() and cache.images.max() == 1


def test_a_file_of_something_else_is_named(archive, tmp_path):
    (archive / "7.mat").write_bytes(b"not HDF5")
    with pytest.raises(SystemExit, match="7.mat is not a file of this dataset"):
        build(["--archive", str(archive)], tmp_path)
    assert not (tmp_path / "figshare_brain_tumor").exists()


def test_without_h5py_the_way_out_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    (tmp_path / "1.mat").touch()
    with pytest.raises(SystemExit, match="package h5py, which reads them, is not installed: .*or give --mirror"):
        build(["--archive", str(tmp_path)], tmp_path)


def test_an_archive_without_slices_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="holds no files named like 1.mat"):
        build(["--archive", str(tmp_path)], tmp_path)


def test_mirror_keeps_its_splits_and_marks_what_names_the_class(mirrors, part_of_mirror, tmp_path):
    seen = set()

    def choose(row) -> bool:  # one slice of each split and kind
        key = row["split"], row["label"]
        return key not in seen and not seen.add(key)

    dataset = build(["--mirror", str(part_of_mirror("figshare_brain_tumor", choose))], tmp_path)
    assert dataset.card.counts == {"train": 3, "val": 3, "test": 3}
    origins = {column: described.origin for column, described in dataset.card.prompts.items()}
    assert origins["class@pathology"] == origins["global@medclipsam"] == origins["global@p3"] == "class-oracle"
    assert origins["local@medclipseg"] == "mask-derived" and origins["global@p2"] == "template"
    for case in dataset.cases:
        kind = case.prompts["class@pathology"].split()[0].lower()
        assert kind in case.prompts["local@medclipseg"] and kind in case.prompts["global@p3"]
        assert kind in (case.prompts["global@medclipsam"] or kind)
    assert ImageCache.load(dataset.cases, 64).masks.flatten(1).any(1).all()
