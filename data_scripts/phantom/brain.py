"""The brain phantom: a coronal T1 slice after contrast, with a tumour of one of three kinds among other bright things.

"Left" is the left of the image. Skin, vessels, choroid plexus and mucosa enhance as the tumour does.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from common import CLASS_COLUMN
from mask_words import Seen
from medclip_prompts import PromptSets, brain_class
from phantom.parts import (
    Phantom,
    blob,
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
    strands,
    write,
)
from scipy.ndimage import gaussian_filter

from lib.data import PromptColumn

# ---------------------------------------------------------------------------------------------------------
# Words
# ---------------------------------------------------------------------------------------------------------

WIDTH_MM = 220.0
KINDS = ("glioma", "meningioma", "pituitary")
KIND_ODDS = (0.42, 0.33, 0.25)
SIZES = ("small", "medium", "large")
SIDES = ("left", "right")
HEIGHTS = ("upper", "middle", "lower")
SETS = PromptSets("brain")  # the house's sentences: a phantom has no mirror
DRAWN = ("kind", "size", "side", "height", "look", "edema")
BRAIN_PROMPTS = {
    "report": PromptColumn(role="report", origin="template", source="caption of the whole image, from what was drawn"),
    "local@mask": PromptColumn(
        role="local", origin="mask-derived", source="number, size, shape and place, computed from the mask"
    ),
    "class@pathology": CLASS_COLUMN,
    "class@other": CLASS_COLUMN.model_copy(update={"source": "the class of the tumour that is not meant"}),
    **SETS.columns,
} | {
    f"attribute.{name}": PromptColumn(
        role=f"attribute.{name}", origin="metadata", source="word that the meant tumour was drawn with"
    )
    for name in DRAWN
}
WORDINGS = (
    "Contrast-enhanced T1 MRI of the brain showing {tumor}.",
    "Coronal brain MRI after contrast: {tumor}.",
    "There is {tumor} on this post-contrast T1-weighted slice.",
)


def caption(rng: np.random.Generator, tumors: list[dict[str, str]]) -> str:
    """A sentence on the whole image in one of three wordings; one attribute is often left out, of two tumours most."""
    wording = WORDINGS[rng.integers(len(WORDINGS))]
    if len(tumors) > 1:
        return wording.format(tumor=" and ".join(_phrase({"kind": t["kind"], "side": t["side"]}) for t in tumors))
    if not tumors:
        return wording.format(tumor="no mass and no abnormal enhancement")
    said = dict(tumors[0])
    if rng.random() < 0.6:
        said.pop(DRAWN[rng.integers(1, len(DRAWN))])
    return wording.format(tumor=_phrase(said))


def _phrase(said: dict[str, str]) -> str:
    """A tumour in words, e.g. 'a large ring-enhancing glioma in the upper left brain with edema'."""
    tumor = "pituitary tumor" if said["kind"] == "pituitary" else said["kind"]
    words = " ".join(word for word in (said.get("size"), said.get("look"), tumor) if word)
    place = " ".join(word for word in (said.get("height"), said.get("side")) if word and word != "midline")
    where = f" in the {place} brain" if place and said["kind"] != "pituitary" else ""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}{where}{said.get('edema', '')}"


def mask_sentence(mask: np.ndarray) -> str | None:
    """Number, size, shape and place of the tumour, without its class."""
    seen = Seen.of(mask)
    if seen is None:
        return None
    tumor = "tumor" if seen.number == 1 else "tumors"
    return f"{seen.count} {seen.size} {seen.shape}-shaped brain {tumor} at the {seen.place} of the MRI slice."


# ---------------------------------------------------------------------------------------------------------
# Anatomy. Lengths in image widths; brightness from 0 (air and bone) to 1 (fat and contrast).
# ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Patient:
    """What the slices of one patient share: width and size of the head, ventricles, and the tissues' contrast."""

    width: float
    size: float
    ventricles: float
    white: float
    grey: float

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "Patient":
        return cls(
            rng.uniform(0.93, 1.07),
            rng.uniform(0.84, 1.02),
            rng.uniform(0.7, 1.5),
            rng.uniform(0.46, 0.52),
            rng.uniform(0.33, 0.38),
        )


BRAIN = (0.35, 0.31)  # half height above its centre and half width of the brain, where the head is 1
SELLA = 0.155  # its height on the midline, below the centre


@dataclass(frozen=True)
class Head:
    """A head before anything is wrong with it, and where things are in it.

    level: [H, W] brightness; x, y: [H, W] place in the head, from its centre, to the right and down; relative: [H, W]
    distance from the brain's centre, 1 on its surface; brain: [H, W] share of each pixel that is brain; ventricles:
    likewise; scale: image widths per unit of x and y.
    """

    level: np.ndarray
    x: np.ndarray
    y: np.ndarray
    relative: np.ndarray
    brain: np.ndarray
    ventricles: np.ndarray
    scale: float
    centre: tuple[float, float]

    def at(self, y: float, x: float) -> tuple[float, float]:
        """The place (down, across) in the image of a place in the head, but for the lean of the head."""
        return self.centre[0] + self.scale * y, self.centre[1] + self.scale * x


def _head(rng: np.random.Generator, size: int, patient: Patient) -> Head:
    down, across = grid(size)
    scale = patient.size * rng.uniform(0.94, 1.02)
    centre = (0.47 + rng.normal(0, 0.03), 0.5 + rng.normal(0, 0.04))
    lean = rng.normal(0, 0.06)
    x = (across - centre[1] - lean * (down - centre[0])) / (scale * patient.width)
    y = (down - centre[0] + lean * (across - centre[1])) / scale
    u = np.abs(x)
    relative = np.sqrt((x / BRAIN[1]) ** 2 + ((y + 0.05) / np.where(y < -0.05, BRAIN[0], 0.40)) ** 2)
    outer = np.sqrt((u / (0.385 - 0.12 * np.clip(y, 0, 1) ** 2)) ** 2 + (np.minimum(y + 0.02, 0) / 0.435) ** 2)
    outer = outer + 0.012 * smooth_line(rng, size, 5)[:, None]
    base = SELLA - 0.045 + 0.145 * np.sqrt(np.clip((u - 0.035) / 0.075, 0, 1)) - 0.4 * np.clip(u - 0.17, 0, 1)
    base = base + 0.006 * smooth_line(rng, size, 6)[None, :]
    sharp = 2.0 / size
    brain = (1 - rise(relative, 1.0, 3 * sharp)) * (1 - rise(y, base, sharp))

    head = 1 - rise(outer, 1.0, 2.5 * sharp)
    flesh = 0.34 + 0.08 * smooth_field(rng, size, 16, 12) + 0.25 * strands(rng, size, 16, 11, 0.006)
    sinus = (1 - rise(((u - 0.03) / 0.065) ** 2 + ((y - 0.27) / 0.06) ** 2, 1.0, 0.3)) + (
        1 - rise(((u - 0.17) / 0.07) ** 2 + ((y - 0.46) / 0.10) ** 2, 1.0, 0.3)
    )
    flesh = flesh + (0.05 - flesh) * np.clip(sinus, 0, 1) + 0.3 * ridge(sinus - 0.3, 0.2) * (y > 0.2)
    vault = 1 - rise(y, 0.16 + 0.10 * rise(u, 0.1, 0.2), 0.05)  # bone above, flesh below
    bone = 0.07 + 0.22 * ridge(outer - 0.90, 0.015) * np.clip(0.6 + 0.5 * smooth_field(rng, size, 9, 9), 0, 1)
    level = flesh + (bone - flesh) * vault
    fat = rng.uniform(0.62, 0.78) + 0.05 * smooth_field(rng, size, 12, 12)
    level = level + (fat - level) * rise(outer, 0.945, 2.5 * sharp)
    level = level + 0.2 * ridge(outer - 0.985, 0.012)
    dura = ridge(relative - 1.015, 0.014) * vault
    level = (level + (0.42 - level) * dura) * head
    inside, ventricles = _brain(rng, size, patient, x, y, relative, base)
    level = level + (inside - level) * brain
    level = level + (0.92 - level) * _vessels(rng, size, x, y, u) * head
    return Head(level, x, y, relative, brain, ventricles * brain, scale, centre)


def _brain(
    rng: np.random.Generator,
    size: int,
    patient: Patient,
    x: np.ndarray,
    y: np.ndarray,
    relative: np.ndarray,
    base: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Brightness of the brain with its folds, fissures and ventricles, and the share of each pixel in the latter."""
    u, fluid = np.abs(x), 0.13
    depth = np.minimum((1 - relative) * 0.32, base - y)  # below the surface
    depth = np.minimum(depth, np.where(y < -0.13, u, 1))
    field = smooth_field(rng, size, 13, 13)
    along, sideways = np.gradient(field, 1 / size)
    fold = np.abs(field) / (np.sqrt(along**2 + sideways**2) + 1e-3) + 0.25 * np.clip(depth - 0.05, 0, 1)
    cortex = np.maximum(1 - rise(depth, 0.026, 0.012), ridge(fold, 0.019))
    level = patient.white + (patient.grey - patient.white) * cortex + 0.012 * smooth_field(rng, size, 7, 7)
    nuclei = 1 - rise(((u - 0.10) / 0.035) ** 2 + ((y - 0.0) / 0.05) ** 2, 1.0, 0.5)
    level = level + (patient.grey + 0.03 - level) * 0.7 * nuclei
    cleft = np.maximum(ridge(fold, 0.007) * (1 - rise(depth, 0.08, 0.05)), 1 - rise(depth, 0.006, 0.008))
    midline = ridge(x, 0.008) * (y < -0.11)
    sylvian = ridge(y - 0.05 + 0.55 * (u - 0.2) + 0.01 * np.sin(40 * u), 0.008) * rise(u, 0.14, 0.03)
    dark = np.clip(np.maximum(np.maximum(cleft, midline), sylvian), 0, 1)
    level = level + (fluid - level) * dark
    level = level + (0.6 - level) * ridge(x, 0.0035) * (y < -0.12)  # the falx enhances
    wide, sharp = patient.ventricles, 3.0 / size
    arch = -0.085 + 0.5 * u - 1.2 * np.clip(0.05 - u, 0, 1) ** 2
    horn = np.abs(y - arch) - 0.024 * wide * np.sqrt(np.clip(1 - ((u - 0.045) / (0.042 * np.sqrt(wide))) ** 2, 0, 1))
    third = np.maximum(u - 0.006 * wide, np.abs(y - 0.015) - 0.035)
    ventricles = 1 - np.minimum(rise(horn, 0, sharp), rise(third, 0, sharp))
    return level + (fluid - level) * ventricles, ventricles


def _vessels(rng: np.random.Generator, size: int, x: np.ndarray, y: np.ndarray, u: np.ndarray) -> np.ndarray:
    """Contrast where it belongs: arteries, sinuses and the choroid plexus; their places on one side differ a little."""
    drawn = np.zeros((size, size), np.float32)
    spots = [(-0.395, 0.0, 0.012), (SELLA + 0.045, 0.062, 0.011), (SELLA + 0.045, -0.062, 0.011)]
    for side in (-1, 1):
        spots.append((-0.06 + rng.normal(0, 0.006), side * (0.035 + rng.normal(0, 0.004)), rng.uniform(0.005, 0.010)))
        for _ in range(rng.integers(1, 4)):
            lateral = rng.uniform(0.13, 0.26)
            spots.append(
                (0.05 - 0.55 * (lateral - 0.2) + rng.normal(0, 0.008), side * lateral, rng.uniform(0.004, 0.009))
            )
    for _ in range(rng.integers(0, 4)):
        angle = rng.uniform(-2.0, 2.0)
        spots.append((-0.05 - 0.33 * np.cos(angle), 0.29 * np.sin(angle), rng.uniform(0.004, 0.008)))
    for row, column, radius in spots:
        drawn = np.maximum(drawn, np.exp(-0.5 * ((x - column) ** 2 + (y - row) ** 2) / radius**2))
    return drawn * rng.uniform(0.75, 1.0)


# ---------------------------------------------------------------------------------------------------------
# Tumours: each gives its mask, the brightness that it paints and how much of it, [H, W] each, and its words
# ---------------------------------------------------------------------------------------------------------

Drawn = tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, str]]
REACHES = {"small": (0.055, 0.07), "medium": (0.075, 0.095), "large": (0.10, 0.125)}


def _glioma(rng: np.random.Generator, head: Head, named: str) -> Drawn:
    """A lobed mass in the white matter: an uneven bright ring round a dark core, or patches; edema like fingers."""
    size, side = len(head.x), rng.choice((-1, 1))
    reach = rng.uniform(*REACHES[named])
    while True:
        row, column = rng.uniform(-0.30, 0.20), side * rng.uniform(0.05, 0.25)
        if np.hypot(column / BRAIN[1], (row + 0.05) / BRAIN[0]) < 1 - 0.55 * reach / BRAIN[1]:
            break
    aspect = rng.uniform(1.25, 1.8)
    radii = head.scale * reach * np.sqrt(aspect), head.scale * reach / np.sqrt(aspect)
    relative = blob(rng, size, head.at(row, column), radii, rng.uniform(0, np.pi), uneven=0.42)[0]
    relative = relative + 0.20 * smooth_field(rng, size, 13, 13) * np.clip(relative, 0, 1)
    mask = (relative < 1) & (head.brain > 0.5) & (head.ventricles < 0.5)
    ring = rng.random() < 0.7
    rim = rng.uniform(0.74, 0.90)
    if ring:
        wall = rng.uniform(0.45, 0.62) + 0.12 * smooth_field(rng, size, 12, 12)
        core = rng.uniform(0.16, 0.26) + 0.25 * strands(rng, size, 16, 16, 0.006)
        inner = core + (rim - core) * rise(relative, wall, 0.16)
    else:
        inner = rim - 0.22 * rise(smooth_field(rng, size, 22, 22), 0.4, 0.5)
    swollen = rng.random() < 0.7
    level, share = inner, 1 - rise(relative, 1.0, 2.5 / (reach * size))
    if swollen:
        fingers = relative + 0.35 * smooth_field(rng, size, 12, 12)
        edema = (1 - rise(fingers, rng.uniform(1.6, 2.1), 0.5)) * head.brain * (1 - head.ventricles)
        around = np.minimum(head.level, 0.24 + 0.3 * head.level)
        level, share = around + (inner - around) * share, np.maximum(share, edema)
    share = share * np.where(head.brain > 0.5, 1 - head.ventricles, 0)
    words = {"side": SIDES[int(side > 0)], "height": _height(row), "look": "ring-enhancing" if ring else "patchy"}
    return mask, level, share, words | {"edema": " with edema" if swollen else " without edema"}


def _meningioma(rng: np.random.Generator, head: Head, named: str) -> Drawn:
    """A smooth bright mass that sits on the dura of vault or falx with a broad base, and its tail."""
    size, reach = len(head.x), rng.uniform(*REACHES[named])
    side = rng.choice((-1, 1))
    if rng.random() < 0.25:
        row = rng.uniform(-0.30, -0.17)
        depth, along = side * head.x - 0.004, head.y - row + 0.15 * np.abs(head.x)
    else:
        angle = side * rng.uniform(0.35, 1.75)
        row = -0.05 - BRAIN[0] * np.cos(angle)
        depth = (1 - head.relative) * 0.33
        turned = np.arctan2(head.x / BRAIN[1], -(head.y + 0.05) / BRAIN[0]) - angle
        along = ((turned + np.pi) % (2 * np.pi) - np.pi) * 0.33
    flat = rng.uniform(0.7, 1.25)  # the smaller, the more it spreads along the dura
    width, height = reach * 1.45 / np.sqrt(flat), reach * 1.35 * np.sqrt(flat)
    place = along / width + rng.normal(0, 0.1) * depth / height  # it leans
    aside, lower = rng.choice((-1, 1)) * rng.uniform(0.6, 0.9), height * rng.uniform(0.4, 0.7)
    dome = np.maximum(
        height * np.sqrt(np.clip(1 - place**2, 0, 1)), lower * np.sqrt(np.clip(1 - ((place - aside) / 0.6) ** 2, 0, 1))
    )
    tail = 0.020 * np.exp(-np.clip(np.abs(place) - 1.2, 0, 9) * width / 0.04)
    thick = np.maximum(dome, tail * (tail > 0.007))
    edge = np.where(thick > 0, depth - thick, 1)
    mask = (edge < 0) & (depth > -0.004) & (head.brain > 0.3)
    level = np.full_like(head.level, rng.uniform(0.76, 0.92)) + 0.025 * smooth_field(rng, size, 16, 16)
    share = (1 - rise(edge, 0.0, 2.5 / size)) * rise(depth, -0.008, 0.008) * rise(head.brain, 0.3, 0.4)
    words = {"side": SIDES[int(side > 0)], "height": _height(row), "look": "homogeneous", "edema": ""}
    if rng.random() < 0.35:
        ring = (1 - rise(edge, rng.uniform(0.03, 0.05), 0.03)) * head.brain * (1 - head.ventricles)
        around = np.minimum(head.level, 0.24 + 0.3 * head.level)
        level, share = around + (level - around) * share, np.maximum(share, ring)
        words["edema"] = " with edema"
    return mask, level, share, words


def _pituitary(rng: np.random.Generator, head: Head, named: str) -> Drawn:
    """A mass in the sella that grows up through its narrow entrance, like a snowman, or to one side."""
    size, reach = len(head.x), 0.75 * rng.uniform(*REACHES[named])
    lean = rng.normal(0, 0.25) * reach
    parts = [((SELLA + 0.02, 0.0), 0.85 * reach)]
    if named != "small" or rng.random() < 0.5:
        parts.append(((SELLA + 0.02 - 1.5 * reach, lean), rng.uniform(0.6, 0.85) * reach))
    for side in (-1, 1):
        if rng.random() < 0.45:
            parts.append(((SELLA + 0.025 + 0.2 * reach, side * 1.25 * reach), rng.uniform(0.4, 0.6) * reach))
    relative = np.full_like(head.level, 9.0)
    for (row, column), radius in parts:
        radii = head.scale * radius * rng.uniform(0.9, 1.1), head.scale * radius * rng.uniform(0.9, 1.2)
        near = (blob(rng, size, head.at(row, column), radii, rng.uniform(0, 3), uneven=0.22)[0] - 1) * radius
        relative = np.minimum(relative, near)
    mask = relative < 0
    level = np.full_like(head.level, rng.uniform(0.68, 0.82)) + 0.03 * smooth_field(rng, size, 20, 20)
    cystic = rng.random() < 0.3
    if cystic:
        level = level - 0.4 * (1 - rise(near, -0.4 * reach, 0.2 * reach))  # in the part drawn last
    words = {"side": "midline", "height": "lower", "look": "partly cystic" if cystic else "homogeneous", "edema": ""}
    return mask, level, 1 - rise(relative, 0.0, 2.5 / size), words


def _height(row: float) -> str:
    return HEIGHTS[0] if row < -0.18 else HEIGHTS[1] if row < 0.0 else HEIGHTS[2]


TUMORS = {"glioma": _glioma, "meningioma": _meningioma, "pituitary": _pituitary}


def _add_tumor(rng: np.random.Generator, head: Head, level: np.ndarray, kind: str, clear: np.ndarray):
    """Draw a tumour of a kind outside of what is taken; gives brightness, mask and words."""
    for _ in range(20):
        named = SIZES[rng.integers(len(SIZES))]
        mask, painted, share, words = TUMORS[kind](rng, head, named)
        if mask.mean() > 0.004 and not (mask & ~clear).any():
            break
    mask = mask & clear
    share = np.where(clear, share, 0)
    return level + (painted - level) * share, mask, {"kind": kind, "size": named, **words}


# ---------------------------------------------------------------------------------------------------------
# Cases
# ---------------------------------------------------------------------------------------------------------


def brain_mri(
    rng: np.random.Generator,
    size: int = 128,
    *,
    ambiguous: float = 0.0,
    text_share: float = 0.8,
    patient: Patient | None = None,
) -> Phantom:
    """Draw one slice with a glioma, a meningioma or a pituitary tumour, or with none (6 %).

    ambiguous: share, among the slices with a tumour, that hold a second one of another kind, which is not meant, so
    that only a prompt with the class tells which one is; text_share: share with a caption; patient: drawn when None.
    Raises ValueError for bad parameters.
    """
    _check(size=size, ambiguous=ambiguous, text_share=text_share)
    patient = patient or Patient.draw(rng)
    chance = rng.random(3)
    kinds: list[str] = []
    if chance[0] >= 0.06:
        kinds.append(draw_word(rng, KINDS, KIND_ODDS))
        if chance[1] < ambiguous:
            kinds.append(str(rng.choice([kind for kind in KINDS if kind != kinds[0]])))
    head = _head(rng, size, patient)
    level, clear = head.level, np.ones((size, size), bool)
    masks, words = [], []
    for kind in kinds:
        level, mask, said = _add_tumor(rng, head, level, kind, clear)
        clear = clear & (gaussian_filter(mask.astype(np.float32), size / 50) < 0.01)
        masks.append(mask.astype(np.uint8))
        words.append(said)
    level = level * (1 + 0.06 * smooth_field(rng, size, 2, 2))
    level = gaussian_filter(level.astype(np.float32), rng.uniform(0.4, 0.6) * size / 128)
    noise = rng.uniform(0.008, 0.022) * rng.standard_normal((2, size, size), dtype=np.float32)
    level = np.hypot(level + noise[0], noise[1])  # the magnitude of a complex signal: noise of air is not negative
    image = np.clip(level * rng.uniform(0.85, 1.05), 0, 1) ** rng.uniform(0.9, 1.2)

    empty = np.zeros((size, size), np.uint8)
    mask, distractor = (*masks, empty, empty)[:2]
    meant = words[0] if words else {}
    kind = meant.get("kind", "normal")
    prompts: dict[str, str | None] = dict.fromkeys(BRAIN_PROMPTS)
    prompts |= SETS.of(kind) | {"class@pathology": brain_class(kind), "local@mask": mask_sentence(mask)}
    prompts |= {f"attribute.{name}": word.strip() or None for name, word in meant.items()}
    if len(words) > 1:
        prompts["class@other"] = brain_class(words[1]["kind"])
    if chance[2] < text_share:
        prompts["report"] = caption(rng, words)
    descriptors = {"kind": kind, **meant, "other": words[1] if len(words) > 1 else {}}
    return Phantom(image.astype(np.float32), mask, distractor, descriptors, prompts, (WIDTH_MM / size,) * 2)


def regenerate(
    case_id: str, seed: int = 0, size: int = 128, *, ambiguous: float = 0.0, text_share: float = 0.8
) -> Phantom:
    """Draw one case of a brain dataset again, its distractor mask included, without the rest.

    The arguments are those the dataset was written with; raises ValueError for another kind of case id.
    """
    index = index_of(case_id, "brain")
    patient = Patient.draw(np.random.default_rng([seed, 9, *patient_of(seed, index)]))
    rng = np.random.default_rng([seed, 10, index])
    return brain_mri(rng, size, ambiguous=ambiguous, text_share=text_share, patient=patient)


def write_brain(
    out: Path,
    *,
    n: int = 1000,
    size: int = 128,
    seed: int = 0,
    ambiguous: float = 0.0,
    text_share: float = 0.8,
    splits: tuple[float, ...] = (0.6, 0.15, 0.25),
    overwrite: bool = False,
) -> None:
    """Write a dataset folder of brain phantoms; raises ValueError for parameters out of range."""
    _check(size=size, ambiguous=ambiguous, text_share=text_share, n=n, seed=seed)
    card = {
        "title": "Brain-tumour phantom",
        "modality": "brain MRI, T1 after contrast",
        "classes": {"tumor": 1},
        "source": command(
            "brain", out, n=n, size=size, seed=seed, ambiguous=ambiguous, text_share=text_share, splits=splits
        ),
        "prompts": BRAIN_PROMPTS,
        "notes": [
            "'Left' is the left of the image.",
            "The mask is the enhancing tumour with its core; the edema around it is not part of it.",
            "report is missing at random, for contrastive training; the prompt sets (global@) are there for every "
            "slice, as MedCLIP-SAMv2 prompts every image of a test set.",
            "In the share `ambiguous` of the slices with a tumour there is a second one of another kind: the mask is "
            "the one of class@pathology, and prompts without the class cannot tell which is meant.",
            "About 6 % of the slices hold no tumour: empty mask; their P1 and P3 say so.",
            "P4 and P5 are not here: a phantom does not copy the paper's lists.",
        ],
    }

    def draw(index: int) -> dict[str, Phantom]:
        case_id = f"brain_{index:05d}"
        return {case_id: regenerate(case_id, seed, size, ambiguous=ambiguous, text_share=text_share)}

    write(out, card, draw, n=n, seed=seed, splits=splits, overwrite=overwrite)


def _check(*, size: int, ambiguous: float, text_share: float, n: int = 10, seed: int = 0) -> None:
    check(size=size, smallest=48, shares={"ambiguous": ambiguous, "text_share": text_share}, n=n, seed=seed)
