"""Numbers that prose says of run records, each kept with the recipe that computes it again.

A measure takes rows of a collected table and returns an interval, a number or a name. It needs numpy and pandas alone:
`python -m lib.ledger verify` computes every fact of a published page once more from the committed per-case tables.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lib.ledger import Arm, effect, scores
from lib.statistics import Interval, Ranking, ranking_stability, ratio_bootstrap, shown

Side = tuple[str, str]  # an arm and a test
NARROWED = ("dataset", "level", "seed", "worded", "present")  # columns by which a chapter chooses rows of its table


@dataclass(frozen=True)
class Fact:
    """One number or name as prose prints it: what is measured, with which arguments, on which rows of the table."""

    what: str
    given: Sequence[Any]
    where: Mapping[str, Sequence[Any]]
    digits: int
    percent: bool
    text: str

    def __str__(self) -> str:
        return self.text

    def again(self, table: pd.DataFrame) -> str:
        """Compute its text from the collected table of a page; raises ValueError where the table lacks it."""
        if self.what not in MEASURES:
            raise ValueError(f"There is no measure {self.what!r}: use one of {', '.join(MEASURES)}.")
        rows = _narrowable(table)
        for column, values in self.where.items():
            rows = rows[rows[column].isin(values)]
        return _printed(MEASURES[self.what](rows, *self.given), self.digits, self.percent)


def fact(what: str, rows: pd.DataFrame, *given: Any, digits: int = 3, percent: bool = False) -> Fact:
    """Measure rows of a collected table, and remember how.

    what: one of MEASURES; given: its arguments after the rows; percent: a share, printed as "51 %" without decimals.
    """
    if what not in MEASURES:
        raise ValueError(f"There is no measure {what!r}: use one of {', '.join(MEASURES)}.")
    sides = set(_sides(given))
    used = rows[[pair in sides for pair in zip(rows["arm"], rows["test"], strict=True)]]
    used = _narrowable(used)
    where = {name: sorted(used[name].unique().tolist()) for name in NARROWED if name in used}
    given = json.loads(json.dumps(given))  # as it will be read back: tuples become lists
    return Fact(what, given, where, digits, percent, _printed(MEASURES[what](rows, *given), digits, percent))


def _narrowable(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows that say whether the structure is in the case: chapters on volumes judge those where it is."""
    return rows.assign(present=rows["area_true"] > 0) if "area_true" in rows else rows


def _sides(given: Any) -> Iterator[Side]:
    if isinstance(given, list | tuple):
        if len(given) == 2 and all(isinstance(part, str) for part in given):
            yield tuple(given)
        else:
            for part in given:
                yield from _sides(part)


def _printed(value: Any, digits: int, percent: bool) -> str:
    return f"{100 * value:.0f} %" if percent else shown(value, digits)


# --- measures ----------------------------------------------------------------------------------------------------


def _stacked(rows: pd.DataFrame, metric: str, sides: Sequence[Side]) -> tuple[dict[Side, np.ndarray], list[str]]:
    """Scores of several sides on the cases that all have: side -> [seeds, cases], and the cases' patients."""
    tables = {tuple(side): scores(rows, Arm(*side), metric) for side in sides}
    if any(table.empty for table in tables.values()):
        missing = ", ".join(" in ".join(side) for side, table in tables.items() if table.empty)
        raise ValueError(f"There are no scores of {missing} in this table: check arm and test.")
    common = pd.concat(dict(enumerate(tables.values())), axis=1, join="inner").dropna()
    patients = [f"{dataset}/{patient}" for dataset, patient, _ in common.index]
    return {side: common[place].to_numpy().T for place, side in enumerate(tables)}, patients


def _ranking(rows: pd.DataFrame, metric: str, sides: Sequence[Side]) -> Ranking:
    return ranking_stability(*_stacked(rows, metric, sides))


def mean(rows: pd.DataFrame, metric: str, *sides: Any) -> float:
    """An effect without its interval, for a sentence that gives the interval elsewhere."""
    return effect(rows, metric, *sides)[0]


def share(rows: pd.DataFrame, metric: str, part: Sequence[Side], whole: Sequence[Side]) -> Interval:
    """One difference of two sides over another one, as in what words give away over what they add."""
    stacked, patients = _stacked(rows, metric, [*part, *whole])
    a, b, c, d = (stacked[tuple(side)] for side in (*part, *whole))
    return ratio_bootstrap(a - b, c - d, patients)


def ranked(rows: pd.DataFrame, metric: str, sides: Sequence[Side], place: int) -> str:
    """The arm with the highest mean (place 1), the next (2), ..."""
    return _ranking(rows, metric, sides).order[place - 1][0]


def among(rows: pd.DataFrame, metric: str, sides: Sequence[Side], one: Side, best: int) -> float:
    """The share of resamples in which one side is among the `best` first."""
    shares = _ranking(rows, metric, sides).probability
    return float(shares.iloc[list(shares.index).index(tuple(one)), :best].sum())


def tau(rows: pd.DataFrame, metric: str, sides: Sequence[Side]) -> Interval:
    """Kendall's τ between the order of a resample and the observed one."""
    return _ranking(rows, metric, sides).tau


def spread(rows: pd.DataFrame, metric: str, sides: Sequence[Side]) -> float:
    """The highest mean less the lowest, on the cases that all sides have."""
    means = [values.mean() for values in _stacked(rows, metric, sides)[0].values()]
    return float(max(means) - min(means))


def patients(rows: pd.DataFrame, metric: str, sides: Sequence[Side]) -> int:
    """How many patients all sides have scores of."""
    return len(set(_stacked(rows, metric, sides)[1]))


def seeds(rows: pd.DataFrame, metric: str, sides: Sequence[Side]) -> int:
    """How many trainings each of the sides has."""
    return min(len(values) for values in _stacked(rows, metric, sides)[0].values())


MEASURES: dict[str, Callable[..., Any]] = {
    measure.__name__: measure for measure in (effect, mean, share, ranked, among, tau, spread, patients, seeds)
}


# --- what a page was given ---------------------------------------------------------------------------------------


def seal(name: str, text: str, facts: Sequence[Mapping[str, Any]] = ()) -> str:
    """Hash a text with its name and facts, so that a page notices when one of them is edited."""
    return hashlib.sha256(json.dumps([name, text, list(facts)], sort_keys=True).encode()).hexdigest()


class Said:
    """A text for the prose whose display metadata holds its seal and its facts."""

    def __init__(self, name: str, text: str, facts: Sequence[Fact] = (), markdown: bool = False):
        for one in facts:
            if one.text not in text:
                raise ValueError(f"The sentence {name!r} does not say {one.text!r}, the text of one of its facts.")
        stored = json.loads(json.dumps([asdict(one) for one in facts]))
        self._bundle = {"text/plain": text} | ({"text/markdown": text} if markdown else {})
        self._metadata = {"prompt_to_mask": {"said": {"sha256": seal(name, text, stored), "facts": stored}}}

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> tuple[dict, dict]:
        return self._bundle, self._metadata


def table_digest(folder: Path) -> str:
    """Hash the per-case table of a run record: figures and tables of a page hold for this one alone."""
    return hashlib.sha256((Path(folder) / "cases.csv").read_bytes()).hexdigest()
