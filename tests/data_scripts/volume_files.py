"""Small NIfTI files as the releases have them, for the tests of the scripts of volumes."""

import struct
from pathlib import Path

import nibabel
import numpy as np


def save_nifti(path: Path, array: np.ndarray, spacing=(1.0, 1.0, 1.0), axes: str = "RAS", shift=(0, 0, 0)) -> Path:
    """Save [D, H, W] (slices up, rows to the front, columns to the right) as a file whose axes go elsewhere.

    A fourth axis is time; spacing is in array order; shift moves the file by mm to the right, the front and the head.
    """
    place = np.diag([*spacing[::-1], 1.0])
    place[:3, 3] = shift
    volume = array.transpose(2, 1, 0, *range(3, array.ndim))
    turn = nibabel.orientations.ornt_transform(
        nibabel.orientations.axcodes2ornt("RAS"), nibabel.orientations.axcodes2ornt(axes)
    )
    volume, affine = (
        nibabel.orientations.apply_orientation(volume, turn),
        place @ nibabel.orientations.inv_ornt_aff(turn, volume.shape[:3]),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(volume, affine), path)
    return path


def patch_header(path: Path, offset: int, form: str, *values: float) -> Path:
    """Write into the header of an uncompressed file what nibabel would not."""
    content = bytearray(path.read_bytes())
    struct.pack_into("<" + form, content, offset, *values)
    path.write_bytes(content)
    return path


def scan(values: dict[int, int] | tuple[int, ...] = (1,), shape=(6, 7, 8), modality: str = "MR", seed: int = 0):
    """A noisy volume and its labels: each value in a row of its own, brighter than the last."""
    rng = np.random.default_rng(seed)
    labels = np.zeros(shape, np.int16)
    for row, value in enumerate(values):
        labels[1 + row // (shape[1] - 2) * 2, 1 + row % (shape[1] - 2), 2:5] = value
    low, high = {"CT": (-200, 300), "MR": (1, 900), "PET": (0, 12)}[modality]
    image = rng.uniform(low, high, shape).astype(np.float32)
    return image, labels
