"""MosMedData+: LViT's layout, its splits by slice, and what the card says of them."""

import csv

import mosmed
import numpy as np
import pytest

from lib.data import load_dataset

CAPTION = "Unilateral pulmonary infection, one infected area, lower left lung."


@pytest.fixture
def layout(tmp_path, scene, save):
    """LViT's folders: 18 training and 4 test slices of three scans, of which one is in both."""
    folder = tmp_path / "MosMedDataPlus"
    members = {
        "Train": [f"Morozov_study_{scan}_{i}" for scan in (258, 259) for i in range(9)],
        "Test": [f"Morozov_study_{scan}_{i}" for scan in (259, 260) for i in (20, 21)],
    }
    for part, names in members.items():
        for name in names:
            image, mask = scene()
            save(folder / f"{part}_Folder" / "img" / f"{name}.png", image)
            save(folder / f"{part}_Folder" / "labelcol" / f"{name}.png", mask.astype(np.uint8))  # 0 and 1
        with open(folder / f"{part}_Folder" / f"{part}_text.csv", "w", newline="") as file:
            csv.writer(file).writerows([["Image", "Description"], *([f"{n}.png", CAPTION] for n in names)])
    return folder


def test_the_tables_give_the_splits_and_the_card_tells_of_shared_scans(layout, tmp_path, capsys):
    mosmed.main(["--archive", str(layout), "--out", str(tmp_path / "mosmed")])
    dataset = load_dataset(tmp_path / "mosmed", verify=True)
    assert dataset.card.counts == {"train": 16, "val": 2, "test": 4}
    assert any("2 of the 4 test slices are of a scan that train or val has too" in n for n in dataset.card.notes)
    assert all(case.prompts["report"] == CAPTION for case in dataset.cases)
    assert "2 of 4 test slices" in capsys.readouterr().out


def test_the_scan_is_the_name_without_the_slice():
    assert mosmed.scan_of("morozov_study_0258_24") == "morozov_study_0258"
    assert mosmed.scan_of("jun_coronacases_case1_69") == "jun_coronacases_case1"


def test_a_table_that_does_not_tell_its_split_is_named(layout, tmp_path):
    folder = layout / "Train_Folder"
    folder.rename(layout / "first")
    (layout / "first" / "Train_text.csv").rename(layout / "first" / "captions.csv")
    with pytest.raises(SystemExit, match="captions.csv does not tell its split: name it Train_text"):
        mosmed.main(["--archive", str(layout), "--out", str(tmp_path / "mosmed")])
    assert not (tmp_path / "mosmed").exists()


def test_a_slice_that_is_described_twice_is_named(layout, tmp_path):
    table = layout / "Train_Folder" / "Train_text.csv"
    (layout / "Val_text.csv").write_text(table.read_text())
    with pytest.raises(SystemExit, match="describes 'Morozov_study_258_0.png' a second time"):
        mosmed.main(["--archive", str(layout), "--out", str(tmp_path / "mosmed")])
