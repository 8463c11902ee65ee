"""The prognosis phantom: torsos in CT with a liver tumour, a record in words, and survival times from known hazards.

The hazard depends on two things that only the image shows (the tumour's volume and decay) and on two that only the
record tells (age and grade), so what each of them can be worth is known.
"""

from functools import cache
from pathlib import Path

import numpy as np
from phantom.parts import Volume, command, draw_word, index_of, write_volumes
from phantom.torso import EXTENT_MM, FRAME_NOTES, check_cube, draw_anatomy, prompts_of, scan
from volume_words import COLUMNS

from lib.data import PromptColumn

# ---------------------------------------------------------------------------------------------------------
# Words
# ---------------------------------------------------------------------------------------------------------

CLASSES = {"liver": "liver", "tumor": "liver tumor"}
SEXES = ("woman", "man")
SMOKING = ("non-smoker", "former smoker", "current smoker")
SMOKING_ODDS = (0.4, 0.35, 0.25)
GRADES, GRADE_ODDS = (1, 2, 3, 4), (0.2, 0.3, 0.3, 0.2)
PERFORMANCE, PERFORMANCE_ODDS = (0, 1, 2, 3), (0.35, 0.35, 0.2, 0.1)
RECORD = ("age", "sex", "smoking", "grade", "performance")
WORDINGS = (
    "{An} {age}-year-old {sex}, {smoking}, with a liver tumor of grade {grade}; performance status {performance}.",
    "Age {age}, {sex}; {smoking}; tumor grade {grade} of 4; performance status {performance}.",
    "This {sex} of {age} years has a grade {grade} tumor, is a {smoking} and has performance status {performance}.",
    "Performance status {performance}, {smoking}. {Sex}, {age} years. Histology: grade {grade}.",
    "Grade {grade} liver tumor in {an} {age}-year-old {sex}, performance status {performance}, {smoking}.",
)
# The same five forms about things on which no life depends: bed, ward, day, room and floor.
IDLE_WORDINGS = (
    "{An} {age}-day-old file, {sex} ward, {smoking}, with a bed in room {grade}; floor {performance}.",
    "Bed {age}, {sex} ward; {smoking}; room {grade} of 4; floor {performance}.",
    "This {sex} ward of {age} beds has a room {grade}, is open on {smoking} and lies on floor {performance}.",
    "Floor {performance}, {smoking}. {Sex} ward, {age} beds. Door: room {grade}.",
    "Room {grade} in {an} {age}-bed {sex} ward, floor {performance}, {smoking}.",
)
WARDS, DAYS = ("north", "south"), ("Monday", "Wednesday", "Friday")
TRUTH = "the truth, as a number: never to be shown to a model"
PROGNOSIS_PROMPTS = {
    **COLUMNS,
    "report": PromptColumn(role="report", origin="metadata", source="the patient's record in one of five wordings"),
    "report@irrelevant": PromptColumn(
        role="report", origin="template", source="the same forms with bed, ward, day, room and floor: no hazard in it"
    ),
    **{
        f"attribute.{name}": PromptColumn(role=f"attribute.{name}", origin="metadata", source=f"{name} in the record")
        for name in RECORD
    },
    **{
        f"attribute.{name}": PromptColumn(role=f"attribute.{name}", origin="class-oracle", source=f"{what}; {TRUTH}")
        for name, what in (
            ("image_risk", "log-hazard from the tumor's volume and texture"),
            ("record_risk", "log-hazard from age and grade"),
            ("texture", "decay of the tumor, from 0 to 1"),
        )
    },
}


def sentence(wording: str, said: dict) -> str:
    """A record in one of the wordings; said: its fields."""
    article = "an" if str(said["age"]).startswith("8") or said["age"] in (11, 18) else "a"
    return wording.format(**said, an=article, An=article.capitalize(), Sex=said["sex"].capitalize())


# ---------------------------------------------------------------------------------------------------------
# Hazards
# ---------------------------------------------------------------------------------------------------------

SIGNALS = ("both", "image", "record", "none")
RADII = (0.11, 0.22)  # of the tumours, drawn evenly on a log scale
VOLUME, TEXTURE, AGE, GRADE = 0.76, 0.62, 0.67, 0.76  # log-hazard per standard deviation
LOG_ML = (4.60, 0.59)  # mean and standard deviation of the log of the tumours' volumes (ml)
YEARS = (64.0, 11.0)
WEIBULL_SHAPE, WEIBULL_DAYS = 1.3, 900.0


def image_risk(volume_ml: float, texture: float) -> float:
    """The part of the log-hazard that the image shows."""
    return VOLUME * (np.log(volume_ml) - LOG_ML[0]) / LOG_ML[1] + TEXTURE * (texture - 0.5) * np.sqrt(12)


def record_risk(age: float, grade: float) -> float:
    """The part of the log-hazard that the record tells; sex, smoking and performance status have none."""
    return AGE * (age - YEARS[0]) / YEARS[1] + GRADE * (grade - 2.5) / 1.025


def survival(rng: np.random.Generator, risk: np.ndarray) -> np.ndarray:
    """Days until the event, from a Weibull distribution whose hazard is multiplied by exp(risk)."""
    return WEIBULL_DAYS * (rng.exponential(size=np.shape(risk)) / np.exp(risk)) ** (1 / WEIBULL_SHAPE)


@cache
def follow_up(signal: str, censored: float) -> float:
    """The longest follow-up in days with which uniform follow-up times censor this share of the patients."""
    if censored == 0:
        return np.inf
    rng, number = np.random.default_rng(0), 20_000
    volume_ml = np.exp(LOG_ML[0] + LOG_ML[1] * rng.uniform(-1, 1, number) * np.sqrt(3))
    image = image_risk(volume_ml, rng.uniform(size=number))
    record = record_risk(rng.normal(*YEARS, number), rng.choice(GRADES, number, p=GRADE_ODDS))
    days = survival(rng, image * (signal in ("both", "image")) + record * (signal in ("both", "record")))
    longest = np.geomspace(1, 1e7, 2000)
    shares = [np.minimum(days / most, 1).mean() for most in longest]  # chance that follow-up ends before the event
    return float(longest[np.argmin(np.abs(np.array(shares) - censored))])


# ---------------------------------------------------------------------------------------------------------
# Volumes and the dataset
# ---------------------------------------------------------------------------------------------------------


def draw_record(rng: np.random.Generator) -> dict:
    """Age, sex, smoking, grade and performance status of a patient, each drawn for itself."""
    return {
        "age": int(np.clip(np.round(rng.normal(*YEARS)), 30, 92)),
        "sex": str(rng.choice(SEXES)),
        "smoking": draw_word(rng, SMOKING, SMOKING_ODDS),
        "grade": int(rng.choice(GRADES, p=GRADE_ODDS)),
        "performance": int(rng.choice(PERFORMANCE, p=PERFORMANCE_ODDS)),
    }


def _idle(rng: np.random.Generator) -> dict:
    """Facts of no consequence under a record's names: beds for age, a ward for sex, and so on."""
    drawn = draw_record(rng)
    return drawn | {"sex": WARDS[SEXES.index(drawn["sex"])], "smoking": DAYS[SMOKING.index(drawn["smoking"])]}


def regenerate(case_id: str, seed: int = 0, size: int = 32, *, signal: str = "both", censored: float = 0.4) -> Volume:
    """Draw one patient of a prognosis dataset again; the arguments are those the dataset was written with."""
    index = index_of(case_id.partition(".")[0], "prognosis")
    rng = np.random.default_rng([seed, 30, index])
    anatomy = draw_anatomy(rng, size, tumor_share=1.0, host="liver", radii=RADII, textures=(0.0, 1.0))
    image = scan(np.random.default_rng([seed, 31, index]), anatomy, "CT")
    masks = {name: anatomy.masks[name] for name in CLASSES}
    volume_ml = masks["tumor"].sum() * (EXTENT_MM / size) ** 3 / 1000

    rng = np.random.default_rng([seed, 32, index])
    record = draw_record(rng)
    form = int(rng.integers(len(WORDINGS)))
    idle = _idle(rng)
    shown = image_risk(volume_ml, anatomy.texture) if signal in ("both", "image") else 0.0
    told = record_risk(record["age"], record["grade"]) if signal in ("both", "record") else 0.0
    rng = np.random.default_rng([seed, 33, index])
    days = max(1, int(np.ceil(survival(rng, shown + told))))
    seen = rng.uniform() * follow_up(signal, censored) if censored else np.inf
    outcome = (days, True) if days <= seen else (max(1, int(seen)), False)

    said = {
        "report": sentence(WORDINGS[form], record),
        "report@irrelevant": sentence(IDLE_WORDINGS[form], idle),
        **{f"attribute.{name}": str(record[name]) for name in RECORD},
        "attribute.image_risk": f"{shown:.4f}",
        "attribute.record_risk": f"{told:.4f}",
        "attribute.texture": f"{anatomy.texture:.4f}",
    }
    prompts = {name: columns | said for name, columns in prompts_of("CT", list(CLASSES), CLASSES).items()}
    traits = {"texture": anatomy.texture, "volume_ml": volume_ml, "days": days, **record}
    return Volume(image, masks, traits, prompts, (EXTENT_MM / size,) * 3, outcome)


def write_prognosis(
    out: Path,
    *,
    n: int = 480,
    size: int = 32,
    seed: int = 0,
    signal: str = "both",
    censored: float = 0.4,
    splits: tuple[float, ...] = (0.6, 0.15, 0.25),
    overwrite: bool = False,
) -> None:
    """Write a dataset folder of prognosis phantoms; raises ValueError for parameters out of range."""
    if signal not in SIGNALS:
        raise ValueError(f"signal is '{signal}', expected a source of the hazard: use one of {', '.join(SIGNALS)}.")
    if not 0 <= censored <= 0.95:
        raise ValueError(f"censored is {censored}, expected a share from 0 to 0.95: more would leave no events.")
    check_cube(size=size, shares={}, n=n, seed=seed)
    card = {
        "title": "Prognosis phantom: liver tumors in CT, records and survival",
        "modality": "abdominal CT with contrast, portal phase",
        "classes": {name: number for number, name in enumerate(CLASSES, start=1)},
        "source": command("prognosis", out, n=n, size=size, seed=seed, signal=signal, censored=censored, splits=splits),
        "prompts": PROGNOSIS_PROMPTS,
        "notes": [
            "Stored in [0, 1] from [-175, 250] HU.",
            *FRAME_NOTES,
            f"Survival in days is Weibull (shape {WEIBULL_SHAPE}, scale {WEIBULL_DAYS:g} days) with the log-hazard "
            f"{VOLUME} z(log tumor volume) + {TEXTURE} z(tumor texture) + {AGE} z(age) + {GRADE} z(grade), of which "
            f"signal = {signal} leaves what the image shows, what the record tells, both or none.",
            "Sex, smoking and performance status carry no hazard; nor does anything in report@irrelevant.",
            f"Follow-up ends at a random time that knows nothing of the patient, for {censored:.0%} before the event.",
            "attribute.image_risk, attribute.record_risk and attribute.texture are the truth, kept so that a ceiling "
            "can be computed: they must never be shown to a model.",
        ],
    }

    def draw(index: int) -> Volume:
        return regenerate(f"prognosis_{index:05d}", seed, size, signal=signal, censored=censored)

    write_volumes(out, card, draw, prefix="prognosis", n=n, seed=seed, splits=splits, overwrite=overwrite)
