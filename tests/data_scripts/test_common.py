"""What the scripts share: tables, masks as people draw them, splits."""

from zipfile import ZipFile

import numpy as np
import pytest
from common import binary_mask, colour_image, grey_image, make_splits, read_table, require
from PIL import Image

from lib.data import DataError

SPACE = 'xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"'


def test_a_workbook_is_read_with_its_gaps_numbers_and_rich_text(tmp_path):
    with ZipFile(tmp_path / "t.xlsx", "w") as book:
        book.writestr("xl/sharedStrings.xml", f"<sst {SPACE}><si><r><t>be</t></r><r><t>nign</t></r></si></sst>")
        book.writestr(
            "xl/worksheets/sheet1.xml",
            f'<worksheet {SPACE}><sheetData><row><c r="A1" t="inlineStr"><is><t>Image</t></is></c>'
            '<c r="B1" t="inlineStr"><is><t>Note</t></is></c><c r="C1" t="inlineStr"><is><t>Type</t></is></c></row>'
            '<row><c r="A2"><v>7</v></c><c r="C2" t="s"><v>0</v></c></row></sheetData></worksheet>',
        )
    assert read_table(tmp_path / "t.xlsx") == [{"Image": "7", "Note": "", "Type": "benign"}]


def test_a_broken_workbook_is_named(tmp_path):
    (tmp_path / "t.xlsx").write_bytes(b"PK not really")
    with pytest.raises(DataError, match=r"t.xlsx cannot be read as an Excel workbook"):
        read_table(tmp_path / "t.xlsx")


def test_tables_must_be_utf8_and_whole(tmp_path):
    (tmp_path / "t.csv").write_bytes("a,b\nGómez,1\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"t.csv is not UTF-8 text \(byte 5\)"):
        read_table(tmp_path / "t.csv")
    with pytest.raises(DataError, match="lacks the column 'c'"):
        require([{"a": "1"}], ("a", "c"), tmp_path / "t.csv")
    with pytest.raises(DataError, match="has no rows"):
        require([], ("a",), tmp_path / "t.csv")


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "RGBA"])
def test_masks_are_read_in_every_mode_people_save_them(tmp_path, mode):
    truth = np.zeros((6, 8), bool)
    truth[2:4, 3:6] = True
    picture = Image.fromarray(truth.astype(np.uint8) * 255)
    if mode == "RGBA":  # white everywhere, and opaque only where the lesion is
        alpha = picture
        picture = Image.new("RGBA", (8, 6), "white")
        picture.putalpha(alpha)
    else:
        picture = picture.convert(mode)
    picture.save(tmp_path / "m.png")
    np.testing.assert_array_equal(binary_mask(tmp_path / "m.png", "m.png"), truth)


def test_a_mask_with_the_ringing_of_jpeg_is_cut_at_the_level_asked_for(tmp_path):
    Image.fromarray(np.array([[0, 6, 120, 200, 255]], np.uint8)).save(tmp_path / "m.png")
    assert binary_mask(tmp_path / "m.png", "m.png", above=127).tolist() == [[False, False, False, True, True]]


@pytest.mark.parametrize("read", [grey_image, colour_image, binary_mask])
def test_an_image_of_16_bits_is_refused_in_one_sentence(tmp_path, read):
    Image.fromarray(np.full((4, 4), 3000, np.uint16)).save(tmp_path / "x.png")
    with pytest.raises(DataError, match=r"^x.png has more than 8 bits per pixel \(mode I;16\).*convert it to 8 bits"):
        read(tmp_path / "x.png", "x.png")


def test_colour_and_grey_images_are_read_as_asked_for(tmp_path):
    Image.new("RGB", (3, 2), (200, 100, 50)).save(tmp_path / "c.png")
    assert colour_image(tmp_path / "c.png", "c.png")[0, 0].tolist() == [200, 100, 50]
    assert grey_image(tmp_path / "c.png", "c.png").shape == (2, 3)


def test_splits_keep_patients_whole_and_shares_within_every_class():
    patients = [f"p{i // 3}" for i in range(900)]
    strata = ["benign" if i // 3 < 200 else "malignant" for i in range(900)]
    split = make_splits(patients, strata)
    assert set(split) == set(patients)
    for kind in ("benign", "malignant"):
        members = [split[p] for p, s in zip(patients, strata, strict=True) if s == kind]
        shares = [members.count(name) / len(members) for name in ("train", "val", "test")]
        assert shares == pytest.approx([0.7, 0.1, 0.2], abs=0.01)
    assert split == make_splits(patients, strata)
    assert split != make_splits(patients, strata, seed=1)
