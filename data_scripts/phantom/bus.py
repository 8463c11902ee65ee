"""The breast-ultrasound phantom: one or two lesions under speckle, where only the words tell which one is meant."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from common import CLASS_COLUMN, LESION_COLUMN, PIXEL_COLUMN, class_prompt
from mask_words import lesion_sentence, pixel_sentence
from phantom.parts import (
    Phantom,
    check,
    command,
    draw_word,
    grid,
    index_of,
    patient_of,
    ridge,
    rise,
    smooth_field,
    smooth_line,
    write,
)
from scipy.fft import fft, ifft
from scipy.ndimage import gaussian_filter1d

from lib.data import PromptColumn
from lib.text import TEMPLATES, render

# ---------------------------------------------------------------------------------------------------------
# Words
# ---------------------------------------------------------------------------------------------------------

WIDTH_MM = 40.0
TISSUES = ("homogeneous fatty", "homogeneous fibroglandular", "heterogeneous fibroglandular")
SHAPES = ("oval", "round", "irregular")
MARGINS = ("circumscribed", "indistinct", "angular", "microlobulated", "spiculated")
ECHOES = ("anechoic", "hypoechoic", "isoechoic", "hyperechoic", "complex cystic-solid")
POSTERIORS = ("none", "enhancement", "shadowing", "combined")
ORIENTATIONS = ("parallel", "not parallel")
DESCRIPTORS = {
    "shape": SHAPES,
    "margin": MARGINS,
    "echo": ECHOES,
    "posterior": POSTERIORS,
    "orientation": ORIENTATIONS,
}
# How often each word is drawn, by echo pattern: cysts are smooth and enhance, spiculated masses shadow.
MARGIN_ODDS = {
    "anechoic": (0.66, 0.06, 0.06, 0.20, 0.02),
    "hypoechoic": (0.16, 0.16, 0.22, 0.18, 0.28),
    "isoechoic": (0.36, 0.12, 0.18, 0.22, 0.12),
    "hyperechoic": (0.36, 0.20, 0.14, 0.20, 0.10),
    "complex cystic-solid": (0.30, 0.14, 0.18, 0.24, 0.14),
}
SHAPE_ODDS = {
    "circumscribed": (0.60, 0.35, 0.05),
    "indistinct": (0.40, 0.25, 0.35),
    "angular": (0.25, 0.15, 0.60),
    "microlobulated": (0.45, 0.30, 0.25),
    "spiculated": (0.15, 0.15, 0.70),
}
POSTERIOR_ODDS = {
    "anechoic": (0.15, 0.80, 0.02, 0.03),
    "hypoechoic": (0.30, 0.12, 0.50, 0.08),
    "isoechoic": (0.55, 0.20, 0.20, 0.05),
    "hyperechoic": (0.60, 0.10, 0.25, 0.05),
    "complex cystic-solid": (0.20, 0.45, 0.15, 0.20),
}
# Pairs that a glance tells apart, drawn for most of the images with two lesions.
SALIENT_PAIRS = (
    ("anechoic", "hyperechoic"),
    ("hypoechoic", "hyperechoic"),
    ("anechoic", "isoechoic"),
    ("anechoic", "complex cystic-solid"),
    ("hyperechoic", "complex cystic-solid"),
    ("hypoechoic", "complex cystic-solid"),
    ("hypoechoic", "isoechoic"),
)
SALIENT_ODDS = (0.26, 0.26, 0.14, 0.10, 0.12, 0.06, 0.06)
LEADS = (
    "Ultrasound of a breast mass",
    "Breast ultrasound showing a mass",
    "Breast mass",
    "Sonogram of a breast lesion",
)
BUS_PROMPTS = {
    "global": PromptColumn(role="global", origin="template", source="tissue, probe and number of masses drawn"),
    "local": PromptColumn(role="local", origin="template", source="descriptors the named lesion was drawn with"),
    "local@mask": LESION_COLUMN,
    "global@mask": PIXEL_COLUMN,
    "local@other": PromptColumn(role="local", origin="template", source="descriptors the other lesion was drawn with"),
    "class@pathology": CLASS_COLUMN,
} | {
    f"attribute.{name}": PromptColumn(
        role=f"attribute.{name}", origin="metadata", source="descriptor the named lesion was drawn with"
    )
    for name in DESCRIPTORS
}


@dataclass(frozen=True)
class Patient:
    """What the images of one patient share: tissue, probe (MHz), gain and dynamic range (dB)."""

    tissue: str
    probe: int
    gain: float
    dynamic_range: float

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "Patient":
        tissue = TISSUES[rng.choice(3, p=(0.3, 0.35, 0.35))]
        return cls(tissue, int(rng.choice((8, 10, 12, 15))), rng.normal(0, 1.5), rng.uniform(56, 64))


def _describe(rng: np.random.Generator, echo: str) -> dict[str, str]:
    margin = draw_word(rng, MARGINS, MARGIN_ODDS[echo])
    shape = draw_word(rng, SHAPES, SHAPE_ODDS[margin])
    posterior = draw_word(rng, POSTERIORS, POSTERIOR_ODDS[echo])
    # BI-RADS counts a round mass as not parallel; an upright one hints at malignancy.
    upright = {"oval": 0.2, "round": 1.0, "irregular": 0.45}[shape]
    orientation = ORIENTATIONS[int(rng.random() < upright)]
    return dict(shape=shape, margin=margin, echo=echo, posterior=posterior, orientation=orientation)


def _describe_pair(rng: np.random.Generator) -> tuple[dict[str, str], dict[str, str]]:
    """Descriptors of two lesions that differ at least twice, once of it in echo pattern or shape."""
    while True:
        if rng.random() < 0.85:
            echoes = SALIENT_PAIRS[rng.choice(len(SALIENT_PAIRS), p=SALIENT_ODDS)]
        else:
            echoes = (ECHOES[rng.integers(5)],) * 2
        one, two = (_describe(rng, echo) for echo in echoes)
        differ = [name for name in DESCRIPTORS if one[name] != two[name]]
        if len(differ) >= 2 and {"echo", "shape"} & set(differ):
            return (one, two) if rng.random() < 0.5 else (two, one)


def _sentence(rng: np.random.Generator, lesion: dict[str, str], other: dict[str, str] | None) -> str:
    """The local prompt; one in five is worded otherwise and leaves attributes out, never the deciding one."""
    plain = {"none": "no posterior features", "combined": "combined posterior features"}
    said = {name: lesion[name] for name in ("shape", "margin", "echo", "posterior")}
    said["posterior"] = plain.get(lesion["posterior"], f"posterior {lesion['posterior']}")
    reworded = rng.random() < 0.2
    if reworded:
        decides = "echo" if other is None or lesion["echo"] != other["echo"] else "shape"
        for name in rng.permutation([name for name in said if name != decides])[: rng.integers(0, 3)]:
            said[name] = None
    text = render(TEMPLATES["breast_ultrasound"]["local"], **said, birads=None)
    return text.replace(LEADS[0], LEADS[rng.integers(1, 4)]) if reworded else text


def _pathology(rng: np.random.Generator, lesion: dict[str, str]) -> str:
    score = (
        {"oval": -0.8, "round": -0.5, "irregular": 1.0}[lesion["shape"]]
        + {"circumscribed": -1.5, "spiculated": 1.8}.get(lesion["margin"], 0.6)
        + {"anechoic": -2.0, "hypoechoic": 0.5, "complex cystic-solid": 0.3}.get(lesion["echo"], -0.6)
        + {"shadowing": 0.6, "enhancement": -0.4}.get(lesion["posterior"], 0.0)
        + (0.5 if lesion["orientation"] == "not parallel" else 0.0)
    )
    return "malignant" if rng.random() < 1 / (1 + np.exp(-1.5 * score)) else "benign"


# ---------------------------------------------------------------------------------------------------------
# Geometry
# ---------------------------------------------------------------------------------------------------------

COMPOUNDED = 3  # looks from different angles that a scanner averages to calm the speckle
ANGLES = np.linspace(-np.pi, np.pi, 1441)


def _outline(rng: np.random.Generator, lesion: dict[str, str]) -> tuple[np.ndarray, np.ndarray]:
    """Outline of a lesion of unit area: its radius, and the strength of its spicules, over ANGLES."""
    aspect = rng.uniform(1.45, 2.0) if lesion["shape"] == "oval" else rng.uniform(1.25, 1.7)
    if lesion["shape"] == "round":
        aspect = rng.uniform(0.93, 1.07)
    tilt = rng.normal(0, 0.15) + (np.pi / 2 if lesion["orientation"] == "not parallel" else 0)
    radius = 1 / np.sqrt(np.cos(ANGLES) ** 2 / aspect + np.sin(ANGLES) ** 2 * aspect)
    if lesion["shape"] == "irregular":
        for wave in (2, 3, 4, 5):
            radius *= 1 + rng.normal(0, 0.26 / wave**0.7) * np.cos(wave * ANGLES + rng.uniform(0, 2 * np.pi))
        radius = np.clip(radius, 0.6, 1.6)
    spicules = np.zeros_like(ANGLES)
    if lesion["margin"] == "microlobulated":
        lobes, start = rng.integers(9, 13), rng.uniform(0, np.pi)
        radius *= 0.9 + 0.22 * np.abs(np.cos(lobes / 2 * ANGLES + start))
    elif lesion["margin"] == "angular":
        corners = rng.integers(5, 7)
        at = np.arange(corners) + rng.uniform(-0.25, 0.25, corners)
        corner = np.sort(at * 2 * np.pi / corners % (2 * np.pi)) - np.pi
        corner_radius = np.clip(np.interp(corner, ANGLES, radius), 0.8, 1.3) * rng.uniform(0.9, 1.15, corners)
        radius = _polygon(corner, corner_radius)
    elif lesion["margin"] == "spiculated":
        number = rng.integers(9, 14)
        at = (np.arange(number) + rng.uniform(-0.3, 0.3, number)) * 2 * np.pi / number
        gap = (ANGLES[:, None] - at + np.pi) % (2 * np.pi) - np.pi
        spikes = np.exp(-0.5 * (gap / 0.10) ** 2) * rng.uniform(0.5, 1.0, number)
        spicules = spikes.max(axis=1)
        radius *= 0.88 + 0.34 * spicules
    area = np.trapezoid(radius**2 / 2, ANGLES)
    # np.interp has a period of its own, but sorts for it.
    turned = (ANGLES - tilt + np.pi) % (2 * np.pi) - np.pi
    return np.interp(turned, ANGLES, radius) / np.sqrt(area), np.interp(turned, ANGLES, spicules)


def _polygon(corner: np.ndarray, corner_radius: np.ndarray) -> np.ndarray:
    """Radius over ANGLES of the polygon through the given corners."""
    after = np.searchsorted(corner, ANGLES) % len(corner)
    a, b = corner[after - 1], corner[after]
    ra, rb = corner_radius[after - 1], corner_radius[after]
    height = ra * np.sin((ANGLES - a) % (2 * np.pi)) + rb * np.sin((b - ANGLES) % (2 * np.pi))
    return ra * rb * np.sin((b - a) % (2 * np.pi)) / height


@dataclass(frozen=True)
class Lesion:
    """A placed lesion: its words, and per pixel its relative radius (1 on the outline), angle, spicules."""

    words: dict[str, str]
    centre: tuple[float, float]
    reach: float  # mean radius as a fraction of the image width
    relative: np.ndarray
    angle: np.ndarray
    spicules: np.ndarray

    @property
    def mask(self) -> np.ndarray:
        return self.relative < 1


def _place(
    rng: np.random.Generator, size: int, words: dict[str, str], left: float, right: float, largest: float
) -> Lesion:
    """Put a lesion of mean diameter up to `largest` between `left` and `right`, in image widths."""
    down, across = grid(size)
    diameter = rng.uniform(0.17, largest)
    radius, spicules = _outline(rng, words)
    x, y = np.cos(ANGLES) * radius, np.sin(ANGLES) * radius
    scale = np.sqrt(np.pi) / 2 * diameter  # unit area -> area of a disc of this diameter
    scale = min(scale, min(right - left, 0.35) / np.ptp(x), 0.42 / np.ptp(y))
    x_low, x_high = left - x.min() * scale, right - x.max() * scale
    y_low, y_high = 0.16 - y.min() * scale, 0.74 - y.max() * scale
    centre = (rng.uniform(y_low, y_high), rng.uniform(x_low, max(x_low, x_high)))
    dy, dx = down - centre[0], across - centre[1]
    angle = np.arctan2(dy, dx)
    step = np.rint((angle + np.pi) * ((len(ANGLES) - 1) / (2 * np.pi))).astype(np.int32)
    relative = np.sqrt(dx * dx + dy * dy) / (radius * scale).astype(np.float32).take(step)
    reach = float(scale / np.sqrt(np.pi))
    return Lesion(words, centre, reach, relative, angle, spicules.astype(np.float32).take(step))


# ---------------------------------------------------------------------------------------------------------
# Acoustics. Echo levels and gains are in dB; 0 dB is white on the screen.
# ---------------------------------------------------------------------------------------------------------


def speckle(rng: np.random.Generator, amplitude: np.ndarray, probe: float = 12.0) -> np.ndarray:
    """Envelope of fully developed speckle over a map of echo amplitudes [S, S], before log compression.

    Complex Gaussian scatterers under a point spread function that is short along the beam, wider across it,
    and widest away from the focus at 45 % depth; its width in mm falls with the probe frequency in MHz.
    """
    return np.sqrt(_speckle_power(rng, amplitude, probe, looks=1))


def _speckle_power(rng: np.random.Generator, amplitude: np.ndarray, probe: float, looks: int) -> np.ndarray:
    """Mean power of speckle over several looks from different angles."""
    size, pad = len(amplitude), len(amplitude) // 16
    axial, gain, lateral = _point_spread(size, size + 2 * pad, probe)
    wide = np.pad(amplitude.astype(np.float32, copy=False), ((0, 0), (pad, pad)), mode="edge")
    reach = len(axial) // 2
    noise = np.zeros((size + 2 * reach, *wide.shape[1:], 2), np.float32)
    power = np.zeros_like(amplitude, np.float32)
    for _ in range(looks):
        scatterers = rng.standard_normal(out=noise[reach:-reach], dtype=np.float32)
        scatterers *= wide[..., None]
        # Shifts and sums, as the last bits of a matrix product depend on the number of threads.
        field = noise[:size] * axial[0]
        for row, weight in enumerate(axial[1:], start=1):
            field += noise[row : row + size] * weight
        field = (field * gain).view(np.complex64)[..., 0]
        field = ifft(fft(field, axis=1, overwrite_x=True) * lateral, axis=1, overwrite_x=True)[:, pad:-pad]
        power += field.real**2 + field.imag**2
    return power / looks


@cache
def _point_spread(size: int, columns: int, probe: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Axial weights, the gain per depth [S, 1, 1] and lateral transfer function [S, columns] that give unit power."""
    mm = WIDTH_MM / size
    spread = max(0.19 * 12 / probe / mm, 0.4)
    reach = int(np.ceil(5 * spread))
    axial = np.exp(-0.5 * (np.arange(-reach, reach + 1) / spread) ** 2)
    power = np.convolve(np.ones(size), axial**2, mode="same")[:, None]
    gain = 1 / np.sqrt(2 * power)[..., None]  # half the power each for real and imaginary
    width = np.maximum((0.32 + np.abs(grid(size)[0] - 0.45) ** 1.5) * 12 / probe / mm, 0.4)
    lateral = np.exp(-2 * (np.pi * np.fft.fftfreq(columns) * width) ** 2)
    lateral /= np.sqrt(np.mean(lateral**2, axis=1, keepdims=True))
    return axial.astype(np.float32), gain.astype(np.float32), lateral.astype(np.float32)


def _strands(rng: np.random.Generator, size: int, down: int, across: int, width: float) -> np.ndarray:
    """Thin curved septa, bright where they face the probe: the zero lines of a smooth field."""
    field = smooth_field(rng, size, down, across)
    along, sideways = np.gradient(field, 1 / size)
    slope = np.sqrt(along**2 + sideways**2) + 1e-3
    facing = (along / slope) ** 2
    patchy = np.clip(0.55 + 0.6 * smooth_field(rng, size, 6, 6), 0, 1.3)
    return ridge(field / slope, width) * (0.15 + 0.85 * facing) * patchy


def _tissue(rng: np.random.Generator, size: int, tissue: str) -> np.ndarray:
    """Echo level of the layers from skin to chest wall."""
    depth, _ = grid(size)
    fatty, mixed = tissue == TISSUES[0], tissue == TISSUES[2]
    skin = 0.05 + 0.004 * smooth_line(rng, size, 2)
    top = rng.uniform(0.30, 0.42) if fatty else rng.uniform(0.13, 0.22)
    top = np.maximum(top + 0.035 * smooth_line(rng, size, 4), skin + 0.02)
    bottom = rng.uniform(0.52, 0.64) if fatty else rng.uniform(0.66, 0.80)
    bottom = bottom + 0.025 * smooth_line(rng, size, 3)
    wall = bottom + rng.uniform(0.12, 0.2) + 0.02 * smooth_line(rng, size, 2)

    fat = -35 + 1.5 * smooth_field(rng, size, 9, 7) + 1.2 * smooth_field(rng, size, 40, 16)
    gland = -25 + 2.5 * smooth_field(rng, size, 10, 7) + 3.0 * smooth_field(rng, size, 40, 13)
    if fatty:
        gland -= 7
    if mixed:
        gland -= 9 * rise(smooth_field(rng, size, 8, 6), 0.45, 0.5)
    muscle = -35 + 4.5 * smooth_field(rng, size, 44, 5)
    level = fat + (gland - fat) * rise(depth, top, 0.02)
    level += (muscle - level) * rise(depth, bottom, 0.02)
    level += (-42 + 3 * smooth_field(rng, size, 24, 6) - level) * rise(depth, wall, 0.03)

    septa = 19 * _strands(rng, size, 8, 4, 0.0065) + 14 * _strands(rng, size, 18, 6, 0.005)
    level += septa * (1 - 0.4 * rise(depth, top, 0.02) * (not fatty))
    patchy = np.clip(0.6 + 0.5 * smooth_line(rng, size, 7), 0, 1.2)
    level += (9 * ridge(depth - top, 0.006) + 12 * ridge(depth - bottom, 0.007)) * patchy
    level += 16 * ridge(depth - wall, 0.009) * np.clip(0.3 + smooth_line(rng, size, 3), 0, 1.2)

    within_skin = 1 - rise(depth, skin, 0.012)
    level += (-24 - level) * within_skin
    return level + 12 * ridge(depth - skin, 0.007) + 14 * ridge(depth - 0.004, 0.008)


def _insert(rng: np.random.Generator, level: np.ndarray, lesion: Lesion) -> np.ndarray:
    """Echo level with a lesion drawn in: its echo pattern, margin, capsule, halo and spicules."""
    size, words, relative = len(level), lesion.words, lesion.relative
    outside = np.maximum(relative - 1, 0)
    facing = np.abs(np.sin(lesion.angle))
    fine = smooth_field(rng, size, 26, 20)
    if words["echo"] == "anechoic":
        # Reverberation makes the near wall of a cyst look hazy.
        inner = -68 + 14 * np.clip(relative - 0.55, 0, 1) * (lesion.angle < 0)
    elif words["echo"] == "complex cystic-solid":
        down, across = grid(size)
        toward = rng.uniform(0, 2 * np.pi)
        side = np.sin(toward) * (down - lesion.centre[0]) + np.cos(toward) * (across - lesion.centre[1])
        side = side / lesion.reach + 0.2 * smooth_field(rng, size, 14, 14)
        around = level[lesion.mask].mean()
        solid = around + (8 if around < -30 else -11) + 2.5 * fine
        inner = -66 + (solid + 66) * rise(side, rng.uniform(0.1, 0.4), 0.12)
        inner = inner + 26 * ridge(side + 0.5, 0.07) * (side < 0)
        inner = inner + (-12 - inner) * ridge((relative - 0.94) * lesion.reach, max(0.010, 0.8 / size))
    else:
        inner = {"hypoechoic": -47, "isoechoic": -33, "hyperechoic": -11}[words["echo"]] + 2 * fine

    blurred = words["margin"] == "indistinct"
    width = 0.5 if blurred else 1.0 / (lesion.reach * size)
    if words["margin"] in ("indistinct", "spiculated"):
        level = level + 5 * np.exp(-outside / 0.22) * (outside > 0)
    if words["echo"] == "isoechoic":
        level = level - 9 * np.exp(-outside / 0.15) * (outside > 0)
    if words["margin"] == "spiculated":
        level = level + (18 * lesion.spicules - 6) * np.exp(-outside / 0.65) * (outside > 0)
    level = level + (inner - level) * (1 - rise(relative, 1.0, width))
    if words["echo"] == "isoechoic":
        # As bright as fat, so only its outline sets it off: a thin dark ring inside the wall.
        level = level - 8 * ridge((relative - 0.95) * lesion.reach, 0.009)
    if words["margin"] == "circumscribed":
        level = level + 10 * ridge((relative - 1.03) * lesion.reach, 0.006) * (0.25 + 0.75 * facing)
    return level


def _shear(values: np.ndarray, slope: float) -> np.ndarray:
    """Shift row r by slope · r columns, so that beams steered by `slope` become columns (-slope: back)."""
    if not slope:
        return values
    low, part = _sheared(*values.shape, slope)
    return values.take(low) * (1 - part) + values.take(low + 1) * part


@cache
def _sheared(rows: int, columns: int, slope: float) -> tuple[np.ndarray, np.ndarray]:
    """Where the shifted values come from: flat index of the left neighbour, and the right one's share."""
    at = np.clip(np.arange(columns) + slope * np.arange(rows)[:, None], 0, columns - 1.001)
    low = at.astype(np.intp)
    return low + columns * np.arange(rows)[:, None], (at - low).astype(np.float32)


def _posterior(rng: np.random.Generator, lesion: Lesion, slope: float) -> np.ndarray:
    """Gain along the beams that passed the lesion: shadow, enhancement, both, and shadows off its edges."""
    size = len(lesion.relative)
    pad = size // 8  # no lesion leaves the frame when the beams are straightened
    wide = np.pad(lesion.mask.astype(np.float32), ((0, 0), (pad, pad)))
    beams = np.cumsum(_shear(wide, slope), axis=0)
    across = np.arange(beams.shape[1])
    thickest = beams.max()
    # The echo pattern stays readable: most of the effect sets in near the far wall.
    passed = np.sqrt(beams[-1] / thickest) * (beams / np.maximum(beams[-1], 1)) ** 3
    passed = gaussian_filter1d(passed, size * 0.017, axis=1)
    strength = {
        "none": 0.0,
        "enhancement": rng.uniform(8, 11),
        "shadowing": -rng.uniform(15, 22),
        "combined": 0.0,
    }[lesion.words["posterior"]]
    gain = strength * passed
    if lesion.words["posterior"] == "combined":
        columns = np.flatnonzero(beams[-1] > 0)
        turn = (across - columns.mean()) / (np.ptp(columns) + 1) * rng.choice((-1, 1))
        gain = passed * (-18 + 28 * rise(turn, 0, 0.4))
    if lesion.words["margin"] == "circumscribed":
        columns = np.flatnonzero(beams[-1] > 0.25 * thickest)
        below = rise(grid(size)[0], lesion.centre[0] + 0.3 * lesion.reach, 0.08)
        edges = sum(ridge((across - c) / size, 0.009) for c in (columns[0], columns[-1]))
        gain = gain - rng.uniform(4, 8) * below * edges
    return _shear(gain, -slope)[:, pad:-pad]


def _burn_calipers(image: np.ndarray, lesion: Lesion) -> None:
    """Draw the two crosses and the dotted line with which a sonographer measured the lesion's width."""
    size = len(image)
    rows, columns = np.nonzero(lesion.mask)
    row, arm = int(rows[np.argmax(columns)]), max(1, size // 64)
    ends = int(columns.min()), int(columns.max())
    image[row, ends[0] : ends[1] : max(3, size // 32)] = 0.8
    for column in ends:
        image[max(row - arm, 0) : row + arm + 1, column] = 0.95
        image[row, max(column - arm, 0) : column + arm + 1] = 0.95


def _render(rng: np.random.Generator, size: int, patient: Patient, lesions: list[Lesion]) -> np.ndarray:
    depth, _ = grid(size)
    level = _tissue(rng, size, patient.tissue)
    slope = float(rng.choice((-0.1, 0.0, 0.0, 0.1)))
    # Time-gain compensation never fits the tissue exactly: deep echoes fade, more so at high frequency.
    gain = 3 - rng.uniform(2, 12) * patient.probe / 12 * depth**1.5 + 1.2 * smooth_field(rng, size, 4, 1)
    gain = gain + 1.5 * smooth_line(rng, size, 4)
    for lesion in lesions:
        level = _insert(rng, level, lesion)
        gain = gain + _posterior(rng, lesion, slope)
    amplitude = 10 ** ((level + gain) / 20)
    power = _speckle_power(rng, amplitude, patient.probe, COMPOUNDED)
    noise = 10 ** (-60 / 10) * rng.standard_exponential((size, size), dtype=np.float32)
    decibel = 10 * np.log10(power + noise) + patient.gain
    image = np.clip(1 + decibel / patient.dynamic_range, 0, 1)
    image = gaussian_filter1d(gaussian_filter1d(image, 0.45, axis=0), 0.55, axis=1).astype(np.float32)
    if lesions and rng.random() < 0.08:
        # Any lesion may carry them, so they do not tell which one is named.
        _burn_calipers(image, lesions[rng.integers(len(lesions))])
    return image


# ---------------------------------------------------------------------------------------------------------
# Cases
# ---------------------------------------------------------------------------------------------------------


def breast_ultrasound(
    rng: np.random.Generator,
    size: int = 128,
    *,
    ambiguous: float = 0.7,
    text_share: float = 0.8,
    patient: Patient | None = None,
) -> Phantom:
    """Draw one breast ultrasound image in which, where it holds two lesions, only the local prompt names one.

    ambiguous: share with two lesions among the cases that have a local prompt (without it there would be no
    right answer, so those have one lesion at most); text_share: share with a local, and independently with a
    global, prompt; patient: shared tissue and probe, drawn when None. Raises ValueError for bad parameters.
    """
    _check(size=size, ambiguous=ambiguous, text_share=text_share)
    patient = patient or Patient.draw(rng)
    chance = rng.random(4)
    has_global, has_local = chance[:2] < text_share
    lesion_count = 0 if chance[2] < 0.05 else 2 if has_local and chance[3] < ambiguous else 1
    alone = (_describe(rng, ECHOES[rng.integers(5)]),) * (lesion_count == 1)
    words = _describe_pair(rng) if lesion_count == 2 else alone
    lesions = _lesions(rng, size, words)
    image = _render(rng, size, patient, lesions)

    empty = np.zeros((size, size), np.uint8)
    mask, distractor = (*(lesion.mask.astype(np.uint8) for lesion in lesions), empty, empty)[:2]
    masses = ("no mass", "one mass", "two masses")[lesion_count]
    probe = f"{patient.probe} MHz"
    prompts: dict[str, str | None] = dict.fromkeys(BUS_PROMPTS)
    if has_global:
        prompts["global"] = f"Breast ultrasound, {patient.tissue} tissue, {probe} linear probe, {masses}."
    descriptors = {"tissue": patient.tissue, "probe": probe, "masses": masses, "other": {}}
    if lesions:
        named, other = words[0], words[1] if lesion_count == 2 else None
        if has_local:
            prompts |= {"local": _sentence(rng, named, other), "local@mask": lesion_sentence(mask)}
        if has_global:
            prompts["global@mask"] = pixel_sentence(mask)
        if other:
            prompts["local@other"] = _sentence(rng, other, named)
        prompts |= {f"attribute.{name}": word for name, word in named.items()}
        descriptors |= named | {"pathology": _pathology(rng, named), "other": other or {}}
    prompts["class@pathology"] = class_prompt(descriptors.get("pathology", "normal"))
    return Phantom(image, mask, distractor, descriptors, prompts, (WIDTH_MM / size,) * 2)


def _lesions(rng: np.random.Generator, size: int, words: tuple[dict[str, str], ...]) -> list[Lesion]:
    if len(words) < 2:
        return [_place(rng, size, word, 0.05, 0.95, largest=0.36) for word in words]
    # Side by side, so that neither lies in the other's shadow; which side is named is a coin toss.
    middle = rng.uniform(0.44, 0.56)
    sides = [(0.04, middle - 0.03), (middle + 0.03, 0.96)]
    if rng.random() < 0.5:
        sides.reverse()
    return [_place(rng, size, word, *side, largest=0.28) for word, side in zip(words, sides, strict=True)]


def regenerate(
    case_id: str, seed: int = 0, size: int = 128, *, ambiguous: float = 0.7, text_share: float = 0.8
) -> Phantom:
    """Draw one case of a breast-ultrasound dataset again, its distractor mask included, without the rest.

    The arguments are those the dataset was written with; raises ValueError for another kind of case id.
    """
    index = index_of(case_id, "bus")
    patient = Patient.draw(np.random.default_rng([seed, 3, *patient_of(seed, index)]))
    rng = np.random.default_rng([seed, 4, index])
    return breast_ultrasound(rng, size, ambiguous=ambiguous, text_share=text_share, patient=patient)


def write_bus(
    out: Path,
    *,
    n: int = 1000,
    size: int = 128,
    seed: int = 0,
    ambiguous: float = 0.7,
    text_share: float = 0.8,
    splits: tuple[float, ...] = (0.6, 0.15, 0.25),
    overwrite: bool = False,
) -> None:
    """Write a dataset folder of breast-ultrasound phantoms; raises ValueError for parameters out of range."""
    _check(size=size, ambiguous=ambiguous, text_share=text_share, n=n, seed=seed)
    card = {
        "title": "Breast-ultrasound phantom",
        "modality": "ultrasound",
        "classes": {"lesion": 1},
        "source": command(
            "bus", out, n=n, size=size, seed=seed, ambiguous=ambiguous, text_share=text_share, splits=splits
        ),
        "prompts": BUS_PROMPTS,
        "notes": [
            "Two lesions in the share `ambiguous` of the cases with a local prompt: the mask is the named "
            "one, local@other describes the other, whose mask regenerate() in the script draws again.",
            "Cases without a local prompt are never ambiguous: they hold one lesion at most.",
            "local and global are missing at random, independently; their @mask columns where they are.",
            "About 5 % of the cases hold no lesion: empty mask, no local prompt.",
        ],
    }

    def draw(index: int) -> dict[str, Phantom]:
        case_id = f"bus_{index:05d}"
        return {case_id: regenerate(case_id, seed, size, ambiguous=ambiguous, text_share=text_share)}

    write(out, card, draw, n=n, seed=seed, splits=splits, overwrite=overwrite)


def _check(*, size: int, ambiguous: float, text_share: float, n: int = 10, seed: int = 0) -> None:
    check(size=size, smallest=48, shares={"ambiguous": ambiguous, "text_share": text_share}, n=n, seed=seed)
