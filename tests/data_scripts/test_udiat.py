"""UDIAT: a folder from the original layout."""

import pytest
import udiat

from lib.data import load_dataset


@pytest.fixture
def folder(tmp_path, scene, save):
    """The layout of dataset B, with its table saved as CSV: 20 images with a lesion each."""
    root = tmp_path / "Dataset_B"
    lines = ["Image,Type"]
    for number in range(1, 21):
        image, mask = scene()
        save(root / "original" / f"{number:06d}.png", image)
        save(root / "GT" / f"{number:06d}.png", mask)
        lines.append(f"{number},{'Benign' if number % 3 else 'Malignant'}")
    (root / "DatasetB.csv").write_text("\n".join(lines) + "\n")
    return root


def test_archive_becomes_a_folder(folder, tmp_path, zipped):
    udiat.main(["--archive", str(zipped(folder)), "--out", str(tmp_path / "udiat")])
    dataset = load_dataset(tmp_path / "udiat", verify=True)
    assert dataset.card.counts == {"train": 14, "val": 2, "test": 4}
    prompts = {case.case_id: case.prompts for case in dataset.cases}
    assert prompts["000003"]["class@pathology"] == "Malignant tumor."
    assert prompts["000001"]["local@mask"].endswith("in the breast ultrasound image.")


def test_prompt_sets_name_the_class_and_the_papers_texts_are_found_beside_the_archive(folder, tmp_path):
    texts = tmp_path / "texts" / "medclip_samv2"
    texts.mkdir(parents=True)
    (texts / "breast_tumors_testing.json").write_text('{"000003.png": "A mass."}')
    udiat.main(["--archive", str(folder), "--out", str(tmp_path / "udiat")])
    dataset = load_dataset(tmp_path / "udiat")
    prompts = {case.case_id: case.prompts for case in dataset.cases}
    assert prompts["000003"]["global@p1"] == "malignant breast tumor"
    assert prompts["000003"]["global@medclipsam"] == "A mass." and prompts["000001"]["global@medclipsam"] is None
    assert dataset.card.prompts["global@medclipsam"].origin == "class-oracle"


def test_an_image_without_a_row_is_named(folder, tmp_path):
    table = folder / "DatasetB.csv"
    table.write_text(table.read_text().replace("\n20,Benign", ""))
    with pytest.raises(SystemExit, match=r"has no row for .*000020\.png"):
        udiat.main(["--archive", str(folder), "--out", str(tmp_path / "udiat")])


def test_an_unknown_class_is_named(folder, tmp_path):
    table = folder / "DatasetB.csv"
    table.write_text(table.read_text().replace("20,Benign", "20,Cyst"))
    with pytest.raises(SystemExit, match="'cyst' is not a class"):
        udiat.main(["--archive", str(folder), "--out", str(tmp_path / "udiat")])
    assert not (tmp_path / "udiat").exists()


def test_an_existing_folder_is_kept_unless_told_otherwise(folder, tmp_path):
    arguments = ["--archive", str(folder), "--out", str(tmp_path / "udiat")]
    udiat.main(arguments)
    before = load_dataset(tmp_path / "udiat").card.fingerprint
    with pytest.raises(SystemExit, match="exists already: give --overwrite"):
        udiat.main(arguments)
    udiat.main([*arguments, "--overwrite"])
    assert load_dataset(tmp_path / "udiat").card.fingerprint == before
