"""QaTa-COV19: folders from the mirror and from the original images with LViT's captions."""

import csv

import numpy as np
import pytest
import qata_cov19
from PIL import Image

from lib.data import load_dataset

CAPTION = "Bilateral pulmonary infection, two infected areas,  all left lung and middle lower right lung."


@pytest.fixture
def original(tmp_path, scene, save):
    """A folder in the layout of QaTa-COV19-v2 with captions: 20 training images, 4 test images."""
    folder = tmp_path / "QaTa-COV19-v2"
    names = [f"covid_{i}" for i in range(1, 11)]
    names += [f"sub-S{8000 + i // 2:05d}_ses-E{i}_run-1_bp-chest_cr" for i in range(10)]
    test = [f"sub-S{9000 + i // 2:05d}_ses-E{i}_run-1_bp-chest_cr" for i in range(4)]
    for part, members in (("Train", names), ("Test", test)):
        for name in members:
            image, mask = scene()
            save(folder / f"{part} Set" / "Images" / f"{name}.png", image)
            save(folder / f"{part} Set" / "Ground-truths" / f"mask_{name}.png", mask.astype(np.uint8) * 255)
        with open(folder / f"{part}_text.csv", "w", newline="") as file:
            csv.writer(file).writerows([["Image", "Description"], *([f"mask_{n}.png", CAPTION] for n in members)])
    return folder


def build(source, tmp_path, option="--archive"):
    qata_cov19.main([option, str(source), "--out", str(tmp_path / "qata_cov19"), "--overwrite"])
    return load_dataset(tmp_path / "qata_cov19", verify=True)


def test_the_official_test_is_kept_and_validation_carved_by_patient(original, tmp_path):
    dataset = build(original, tmp_path)
    assert dataset.card.counts == {"train": 16, "val": 4, "test": 4}
    assert {case.case_id[:9] for case in dataset.split("test")} == {"sub-s0900"}
    assert {case.patient_id for case in dataset.split("test")} == {"s09000", "s09001"}
    assert {case.case_id[:3] for case in dataset.split("val")} == {"cov", "sub"}
    assert all(case.prompts["report"] == " ".join(CAPTION.split()) for case in dataset.cases)
    assert dataset.card.prompts["report"].role == "report"
    assert dataset.card.prompts["report"].origin == "mask-derived"


def test_a_training_image_that_repeats_a_test_image_is_left_out(original, tmp_path):
    test = sorted((original / "Test Set" / "Images").iterdir())[0]
    (original / "Train Set" / "Images" / "covid_4.png").write_bytes(test.read_bytes())
    dataset = build(original, tmp_path)
    assert "covid_4" not in {case.case_id for case in dataset.cases} and len(dataset.cases) == 23
    assert any("covid_4" in note for note in dataset.card.notes)


def test_near_duplicates_without_a_patient_follow_the_one_who_is_known(original, tmp_path):
    known = sorted((original / "Train Set" / "Images").glob("sub-*"))[0]
    image = np.asarray(Image.open(known)).astype(int) + 5
    Image.fromarray(np.clip(image, 0, 255).astype(np.uint8)).save(original / "Train Set" / "Images" / "covid_7.png")
    patients = {case.case_id: case.patient_id for case in build(original, tmp_path).cases}
    assert patients["covid_7"] == "s08000" and patients["covid_8"] == "covid_8"


def test_images_without_captions_say_where_to_get_them(original, tmp_path):
    for table in original.glob("*.csv"):
        table.unlink()
    with pytest.raises(SystemExit, match="holds no captions of LViT .*put them beside the images"):
        build(original, tmp_path)
    assert not (tmp_path / "qata_cov19").exists()


def test_a_caption_without_its_mask_is_named(original, tmp_path):
    (original / "Train Set" / "Ground-truths" / "mask_covid_3.png").unlink()
    with pytest.raises(SystemExit, match="describes 'mask_covid_3.png', of which there is no mask"):
        build(original, tmp_path)


def test_an_x_ray_of_16_bits_is_refused_in_one_sentence(original, tmp_path):
    Image.fromarray(np.full((60, 80), 3000, np.uint16)).save(original / "Train Set" / "Images" / "covid_5.png")
    with pytest.raises(SystemExit, match=r"covid_5\.png has more than 8 bits per pixel"):
        build(original, tmp_path)


def test_mirror_keeps_the_test_split_and_both_wordings(part_of_mirror, tmp_path):
    chosen: dict[str, list[str]] = {"train": [], "val": [], "test": []}

    def choose(row):
        members = chosen[row["split"]]
        if len(members) < 20:
            members.append(row["case_id"])
            return True

    small = part_of_mirror("qata_cov19", choose)
    dataset = build(small, tmp_path, "--mirror")
    assert dataset.card.counts["test"] == 20 and abs(dataset.card.counts["val"] - 8) <= 1
    assert {c.case_id for c in dataset.split("test")} == set(chosen["test"])
    prompts = {case.case_id: case.prompts for case in dataset.cases}["covid_1"]
    assert prompts["report"].startswith("bilateral pulmonary infection, five infected areas, upper middle lower left")
    assert prompts["report@lvit"].startswith("Bilateral pulmonary infection involving two regions")
    assert prompts["target"] == "COVID-19 infection on a chest radiograph."
    assert any("left of the image" in note for note in dataset.card.notes)
