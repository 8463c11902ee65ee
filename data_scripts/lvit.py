"""The layout in which LViT's authors distribute images with captions, shared by QaTa-COV19 and MosMedData+."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from common import read_table

from lib.data import PromptColumn
from lib.files import DataError

SOURCE = "LViT (github.com/HUANGLIZI/LViT, Li Z et al., IEEE TMI 2023)"
CAPTIONS = f"captions of {SOURCE}: tables with the columns Image and Description"
REPORT = PromptColumn(
    role="report",
    origin="mask-derived",
    source=f"{SOURCE}: side, zone and number of the infected areas, written with the mask at hand",
)
IMAGES = ("images", "image", "img", "frames")
MASKS = ("ground-truths", "gts", "gt", "labelcol", "labels", "masks")


@dataclass(frozen=True)
class Captioned:
    """One image with its mask and caption, in the split of its caption's table."""

    case_id: str
    split: str
    image: Path
    mask: Path
    text: str


def captioned(folder: Path) -> list[Captioned]:
    """Every captioned image under a folder, by case id; raises DataError where image, mask or split is missing.

    Captions stand in tables named like Train_text.xlsx, or in a folder named like Train_Folder; images in folders
    named img, Images or frames, masks in labelcol, Ground-truths, GTs or masks, there with or without `mask_`.
    """
    images, masks = _files(folder, IMAGES), _files(folder, MASKS)
    found: dict[str, Captioned] = {}
    for table in sorted((*folder.rglob("*.xlsx"), *folder.rglob("*.csv"))):
        rows = [] if table.name.startswith(("~", "._")) else read_table(table)
        if not rows or not {"Image", "Description"} <= rows[0].keys():
            continue
        split = _split(table, folder)
        for row in rows:
            name = _name(Path(row["Image"]))
            if name in found:
                raise DataError(f"{table} describes '{row['Image']}' a second time: keep one table for each split.")
            if name not in images or name not in masks:
                missing = "image" if name not in images else "mask"
                raise DataError(f"{table} describes '{row['Image']}', of which there is no {missing} in {folder}.")
            text = " ".join(row["Description"].split())
            found[name] = Captioned(images[name].stem.lower(), split, images[name], masks[name], text)
    if not found:
        raise DataError(f"{folder} holds no {CAPTIONS}: get them from LViT's page and put them beside the images.")
    return [found[name] for name in sorted(found)]


def _name(path: Path) -> str:
    return path.stem.lower().removeprefix("mask_")


def _files(folder: Path, parents: tuple[str, ...]) -> dict[str, Path]:
    pictures = (p for ending in ("png", "jpg", "jpeg") for p in folder.rglob(f"*.{ending}"))
    return {_name(p): p for p in sorted(pictures) if p.parent.name.lower() in parents}


def _split(table: Path, folder: Path) -> str:
    for part in _upwards(table, folder):
        for split in ("train", "val", "test"):
            if part.lower().startswith(split):
                return split
    raise DataError(f"{table} does not tell its split: name it Train_text, Val_text or Test_text.")


def _upwards(path: Path, folder: Path) -> Iterator[str]:
    while path != folder:
        yield path.name
        path = path.parent
