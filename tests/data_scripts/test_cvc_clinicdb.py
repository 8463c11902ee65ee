"""CVC-ClinicDB: an external test set whose patients are video sequences."""

import csv

import cvc_clinicdb
import numpy as np
import pytest

from lib.data import ImageCache, load_dataset


@pytest.fixture
def archive(tmp_path, scene, save, zipped):
    """A zip in the layout of the Kaggle copy: 6 frames of 2 sequences."""
    folder = tmp_path / "cvc"
    rows = []
    for frame in range(1, 7):
        image, mask = scene()
        paths = [f"PNG/{kind}/{frame}.png" for kind in ("Original", "Ground Truth")]
        save(folder / paths[0], np.stack([image] * 3, -1))
        save(folder / paths[1], mask.astype(np.uint8) * 255)
        rows.append([frame, 1 + (frame > 3), *paths])
    with open(folder / "metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows([["frame_id", "sequence_id", "png_image_path", "png_mask_path"], *rows])
    return zipped(folder)


def test_archive_becomes_a_test_set_by_sequence(archive, tmp_path):
    cvc_clinicdb.main(["--archive", str(archive), "--out", str(tmp_path / "cvc_clinicdb")])
    dataset = load_dataset(tmp_path / "cvc_clinicdb", verify=True)
    assert dataset.card.counts == {"test": 6}
    assert {case.patient_id for case in dataset.cases} == {"sequence_01", "sequence_02"}
    assert ImageCache.load(dataset.cases, 32, channels=3).images.shape == (6, 3, 32, 32)


def test_an_archive_without_the_table_of_sequences_is_refused(archive, tmp_path):
    folder = archive.with_suffix("")
    (folder / "metadata.csv").write_text("frame_id,png_image_path\n1,x.png\n")
    with pytest.raises(SystemExit, match="lacks the column 'sequence_id'"):
        cvc_clinicdb.main(["--archive", str(folder), "--out", str(tmp_path / "cvc_clinicdb")])
    (folder / "metadata.csv").unlink()
    with pytest.raises(SystemExit, match=r"holds no 'metadata\.csv'"):
        cvc_clinicdb.main(["--archive", str(folder), "--out", str(tmp_path / "cvc_clinicdb")])
    assert not (tmp_path / "cvc_clinicdb").exists()


def test_a_missing_frame_is_named(archive, tmp_path):
    folder = archive.with_suffix("")
    (folder / "PNG" / "Original" / "2.png").unlink()
    with pytest.raises(SystemExit, match=r"2\.png cannot be decoded"):
        cvc_clinicdb.main(["--archive", str(folder), "--out", str(tmp_path / "cvc_clinicdb")])


def test_mirror_becomes_a_test_set_with_published_texts(part_of_mirror, tmp_path):
    small = part_of_mirror("cvc_clinicdb", lambda row: row["sequence"] in ("1", "11"))
    cvc_clinicdb.main(["--mirror", str(small), "--out", str(tmp_path / "cvc_clinicdb")])
    dataset = load_dataset(tmp_path / "cvc_clinicdb")
    assert dataset.card.counts == {"test": 16}
    assert {case.patient_id for case in dataset.cases} == {"sequence_01", "sequence_11"}
    assert all(case.prompts[column] for case in dataset.cases for column in ("local", "local@mask", "local@medclipseg"))
    altered = [case.prompts["local@contradictory"] for case in dataset.cases]
    assert any(altered) and None in altered
