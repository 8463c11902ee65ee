"""COVID-19 chest X-ray structures: both lungs united, and what the card says where one is missing."""

import csv

import covid_cxr_structures
import numpy as np
import pytest
from common import Mirror

from lib.data import ImageCache, load_dataset


@pytest.fixture
def mirror(tmp_path, scene, save):
    """A mirror of four images, the last of which has only a left lung."""
    folder = tmp_path / "mirror" / "covid_cxr_structures"
    rows = []
    for i, split in enumerate(("train", "train", "val", "test")):
        structures = ["heart", "left_lung", "right_lung"][: 3 if i < 3 else 2]
        image, _ = scene()
        save(folder / "images" / f"c{i}.png", image)
        for k, structure in enumerate(structures):
            mask = np.zeros(image.shape, bool)
            mask[:, 20 * k : 20 * k + 10] = True
            save(folder / "masks" / f"c{i}__{structure}.png", mask)
        files = ";".join(f"masks/c{i}__{structure}.png" for structure in structures)
        row = {"case_id": f"c{i}", "patient_id": i, "split": split, "image": f"images/c{i}.png", "mask": files}
        rows.append(
            row
            | {
                "label": "COVID-19, ARDS" if i % 2 else "Legionella",
                "classes": ";".join(structures),
                "text": "A  note.",
            }
        )
    write(folder, rows)
    return folder


def write(folder, rows) -> None:
    with open(folder / "metadata.csv", "w", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)


def build(mirror, tmp_path):
    covid_cxr_structures.main(["--mirror", str(mirror), "--out", str(tmp_path / "covid_cxr_structures")])
    return load_dataset(tmp_path / "covid_cxr_structures", verify=True)


def test_both_lungs_are_the_target_and_a_lone_one_is_named(mirror, tmp_path):
    dataset = build(mirror, tmp_path)
    masks = ImageCache.load(dataset.cases, (60, 80)).masks[:, 0]
    assert masks[0, :, 20:30].all() and masks[0, :, 40:50].all() and not masks[0, :, :20].any()
    assert masks.float().mean((1, 2)).tolist() == pytest.approx([0.25, 0.25, 0.25, 0.125])
    assert any("Only one lung is drawn" in note and note.endswith("left out: c3.") for note in dataset.card.notes)
    first, second = dataset.cases[:2]
    assert first.prompts["report"] == "A note." and first.prompts["global@p1"] == "pneumonia lungs"
    assert second.prompts["global@p1"] == "COVID-19 lungs" and second.prompts["global@p0"] == "lungs"


def test_masks_that_do_not_fit_the_structures_are_named(mirror, tmp_path):
    rows = Mirror(mirror, "covid_cxr_structures", ()).rows
    rows[1]["classes"] = "left_lung"
    write(mirror, rows)
    with pytest.raises(SystemExit, match="Case 'c1' has 3 masks for the structures 'left_lung'"):
        build(mirror, tmp_path)
    assert not (tmp_path / "covid_cxr_structures").exists()


def test_only_the_mirror_is_read(tmp_path):
    with pytest.raises(SystemExit, match="reads only the mirror's selection of images: give --mirror"):
        covid_cxr_structures.main(["--archive", str(tmp_path), "--out", str(tmp_path / "covid_cxr_structures")])


def test_the_real_mirror_becomes_a_folder(mirrors, tmp_path):
    dataset = build(mirrors, tmp_path)
    assert dataset.card.counts == {"train": 16, "val": 5, "test": 12}
    assert ImageCache.load(dataset.split("test"), 64).masks.flatten(1).any(1).all()
