"""MedPix: captions cleaned, short ones dropped, equal ones kept together, masks empty and said to mean nothing."""

import medpix
import numpy as np
import pytest

from lib.data import ImageCache, load_dataset


@pytest.fixture
def archive(tmp_path, scene, save):
    """Twenty images with captions, of which two are the same and one is too short."""
    folder = tmp_path / "medpix"
    lines = ["filename,Caption"]
    for number in range(20):
        save(folder / "images" / f"synpic {number}.png", scene()[0])
        text = "Axial CT*" if number == 5 else f"Axial CT of the chest, mass # {max(number, 1)}"
        lines.append(f'/author/images/synpic {number}.png,"{text}"')
    (folder / "medpix_dataset.csv").write_text("\n".join(lines) + "\n")
    return folder


def build(source, tmp_path):
    medpix.main(["--archive", str(source), "--out", str(tmp_path / "out" / "medpix")])
    return load_dataset(tmp_path / "out" / "medpix", verify=True)


def test_pairs_become_cases_with_an_empty_mask(archive, tmp_path, zipped):
    dataset = build(zipped(archive), tmp_path)
    assert len(dataset.cases) == 19 and set(dataset.card.counts) == {"train", "val"}
    cases = {case.case_id: case for case in dataset.cases}
    assert cases["synpic_3"].prompts == {"report": "Axial CT of the chest, mass 3"}
    assert cases["synpic_0"].patient_id == cases["synpic_1"].patient_id and "synpic_5" not in cases
    assert not ImageCache.load(dataset.cases, 32, channels=3).masks.any()
    assert any("every mask is empty and means nothing" in note for note in dataset.card.notes)


def test_an_image_that_is_absent_and_a_strange_table_are_named(archive, tmp_path):
    (archive / "images" / "synpic 7.png").unlink()
    with pytest.raises(SystemExit, match="holds no 'synpic 7.png'"):
        build(archive, tmp_path)
    (archive / "medpix_dataset.csv").write_text("filename,text\na,b\n")
    with pytest.raises(SystemExit, match="lacks the column 'Caption'"):
        build(archive, tmp_path)
    assert not (tmp_path / "out" / "medpix").exists()


def test_a_damaged_image_is_named(archive, tmp_path):
    (archive / "images" / "synpic 7.png").write_bytes(np.zeros(9, np.uint8).tobytes())
    with pytest.raises(SystemExit, match="synpic 7.png cannot be decoded"):
        build(archive, tmp_path)
