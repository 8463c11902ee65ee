"""What scripts make of the attribute table that was released with Malenia: rows, prompts, and what is usual."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from common import read_table, require

from lib.attributes import ATTRIBUTES, PLACES, TABLE, Attributes, decode, features, knowledge, parse
from lib.attributes import prompts as prompts_of
from lib.data import PromptColumn
from lib.files import DataError

COLUMNS = {
    **{
        f"attribute.{name}": PromptColumn(
            role=f"attribute.{name}",
            origin="human",
            source="the lesion's row in the attribute table released with Malenia "
            "(github.com/Yankai96/Malenia, 6955662); the features are read from its report",
        )
        for name in ATTRIBUTES
    },
    **{
        f"attribute.{name}@known": PromptColumn(
            role=f"attribute.{name}",
            origin="class-oracle",
            source="what is most frequent in the disease, over the rows of all but the test patients",
        )
        for name in ATTRIBUTES
    },
    **{
        f"attribute.{name}@parsed": PromptColumn(
            role=f"attribute.{name}", origin="human", source="read from the report by rules (lib.attributes.parse)"
        )
        for name in ATTRIBUTES
    },
    "report": PromptColumn(role="report", origin="human", source="the report released with Malenia (MIT)"),
    "class": PromptColumn(role="class", origin="template", source="name of the disease, in every volume"),
}


class Row(NamedTuple):
    """A lesion of the released table: of whom, what it shows, and its report."""

    patient: str
    attributes: Attributes
    report: str


def read_codes(folder: Path) -> list[dict[str, str]]:
    """The released table as attribute -> code, with lesion, id and report, from CSV or the workbook itself.

    Raises DataError where the folder holds neither.
    """
    files = [*sorted(folder.rglob("attributes.csv")), *sorted(folder.rglob("annotations_of_lesion_descriptions.xlsx"))]
    if not files:
        raise DataError(f"{folder} holds no attribute table: put annotations_of_lesion_descriptions.xlsx there.")
    path = files[0]
    if path.suffix == ".csv":
        rows = read_table(path)
        require(rows, ("lesion", "id", "report", *(f"{column}_code" for column in TABLE.values())), path)
        return [
            {name: row[f"{column}_code"] for name, column in TABLE.items()}
            | {key: row[key] for key in ("lesion", "id", "report")}
            for row in rows
        ]
    order = ("id", "enhancement", "location", "shape", "density", "variation", "surface", "relation", "report")
    table = []
    for sheet, words in enumerate(PLACES, start=1):
        for row in read_table(path, sheet):  # a sheet for each disease, in this order
            if len(row) < len(order):
                raise DataError(f"{path} has {len(row)} columns in sheet {sheet}: give the released workbook.")
            table.append(dict(zip(order, row.values(), strict=False)) | {"lesion": words})
    return table


def rows_of(table: Sequence[dict[str, str]], words: str) -> list[Row]:
    """The rows of a disease with a place and a report, from the table that `read_codes` gives."""
    found = [(one["id"], decode(words, one), one["report"]) for one in table if one["lesion"] == words]
    return [
        Row(id_, replace(said, features=features(told)), told) for id_, said, told in found if said.location and told
    ]


def usual_of(rows: Sequence[Row], words: str, tested: Collection[str]) -> tuple[Attributes, Row]:
    """What is most frequent in a disease over all but the test patients, and a row that shows just that."""
    kept = [row for row in rows if row.patient not in tested]
    if not kept:
        raise DataError(f"The attribute table has no row of '{words}' but those of test patients: give all of it.")
    table = [
        {"lesion": words, "report": row.report}
        | {column: getattr(row.attributes, name) or "" for name, column in TABLE.items()}
        for row in kept
    ]
    usual = knowledge(table)[words]
    return usual, max(
        kept, key=lambda row: sum(getattr(row.attributes, name) == getattr(usual, name) for name in ATTRIBUTES)
    )


def told(row: Row | None, usual: Attributes, typical: Row, words: str) -> dict[str, str | None]:
    """The prompts of a disease in a volume: those of its row, or where it is absent what is usual in it."""
    report = (row or typical).report
    read = parse(report)
    if row is None:  # the place and the scan are those of another patient
        read = replace(read, location=None, enhancement=None)
    return {
        **prompts_of(row.attributes if row else usual),
        **prompts_of(usual, "@known"),
        **prompts_of(read, "@parsed"),
        "report": report,
        "class": words,
    }
