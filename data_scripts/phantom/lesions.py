"""The lesion phantom: a torso with up to four lesions, each of which shows the eight attributes that its words name.

A disease is a combination of attribute values in an organ. Eight are met in training; four are only met in testing,
and of these the combinations are new, not the values. Axes are those of the torso phantom.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from phantom.parts import Volume, ball, check, command, index_of, ridge, rise, share_out, smooth_cube, write_volumes
from phantom.torso import Body
from scipy.ndimage import binary_dilation, distance_transform_edt

from lib.attributes import ATTRIBUTES, NO_FEATURES, VOCABULARY, Attributes, parse, prompts
from lib.data import PromptColumn

# ---------------------------------------------------------------------------------------------------------
# Diseases
# ---------------------------------------------------------------------------------------------------------

EXTENT_MM = 192.0  # edge of the cube that is shown
ROUND, IRREGULAR = VOCABULARY["shape"]
HYPO, ISO, HYPER = VOCABULARY["density"][:3]
EVEN, UNEVEN = VOCABULARY["variation"]
PLAIN, CONTRAST = VOCABULARY["enhancement"]
SHARP, VAGUE = VOCABULARY["surface"]
APART, CLOSE = VOCABULARY["relation"]
CALCIFIED, WALLED = "calcification", "a thick wall"

SITES = {  # place in words -> organ, and the side of which column (from the patient's left, 0 to 1) its middle lies
    "left kidney": ("left_kidney", 0, 1),
    "right kidney": ("right_kidney", 0, 1),
    "left liver": ("liver", 0, 0.53),
    "right liver": ("liver", 0.6, 1),
    "pancreatic tail": ("pancreas", 0, 0.45),
    "pancreatic head": ("pancreas", 0.55, 1),
    "left lower lobe": ("left_lung", 0, 1),
    "right lower lobe": ("right_lung", 0, 1),
    "spleen": ("spleen", 0, 1),
}
KIDNEY, LIVER, PANCREAS, LUNG, SPLEEN = (tuple(SITES)[2 * i : 2 * i + 2] for i in range(5))


@dataclass(frozen=True)
class Disease:
    """A combination of attribute values, the places where it grows, and whether it is met in training."""

    places: tuple[str, ...]
    shape: str
    density: str
    variation: str
    surface: str
    relation: str
    features: str
    seen: bool = True


VARYING = ("shape", "variation", "surface", "relation")  # what an untypical lesion may have otherwise
COMBINED = (*VARYING, "density", "features")
# Any two differ in two values or more. Over the seen ones the four attributes of VARYING are independent (half of
# 2^4, those with one or three of their second values); the unseen ones are of the other half, so that the four values
# of an unseen disease stand together in no seen one.
DISEASES = {
    "renal_cell_carcinoma": Disease(KIDNEY, IRREGULAR, ISO, UNEVEN, SHARP, CLOSE, NO_FEATURES),
    "renal_angiomyolipoma": Disease(KIDNEY, IRREGULAR, HYPER, EVEN, SHARP, APART, WALLED),
    "hepatic_adenoma": Disease(LIVER, ROUND, ISO, EVEN, VAGUE, APART, NO_FEATURES),
    "hepatic_metastasis": Disease(LIVER, ROUND, HYPO, UNEVEN, VAGUE, CLOSE, CALCIFIED),
    "pancreatic_cyst": Disease(PANCREAS, ROUND, HYPO, EVEN, SHARP, CLOSE, CALCIFIED),
    "pancreatic_abscess": Disease(PANCREAS, IRREGULAR, HYPO, UNEVEN, VAGUE, APART, WALLED),
    "lung_cancer": Disease(LUNG, IRREGULAR, HYPER, EVEN, VAGUE, CLOSE, NO_FEATURES),
    "lung_hamartoma": Disease(LUNG, ROUND, ISO, UNEVEN, SHARP, APART, CALCIFIED),
    "renal_cyst": Disease(KIDNEY, ROUND, HYPO, EVEN, SHARP, APART, NO_FEATURES, seen=False),
    "hepatocellular_carcinoma": Disease(LIVER, IRREGULAR, ISO, EVEN, VAGUE, APART, CALCIFIED, seen=False),
    "pancreatic_cancer": Disease(PANCREAS, IRREGULAR, HYPO, UNEVEN, VAGUE, CLOSE, NO_FEATURES, seen=False),
    "splenic_hematoma": Disease(SPLEEN, ROUND, HYPER, UNEVEN, SHARP, CLOSE, WALLED, seen=False),
}
SEEN = tuple(name for name, disease in DISEASES.items() if disease.seen)
UNSEEN = tuple(name for name, disease in DISEASES.items() if not disease.seen)
ELSEWHERE = "splenic_hematoma"  # the one in an organ without a seen lesion


def usual(name: str) -> Attributes:
    """What is usual in a disease; the place and the contrast agent are no matter of the disease."""
    disease = DISEASES[name]
    return Attributes(**{attribute: getattr(disease, attribute) for attribute in COMBINED})


def apart(one: Attributes | Disease, other: Attributes | Disease) -> int:
    """In how many of the values that make a disease two differ."""
    return sum(getattr(one, name) != getattr(other, name) for name in COMBINED)


def untypical(rng: np.random.Generator, name: str) -> Attributes:
    """A lesion of a disease with one value that is unusual in it, and yet nearer to it than to any other."""
    near = []
    for attribute in VARYING:
        values = [value for value in VOCABULARY[attribute] if value != getattr(DISEASES[name], attribute)]
        changed = replace(usual(name), **{attribute: values[0]})
        if all(apart(changed, other) > 1 for key, other in DISEASES.items() if key != name):
            near.append(changed)
    return near[rng.integers(len(near))] if near else usual(name)


# ---------------------------------------------------------------------------------------------------------
# Anatomy. Lengths in edges of the cube where the body's scale is 1.
# ---------------------------------------------------------------------------------------------------------

ORGANS = {  # organ -> tissue, centre, radii (along slices, rows, columns) and lean; later ones lie in front
    "left_kidney": ("kidney", (0.25, 0.35, 0.25), (0.20, 0.17, 0.165), 0.15),
    "right_kidney": ("kidney", (0.25, 0.35, 0.76), (0.20, 0.17, 0.165), -0.15),
    "pancreas": ("pancreas", (0.27, 0.68, 0.50), (0.175, 0.175, 0.34), 0.1),
    "spleen": ("spleen", (0.58, 0.40, 0.20), (0.18, 0.20, 0.165), 0.2),
    "liver": ("liver", (0.57, 0.52, 0.70), (0.19, 0.29, 0.24), 0.1),
}
LOBE = (0.58, 0.68, 0.43), (0.16, 0.20, 0.19)  # the left part of the liver
RADII = (0.115, 0.15)  # of a ball as large as the lesion
MOST = 4  # lesions in a volume
VESSELS = 3  # in an organ


@dataclass(frozen=True)
class Lesion:
    """A lesion as drawn.

    relative: [D, H, W] distance from its middle, 1 on its surface as drawn; radius: of a ball as large, in edges of the
    cube; mask: [D, H, W] bool; attributes: what it shows; host: its organ; touched: the organ it reaches, or None.
    """

    disease: str
    attributes: Attributes
    host: str
    touched: str | None
    relative: np.ndarray
    radius: float
    mask: np.ndarray


@dataclass(frozen=True)
class Anatomy:
    """What there is and where, before any scanner has looked at it.

    layers: (tissue, [D, H, W] share of each voxel), later ones in front; organs: organ -> [D, H, W] bool; vessels:
    [D, H, W] bool, those that no lesion covers.
    """

    layers: list[tuple[str, np.ndarray]]
    organs: dict[str, np.ndarray]
    vessels: np.ndarray
    lesions: tuple[Lesion, ...]
    contrast: bool


def draw_anatomy(rng: np.random.Generator, size: int, *, diseases: tuple[str, ...], typical: float) -> Anatomy:
    """Draw a torso with a lesion of each of the diseases, as far as there is room for them."""
    body = Body(rng, size)
    organs = _organs(body)
    contrast = bool(rng.random() < 0.6)
    lesions: list[Lesion] = []
    for name in diseases:
        attributes = usual(name) if rng.random() < typical else untypical(rng, name)
        if found := _grow(body, organs, lesions, name, attributes, contrast):
            lesions.append(found)
    covered = np.any([lesion.relative < 1.45 for lesion in lesions], axis=0) if lesions else np.zeros((size,) * 3, bool)
    vessels = np.maximum.reduce([share for tissue, share in body.layers if tissue == "vessel"]) > 0.5
    return Anatomy(body.layers, organs, vessels & ~covered, tuple(lesions), contrast)


def _organs(body: Body) -> dict[str, np.ndarray]:
    """Add wall, spine, bowel, organs and their vessels to a body; returns the masks of the organs."""
    rng, size, (z, y, x) = body.rng, body.size, body.at
    skin = ((np.abs(x - 0.5) / 0.50) ** 2.6 + (np.abs(y - 0.5) / 0.46) ** 2.6) ** (1 / 2.6)
    within = body.solid(skin, 0.46, 0.9)
    body.add("muscle", body.solid(skin, 0.46))
    body.add("fat", within)
    body.add("bone", body.tube(0.14, 0.5, 0.085, -1, 0.005))
    for _ in range(rng.integers(3, 6)):
        centre = rng.uniform((0.05, 0.55, 0.2), (0.3, 0.85, 0.8))
        body.add("gut", body.ball(centre, rng.uniform(0.05, 0.09, 3), rng.uniform(0, np.pi), 0.2) * within)
    found = {}
    for name, (tissue, middle, radii, lean) in ORGANS.items():
        centre, sizes = rng.normal(middle, 0.012), np.array(radii) * rng.uniform(0.94, 1.08, 3)
        share = body.ball(centre, sizes, lean, 0.08)
        if name == "liver":
            lobe = body.ball(rng.normal(LOBE[0], 0.012), np.array(LOBE[1]) * rng.uniform(0.94, 1.08, 3), -0.2, 0.08)
            share = np.maximum(share, lobe)
        found[name] = body.add(tissue, share * within)
    dome = 0.75 + 0.03 * np.cos(2 * np.pi * (x - 0.72)) - 0.35 * (y - 0.5) ** 2 + 0.01 * smooth_cube(rng, size, 3)
    for name, side in (("left_lung", -1), ("right_lung", 1)):
        found[name] = body.add("lung", rise(z, dome, 1 / size) * within * rise(side * (x - 0.5), 0.05, 1 / size))
    masks = {name: body.labels == number for name, number in found.items()}
    for mask in masks.values():
        for _ in range(VESSELS):
            body.add("vessel", 0.95 * _vessel(body, mask) * mask)
    body.add("vessel", body.tube(0.30, 0.45, 0.05, -1, 0.01) * (z < 0.75))
    return masks


def _vessel(body: Body, mask: np.ndarray) -> np.ndarray:
    """The share of each voxel in a straight vessel, two voxels wide, through a voxel of an organ."""
    rng, size = body.rng, body.size
    voxels = np.argwhere(mask)
    start, way = voxels[rng.integers(len(voxels))], rng.normal(size=3)
    way /= np.linalg.norm(way)
    z, y, x = (np.arange(size).reshape(np.roll((size, 1, 1), turn)) - start[turn] for turn in range(3))
    along = z * way[0] + y * way[1] + x * way[2]
    aside = np.sqrt(np.clip(z * z + y * y + x * x - along**2, 0, None)) * 32 / size
    return 1 - rise(aside, 1.0, 1.0)


def _grow(
    body: Body,
    organs: dict[str, np.ndarray],
    others: list[Lesion],
    name: str,
    attributes: Attributes,
    contrast: bool,
) -> Lesion | None:
    """Put a lesion where it fits: deep in its organ, or astride the border with a neighbour, as its relation says."""
    rng, size = body.rng, body.size
    taken = np.zeros((size,) * 3, bool)
    for other in others:
        taken |= binary_dilation(other.mask, iterations=max(2, size // 16))
    place = DISEASES[name].places[rng.integers(len(DISEASES[name].places))]
    host, low, high = SITES[place]
    inside = organs[host]
    elsewhere = np.any([mask for key, mask in organs.items() if key != host], axis=0)
    column = np.broadcast_to(body.at[2], inside.shape)
    centres = inside & (column >= low) & (column <= high)
    close = attributes.relation == CLOSE
    if close:  # where the organ is a voxel or two away from another
        centres &= binary_dilation(elsewhere, iterations=max(1, round(0.09 * size)))
    else:
        depth = distance_transform_edt(np.pad(inside, 1))[1:-1, 1:-1, 1:-1] * centres  # the cube ends there
        centres &= depth >= 0.75 * depth.max()
    voxels = np.argwhere(centres)
    if not len(voxels):
        return None
    radius = float(rng.uniform(*RADII))
    for attempt in range(40):
        voxel = tuple(voxels[rng.integers(len(voxels))])
        centre = np.array([float(np.broadcast_to(axis, inside.shape)[voxel]) for axis in body.at])
        shrunk = radius * (1 - 0.008 * attempt)
        relative = _form(body, centre, shrunk, attributes)
        mask = relative < 1
        ring = binary_dilation(mask) & ~mask
        if (mask & taken).any() or not _framed(mask):
            continue
        host_share, reach = inside[mask].mean(), (mask & elsewhere).sum()
        if close:
            fits = host_share > 0.45 and reach >= 0.08 * mask.sum()
        else:
            fits = host_share > 0.98 and inside[ring].mean() > 0.85 and not elsewhere[ring].any()
        if fits:
            touched = max(organs, key=lambda key: (organs[key] & mask).sum() if key != host else -1) if close else None
            said = replace(attributes, location=place, enhancement=CONTRAST if contrast else PLAIN)
            if said.surface == VAGUE:  # what is drawn is frayed, its mask is not
                relative = np.minimum(relative + 0.45 / (shrunk * size) * smooth_cube(rng, size, 16), 1.5)
            return Lesion(name, said, host, touched, relative, shrunk, mask)
    return None


def _framed(mask: np.ndarray) -> bool:
    """Whether a lesion lies in the cube as a whole."""
    return not any(np.take(mask, end, axis).any() for axis in range(3) for end in (0, -1))


def _form(body: Body, centre: np.ndarray, radius: float, attributes: Attributes) -> np.ndarray:
    """The relative radius of a lesion, 1 on its surface."""
    rng = body.rng
    if attributes.shape == ROUND:
        radii, lobes = radius * np.exp(rng.normal(0, 0.03, 3)), 0.03
    else:
        stretch = rng.uniform(1.4, 1.65)
        radii, lobes = radius * rng.permutation([stretch, stretch**-0.5, stretch**-0.5]), 0.42
    return ball(rng, body.at, centre, radii, rng.uniform(0, np.pi) if attributes.shape != ROUND else 0.0, lobes)


# ---------------------------------------------------------------------------------------------------------
# Scanners
# ---------------------------------------------------------------------------------------------------------

# Tissue -> brightness in CT, in T1-weighted MR and in MR in which fluid is bright (balanced steady state, T2/T1).
TISSUES = {
    "air": (0.0, 0.02, 0.02),
    "muscle": (0.40, 0.36, 0.26),
    "fat": (0.24, 0.74, 0.70),
    "bone": (0.80, 0.16, 0.14),
    "gut": (0.36, 0.34, 0.50),
    "kidney": (0.50, 0.42, 0.58),
    "pancreas": (0.42, 0.56, 0.44),
    "spleen": (0.54, 0.36, 0.62),
    "liver": (0.56, 0.52, 0.36),
    "lung": (0.34, 0.30, 0.34),
    "vessel": (0.0, 0.0, 0.0),  # see VESSEL
}
SCANS = ("CT", "T1", "T2")
# How far the inks of a lesion lie above its organ. Fluid lowers the density in CT and the signal in T1, and raises it
# where fluid is bright: there the density that the words name shows with the other sign.
INKS = {
    "CT": {HYPO: -0.22, ISO: 0.0, HYPER: 0.22, "patch": 0.22, "halo": -0.24, "wall": 0.30, "lime": 1.0},
    "T1": {HYPO: -0.20, ISO: 0.0, HYPER: 0.20, "patch": 0.20, "halo": -0.24, "wall": 0.30, "lime": 0.0},
    "T2": {HYPO: 0.22, ISO: 0.0, HYPER: -0.20, "patch": 0.20, "halo": -0.24, "wall": -0.30, "lime": 0.0},
}
VESSEL = {"CT": (-0.06, 0.85), "T1": (-0.14, 0.88), "T2": (0.05, 0.90)}  # above the organ without agent; with agent
GAIN = 0.05  # what the agent adds to an organ


def scan(rng: np.random.Generator, anatomy: Anatomy, weighting: str) -> np.ndarray:
    """What CT, T1 or T2 shows of an anatomy: [D, H, W] float32 in [0, 1]."""
    size = len(anatomy.vessels)
    column = SCANS.index(weighting)
    signal = {t: levels[column] * np.exp(0.05 * rng.standard_normal()) for t, levels in TISSUES.items()}
    if anatomy.contrast:
        signal |= {t: signal[t] + GAIN for t in ("kidney", "pancreas", "spleen", "liver")}
    level = np.full((size,) * 3, signal["air"], np.float32)
    for tissue, share in anatomy.layers:
        if tissue == "vessel":
            bright = VESSEL[weighting][1] if anatomy.contrast else level + np.float32(VESSEL[weighting][0])
            level = level + (bright - level) * share
        else:
            level = level + (np.float32(signal[tissue]) - level) * share
    level = level + 0.02 * smooth_cube(rng, size, 10)
    for lesion in anatomy.lesions:
        host = signal[ORGANS[lesion.host][0] if lesion.host in ORGANS else "lung"]
        level = _inked(rng, level, lesion, host, INKS[weighting], size)
    if weighting == "CT":
        level = level + rng.uniform(0.015, 0.03) * rng.standard_normal(level.shape, np.float32)
    else:  # unknown gain and contrast curve, a bias field and Rician noise
        level = np.clip(level, 0, None) ** rng.uniform(0.85, 1.2) * np.exp(0.10 * smooth_cube(rng, size, 2))
        noise = rng.uniform(0.015, 0.03) * rng.standard_normal((2, *level.shape), np.float32)
        level = np.hypot(level + noise[0], noise[1])
    return np.clip(level, 0, 1).astype(np.float32)


def _inked(
    rng: np.random.Generator, level: np.ndarray, lesion: Lesion, host: float, inks: dict[str, float], size: int
) -> np.ndarray:
    """Draw a lesion over what is there.

    A compressed rim shows the margin whatever the density, so that an isodense lesion can be seen: a thin dark line
    about a sharp one, a faint broad one about a vague one.
    """
    said, voxel = lesion.attributes, 32 / size  # of 32 along an edge: the drawing looks the same at every size
    depth = (lesion.relative - 1) * lesion.radius * size * voxel  # outwards, in such voxels
    sharp = said.surface == SHARP
    share = 1 - rise(depth, 0, 1.0 if sharp else 3.5)
    inside = host + inks[said.density]
    if said.variation == UNEVEN:
        patches = np.tanh(2 * smooth_cube(rng, size, 11))
        inside = inside + inks["patch"] * (patches - patches[lesion.mask].mean())
    level = level + (np.clip(inside, 0.02, 1) - level) * share
    line = ridge(depth - 0.7, 0.5) if sharp else 0.6 * ridge(depth - 0.6, 1.4)
    level = level + inks["halo"] * line * (1 - rise(lesion.relative, 1.36, 0.26))  # the radius is not told from 1.5 on
    if said.features == WALLED:
        level = level + inks["wall"] * ridge(depth + 0.7, 0.5)
    elif said.features == CALCIFIED:
        deep = np.argwhere((lesion.relative > 0.4) & (lesion.relative < 0.75))
        for speck in deep[rng.integers(len(deep), size=2)] if len(deep) else ():
            z, y, x = (np.arange(size).reshape(np.roll((size, 1, 1), turn)) - speck[turn] for turn in range(3))
            away = np.sqrt(z * z + y * y + x * x) * voxel
            # In MR what has no signal takes signal from around it.
            level = level + (inks["lime"] - level) * (1 - rise(away, 0.9 if inks["lime"] else 1.1, 1.0))
    return level


# ---------------------------------------------------------------------------------------------------------
# Reports
# ---------------------------------------------------------------------------------------------------------

# Value -> how writers put it. The last way of some is one that the rules of lib.attributes do not know.
SPOKEN = {
    ROUND: ("round", "rounded", "oval", "ball-shaped"),
    IRREGULAR: ("irregular", "lobulated", "irregularly shaped", "bizarre"),
    HYPO: ("hypodense", "low-density", "hypoattenuating", "dark"),
    ISO: ("isodense", "isoattenuating", "isodense", "equally dense"),
    HYPER: ("hyperdense", "hyperattenuating", "hyperdense", "bright"),
    EVEN: ("homogeneous internal density", "uniform density", "an even interior"),
    UNEVEN: ("heterogeneous internal density", "inhomogeneous density", "uneven density", "a mottled interior"),
    SHARP: ("well-defined margins", "a sharp border", "a smooth, distinct edge", "a crisp rim"),
    VAGUE: ("ill-defined margins", "an indistinct border", "a blurred edge", "fading into the tissue around it"),
    NO_FEATURES: ("",),
    CALCIFIED: ("with calcification", "containing coarse calcification"),
    WALLED: ("with a thick wall", "showing a thick wall"),
}
RELATIONS = {
    APART: (
        "It is not closely related to other organs.",
        "It does not touch neighbouring organs.",
        "It lies within its organ on all sides.",
    ),
    CLOSE: (
        "It is closely related to the {}.",
        "It is in close relationship with the {}.",
        "It abuts the {}.",
    ),
}
PREFIXES = {CONTRAST: ("Contrast-enhanced {}: ", "{} with contrast: "), PLAIN: ("Non-contrast {}: ", "Unenhanced {}: ")}
FORMS = (
    "{article} {shape} {density} lesion is seen in the {location}, with {inside}{features}.",
    "In the {location} there is {article} {shape} {density} lesion with {inside}{features}.",
    "{article} {density} lesion of {shape} shape in the {location}, with {inside}{features}.",
)
SILENT = 0.12  # chance that an attribute is left out


def write_report(rng: np.random.Generator, said: Attributes, modality: str, touched: str | None) -> str:
    """A report of a lesion in varied words, which leaves out some of what it shows."""

    def words(name: str) -> str:
        value = getattr(said, name)
        ways = SPOKEN[value]
        way = ways[rng.integers(len(ways))]
        return "" if rng.random() < SILENT else way

    inside = " and ".join(part for part in (words("variation"), words("surface")) if part) or "nothing else of note"
    features = words("features")
    form = FORMS[rng.integers(len(FORMS))]
    shape = words("shape")
    if not shape:
        form = form.replace(" of {shape} shape", "")
    text = form.format(
        article="a",
        shape=shape,
        density=words("density"),
        location=said.location or "organ",
        inside=inside,
        features=f", {features}" if features else "",
    )
    text = " ".join(text.split())
    if rng.random() >= SILENT:
        ways = RELATIONS[said.relation]
        text += " " + ways[rng.integers(len(ways))].format(touched or "neighbouring organs")
    text = _articled(text)
    starts = PREFIXES.get(said.enhancement, ("",))
    start = starts[rng.integers(len(starts))].format(modality)
    return start + text[0].upper() + text[1:]


def _articled(text: str) -> str:
    """The text with 'an' where a vowel follows."""
    words = text.split(" ")
    return " ".join(
        "an" if word == "a" and after[:1] in "aeiou" and after[:3] != "uni" else word
        for word, after in zip(words, [*words[1:], ""], strict=True)
    )


# ---------------------------------------------------------------------------------------------------------
# Volumes and datasets
# ---------------------------------------------------------------------------------------------------------

COLUMNS = {
    **{
        f"attribute.{name}": PromptColumn(
            role=f"attribute.{name}", origin="metadata", source="what the lesion was drawn with, or is usual if absent"
        )
        for name in ATTRIBUTES
    },
    **{
        f"attribute.{name}@known": PromptColumn(
            role=f"attribute.{name}", origin="class-oracle", source="what is usual in the disease, in every volume"
        )
        for name in ATTRIBUTES
    },
    **{
        f"attribute.{name}@parsed": PromptColumn(
            role=f"attribute.{name}", origin="metadata", source="read from the report by rules (lib.attributes.parse)"
        )
        for name in ATTRIBUTES
    },
    **{
        f"attribute.{name}@other": PromptColumn(
            role=f"attribute.{name}", origin="metadata", source="what the next lesion of the volume was drawn with"
        )
        for name in ATTRIBUTES
    },
    "report": PromptColumn(role="report", origin="template", source="what the lesion was drawn with, in varied words"),
    "class": PromptColumn(role="class", origin="template", source="name of the disease, in every volume"),
}


def drawn(rng: np.random.Generator, split: str) -> tuple[str, ...]:
    """Draw the diseases of a volume: one to four seen ones; in the test split two to four, half of them unseen."""
    number = int(rng.choice(np.arange(1, MOST + 1), p=(0.2, 0.3, 0.3, 0.2) if split != "test" else (0, 0.3, 0.4, 0.3)))
    if split != "test":
        return tuple(rng.choice(SEEN, number, replace=False).tolist())
    unseen = (number + int(rng.integers(2))) // 2
    chosen = [*rng.choice(UNSEEN, unseen, replace=False), *rng.choice(SEEN, number - unseen, replace=False)]
    return tuple(str(name) for name in rng.permutation(chosen))


def regenerate(
    case_id: str, seed: int = 0, size: int = 32, *, split: str = "train", typical: float = 0.8, weighting: str = "T1"
) -> Volume:
    """Draw one volume of a lesion dataset again, lesions_ct_00001 or one of its cases lesions_ct_00001.renal_cyst.

    The arguments are those the dataset was written with, and the split is that of the case, as only test volumes hold
    unseen diseases. traits: "anatomy". Raises ValueError for another kind of case id.
    """
    volume = case_id.partition(".")[0]
    kind = "lesions_mr" if volume.startswith("lesions_mr") else "lesions_ct"
    index = index_of(volume, kind)
    rng = np.random.default_rng([seed, 30, index])
    anatomy = draw_anatomy(rng, size, diseases=drawn(rng, split), typical=typical)
    shown = weighting if kind == "lesions_mr" else "CT"
    image = scan(np.random.default_rng([seed, 31 + SCANS.index(shown), index]), anatomy, shown)
    words = np.random.default_rng([seed, 34, index])
    masks, told = {}, {}
    for name in DISEASES:
        lesion = next((one for one in anatomy.lesions if one.disease == name), None)
        said = lesion.attributes if lesion else usual(name)
        touched = lesion.touched.replace("_", " ") if lesion and lesion.touched else None
        report = write_report(words, said, "CT" if shown == "CT" else "MR", touched)
        masks[name] = lesion.mask if lesion else np.zeros_like(anatomy.vessels)
        told[name] = {
            **prompts(said),
            **prompts(usual(name), "@known"),
            **prompts(parse(report), "@parsed"),
            **prompts(_after(anatomy.lesions, name), "@other"),
            "report": report,
            "class": name.replace("_", " "),
        }
    return Volume(image, masks, {"anatomy": anatomy}, told, (EXTENT_MM / size,) * 3)


def _after(lesions: tuple[Lesion, ...], name: str) -> Attributes:
    """What the lesion after that of a disease shows; nothing where there is no other, or not even this one."""
    names = [lesion.disease for lesion in lesions]
    if name not in names or len(names) < 2:
        return Attributes()
    return lesions[(names.index(name) + 1) % len(names)].attributes


def write_lesions(
    out: Path,
    *,
    modality: str,
    kind: str = "",
    n: int = 420,
    size: int = 32,
    seed: int = 0,
    typical: float = 0.8,
    weighting: str = "T1",
    splits: tuple[float, ...] = (0.65, 0.1, 0.25),
    overwrite: bool = False,
) -> None:
    """Write a dataset folder of lesion phantoms as CT or MR; raises ValueError for parameters out of range.

    kind: the command that the card names, where it is not that of the modality.
    """
    check(size=size, smallest=32, shares={"typical": typical}, n=n, seed=seed, dots="voxels")
    if weighting not in SCANS[1:]:
        raise ValueError(f"weighting is {weighting}, expected a way to weight MR: use {' or '.join(SCANS[1:])}.")
    prefix = f"lesions_{modality.lower()}"
    options = {"n": n, "size": size, "seed": seed, "typical": typical}
    if modality == "MR":
        options["weighting"] = weighting
    split = share_out([f"patient_{i:05d}" for i in range(1, n + 1)], splits, seed)
    card = {
        "title": f"Lesion phantom in {modality}",
        "modality": "abdominal CT" if modality == "CT" else f"abdominal MR, {weighting}-weighted",
        "classes": {name: number for number, name in enumerate(DISEASES, start=1)},
        "source": command(kind or prefix, out, splits=splits, **options),
        "prompts": COLUMNS,
        "notes": _notes(modality, weighting),
    }

    def draw(index: int) -> Volume:
        part = split[f"patient_{index:05d}"]
        return regenerate(f"{prefix}_{index:05d}", seed, size, split=part, typical=typical, weighting=weighting)

    write_volumes(out, card, draw, prefix=prefix, n=n, seed=seed, splits=splits, overwrite=overwrite)


def _notes(modality: str, weighting: str) -> list[str]:
    contrast = {
        "CT": "Brightness rises with density.",
        "T1": "In T1 what is dense is bright, as in CT, but the organs stand in another order, calcification is black "
        "and the curve from signal to brightness differs from patient to patient.",
        "T2": "Here fluid is bright: a lesion that the words call hypodense is brighter than its organ, walls and "
        "calcification are dark.",
    }["CT" if modality == "CT" else weighting]
    return [
        f"Unseen diseases, in no training or validation volume: {', '.join(UNSEEN)}. Seen ones: {', '.join(SEEN)}.",
        "Every value of shape, density, variation, surface, relation and features of an unseen disease is that of some "
        "seen one, and so is every place, but for the spleen: "
        f"{ELSEWHERE} is the unseen disease in an organ that holds no seen lesion.",
        "Every disease has a mask in every volume, empty where it is absent; attribute.location is empty just there, "
        "so that a model that reads it is told whether the lesion is there.",
        "An absent disease has the attributes that are usual in it, without location and enhancement.",
        "The words are those of CT density in every modality. " + contrast,
        "phantom_lesions_ct and _mr made with one seed, n, size, typical and splits hold the same patients with the "
        "same lesions: a network that is trained on one and tested on another must keep to the splits.",
        "A lesion that is not typical has one unusual value of shape, variation, surface or relation.",
        "Axes run from the feet to the head, from back to front and from the patient's left to the right; an "
        "augmentation that mirrors left and right makes locations wrong.",
    ]
