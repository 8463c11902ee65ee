"""Claims and audits of the papers -> contrasts on run records -> verdicts that nobody types by hand."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import pandas as pd

from lib.statistics import Interval, bootstrap_means, holm, interval, paired_bootstrap, separate_bootstrap, shown
from lib.survival import concordance, concordance_difference

LEVELS = {
    "P": "phantom",
    "S": "semi-synthetic",
    "R": "real, reduced scale or without the paper's weights",
    "F": "the paper's own data, weights and budget",
}
TOPICS = {
    "leak": "what the words give away",
    "split": "which cases choose and judge",
    "prompt": "how prompts are written",
    "metric": "how scores are computed",
    "code": "where code and text differ",
    "control": "what a simpler thing does",
}


FEWEST = 6  # patients: even if all agree, a sign test of five reaches no more than p = .06, and a bootstrap says less
ALPHA = 0.05
CINDEX = "cindex"  # the one metric that is no mean of cases: how well the risks of a test order its patients


class _Row:
    """A dataclass read from YAML: mappings become its parts, lists its tuples, and each value is checked."""

    def __post_init__(self):
        for name, kind in _kinds(type(self)).items():
            object.__setattr__(self, name, _fitting(getattr(self, name), kind, name))


@cache
def _kinds(row: type) -> dict[str, Any]:
    hints = get_type_hints(row)
    return {part.name: hints[part.name] for part in fields(row)}


def _fitting(value: Any, kind: Any, name: str) -> Any:
    if get_origin(kind) is UnionType:  # X | None is the only union here
        return None if value is None else _fitting(value, get_args(kind)[0], name)
    if get_origin(kind) is tuple and isinstance(value, list | tuple):
        return tuple(_fitting(part, get_args(kind)[0], name) for part in value)
    if get_origin(kind) is Literal:
        if value in get_args(kind):
            return value
        raise ValueError(f"{name} is {value!r}, and must be one of {', '.join(map(repr, get_args(kind)))}")
    if is_dataclass(kind) and isinstance(value, dict):
        return kind(**value)
    if kind is float and type(value) is int:
        return float(value)
    if not isinstance(value, get_origin(kind) or kind):
        raise ValueError(f"{name} is {value!r}, and must be of the kind {getattr(kind, '__name__', kind)}")
    return value


@dataclass(frozen=True)
class Arm(_Row):
    """One side of a contrast: an experiment's arm, seen through one of its tests (and a metric of its own)."""

    arm: str
    test: str
    metric: str | None = None


@dataclass(frozen=True, kw_only=True)
class Contrast(_Row):
    """What is measured: `a` minus `b`, or `a` minus a number, on one metric.

    `expect` says what the claim predicts of the difference: more than `margin`, less than `-margin`,
    or (equal) within `margin` on either side; `cases` may restrict it to those that have text, or in which the
    structure is present; `times` weighs b, as in "80 % of"; with `pairing: patient` the two sides are different cases
    (two kinds of lesion), whose patients are resampled together.
    """

    metric: str
    a: Arm
    b: Arm | None = None
    value: float | None = None
    expect: Literal["more", "less", "equal"]
    margin: float = 0.0
    cases: Literal["all", "worded", "present"] = "all"
    times: float = 1.0
    pairing: Literal["case", "patient"] = "case"

    def __post_init__(self):
        super().__post_init__()
        if (self.b is None) == (self.value is None):
            raise ValueError("a contrast compares arm `a` with exactly one of arm `b` or `value`")
        if self.expect == "equal" and self.margin <= 0:
            raise ValueError("an `equal` contrast needs a margin above 0")
        if self.b is None and (self.times != 1 or self.pairing != "case"):
            raise ValueError("`times` and `pairing` are about arm `b`, which this contrast does not have")


@dataclass(frozen=True, kw_only=True)
class Claim(_Row):
    """One row of claims.yml or audit.yml: a statement, its source, and the contrast that tests it, if one does.

    published: the paper's value for side a of the contrast, in its unit (Dice .91, not 91 %), and `against` the one for
    side b; spread: the standard deviation over cases that it prints; n_published: the cases of its test set, where the
    paper or its data say so. needs: what level F would take. An audit says how to `check` it and why it `matters`.
    """

    id: str
    paper: str
    kind: Literal["number", "mechanism", "audit"]
    statement: str
    source: str
    paper_value: str = ""
    published: float | None = None
    against: float | None = None
    spread: float | None = None
    n_published: int | None = None
    contrast: Contrast | None = None
    levels: tuple[Literal["P", "S", "R", "F"], ...] = ("P", "S", "R", "F")
    topic: Literal["leak", "split", "prompt", "metric", "code", "control", ""] = ""
    needs: str = ""
    check: str = ""
    matters: str = ""
    note: str = ""

    def __post_init__(self):
        super().__post_init__()
        if self.published is None and (self.against, self.spread, self.n_published) != (None, None, None):
            raise ValueError("`against`, `spread` and `n_published` are about a `published` value, which is not given")
        if self.kind == "number" and self.levels != ("F",):
            raise ValueError("a number of a paper can be judged at level F alone: give it `levels: [F]`")
        if self.kind != "audit" and (self.check or self.matters):
            raise ValueError("`check` and `matters` are for audits; a claim has its contrast and a note")
        if (self.kind == "audit") != bool(self.topic):
            raise ValueError(f"an audit, and nothing else, needs a topic: one of {', '.join(TOPICS)}")


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the records say of one claim at one data level.

    p: of the difference on this side of the margin; p_holm: corrected over the claims that were judged with it.
    """

    claim: Claim
    level: str
    dataset: str = ""
    verdict: Literal["supported", "not supported", "inconclusive", "not run"]
    effect: tuple[float, float, float] | None = None
    p: float | None = None
    p_holm: float | None = None
    a: float | None = None
    b: float | None = None
    n_cases: int = 0
    n_patients: int = 0
    n_seeds: int = 0
    keys: tuple[str, ...] = ()

    @property
    def corrected(self) -> str:
        """The verdict after Holm's correction, which can take a decision back and never makes one."""
        decided = self.verdict in ("supported", "not supported")
        return "inconclusive" if decided and self.p_holm is not None and self.p_holm > ALPHA else self.verdict

    @property
    def effect_text(self) -> str:
        """The effect with its metric, and its interval on a second line, as every page prints it."""
        mean, _, ends = shown(self.effect).partition(" ") if self.effect else ("", "", "")
        return f"{mean} {self.claim.contrast.metric}\n{ends}" if self.effect else ""

    @property
    def amount(self) -> str:
        """How many cases, patients and seeds it rests on, a line each."""
        counts = ((self.n_cases, "cases"), (self.n_patients, "patients"), (self.n_seeds, "seeds"))
        return "\n".join(f"{n} {things if n != 1 else things[:-1]}" for n, things in counts) if self.n_cases else ""


def copy_of(path: Path) -> Path:
    """Where the same rows stand as JSON, for machines with numpy and pandas alone."""
    return path.parent / "published" / f"{path.stem}.json"


def _rows(path: Path) -> list[Any]:
    if path.suffix == ".json":
        return json.loads(path.read_text("utf-8"))
    try:
        import yaml
    except ModuleNotFoundError:
        if not copy_of(path).is_file():
            raise ValueError(f"{path}: install PyYAML to read it; {copy_of(path)}, its copy, is not there.") from None
        return _rows(copy_of(path))
    return yaml.safe_load(path.read_text("utf-8")) or []


def load_claims(path: Path, paper: str | None = None) -> list[Claim]:
    """Read claims.yml or audit.yml, all rows or one paper's; raises ValueError naming the row that is wrong."""
    claims, seen = [], set()
    for number, row in enumerate(_rows(Path(path)), start=1):
        name = row.get("id", f"number {number}") if isinstance(row, dict) else f"number {number}"
        try:
            claim = Claim(**row)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: row {name} is not a valid claim: {error}") from error
        if claim.id in seen:
            raise ValueError(f"{path}: the id {claim.id} is used twice; give each claim its own.")
        seen.add(claim.id)
        if paper in (None, claim.paper):
            claims.append(claim)
    return claims


def collect(records: Sequence) -> pd.DataFrame:
    """Stack the per-case tables of run records, with columns key, arm, seed and level added."""
    parts = [
        record.cases.assign(
            key=record.key,
            arm=record.arm,
            seed=record.experiment["seed"],
            level=record.cases["dataset"].map(record.meta["levels"]),
        )
        for record in records
    ]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def scores(table: pd.DataFrame, arm: Arm, metric: str, threshold: float = 0.5) -> pd.DataFrame:
    """Pivot one arm and test of a collected table to [case, seed], indexed by (dataset, patient_id, case_id)."""
    if table.empty:
        return pd.DataFrame()
    rows = table[(table["arm"] == arm.arm) & (table["test"] == arm.test) & (table["threshold"] == threshold)]
    index = ["dataset", "patient_id", "case_id", "seed"]
    return rows.set_index(index)[arm.metric or metric].unstack("seed")


def judge(claim: Claim, table: pd.DataFrame, level: str, dataset: str | None = None) -> Verdict:
    """Test one claim on the cases of one data level (and dataset) by a paired bootstrap over patients and seeds."""
    blank = Verdict(claim=claim, level=level, dataset=dataset or "", verdict="not run")
    if table.empty or level not in claim.levels:
        return blank
    rows = table[table["level"] == level]
    if dataset:
        rows = rows[rows["dataset"] == dataset]
    contrast = claim.contrast
    if contrast.cases == "worded":
        rows = rows[rows["worded"]]
    elif contrast.cases == "present":
        rows = rows[rows["area_true"] > 0]
    if contrast.metric == CINDEX:
        return _judge_order(blank, rows, contrast)
    a = scores(rows, contrast.a, contrast.metric)
    b = scores(rows, contrast.b, contrast.metric) if contrast.b else a * 0 + contrast.value
    if a.empty or b.empty:
        return blank
    if contrast.pairing == "patient":
        seeds = sorted(set(a) & set(b))
        a, b = a[seeds].dropna(), b[seeds].dropna()
        if a.empty or b.empty:
            return blank
        effect = separate_bootstrap(a.to_numpy().T, b.to_numpy().T, _patients(a), _patients(b), contrast.times)
        return _judged(blank, rows, contrast, effect, a.to_numpy().mean(), b.to_numpy().mean())
    a, b = a.align(b * contrast.times, join="inner")
    # A metric can be undefined for a case (no lesion: no false-negative rate); both sides then leave it out.
    defined = a.notna().all(axis=1) & b.notna().all(axis=1)
    a, b = a[defined], b[defined]
    if a.empty:
        return blank
    effect = paired_bootstrap(a.to_numpy().T, b.to_numpy().T, patients=_patients(a))
    return _judged(blank, rows, contrast, effect, a.to_numpy().mean(), b.to_numpy().mean())


def _judged(blank: Verdict, rows: pd.DataFrame, contrast: Contrast, effect: Interval, a: float, b: float) -> Verdict:
    sides = [side for side in (contrast.a, contrast.b) if side]
    used = rows[np.any([(rows["arm"] == side.arm) & (rows["test"] == side.test) for side in sides], axis=0)]
    enough = effect.n_patients >= FEWEST
    return replace(
        blank,
        dataset=", ".join(sorted(set(used["dataset"]))),
        verdict=decide(effect, contrast) if enough else "inconclusive",
        effect=(effect.mean, effect.low, effect.high),
        p=p_value(effect.draws, contrast) if enough else None,
        a=float(a),
        b=float(b),
        n_cases=effect.n_cases,
        n_patients=effect.n_patients,
        n_seeds=effect.n_seeds,
        keys=tuple(sorted(set(used["key"]))),
    )


def _judge_order(blank: Verdict, rows: pd.DataFrame, contrast: Contrast) -> Verdict:
    """Judge a contrast of concordances, on the patients and seeds that both sides have."""
    if "risk" not in rows:
        return blank
    names = ["dataset", "case_id", "patient_id", "time", "event", "seed"]
    sides = [
        rows[(rows["arm"] == arm.arm) & (rows["test"] == arm.test)][[*names, "risk"]].dropna()
        for arm in (contrast.a, contrast.b)
        if arm
    ]
    if any(side.empty for side in sides):
        return blank
    if contrast.b is None:
        found = concordance(sides[0])
        moved = {name: getattr(found, name) - contrast.value for name in ("mean", "low", "high", "draws")}
        effect = replace(found, **moved)
        return _judged(blank, rows, contrast, effect, found.mean, contrast.value)
    both = sides[0].merge(sides[1], on=names, suffixes=("_a", "_b"))
    effect = concordance_difference(both, "risk_a", "risk_b")
    a, b = (concordance(both.assign(risk=both[f"risk_{side}"])).mean for side in "ab")
    return _judged(blank, rows, contrast, effect, a, b)


def _patients(index: pd.DataFrame) -> list[str]:
    return [f"{dataset}/{patient}" for dataset, patient, _ in index.index]


def decide(effect: Interval, contrast: Contrast) -> str:
    """Turn an interval of a difference into a verdict: only an interval wholly on one side decides."""
    margin = contrast.margin
    if contrast.expect == "equal":
        if -margin <= effect.low and effect.high <= margin:
            return "supported"
        return "not supported" if effect.low > margin or effect.high < -margin else "inconclusive"
    low, high = (effect.low, effect.high) if contrast.expect == "more" else (-effect.high, -effect.low)
    if low > margin:
        return "supported"
    return "not supported" if high < margin else "inconclusive"


def p_value(draws: np.ndarray, contrast: Contrast) -> float:
    """Two-sided p of the side of the margin that resampled differences lie on, and at most .05 where `decide` decides.

    It is the level at which the percentile interval would touch the margin; for `equal`, of two one-sided tests or of
    lying beyond one margin, whichever is smaller. No smaller than 2 / resamples.
    """

    def tail(wrong: np.ndarray) -> float:
        return 2 * max(int(wrong.sum()), 1) / len(wrong)

    margin = contrast.margin
    if contrast.expect == "equal":
        inside = max(tail(draws <= -margin), tail(draws >= margin))
        return min(1.0, inside, tail(draws <= margin), tail(draws >= -margin))
    claimed = draws if contrast.expect == "more" else -draws
    return min(1.0, tail(claimed <= margin), tail(claimed >= margin))


def verdicts(claims: Sequence[Claim], records: Sequence, levels: Sequence[str] | None = None) -> list[Verdict]:
    """Judge every claim with a contrast at every level that the records reach (or those named), Holm over each level.

    Of a test that was taken both on a dataset that arms were trained on and on another, the first decides.
    """
    table = inside(collect(records), {name for record in records for name in record.experiment.get("train", ())})
    reached = sorted(set(table["level"])) if len(table) else []
    judged = [claim for claim in claims if claim.contrast]
    return corrected([judge(claim, table, level) for claim in judged for level in (levels or reached or ["P"])])


def inside(table: pd.DataFrame, trained: set[str]) -> pd.DataFrame:
    """Leave out the rows of datasets that no arm was trained on, where the same test has rows of one that was."""
    if table.empty:
        return table
    within = table["dataset"].isin(trained)
    return table[within | ~table["test"].isin(set(table.loc[within, "test"]))]


def corrected(results: Sequence[Verdict]) -> list[Verdict]:
    """Correct the p-values of verdicts by Holm's method: a family is what was judged together at one level."""
    adjusted = {}
    for level in {result.level for result in results}:
        family = [i for i, result in enumerate(results) if result.level == level and result.p is not None]
        adjusted |= dict(zip(family, holm([results[i].p for i in family]).tolist(), strict=True))
    return [replace(result, p_holm=adjusted.get(i)) for i, result in enumerate(results)]


def summary(table: pd.DataFrame, metric: str, by: Sequence[str] = ("arm", "test")) -> pd.DataFrame:
    """Average a metric per group over cases and seeds, with its 95 % interval over patients and seeds."""
    rows = []
    for names, group in table[table["threshold"] == 0.5].groupby(list(by), sort=False):
        part = group.set_index(["dataset", "patient_id", "case_id", "seed"])[metric].unstack("seed").dropna()
        if len(part):
            mean = interval(part.to_numpy().T, patients=_patients(part))
            rows.append(
                dict(zip(by, names, strict=True))
                | {"mean": mean.mean, "low": mean.low, "high": mean.high}
                | {"n_cases": len(part), "n_seeds": part.shape[1]}
            )
    return pd.DataFrame(rows, columns=[*by, "mean", "low", "high", "n_cases", "n_seeds"])


def effect(
    table: pd.DataFrame,
    metric: str,
    a: tuple[str, str] | Sequence[tuple[str, str]],
    b: tuple[str, str] | Sequence[tuple[str, str]] | None = None,
) -> tuple[float, float, float]:
    """Mean and 95 % interval of one (arm, test), or of its paired difference from another, over all data levels.

    A side may be several pairs, whose scores are averaged case by case and seed by seed. Raises ValueError where an arm
    or test is not in the table.
    """
    sides = [_averaged(table, metric, [side] if isinstance(side[0], str) else side) for side in (a, b) if side]
    left, right = sides[0].align(sides[1] if b else sides[0] * 0, join="inner")
    defined = left.notna().all(axis=1) & right.notna().all(axis=1)
    left, right = left[defined], right[defined]
    found = paired_bootstrap(left.to_numpy().T, right.to_numpy().T, patients=_patients(left))
    return found.mean, found.low, found.high


def _averaged(table: pd.DataFrame, metric: str, pairs: Sequence[tuple[str, str]]) -> pd.DataFrame:
    found = {(arm, test): scores(table, Arm(arm=arm, test=test), metric) for arm, test in pairs}
    if missing := [pair for pair, side in found.items() if side.empty]:
        raise ValueError(f"There are no scores of {', '.join(map(str, missing))} in this table: check arm and test.")
    return sum(found.values()) / len(found)


def pooled(table: pd.DataFrame, by: Sequence[str] = ("arm", "test")) -> pd.DataFrame:
    """Dice and IoU of all pixels of a test set taken together, with 95 % intervals over patients and seeds.

    Papers print this beside or instead of the mean over images; large lesions weigh more in it. Columns: `by`, metric
    ("pooled_dice" | "pooled_iou"), mean, low, high. A ratio of sums, so both sums share each resample.
    """
    rows = []
    for names, group in table[table["threshold"] == 0.5].groupby(list(by), sort=False):
        index = ["dataset", "patient_id", "case_id", "seed"]
        areas = group.assign(area_sum=group["area_true"] + group["area_pred"]).set_index(index)
        both, total = (areas[column].unstack("seed") for column in ("area_both", "area_sum"))
        draws = bootstrap_means(np.stack([both.to_numpy().T, total.to_numpy().T]), _patients(both))
        overlap = np.append(draws[:, 0] / draws[:, 1], both.to_numpy().sum() / total.to_numpy().sum())
        for metric, values in (("pooled_dice", 2 * overlap), ("pooled_iou", overlap / (1 - overlap))):
            low, high = np.quantile(values[:-1], [0.025, 0.975])
            found = {"metric": metric, "mean": values[-1], "low": low, "high": high, "n_cases": len(both)}
            rows.append(dict(zip(by, names, strict=True)) | found)
    return pd.DataFrame(rows)


def changes(table: pd.DataFrame, arm: str, against: Mapping[str, str], metric: str) -> pd.DataFrame:
    """Compare tests of one arm with a reference test of the same models on the cases that both have.

    against: test -> reference test; the result has a row per test with the mean difference and its 95 % interval.
    """
    rows = []
    for test, reference in against.items():
        pair = (scores(table, Arm(arm=arm, test=name), metric) for name in (test, reference))
        a, b = next(pair).align(next(pair), join="inner")
        both = a.notna().all(axis=1) & b.notna().all(axis=1)
        if both.any():
            a, b = a[both], b[both]
            effect = paired_bootstrap(a.to_numpy().T, b.to_numpy().T, patients=_patients(a))
            rows.append(
                {"test": test, "against": reference, "mean": effect.mean, "low": effect.low, "high": effect.high}
                | {"n_cases": len(a), "n_seeds": a.shape[1]}
            )
    return pd.DataFrame(rows, columns=["test", "against", "mean", "low", "high", "n_cases", "n_seeds"])


def verdict_frame(results: Sequence[Verdict]) -> pd.DataFrame:
    """Lay verdicts out as a table: one row per claim and level, effect with its 95 % interval."""
    return pd.DataFrame(
        {
            "claim": v.claim.id,
            "statement": v.claim.statement,
            "paper": v.claim.paper_value,
            "metric": v.claim.contrast.metric,
            "level": v.level,
            "a": v.a,
            "b": v.b,
            "effect": v.effect[0] if v.effect else None,
            "low": v.effect[1] if v.effect else None,
            "high": v.effect[2] if v.effect else None,
            "n": v.amount.replace("\n", ", "),
            "p_holm": v.p_holm,
            "verdict": v.verdict,
        }
        for v in results
    )


if __name__ == "__main__":
    from lib.printed import main

    sys.exit(main())
