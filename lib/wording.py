"""Other wordings of a prompt: the word lists, and the functions that rewrite one text with a random generator."""

import random
import re
from collections.abc import Callable, Iterable

# Words that may stand for one another without a change of meaning.
SYNONYMS: dict[str, tuple[str, ...]] = {
    "anechoic": ("echo-free",),
    "hypoechoic": ("low-echo", "echo-poor"),
    "isoechoic": ("equal-echo", "of equal echogenicity"),
    "hyperechoic": ("high-echo", "echo-rich"),
    "complex cystic-solid": ("mixed cystic and solid",),
    "hypodense": ("low-density", "low-attenuation"),
    "isodense": ("equal-density",),
    "hyperdense": ("high-density", "high-attenuation"),
    "mass": ("lesion", "tumour"),
    "lesion": ("mass", "focal abnormality"),
    "tumor": ("mass", "neoplasm"),
    "tumour": ("mass", "neoplasm"),
    "irregular": ("not regular", "uneven"),
    "regular": ("even", "not irregular"),
    "oval": ("elliptical", "egg-shaped"),
    "round": ("circular", "spherical"),
    "circumscribed": ("well-defined", "sharply defined"),
    "not circumscribed": ("ill-defined",),
    "indistinct": ("ill-defined", "blurred"),
    "angular": ("sharp-cornered",),
    "microlobulated": ("finely lobulated",),
    "spiculated": ("spiky", "stellate"),
    "margin": ("border", "edge"),
    "shape": ("form",),
    "posterior shadowing": ("acoustic shadow behind it",),
    "posterior enhancement": ("increased echoes behind it",),
    "parallel": ("wider than tall",),
    "not parallel": ("taller than wide",),
    "ultrasound": ("sonography", "sonogram"),
    "small": ("little", "minor"),
    "medium": ("middle-sized", "moderate"),
    "large": ("big", "sizeable"),
    "upper": ("superior",),
    "lower": ("inferior",),
    "center": ("middle",),
    "benign": ("non-cancerous", "innocent"),
    "malignant": ("cancerous",),
    "homogeneous": ("uniform",),
    "heterogeneous": ("mixed", "non-uniform"),
    "bilateral": ("two-sided",),
    "unilateral": ("one-sided",),
    "pulmonary infection": ("lung infection", "infection of the lungs"),
    "infection": ("infectious change",),
    "infected": ("affected",),
    "area": ("region", "zone"),
    "areas": ("regions", "zones"),
    "all": ("the whole", "the entire"),
    "located in": ("lying in", "seen in"),
    "image": ("picture", "frame"),
    "circle": ("circular", "disc-like"),
    "white": ("whitish", "pale"),
    "yellow": ("yellowish",),
    "pink": ("pinkish",),
    "red": ("reddish",),
    "brown": ("brownish",),
    "polyp": ("polypoid growth",),
}

# Descriptor -> values that exclude one another, each with its spellings; a wrong value is another row's first.
DESCRIPTORS: dict[str, tuple[tuple[str, ...], ...]] = {
    "outline": (
        ("circle-shaped", "round-shaped", "oval-shaped"),
        ("square-shaped", "rectangle-shaped", "diamond-shaped"),
        ("star-shaped",),
        ("triangle-shaped", "triangular-shaped"),
        ("kidney-shaped",),
    ),
    "shape": (
        ("oval", "elliptical", "elongated"),
        ("round", "circular", "circle", "round-like"),
        ("irregular",),
    ),
    "regularity": (("regular",), ("irregular",)),
    "relief": (("flat",), ("triangular",), ("round",)),
    "margin": (
        ("circumscribed", "well-defined", "smooth"),
        ("indistinct", "ill-defined", "not circumscribed"),
        ("angular",),
        ("microlobulated", "lobulated"),
        ("spiculated",),
    ),
    "echo": (
        ("anechoic",),
        ("hypoechoic",),
        ("isoechoic",),
        ("hyperechoic",),
        ("complex cystic-solid", "complex cystic and solid"),
    ),
    "density": (("hypodense",), ("isodense",), ("hyperdense",)),
    "texture": (("homogeneous",), ("heterogeneous",)),
    "posterior": (
        ("posterior shadowing", "posterior acoustic shadowing", "acoustic shadowing", "shadowing"),
        ("posterior enhancement", "posterior acoustic enhancement"),
        ("no posterior features",),
        ("combined posterior features",),
    ),
    "orientation": (("parallel",), ("not parallel",)),
    "tissue": (("fatty",), ("fibroglandular",)),
    "side": (("left",), ("right",)),
    "laterality": (("unilateral",), ("bilateral",)),
    "level": (("upper",), ("lower",), ("middle",)),
    "zones": (("upper middle lower", "all"), ("upper middle",), ("middle lower",), ("upper lower",)),
    "position": (("top",), ("bottom",), ("center", "centre", "central")),
    "size": (("small", "tiny"), ("medium",), ("large", "big")),
    "colour": (("white",), ("yellow", "orange"), ("red", "pink"), ("brown", "tan"), ("black",)),
    "silhouette": (("heart",), ("kidney",), ("octagon",), ("donut",)),
    "pathology": (("benign",), ("malignant",)),
}
WRONG_VALUES: dict[str, tuple[str, ...]] = {}
for _rows in DESCRIPTORS.values():
    for _row in _rows:
        for _word in _row:
            WRONG_VALUES.setdefault(_word, tuple(other[0] for other in _rows if other is not _row))

# English -> (German, Spanish), phrases before words.
GLOSSARY: dict[str, tuple[str, str]] = {
    "ultrasound of a breast mass": ("Ultraschall eines Knotens der Brust", "Ecografía de un nódulo mamario"),
    "breast ultrasound showing a mass": ("Brustultraschall mit Knoten", "Ecografía mamaria con un nódulo"),
    "sonogram of a breast lesion": ("Sonogramm einer Brustläsion", "Ecograma de una lesión mamaria"),
    "in the breast ultrasound image": ("im Ultraschallbild der Brust", "en la ecografía de mama"),
    "ultrasound shows a": ("Der Ultraschall zeigt einen", "La ecografía muestra un"),
    "breast ultrasound": ("Brustultraschall", "ecografía de mama"),
    "no posterior features": ("keine dorsalen Schallphänomene", "sin rasgos posteriores"),
    "combined posterior features": ("gemischte dorsale Schallphänomene", "rasgos posteriores combinados"),
    "posterior shadowing": ("dorsaler Schallschatten", "sombra acústica posterior"),
    "posterior enhancement": ("dorsale Schallverstärkung", "refuerzo acústico posterior"),
    "complex cystic-solid": ("komplex zystisch-solide", "complejo sólido-quístico"),
    "not circumscribed": ("nicht umschrieben", "no circunscrito"),
    "not parallel": ("nicht parallel", "no paralelo"),
    "bilateral pulmonary infection": ("beidseitige Lungeninfektion", "infección pulmonar bilateral"),
    "unilateral pulmonary infection": ("einseitige Lungeninfektion", "infección pulmonar unilateral"),
    "pulmonary infection": ("Lungeninfektion", "infección pulmonar"),
    "involving": ("mit Befall von", "que afecta a"),
    "with involvement of": ("und Beteiligung:", "con afectación de"),
    "regions": ("Regionen", "regiones"),
    "all left lung": ("gesamte linke Lunge", "todo el pulmón izquierdo"),
    "all right lung": ("gesamte rechte Lunge", "todo el pulmón derecho"),
    "left lung": ("linke Lunge", "pulmón izquierdo"),
    "right lung": ("rechte Lunge", "pulmón derecho"),
    "chest radiograph": ("Röntgenaufnahme des Brustkorbs", "radiografía de tórax"),
    "colonoscopy": ("Koloskopie", "colonoscopia"),
    "located in": ("gelegen", "situado"),
    "of the image": ("im Bild", "de la imagen"),
    "top left": ("oben links", "arriba a la izquierda"),
    "top right": ("oben rechts", "arriba a la derecha"),
    "bottom left": ("unten links", "abajo a la izquierda"),
    "bottom right": ("unten rechts", "abajo a la derecha"),
    "top": ("oben", "arriba"),
    "bottom": ("unten", "abajo"),
    "center": ("Mitte", "centro"),
    "white": ("weiß", "blanco"),
    "yellow": ("gelb", "amarillo"),
    "orange": ("orange", "naranja"),
    "red": ("rot", "rojo"),
    "pink": ("rosa", "rosado"),
    "brown": ("braun", "marrón"),
    "black": ("schwarz", "negro"),
    "triangular": ("dreieckig", "triangular"),
    "heart": ("herzförmig", "corazón"),
    "kidney polyp": ("nierenförmiger Polyp", "pólipo en forma de riñón"),
    "infected areas": ("infizierte Bereiche", "zonas infectadas"),
    "infected area": ("infizierter Bereich", "zona infectada"),
    "at the top left": ("oben links", "arriba a la izquierda"),
    "at the top right": ("oben rechts", "arriba a la derecha"),
    "at the bottom left": ("unten links", "abajo a la izquierda"),
    "at the bottom right": ("unten rechts", "abajo a la derecha"),
    "at the center": ("in der Mitte", "en el centro"),
    "at the left": ("links", "a la izquierda"),
    "at the right": ("rechts", "a la derecha"),
    "at the top": ("oben", "arriba"),
    "at the bottom": ("unten", "abajo"),
    "approximately": ("etwa", "de aproximadamente"),
    "pixels near": ("Pixel bei", "píxeles cerca de"),
    "linear probe": ("Linearsonde", "sonda lineal"),
    "oval": ("oval", "ovalado"),
    "round": ("rund", "redondo"),
    "circle": ("kreis", "círculo"),
    "irregular": ("unregelmäßig", "irregular"),
    "regular": ("regelmäßig", "regular"),
    "circumscribed": ("umschrieben", "circunscrito"),
    "indistinct": ("unscharf", "indistinto"),
    "angular": ("winklig", "angulado"),
    "microlobulated": ("mikrolobuliert", "microlobulado"),
    "spiculated": ("spikuliert", "espiculado"),
    "anechoic": ("echofrei", "anecoico"),
    "hypoechoic": ("echoarm", "hipoecoico"),
    "isoechoic": ("echogleich", "isoecoico"),
    "hyperechoic": ("echoreich", "hiperecoico"),
    "hypodense": ("hypodens", "hipodenso"),
    "isodense": ("isodens", "isodenso"),
    "hyperdense": ("hyperdens", "hiperdenso"),
    "homogeneous": ("homogen", "homogéneo"),
    "heterogeneous": ("heterogen", "heterogéneo"),
    "fatty": ("fettig", "graso"),
    "fibroglandular": ("fibroglandulär", "fibroglandular"),
    "parallel": ("parallel", "paralelo"),
    "shaped": ("förmig", "en forma"),
    "shape": ("Form", "forma"),
    "margin": ("Rand", "margen"),
    "tissue": ("Gewebe", "tejido"),
    "masses": ("Knoten", "nódulos"),
    "mass": ("Knoten", "nódulo"),
    "lesion": ("Läsion", "lesión"),
    "tumors": ("Tumoren", "tumores"),
    "tumor": ("Tumor", "tumor"),
    "polyp": ("Polyp", "pólipo"),
    "breast": ("Brust", "mama"),
    "lung": ("Lunge", "pulmón"),
    "kidney": ("Niere", "riñón"),
    "liver": ("Leber", "hígado"),
    "unilateral": ("einseitig", "unilateral"),
    "bilateral": ("beidseitig", "bilateral"),
    "benign": ("gutartig", "benigno"),
    "malignant": ("bösartig", "maligno"),
    "small": ("klein", "pequeño"),
    "medium": ("mittelgroß", "mediano"),
    "large": ("groß", "grande"),
    "upper": ("obere", "superior"),
    "middle": ("mittlere", "medio"),
    "lower": ("untere", "inferior"),
    "left": ("links", "izquierdo"),
    "right": ("rechts", "derecho"),
    "one": ("ein", "un"),
    "two": ("zwei", "dos"),
    "three": ("drei", "tres"),
    "four": ("vier", "cuatro"),
    "five": ("fünf", "cinco"),
    "six": ("sechs", "seis"),
    "no": ("kein", "sin"),
    "of the": ("des", "del"),
    "with": ("mit", "con"),
    "and": ("und", "y"),
    "present": ("vorhanden", "presente"),
    "region": ("Bereich", "región"),
    "in": ("in", "en"),
}

# {t}: the text with a small first letter and no full stop.
REWORDINGS = (
    "The image shows the following: {t}.",
    "Findings: {t}.",
    "On this examination we see {t}.",
    "Described as: {t}.",
    "What can be seen here is {t}.",
)
NUMBERS = ("one", "two", "three", "four", "five", "six")
KEYBOARD = ("qwertyuiop", "asdfghjkl", "zxcvbnm")


def _pattern(words: Iterable[str]) -> re.Pattern:
    longest_first = sorted(words, key=lambda w: (-len(w), w))
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)", re.IGNORECASE)


def _like(word: str, new: str) -> str:
    """Give the new words the capital letter of the old ones."""
    return new[:1].upper() + new[1:] if word[:1].isupper() else new


_SYNONYM, _DESCRIPTOR, _ENGLISH = _pattern(SYNONYMS), _pattern(WRONG_VALUES), _pattern(GLOSSARY)
_NUMBER, _SIDE = _pattern(NUMBERS), _pattern(("left", "right"))
_WHERE = re.compile(r" (?:at|in|on) the(?: (?:top|bottom|left|right|center|centre|upper|lower|middle))+(?!\w)")
_BIRADS = re.compile(r"(BI-?RADS(?: category)?[ :]*)([0-6])[A-Ca-c]?(?!\w)", re.IGNORECASE)
_AREAS = re.compile(rf"(?<!\w)({'|'.join(NUMBERS)}) +infected +areas?(?!\w)", re.IGNORECASE)
_LUNGS = re.compile(r"((?:all|upper|middle|lower)[ \w]* left lung) and ((?:the )?[ \w]+ right lung)", re.IGNORECASE)
_BOX = re.compile(r"(\d+)( ?[×x] ?)(\d+)(?= pixels)")
_PLACE = re.compile(r"(near \()(\d+)(, )(\d+)\)")


def paraphrase(text: str, rng: random.Random) -> str:
    bare = text.strip().rstrip(".")
    if not bare:
        return text
    # Short descriptor clauses may stand in any order; a comma inside parentheses or a longer phrase stays.
    head, *tail = re.split(r",\s+(?![^()]*\))", bare)
    if len(tail) >= 2 and all(len(clause.split()) <= 4 for clause in tail):
        turn = rng.randrange(1, len(tail))
        tail = tail[turn:] + tail[:turn]
    bare = _LUNGS.sub(r"\2 and \1", ", ".join([head, *tail]))
    acronym = any(c.isupper() or c.isdigit() for c in bare.split()[0][1:])  # keeps its capitals
    return rng.choice(REWORDINGS).format(t=bare if acronym else bare[:1].lower() + bare[1:])


def synonym(text: str, rng: random.Random) -> str:
    return _SYNONYM.sub(lambda m: _like(m[0], rng.choice(SYNONYMS[m[0].lower()])), text)


def _misspellings(word: str) -> list[str]:
    """Every word that one neighbouring key, one swap of letters or one lost letter makes of this one."""
    made = set()
    for i, letter in enumerate(word):
        row = next((r for r in KEYBOARD if letter.lower() in r), "")
        at = row.find(letter.lower())
        made |= {word[:i] + _like(letter, row[j]) + word[i + 1 :] for j in (at - 1, at + 1) if 0 <= j < len(row)}
        made |= {word[:i] + word[i + 1 :], word[:i] + word[i + 1 : i + 2] + letter + word[i + 2 :]}
    return sorted(made - {word, ""})


def typo(text: str, rng: random.Random) -> str:
    spans = [m.span() for m in re.finditer(r"[^\W\d_]+", text)]
    words = [s for s in spans if s[1] - s[0] >= 3] or [s for s in spans if _misspellings(text[slice(*s)])]
    for start, end in sorted(rng.sample(words, min(len(words), max(1, round(0.15 * len(spans))))), reverse=True):
        text = text[:start] + rng.choice(_misspellings(text[start:end])) + text[end:]
    return text


def wrong_attribute(text: str, rng: random.Random) -> str:
    chosen: dict[str, str] = {}  # a word that occurs twice gets the same wrong value twice

    def wrong(match: re.Match) -> str:
        word = match[0].lower()
        if word not in chosen:
            chosen[word] = rng.choice(WRONG_VALUES[word])
        return _like(match[0], chosen[word])

    def wrong_place(match: re.Match) -> str:
        x, y = int(match[2]), int(match[4])
        x, y = (y, x) if x != y else (2 * x + 8, y // 2)
        return f"{match[1]}{x}{match[3]}{y})"

    text = wrong_number(_DESCRIPTOR.sub(wrong, text), rng)
    text = _BIRADS.sub(lambda m: m[1] + rng.choice([k for k in "2345" if k != m[2]]), text)
    text = _BOX.sub(lambda m: f"{2 * int(m[1]) + 1}{m[2]}{2 * int(m[3]) + 1}", text)
    return _PLACE.sub(wrong_place, text)


def _other_number(rng: random.Random) -> Callable[[re.Match], str]:
    return lambda match: _like(match[0], rng.choice([n for n in NUMBERS if n != match[0].lower()]))


def wrong_number(text: str, rng: random.Random) -> str:
    """Count something else: "two infected areas" becomes "four infected areas"."""
    text = _NUMBER.sub(_other_number(rng), text)
    return _AREAS.sub(lambda m: f"{m[1]} infected area{'s' * (m[1].lower() != 'one')}", text)


def swapped_side(text: str, rng: random.Random) -> str:
    """Write right for left and left for right."""
    return _SIDE.sub(lambda m: _like(m[0], "right" if m[0].lower() == "left" else "left"), text)


def vague(text: str, rng: random.Random) -> str:
    """Keep the first clause without its descriptors and numbers: what is meant, and nothing of how or where."""
    head = re.split(r",\s+(?![^()]*\))| involving | which ", text.strip().rstrip("."))[0]
    bare = " ".join(_NUMBER.sub("", _DESCRIPTOR.sub("", _WHERE.sub("", head))).split())
    return _like(text, bare) + "." if bare else text


def other_language(text: str, rng: random.Random) -> str:
    language = rng.randrange(2)
    return _ENGLISH.sub(lambda m: _like(m[0], GLOSSARY[m[0].lower()][language]), text)


# Name -> function (text, rng) -> text.
REWRITES: dict[str, Callable[[str, random.Random], str]] = {
    "paraphrase": paraphrase,  # same content in another sentence, clauses in another order
    "synonym": synonym,  # word by word
    "typo": typo,  # one wrong letter in about 15 % of the words, at least in one
    "wrong_attribute": wrong_attribute,  # every descriptor has another value
    "wrong_number": wrong_number,
    "swapped_side": swapped_side,
    "vague": vague,
    "other_language": other_language,  # German or Spanish word for word from a glossary, not a translation
}
