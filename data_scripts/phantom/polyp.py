"""The colonoscopy phantom: folded mucosa with polyps, of which a description names all or only some."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from mask_words import polyp_sentence
from phantom.parts import (
    Phantom,
    blob,
    check,
    command,
    draw_word,
    grid,
    index_of,
    near,
    patient_of,
    ridge,
    rise,
    smooth_field,
    strands,
    write,
)
from scipy.ndimage import gaussian_filter1d

from lib.data import PromptColumn

# ---------------------------------------------------------------------------------------------------------
# Words
# ---------------------------------------------------------------------------------------------------------

SIZES = ("small", "medium", "large")
DIAMETERS = {"small": (0.13, 0.24), "medium": (0.36, 0.46), "large": (0.64, 0.70)}  # in image widths
COLOURS = {
    "pink": (0.85, 0.52, 0.46),
    "red": (0.70, 0.22, 0.18),
    "white": (0.88, 0.78, 0.72),
    "yellow": (0.88, 0.70, 0.36),
    "brown": (0.50, 0.30, 0.20),
}
SHAPES = ("round", "oval", "irregular")
REACH = {"round": 1.1, "oval": 1.4, "irregular": 1.5}  # of the outline, in radii
NUMBERS = ("no", "one", "two", "three")
SEGMENTS = ("rectum", "sigmoid colon", "descending colon", "transverse colon", "ascending colon")
WORDS = ("size", "colour", "shape")
TEMPLATE = PromptColumn(role="local", origin="template", source="polyps drawn, in the wording of MedVLSM's P6")
POLYP_PROMPTS = {
    "local": TEMPLATE,
    "local@other": TEMPLATE.model_copy(update={"source": "the polyps not named: the text of case <id>_other"}),
    "local@mask": PromptColumn(
        role="local", origin="mask-derived", source="number, size, shape and place, computed from the mask"
    ),
    "global": PromptColumn(role="global", origin="template", source="segment and light drawn"),
    "target": PromptColumn(role="target", origin="template", source="the same for every image"),
} | {
    f"attribute.{name}": PromptColumn(
        role=f"attribute.{name}", origin="metadata", source="word that the meant polyps were drawn with"
    )
    for name in (*WORDS, "number", "place")
}


@dataclass(frozen=True)
class Look:
    """What the polyps of a group have in common, and how many they are."""

    size: str
    colour: str
    shape: str
    number: int

    @classmethod
    def draw(cls, rng: np.random.Generator, sizes: tuple[float, ...]) -> "Look":
        size = draw_word(rng, SIZES, sizes)
        # As many as find room in the frame, also beside another group.
        number = 1 + int(rng.choice(3, p=(0.72, 0.22, 0.06))) if size == "small" else 1
        colour = draw_word(rng, tuple(COLOURS), (0.25, 0.25, 0.2, 0.15, 0.15))
        return cls(size, colour, draw_word(rng, SHAPES, (0.4, 0.35, 0.25)), number)

    def differs(self, other: "Look") -> list[str]:
        return [name for name in WORDS if getattr(self, name) != getattr(other, name)]


def place_of(centre: tuple[float, float]) -> str:
    """The third of height and width, e.g. 'top left'."""
    down, across = (min(int(3 * at), 2) for at in centre)
    return f"{('top', '', 'bottom')[down]} {('left', '', 'right')[across]}".strip() or "center"


def sentence(look: Look, places: list[str] | None, said: tuple[str, ...] = WORDS) -> str:
    """The description, e.g. 'one small red oval polyp, located in top left of the image'."""
    adjectives = " ".join(getattr(look, name) for name in WORDS if name in said)
    text = f"{NUMBERS[look.number]} {adjectives} polyp"
    return text + (f", located in {', '.join(places)} of the image" if places else "")


# ---------------------------------------------------------------------------------------------------------
# The scene. Lengths in image widths; the light sits beside the lens.
# ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Patient:
    """What the images of one patient share: segment, colour of the mucosa, how folded and how veined it is."""

    segment: str
    mucosa: np.ndarray
    folds: float
    veins: float
    octagon: bool

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "Patient":
        mucosa = (np.array((0.80, 0.44, 0.34)) + rng.normal(0, 0.05, 3)).astype(np.float32)
        segment = SEGMENTS[rng.integers(len(SEGMENTS))]
        return cls(segment, mucosa, rng.uniform(0.5, 1.0), rng.uniform(0.2, 1.0), bool(rng.random() < 0.7))


@dataclass(frozen=True)
class Polyp:
    """A placed polyp: per pixel its relative radius (1 on the outline) and the direction, and its place."""

    look: Look
    centre: tuple[float, float]
    reach: float
    relative: np.ndarray
    down: np.ndarray
    across: np.ndarray

    @property
    def mask(self) -> np.ndarray:
        return self.relative < 1


def _place(rng: np.random.Generator, size: int, looks: list[Look]) -> list[list[Polyp]]:
    """Put the polyps of each group into the frame, the largest first, none touching another."""
    wanted = sorted((SIZES.index(look.size), i) for i, look in enumerate(looks) for _ in range(look.number))[::-1]
    for shrink in 0.97 ** np.arange(100):  # small ones get smaller until there is room
        discs: list[tuple[int, float, float, float, float]] = []
        for _, i in wanted:
            for _ in range(60):
                radius = rng.uniform(*DIAMETERS[looks[i].size]) / 2 * (float(shrink) if looks[i].size == "small" else 1)
                reach = REACH[looks[i].shape] * radius
                down, across = (0.5 + rng.uniform(-0.4, 0.4, 2)).tolist()
                inside = np.hypot(down - 0.5, across - 0.5) + 0.85 * reach < 0.49
                if inside and all(np.hypot(down - d, across - a) > reach + r + 0.02 for _, d, a, _, r in discs):
                    discs.append((i, down, across, radius, reach))
                    break
        if len(discs) == len(wanted):
            break
    placed: list[list[Polyp]] = [[] for _ in looks]
    for i, down, across, radius, _ in discs:
        placed[i].append(_form(rng, size, looks[i], (down, across), radius))
    return placed


def _form(rng: np.random.Generator, size: int, look: Look, centre: tuple[float, float], radius: float) -> Polyp:
    aspect = np.sqrt({"round": rng.uniform(1.0, 1.1), "oval": rng.uniform(1.5, 1.9), "irregular": 1.25}[look.shape])
    uneven = {"round": 0.02, "oval": 0.02, "irregular": 0.26}[look.shape]
    radii = (radius / aspect, radius * aspect)
    relative, down, across = blob(rng, size, centre, radii, rng.uniform(0, np.pi), uneven)
    # Whatever its outline, its area is that of the disc.
    relative *= np.sqrt((relative < 1).mean() / (np.pi * radius**2), dtype=np.float32)
    return Polyp(look, centre, radius, relative, down, across)


@cache
def _frame(size: int, octagon: bool) -> np.ndarray:
    """The lit field of the endoscope: an octagon or a disc with a soft rim."""
    down, across = grid(size)
    y, x = np.abs(down - 0.5), np.abs(across - 0.5)
    edge = np.maximum(np.maximum(x, y), (x + y) / 1.52) if octagon else 0.86 * np.sqrt(x * x + y * y)
    return 1 - rise(edge, 0.485, 0.012)


def _mucosa(rng: np.random.Generator, size: int, patient: Patient) -> tuple[np.ndarray, np.ndarray]:
    """Shading [S, S] of the folded wall, and how much each pixel shows of the vessels in it."""
    down, across = grid(size)
    lumen = (0.5 + rng.uniform(-0.32, 0.32, 2)).tolist()
    wobble = smooth_field(rng, size, 4, 4)
    distance = np.sqrt((down - lumen[0]) ** 2 + (across - lumen[1]) ** 2) * (1 + 0.12 * wobble)
    # Folds run around the lumen: lit on the side to the lens, in shadow behind the crest.
    phase = np.mod(distance / rng.uniform(0.15, 0.24) + 0.3 * smooth_field(rng, size, 3, 3), 1)
    fold = ridge(phase - 0.45, 0.16) - 1.1 * ridge(phase - 0.80, 0.11)
    shade = 0.92 + patient.folds * 0.20 * fold * rise(distance, 0.15, 0.2)
    shade = shade * (0.22 + 0.78 * rise(distance, 0.10, 0.30))
    light = 1 - 0.9 * ((down - 0.5) ** 2 + (across - 0.5) ** 2)
    shade = shade * light * (1 + 0.05 * smooth_field(rng, size, 6, 6) + 0.025 * smooth_field(rng, size, 36, 36))
    veins = strands(rng, size, 7, 7, 0.005) + 0.6 * strands(rng, size, 15, 15, 0.004)
    veins = patient.veins * np.clip(veins * (0.6 + 0.5 * wobble), 0, 1)
    return shade, veins


def _paint(
    rng: np.random.Generator, size: int, image: np.ndarray, shade: np.ndarray, mucosa: np.ndarray, polyp: Polyp
) -> None:
    """Draw a polyp into the image [S, S, 3] as a lit dome, with the shadow that it casts."""
    around, shown = near(size, polyp.centre, 2.2 * polyp.reach + 0.02), polyp.relative < 1
    relative, down, across = polyp.relative[around], polyp.down[around], polyp.across[around]
    light = np.array((0.5 - polyp.centre[0], 0.5 - polyp.centre[1]), np.float32)
    light /= max(np.linalg.norm(light), 0.2)
    toward = light[0] * down + light[1] * across
    inside = 1 - rise(relative, 1.0, min(max(1.6 / (polyp.reach * size), 0.06), 0.3))
    dome = np.sqrt(np.clip(1 - 0.94 * np.minimum(relative, 1) ** 2, 0, 1))
    bumpy = 0.09 if polyp.look.shape == "irregular" else 0.05
    lit = 0.50 + 0.42 * dome + 0.22 * toward * relative + bumpy * smooth_field(rng, size, 24, 24)[around]
    lit = lit * (0.35 + 0.65 * float(shade[shown].mean()))  # a polyp in the dark of the lumen is dark too
    colour = 0.72 * np.array(COLOURS[polyp.look.colour]) + 0.32 * mucosa + rng.normal(0, 0.02, 3)
    colour = colour.astype(np.float32)
    cast = 1 - 0.4 * np.exp(-np.maximum(relative - 1, 0) / 0.16) * rise(-toward, -0.2, 1.2)
    behind = image[around] * cast[..., None]
    image[around] = behind + (lit[..., None] * colour - behind) * inside[..., None]


def _bubbles(rng: np.random.Generator, size: int, image: np.ndarray) -> None:
    """Draw things that are no polyps into the image: bubbles with a bright rim, and flecks of stool."""
    for _ in range(rng.choice(5, p=(0.35, 0.25, 0.2, 0.12, 0.08))):
        centre, radius = tuple(rng.uniform(0.12, 0.88, 2)), rng.uniform(0.012, 0.035)
        around = near(size, centre, 3 * radius + 0.02)
        radii = (radius, radius * rng.uniform(1, 1.4))
        relative = blob(rng, size, centre, radii, uneven=0.05, within=around)[0][..., None]
        if rng.random() < 0.5:
            image[around] += 0.30 * ridge(relative - 1, 0.25) - 0.05 * (relative < 1)
        else:
            fleck = np.array((0.62, 0.48, 0.18), np.float32) * rng.uniform(0.7, 1.1)
            image[around] += (fleck - image[around]) * 0.85 * (1 - rise(relative, 1.0, 0.5))


def _glints(rng: np.random.Generator, size: int, shade: np.ndarray, polyps: list[Polyp]) -> np.ndarray:
    """Specular highlights where the wet surface faces the light: along crests, and one or two on each polyp."""
    wet = smooth_field(rng, size, 30, 24) + 0.8 * (shade - 0.85) / 0.2
    covered = np.zeros((size, size), bool)
    for polyp in polyps:
        covered |= polyp.relative < 1.1
    glints = rise(wet, 2.9, 0.5) * ~covered
    for polyp in polyps:
        for _ in range(rng.integers(1, 3)):
            toward = 0.45 * (0.5 - np.array(polyp.centre)) + rng.normal(0, 0.12, 2) * polyp.reach
            toward *= min(1, 0.5 * polyp.reach / max(np.hypot(*toward), 1e-6))
            spot = min(max(rng.uniform(0.06, 0.16) * polyp.reach, 0.8 / size), 0.022)
            at = (polyp.centre[0] + toward[0], polyp.centre[1] + toward[1])
            around = near(size, at, 3 * spot)
            form = blob(rng, size, at, (spot, spot * rng.uniform(1, 2)), rng.uniform(0, np.pi), within=around)[0]
            glints[around] = np.maximum(glints[around], 1 - rise(form, 1.0, 0.6))
    return glints


def _render(rng: np.random.Generator, size: int, patient: Patient, polyps: list[Polyp]) -> np.ndarray:
    shade, veins = _mucosa(rng, size, patient)
    image = shade[..., None] * patient.mucosa
    for polyp in polyps:
        _paint(rng, size, image, shade, patient.mucosa, polyp)
    image *= 1 - veins[..., None] * np.array((0.06, 0.28, 0.24), np.float32)
    _bubbles(rng, size, image)
    image += (0.97 - image) * _glints(rng, size, shade, polyps)[..., None]
    image = image * rng.uniform(0.9, 1.12) + rng.normal(0, 0.012, 3).astype(np.float32)
    image *= _frame(size, patient.octagon)[..., None]
    blur = 0.5 * size / 128
    image = gaussian_filter1d(gaussian_filter1d(image, blur, axis=0), blur, axis=1)
    image += 0.008 * rng.standard_normal((size, size, 1), dtype=np.float32)
    return np.clip(image, 0, 1)


# ---------------------------------------------------------------------------------------------------------
# Cases
# ---------------------------------------------------------------------------------------------------------


def _looks(rng: np.random.Generator, ambiguous: bool) -> list[Look]:
    """One group of polyps, or two that differ in look (70 %, at least twice) or in nothing but their place."""
    if not ambiguous:
        if rng.random() < 0.05:
            return []
        return [Look.draw(rng, (0.5, 0.42, 0.08))]
    one = Look.draw(rng, (0.65, 0.35, 0.0))
    if rng.random() >= 0.7:
        return [Look("small", one.colour, one.shape, 1)] * 2
    while True:
        two = Look.draw(rng, (0.65, 0.35, 0.0))
        if len(one.differs(two)) >= 2 and "small" in (one.size, two.size):  # two medium ones would not fit
            return [one, two]


def colonoscopy(
    rng: np.random.Generator,
    size: int = 128,
    *,
    ambiguous: float = 0.5,
    text_share: float = 0.8,
    patient: Patient | None = None,
) -> dict[str, Phantom]:
    """Draw one colonoscopy frame and describe it once, or twice where only the text tells which polyps are meant.

    ambiguous: share, among the images with a local prompt, with two groups of polyps of which it names one; the
    second reading is named _other. text_share: share with a local, and independently with a global, prompt. Images
    without a local prompt are never ambiguous: every polyp is meant. Returns suffix of the case id -> phantom;
    raises ValueError for bad parameters.
    """
    _check(size=size, ambiguous=ambiguous, text_share=text_share)
    patient = patient or Patient.draw(rng)
    chance = rng.random(3)
    has_local, has_global = chance[:2] < text_share
    looks = _looks(rng, bool(has_local and chance[2] < ambiguous))
    groups = _place(rng, size, looks)
    image = _render(rng, size, patient, [polyp for group in groups for polyp in group])
    texts = _texts(rng, groups)
    empty = np.zeros((size, size), bool)
    lit = _frame(size, patient.octagon) > 0.5
    masks = [np.logical_or.reduce([empty, *(polyp.mask & lit for polyp in group)]).astype(np.uint8) for group in groups]
    phantoms = {}
    for i, suffix in enumerate(("", "_other")[: max(len(groups), 1)]):
        prompts: dict[str, str | None] = dict.fromkeys(POLYP_PROMPTS)
        prompts["target"] = "A polyp in a colonoscopy image."
        if has_global:
            prompts["global"] = f"Colonoscopy, {patient.segment}, white light."
        mask = masks[i] if masks else empty.astype(np.uint8)
        other = masks[1 - i] if len(masks) == 2 else empty.astype(np.uint8)
        described = {"segment": patient.segment, "look": looks[i] if looks else None, "places": _places(groups, i)}
        if groups:
            prompts |= {f"attribute.{name}": getattr(looks[i], name) for name in WORDS}
            prompts["attribute.number"] = NUMBERS[looks[i].number]
            prompts["attribute.place"] = ", ".join(_places(groups, i))
            if has_local:
                prompts |= {"local": texts[i], "local@mask": polyp_sentence(mask)}
        if len(groups) == 2:
            prompts["local@other"] = texts[1 - i]
            described["other"] = looks[1 - i]
        phantoms[suffix] = Phantom(image, mask, other, described, prompts, (1.0, 1.0))
    return phantoms


def _places(groups: list[list[Polyp]], i: int) -> list[str]:
    return [place_of(polyp.centre) for polyp in groups[i]] if groups else []


def _texts(rng: np.random.Generator, groups: list[list[Polyp]]) -> list[str]:
    """A description of each group; one in two leaves the place out where the look decides, one in five a word."""
    looks = [group[0].look for group in groups]
    alike = len(looks) == 2 and not looks[0].differs(looks[1])
    texts = []
    for i, look in enumerate(looks):
        places = _places(groups, i) if alike or rng.random() < 0.5 else None
        said = WORDS
        if rng.random() < 0.2:
            # With two differences at least, one word less still tells the groups apart.
            gone = rng.integers(len(WORDS))
            said = WORDS[:gone] + WORDS[gone + 1 :]
        texts.append(sentence(look, places, said))
    return texts


def readings_of(
    index: int, seed: int = 0, size: int = 128, *, ambiguous: float = 0.5, text_share: float = 0.8
) -> dict[str, Phantom]:
    """Draw image `index` of a dataset again: case id -> phantom, one or two."""
    patient = Patient.draw(np.random.default_rng([seed, 7, *patient_of(seed, index)]))
    rng = np.random.default_rng([seed, 8, index])
    drawn = colonoscopy(rng, size, ambiguous=ambiguous, text_share=text_share, patient=patient)
    return {f"polyp_{index:05d}{suffix}": phantom for suffix, phantom in drawn.items()}


def regenerate(case_id: str, seed: int = 0, size: int = 128, **options: float) -> Phantom:
    """Draw one case again, its distractor mask included; raises ValueError for a case that is not there."""
    readings = readings_of(index_of(case_id, "polyp"), seed, size, **options)
    if case_id not in readings:
        raise ValueError(f"Case id '{case_id}' has no such reading: there are {' and '.join(readings)}.")
    return readings[case_id]


def _check(*, size: int, ambiguous: float, text_share: float, n: int = 10, seed: int = 0) -> None:
    check(size=size, smallest=48, shares={"ambiguous": ambiguous, "text_share": text_share}, n=n, seed=seed)


def write_polyp(
    out: Path,
    *,
    n: int = 1000,
    size: int = 128,
    seed: int = 0,
    ambiguous: float = 0.5,
    text_share: float = 0.8,
    splits: tuple[float, ...] = (0.6, 0.15, 0.25),
    overwrite: bool = False,
) -> None:
    """Write a dataset folder of colonoscopy phantoms; raises ValueError for parameters out of range."""
    _check(size=size, ambiguous=ambiguous, text_share=text_share, n=n, seed=seed)
    card = {
        "title": "Colonoscopy phantom",
        "modality": "colonoscopy",
        "classes": {"polyp": 1},
        "source": command(
            "polyp", out, n=n, size=size, seed=seed, ambiguous=ambiguous, text_share=text_share, splits=splits
        ),
        "prompts": POLYP_PROMPTS,
        "notes": [
            "In the share `ambiguous` of the images with a local prompt there are two groups of polyps and the prompt "
            "names one. Such an image is two cases of one patient, <id> and <id>_other; local@other holds the text "
            "of the other one: the right answer to it is the other one's mask.",
            "Seven in ten such groups differ at least twice in size, colour and shape, and half of the texts then "
            "leave the place out; the rest look alike and the text names the place.",
            "Images without a local prompt are never ambiguous: every polyp is meant. local and global are missing at "
            "random, independently; local@mask where local is.",
            "Bubbles and flecks of stool are never polyps. About 5 % of the images without ambiguity hold no polyp: "
            "empty mask, no local prompt.",
            "The pixel size is not defined: spacing 1 means pixels.",
        ],
    }

    def draw(index: int) -> dict[str, Phantom]:
        return readings_of(index, seed, size, ambiguous=ambiguous, text_share=text_share)

    write(out, card, draw, n=n, seed=seed, splits=splits, overwrite=overwrite)
