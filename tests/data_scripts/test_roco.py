"""ROCO: figures with captions by article, and what it says where only captions are there."""

import pytest
import roco

from lib.data import load_dataset


@pytest.fixture
def clone(tmp_path, scene, save):
    """The repository after its fetch script: nine figures a split, one not fetched, one article in two splits."""
    folder = tmp_path / "roco-dataset"
    for k, split in enumerate(roco.SPLITS):
        part = folder / "data" / split / "radiology"
        captions, licences = [], ["ROCO_ID,PMC_ID,CC"]
        for number in range(9):
            name = f"ROCO_{k}{number:04d}"
            captions.append(f"{name}\t " + ("CT." if number == 8 else f"Axial CT of figure {number} (arrow)."))
            licences.append(f"{name},PMC{k if number else 0}{number:03d}_fig.jpg,CC BY")
            if number != 7:
                save(part / "images" / f"{name}.jpg", scene()[0])
        (part / "captions.txt").write_text("\n".join(captions) + "\n")
        (part / "licences.txt").write_text("\n".join(licences) + "\n")
    return folder


def build(option, source, tmp_path):
    roco.main([option, str(source), "--out", str(tmp_path / "out" / "roco")])
    return load_dataset(tmp_path / "out" / "roco", verify=True)


def test_figures_become_cases_by_article(clone, tmp_path):
    dataset = build("--archive", clone, tmp_path)
    assert dataset.card.counts == {"train": 6, "val": 6, "test": 7}
    cases = {case.case_id: case for case in dataset.cases}
    assert "ROCO_00000" not in cases and "ROCO_10000" not in cases and cases["ROCO_20000"].patient_id == "PMC0000"
    assert cases["ROCO_00001"].prompts == {"report": "Axial CT of figure 1 (arrow)."}
    assert any(
        "3 with a short caption, 3 whose image was not fetched, 2 of an article" in n for n in dataset.card.notes
    )


def test_captions_without_images_are_not_enough(tmp_path):
    (tmp_path / "texts" / "roco").mkdir(parents=True)
    with pytest.raises(SystemExit, match="holds no images of ROCO .*run its scripts/fetch.py"):
        build("--mirror", tmp_path, tmp_path)
    assert not (tmp_path / "out" / "roco").exists()


def test_a_missing_table_of_licences_is_named(clone, tmp_path):
    (clone / "data" / "test" / "radiology" / "licences.txt").unlink()
    with pytest.raises(SystemExit, match="licences.txt is missing"):
        build("--archive", clone, tmp_path)
