"""What the scripts of the real datasets share: command line, mirrors, archives, tables, splits, last words."""

import argparse
import csv
import io
import re
import sys
import tempfile
import time
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from lib.data import SPLITS, PromptColumn, load_dataset
from lib.files import DataError, extract, fetch, sha256_file
from lib.text import TEMPLATES, render

# Prompt columns that several datasets have, and their words.
WORDS = TEMPLATES["breast_ultrasound"]
CLASS_COLUMN = PromptColumn(role="class", origin="class-oracle", source="the class of the image")
PIXEL_COLUMN = PromptColumn(
    role="global", origin="mask-derived", source="XBusNet's sentence, computed from the mask in pixels"
)
LESION_COLUMN = PromptColumn(
    role="local", origin="mask-derived", source="number, size, shape and place, computed from the mask"
)
MEDCLIPSEG = "MedCLIPSeg (github.com/HealthX-Lab/MedCLIPSeg, 8d7ef36, Apache-2.0; arXiv:2602.20423)"
MEDCLIPSEG_TEXTS = {"local@medclipseg": "text_medclipseg"} | {
    f"local@{variant}": f"text_medclipseg_{variant}"
    for variant in ("contradictory", "missing_location", "overdescriptive", "underdescriptive")
}


def medclipseg_columns(remark: str) -> dict[str, PromptColumn]:
    """The prompt columns of MedCLIPSeg's texts, with a remark on what they tell."""
    return {
        column: PromptColumn(
            role="local",
            origin="mask-derived",
            source=f"{MEDCLIPSEG}, "
            + ("caption" if text == "text_medclipseg" else "altered caption, their test images only")
            + f"; {remark}",
        )
        for column, text in MEDCLIPSEG_TEXTS.items()
    }


MEDCLIPSEG_COLUMNS = medclipseg_columns("names the class too")


def class_prompt(label: str) -> str:
    """The class in words, from benign, malignant or normal."""
    pathologies = {"benign": "benign", "malignant": "malignant", "normal": "no"}
    if label.strip().lower() not in pathologies:
        raise DataError(f"'{label}' is not a class: expected {', '.join(pathologies)}; check the table.")
    return render(WORDS["class@pathology"], pathology=pathologies[label.strip().lower()], histology=None)


@dataclass(frozen=True)
class Download:
    """A file that its publisher offers without an account, with the checksum it must have."""

    url: str
    sha256: str


def run(
    name: str,
    build: Callable[[argparse.Namespace], None],
    description: str,
    where: str,
    downloads: Sequence[Download] = (),
    argv: Sequence[str] | None = None,
) -> None:
    """Parse the command line, build the dataset folder, and say where it is or, in one sentence, what is wrong.

    `where` tells where the archive comes from; with `downloads` there is an option --download.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--mirror", type=Path, help="a mirror folder that holds this dataset, or its parent")
    source.add_argument("--archive", type=Path, help=f"the original archive, or the folder it unpacks to; {where}")
    if downloads:
        source.add_argument("--download", action="store_true", help=f"fetch {downloads[0].url}")
    parser.add_argument("--out", type=Path, default=Path("data") / name, help="default: %(default)s")
    parser.add_argument("--sha256", help="checksum that the archive must have")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder if it exists")
    args = parser.parse_args(argv)
    args.name, args.downloads = name, downloads
    started = time.perf_counter()
    try:
        if args.out.exists() and not args.overwrite:
            raise DataError(f"{args.out} exists already: give --overwrite to make it again.")
        build(args)
        dataset = load_dataset(args.out)
    except (DataError, OSError) as error:
        sys.exit(f"{name}: {error}")
    counts = ", ".join(f"{split} {number}" for split, number in dataset.card.counts.items())
    print(f"{dataset.card.title}: {counts} cases in {args.out} ({time.perf_counter() - started:.0f} s)")


# ---------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------


def grey_image(file: Path | bytes, name: str | Path) -> np.ndarray:
    """Decode an image to grey, [H, W] uint8."""
    return np.asarray(_decoded(file, name).convert("L"))


def colour_image(file: Path | bytes, name: str | Path) -> np.ndarray:
    """Decode an image to colour, [H, W, 3] uint8; a grey one has three equal channels."""
    return np.asarray(_decoded(file, name).convert("RGB"))


def binary_mask(file: Path | bytes, name: str | Path, above: int = 0) -> np.ndarray:
    """Decode a mask to [H, W] bool: whatever is drawn, that is, brighter than `above` and not transparent."""
    image = _decoded(file, name)
    drawn = np.asarray(image.convert("L")) > above
    return drawn & (np.asarray(image.getchannel("A")) > 0) if "A" in image.getbands() else drawn


def _decoded(file: Path | bytes, name: str | Path) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(file) if isinstance(file, bytes) else file)
        image.load()
    except Exception as error:  # every decoder has its own errors for damage, and none names the remedy
        raise DataError(f"{name} cannot be decoded as an image: get it again from its source.") from error
    if image.mode[0] in "IF":
        raise DataError(
            f"{name} has more than 8 bits per pixel (mode {image.mode}), and how to show it as grey is not for this "
            "script to guess: convert it to 8 bits first."
        )
    return image


def find(folder: Path, pattern: str) -> Path:
    """The one file or folder of this name pattern in an unpacked archive."""
    found = sorted(path for path in folder.rglob(pattern) if "__MACOSX" not in path.parts)
    if not found:
        raise DataError(f"{folder} holds no '{pattern}': give the original archive, with its folders as they were.")
    return found[0]


def read_table(path: Path, sheet: int = 1) -> list[dict[str, str]]:
    """Read a CSV file, or a sheet of an Excel workbook, as rows of strings."""
    if path.suffix.lower() == ".xlsx":
        header, *rows = _sheet(path, sheet)
        return [dict(zip(header, row, strict=True)) for row in rows if any(row)]
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            return list(csv.DictReader(file))
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing: give the whole folder or archive.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8.") from error


def _sheet(path: Path, number: int) -> list[list[str]]:
    space = {"s": "http://schemas.openxmlformats.org/spreadsheetml/2006/main"}

    def text(node: ElementTree.Element) -> str:
        return "".join(part.text or "" for part in node.iterfind(".//s:t", space))

    try:
        with zipfile.ZipFile(path) as book:
            shared: list[str] = []
            if "xl/sharedStrings.xml" in book.namelist():
                table = ElementTree.fromstring(book.read("xl/sharedStrings.xml"))
                shared = [text(item) for item in table.iterfind("s:si", space)]
            sheet = ElementTree.fromstring(book.read(f"xl/worksheets/sheet{number}.xml"))
    except (zipfile.BadZipFile, KeyError, ElementTree.ParseError) as error:
        raise DataError(f"{path} cannot be read as an Excel workbook: get it again, or save it as CSV.") from error
    rows = []
    for row in sheet.iterfind(".//s:row", space):
        cells: dict[int, str] = {}
        for cell in row.iterfind("s:c", space):
            column = 0
            for letter in re.match("[A-Z]+", cell.get("r", "A")).group():
                column = column * 26 + ord(letter) - ord("A") + 1
            value = cell.findtext("s:v", "", space)
            kind = cell.get("t")
            cells[column] = shared[int(value)] if kind == "s" else text(cell) if kind == "inlineStr" else value
        rows.append(cells)
    width = max(max(cells, default=0) for cells in rows) if rows else 0
    if not width:
        raise DataError(f"{path} has an empty sheet {number}: get it again.")
    return [[cells.get(column, "").strip() for column in range(1, width + 1)] for cells in rows]


def require(rows: Sequence[dict[str, str]], columns: Sequence[str], path: Path) -> None:
    """Stop if a table lacks rows or columns."""
    if not rows:
        raise DataError(f"{path} has no rows: get it again.")
    for column in columns:
        if column not in rows[0]:
            raise DataError(f"{path} lacks the column '{column}': it is not the table this script was written for.")


class Mirror:
    """A dataset of a mirror: metadata.csv beside image and mask files, or beside zips of them."""

    def __init__(self, path: Path, name: str, columns: Sequence[str]) -> None:
        self.folder = next((p for p in (path / name, path) if (p / "metadata.csv").is_file()), None)
        if self.folder is None:
            raise DataError(f"{path} holds no mirror of '{name}' (a folder with metadata.csv): check --mirror.")
        self.rows = read_table(self.folder / "metadata.csv")
        columns = ("case_id", "patient_id", "split", "image", "mask", "label", *columns)
        require(self.rows, columns, self.folder / "metadata.csv")
        self._zips: dict[str, zipfile.ZipFile] = {}

    def image(self, row: dict[str, str], colour: bool = False) -> np.ndarray:
        """The image of a row, uint8, [H, W] or in colour [H, W, 3]."""
        decode = colour_image if colour else grey_image
        return decode(self._read(row["image"]), self.folder / row["image"])

    def mask(self, row: dict[str, str]) -> np.ndarray:
        """The mask of a row, [H, W] bool."""
        return binary_mask(self._read(row["mask"]), self.folder / row["mask"])

    def _read(self, member: str) -> bytes:
        container, _, entry = member.partition("/")
        try:
            if not container.endswith(".zip"):
                return (self.folder / member).read_bytes()
            if container not in self._zips:
                self._zips[container] = zipfile.ZipFile(self.folder / container)
            return self._zips[container].read(entry)
        except (KeyError, zipfile.BadZipFile, FileNotFoundError) as error:
            raise DataError(
                f"{self.folder / member} is listed in metadata.csv and cannot be read: copy the mirror again."
            ) from error


@contextmanager
def unpacked(args: argparse.Namespace) -> Iterator[tuple[Path, str]]:
    """The original files in a folder, and a sentence for the card on where they came from.

    An archive is verified (against --sha256, or what the script knows) and unpacked to a place that is removed
    afterwards; a folder, also one of a mirror, is taken as it is.
    """
    if args.mirror:
        folder = next((path for path in (args.mirror / args.name, args.mirror) if path.is_dir()), None)
        if folder is None:
            raise DataError(f"Mirror {args.mirror} does not exist: check the path.")
        yield folder, "Built from the unpacked files of a mirror, so the archive's checksum was not seen."
        return
    if getattr(args, "download", False):
        folder = args.out.parent / "downloads"
        paths = [fetch(item.url, item.sha256, folder) for item in args.downloads]
        archive = paths[0]
        origin = f"Downloaded from {args.downloads[0].url} (sha256 {args.downloads[0].sha256})."
    elif args.archive.is_dir():
        yield args.archive, "Built from an archive that the user had unpacked, so its checksum was not seen."
        return
    elif not args.archive.is_file():
        raise DataError(f"Archive {args.archive} does not exist: check the path.")
    else:
        archive, found = args.archive, sha256_file(args.archive)
        expected = args.sha256 or (args.downloads[0].sha256 if args.downloads else found)
        if found != expected.lower():
            raise DataError(
                f"{archive} has the sha256 {found} and not {expected}: get it again, or accept this very file "
                f"with --sha256 {found}."
            )
        origin = f"Built from the file {archive.name} (sha256 {found})."
    print(f"unpacking {archive}")
    with tempfile.TemporaryDirectory(prefix=f"{args.name}-") as place:
        yield extract(archive, Path(place) / "archive"), origin


# ---------------------------------------------------------------------------------------------------------
# Splits
# ---------------------------------------------------------------------------------------------------------


def make_splits(
    patients: Sequence[str],
    strata: Sequence[str],
    shares: Sequence[float] = (0.7, 0.1, 0.2),
    seed: int = 0,
) -> dict[str, str]:
    """Give each patient a split, so that every stratum's images are shared out as asked.

    `patients` and `strata` have one entry per image; a patient belongs to the stratum of his first image.
    """
    images: dict[str, int] = defaultdict(int)
    stratum: dict[str, str] = {}
    for patient, kind in zip(patients, strata, strict=True):
        images[patient] += 1
        stratum.setdefault(patient, kind)
    split: dict[str, str] = {}
    generator = np.random.default_rng(seed)
    for kind in sorted(set(stratum.values())):
        members = sorted(patient for patient in stratum if stratum[patient] == kind)
        wanted = np.array(shares) * sum(images[patient] for patient in members)
        for index in generator.permutation(len(members)):
            emptiest = int(np.argmax(wanted))
            split[members[index]] = SPLITS[emptiest]
            wanted[emptiest] -= images[members[index]]
    return split
