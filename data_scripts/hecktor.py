"""Make a dataset folder of HECKTOR 2022 (PET or CT of the head and neck, tumors, relapse) from the archive.

python data_scripts/hecktor.py --modality pet --archive ~/Downloads/hecktor2022_training.zip --out data/hecktor_pet
python data_scripts/hecktor.py --modality ct --archive ~/Downloads/hecktor2022_training.zip --out data/hecktor_ct
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from common import find, read_table, require, run, unpacked
from volumes import Layout, Structure, choose, find_scans, structures, survival, write

from lib.data import PromptColumn
from lib.files import DataError
from lib.text import render

CLINICAL = "Gender,Age,Weight,Tobacco,Alcohol,Performance status,HPV status,Surgery,Chemotherapy"
RECORD = (
    "Patient with a tumor of the head and neck[, {age} years][, {sex}][, {weight} kg][, {tobacco}][, {alcohol}]"
    "[, performance status {status}][, {hpv}][, {surgery}], treated with radiotherapy[, {chemotherapy}]."
)
PET = Layout(
    name="hecktor_pet",
    title="HECKTOR 2022, FDG-PET of the head and neck with tumors, and relapse",
    modality="PET",
    region="head and neck",
    structures=structures(
        Structure("primary tumor", key="GTVp", released="GTVp"),
        Structure("lymph node metastases", key="GTVn", released="GTVn"),
    ),
    image="imagesTr/{case}__PT.nii",
    mask="labelsTr/{case}.nii",
    onto_mask=True,
    splits="Ours, by patient, seeded and stratified by relapse: train/val/test 70/10/20 %.",
    licence="For research, after approval of a request and under its agreement; recalled, not verified.",
    citation="Andrearczyk V, Oreiller V, Abobakr M, et al. Overview of the HECKTOR challenge at MICCAI 2022. (2023).",
    where="from https://hecktor.grand-challenge.org/Data (request)",
    columns={
        "report": PromptColumn(
            role="report", origin="metadata", source="the clinical table as a sentence: what is known after treatment"
        )
    },
)
CT = replace(
    PET,
    name="hecktor_ct",
    title=PET.title.replace("FDG-PET", "CT"),
    modality="CT",
    image="imagesTr/{case}__CT.nii",
    onto_mask=False,
)
LAYOUTS = {"pet": PET, "ct": CT}


def clinical_table(folder: Path, pattern: str, columns: Sequence[str]) -> dict[str, dict[str, str]]:
    """The rows of a clinical table by patient; what headers have in brackets is left out."""
    path = find(folder, pattern)
    rows = [{key.split(" (")[0].strip(): (cell or "").strip() for key, cell in row.items()} for row in read_table(path)]
    require(rows, ("PatientID", *columns), path)
    return {row["PatientID"]: row for row in rows}


def record(row: dict[str, str]) -> str | None:
    """A patient's row of the clinical table in a sentence, without what is not known."""

    def told(column: str, yes: str, no: str) -> str | None:
        return {"1": yes, "0": no}.get(row[column].removesuffix(".0"))

    def number(column: str) -> str | None:
        try:
            return f"{float(row[column]):g}" if row[column] else None
        except ValueError as error:
            raise DataError(
                f"The clinical table gives patient '{row['PatientID']}' the {column} '{row[column]}': expected a "
                "number or nothing."
            ) from error

    return render(
        RECORD,
        age=number("Age"),
        sex={"M": "male", "F": "female"}.get(row["Gender"][:1].upper()),
        weight=number("Weight"),
        tobacco=told("Tobacco", "smoker", "non-smoker"),
        alcohol=told("Alcohol", "drinks alcohol", "drinks no alcohol"),
        status=number("Performance status"),
        hpv=told("HPV status", "HPV positive", "HPV negative"),
        chemotherapy=told("Chemotherapy", "with chemotherapy", "without chemotherapy"),
        surgery=told("Surgery", "after surgery", "without surgery"),
    )


def build(layout: Layout, args: argparse.Namespace) -> None:
    """Write the folder with the record and the time to relapse of each patient who has them."""
    with unpacked(args) as (folder, origin):
        scans, _ = find_scans(folder, layout)
        records = clinical_table(folder, "hecktor2022_clinical_info_training.csv", CLINICAL.split(","))
        endpoint = "hecktor2022_*endpoint_training.csv"
        endpoints = clinical_table(folder, endpoint, ("Relapse", "RFS"))
        told = {
            patient: survival(find(folder, endpoint), patient, row["RFS"], row["Relapse"].removesuffix(".0"), "1", "0")
            for patient, row in endpoints.items()
        }
        outcomes = {patient: outcome for patient, outcome in told.items() if outcome[0] > 0}
        known = [
            replace(
                scan,
                prompts={"report": record(records[scan.patient]) if scan.patient in records else None},
                outcome=outcomes.get(scan.patient),
            )
            for scan in scans
        ]
        events = [scan.outcome[1] for scan in known if scan.outcome]
        notes = [
            f"Time runs from the end of radiotherapy to relapse or the last visit: {sum(events)} of {len(events)} "
            f"patients relapsed; of {len(known) - len(events)} no outcome is known.",
            "Masks lie on the grid of the CT"
            + (", and PET was brought onto it linearly." if layout.onto_mask else "."),
            "GTVp is the gross tumor volume of the primary, GTVn that of the lymph nodes.",
            origin,
        ]
        write(args, layout, known, notes)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    modality, rest = choose("--modality", LAYOUTS, argv)
    layout = LAYOUTS[modality]
    run(layout.name, partial(build, layout), __doc__, layout.where, argv=rest)


if __name__ == "__main__":
    main()
