"""Breast-Lesions-USG: a folder from the original layout, and the descriptors in words."""

import csv
from xml.sax.saxutils import escape
from zipfile import ZipFile

import breast_lesions_usg as script
import numpy as np
import pytest

from lib.data import ImageCache, load_dataset
from lib.files import sha256_file

ROW = {
    **{"CaseID": "1", "Image_filename": "case001.png", "Mask_tumor_filename": "case001_tumor.png"},
    **{
        "Mask_other_filename": "",
        "Pixel_size": "0.0085",
        "Age": "57",
        "Tissue_composition": "heterogeneous: predominantly fat",
    },
    **{"Signs": "no", "Symptoms": "no", "Shape": "irregular", "Margin": "not circumscribed - spiculated&indistinct"},
    **{"Echogenicity": "hypoechoic", "Posterior_features": "shadowing", "Halo": "no", "Calcifications": "in a mass"},
    **{"Skin_thickening": "yes", "Interpretation": "", "BIRADS": "4c", "Verification": "", "Diagnosis": ""},
    "Classification": "malignant",
}


def write_xlsx(path, rows):
    """Write the parts of a workbook that hold the cells, strings shared as Excel shares them."""
    strings = sorted({value for row in rows for value in row})
    cells = "".join(
        f'<row r="{r}">'
        + "".join(
            f'<c r="{chr(64 + c)}{r}" t="s"><v>{strings.index(value)}</v></c>'
            for c, value in enumerate(row, 1)
            if value
        )
        + "</row>"
        for r, row in enumerate(rows, 1)
    )
    space = 'xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"'
    shared = "".join(f"<si><t>{escape(value)}</t></si>" for value in strings)
    with ZipFile(path, "w") as book:
        book.writestr("xl/sharedStrings.xml", f"<sst {space}>{shared}</sst>")
        book.writestr("xl/worksheets/sheet1.xml", f"<worksheet {space}><sheetData>{cells}</sheetData></worksheet>")


@pytest.fixture
def archive(tmp_path, scene, save, zipped):
    """A zip in the layout of BrEaST with the clinical workbook beside it; the masks are drawn in RGBA."""
    folder = tmp_path / "BrEaST-Lesions_USG-images_and_masks"
    rows = []
    for number in range(1, 31):
        label = ("benign", "malignant", "normal")[number % 3]
        image, mask = scene()
        save(folder / f"case{number:03d}.png", np.dstack([image, image, image, np.full_like(image, 255)]))
        row = ROW | {
            "CaseID": str(number),
            "Image_filename": f"case{number:03d}.png",
            "Mask_tumor_filename": f"case{number:03d}_tumor.png",
            "Classification": label,
        }
        if label == "normal":
            row |= {"Mask_tumor_filename": "", "Shape": "not applicable", "BIRADS": "1"}
        else:
            drawn = np.where(mask, 255, 0).astype(np.uint8)
            save(folder / f"case{number:03d}_tumor.png", np.dstack([drawn] * 4))
        rows.append(row)
    write_xlsx(
        tmp_path / "BrEaST-Lesions-USG-clinical-data-Dec-15-2023.xlsx",
        [list(ROW), *(list(row.values()) for row in rows)],
    )
    return zipped(folder)


def test_archive_and_workbook_become_a_folder(archive, tmp_path):
    out = tmp_path / "breast_lesions_usg"
    script.main(["--archive", str(archive), "--out", str(out), "--sha256", sha256_file(archive)])
    dataset = load_dataset(out, verify=True)
    assert len(dataset.cases) == 30 and set(dataset.card.counts) == {"train", "val", "test"}
    cases = {case.case_id: case for case in dataset.cases}
    assert cases["case001"].prompts["local"] == (
        "Ultrasound of a breast mass, irregular shape, not circumscribed, spiculated and indistinct margin, "
        "hypoechoic, posterior shadowing, calcifications in a mass, skin thickening, BI-RADS 4c."
    )
    assert cases["case001"].prompts["global"] == "Breast ultrasound, heterogeneous predominantly fat tissue."
    assert cases["case002"].prompts["local"] is None  # a normal case has no mass to describe
    cache = ImageCache.load([cases["case001"], cases["case002"]], (60, 80))
    assert cache.masks[0].any() and not cache.masks[1].any()


def test_a_folder_with_a_csv_table_does_as_well(archive, tmp_path):
    folder = tmp_path / "mirror" / "breast_lesions_usg"
    folder.parent.mkdir()
    (tmp_path / "BrEaST-Lesions_USG-images_and_masks").rename(folder)
    rows = [
        ROW | {"CaseID": str(n), "Image_filename": f"case{n:03d}.png", "Mask_tumor_filename": f"case{n:03d}_tumor.png"}
        for n in (1, 4, 7, 10, 13)
    ]
    with open(folder / "clinical.csv", "w", newline="") as file:
        table = csv.DictWriter(file, ROW)
        table.writeheader()
        table.writerows(rows)
    script.main(["--mirror", str(tmp_path / "mirror"), "--out", str(tmp_path / "breast_lesions_usg")])
    assert len(load_dataset(tmp_path / "breast_lesions_usg").cases) == 5


def test_an_archive_without_its_table_says_where_the_table_is(archive, tmp_path):
    (tmp_path / "BrEaST-Lesions-USG-clinical-data-Dec-15-2023.xlsx").unlink()
    with pytest.raises(SystemExit, match="holds no clinical table"):
        script.main(["--archive", str(archive), "--out", str(tmp_path / "o"), "--sha256", sha256_file(archive)])
    assert not (tmp_path / "o").exists()


def test_a_lesion_without_a_mask_is_refused(archive, tmp_path, save):
    save(tmp_path / "BrEaST-Lesions_USG-images_and_masks" / "case001_tumor.png", np.zeros((60, 80), np.uint8))
    folder = tmp_path / "BrEaST-Lesions_USG-images_and_masks"
    with pytest.raises(SystemExit, match=r"case001.png is classified as malignant and its tumour mask says otherwise"):
        script.main(["--archive", str(folder), "--out", str(tmp_path / "breast_lesions_usg")])


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        ("not applicable", ""),
        ("no", ""),
        ("oval", "oval"),
        ("not circumscribed - angular&indistinct", "not circumscribed, angular and indistinct"),
    ],
)
def test_cells_of_the_table_become_words(cell, words):
    assert script.known(cell) == words
