"""A kidney with lesions as a CT would show them: intensities simulated from the attributes of each lesion.

Hounsfield units and mm. What is drawn is what the attributes say, whatever the disease.
"""

from collections.abc import Sequence

import numpy as np
from phantom.parts import ball, ridge, rise, smooth_cube
from scipy.ndimage import binary_dilation, distance_transform_edt, gaussian_filter

from lib.attributes import NO_FEATURES, VOCABULARY, Attributes

EXTENT_MM = 160.0  # edge of the cube that is shown
WINDOW = (-175.0, 250.0)
FAT, SOFT, BONE, PLAIN, ENHANCED = -95.0, 50.0, 260.0, 40.0, 165.0
DENSITY = dict(zip(VOCABULARY["density"], (-90.0, 0.0, 65.0, 0.0), strict=True))  # above the kidney
CLOSE, SHARP, UNEVEN = VOCABULARY["relation"][1], VOCABULARY["surface"][0], VOCABULARY["variation"][1]


def simulate(
    rng: np.random.Generator, kidney: np.ndarray, lesions: Sequence[tuple[np.ndarray, Attributes]], midline: float
) -> np.ndarray:
    """A CT of a kidney with lesions as their attributes say: [D, H, W] float32 in [0, 1].

    lesions: mask and attributes; a value that is not known is simulated as isodense, even, vague and without neighbour.
    """
    size = len(kidney)
    mm = EXTENT_MM / size
    plain = any(said.enhancement == VOCABULARY["enhancement"][0] for _, said in lesions)
    organ = (PLAIN if plain else ENHANCED) + rng.normal(0, 6)
    solid = kidney | np.any([mask for mask, _ in lesions], axis=0)
    level = FAT + 8 * smooth_cube(rng, size, 6)
    away = distance_transform_edt(~solid) * mm
    level = _over(level, SOFT, rise(smooth_cube(rng, size, 5), 1.1, 0.3) * rise(away, 9.0, mm))  # bowel
    level = _spine(level, midline, kidney, mm)
    for mask, said in lesions:
        if said.relation == CLOSE:
            level = _over(level, SOFT + 30, _neighbour(rng, mask, kidney, mm))
    inner = distance_transform_edt(solid) * mm
    parenchyma = organ + 22 * (1 - rise(inner, 6.0, 4.0)) - 8 + 6 * smooth_cube(rng, size, 10)  # a brighter cortex
    level = _over(level, parenchyma, gaussian_filter(kidney.astype(np.float32), 0.5))
    for mask, said in lesions:
        level = _filled(rng, level, mask, said, organ, mm)
    level = level + rng.uniform(9, 16) * rng.standard_normal(level.shape, np.float32)
    return np.clip((level - WINDOW[0]) / (WINDOW[1] - WINDOW[0]), 0, 1).astype(np.float32)


def _over(level: np.ndarray, signal: np.ndarray | float, share: np.ndarray) -> np.ndarray:
    return level + (signal - level) * share


def _spine(level: np.ndarray, midline: float, kidney: np.ndarray, mm: float) -> np.ndarray:
    """Draw the spine and the muscle beside it, so that a side can be told."""
    size = len(level)
    centre = np.argwhere(kidney).mean(0) if kidney.any() else np.full(3, size / 2)
    at = np.arange(size)
    side = np.sign(centre[2] - midline) or 1.0
    rows, columns = at[:, None] * mm, at[None, :] * mm
    for tissue, row, column, radius in (
        (SOFT + 5, centre[1] * mm - 12, midline * mm + side * 36, 17.0),
        (BONE, centre[1] * mm - 14, midline * mm, 21.0),
    ):
        level = _over(level, tissue, (1 - rise(np.hypot(rows - row, columns - column), radius, mm))[None])
    return level


def _neighbour(rng: np.random.Generator, mask: np.ndarray, kidney: np.ndarray, mm: float) -> np.ndarray:
    """The share of each voxel in an organ that lies against a lesion, where that is farthest from the kidney."""
    rim = np.argwhere(binary_dilation(mask) & ~mask & ~kidney)
    if not len(rim):
        return np.zeros(mask.shape)
    far = distance_transform_edt(~kidney)[tuple(rim.T)]
    touch = rim[np.argmax(far + rng.uniform(0, 1, len(far)))]
    way = touch - np.argwhere(mask).mean(0)
    centre = touch + way / max(np.linalg.norm(way), 1e-6) * (20 / mm)
    axes = np.indices(mask.shape).astype(np.float32)
    relative = ball(rng, axes, centre, np.full(3, 27 / mm), 0.0, 0.15)
    return (1 - rise(relative, 1.0, mm / 27)) * ~mask


def _filled(
    rng: np.random.Generator, level: np.ndarray, mask: np.ndarray, said: Attributes, organ: float, mm: float
) -> np.ndarray:
    """Draw a lesion: its density, patches, margin and features."""
    size = len(level)
    inside, outside = distance_transform_edt(mask), distance_transform_edt(~mask)
    depth = np.where(mask, 0.5 - inside, outside - 0.5) * mm  # outwards
    sharp = said.surface == SHARP
    if not sharp:
        depth = depth + 1.2 * smooth_cube(rng, size, 14)
    blur = mm if sharp else mm * np.clip(0.8 * inside.max(), 1.5, 3.5)  # a small lesion keeps a core of its own
    share = 1 - rise(depth, 0, blur)
    signal = organ + DENSITY.get(said.density, 0.0) + np.zeros(level.shape)
    if said.variation == UNEVEN:
        patches = np.tanh(2 * smooth_cube(rng, size, round(EXTENT_MM / 14)))
        signal += 50 * (patches - patches[mask].mean())
    told = said.features or NO_FEATURES
    deep = np.argwhere(inside * mm > 0.6 * inside.max() * mm)
    reach = float(np.clip(0.35 * inside.max() * mm, 1.2 * mm, 9.0))
    for words, signed, number, radius in (("hypodense areas", -80.0, 1, reach), ("hyperdense foci", 110.0, 3, mm)):
        if words in told:
            for spot in deep[rng.integers(len(deep), size=number)]:
                distance = np.linalg.norm(np.moveaxis(np.indices(mask.shape), 0, -1) - spot, axis=-1) * mm
                signal += signed * (1 - rise(distance, radius, mm))
    level = _over(level, signal, share)
    return level - (70 * ridge(depth - 0.6 * mm, 0.5 * mm) if sharp else 30 * ridge(depth - 0.6 * mm, 1.4 * mm))
