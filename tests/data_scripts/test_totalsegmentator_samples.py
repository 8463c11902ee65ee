"""TotalSegmentator's samples: pseudo-labels, said so, and only structures of some size."""

import csv
import json

import numpy as np
import pytest
import totalsegmentator_samples as samples
from volume_files import save_nifti

from lib.data import _decode, load_dataset

MAP = {"total": {"1": "spleen", "2": "kidney_right", "5": "liver"}, "total_mr": {"1": "spleen", "2": "vertebrae_L1"}}


def write_mirror(folder, labels=((1, 400), (2, 350), (5, 20)), modality="CT"):
    rng = np.random.default_rng(0)
    mask = np.zeros(1200, np.uint8)
    start = 0
    for value, count in labels:
        mask[start : start + count] = value
        start += count
    save_nifti(folder / "images/a.nii.gz", rng.uniform(-200, 300, (10, 10, 12)), (3, 3, 3), "LAS")
    save_nifti(folder / "masks/a_seg.nii.gz", mask.reshape(10, 10, 12), (3, 3, 3), "LAS")
    (folder / "class_map_total.json").write_text(json.dumps(MAP))
    with open(folder / "metadata.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["id", "image", "mask", "split", "modality"])
        table.writerow(["a", "images/a.nii.gz", "masks/a_seg.nii.gz", "test", modality])
    return folder


def run(folder, tmp_path):
    samples.main(["--mirror", str(folder), "--out", str(tmp_path / "totalsegmentator_samples")])
    return load_dataset(tmp_path / "totalsegmentator_samples", verify=True)


def test_large_structures_become_classes_in_plain_words(tmp_path):
    dataset = run(write_mirror(tmp_path / "mirror"), tmp_path)
    assert list(dataset.card.classes) == ["spleen", "kidney_right"]
    assert dataset.card.counts == {"test": 2}
    assert dataset.cases[1].prompts["target@plain"] == "right kidney"
    assert [_decode(case, 1)[1].sum() for case in dataset.cases] == [400, 350]
    assert "pseudo-labels" in dataset.card.title and "pseudo-labels" in dataset.card.notes[0]


def test_a_label_that_the_map_does_not_know_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="has the label 9, which is none of"):
        run(write_mirror(tmp_path / "mirror", [(1, 400), (9, 5)]), tmp_path)


def test_a_mirror_with_an_unknown_modality_or_a_broken_map_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="has the modality 'US': expected CT or MRI"):
        run(write_mirror(tmp_path / "us", modality="US"), tmp_path)
    folder = write_mirror(tmp_path / "mirror")
    (folder / "class_map_total.json").write_text("{}")
    with pytest.raises(SystemExit, match="has no list 'total' of labels"):
        run(folder, tmp_path)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("kidney_right", "right kidney"),
        ("lung_lower_lobe_left", "left lung lower lobe"),
        ("vertebrae_L1", "vertebrae L1"),
        ("aorta", "aorta"),
        ("autochthon_left", "left autochthonous back muscle"),
    ],
)
def test_words(name, words):
    assert samples.words(name) == words


def test_in_the_mirror_right_is_right(mirrors, tmp_path):
    if not (mirrors / "totalsegmentator_samples").is_dir():
        pytest.skip(f"There is no mirror of TotalSegmentator's samples at {mirrors}: set MIRROR_DIR to test it.")
    dataset = run(mirrors, tmp_path)
    assert {case.volume for case in dataset.cases} == {"ct_sm", "mr_sm"}
    masks = {case.case_id: _decode(case, 1)[1] for case in dataset.cases}
    for volume in ("ct_sm", "mr_sm"):
        columns = {
            one: masks[f"{volume}.{one}"].nonzero()[2].mean() for one in ("kidney_left", "kidney_right", "liver")
        }
        assert columns["kidney_left"] + 20 < columns["kidney_right"] and columns["kidney_left"] < columns["liver"]
        rows = {one: masks[f"{volume}.{one}"].nonzero()[1].mean() for one in ("spinal_cord", "stomach")}
        assert rows["spinal_cord"] < rows["stomach"]
    assert all(mask.sum() >= 300 for mask in masks.values())
