"""Bad data stops with one sentence that names the file and the remedy, and leaves nothing half-written."""

import errno
import io
import json
import re
import tarfile
import zipfile

import nibabel
import numpy as np
import pytest
from PIL import Image

from lib import data
from lib.data import DatasetWriter, Feed, ImageCache, load_dataset
from lib.files import DataError, atomic_write, extract
from lib.text import Prompts

CARD = {
    "title": "Noise",
    "modality": "none",
    "dims": 2,
    "classes": {"half": 1},
    "level": "P",
    "licence": "CC0-1.0",
    "citation": "none",
    "source": "made by a test",
    "splits": "by patient",
    "prompts": {"local": {"role": "local", "origin": "template", "source": "a test"}},
}
CASE = {"patient_id": "p", "split": "train", "spacing": (1, 1), "prompts": {"local": "half of it"}}


def noise(shape=(30, 40), seed=0):
    image = np.random.default_rng(seed).integers(0, 255, shape).astype(np.uint8)
    return {"image": image, "mask": np.indices(shape)[-1] > shape[-1] // 2}


def write(folder, shape=(30, 40), card=CARD):
    with DatasetWriter(folder, card | {"dims": len(shape)}) as writer:
        for index, split in enumerate(("train", "train", "val", "test")):
            case = CASE | {"patient_id": f"p{index}", "split": split, "spacing": (1,) * len(shape)}
            writer.add(case_id=f"c{index}", **case, **noise(shape, index))
    return folder


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "noise")


def edit(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def one_sentence(error):
    message = str(error.value)
    assert "\n" not in message and len(message) < 420 and not message.startswith("Traceback")
    return message


# --- damaged files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["corrupt", "truncated", "empty"])
@pytest.mark.parametrize("kind", ["images", "masks"])
def test_damaged_picture(folder, kind, damage):
    path = folder / kind / "c1.png"
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(
        {"corrupt": content[:middle] + bytes(40) + content[middle + 40 :], "truncated": content[:middle], "empty": b""}[
            damage
        ]
    )
    cases = load_dataset(folder).cases
    with pytest.raises(DataError, match=rf"{kind}/c1\.png cannot be decoded .* make the dataset again") as error:
        ImageCache.load(cases, 16)
    one_sentence(error)
    with pytest.raises(DataError, match="do not have the checksum"):
        load_dataset(folder, verify=True)


def test_damaged_volume(tmp_path):
    folder = write(tmp_path / "noise", shape=(5, 6, 7))
    path = folder / "images" / "c0.nii.gz"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(DataError, match=r"c0\.nii\.gz cannot be decoded"):
        ImageCache.load(load_dataset(folder).cases, 4)


def test_missing_file(folder):
    (folder / "masks" / "c2.png").unlink()
    with pytest.raises(DataError, match=r"masks/c2\.png is listed in cases\.csv and missing"):
        load_dataset(folder)


def test_mask_of_another_size(folder):
    Image.fromarray(np.zeros((30, 41), np.uint8)).save(folder / "masks" / "c0.png")
    with pytest.raises(DataError, match=r"masks/c0\.png has the shape \(30, 41\) and its image \(30, 40\)"):
        ImageCache.load(load_dataset(folder).cases, 16)


def test_mask_that_is_not_binary(folder):
    Image.fromarray(np.arange(1200, dtype=np.uint32).reshape(30, 40).astype(np.uint8)).save(folder / "masks" / "c0.png")
    with pytest.raises(DataError, match=r"masks/c0\.png has 256 different values up to 255: expected a binary mask"):
        ImageCache.load(load_dataset(folder).cases, 16)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_pixels_in_a_volume(tmp_path, bad):
    folder = write(tmp_path / "noise", shape=(5, 6, 7))
    volume = np.zeros((7, 6, 5), np.float32)
    volume[3, 3, 3] = bad
    nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), folder / "images" / "c3.nii.gz")
    with pytest.raises(DataError, match=r"c3\.nii\.gz has NaN or infinite pixels"):
        ImageCache.load(load_dataset(folder).cases, 4)


def test_volume_that_was_not_scaled(tmp_path):
    folder = write(tmp_path / "noise", shape=(5, 6, 7))
    nibabel.save(nibabel.Nifti1Image(np.full((7, 6, 5), -1000, np.float32), np.eye(4)), folder / "images" / "c3.nii.gz")
    with pytest.raises(DataError, match=r"c3\.nii\.gz holds float32 from -1000 to -1000: expected uint8, or floats"):
        ImageCache.load(load_dataset(folder).cases, 4)


# --- channels -----------------------------------------------------------------------------------------------------


def test_picture_with_four_channels(folder):
    Image.new("RGBA", (40, 30)).save(folder / "images" / "c0.png")
    with pytest.raises(DataError, match=r"c0\.png has 4 channels \(mode RGBA\), expected grey or RGB"):
        ImageCache.load(load_dataset(folder).cases, 16, channels=3)


def test_colour_where_grey_was_asked_for(folder):
    Image.new("RGB", (40, 30)).save(folder / "images" / "c0.png")
    with pytest.raises(DataError, match=r"c0\.png has 3 channels and 1 was asked for"):
        ImageCache.load(load_dataset(folder).cases, 16, channels=1)


def test_a_number_of_channels_that_no_model_has(folder):
    with pytest.raises(DataError, match="4 channels were asked for: ask for 1 or 3"):
        ImageCache.load(load_dataset(folder).cases, 16, channels=4)


def test_size_with_the_wrong_number_of_axes(folder):
    with pytest.raises(DataError, match=r"has 2 axes and the size asked for is \(16, 16, 16\)"):
        ImageCache.load(load_dataset(folder).cases, (16, 16, 16))


def test_no_case_at_all():
    with pytest.raises(DataError, match="There is no case to load"):
        ImageCache.load([], 16)


# --- cases.csv ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("column", ["patient_id", "spacing", "local"])
def test_missing_column(folder, column):
    edit(folder / "cases.csv", column, "age" if column == "local" else "local@" + column)
    wanted = "unknown role" if column == "local" else f"lacks the column '{column}'"
    with pytest.raises(DataError, match=rf"cases\.csv.* {wanted}") as error:
        load_dataset(folder)
    one_sentence(error)


def test_unknown_prompt_role(folder):
    edit(folder / "cases.csv", "spacing,local", "spacing,localy")
    with pytest.raises(
        DataError, match=r"cases\.csv: Prompt column 'localy' has the unknown role 'localy': use one of"
    ):
        load_dataset(folder)


def test_unknown_prompt_role_in_the_card(tmp_path):
    prompts = {"locale": {"role": "locale", "origin": "human", "source": "a test"}}
    with pytest.raises(DataError, match="The card for .*noise is not valid: prompts: .* unknown role 'locale'"):
        write(tmp_path / "noise", card=CARD | {"prompts": prompts})
    assert list(tmp_path.iterdir()) == []


def test_prompt_column_without_an_origin(folder):
    edit(folder / "cases.csv", "spacing,local", "spacing,local,report")
    text = (folder / "cases.csv").read_text()
    (folder / "cases.csv").write_text(text.replace("half of it\n", "half of it,x\n"))
    with pytest.raises(DataError, match=r"has the prompt column 'report' of which card\.json does not tell the origin"):
        load_dataset(folder)


def test_duplicated_case_id(folder):
    edit(folder / "cases.csv", "\nc1,", "\nc0,")
    with pytest.raises(DataError, match=r"cases\.csv has 2 rows with the case id 'c0'"):
        load_dataset(folder)


def test_patient_in_two_splits(folder):
    edit(folder / "cases.csv", "c3,p3", "c3,p0")
    with pytest.raises(DataError, match=r"cases\.csv has patient 'p0' in the splits train and test"):
        load_dataset(folder)


def test_empty_split(folder):
    edit(folder / "cases.csv", "c2,p2,val", "c2,p2,train")
    with pytest.raises(DataError, match=r"cases\.csv has no case in the split 'val'"):
        load_dataset(folder)


def test_unknown_split(folder):
    edit(folder / "cases.csv", "c2,p2,val", "c2,p2,valid")
    with pytest.raises(DataError, match="case 'c2' into the split 'valid': use train, val, test"):
        load_dataset(folder)
    with pytest.raises(DataError, match="has no split 'valid': use one of train, val, test"):
        load_dataset(write(folder.parent / "more")).split("valid")


def test_row_that_is_too_short(folder):
    edit(folder / "cases.csv", ",half of it\n", "\n")
    with pytest.raises(DataError, match=r"cases\.csv has 6 cells in row 2 and 7 columns"):
        load_dataset(folder)


@pytest.mark.parametrize("spacing", ["", "1", "0 1", "a b", "inf 1"])
def test_spacing_that_is_none(folder, spacing):
    edit(folder / "cases.csv", ",1 1,", f",{spacing},")
    with pytest.raises(DataError, match=f"gives '{spacing}' as the spacing of case 'c0': expected 2 positive"):
        load_dataset(folder)


@pytest.mark.parametrize("path", ["../secret.png", "/etc/passwd", ""])
def test_path_that_leaves_the_folder(folder, path):
    edit(folder / "cases.csv", "images/c0.png", path)
    with pytest.raises(DataError, match="paths must lie inside the dataset folder"):
        load_dataset(folder)


def test_table_that_is_not_utf8(folder):
    path = folder / "cases.csv"
    path.write_bytes(path.read_bytes().replace(b"half of it", "Hälfte".encode("latin-1"), 1))
    with pytest.raises(DataError, match=r"cases\.csv is not UTF-8 text \(byte \d+\): save it as UTF-8"):
        load_dataset(folder)


def test_table_that_is_empty(folder):
    (folder / "cases.csv").write_text("")
    with pytest.raises(DataError, match=r"cases\.csv cannot be read as a table"):
        load_dataset(folder)


def test_table_saved_by_a_spreadsheet_with_a_byte_order_mark(folder):
    path = folder / "cases.csv"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(load_dataset(folder).cases) == 4


# --- card.json ----------------------------------------------------------------------------------------------------


def test_folder_that_is_no_dataset(tmp_path):
    with pytest.raises(DataError, match=r"is not a dataset folder .* make it with its script in data_scripts/"):
        load_dataset(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"origin": "x"}, "prompts.local.origin: Input should be 'metadata'"),
        ({"colour": 1}, "colour: Extra inputs are not permitted"),
        ({"level": "Q"}, "level: Input should be 'P', 'S' or 'R'"),
        ({"licence": None}, "licence: Input should be a valid string"),
    ],
)
def test_card_that_is_not_valid(folder, change, words):
    card = json.loads((folder / "card.json").read_text())
    if "origin" in change:
        card["prompts"]["local"] |= change
    else:
        card |= change
    (folder / "card.json").write_text(json.dumps(card))
    with pytest.raises(DataError, match=rf"card\.json is not a valid card: {re.escape(words)}") as error:
        load_dataset(folder)
    one_sentence(error)


def test_card_that_is_no_json(folder):
    (folder / "card.json").write_text("{")
    with pytest.raises(DataError, match=r"card\.json is not a valid card: it: Invalid JSON"):
        load_dataset(folder)


def test_renamed_folder(folder):
    folder.rename(folder.parent / "music")
    with pytest.raises(DataError, match="names the dataset 'noise': give its folder that name"):
        load_dataset(folder.parent / "music")


def test_checksum_mismatch(folder):
    edit(folder / "cases.csv", "half of it", "more than half")
    load_dataset(folder)
    with pytest.raises(DataError, match=r"noise do not have the checksum in its card\.json"):
        load_dataset(folder, verify=True)


# --- the writer ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"case_id": "../c"}, "The case id '../c' cannot name a file"),
        ({"case_id": ""}, "The case id '' cannot name a file"),
        ({"split": "valid"}, "into the split 'valid': use train, val, test"),
        ({"image": np.zeros((30, 40, 4), np.uint8)}, r"has the shape (30, 40, 4): expected 2 axes"),
        ({"image": np.full((30, 40), np.nan)}, "has NaN or infinite pixels"),
        ({"image": np.full((30, 40), 3.0)}, "holds float64 from 3 to 3"),
        ({"image": np.full((30, 40), 3)}, "holds int64 from 3 to 3"),
        ({"mask": np.zeros((40, 30))}, "has the shape (40, 30) and its image (30, 40)"),
        ({"mask": np.full((30, 40), 2)}, "expected a binary mask"),
        ({"spacing": (1, 1, 1)}, "expected 2 positive numbers"),
        ({"prompts": {"report": "x"}}, "have the column 'report', which its card does not describe: use local"),
        ({"case_id": "c1"}, "Case 'c1' of dataset 'noise' was added twice"),
        ({"patient_id": "p1", "split": "test"}, "has patient 'p1' in the splits train and test"),
        ({"patient_id": ""}, "gives case 'c9' no patient id"),
    ],
)
def test_writer_refuses_a_bad_case_and_leaves_nothing(tmp_path, change, words):
    def run():
        with DatasetWriter(tmp_path / "noise", CARD) as writer:
            writer.add(case_id="c1", **CASE | {"patient_id": "p1"}, **noise())
            writer.add(**{"case_id": "c9", **CASE, **noise(), **change})

    with pytest.raises(DataError, match=re.escape(words)) as error:
        run()
    one_sentence(error)
    assert list(tmp_path.iterdir()) == []


def test_writer_without_cases(tmp_path):
    with pytest.raises(DataError, match="No case was added"), DatasetWriter(tmp_path / "noise", CARD):
        pass
    assert list(tmp_path.iterdir()) == []


def test_interrupted_writer_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), DatasetWriter(tmp_path / "noise", CARD) as writer:
        writer.add(case_id="c1", **CASE, **noise())
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("when", ["_write_png", "_fingerprint"])
def test_full_disk_while_a_dataset_is_written(tmp_path, monkeypatch, when):
    write(tmp_path / "noise")
    before = load_dataset(tmp_path / "noise").card.fingerprint

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(data, when, full)
    for name in ("noise", "other"):
        with (
            pytest.raises(OSError, match=f"No space left on the disk while writing .*{name}: free some") as error,
            DatasetWriter(tmp_path / name, CARD, overwrite=True) as writer,
        ):
            writer.add(case_id="c1", **CASE, **noise())
        assert error.value.errno == errno.ENOSPC
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["noise"]
    assert load_dataset(tmp_path / "noise", verify=True).card.fingerprint == before


def test_full_disk_while_a_file_is_written(tmp_path, monkeypatch):
    atomic_write(tmp_path / "a.json", "old")

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(data.os, "replace", full)
    with pytest.raises(OSError, match=r"No space left on the disk while writing .*a\.json"):
        atomic_write(tmp_path / "a.json", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "old"


# --- archives -----------------------------------------------------------------------------------------------------


def zip_with(path, name, linked=False):
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("good.txt", "good")
        info = zipfile.ZipInfo(name)
        info.filename = name  # as an attacker would write it, not as the module would clean it
        if linked:
            info.create_system, info.external_attr = 3, 0o120777 << 16
        z.writestr(info, "/etc/passwd" if linked else "evil")
    return path


def tar_with(path, name, kind=tarfile.REGTYPE):
    with tarfile.open(path, "w") as t:
        good = tarfile.TarInfo("good.txt")
        good.size = 4
        t.addfile(good, io.BytesIO(b"good"))
        bad = tarfile.TarInfo(name)
        bad.type, bad.linkname = kind, "/etc/passwd"
        t.addfile(bad)
    return path


@pytest.mark.parametrize("name", ["../evil.txt", "a/../../evil.txt", "/evil.txt", "..\\evil.txt", "C:/evil.txt"])
@pytest.mark.parametrize("make", [zip_with, tar_with])
def test_archive_that_would_write_outside(tmp_path, make, name):
    archive = make(tmp_path / "bad.archive", name)
    with pytest.raises(DataError, match=r"bad\.archive holds the entry .* outside the folder") as error:
        extract(archive, tmp_path / "inner" / "out")
    one_sentence(error)
    assert not list(tmp_path.rglob("*.txt")) and not (tmp_path / "inner" / "out").exists()


@pytest.mark.parametrize(
    "make",
    [
        lambda path: zip_with(path, "link", linked=True),
        lambda path: tar_with(path, "link", tarfile.SYMTYPE),
        lambda path: tar_with(path, "link", tarfile.LNKTYPE),
        lambda path: tar_with(path, "pipe", tarfile.FIFOTYPE),
    ],
    ids=["zip symlink", "tar symlink", "tar hard link", "tar pipe"],
)
def test_archive_with_links(tmp_path, make):
    with pytest.raises(DataError, match="which is a link or a device and not a plain file: nothing was unpacked"):
        extract(make(tmp_path / "bad.archive"), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["bad.archive"]


def test_archive_that_is_cut_short(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("noise.bin", np.random.default_rng(0).bytes(5000))
    content = (tmp_path / "a.zip").read_bytes()
    (tmp_path / "a.zip").write_bytes(content[:900])
    with pytest.raises(DataError, match=r"a\.zip is neither a zip nor a tar archive, or is cut short"):
        extract(tmp_path / "a.zip", tmp_path / "out")
    (tmp_path / "a.zip").write_bytes(content[:900] + bytes(100) + content[1000:])
    with pytest.raises(DataError, match=r"a\.zip is damaged .*: get it again"):
        extract(tmp_path / "a.zip", tmp_path / "out")
    with pytest.raises(DataError, match=r"b\.zip does not exist"):
        extract(tmp_path / "b.zip", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["a.zip"]


# --- feeds --------------------------------------------------------------------------------------------------------


def test_feed_with_an_unknown_augmentation_or_other_prompts(folder):
    import torch

    cache = ImageCache.load(load_dataset(folder).cases, 16)
    with pytest.raises(DataError, match="Unknown augmentation 'flips': use one of none, flip"):
        Feed(cache, Prompts({}, {}), "flips")
    three = Prompts({"local": torch.zeros(3, 4)}, {"local": torch.zeros(3, dtype=torch.bool)})
    with pytest.raises(DataError, match="There are 3 prompts of role 'local' for 4 cases"):
        Feed(cache, three)
