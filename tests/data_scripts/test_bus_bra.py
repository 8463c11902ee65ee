"""BUS-BRA: folders from the mirror's zips and from the original archive, and the words of its table."""

import csv
import zipfile

import bus_bra
import pytest
from common import Mirror

from lib.data import ImageCache, load_dataset
from lib.files import DataError, sha256_file


@pytest.fixture
def archive(tmp_path, scene, save, zipped):
    """A zip in the layout of BUSBRA.zip: 20 patients with a left and a right image each."""
    folder = tmp_path / "BUSBRA"
    rows, folds = [], []
    for patient in range(1, 21):
        for side in ("left", "right"):
            name = f"{patient:04d}-{side[0]}"
            image, mask = scene()
            save(folder / "Images" / f"bus_{name}.png", image)
            save(folder / "Masks" / f"mask_{name}.png", mask)
            pathology = "malignant" if patient % 2 else "benign"
            rows.append(
                {
                    **{"ID": f"bus_{name}", "Case": patient, "Histology": "Fibroadenoma", "Pathology": pathology},
                    **{"BIRADS": 4, "Device": "GE Logiq 7 @10-14MHz", "Width": 80, "Height": 60, "Side": side},
                    "BBOX": "[1,2,3,4]",
                }
            )
            folds.append({"ID": f"bus_{name}", "Pathology": pathology, "kFold": patient % 5 + 1})
    for name, table in (("bus_data.csv", rows), ("5-fold-cv.csv", folds)):
        with open(folder / name, "w", newline="") as file:
            writer = csv.DictWriter(file, table[0])
            writer.writeheader()
            writer.writerows(table)
    return zipped(folder)


def build(archive, tmp_path):
    out = tmp_path / "bus_bra"
    bus_bra.main(["--archive", str(archive), "--out", str(out), "--sha256", sha256_file(archive)])
    return load_dataset(out, verify=True)


def test_archive_is_split_by_patient_along_the_datasets_own_folds(archive, tmp_path):
    dataset = build(archive, tmp_path)
    assert {case.patient_id for case in dataset.split("test")} == {"5", "10", "15", "20"}  # fold 1
    assert len(dataset.split("val")) == 4  # half of the second fold's eight images
    assert {case.patient_id for case in dataset.split("val")} < {"1", "6", "11", "16"}
    assert len(dataset.cases) == 40


def test_table_becomes_prompts(archive, tmp_path):
    prompts = build(archive, tmp_path).cases[0].prompts
    assert prompts["global"] == "Breast ultrasound, GE Logiq 7 at 10-14 MHz, left breast."
    assert prompts["local"] == "Ultrasound of a breast mass, BI-RADS 4."
    assert prompts["local@histology"] == "Ultrasound of a breast mass, fibroadenoma, BI-RADS 4."
    assert prompts["class@pathology"] == "Malignant tumor."
    assert prompts["global@p1"] == "malignant breast tumor" and prompts["global@p0"] == "breast tumor"


def test_an_archive_other_than_the_pinned_one_is_refused(archive, tmp_path):
    with pytest.raises(SystemExit, match="and not ba3e6ed1"):
        bus_bra.main(["--archive", str(archive), "--out", str(tmp_path / "bus_bra")])
    assert not (tmp_path / "bus_bra").exists()


def test_a_missing_fold_is_named(archive, tmp_path):
    table = tmp_path / "BUSBRA" / "5-fold-cv.csv"
    table.write_text("\n".join(table.read_text().splitlines()[:-1]) + "\n")
    with pytest.raises(SystemExit, match="has no fold for 'bus_0020-r'"):
        bus_bra.main(["--archive", str(table.parent), "--out", str(tmp_path / "bus_bra")])


def test_a_table_without_its_columns_is_refused(archive, tmp_path):
    table = tmp_path / "BUSBRA" / "bus_data.csv"
    table.write_text(table.read_text().replace("BIRADS", "birads"))
    with pytest.raises(SystemExit, match="lacks the column 'BIRADS'"):
        bus_bra.main(["--archive", str(table.parent), "--out", str(tmp_path / "bus_bra")])


def test_download_fetches_the_pinned_file(archive, tmp_path, monkeypatch):
    asked = []

    def fetch(url, sha256, folder):
        asked.append((url, sha256))
        return archive

    monkeypatch.setattr("common.fetch", fetch)
    bus_bra.main(["--download", "--out", str(tmp_path / "bus_bra")])
    assert asked == [(bus_bra.ARCHIVE.url, bus_bra.ARCHIVE.sha256)]
    assert bus_bra.ARCHIVE.sha256 in " ".join(load_dataset(tmp_path / "bus_bra").card.notes)


@pytest.mark.parametrize(
    ("side", "device", "sentence"),
    [
        ("single", "Toshiba Aplio 300 @12-14 MHz", "Breast ultrasound, Toshiba Aplio 300 at 12-14 MHz."),
        ("Right", "U-Systems @10-14MHz", "Breast ultrasound, U-Systems at 10-14 MHz, right breast."),
        ("left", "", "Breast ultrasound, left breast."),
    ],
)
def test_global_prompt_names_only_what_is_known(side, device, sentence):
    assert bus_bra.global_prompt(side, device) == sentence


def test_mirror_is_read_out_of_its_zips(mirrors, tmp_path):
    full = Mirror(mirrors, "bus_bra", ())
    chosen = [next(row for row in full.rows if row["split"] == split) for split in ("train", "val", "test")]
    small = tmp_path / "mirror" / "bus_bra"
    small.mkdir(parents=True)
    for row in chosen:
        for kind in ("image", "mask"):
            container, entry = row[kind].split("/")
            with zipfile.ZipFile(full.folder / container) as source, zipfile.ZipFile(small / container, "w") as z:
                z.writestr(entry, source.read(entry))
    with open(small / "metadata.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, chosen[0])
        table.writeheader()
        table.writerows(chosen)
    bus_bra.main(["--mirror", str(small.parent), "--out", str(tmp_path / "bus_bra")])
    dataset = load_dataset(tmp_path / "bus_bra", verify=True)
    assert dataset.card.counts == {"train": 1, "val": 1, "test": 1}
    cache = ImageCache.load(dataset.cases, 32)
    assert cache.masks.flatten(1).any(1).all()
    fraction = cache.masks.float().mean((1, 2, 3))
    assert fraction.tolist() == pytest.approx([float(row["lesion_fraction"]) for row in chosen], abs=0.02)


def test_a_damaged_mirror_image_is_named(mirrors, tmp_path):
    full = Mirror(mirrors, "bus_bra", ())
    row = dict(full.rows[0])
    with zipfile.ZipFile(tmp_path / "images_train.zip", "w") as z:
        z.writestr("bad.jpg", full._read(row["image"])[:900])
    mirror = Mirror(full.folder, "bus_bra", ())
    mirror.folder = tmp_path
    with pytest.raises(DataError, match=r"images_train.zip/bad.jpg cannot be decoded"):
        mirror.image({"image": "images_train.zip/bad.jpg"})
    with pytest.raises(DataError, match="is listed in metadata.csv and cannot be read"):
        mirror.image({"image": "images_train.zip/absent.jpg"})
