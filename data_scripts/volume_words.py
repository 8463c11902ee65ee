"""The prompts of volumes with several structures: DuPLUS's context (T1) and target (T2) sentences and variants."""

from lib.data import PromptColumn
from lib.files import DataError
from lib.text import TEMPLATES, render

WORDS = TEMPLATES["volume"]
MODALITIES = {"CT": "computed tomography", "MR": "magnetic resonance imaging", "PET": "positron emission tomography"}
SOURCE = "DuPLUS's sentences (github.com/BioMedIA-MBZUAI/DuPLUS, 924beb3, MIT)"
PARAPHRASES = {  # the four that stand beside the first sentence in DuPLUS's dictionary of class prompts
    "target@second": "There is {organ} in this {modality} scan.",
    "target@third": "{organ} observed in {modality} scan imaging.",
    "target@fourth": "{modality} scan revealing a {organ}.",
    "target@fifth": "Identification of a {organ} through {modality} scan.",
}
COLUMNS = {
    "context": PromptColumn(role="context", origin="metadata", source=f"modality and region in {SOURCE}"),
    **{
        f"context@{short.lower()}": PromptColumn(
            role="context", origin="template", source=f"the same sentence with {long}, true or not"
        )
        for short, long in MODALITIES.items()
    },
    "context@wrong": PromptColumn(
        role="context",
        origin="template",
        source="the same sentence with another modality: MR for CT, PET for MR, CT for PET",
    ),
    "target": PromptColumn(role="target", origin="template", source=f"name of the structure in {SOURCE}"),
    **{
        column: PromptColumn(role="target", origin="template", source=f"a paraphrase of {SOURCE}")
        for column in PARAPHRASES
    },
    "target@plain": PromptColumn(role="target", origin="template", source="the structure's name alone, no modality"),
    "target@other": PromptColumn(
        role="target", origin="template", source="the sentence of another structure of the same volume: a wrong target"
    ),
    "target@released": PromptColumn(
        role="target", origin="template", source=f"words run together as in {SOURCE}, where they are"
    ),
    "target@synonym": PromptColumn(role="target", origin="template", source="another name of the structure (ours)"),
    "target@free": PromptColumn(role="target", origin="template", source="a request in free words (ours)"),
    "attribute.modality": PromptColumn(role="attribute.modality", origin="metadata", source="CT, MR or PET"),
}


def volume_prompts(
    modality: str,
    region: str,
    structure: str,
    other: str | None = None,
    *,
    scan: str | None = None,
    released: str | None = None,
    synonym: str | None = None,
    free: str | None = None,
) -> dict[str, str | None]:
    """Write the prompts of one structure of one volume, column -> text; raises DataError for an unknown modality.

    modality: CT, MR or PET; structure, other: names in plain words ("right kidney"); scan: what T1 calls the scan where
    that is more than the modality ("T1-weighted in-phase magnetic resonance imaging"); released, synonym: other
    spellings of the name; free: a whole sentence.
    """
    if modality not in MODALITIES:
        raise DataError(f"'{modality}' is not a modality: use {', '.join(MODALITIES)}.")
    long = MODALITIES[modality]
    names = list(MODALITIES)
    wrong = MODALITIES[names[(names.index(modality) + 1) % len(names)]]

    def named(name: str | None) -> str | None:
        return name and render(WORDS["target"], modality=long, organ=name)

    def placed(name: str) -> str:
        return render(WORDS["context"], modality=name, region=region)

    return {
        "context": placed(scan or long),
        **{
            f"context@{short.lower()}": placed(scan or long if short == modality else name)
            for short, name in MODALITIES.items()
        },
        "context@wrong": placed(wrong),
        "target": named(structure),
        **{column: form.format(organ=structure, modality=long) for column, form in PARAPHRASES.items()},
        "target@plain": structure,
        "target@other": named(other),
        "target@released": named(released or structure.replace(" ", "")),
        "target@synonym": named(synonym),
        "target@free": free,
        "attribute.modality": modality,
    }
