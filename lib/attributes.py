"""The eight visual attributes of a lesion: their values, one sentence for each, and how a report is read for them.

The values are those of the table that was released with Malenia (github.com/Yankai96/Malenia, 6955662), in words.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas

# ----------------------------------------------------------------------------------------------------------
# Values
# ----------------------------------------------------------------------------------------------------------

ATTRIBUTES = ("location", "shape", "density", "variation", "enhancement", "surface", "relation", "features")
NO_FEATURES = "no specific features"
# Lesion -> what its location codes mean, from 1 on.
PLACES = {
    "renal cell carcinoma": ("left kidney", "right kidney"),
    "renal cyst": ("left kidney", "right kidney"),
    "hepatocellular carcinoma": ("left liver", "right liver"),
    "pancreatic cancer": ("pancreatic head", "pancreatic body", "pancreatic tail"),
    "pancreatic cyst": ("pancreatic head", "pancreatic body", "pancreatic tail"),
    "colorectal cancer": ("ascending colon", "transverse colon", "descending colon", "sigmoid colon"),
    "lung cancer": ("left upper lobe", "left lower lobe", "right upper lobe", "right middle lobe", "right lower lobe"),
}
# Attribute -> its values in the order of their codes, from 1 on. Location and features may have others too.
VOCABULARY: dict[str, tuple[str, ...]] = {
    "location": tuple(dict.fromkeys(place for places in PLACES.values() for place in places)),
    "shape": ("round-like", "irregular"),
    "density": ("hypodense", "isodense", "hyperdense", "mixed density (ground-glass and soft tissue)"),
    "variation": ("homogeneous", "heterogeneous"),
    "enhancement": ("non-contrast CT", "contrast-enhanced CT"),
    "surface": ("well-defined margin", "ill-defined margin"),
    "relation": ("not closely related to surrounding organs", "closely related to surrounding organs"),
    "features": (NO_FEATURES,),
}
OPEN = ("location", "features")  # attributes with values beyond the vocabulary
TABLE = {name: name for name in ATTRIBUTES[:-1]} | {"variation": "density_variation", "relation": "organ_relation"}


@dataclass(frozen=True)
class Attributes:
    """What is said of a lesion: a value for each attribute, None where nothing is said."""

    location: str | None = None
    shape: str | None = None
    density: str | None = None
    variation: str | None = None
    enhancement: str | None = None
    surface: str | None = None
    relation: str | None = None
    features: str | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value, known = getattr(self, field.name), VOCABULARY[field.name]
            if value is not None and field.name not in OPEN and value not in known:
                raise ValueError(
                    f"The attribute '{field.name}' of a lesion is '{value}': use {' or '.join(known)}, or None."
                )


def decode(lesion: str, codes: Mapping[str, object]) -> Attributes:
    """Read one row of the released table, which has no code for the features.

    lesion: a key of PLACES; codes: attribute -> the integer, also as text. What the key does not explain, such as a
    12 that was meant as 1 or 2, becomes None. Raises ValueError for a lesion that is not in the table.
    """
    if lesion not in PLACES:
        raise ValueError(f"'{lesion}' is no lesion of the released table: use {', '.join(PLACES)}.")
    known = VOCABULARY | {"location": PLACES[lesion]}
    found = {}
    for name in TABLE:
        code = re.fullmatch(r"([1-9]\d*)(?:\.0)?", str(codes.get(name, "")).strip())
        place = int(code[1]) if code else 0
        found[name] = known[name][place - 1] if 0 < place <= len(known[name]) else None
    return Attributes(**found)


# ----------------------------------------------------------------------------------------------------------
# Sentences
# ----------------------------------------------------------------------------------------------------------

SENTENCES = {
    "location": "The lesion is in the {}.",
    "shape": "The shape of the lesion is {}.",
    "density": "The lesion is {}.",
    "variation": "The inside of the lesion is {}.",
    "enhancement": "The scan is a {}.",
    "surface": "The lesion has a {}.",
    "relation": "The lesion is {}.",
    "features": "The lesion shows {}.",
}
# Values that need a sentence of their own; that of the scan names no modality, so that it is true of MR too.
SPOKEN = {
    "contrast-enhanced CT": "The scan was taken with contrast agent.",
    "non-contrast CT": "The scan was taken without contrast agent.",
    "ill-defined margin": "The lesion has an ill-defined margin.",
    VOCABULARY["density"][3]: f"The lesion is of {VOCABULARY['density'][3]}.",
}


def sentence(name: str, value: str | None) -> str | None:
    """Say one attribute in a sentence, the same value always in the same words; None for None."""
    if name not in SENTENCES:
        raise ValueError(f"'{name}' is no attribute of a lesion: use {', '.join(ATTRIBUTES)}.")
    return (SPOKEN.get(value) or SENTENCES[name].format(value)) if value else None


def prompts(attributes: Attributes, suffix: str = "") -> dict[str, str | None]:
    """The prompt columns of a lesion: attribute.<name><suffix> -> sentence or None, in the order of ATTRIBUTES."""
    return {f"attribute.{name}{suffix}": sentence(name, getattr(attributes, name)) for name in ATTRIBUTES}


# ----------------------------------------------------------------------------------------------------------
# Reports
# ----------------------------------------------------------------------------------------------------------


_LINE = r"(?:margins?|borders?|edges?|outlines?|boundar(?:y|ies)|demarcation|interface|separation)"
_VAGUE = r"(?:ill|poorly)[- ]defined|indistinct|unclear|blurred|rough(?:ened)?\b|spiculated"
_CLEAR = r"well[- ]defined|well[- ]circumscribed|sharp(?:ly)?|distinct|clear|smooth"
_GREY = r"(?:internal |in )?(?:density|densities|attenuation)"
_LOW = r"low(?:er)?|decreased|reduced|slightly decreased"
_ORGANS = (  # what borders on a lesion without being the organ that it lies in
    r"(?:adjacent|surrounding|neighbou?ring|nearby) (?!bowel wall|lung|parenchyma)|liver|spleen|gallbladder|stomach|"
    r"gastric|duoden|psoas|muscle|pleura|chest wall|mediastin|bladder|organs"
)


def _rules(*patterns: tuple[str, str]) -> tuple[tuple[str, re.Pattern], ...]:
    return tuple((value, re.compile(pattern, re.I)) for value, pattern in patterns)


# A report says of an attribute what matches first in it; at one place the rule that stands first here wins.
RULES: dict[str, tuple[tuple[str, re.Pattern], ...]] = {
    "enhancement": _rules(
        ("non-contrast CT", r"non-?contrast|unenhanced|without contrast|plain CT"),
        ("contrast-enhanced CT", r"contrast-enhanced|with contrast|(?:marked|moderate|mild|strong) enhancement"),
    ),
    "location": _rules(
        *((f"{side} kidney", rf"\b{side} (?:kidney|renal)") for side in ("left", "right")),
        *((f"{side} liver", rf"\b{side} (?:hepatic|liver|lobe of the liver)") for side in ("left", "right")),
        *((f"pancreatic {part}", rf"\bpancreatic {part}\b") for part in ("head", "body", "tail")),
        *((place, rf"\b{place}\b") for place in VOCABULARY["location"] if place.endswith(("colon", "lobe"))),
    ),
    "shape": _rules(
        ("irregular", r"irregular(?:ly)?(?: shaped)?\b(?! margin)|lobulated|patchy|elongated|linear hypodense"),
        ("round-like", r"\b(?:round(?:ed|ish|-like)?|oval|spherical)\b"),
    ),
    "density": _rules(
        ("hypodense", rf"hypo-?(?:dense|attenuating)|(?:{_LOW}) {_GREY}|{_GREY}(?: is)?(?: slightly)? lower"),
        ("isodense", rf"iso-?(?:dense|attenuating|attenuation)|{_GREY}(?: is)? similar"),
        ("hyperdense", rf"hyper-?(?:dense|attenuating)|{_GREY}(?: is)?(?: slightly)? higher"),
        (VOCABULARY["density"][3], r"mixed(?: irregular| round-like)? nodule|ground-glass"),
    ),
    "variation": _rules(
        ("heterogeneous", r"heterogeneous|inhomogeneous|uneven"),
        ("homogeneous", r"homogeneous|uniform"),
    ),
    "surface": _rules(
        ("ill-defined margin", rf"(?:{_VAGUE})[^.]*?\b{_LINE}|{_LINE}[^.,]*?\b(?:{_VAGUE})|serosal surface"),
        ("well-defined margin", rf"\b(?:{_CLEAR})[^.]*?\b{_LINE}|{_LINE}[^.,]*?\b(?:{_CLEAR})"),
    ),
    "relation": _rules(
        (VOCABULARY["relation"][0], r"\bnot close(?:ly)?|\bno close relation|\bnot touch|surrounded by its organ"),
        (
            VOCABULARY["relation"][1],
            rf"\bclose(?:ly)? (?:related|relationship|to)\b"
            rf"|(?:{_VAGUE}) {_LINE} (?:with|from|between)(?:(?!\bno)[^.])*?\b(?:{_ORGANS})",
        ),
    ),
}


def _first(name: str, text: str) -> str | None:
    """The value of the rule that matches first in a text."""
    found = [(match.start(), value) for value, rule in RULES[name] if (match := rule.search(text))]
    return min(found, key=lambda one: one[0])[1] if found else None


# What reports tell beyond the seven, in words of ours, so that the same finding is always the same string.
FINDINGS = _rules(
    ("calcification", r"calcifi"),
    ("a thick wall", r"thick(?:ened)?[- ]wall"),
    ("hypodense areas", r"(?:hypodense|hypoattenuating|low-attenuation) (?:area|region)|areas of low attenuation"),
    (
        "hyperdense foci",
        r"(?:hyperdense|hyperattenuating|high-(?:density|attenuation)) (?:foci|areas|structures)|hyperdensit"
        r"|(?:areas|foci) of (?:high (?:density|attenuation)|hyperattenuation)",
    ),
    ("cavitation", r"cavitat"),
    ("internal septa", r"septa"),
    ("dilatation of the pancreatic duct", r"duct(?:al)?(?: is)?(?: mildly)? dilat|dilatation of the pancreatic duct"),
    ("pancreatic atrophy", r"atroph"),
    ("pleural retraction", r"pleural (?:re)?traction"),
    ("converging vessels", r"(?:vessel|vascular) convergence|converging vessels"),
    ("tortuous vessels", r"tortuo"),
    ("stranding around it", r"strand|exudat"),
    ("small nodules around it", r"small nod"),
    ("enlarged lymph nodes", r"lymph"),
    ("changed bronchi", r"bronchial narrowing|bronchiectasis|changed bronchi"),
)


def parse(report: str | None) -> Attributes:
    """Read a report by rules; an attribute that it does not mention is None.

    The margin of a lesion and its borders with other organs are told in the same words: what stands from the relation
    to the end of its sentence is not read for the surface. Nor are findings in a lesion read for its own density.
    """
    if not report or not report.strip():
        return Attributes()
    heard = dict.fromkeys(RULES, report)
    for _, rule in RULES["relation"]:
        heard["surface"] = re.sub(rf"(?:{rule.pattern})[^.]*", "", heard["surface"], flags=re.I)
    for _, rule in FINDINGS:
        heard["density"] = rule.sub("", heard["density"])
    return Attributes(**{name: _first(name, text) for name, text in heard.items()}, features=features(report))


def features(report: str | None) -> str | None:
    """What a report tells beyond the seven: its findings in the order of FINDINGS, or that there are none.

    None without a report. What a report denies, as "no pancreatic duct dilatation", is not read.
    """
    if not report or not report.strip():
        return None
    said = re.sub(r"\b(?:no|without) [^.,;]*", "", report, flags=re.I)
    return " and ".join(value for value, rule in FINDINGS if rule.search(said)) or NO_FEATURES


# ----------------------------------------------------------------------------------------------------------
# The released table
# ----------------------------------------------------------------------------------------------------------


def described(row: Mapping[str, str]) -> Attributes:
    """What a row of the released table in words says of its lesion, with the features that its report tells.

    row: lesion, report, and the columns of TABLE, empty where the table says nothing.
    """
    if missing := {"report", *TABLE.values()} - set(row):
        raise ValueError(f"A row of the attribute table lacks '{min(missing)}': give the table in words, with reports.")
    return Attributes(**{name: row[column] or None for name, column in TABLE.items()}, features=features(row["report"]))


def knowledge(rows: Iterable[Mapping[str, str]], diseases: Iterable[str] | None = None) -> dict[str, Attributes]:
    """What is usual in each disease: the most frequent value of each attribute over its rows (of `described`).

    Location and enhancement are None: where a lesion lies and how it was scanned are no matter of the disease. Raises
    ValueError if one of the diseases asked for has no row.
    """
    found: dict[str, list[Attributes]] = {}
    for row in rows:
        found.setdefault(row["lesion"], []).append(described(row))
    for disease in diseases or ():
        if disease not in found:
            raise ValueError(
                f"The attribute table has no row of '{disease}': use {', '.join(found) or 'another table'}."
            )
    told = [name for name in ATTRIBUTES if name not in ("location", "enhancement")]
    table = {}
    for disease in diseases or found:
        counts = {name: Counter(getattr(one, name) for one in found[disease]) for name in told}
        usual = {name: [value for value, _ in count.most_common() if value] for name, count in counts.items()}
        table[disease] = Attributes(**{name: values[0] for name, values in usual.items() if values})
    return table


def agreement(rows: Iterable[Mapping[str, str]]) -> "pandas.DataFrame":
    """Hold the parser against the table: a row for each of the seven with n, said, right, wrong and unsaid.

    n: rows in which the table has a value; said: those of them in which the report says one, right or wrong; unsaid:
    those in which it says none. The rules were written with these reports at hand, so other reports are read worse.
    """
    import pandas

    counts = {name: Counter() for name in TABLE}
    for row in rows:
        true, read = described(row), parse(row["report"])
        for name, count in counts.items():
            if (value := getattr(true, name)) is None:
                continue
            said = getattr(read, name)
            count.update(("n", "unsaid") if said is None else ("n", "said", "right" if said == value else "wrong"))
    table = pandas.DataFrame({name: dict(count) for name, count in counts.items()}).T
    return table.reindex(columns=["n", "said", "right", "wrong", "unsaid"]).fillna(0).astype(int)
