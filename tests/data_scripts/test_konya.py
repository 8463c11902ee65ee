"""Kónya's chest CT: which colour the lungs are, and splits by patient."""

import konya
import numpy as np
import pytest

from lib.data import ImageCache, load_dataset


@pytest.fixture
def archive(tmp_path, scene, save):
    """The layout of the archive: ten patients of three slices, with the lungs in blue and the heart in green."""
    folder = tmp_path / "chest-ct"
    lines = ["ImageId,MaskId"]
    for patient in range(10):
        for number in range(3):
            image, _ = scene(80, 80)
            drawn = np.zeros((80, 80, 3), np.uint8)
            drawn[16:64, 16:64, 2], drawn[16:32, 16:32, 1] = 255, 255 * (number > 0)
            save(folder / "images" / "images" / f"ID{patient:03d}_{number}.jpg", image)
            save(folder / "masks" / "masks" / f"ID{patient:03d}_mask_{number}.jpg", drawn * (number < 2))
            lines.append(f"ID{patient:03d}_{number}.jpg,ID{patient:03d}_mask_{number}.jpg")
    (folder / "train.csv").write_text("\n".join(lines) + "\n")
    return folder


def build(source, tmp_path):
    konya.main(["--archive", str(source), "--out", str(tmp_path / "konya")])
    return load_dataset(tmp_path / "konya", verify=True)


def test_the_lungs_are_the_colour_that_covers_most_and_patients_stay_together(archive, tmp_path, zipped):
    dataset = build(zipped(archive), tmp_path)
    assert any("That colour is the blue one." in note for note in dataset.card.notes)
    assert len(dataset.cases) == 30 and set(dataset.card.counts) == {"train", "val", "test"}
    assert {case.patient_id for case in dataset.cases} == {f"ID{i:03d}" for i in range(10)}
    cases = {case.case_id: case for case in dataset.cases}
    masks = ImageCache.load([cases["ID000_0"], cases["ID000_2"]], 80).masks
    assert masks[0].float().mean() == pytest.approx(0.36, abs=0.03) and not masks[1].any()
    assert cases["ID000_0"].prompts["global@p0"] == "lungs" and "global@p1" not in cases["ID000_0"].prompts


def test_a_listed_file_that_is_absent_is_named(archive, tmp_path):
    next(archive.rglob("ID003_mask_1.jpg")).unlink()
    with pytest.raises(SystemExit, match="lists 'ID003_mask_1.jpg'"):
        build(archive, tmp_path)
    (archive / "train.csv").write_text("image\nx\n")
    with pytest.raises(SystemExit, match="lacks the column 'ImageId'"):
        build(archive, tmp_path)
    assert not (tmp_path / "konya").exists()
