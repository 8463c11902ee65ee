"""The chest X-ray phantom: two lungs with opacities of equal look, of which a report names all or only some.

"Left" is the left of the image, as in the captions of QaTa-COV19.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from phantom.parts import (
    Phantom,
    blob,
    check,
    command,
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
from lib.text import TEMPLATES, render

# ---------------------------------------------------------------------------------------------------------
# Words
# ---------------------------------------------------------------------------------------------------------

WIDTH_MM = 360.0
SIDES = ("left", "right")
ZONES = ("upper", "middle", "lower")
NUMBERS = ("no", "one", "two", "three", "four")
VIEWS = ("posteroanterior, standing", "anteroposterior, sitting", "anteroposterior, supine")
# What one lung can hold: its opacities, each the zones that it covers. Infection likes the lower zones.
PATTERNS = (
    (("lower",),),
    (("middle",),),
    (("upper",),),
    (("middle", "lower"),),
    (("upper", "middle"),),
    (("upper", "middle", "lower"),),
    (("upper",), ("lower",)),
)
PATTERN_ODDS = (0.28, 0.18, 0.12, 0.14, 0.08, 0.10, 0.10)
TEMPLATE = PromptColumn(role="report", origin="template", source="opacities drawn, in the wording of LViT's captions")
CXR_PROMPTS = {
    "report": TEMPLATE,
    "report@lvit": TEMPLATE.model_copy(update={"source": "the same in LViT's other wording"}),
    "report@swapped": TEMPLATE.model_copy(update={"source": "left and right swapped: the report of case <id>_swapped"}),
    "report@other": TEMPLATE.model_copy(update={"source": "the zone not named: the report of case <id>_other"}),
    "global": PromptColumn(role="global", origin="template", source="view and heart size drawn"),
    "target": PromptColumn(role="target", origin="template", source="the same for every image"),
} | {
    f"attribute.{name}": PromptColumn(role=f"attribute.{name}", origin="metadata", source=source)
    for name, source in (
        ("side", "side of the opacities that are meant"),
        ("number", "number of the opacities that are meant"),
        ("zones", "zones of the opacities that are meant"),
    )
}


@dataclass(frozen=True)
class Opacity:
    """One connected opacity: its side and the zones it covers."""

    side: str
    zones: tuple[str, ...]


def zones_of(opacities: tuple[Opacity, ...]) -> str:
    """The infected zones in LViT's words, e.g. 'all left lung and middle lower right lung'."""
    lungs = []
    for side in SIDES:
        infected = {zone for opacity in opacities if opacity.side == side for zone in opacity.zones}
        if infected:
            named = "all" if len(infected) == 3 else " ".join(zone for zone in ZONES if zone in infected)
            lungs.append(f"{named} {side} lung")
    return " and ".join(lungs)


def report_of(opacities: tuple[Opacity, ...]) -> str:
    """The report, e.g. 'Unilateral pulmonary infection, one infected area, lower left lung.'"""
    laterality = "bilateral" if len({opacity.side for opacity in opacities}) == 2 else "unilateral"
    text = render(
        TEMPLATES["chest_xray"]["report"],
        laterality=laterality,
        number=NUMBERS[len(opacities)],
        zones=zones_of(opacities),
    )
    return text.replace("one infected areas", "one infected area")


def involving(opacities: tuple[Opacity, ...]) -> str:
    """The same in LViT's other wording, which it keeps for two lungs."""
    if len({opacity.side for opacity in opacities}) == 1:
        return report_of(opacities).removesuffix(".")
    lungs = zones_of(opacities).replace("and ", "and the ").replace("and the all", "and all")
    lungs = lungs if lungs.startswith("all") else f"the {lungs}"
    return f"Bilateral pulmonary infection involving {NUMBERS[len(opacities)]} regions with involvement of {lungs}"


# ---------------------------------------------------------------------------------------------------------
# Anatomy. Lengths in image widths; brightness from 0 (air) to 1 (bone and metal).
# ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Patient:
    """What the images of one patient share: view, build, heart size, and brightness of tissue and lungs."""

    view: str
    width: float
    heart: float
    tissue: float
    lung: float
    ribs: float

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "Patient":
        view = VIEWS[rng.choice(3, p=(0.3, 0.3, 0.4))]
        # The beam of a supine view magnifies the heart.
        heart = rng.uniform(0.85, 1.15) * (1.1 if view == VIEWS[2] else 1.0)
        return cls(
            view, rng.uniform(0.92, 1.08), heart, rng.normal(0, 0.03), rng.normal(0, 0.03), rng.uniform(0.6, 1.2)
        )


APEX, ZONE = 0.10, 0.195  # of the lungs, where the frame is 1
FRAMING = 0.25


@dataclass(frozen=True)
class Chest:
    """A chest without infection: brightness, how much of each pixel is open lung per side, and where zones lie.

    top and zone: the row of the lungs' apex and the height of a zone, in image widths.
    """

    brightness: np.ndarray
    lungs: dict[str, np.ndarray]
    top: float
    zone: float


def _chest(rng: np.random.Generator, size: int, patient: Patient, framing: float) -> Chest:
    down, across = grid(size)
    # Nobody stands the same way before the plate: the text alone must not tell where the lungs are.
    scale, centre = 0.9 + framing * rng.uniform(-0.18, 0.18), 0.44 + framing * rng.normal(0, 0.04)
    lean, aside = framing * rng.normal(0, 0.06), framing * rng.normal(0, 0.035)
    x = (across - 0.5 - aside - lean * (down - 0.5)) / (scale * patient.width)
    y = 0.40 + (down - centre) / scale + lean * (across - 0.5)
    bent = 0.004 * smooth_line(rng, size, 3)[:, None]
    shadow = _mediastinum(x, y, patient.heart, bent)
    lungs, air, belly = {}, 0.0, 0.0
    for side, sign, base in zip(SIDES, (-1, 1), (0.68, 0.71), strict=True):
        open_to_air, under = _lung(sign * x, y, base + rng.normal(0, 0.012), 0.375 + rng.normal(0, 0.008))
        air, belly = np.maximum(air, open_to_air), np.maximum(belly, under)
        lungs[side] = open_to_air * (1 - shadow)

    body = (1 - rise(np.abs(x), 0.475 * scale**-0.7, 0.03)) * rise(
        y, 0.05 + 0.12 * np.clip(np.abs(x) - 0.13, 0, 1), 0.03
    )
    body = np.maximum(body, (1 - rise(np.abs(x), 0.12, 0.04)) * (y < 0.2))
    muscle = 0.10 * ridge(np.abs(x) - 0.42, 0.05) * ridge(y - 0.42, 0.2)
    level = 0.58 + patient.tissue + 0.03 * smooth_field(rng, size, 4, 4) + 0.12 * belly - muscle
    inside = 0.20 + patient.lung + 0.08 * rise(y, 0.5, 0.4) + _vessels(rng, size, x, y)
    level = level + (inside + 0.015 * smooth_field(rng, size, 9, 9) - level) * air
    level = level + (0.70 + patient.tissue + 0.06 * rise(y, 0.55, 0.4) - level) * shadow
    level = level + _bones(x, y, patient.ribs, air * (1 - 0.5 * shadow), rng.uniform(-0.03, 0.03))
    return Chest(0.04 + (level - 0.04) * body, lungs, centre + scale * (APEX - 0.40), scale * ZONE)


def _lung(u: np.ndarray, y: np.ndarray, base: float, width: float) -> tuple[np.ndarray, np.ndarray]:
    """How much of each pixel is air of the lung, and how much lies under its diaphragm; u grows to the side."""
    outer = width * np.sqrt(np.clip(1 - ((y - 0.58) / 0.52) ** 2, 0, 1))
    dome = base + 1.9 * (u - 0.16) ** 2 + 0.5 * np.clip(u - 0.25, 0, None)
    under = rise(y - dome, 0, 0.016)
    inside = rise(u, 0.045, 0.02) * (1 - rise(u - outer, 0, 0.018)) * rise(y - 1.6 * (u - 0.11) ** 2, 0.105, 0.02)
    return inside * (1 - under), under * (u > 0)


def _mediastinum(x: np.ndarray, y: np.ndarray, heart: float, bent: np.ndarray) -> np.ndarray:
    """Share of each pixel in the shadow of heart, great vessels and spine."""
    band = 1 - rise(np.abs(x) - bent, 0.058 + 0.012 * ridge(y - 0.42, 0.08), 0.03)
    along, beside = 0.71 * (x - 0.06 * heart) + 0.71 * (y - 0.57), 0.71 * (x - 0.06 * heart) - 0.71 * (y - 0.57)
    chamber = 1 - rise((along / (0.185 * heart)) ** 2 + (beside / (0.125 * heart)) ** 2, 1.0, 0.3)
    atrium = 1 - rise(((x + 0.035) / (0.065 * heart)) ** 2 + ((y - 0.58) / 0.12) ** 2, 1.0, 0.5)
    knob = 1 - rise(((x - 0.055) / 0.04) ** 2 + ((y - 0.285) / 0.05) ** 2, 1.0, 0.7)
    return np.maximum(np.maximum(band, chamber), np.maximum(atrium, knob))


def _vessels(rng: np.random.Generator, size: int, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Hilar shadows from which vessels branch and thin out."""
    near = np.exp(-np.sqrt((np.abs(x) - 0.085) ** 2 + (y - 0.42) ** 2) / 0.12)
    branches = strands(rng, size, 9, 9, 0.006) + 0.6 * strands(rng, size, 16, 16, 0.0045)
    return near * (0.10 + 0.22 * branches) + 0.02 * branches


def _bones(x: np.ndarray, y: np.ndarray, strength: float, air: np.ndarray, shift: float) -> np.ndarray:
    """Ribs behind and in front, clavicles, shoulders, spine, and the windpipe before it."""
    u = np.abs(x)
    behind = np.cos(2 * np.pi / 0.072 * (y + shift - 0.1 * u - 0.9 * u**2))
    front = np.cos(2 * np.pi / 0.095 * (y + shift + 0.75 * u - 0.3 * u**2))
    ribs = 0.055 * rise(behind, 0.15, 0.7) + 0.02 * ridge(behind - 0.15, 0.16)
    ribs = ribs + 0.028 * rise(front, 0.2, 0.6) * rise(u, 0.14, 0.1)
    chest = np.maximum(air, 0.35 * (u < 0.42) * (y > 0.08) * (y < 0.75))
    line = y - 0.145 - shift / 2 + 0.22 * u - 0.3 * (u - 0.1) ** 2
    clavicle = ridge(line, 0.011) * rise(u, 0.045, 0.02) * (1 - rise(u, 0.40, 0.05))
    shoulder = 1 - rise(((u - 0.45) / 0.06) ** 2 + ((y - 0.13) / 0.06) ** 2, 1.0, 0.4)
    spine = (0.05 + 0.025 * np.cos(2 * np.pi / 0.055 * y)) * ridge(x, 0.028)
    windpipe = -0.16 * ridge(x - 0.004, 0.015) * (1 - rise(y, 0.30, 0.06))
    return strength * (ribs * chest + 0.13 * clavicle + 0.1 * shoulder) + spine + windpipe


def _lines(rng: np.random.Generator, size: int) -> np.ndarray:
    """Electrode leads and tubes that may lie on any chest: thin bright curves."""
    down, across = grid(size)
    drawn = np.zeros((size, size), np.float32)
    for _ in range(rng.choice(4, p=(0.55, 0.2, 0.15, 0.1))):
        at = rng.uniform(0.15, 0.85) + rng.normal(0, 0.25) * (down - 0.5) + 0.05 * smooth_line(rng, size, 2)[:, None]
        ends = rise(down, rng.uniform(-0.1, 0.3), 0.01) * (1 - rise(down, rng.uniform(0.5, 1.1), 0.01))
        drawn = np.maximum(drawn, ridge(across - at, max(0.0035, 0.45 / size)) * ends)
    return drawn


# ---------------------------------------------------------------------------------------------------------
# Infection
# ---------------------------------------------------------------------------------------------------------


def _opacity(
    rng: np.random.Generator, size: int, opacity: Opacity, chest: Chest, slender: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Strength in [0, 1] and mask of an opacity inside its zones; `slender` leaves a gap to the next zone."""
    zones = [ZONES.index(zone) for zone in opacity.zones]
    lung, middle = chest.lungs[opacity.side], chest.top + (min(zones) + max(zones) + 1) / 2 * chest.zone
    for _ in range(20):
        height = rng.uniform(0.45, 0.75) if slender or len(zones) == 1 else rng.uniform(0.7, 0.95)
        height *= len(zones) * chest.zone / 2
        row = middle + rng.uniform(-1, 1) * 0.6 * (len(zones) * chest.zone / 2 - height)
        columns = np.flatnonzero(lung[int(row * size)] > 0.5) / size
        column = columns[int(len(columns) * rng.uniform(0.15, 0.85))] if len(columns) else 0.5
        relative = blob(rng, size, (row, column), (height, rng.uniform(0.05, 0.13)), rng.normal(0, 0.15), uneven=0.2)[0]
        mask = (relative < 1) & (lung > 0.5)
        if mask.mean() > 0.005:
            break
    cloud = np.clip(0.85 + 0.16 * smooth_field(rng, size, 22, 22), 0.3, 1.15)
    return (1 - rise(relative, 1.05, 0.5)) * cloud * lung, mask


def _render(
    rng: np.random.Generator,
    size: int,
    patient: Patient,
    opacities: tuple[Opacity, ...],
    slender: bool,
    framing: float,
):
    chest = _chest(rng, size, patient, framing)
    density, brightness = rng.uniform(0.5, 0.8), rng.uniform(0.58, 0.70)  # of all opacities alike
    strength, masks = np.zeros((size, size), np.float32), []
    for opacity in opacities:
        drawn, mask = _opacity(rng, size, opacity, chest, slender)
        strength = np.maximum(strength, drawn)
        masks.append(mask)
    level = chest.brightness + (brightness - chest.brightness) * density * strength
    level = np.maximum(level, 0.9 * _lines(rng, size))
    level = gaussian_filter(level.astype(np.float32), 0.55 * size / 128)
    level = level + rng.uniform(0.008, 0.02) * rng.standard_normal((size, size), dtype=np.float32)
    level = np.clip(level, 0, 1) ** rng.uniform(0.85, 1.2)
    image = np.clip(0.5 + (level - 0.47) * rng.uniform(0.95, 1.25), 0, 1).astype(np.float32)
    return image, masks, (chest.top, chest.zone)


# ---------------------------------------------------------------------------------------------------------
# Cases
# ---------------------------------------------------------------------------------------------------------


def _pattern(rng: np.random.Generator, side: str) -> tuple[Opacity, ...]:
    return tuple(Opacity(side, zones) for zones in PATTERNS[rng.choice(len(PATTERNS), p=PATTERN_ODDS)])


def _readings(rng: np.random.Generator, ambiguous: bool) -> dict[str, tuple[Opacity, ...]]:
    """What is drawn, by who means it: suffix of the case id -> opacities. Twins mean different ones of one image."""
    side = SIDES[rng.integers(2)]
    other = SIDES[1 - SIDES.index(side)]
    if ambiguous and rng.random() < 0.65:
        named = _pattern(rng, side)
        return {"": named, "_swapped": tuple(Opacity(other, opacity.zones) for opacity in named)}
    if ambiguous:
        one, two = rng.permutation(ZONES)[:2]
        return {"": (Opacity(side, (str(one),)),), "_other": (Opacity(side, (str(two),)),)}
    if rng.random() < 0.05:
        return {"": ()}
    return {"": _pattern(rng, side) + (_pattern(rng, other) if rng.random() < 0.55 else ())}


def chest_xray(
    rng: np.random.Generator,
    size: int = 128,
    *,
    ambiguous: float = 0.8,
    text_share: float = 0.8,
    framing: float = FRAMING,
    patient: Patient | None = None,
) -> dict[str, Phantom]:
    """Draw one chest X-ray and read it once, or twice where only the report tells which opacities are meant.

    ambiguous: share, among the images with a report, in which two groups of opacities look alike and the report
    names one: the same zones of the other lung (65 %; the second reading is named _swapped) or another zone of the
    same lung (_other). text_share: share with a report, and independently with a global prompt. Images without a
    report are never ambiguous: all opacities are meant. framing: how much size and place of the chest differ between
    images, 0 to 1; the more, the less a report alone gives away, and the longer a network needs. Returns suffix of
    the case id -> phantom; raises ValueError for bad parameters.
    """
    _check(size=size, ambiguous=ambiguous, text_share=text_share, framing=framing)
    patient = patient or Patient.draw(rng)
    chance = rng.random(3)
    has_report, has_global = chance[:2] < text_share
    readings = _readings(rng, bool(has_report and chance[2] < ambiguous))
    drawn = sum(readings.values(), ())
    slender = "_other" in readings or any(len(_on(drawn, side)) > 1 for side in SIDES)
    image, masks, lungs = _render(rng, size, patient, drawn, slender, framing)
    large = "enlarged" if patient.heart > 1.12 else "normal"
    phantoms = {}
    for suffix, meant in readings.items():
        twin = next((name for name in readings if name != suffix), "")
        rest = readings[twin] if len(readings) == 2 else ()
        prompts: dict[str, str | None] = dict.fromkeys(CXR_PROMPTS)
        prompts["target"] = render(TEMPLATES["chest_xray"]["target"], finding="COVID-19 infection")
        if has_global:
            prompts["global"] = f"Chest radiograph, {patient.view}, {large} heart size."
        if meant:
            sides = {opacity.side for opacity in meant}
            prompts["attribute.side"] = "both" if len(sides) == 2 else min(sides)
            prompts["attribute.number"], prompts["attribute.zones"] = NUMBERS[len(meant)], zones_of(meant)
            if has_report:
                prompts |= {"report": report_of(meant), "report@lvit": involving(meant)}
        if rest:
            prompts["report@swapped" if "_swapped" in readings else "report@other"] = report_of(rest)
        first = 0 if suffix == "" else len(readings[""])
        mask = _united(masks[first : first + len(meant)], size)
        distractor = _united([m for i, m in enumerate(masks) if not first <= i < first + len(meant)], size)
        described = {"opacities": meant, "other": rest, "view": patient.view, "heart": large, "lungs": lungs}
        phantoms[suffix] = Phantom(image, mask, distractor, described, prompts, (WIDTH_MM / size,) * 2)
    return phantoms


def _on(opacities: tuple[Opacity, ...], side: str) -> list[Opacity]:
    return [opacity for opacity in opacities if opacity.side == side]


def _united(masks: list[np.ndarray], size: int) -> np.ndarray:
    return np.logical_or.reduce([np.zeros((size, size), bool), *masks]).astype(np.uint8)


def readings_of(
    index: int,
    seed: int = 0,
    size: int = 128,
    *,
    ambiguous: float = 0.8,
    text_share: float = 0.8,
    framing: float = FRAMING,
) -> dict[str, Phantom]:
    """Draw image `index` of a dataset again: case id -> phantom, one or two."""
    patient = Patient.draw(np.random.default_rng([seed, 5, *patient_of(seed, index)]))
    rng = np.random.default_rng([seed, 6, index])
    drawn = chest_xray(rng, size, ambiguous=ambiguous, text_share=text_share, framing=framing, patient=patient)
    return {f"cxr_{index:05d}{suffix}": phantom for suffix, phantom in drawn.items()}


def regenerate(case_id: str, seed: int = 0, size: int = 128, **options: float) -> Phantom:
    """Draw one case again, its distractor mask included; raises ValueError for a case that is not there."""
    readings = readings_of(index_of(case_id, "cxr"), seed, size, **options)
    if case_id not in readings:
        raise ValueError(f"Case id '{case_id}' has no such reading: there are {' and '.join(readings)}.")
    return readings[case_id]


def _check(*, size: int, ambiguous: float, text_share: float, framing: float, n: int = 10, seed: int = 0) -> None:
    shares = {"ambiguous": ambiguous, "text_share": text_share, "framing": framing}
    check(size=size, smallest=48, shares=shares, n=n, seed=seed)


def write_cxr(
    out: Path,
    *,
    n: int = 1000,
    size: int = 128,
    seed: int = 0,
    ambiguous: float = 0.8,
    text_share: float = 0.8,
    framing: float = FRAMING,
    splits: tuple[float, ...] = (0.6, 0.15, 0.25),
    overwrite: bool = False,
) -> None:
    """Write a dataset folder of chest X-ray phantoms; raises ValueError for parameters out of range."""
    _check(size=size, ambiguous=ambiguous, text_share=text_share, framing=framing, n=n, seed=seed)
    card = {
        "title": "Chest X-ray phantom",
        "modality": "chest radiography",
        "classes": {"infection": 1},
        "source": command(
            "cxr",
            out,
            n=n,
            size=size,
            seed=seed,
            ambiguous=ambiguous,
            text_share=text_share,
            framing=framing,
            splits=splits,
        ),
        "prompts": CXR_PROMPTS,
        "notes": [
            "'Left lung' is the left of the image, as in QaTa-COV19.",
            "In the share `ambiguous` of the images with a report, two groups of opacities look alike and the report "
            "names one. Such an image is two cases of one patient: <id>, and <id>_swapped (the same zones of the "
            "other lung: left and right swapped) or <id>_other (another zone of the same lung).",
            "report@swapped and report@other hold the report of that twin: the right answer to them is its mask.",
            "Images without a report are never ambiguous: every opacity is meant. report and global are missing at "
            "random, independently.",
            "Zones are thirds of the lung's height, so a report tells roughly where to look: the text-only probe "
            "is above chance by construction, as on QaTa-COV19.",
            "About 5 % of the images without ambiguity hold no opacity: empty mask, no report.",
        ],
    }

    def draw(index: int) -> dict[str, Phantom]:
        return readings_of(index, seed, size, ambiguous=ambiguous, text_share=text_share, framing=framing)

    write(out, card, draw, n=n, seed=seed, splits=splits, overwrite=overwrite)
