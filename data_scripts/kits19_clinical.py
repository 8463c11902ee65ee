"""Make the dataset folder of KiTS19's clinical records (no images; survival after surgery) from a mirror or archive.

python data_scripts/kits19_clinical.py --mirror ../shared/data --out data/kits19_clinical
python data_scripts/kits19_clinical.py --archive ~/Downloads/kits19/data --out data/kits19_clinical
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from common import find, make_splits, run, unpacked
from volumes import survival

from lib.data import SPLITS, DatasetWriter, PromptColumn
from lib.files import DataError
from lib.text import render

NAME = "kits19_clinical"
WHERE = "from https://github.com/neheller/kits19 (data/kits.json)"
SHARES = (0.6, 0.1, 0.3)  # a larger test split than elsewhere, as so few died
BEFORE = (
    "Patient with a kidney tumor[ of {size} cm on the scan][, {age} years][, {sex}][, body mass index {bmi}]"
    "[, {smoking}], {comorbidities}."
)
AFTER = (
    "Pathology after[ {procedure}]: {histology}[ of {size} cm][, ISUP grade {grade}][, {necrosis}], "
    "stage T{t} N{n} M{m}."
)
SMOKING = {
    "never_smoked": "never smoked",
    "previous_smoker": "previous smoker",
    "current_smoker": "current smoker",
}
HISTOLOGY = {
    "clear_cell_rcc": "clear cell renal cell carcinoma",
    "papillary": "papillary renal cell carcinoma",
    "chromophobe": "chromophobe renal cell carcinoma",
    "clear_cell_papillary_rcc": "clear cell papillary renal cell carcinoma",
    "multilocular_cystic_rcc": "multilocular cystic renal cell carcinoma",
    "rcc_unclassified": "unclassified renal cell carcinoma",
    "mest": "mixed epithelial and stromal tumor",
    "urothelial": "urothelial carcinoma",
    "wilms": "Wilms tumor",
}
NEEDED = (
    "case_id",
    "age_at_nephrectomy",
    "gender",
    "body_mass_index",
    "comorbidities",
    "smoking_history",
    "radiographic_size",
    "pathologic_size",
    "pathology_t_stage",
    "pathology_n_stage",
    "pathology_m_stage",
    "tumor_histologic_subtype",
    "tumor_necrosis",
    "tumor_isup_grade",
    "surgical_procedure",
    "vital_status",
    "vital_days_after_surgery",
)
CARD = {
    "title": "KiTS19, clinical records and survival of patients with kidney tumors",
    "modality": "clinical record",
    "dims": 0,
    "classes": {},
    "level": "R",
    "licence": "CC BY-NC-SA 4.0 (data/LICENSE of the repository).",
    "citation": (
        "Heller N, Sathianathen N, Kalapara A, et al. The KiTS19 challenge data: 300 kidney tumor cases with clinical "
        "context, CT semantic segmentations, and surgical outcomes. arXiv:1904.00445."
    ),
    "source": WHERE.split()[1],
    "splits": "Ours, by patient, seeded and stratified by death: train/val/test 60/10/30 %.",
    "prompts": {
        "report": PromptColumn(
            role="report", origin="metadata", source="what is known before surgery, as a sentence (ours)"
        ),
        "report@pathology": PromptColumn(
            role="report", origin="metadata", source="what surgery and pathology added, as a sentence (ours)"
        ),
        "report@both": PromptColumn(role="report", origin="metadata", source="the two sentences together"),
    },
}


def named(condition: str) -> str:
    """An illness in words, e.g. chronic_kidney_disease -> chronic kidney disease."""
    return {"copd": "COPD", "aids": "AIDS"}.get(condition, condition.replace("_", " "))


def before(patient: dict) -> str:
    """What is known of a patient before surgery, in a sentence."""
    ill = [named(condition) for condition, present in patient["comorbidities"].items() if present]
    return render(
        BEFORE,
        age=patient["age_at_nephrectomy"],
        sex=patient["gender"],
        bmi=patient["body_mass_index"],
        smoking=SMOKING.get(patient["smoking_history"]),
        comorbidities="with " + " and ".join(ill) if ill else "without other illness on record",
        size=patient["radiographic_size"],
    )


def after(patient: dict) -> str:
    """What surgery and pathology added, in a sentence."""
    subtype = patient["tumor_histologic_subtype"]
    return render(
        AFTER,
        procedure=(patient["surgical_procedure"] or "").replace("_", " "),
        histology=HISTOLOGY.get(subtype, (subtype or "no histology").replace("_", " ")),
        size=patient["pathologic_size"],
        grade=patient["tumor_isup_grade"],
        necrosis={True: "with necrosis", False: "without necrosis"}.get(patient["tumor_necrosis"]),
        **{letter: patient[f"pathology_{letter}_stage"] or "X" for letter in "tnm"},
    )


def read_patients(path: Path) -> list[dict]:
    """The patients of kits.json, each with all that is needed."""
    try:
        patients = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} cannot be read as JSON: get it again.") from error
    if not isinstance(patients, list) or not patients:
        raise DataError(f"{path} is no list of patients: give kits.json of the repository.")
    for patient in patients:
        for column in NEEDED:
            if column not in patient:
                raise DataError(
                    f"{path} lacks '{column}' for patient '{patient.get('case_id')}': it is not the table this script "
                    "was written for."
                )
    return patients


def build(args: argparse.Namespace) -> None:
    """Write the folder from all patients with a follow-up."""
    with unpacked(args) as (folder, origin):
        mirrored = folder / "kits19_masks_clinical_malenia" / "kits.json"
        table = mirrored if args.mirror and mirrored.is_file() else find(folder, "kits.json")
        patients = read_patients(table)
    outcomes = {
        p["case_id"]: survival(
            table, p["case_id"], p["vital_days_after_surgery"], p["vital_status"], "dead", "censored"
        )
        for p in patients
    }
    followed = [patient for patient in patients if outcomes[patient["case_id"]][0] > 0]
    if not followed:
        raise DataError(f"{table} has no patient with a follow-up of more than 0 days: get it again.")
    names = [patient["case_id"] for patient in followed]
    split = make_splits(names, [str(outcomes[name][1]) for name in names], SHARES)
    deaths = {part: sum(outcomes[name][1] for name in names if split[name] == part) for part in SPLITS}
    notes = [
        f"Only {sum(deaths.values())} of {len(names)} patients died while they were followed ("
        + ", ".join(f"{part} {number}" for part, number in deaths.items())
        + "), so that every index of concordance has a wide interval.",
        f"{len(patients) - len(names)} patients without follow-up (0 days) were left out.",
        "Time runs from surgery to death of any cause, or to the last visit.",
        "The stage is the pathological one and so not known before surgery; a solid tumor among the other illnesses "
        "can be the kidney tumor itself.",
        "The patients are those of KiTS19 with the same case ids: do not train on images of its test patients here.",
        origin,
    ]
    print(f"writing {len(names)} records")
    with DatasetWriter(args.out, CARD | {"notes": notes}, overwrite=args.overwrite) as writer:
        for patient in followed:
            name, told = patient["case_id"], (before(patient), after(patient))
            writer.add_record(
                case_id=name,
                patient_id=name,
                split=split[name],
                prompts={"report": told[0], "report@pathology": told[1], "report@both": " ".join(told)},
                outcome=outcomes[name],
            )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    run(NAME, build, __doc__, WHERE, argv=argv)


if __name__ == "__main__":
    main()
