"""Scripts find their shared modules beside them when they are run; tests find them the same way."""

import csv
import os
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "data_scripts"))


@pytest.fixture(scope="session")
def mirrors() -> Path:
    """The folder of mirrored real datasets."""
    folder = Path(os.environ.get("MIRROR_DIR", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"There are no mirrored datasets at {folder}: set MIRROR_DIR to have them tested.")
    return folder


@pytest.fixture
def part_of_mirror(mirrors, tmp_path):
    """A function that copies chosen rows of a mirrored dataset, files and all, to a mirror of their own."""
    from common import Mirror

    def copy(name: str, choose) -> Path:
        full, small = Mirror(mirrors, name, ()), tmp_path / "mirror" / name
        rows = [row for row in full.rows if choose(row)]
        for row in rows:
            for kind in ("image", "mask"):
                content, row[kind] = full._read(row[kind]), row[kind].replace(".zip", "")
                (small / row[kind]).parent.mkdir(parents=True, exist_ok=True)
                (small / row[kind]).write_bytes(content)
        with open(small / "metadata.csv", "w", newline="") as file:
            table = csv.DictWriter(file, rows[0])
            table.writeheader()
            table.writerows(rows)
        return small

    return copy


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def scene(rng):
    """A function that draws a speckled image, unlike all others, and the mask of a dark disc in it."""

    def draw(height: int = 60, width: int = 80, empty: bool = False) -> tuple[np.ndarray, np.ndarray]:
        rows, columns = np.mgrid[:height, :width]
        centre = rng.uniform(0.3, 0.7, 2) * (height, width)
        mask = np.hypot(rows - centre[0], columns - centre[1]) < rng.uniform(6, 14)
        blocks = rng.integers(20, 235, (height // 10, width // 10)).repeat(10, 0).repeat(10, 1)
        image = blocks + rng.integers(-15, 15, mask.shape)
        image[mask] //= 3
        return image.astype(np.uint8), mask & (not empty)

    return draw


@pytest.fixture
def save():
    """A function that saves an array as an image file, making its folder."""

    def write(path: Path, array: np.ndarray) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path)

    return write


@pytest.fixture
def zipped():
    """A function that zips a folder, with the folder's own name on top."""

    def pack(folder: Path) -> Path:
        archive = folder.with_suffix(".zip")
        with zipfile.ZipFile(archive, "w") as z:
            for path in sorted(folder.rglob("*")):
                z.write(path, path.relative_to(folder.parent))
        return archive

    return pack
