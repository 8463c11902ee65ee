"""Kvasir-SEG: folders from the mirror and from the original archive."""

import kvasir_seg
import numpy as np
import pytest
from PIL import Image

from lib.data import ImageCache, load_dataset


@pytest.fixture
def archive(tmp_path, scene, save, zipped):
    """A zip in the layout of kvasir-seg.zip: 12 colour frames with JPEG masks, of which one repeats another."""
    folder = tmp_path / "Kvasir-SEG"
    for number in range(12):
        image, mask = scene()
        frame = np.stack([image, image // 2, image // 4], -1)
        if number == 11:
            frame = np.asarray(Image.open(folder / "images" / "cju00.jpg"))
        save(folder / "images" / f"cju{number:02d}.jpg", frame)
        save(folder / "masks" / f"cju{number:02d}.jpg", mask.astype(np.uint8) * 255)
    return zipped(folder)


def build(archive, tmp_path):
    # A made-up archive does not have the published checksum, which --sha256 replaces.
    from lib.files import sha256_file

    kvasir_seg.main(
        ["--archive", str(archive), "--out", str(tmp_path / "kvasir_seg"), "--sha256", sha256_file(archive)]
    )
    return load_dataset(tmp_path / "kvasir_seg", verify=True)


def test_archive_becomes_a_valid_folder_in_colour(archive, tmp_path):
    dataset = build(archive, tmp_path)
    assert set(dataset.card.counts) == {"train", "val", "test"} and len(dataset.cases) == 12
    patients = {case.case_id: case.patient_id for case in dataset.cases}
    assert patients["cju11"] == patients["cju00"] == "group-cju00"
    cache = ImageCache.load(dataset.cases[:2], 32, channels=3)
    assert cache.images.shape == (2, 3, 32, 32)
    assert cache.images[0, 0].mean() > 1.5 * cache.images[0, 1].mean()


def test_the_ringing_of_jpeg_is_not_drawn_into_masks(archive, tmp_path):
    case = build(archive, tmp_path).cases[0]
    saved = np.asarray(Image.open(archive.with_suffix("") / "masks" / f"{case.case_id}.jpg"))
    mask = np.asarray(Image.open(case.mask)) > 0
    assert mask.sum() < (saved > 0).sum() and np.array_equal(mask, saved > 127)


def test_prompts_of_the_archive_come_from_the_mask_and_say_so(archive, tmp_path):
    dataset = build(archive, tmp_path)
    assert all(" polyp, located in " in case.prompts["local@mask"] for case in dataset.cases)
    assert dataset.card.prompts["local@mask"].origin == "mask-derived"


def test_another_file_than_the_published_one_is_refused(archive, tmp_path):
    with pytest.raises(SystemExit, match="has the sha256 .* and not 03b30e21"):
        kvasir_seg.main(["--archive", str(archive), "--out", str(tmp_path / "kvasir_seg")])
    assert not (tmp_path / "kvasir_seg").exists()


def test_a_frame_of_16_bits_is_refused_in_one_sentence(archive, tmp_path):
    folder = archive.with_suffix("")
    Image.fromarray(np.full((60, 80), 3000, np.uint16)).save(folder / "images" / "cju03.jpg", format="PNG")
    with pytest.raises(SystemExit, match=r"cju03.jpg has more than 8 bits per pixel \(mode I;16\)"):
        kvasir_seg.main(["--archive", str(folder), "--out", str(tmp_path / "kvasir_seg")])
    assert not (tmp_path / "kvasir_seg").exists()


def test_mirror_becomes_a_folder_with_published_texts_and_without_the_repeated_frame(part_of_mirror, tmp_path):
    wanted = {"train_222", "test_016", "train_000", "train_001", "train_002", "val_000"}
    small = part_of_mirror("kvasir_seg", lambda row: row["case_id"] in wanted)
    kvasir_seg.main(["--mirror", str(small.parent), "--out", str(tmp_path / "kvasir_seg")])
    dataset = load_dataset(tmp_path / "kvasir_seg", verify=True)
    assert {case.case_id for case in dataset.cases} == wanted - {"train_222"}
    prompts = {case.case_id: case.prompts for case in dataset.cases}
    assert prompts["train_000"]["local"] == "yellow circle polyp"
    assert prompts["train_000"]["local@medclipseg"].startswith("one small yellow circle polyp, located in left")
    assert prompts["train_001"]["local@underdescriptive"] == "Polyp visible."
    assert prompts["train_001"]["local@missing_location"].endswith("located in of the image")
    assert prompts["train_002"]["local"] is prompts["train_002"]["local@medclipseg"] is None
    assert prompts["train_002"]["local@mask"].startswith("one small")
    assert dataset.card.prompts["local@medclipseg"].origin == "mask-derived"
    assert dataset.card.prompts["local"].origin == "template"
    assert "research and educational" in dataset.card.licence
