"""Claims and audits of the papers -> contrasts on run records -> verdicts that nobody types by hand."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import yaml
from pydantic import BaseModel, ConfigDict, model_validator

from lib.statistics import Interval, bootstrap_means, interval, paired_bootstrap, separate_bootstrap
from lib.survival import concordance, concordance_difference

LEVELS = {
    "P": "phantom",
    "S": "semi-synthetic",
    "R": "real, reduced scale or without the paper's weights",
    "F": "the paper's own data, weights and budget",
}


FEWEST = 6  # patients: even if all agree, a sign test of five reaches no more than p = .06, and a bootstrap says less
CINDEX = "cindex"  # the one metric that is no mean of cases: how well the risks of a test order its patients


class Arm(BaseModel):
    """One side of a contrast: an experiment's arm, seen through one of its tests (and a metric of its own)."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    arm: str
    test: str
    metric: str | None = None


class Contrast(BaseModel):
    """What is measured: `a` minus `b`, or `a` minus a number, on one metric.

    `expect` says what the claim predicts of the difference: more than `margin`, less than `-margin`,
    or (equal) within `margin` on either side; `cases` may restrict it to those that have text, or in which the
    structure is present; `times` weighs b, as in "80 % of"; with `pairing: patient` the two sides are different cases
    (two kinds of lesion), whose patients are resampled together.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    metric: str
    a: Arm
    b: Arm | None = None
    value: float | None = None
    expect: Literal["more", "less", "equal"]
    margin: float = 0.0
    cases: Literal["all", "worded", "present"] = "all"
    times: float = 1.0
    pairing: Literal["case", "patient"] = "case"

    @model_validator(mode="after")
    def _one_reference(self):
        if (self.b is None) == (self.value is None):
            raise ValueError("a contrast compares arm `a` with exactly one of arm `b` or `value`")
        if self.expect == "equal" and self.margin <= 0:
            raise ValueError("an `equal` contrast needs a margin above 0")
        if self.b is None and (self.times != 1 or self.pairing != "case"):
            raise ValueError("`times` and `pairing` are about arm `b`, which this contrast does not have")
        return self


class Claim(BaseModel):
    """One row of claims.yml or audit.yml: a statement, its source, and the contrast that tests it."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    id: str
    paper: str
    kind: Literal["number", "mechanism", "audit"]
    statement: str
    source: str
    paper_value: str = ""
    contrast: Contrast
    levels: tuple[Literal["P", "S", "R", "F"], ...] = ("P", "S", "R", "F")
    note: str = ""


class Verdict(BaseModel):
    """What the records say of one claim at one data level."""

    claim: Claim
    level: str
    dataset: str = ""
    verdict: Literal["supported", "not supported", "inconclusive", "not run"]
    effect: tuple[float, float, float] | None = None
    a: float | None = None
    b: float | None = None
    n_cases: int = 0
    n_patients: int = 0
    n_seeds: int = 0
    keys: tuple[str, ...] = ()


def load_claims(path: Path, paper: str | None = None) -> list[Claim]:
    """Read claims.yml or audit.yml, all rows or one paper's; raises ValueError naming the row that is wrong."""
    claims, seen = [], set()
    for number, row in enumerate(yaml.safe_load(Path(path).read_text("utf-8")) or [], start=1):
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
    used = rows[rows["arm"].isin({x.arm for x in (contrast.a, contrast.b) if x})]
    return blank.model_copy(
        update={
            "verdict": decide(effect, contrast) if effect.n_patients >= FEWEST else "inconclusive",
            "effect": (effect.mean, effect.low, effect.high),
            "a": float(a),
            "b": float(b),
            "n_cases": effect.n_cases,
            "n_patients": effect.n_patients,
            "n_seeds": effect.n_seeds,
            "keys": tuple(sorted(set(used["key"]))),
        }
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
        effect = replace(found, **{name: getattr(found, name) - contrast.value for name in ("mean", "low", "high")})
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


def verdicts(claims: Sequence[Claim], records: Sequence, levels: Sequence[str] | None = None) -> list[Verdict]:
    """Judge every claim at every level that the records reach (or the levels named)."""
    table = collect(records)
    reached = sorted(set(table["level"])) if len(table) else []
    return [judge(claim, table, level) for claim in claims for level in (levels or reached or ["P"])]


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
    table: pd.DataFrame, metric: str, a: tuple[str, str], b: tuple[str, str] | None = None
) -> tuple[float, float, float]:
    """Mean and 95 % interval of one (arm, test), or of its paired difference from another, over all data levels.

    Raises ValueError where an arm or test is not in the table.
    """
    sides = [scores(table, Arm(arm=arm, test=test), metric) for arm, test in (a, *([b] if b else []))]
    if any(side.empty for side in sides):
        raise ValueError(f"There are no scores of {a}{f' or {b}' if b else ''} in this table: check arm and test.")
    left, right = sides[0].align(sides[1] if b else sides[0] * 0, join="inner")
    defined = left.notna().all(axis=1) & right.notna().all(axis=1)
    left, right = left[defined], right[defined]
    found = paired_bootstrap(left.to_numpy().T, right.to_numpy().T, patients=_patients(left))
    return found.mean, found.low, found.high


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
            "n": f"{v.n_cases} cases, {v.n_patients} patients, {v.n_seeds} seeds" if v.n_cases else "",
            "verdict": v.verdict,
        }
        for v in results
    )
