"""The torso phantom: one drawn anatomy as CT, MR and PET would show it, with organs that share looks but not places.

Axes are slices from the feet to the head, rows from back to front, and columns from the patient's left to the right.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from phantom.parts import (
    Volume,
    ball,
    check,
    command,
    index_of,
    ridge,
    rise,
    smooth_cube,
    write_volumes,
)
from scipy.ndimage import distance_transform_edt, gaussian_filter
from volume_words import COLUMNS, volume_prompts

# ---------------------------------------------------------------------------------------------------------
# Words
# ---------------------------------------------------------------------------------------------------------

EXTENT_MM = 192.0  # edge of the cube that is shown
REGION = "abdomen"
STRUCTURES = {  # class -> another name, and a request in free words; the released spelling runs the words together
    "liver": ("hepatic parenchyma", "Please show me the big organ under the right diaphragm, the liver."),
    "spleen": ("lien", "Can you outline the spleen, up on the left behind the stomach?"),
    "right_kidney": ("dextral renal organ", "I need the kidney that lies on the patient's right, below the liver."),
    "left_kidney": ("sinistral renal organ", "Mark the kidney on the patient's left side for me."),
    "aorta": ("descending aorta", "Where does the aorta run in front of the spine?"),
    "bladder": ("vesica urinaria", "Find the urinary bladder low in the pelvis."),
    "tumor": ("neoplasm", "Is there a tumor anywhere, and if so, which voxels belong to it?"),
}


def words(name: str) -> str:
    """The plain words of a class."""
    return name.replace("_", " ")


# ---------------------------------------------------------------------------------------------------------
# Anatomy. Lengths in edges of the cube where the body's scale is 1.
# ---------------------------------------------------------------------------------------------------------

HOSTS = {"liver": (0.07, 0.12), "right_kidney": (0.055, 0.075), "left_kidney": (0.055, 0.075)}  # radii of tumours
HOST_ODDS = (0.6, 0.2, 0.2)


@dataclass(frozen=True)
class Anatomy:
    """What there is and where, before any scanner has looked at it.

    layers: (tissue, [D, H, W] share of each voxel), later ones in front of earlier ones; masks: class -> [D, H, W]
    bool, no two of which overlap; host: where the tumour grows; texture: 0 is an even tumour, 1 a decayed one.
    """

    layers: list[tuple[str, np.ndarray]]
    masks: dict[str, np.ndarray]
    host: str | None
    texture: float


class Body:
    """The frame of one patient's body in the cube, to which tissues are added, each in front of those before."""

    def __init__(self, rng: np.random.Generator, size: int) -> None:
        self.rng, self.size = rng, size
        self.scale = rng.uniform(0.88, 1.06)
        shift = rng.normal(0, (0.035, 0.025, 0.03))
        girth = 1, *rng.uniform(0.93, 1.05, 2)
        axis = ((np.arange(size) + 0.5) / size - 0.5).astype(np.float32)
        self.at = tuple(
            (axis.reshape(np.roll((size, 1, 1), turn)) - np.float32(shift[turn])) / np.float32(self.scale * girth[turn])
            + np.float32(0.5)
            + np.float32(0.015) * smooth_cube(rng, size, 3)
            for turn in range(3)
        )
        self.layers: list[tuple[str, np.ndarray]] = []
        self.labels = np.zeros((size,) * 3, np.uint8)  # number of the layer in front, from 1

    def solid(self, relative: np.ndarray, radius: float, edge: float = 1.0) -> np.ndarray:
        """The share of each voxel within a relative radius, with a border as wide as a voxel."""
        return 1 - rise(relative, edge, 1 / (self.size * self.scale * radius))

    def ball(self, centre: np.ndarray, radii: np.ndarray, lean: float = 0.0, uneven: float = 0.1) -> np.ndarray:
        """The share of each voxel in a round solid."""
        return self.solid(ball(self.rng, self.at, centre, radii, lean, uneven), float(np.mean(radii)))

    def tube(self, row: float, column: float, radius: float, low: float, bend: float) -> np.ndarray:
        """The share of each voxel in a winding tube that runs up from the height `low`."""
        z, y, x = self.at
        phases, waves = self.rng.uniform((0, 0.7), (1, 1.4), (2, 2)).T * 2 * np.pi
        shift = (bend * np.sin(np.outer(waves, z.mean((1, 2))) + phases[:, None])).astype(np.float32)[..., None, None]
        y, x = y - row - shift[0] / 2, x - column - shift[1]
        aside = np.sqrt(y * y + x * x)
        return self.solid(aside / radius, radius) * rise(z, low, 1.5 / self.size)

    def add(self, tissue: str, share: np.ndarray) -> int:
        """Put a tissue in front of all others; returns its number in `labels`."""
        self.layers.append((tissue, share.astype(np.float32)))
        self.labels[share > 0.5] = len(self.layers)
        return len(self.layers)


def draw_anatomy(
    rng: np.random.Generator,
    size: int,
    *,
    tumor_share: float,
    host: str | None = None,
    radii: tuple = (),
    textures: tuple[float, float] = (0.0, 0.5),
) -> Anatomy:
    """Draw a torso that holds a tumour with the given chance, in a host drawn by lot or given with its radii."""
    body = Body(rng, size)
    within = _trunk(body)
    found = _organs(body, within)
    chance, lot = rng.random(), str(rng.choice(list(HOSTS), p=HOST_ODDS))
    host = (host or lot) if chance < tumor_share else None
    texture = float(rng.uniform(*textures))
    tumor = np.zeros_like(body.labels, bool)
    if host:
        tumor = _add_tumor(body, body.labels == found[host], radii or HOSTS[host], texture, within)
    masks = {name: (body.labels == number) & ~tumor for name, number in found.items()} | {"tumor": tumor}
    return Anatomy(body.layers, {name: masks[name] for name in STRUCTURES}, host, texture)


def _trunk(body: Body) -> np.ndarray:
    """Skin, fat, muscles, bones and bowel; returns the share of each voxel that the organs may fill."""
    rng, size, (z, y, x) = body.rng, body.size, body.at
    skin = ((np.abs(x - 0.5) / 0.43) ** 2.4 + (np.abs(y - 0.5) / 0.34) ** 2.4) ** (1 / 2.4)
    skin = (skin + 0.02 * smooth_cube(rng, size, 3)) * (1 + 0.06 * np.cos(2 * np.pi * (z - 0.15)))
    fat, wall = rng.uniform(0.05, 0.13), rng.uniform(0.09, 0.12)
    within = body.solid(skin, 0.38, 1 - fat - wall)
    body.add("fat", body.solid(skin, 0.38))
    body.add("muscle", body.solid(skin, 0.38, 1 - fat))
    slope = z + 0.25 * (y - 0.5)  # ribs fall to the front
    rib = ridge(skin - (1 - fat - wall / 2), 0.055) * (np.sin(2 * np.pi * slope / 0.13 + rng.uniform(0, 6)) > 0.2)
    body.add("bone", 0.9 * rib * rise(z, 0.55, 0.05))
    body.add("fat", within)
    for side in (-1, 1):
        column = 0.5 + side * 0.125
        body.add("muscle", body.tube(0.27, column, 0.075, -1, 0.005) * within)  # beside the spine
        wing = ridge(x - 0.5 - side * (0.22 + 0.5 * (z - 0.1)), 0.02) * ridge(y - 0.42, 0.14)
        body.add("bone", 0.95 * wing * (1 - rise(z, 0.25, 0.05)))
    body.add("disc", body.tube(0.235, 0.5, 0.075, -1, 0.004))
    vertebrae = rise(np.sin(2 * np.pi * z / 0.15 + rng.uniform(0, 6)), -0.6, 0.6)
    body.add("bone", body.layers[-1][1] * vertebrae)
    body.add("bone", body.tube(0.125, 0.5, 0.055, -1, 0.004) * vertebrae)
    body.add("canal", body.tube(0.155, 0.5, 0.03, -1, 0.004))
    for _ in range(rng.integers(7, 12)):
        centre = rng.uniform((0.2, 0.5, 0.28), (0.58, 0.75, 0.72))
        loop = ball(rng, body.at, centre, rng.uniform(0.04, 0.085, 3), rng.uniform(0, np.pi), 0.2)
        body.add("gut", body.solid(loop, 0.06) * within)
        if rng.random() < 0.35:
            body.add("gas", body.solid(loop, 0.06, 0.6) * within)
    return within


def _organs(body: Body, within: np.ndarray) -> dict[str, int]:
    """The structures that are outlined, as class -> number of their layer, and the stomach, lungs and vein."""
    rng, size, (z, y, x) = body.rng, body.size, body.at

    def organ(tissue: str, centre: tuple, radii: tuple, spread: tuple, sizes: float, lean: float) -> int:
        centre, radii = rng.normal(centre, spread), np.array(radii) * rng.uniform(1 - sizes, 1 + sizes, 3)
        return body.add(tissue, body.ball(centre, radii, lean) * within)

    found = {}
    for name, side in (("right_kidney", 1), ("left_kidney", -1)):
        centre = rng.normal((0.47, 0.34, 0.5 + side * 0.20), (0.03, 0.015, 0.012))
        radii = np.array((0.12, 0.078, 0.073)) * rng.uniform(0.9, 1.12, 3)
        found[name] = body.add("kidney", body.ball(centre, radii, -side * rng.uniform(0.1, 0.35), 0.08) * within)
        body.add("fat", body.ball(centre - (0, 0, side * 0.065), np.array((0.045, 0.04, 0.03)), 0, 0.05))
    organ("gut", (0.73, 0.62, 0.31), (0.10, 0.11, 0.10), (0.02, 0.02, 0.02), 0.15, -0.5)
    organ("gas", (0.74, 0.68, 0.31), (0.05, 0.035, 0.06), (0.02, 0.01, 0.02), 0.3, 0)
    found["spleen"] = organ("spleen", (0.70, 0.36, 0.21), (0.125, 0.105, 0.075), (0.03, 0.02, 0.01), 0.12, 0.25)
    liver = rng.normal((0.71, 0.53, 0.70), 0.012)
    radii = np.array((0.175, 0.205, 0.185)) * rng.uniform(0.9, 1.1, 3)
    lobe = body.ball(liver + (0.04, 0.08, -0.16), np.array((0.09, 0.11, 0.15)) * rng.uniform(0.8, 1.15, 3), -0.2, 0.15)
    found["liver"] = body.add("liver", np.maximum(body.ball(liver, radii, 0.15, 0.12), lobe) * within)
    dome = 0.87 + 0.03 * np.cos(2 * np.pi * (x - 0.72)) - 1.1 * (y - 0.55) ** 2 + 0.01 * smooth_cube(rng, size, 3)
    body.add("lung", rise(z, dome, 1 / size) * within * (1 - ridge(x - 0.5, 0.05)))
    wide = rng.uniform(0.046, 0.056)
    body.add("vein", body.tube(0.345, 0.57, 0.9 * wide, 0.27, 0.012))
    found["aorta"] = body.add("aorta", body.tube(0.345, 0.46, wide, 0.25 + rng.normal(0, 0.02), 0.012))
    found["bladder"] = organ("urine", (0.13, 0.58, 0.5), (0.085, 0.095, 0.11), (0.015, 0.02, 0.015), 0.2, 0)
    return found


def _add_tumor(body: Body, host: np.ndarray, radii: tuple, texture: float, within: np.ndarray) -> np.ndarray:
    """Add a tumour about a voxel of its host, with a decayed core and patches as its texture says; returns its mask."""
    rng, size = body.rng, body.size
    low, high = np.log(radii)
    radius, lot = float(np.exp(rng.uniform(low, high))), rng.random()
    depth = distance_transform_edt(host)  # as deep in the host as it needs to be, or as it can
    deep = np.flatnonzero(depth >= min(0.8 * radius * size, 0.8 * depth.max()))
    voxel = deep[int(lot * len(deep))]
    centre = np.array([axis.flat[voxel] for axis in body.at])
    shape = radius * np.exp(rng.normal(0, 0.08, 3))
    relative = ball(rng, body.at, centre, shape, rng.uniform(0, np.pi), 0.12)
    share = body.solid(relative, radius) * within
    for tissue, other in body.layers:
        if tissue in ("lung", "aorta", "vein"):
            share = share * (1 - other)
    tumor = share > 0.5
    body.add("tumor", share)
    patches = np.clip(smooth_cube(rng, size, 10) - 0.4, 0, 1)
    core = 1 - rise(relative, 0.35 + 0.3 * texture, 0.4)
    body.add("core", share * texture * np.maximum(core, 0.8 * patches * (relative < 0.9)))
    return tumor


# ---------------------------------------------------------------------------------------------------------
# Scanners
# ---------------------------------------------------------------------------------------------------------

# Tissue -> what it gives in CT (HU, in the portal phase), MR (T1-weighted, of the brightest) and PET (FDG, SUV).
TISSUES = {
    "air": (-1000, 0.0, 0.0),
    "fat": (-100, 0.85, 0.35),
    "muscle": (55, 0.36, 0.7),
    "bone": (320, 0.12, 0.9),
    "disc": (90, 0.25, 0.5),
    "canal": (30, 0.2, 0.6),
    "gut": (42, 0.30, 1.2),
    "gas": (-800, 0.03, 0.2),
    "lung": (-800, 0.05, 0.4),
    "liver": (105, 0.62, 2.4),
    "spleen": (138, 0.42, 1.5),
    "kidney": (180, 0.48, 4.5),
    "vein": (130, 0.10, 1.4),
    "aorta": (170, 0.08, 1.4),
    "urine": (8, 0.18, 10.0),
    "tumor": (62, 0.42, 9.0),
    "core": (-5, 0.20, 2.0),
}
MODALITIES = ("CT", "MR", "PET")
CT_WINDOW, SUV_TOP = (-175.0, 250.0), 15.0


def scan(rng: np.random.Generator, anatomy: Anatomy, modality: str) -> np.ndarray:
    """What a scanner shows of an anatomy: [D, H, W] float32 in [0, 1], scaled as the real volumes are."""
    render = {"CT": _ct, "MR": _mr, "PET": _pet}[modality]
    return np.clip(render(rng, anatomy), 0, 1).astype(np.float32)


def _painted(rng: np.random.Generator, anatomy: Anatomy, modality: str, varied: float, step: float = 0.0) -> np.ndarray:
    """The signal of the tissues, each `varied` (relative) and shifted by about a `step` from patient to patient."""
    column = MODALITIES.index(modality)
    odds = rng.standard_normal((2, len(TISSUES)))
    signal = {
        tissue: levels[column] * np.exp(varied * odds[0, i]) + step * odds[1, i]
        for i, (tissue, levels) in enumerate(TISSUES.items())
    }
    level = np.full(anatomy.layers[0][1].shape, TISSUES["air"][column], np.float32)
    for tissue, share in anatomy.layers:
        level += (np.float32(signal[tissue]) - level) * share
    return level


def _ct(rng: np.random.Generator, anatomy: Anatomy) -> np.ndarray:
    """Attenuation with noise of a low dose, in the window of the abdomen."""
    level = _painted(rng, anatomy, "CT", 0.06, 5.0)
    size = len(level)
    level = level + 6 * smooth_cube(rng, size, 8) + rng.uniform(12, 24) * rng.standard_normal(level.shape, np.float32)
    low, high = CT_WINDOW
    return (level - low) / (high - low)


def _mr(rng: np.random.Generator, anatomy: Anatomy) -> np.ndarray:
    """A T1-weighted image of unknown gain and contrast under a bias field, with Rician noise."""
    level = _painted(rng, anatomy, "MR", 0.07) ** rng.uniform(0.85, 1.2) * rng.uniform(0.5, 2)
    top = level.max()
    level = level * np.exp(0.22 * smooth_cube(rng, len(level), 2)) * (1 + 0.04 * smooth_cube(rng, len(level), 8))
    noise = rng.uniform(0.015, 0.035) * top * rng.standard_normal((2, *level.shape), np.float32)
    level = np.hypot(level + noise[0], noise[1])
    low, high = np.percentile(level[level > 0], (0.5, 99.5))
    return (level - low) / (high - low)


def _pet(rng: np.random.Generator, anatomy: Anatomy) -> np.ndarray:
    """Uptake blurred by the scanner and counted event by event; the square root keeps the faint visible."""
    level = np.clip(_painted(rng, anatomy, "PET", 0.18), 0, None)
    level = gaussian_filter(level, 5 / EXTENT_MM * len(level))
    counts = rng.uniform(8, 20)
    level = gaussian_filter((rng.poisson(level * counts) / counts).astype(np.float32), 0.5)
    return np.sqrt(np.clip(level, 0, SUV_TOP) / SUV_TOP)


# ---------------------------------------------------------------------------------------------------------
# Volumes and datasets
# ---------------------------------------------------------------------------------------------------------


def prompts_of(modality: str, present: list[str], names: dict[str, str]) -> dict[str, dict[str, str | None]]:
    """The prompts of the classes `names` (class -> its words): class -> column -> text.

    The other structure of target@other is the next one of those present.
    """
    found = {}
    for name, said in names.items():
        others = [words for other, words in names.items() if other in present and other != name]
        after = [words for other, words in list(names.items())[list(names).index(name) + 1 :] if other in present]
        synonym, free = STRUCTURES[name]
        found[name] = volume_prompts(
            modality, REGION, said, (after or others)[0] if others else None, synonym=synonym, free=free
        )
    return found


def regenerate(case_id: str, seed: int = 0, size: int = 32, *, tumor_share: float = 0.6) -> Volume:
    """Draw one volume of a torso dataset again, torso_ct_00001 or one of its cases torso_ct_00001.liver.

    The arguments are those the dataset was written with; raises ValueError for another kind of case id.
    """
    volume = case_id.partition(".")[0]
    kind = volume.rpartition("_")[0]
    modality = kind.removeprefix("torso_").upper()
    index = index_of(volume, kind if modality in MODALITIES else "torso_ct")
    anatomy = draw_anatomy(np.random.default_rng([seed, 20, index]), size, tumor_share=tumor_share)
    image = scan(np.random.default_rng([seed, 21 + MODALITIES.index(modality), index]), anatomy, modality)
    present = [name for name, mask in anatomy.masks.items() if mask.any()]
    prompts = prompts_of(modality, present, {name: words(name) for name in STRUCTURES})
    traits = {"host": anatomy.host, "texture": anatomy.texture}
    return Volume(image, anatomy.masks, traits, prompts, (EXTENT_MM / size,) * 3)


def write_torso(
    out: Path,
    *,
    modality: str,
    n: int = 120,
    size: int = 32,
    seed: int = 0,
    tumor_share: float = 0.6,
    splits: tuple[float, ...] = (0.6, 0.15, 0.25),
    overwrite: bool = False,
) -> None:
    """Write a dataset folder of torso phantoms as CT, MR or PET; raises ValueError for parameters out of range."""
    check_cube(size=size, shares={"tumor_share": tumor_share}, n=n, seed=seed)
    kind = f"torso_{modality.lower()}"
    scanned = {"CT": "CT with contrast, portal phase", "MR": "MR, T1-weighted", "PET": "FDG PET"}[modality]
    scaling = {
        "CT": "Stored in [0, 1] from [-175, 250] HU.",
        "MR": "Stored in [0, 1] from the 0.5th to the 99.5th percentile of the voxels above zero.",
        "PET": "Stored in [0, 1] as the square root of SUV / 15, clipped.",
    }[modality]
    card = {
        "title": f"Torso phantom in {modality}",
        "modality": f"abdominal {scanned}",
        "classes": {name: number for number, name in enumerate(STRUCTURES, start=1)},
        "source": command(kind, out, n=n, size=size, seed=seed, tumor_share=tumor_share, splits=splits),
        "prompts": COLUMNS,
        "notes": [scaling, *FRAME_NOTES, *TORSO_NOTES],
    }

    def draw(index: int) -> Volume:
        return regenerate(f"{kind}_{index:05d}", seed, size, tumor_share=tumor_share)

    write_volumes(out, card, draw, prefix=kind, n=n, seed=seed, splits=splits, overwrite=overwrite)


FRAME_NOTES = [
    "Axes run from the feet to the head, from back to front and from the patient's left to the right.",
    "A torso of 192 mm in a cube: the millimetres are a phantom's, the proportions are those of a body.",
    "The masks do not overlap: an organ's mask leaves out the tumor in it.",
    "An augmentation that mirrors left and right makes prompts that name a side wrong.",
]
TORSO_NOTES = [
    "phantom_torso_ct, _mr and _pet made with one seed, n, size and tumor-share hold the same patients with the same "
    "anatomy and splits: a network that is trained on one and tested on another must keep to the splits.",
    "The tumor (in the liver or a kidney, in about 60 % of the patients unless tumor-share says otherwise) is labelled "
    "in every volume; where there is none its mask is empty.",
    "The two kidneys look the same: only their place tells them apart.",
]


def check_cube(*, size: int, shares: dict[str, float], n: int, seed: int) -> None:
    """Raise ValueError with one sentence for the first parameter out of range."""
    check(size=size, smallest=24, shares=shares, n=n, seed=seed, dots="voxels")
