"""COVID-QU-Ex: its folders, its splits, and patients who are in two of them."""

import covid_qu_ex
import numpy as np
import pytest

from lib.data import load_dataset


@pytest.fixture
def archive(tmp_path, scene, save):
    """The layout of the archive: per split and class two images, and one patient in train and test."""
    folder = tmp_path / "covidqu"
    root = folder / "Lung Segmentation Data" / "Lung Segmentation Data"
    for split in covid_qu_ex.SPLITS:
        names = {kind: [f"{kind} ({split}{i})" for i in (1, 2)] for kind in covid_qu_ex.KINDS}
        if split != "Val":
            names["COVID-19"].append(f"sub-S09345_run-{split}")
        for kind, stems in names.items():
            for stem in stems:
                image, mask = scene()
                save(root / split / kind / "images" / f"{stem}.png", image)
                save(root / split / kind / "lung masks" / f"{stem}.png", mask.astype(np.uint8) * 255)
    return folder


def build(source, tmp_path):
    covid_qu_ex.main(["--archive", str(source), "--out", str(tmp_path / "covid_qu_ex")])
    return load_dataset(tmp_path / "covid_qu_ex", verify=True)


def test_the_datasets_splits_are_kept_but_for_patients_in_two(archive, tmp_path, zipped):
    dataset = build(zipped(archive), tmp_path)
    assert dataset.card.counts == {"train": 6, "val": 6, "test": 7}
    assert [case.case_id for case in dataset.cases if case.patient_id == "S09345"] == ["sub-S09345_run-Test"]
    prompts = {case.case_id: case.prompts for case in dataset.cases}
    assert prompts["Non-COVID__Train1_"]["global@p1"] == "pneumonia lungs"
    assert prompts["Normal__Val2_"]["class@pathology"] == "Normal."


def test_a_missing_mask_and_a_strange_folder_are_named(archive, tmp_path):
    drawn = next(archive.rglob("lung masks/Normal (Test1).png"))
    content = drawn.read_bytes()
    drawn.unlink()
    with pytest.raises(SystemExit, match=r"Normal \(Test1\)\.png has no mask in 'lung masks'"):
        build(archive, tmp_path)
    drawn.write_bytes(content)
    (drawn.parents[1]).rename(drawn.parents[2] / "Healthy")
    with pytest.raises(SystemExit, match="does not lie in Train, Val or Test / COVID-19 or Non-COVID or Normal"):
        build(archive, tmp_path)
    with pytest.raises(SystemExit, match="holds no 'Lung Segmentation Data'"):
        build(tmp_path / "covidqu" / "Lung Segmentation Data" / "Lung Segmentation Data" / "Val", tmp_path)
    assert not (tmp_path / "covid_qu_ex").exists()
