"""What MedCLIP-SAMv2 says of an image: its prompt sets P0 to P5, sentences to hold against them, and its captions.

P0 is the bare target, P1 the class, P2 a sentence that any image of the kind could have, P3 a sentence of its class,
P4 and P5 stand for the mean embedding of the paper's twenty P2 or P3 sentences, here joined by SENTENCES in one cell.
"""

import argparse
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from lib.data import PromptColumn
from lib.files import DataError
from lib.text import SENTENCES

SOURCE = "MedCLIP-SAMv2 (github.com/HealthX-Lab/MedCLIP-SAMv2, 07047e3, MIT; arXiv:2409.19483)"
HOUSE = "the house's own sentence in the manner of MedCLIP-SAMv2"
FOLDER = Path("texts") / "medclip_samv2"
ORACLES = ("p1", "p3", "p5", "classoracle")  # they name the true class
MEANS = ("p4", "p5")
MEDCLIPSAM_COLUMN = PromptColumn(
    role="global", origin="class-oracle", source=f"{SOURCE}, the prompt of this test image, which names the true class"
)
UNLABELLED = (
    "There are no masks: every mask is empty and means nothing. For contrastive training, not for segmentation."
)
SHORTEST_CAPTION = 20
# Ours, as the paper does not say which characters it calls special.
SPECIAL = re.compile(r"[^A-Za-z0-9À-ÿ .,;:()/%+'-]")


@dataclass(frozen=True)
class Kind:
    """A class: its name, how it looks, what an image shows of it, and the paper's list of P3 sentences."""

    name: str
    look: str
    finding: str
    published: str = ""


@dataclass(frozen=True)
class Subject:
    """What the images of a dataset show, in the words of its prompts.

    scan and organ make `<scan> of the <organ>`; other_scan and other_organ are those of a wrong one; finding: what a
    prompt without the class says of the image; published: the paper's list of P2 sentences.
    """

    target: str
    scan: str
    organ: str
    other_scan: str
    other_organ: str
    finding: str
    look: str
    normal: str
    published: str
    kinds: dict[str, Kind] = field(default_factory=dict)


def _tumor(name: str, look: str, published: str) -> Kind:
    return Kind(f"{name} tumor", f"{look} suggestive of a {name} tumor", f" with a {name} tumor", published)


SUBJECTS = {
    "breast": Subject(
        target="breast tumor",
        scan="An ultrasound image",
        organ="breast",
        other_scan="A CT scan",
        other_organ="liver",
        finding=" with a tumor",
        look="a suspicious mass that stands out from its surroundings, suggestive of a breast tumor",
        normal="normal tissue and no mass",
        published="breast_tumor_P2_prompts",
        kinds={
            "benign": _tumor("benign breast", "a well-defined, oval, smooth mass", "benign_breast_tumor_P3_prompts"),
            "malignant": _tumor(
                "malignant breast", "an irregularly shaped, poorly defined mass", "malignant_breast_tumor_P3_prompts"
            ),
            "normal": Kind("normal breast", "normal tissue and no mass", " with normal tissue and no mass"),
        },
    ),
    "brain": Subject(
        target="brain tumor",
        scan="A contrast-enhanced T1 MRI slice",
        organ="brain",
        other_scan="An ultrasound image",
        other_organ="liver",
        finding=" with a tumor",
        look="a suspicious, enhancing mass, suggestive of a brain tumor",
        normal="normal tissue and no mass",
        published="brain_tumor_P2_prompts",
        kinds={
            "glioma": _tumor(
                "glioma",
                "an irregularly shaped, infiltrative mass with an enhancing ring",
                "glioma_brain_tumor_P3_prompts",
            ),
            "meningioma": _tumor(
                "meningioma", "a smooth, bright, dural-based mass", "meningioma_brain_tumor_P3_prompts"
            ),
            "pituitary": _tumor("pituitary", "a well-defined sellar mass", "pituitary_brain_tumor_P3_prompts"),
            "normal": Kind("normal brain", "normal tissue and no mass", " with normal tissue and no mass"),
        },
    ),
    "xray": Subject(
        target="lungs",
        scan="An X-ray",
        organ="lungs",
        other_scan="An ultrasound image",
        other_organ="hand",
        finding="",
        look="two air-filled lungs, healthy or diseased",
        normal="clear fields and no opacity",
        published="lung_xray_P2_prompts",
        kinds={
            "covid": Kind(
                "COVID-19 lungs",
                "hazy opacities in both lungs, suggestive of COVID-19 pneumonia",
                " with COVID-19 pneumonia",
                "covid_lung_P3_prompts",
            ),
            "pneumonia": Kind(
                "pneumonia lungs",
                "patchy opacities in the lungs, suggestive of pneumonia",
                " with pneumonia",
                "viral_pneumonia_lung_P3_prompts",
            ),
            "normal": Kind(
                "normal lungs",
                "clear lungs without opacities",
                " with clear fields and no opacity",
                "normal_lung_P3_prompts",
            ),
        },
    ),
    "ct": Subject(
        target="lungs",
        scan="A CT slice",
        organ="lungs",
        other_scan="An ultrasound image",
        other_organ="liver",
        finding="",
        look="two air-filled lungs, dark beside the heart",
        normal="clear fields and no opacity",
        published="lung_CT_P2_prompts",
    ),
}


def _texts(args: argparse.Namespace, name: str) -> dict:
    """A JSON file of the paper's texts from a mirror, or from texts/medclip_samv2 beside an archive; {} without."""
    given = args.mirror or getattr(args, "archive", None)
    places = [place / FOLDER / name for place in (given, given.parent)] if given else []
    path = next((place for place in places if place.is_file()), None)
    try:
        texts = json.loads(path.read_text(encoding="utf-8")) if path else {}
    except ValueError:
        texts = None
    if not isinstance(texts, dict):
        raise DataError(f"{path} is not a JSON table of sentences: copy the mirror's texts again.")
    return texts


def published_lists(args: argparse.Namespace) -> dict[str, list[str]]:
    """The paper's lists of sentences by name, {} where the mirror has no texts."""
    return _texts(args, "prompt_lists.json")


def published_prompts(args: argparse.Namespace, subject: str) -> dict[str, str]:
    """The paper's prompt for each test image (stem of its file -> sentence) of breast or brain, {} without texts."""
    return {Path(name).stem: text for name, text in _texts(args, f"{subject}_tumors_testing.json").items()}


class PromptSets:
    """The prompt columns of one subject, and their texts for an image of a class.

    subject: a key of SUBJECTS; lists: the paper's lists by name (see `published_lists`). Without lists P2 and P3 are
    the house's own sentences, and P4 and P5 are not there. Subjects without classes (ct) have no P1, P3 and P5.
    """

    def __init__(self, subject: str, lists: dict[str, list[str]] | None = None) -> None:
        self.subject, self.lists = SUBJECTS[subject], lists or {}
        needed = (self.subject, *self.subject.kinds.values())
        if self.lists and (lacking := [k.published for k in needed if k.published and not self.lists.get(k.published)]):
            raise DataError(f"The prompt lists lack '{lacking[0]}': copy the mirror's texts again.")
        generic, own = f"{SOURCE}, {self.subject.published}", f"{SOURCE}, the list of the class (P3_prompts)"
        mean = f"all its sentences, joined by '{SENTENCES}': the mean of their embeddings is meant"
        sources = {
            "p0": "P0: the target alone, named by the house",
            "p1": "P1: the class alone, named by the house",
            "p2": f"P2: {generic}, first sentence" if self.lists else f"P2: {HOUSE}",
            "p3": f"P3: {own}, first sentence; {HOUSE} where there is no list" if self.lists else f"P3: {HOUSE}",
            "p4": f"P4: {generic}, {mean}",
            "p5": f"P5: {own}, {mean}",
            "classfree": "the house's plain sentence without the class",
            "classoracle": "the house's plain sentence with the class",
            "wrong_organ": "classfree of another organ: false on purpose",
            "wrong_modality": "classfree of another modality: false on purpose",
            "normal": "classfree of a normal organ: false where there is a finding",
        }
        self.columns = {
            f"global@{name}": PromptColumn(
                role="global", origin="class-oracle" if name in ORACLES else "template", source=source
            )
            for name, source in sources.items()
            if (self.lists or name not in MEANS) and (self.subject.kinds or name not in ORACLES)
        }

    def of(self, kind: str = "") -> dict[str, str | None]:
        """The texts of an image: column -> text, None where its class has no such text."""
        subject, named = self.subject, kind.strip().lower()
        if subject.kinds and named not in subject.kinds:
            raise DataError(f"'{kind}' is not a class: expected {', '.join(subject.kinds)}; check the table.")
        shown = subject.kinds.get(named)
        image = f"{subject.scan} of the {subject.organ}"
        generic = self.lists.get(subject.published, [])
        texts = {
            "p0": subject.target,
            "p2": generic[0] if generic else f"{image} showing {subject.look}.",
            "p4": SENTENCES.join(generic),
            "classfree": f"{image}{subject.finding}.",
            "wrong_organ": f"{subject.scan} of the {subject.other_organ}{subject.finding}.",
            "wrong_modality": f"{subject.other_scan} of the {subject.organ}{subject.finding}.",
            "normal": f"{image} with {subject.normal}.",
        }
        if shown:
            own = self.lists.get(shown.published, [])
            texts |= {
                "p1": shown.name,
                "p3": own[0] if own else f"{image} showing {shown.look}.",
                "p5": SENTENCES.join(own),
                "classoracle": f"{image}{shown.finding}.",
            }
        return {column: texts[column.removeprefix("global@")] or None for column in self.columns}


def brain_class(kind: str) -> str:
    """The kind of a brain tumour as a class prompt, e.g. 'Glioma tumor.', or 'No tumor.' for normal."""
    named = kind.strip().lower()
    return "No tumor." if named == "normal" else f"{named.capitalize()} tumor."


def clean_caption(text: str) -> str | None:
    """A caption as the paper trains on it: without special characters, None if it is then below 20 characters."""
    cleaned = " ".join(SPECIAL.sub(" ", text).split())
    return cleaned if len(cleaned) >= SHORTEST_CAPTION else None
