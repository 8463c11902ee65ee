"""Dataset folders, image caches, batches and the leakage guard: what they promise when all is well."""

import dataclasses
import http.server
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from lib.data import (
    AUGMENTATIONS,
    CORRUPTIONS,
    DatasetWriter,
    Feed,
    ImageCache,
    LeakageError,
    guard_leakage,
    load_dataset,
)
from lib.files import DataError, atomic_write, extract, fetch, sha256_file
from lib.text import Prompts

CARD = {
    "title": "Boxes",
    "modality": "none",
    "dims": 2,
    "classes": {"box": 1},
    "level": "P",
    "licence": "CC0-1.0",
    "citation": "none",
    "source": "made by a test",
    "splits": "by patient",
    "prompts": {
        "local": {"role": "local", "origin": "metadata", "source": "the number of the case"},
        "local@mask": {"role": "local", "origin": "mask-derived", "source": "the size of the box"},
    },
}


def box(index, shape=(40, 50)):
    """An image with a bright box, unlike that of any other index, and the box as mask."""
    rng = np.random.default_rng(index)
    mask = np.zeros(shape, np.uint8)
    corner = tuple(slice(extent // 4, extent // 2 + index % 3) for extent in shape)
    mask[corner] = 1
    return np.clip(rng.random(shape) * 0.3 + mask * 0.6, 0, 1), mask


def write(folder, number=6, shape=(40, 50), card=CARD, spacing=(0.2, 0.1)):
    with DatasetWriter(folder, card | {"dims": len(shape)}) as writer:
        for index in range(number):
            image, mask = box(index, shape)
            writer.add(
                case_id=f"c{index}",
                patient_id=f"p{index // 2}",
                split=("train", "val", "test")[index // 2 % 3],
                image=image,
                mask=mask,
                spacing=spacing,
                prompts={"local": f"case, number {index}" if index else None},
            )
    return folder


def feed(folder, augment="none", size=32):
    cache = ImageCache.load(load_dataset(folder).cases, size)
    number = len(cache)
    vectors = torch.arange(number, dtype=torch.float32)[:, None].repeat(1, 4)
    return Feed(cache, Prompts({"local": vectors}, {"local": torch.ones(number, dtype=torch.bool)}), augment)


# --- folders ------------------------------------------------------------------------------------------------------


def test_what_was_written_is_read_back(tmp_path):
    dataset = load_dataset(write(tmp_path / "boxes"), verify=True)
    assert dataset.card.name == "boxes"
    assert dataset.card.counts == {"train": 2, "val": 2, "test": 2}
    assert [case.case_id for case in dataset.split("val")] == ["c2", "c3"]
    case = dataset.cases[1]
    assert (case.dataset, case.patient_id, case.spacing) == ("boxes", "p0", (0.2, 0.1))
    assert case.prompts == {"local": "case, number 1", "local@mask": None}
    image, mask = box(1)
    np.testing.assert_array_equal(np.asarray(Image.open(case.image)), np.round(image * 255))
    np.testing.assert_array_equal(np.asarray(Image.open(case.mask)), mask * 255)
    assert sorted(path.name for path in dataset.root.iterdir()) == ["card.json", "cases.csv", "images", "masks"]


def test_fingerprint_is_of_the_content(tmp_path):
    first = load_dataset(write(tmp_path / "a" / "boxes")).card.fingerprint
    assert load_dataset(write(tmp_path / "b" / "boxes")).card.fingerprint == first
    renamed = CARD | {"title": "Other words, same data"}
    assert load_dataset(write(tmp_path / "c" / "boxes", card=renamed)).card.fingerprint == first
    assert load_dataset(write(tmp_path / "d" / "boxes", number=8)).card.fingerprint != first


def test_a_folder_is_replaced_only_when_asked(tmp_path):
    write(tmp_path / "boxes")
    with pytest.raises(ValueError, match="exists already"):
        write(tmp_path / "boxes")
    with DatasetWriter(tmp_path / "boxes", CARD, overwrite=True) as writer:
        image, mask = box(0)
        writer.add(case_id="x", patient_id="x", split="test", image=image, mask=mask, spacing=(1, 1), prompts={})
    assert [case.case_id for case in load_dataset(tmp_path / "boxes", verify=True).cases] == ["x"]
    assert [path.name for path in tmp_path.iterdir()] == ["boxes"]


def test_volumes_keep_their_axes_and_spacing(tmp_path):
    import nibabel

    folder = write(tmp_path / "boxes", shape=(6, 8, 10), spacing=(3.0, 1.0, 0.5))
    dataset = load_dataset(folder, verify=True)
    stored = nibabel.load(dataset.cases[0].image)
    assert stored.shape == (10, 8, 6) and stored.header.get_zooms() == (0.5, 1.0, 3.0)  # x, y, z on disk
    cache = ImageCache.load(dataset.cases, (6, 8, 10))
    image, mask = box(1, (6, 8, 10))
    assert cache.images.shape == (6, 1, 6, 8, 10)
    torch.testing.assert_close(cache.images[1, 0], torch.tensor(image, dtype=torch.float32))
    assert (cache.masks[1, 0].numpy() == mask).all()
    halved = ImageCache.load(dataset.cases, (3, 4, 5))
    assert halved.spacing[0].tolist() == [6.0, 2.0, 1.0]
    assert halved.images.min() >= 0 and halved.images.max() <= 1


def test_a_volume_is_a_case_for_each_of_its_structures(volumes):
    dataset = load_dataset(volumes, verify=True)
    first = dataset.cases[:2]
    assert [case.case_id for case in first] == ["train0.left", "train0.right"]
    assert [(case.volume, case.target) for case in first] == [("train0", "left"), ("train0", "right")]
    assert first[0].image == first[1].image and first[0].mask != first[1].mask
    assert first[0].outcome == (100.0, True) and dataset.cases[2].outcome == (101.0, False)
    assert dataset.card.counts == {"train": 14, "val": 4, "test": 9}
    assert [case.target for case in dataset.cases if case.volume == "train2"] == ["left", "right", "third"]


def test_a_case_of_one_image_has_no_target(tmp_path):
    case = load_dataset(write(tmp_path / "boxes")).cases[0]
    assert (case.volume, case.target, case.outcome) == ("c0", "", None)


def test_a_record_needs_no_image(tmp_path):
    card = CARD | {"dims": 0, "classes": {}}
    with DatasetWriter(tmp_path / "records", card) as writer:
        for number, split in enumerate(("train", "val", "test")):
            writer.add_record(
                case_id=f"r{number}",
                patient_id=f"r{number}",
                split=split,
                prompts={"local": f"{50 + number} years"},
                outcome=(10.5 * (number + 1), number == 1),
            )
    cases = load_dataset(tmp_path / "records", verify=True).cases
    assert [case.image for case in cases] == [None] * 3 and [case.volume for case in cases] == ["r0", "r1", "r2"]
    assert [case.outcome for case in cases] == [(10.5, False), (21.0, True), (31.5, False)]
    guard_leakage(cases[:1], cases[2:])
    cache = ImageCache.load(cases, 32)
    assert cache.images.shape == (3, 1, 1, 1, 1) and cache.outcomes.tolist() == [[10.5, 0], [21, 1], [31.5, 0]]


# --- caches and batches -------------------------------------------------------------------------------------------


def test_cache_holds_resized_images_masks_and_spacing(tmp_path):
    cache = ImageCache.load(load_dataset(write(tmp_path / "boxes")).cases, (20, 25))
    assert cache.images.shape == (6, 1, 20, 25) and cache.images.dtype == torch.float32
    assert cache.masks.dtype == torch.uint8 and set(cache.masks.unique().tolist()) == {0, 1}
    torch.testing.assert_close(cache.spacing[0], torch.tensor([0.4, 0.2]))


def test_image_is_antialiased_and_mask_is_not(tmp_path):
    stripes = np.tile([0, 255], (64, 32)).astype(np.uint8)
    with DatasetWriter(tmp_path / "stripes", CARD) as writer:
        kwargs = {"split": "train", "spacing": (1, 1), "prompts": {}}
        writer.add(case_id="a", patient_id="a", image=stripes, mask=stripes, **kwargs)
    cache = ImageCache.load(load_dataset(tmp_path / "stripes").cases, 16)
    assert (cache.images - 0.5).abs().max() < 0.13  # plain subsampling would be all black or all white
    assert set(cache.masks.unique().tolist()) <= {0, 1}


def test_resized_image_and_mask_stay_aligned(tmp_path):
    mask = np.zeros((90, 120), np.uint8)
    mask[30:60, 40:60] = 1
    with DatasetWriter(tmp_path / "square", CARD) as writer:
        kwargs = {"split": "train", "spacing": (1, 1), "prompts": {}}
        writer.add(case_id="a", patient_id="a", image=mask.astype(float), mask=mask, **kwargs)
    cache = ImageCache.load(load_dataset(tmp_path / "square").cases, 30)
    assert ((cache.images > 0.5) == (cache.masks > 0)).all()


def test_grey_becomes_three_channels_when_asked(tmp_path):
    cases = load_dataset(write(tmp_path / "boxes")).cases
    cache = ImageCache.load(cases, 16, channels=3)
    assert cache.images.shape == (6, 3, 16, 16)
    assert (cache.images[:, 0] == cache.images[:, 2]).all()


def test_colour_images_are_kept(tmp_path):
    image = np.random.default_rng(0).integers(0, 255, (20, 30, 3)).astype(np.uint8)
    with DatasetWriter(tmp_path / "colour", CARD) as writer:
        kwargs = {"split": "train", "spacing": (1, 1), "prompts": {}}
        writer.add(case_id="a", patient_id="a", image=image, mask=image[..., 0] > 99, **kwargs)
    cache = ImageCache.load(load_dataset(tmp_path / "colour").cases, (20, 30), channels=3)
    torch.testing.assert_close(cache.images[0], torch.tensor(image / 255, dtype=torch.float32).permute(2, 0, 1))


def test_empty_masks_can_be_left_out(tmp_path):
    with DatasetWriter(tmp_path / "boxes", CARD) as writer:
        for index in range(4):
            image, mask = box(index)
            kwargs = {"split": "train", "spacing": (1, 1), "prompts": {}}
            writer.add(case_id=f"c{index}", patient_id=f"c{index}", image=image, mask=mask * (index % 2), **kwargs)
    cases = load_dataset(tmp_path / "boxes").cases
    assert len(ImageCache.load(cases, 16)) == 4
    assert [case.case_id for case in ImageCache.load(cases, 16, drop_empty=True).cases] == ["c1", "c3"]


def test_batch_is_cut_by_index(tmp_path):
    data = feed(write(tmp_path / "boxes"))
    batch = data.batch(torch.tensor([4, 1]))
    assert len(batch) == 2 and len(data) == 6
    assert torch.equal(batch.image, data.cache.images[[4, 1]])
    assert batch.mask.dtype == torch.float32 and torch.equal(batch.mask, data.cache.masks[[4, 1]].float())
    assert batch.prompts.pooled["local"][:, 0].tolist() == [4, 1]
    assert batch.index.tolist() == [4, 1]


@pytest.mark.parametrize("augment", [name for name in AUGMENTATIONS if name != "none"])
@pytest.mark.parametrize("shape", [(40, 50), (12, 20, 24)])
def test_augmentation_is_a_function_of_the_step_alone(tmp_path, augment, shape):
    folder = write(tmp_path / "boxes", shape=shape, spacing=(1.0,) * len(shape))
    size = (32, 40) if len(shape) == 2 else (8, 16, 16)
    first, second = feed(folder, augment, size), feed(folder, augment, size)
    index = torch.arange(6)
    first.batch(index, step_seed=1)  # what came before must not matter
    torch.manual_seed(7)
    a, b = first.batch(index, step_seed=5), second.batch(index, step_seed=5)
    assert torch.equal(a.image, b.image) and torch.equal(a.mask, b.mask)
    assert not torch.equal(a.image, first.batch(index, step_seed=6).image)
    assert torch.equal(first.batch(index).image, first.cache.images)  # without a step, as in evaluation
    assert set(a.mask.unique().tolist()) <= {0.0, 1.0}
    assert a.image.min() >= 0 and a.image.max() <= 1


def test_augmentation_moves_image_and_mask_together(tmp_path):
    mask = np.zeros((48, 64), np.uint8)
    mask[12:30, 10:40] = 1
    with DatasetWriter(tmp_path / "square", CARD) as writer:
        for index in range(8):
            kwargs = {"split": "train", "spacing": (1, 1), "prompts": {}}
            writer.add(case_id=f"c{index}", patient_id=f"c{index}", image=mask * 1.0, mask=mask, **kwargs)
    cache = ImageCache.load(load_dataset(tmp_path / "square").cases, (48, 64))
    for augment in ("flip", "geometric"):
        batch = Feed(cache, Prompts({}, {}), augment).batch(torch.arange(8), step_seed=3)
        overlap = ((batch.image > 0.5) & (batch.mask > 0)).flatten(1).sum(1)
        union = ((batch.image > 0.5) | (batch.mask > 0)).flatten(1).sum(1)
        assert (overlap / union).min() > 0.95
        assert len({tuple(m.flatten().tolist()) for m in batch.mask}) > 1
        # Turning an oblong image must not shear it: the area changes with the scale alone, at most 1.15 squared.
        area = batch.mask.flatten(1).sum(1) / mask.sum()
        assert area.max() < 1.42 and area.min() > 0.68


def test_only_flips_change_sides(tmp_path):
    left = np.zeros((40, 40), np.uint8)
    left[15:25, 4:12] = 1
    with DatasetWriter(tmp_path / "left", CARD) as writer:
        kwargs = {"split": "train", "spacing": (1, 1), "prompts": {}}
        writer.add(case_id="a", patient_id="a", image=left * 1.0, mask=left, **kwargs)
    cache = ImageCache.load(load_dataset(tmp_path / "left").cases, 40)
    index = torch.zeros(16, dtype=torch.long)

    def sides(augment):
        data = Feed(cache, Prompts({}, {}), augment)
        masks = torch.cat([data.batch(index, step_seed=step).mask for step in range(4)])
        return {bool(mask[..., 20:].sum() > mask[..., :20].sum()) for mask in masks}

    assert sides("geometric") == {False}
    assert sides("flip") == sides("full") == {False, True}


def test_full_augmentation_of_a_batch_is_cheap(tmp_path):
    data = feed(write(tmp_path / "boxes", number=8), "full", size=96)
    index, seconds = torch.arange(8), []
    for step in range(15):
        start = time.process_time()  # of this process alone: other tests may be running
        data.batch(index, step_seed=step)
        seconds.append(time.process_time() - start)
    assert sorted(seconds)[7] < 0.010


# --- leakage ------------------------------------------------------------------------------------------------------


def test_disjoint_splits_pass_the_guard(tmp_path):
    dataset = load_dataset(write(tmp_path / "boxes"))
    guard_leakage([*dataset.split("train"), *dataset.split("val")], dataset.split("test"))


def test_guard_refuses_a_shared_case_and_a_shared_patient(tmp_path):
    dataset = load_dataset(write(tmp_path / "boxes"))
    train, test = dataset.split("train"), dataset.split("test")
    with pytest.raises(LeakageError, match="Case 'c0' of 'boxes' is in both"):
        guard_leakage([*train, *test], train[:1])
    sibling = dataclasses.replace(test[0], patient_id=train[0].patient_id)
    with pytest.raises(LeakageError, match="Patient 'p0' of 'boxes' is in both.*'c4'"):
        guard_leakage(train, [sibling])


def test_patients_of_different_datasets_may_share_a_number(tmp_path):
    one = load_dataset(write(tmp_path / "one"))
    image, mask = box(77)
    with DatasetWriter(tmp_path / "two", CARD) as writer:
        kwargs = {"split": "test", "spacing": (1, 1), "prompts": {}}
        writer.add(case_id="c0", patient_id="p0", image=image, mask=mask, **kwargs)
    guard_leakage(one.cases, load_dataset(tmp_path / "two").cases)


def test_guard_refuses_the_same_image_under_another_name(tmp_path):
    one = load_dataset(write(tmp_path / "one"))
    image, mask = box(0)
    with DatasetWriter(tmp_path / "two", CARD) as writer:
        kwargs = {"split": "test", "spacing": (1, 1), "prompts": {}}
        writer.add(case_id="renamed", patient_id="someone", image=image, mask=mask, **kwargs)
    with pytest.raises(LeakageError, match=r"two/images/renamed\.png is the training image .*one/images/c0\.png"):
        guard_leakage(one.split("train"), load_dataset(tmp_path / "two").cases)


# --- files --------------------------------------------------------------------------------------------------------


def test_atomic_write_replaces_whole_files(tmp_path):
    atomic_write(tmp_path / "new" / "a.txt", "größer")
    atomic_write(tmp_path / "new" / "a.txt", b"\x00\x01")
    assert (tmp_path / "new" / "a.txt").read_bytes() == b"\x00\x01"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.txt"]


def test_archives_are_unpacked(tmp_path):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    (tmp_path / "in" / "deep" / "a.txt").write_text("hello")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as z:
        z.write(tmp_path / "in" / "deep" / "a.txt", "deep/a.txt")
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as t:
        t.add(tmp_path / "in" / "deep", "deep")
    for name in ("a.zip", "a.tar.gz"):
        folder = extract(tmp_path / name, tmp_path / f"out-{name}")
        assert (folder / "deep" / "a.txt").read_text() == "hello"


@pytest.fixture
def server(tmp_path):
    """The address of a local web server that serves tmp_path/www."""
    folder = tmp_path / "www"
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(folder))

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{web.server_port}"
        web.shutdown()


def test_fetch_verifies_and_keeps_nothing_that_fails(tmp_path, server):
    (tmp_path / "www" / "file.bin").write_bytes(b"content")
    digest = sha256_file(tmp_path / "www" / "file.bin")
    path = fetch(f"{server}/file.bin", digest, tmp_path / "got")
    assert path.read_bytes() == b"content"
    (tmp_path / "www" / "file.bin").unlink()
    assert fetch(f"{server}/file.bin", digest, tmp_path / "got") == path  # no second download
    (tmp_path / "www" / "other.bin").write_bytes(b"tampered")
    with pytest.raises(ValueError, match=r"other\.bin does not have the sha256"):
        fetch(f"{server}/other.bin", digest, tmp_path / "got")
    with pytest.raises(ValueError, match=r"absent\.bin could not be downloaded .* --archive PATH"):
        fetch(f"{server}/absent.bin", digest, tmp_path / "got")
    assert [path.name for path in (tmp_path / "got").iterdir()] == ["file.bin"]


def test_a_killed_writer_leaves_no_folder_and_the_next_one_cleans_up(tmp_path):
    script = (
        "import sys, time, numpy as np\n"
        "from lib.data import DatasetWriter\n"
        "from tests_card import CARD\n"
        "with DatasetWriter(sys.argv[1], CARD) as writer:\n"
        "    writer.add(case_id='a', patient_id='a', split='train', image=np.zeros((8, 8)),\n"
        "               mask=np.zeros((8, 8)), spacing=(1, 1), prompts={})\n"
        "    print('writing', flush=True)\n"
        "    time.sleep(60)\n"
    )
    (tmp_path / "tests_card.py").write_text(f"CARD = {CARD!r}\n")
    target = tmp_path / "data" / "boxes"
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", script, target], stdout=subprocess.PIPE, env=environment) as child:
        assert child.stdout.readline() == b"writing\n"
        child.send_signal(signal.SIGKILL)
    assert not target.exists()
    assert len(list(target.parent.iterdir())) == 1  # what the killed run could not remove
    write(target)
    assert [path.name for path in target.parent.iterdir()] == ["boxes"]
    load_dataset(target, verify=True)


def test_a_writer_leaves_the_drafts_of_others_that_still_run(tmp_path):
    with DatasetWriter(tmp_path / "boxes", CARD, overwrite=True) as first:
        image, mask = box(0)
        kwargs = {"split": "train", "spacing": (1, 1), "prompts": {}}
        first.add(case_id="a", patient_id="a", image=image, mask=mask, **kwargs)
        write(tmp_path / "boxes")
        first.add(case_id="b", patient_id="b", image=image, mask=mask, **kwargs)
    assert [case.case_id for case in load_dataset(tmp_path / "boxes", verify=True).cases] == ["a", "b"]


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corruption_is_stronger_with_its_strength_and_the_same_each_time(name, tmp_path):
    cache = feed(write(tmp_path / "d")).cache
    changes = [float((cache.corrupted(name, s).images - cache.images).abs().mean()) for s in (0, 0.3, 0.9)]
    assert changes[0] == 0 < changes[1] < changes[2]
    again = cache.corrupted(name, 0.3)
    assert torch.equal(again.images, cache.corrupted(name, 0.3).images) and torch.equal(again.masks, cache.masks)
    assert again.images.min() >= 0 and again.images.max() <= 1


def test_an_unknown_corruption_and_a_negative_strength_are_refused(tmp_path):
    cache = feed(write(tmp_path / "d")).cache
    with pytest.raises(DataError, match="Unknown corruption 'fog': use one of blur, noise, low_contrast"):
        cache.corrupted("fog", 1)
    with pytest.raises(DataError, match="has the strength -1"):
        cache.corrupted("blur", -1)


def test_a_transposed_cache_swaps_rows_and_columns(tmp_path):
    cache = feed(write(tmp_path / "d")).cache
    turned = cache.transposed()
    assert torch.equal(turned.images[0, 0].T, cache.images[0, 0]) and torch.equal(
        turned.masks[0, 0].T, cache.masks[0, 0]
    )
    assert torch.equal(turned.transposed().images, cache.images)


# --- volumes with several structures ------------------------------------------------------------------------------


def balls(volumes, size=16, **options):
    cache = ImageCache.load(load_dataset(volumes).split("train"), size, **options)
    number = torch.arange(len(cache.cases), dtype=torch.float32)
    prompts = Prompts({"target": number[:, None].repeat(1, 3)}, {"target": torch.ones(len(number), dtype=torch.bool)})
    return cache, prompts


def test_structures_share_their_image_and_stand_in_channels(volumes):
    cache, prompts = balls(volumes)
    assert cache.images.shape == (6, 1, 16, 16, 16) and cache.masks.shape == (14, 1, 16, 16, 16)
    assert cache.rows.tolist()[:3] == [[0, 1, -1], [2, 3, -1], [4, 5, 6]]
    batch = Feed(cache, prompts).batch([0, 2])
    assert batch.image.shape == (2, 1, 16, 16, 16) and batch.mask.shape == (2, 3, 16, 16, 16)
    assert torch.equal(batch.mask[0, 1], cache.masks[1, 0].float()) and (batch.mask[0, 2] == -1).all()
    assert not batch.mask[1, 2].any()  # labelled as absent, which is not the same as unlabelled
    assert batch.prompts.pooled["target"][:, 0].tolist()[:2] == [0, 1]
    assert batch.prompts.pooled["target"][3:, 0].tolist() == [4, 5, 6] and len(batch.prompts) == 6
    assert batch.outcome.tolist() == [[100, 1], [102, 1]]
    assert Feed(cache, prompts).batch([0, 1]).mask.shape[1] == 2  # no channel that nobody has


def test_an_unlabelled_structure_stays_so_when_the_volume_is_turned(volumes):
    cache, prompts = balls(volumes)
    batch = Feed(cache, prompts, "full").batch([0, 2], step_seed=3)
    assert (batch.mask[0, 2] == -1).all() and (batch.mask[1] >= 0).all()
    assert set(batch.mask[0, :2].unique().tolist()) <= {0, 1}


def test_a_window_is_cut_out_of_image_and_masks_alike(volumes):
    cache, prompts = balls(volumes)
    feed = Feed(cache, prompts, window=8)
    assert feed.batch([0, 1]).image.shape == (2, 1, 16, 16, 16)  # whole in evaluation
    for seed in range(8):
        batch = feed.batch([0, 2], step_seed=seed)
        assert batch.image.shape == (2, 1, 8, 8, 8) and batch.mask.shape == (2, 3, 8, 8, 8)
        assert batch.mask[0, :2].any()  # the first of a batch is about a structure
        assert (batch.image[0, 0][batch.mask[0, :2].amax(0) > 0] > 0.6).all()
        assert torch.equal(batch.image, feed.batch([0, 2], step_seed=seed).image)
    with pytest.raises(DataError, match="window of 20 .* grid is 16x16x16: load the volumes on a larger grid"):
        Feed(cache, prompts, window=20)


def test_volumes_are_resampled_to_millimetres_and_padded(tmp_path):
    from tests.conftest import write_volumes

    folder = write_volumes(tmp_path / "flat", {"train": 2}, sides=(8, 16, 16), spacing=(4.0, 2.0, 2.0))
    cases = load_dataset(folder).cases
    cache = ImageCache.load(cases, 20, spacing=2.0)
    assert cache.images.shape == (2, 1, 20, 20, 20) and (cache.spacing == 2.0).all()
    assert not cache.images[:, :, :2].any() and cache.images[:, :, 2].any()  # 16 voxels in the middle of 20
    stored = ImageCache.load(cases, (8, 16, 16))  # at its own grid, whose voxels are twice as large
    assert 0.85 < cache.masks.sum() / (2 * stored.masks.sum()) < 1.15
    with pytest.raises(
        DataError, match="32x32x32 voxels of 1 mm and the grid 20x20x20: ask for a larger size or spacing"
    ):
        ImageCache.load(cases, 20, spacing=1.0)


def test_a_training_image_is_read_with_any_of_its_wordings(volumes):
    cache, prompts = balls(volumes)
    other = Prompts({"target": prompts.pooled["target"] + 100}, prompts.present)
    feed = Feed(cache, prompts, rewordings=(other,))
    assert feed.batch([0, 1]).prompts.pooled["target"].max() < 100  # the first wording in evaluation
    seen = torch.cat([feed.batch([0, 1], step_seed=seed).prompts.pooled["target"][:, 0] for seed in range(20)])
    assert {value % 100 for value in seen.tolist()} == {0, 1, 2, 3} and 20 < int((seen >= 100).sum()) < 60
    again = feed.batch([0, 1], step_seed=4).prompts.pooled["target"]
    assert torch.equal(again, feed.batch([0, 1], step_seed=4).prompts.pooled["target"])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"masks": {"left": 0}, "prompts": {"left": {}, "right": {}}}, "masks of left and prompts for left, right"),
        ({"masks": {"heart": 0}, "prompts": {"heart": {}}}, "mask of 'heart', which is no class of its card: use left"),
        ({"shape": (4, 4)}, r"shape \(4, 4\): expected 3 axes"),
        ({"mask_shape": (4, 4, 5)}, r"mask of left .* has the shape \(4, 4, 5\) and its image \(4, 4, 4\)"),
        ({"spacing": (1.0, 1.0)}, "spacing of case 'v.left' of dataset 'v' is .*: expected 3 positive numbers"),
        ({"spacing": (1.0, 0.0, 1.0)}, "spacing of case 'v.left' of dataset 'v' is .*: expected 3 positive numbers"),
        ({"outcome": (-3.0, True)}, "outcome '-3', '1': expected a positive number of days"),
        ({"outcome": (float("nan"), True)}, "outcome 'nan', '1': expected a positive number of days"),
    ],
)
def test_a_bad_volume_is_refused_and_leaves_nothing(tmp_path, change, sentence):
    from tests.conftest import VOLUME_CARD

    shape = change.get("shape", (4, 4, 4))
    masks = {name: np.zeros(change.get("mask_shape", shape), np.uint8) for name in change.get("masks", {"left": 0})}
    with pytest.raises(DataError, match=sentence), DatasetWriter(tmp_path / "v", VOLUME_CARD) as writer:
        writer.add_volume(
            case_id="v",
            patient_id="v",
            split="train",
            image=np.zeros(shape),
            masks=masks,
            spacing=change.get("spacing", (1.0, 1.0, 1.0)),
            prompts=change.get("prompts", {"left": {}}),
            outcome=change.get("outcome"),
        )
    assert not list(tmp_path.iterdir())
