"""Run records read back: what a run leaves on disk, without anything of what made it."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

PUBLISHED = Path(__file__).resolve().parents[1] / "book/published"


@dataclass(frozen=True)
class Record:
    """What a run leaves; `cases` is the per-case table of lib.evaluation with `test` and `worded` added."""

    key: str
    arm: str
    experiment: dict
    cases: pd.DataFrame
    log: pd.DataFrame
    meta: dict
    folder: Path
    weights: Path | None  # None where only the record was kept


def load_record(folder: Path) -> Record:
    """Read a record folder; raises ValueError with the remedy if it is damaged."""
    folder = Path(folder)
    try:
        stored = json.loads((folder / "record.json").read_text(encoding="utf-8"))
        words = dict.fromkeys(("test", "dataset", "case_id", "patient_id"), str)
        # Exactly the numbers that were written, and no patient called "NA" taken for a missing one.
        exact = {"float_precision": "round_trip", "keep_default_na": False, "na_values": [""]}
        cases = pd.read_csv(folder / "cases.csv", dtype=words, **exact)
        log = pd.read_csv(folder / "log.csv", **exact).rename(columns={"valid_dice": "valid_score"})  # its old name
        weights = folder.parent.parent / "weights" / f"{stored['meta']['fit_key']}.safetensors"
        return Record(cases=cases, log=log, folder=folder, weights=weights if weights.is_file() else None, **stored)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"Run record {folder} is damaged ({error}): delete that folder and run again.") from error


def published_records(page: str, folder: Path = PUBLISHED) -> list[Record]:
    """Read the records that a published page shows, its arms named as there; none where the page is not published."""
    from lib.printed import read_page  # judges records, so it imports this module

    path = Path(folder) / f"{page}.ipynb"
    if not path.is_file():
        return []
    shown = read_page(path)
    records = [load_record(Path(folder) / "records" / key) for key in shown.keys]
    return [replace(record, arm=arm) for record in records for arm in shown.arms.get(record.key, [record.arm])]
