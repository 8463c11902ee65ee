"""Intervals and tests on per-case scores.

Scores are [cases] or [seeds, cases]; `patients` names the patient of each case. A bootstrap resample draws patients
with replacement and, independently, seeds where there are several (paired arms share both draws); the statistic is
the mean over the drawn cases and seeds. Two or three seeds understate the spread between seeds: see `n_seeds`.
Draws depend on `seed` alone and the sums are exact, so results repeat bit for bit whatever the thread count.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd

RESAMPLES = 10_000
LEVEL = 0.95
_CHUNK = 1 << 19  # drawn patients held in memory at once
_KEPT = 1 << 21  # and at most kept for the next contrast, four times


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval, what it rests on, and how it was obtained."""

    mean: float
    low: float
    high: float
    n_cases: int
    n_patients: int
    n_seeds: int
    method: str = ""
    draws: np.ndarray | None = field(default=None, repr=False, compare=False)  # the statistic of each resample

    def __str__(self) -> str:
        return shown(self)


def shown(value: Any, digits: int = 3) -> str:
    """Write a number, or an interval (mean, low, high), as the book prints it; any other value as it is."""
    if hasattr(value, "low"):
        value = (value.mean, value.low, value.high)
    if isinstance(value, tuple):
        mean, low, high = (shown(float(end), digits) for end in value)
        return f"{mean} ({low}{' to ' if min(value) < 0 else '–'}{high})"
    if isinstance(value, float):  # numpy's float64 is one
        return f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "−")  # + 0.0: no −0.00
    return str(value)


# --- Bootstrap


def bootstrap_means(scores: np.ndarray, patients: Sequence, n: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Resample the mean score of several models at once, with the same draws for each.

    scores: [models, cases] or [models, seeds, cases]; the result is [n, models].
    """
    scores = np.asarray(scores, np.float64)
    if scores.ndim == 2:
        scores = scores[:, None]
    _check(scores, patients)
    models, seeds, _ = scores.shape
    names, patient = np.unique(np.asarray(patients).astype(str), return_inverse=True)
    order = np.argsort(patient, kind="stable")
    first = np.searchsorted(patient[order], np.arange(len(names)))
    # [patients, models * seeds + 1]: the sum of each patient's scores, and the number of the patient's cases.
    table = np.add.reduceat(scores[..., order], first, axis=-1).reshape(models * seeds, -1).T
    table = np.column_stack([_exactly_summable(table, len(names)), np.bincount(patient)])

    totals = np.concatenate([weights @ table for weights in _drawn(len(names), n, seed, 0)])
    means = (totals[:, :-1] / totals[:, -1:]).reshape(n, models, seeds)
    if seeds == 1:
        return means[..., 0]
    weights = np.concatenate(list(_drawn(seeds, n, seed, 1)))
    return (means * weights[:, None]).sum(-1) / seeds


def _drawn(size: int, n: int, seed: int, use: int) -> Iterable[np.ndarray]:
    """The draws of one use of a seed: the claims of a page share theirs, which take longer to draw than to weigh."""
    return _kept(size, n, seed, use) if size * n <= _KEPT else _draws(size, n, np.random.default_rng([seed, use]))


@lru_cache(maxsize=4)
def _kept(size: int, n: int, seed: int, use: int) -> tuple[np.ndarray, ...]:
    return tuple(_draws(size, n, np.random.default_rng([seed, use])))


def _draws(size: int, n: int, generator: np.random.Generator) -> Iterator[np.ndarray]:
    """Yield how often each of `size` units is drawn, [rows, size] at a time, until there are n rows."""
    rows = max(1, _CHUNK // size)
    for start in range(0, n, rows):
        count = min(rows, n - start)
        drawn = generator.integers(0, size, (count, size), dtype=np.int32) + size * np.arange(count)[:, None]
        yield np.bincount(drawn.ravel(), minlength=count * size).reshape(count, size).astype(np.float64)


def _exactly_summable(table: np.ndarray, terms: int) -> np.ndarray:
    """Round to the finest grid on which any `terms` of these numbers add up without further rounding."""
    largest = max(np.abs(table).max() * terms, np.finfo(np.float64).tiny * 2**52)
    step = 2.0 ** (np.ceil(np.log2(largest)) - 52)
    return np.round(table / step) * step


def _check(scores: np.ndarray, patients: Sequence) -> None:
    if scores.shape[-1] != len(patients) or scores.shape[-1] == 0:
        raise ValueError(
            f"Scores of shape {scores.shape} and {len(patients)} patients do not match: give one patient name per "
            "case, and cases in the last axis."
        )
    missing = int(np.isnan(scores).sum())
    if missing:
        raise ValueError(f"{missing} of {scores.size} scores are NaN: drop those cases before averaging.")


def interval(values: np.ndarray, patients: Sequence, n: int = RESAMPLES, seed: int = 0) -> Interval:
    """Mean score with the percentile bootstrap interval over patients (and seeds)."""
    values = np.atleast_2d(np.asarray(values, np.float64))
    draws = bootstrap_means(values[None], patients, n, seed)[:, 0]
    low, high = np.quantile(draws, _tails())
    seeds = len(values)
    method = f"percentile bootstrap over patients{' and seeds' if seeds > 1 else ''}, {n} resamples"
    counts = values.shape[1], len(np.unique(patients)), seeds
    return Interval(float(values.mean()), float(low), float(high), *counts, method, draws)


def paired_bootstrap(a: np.ndarray, b: np.ndarray, patients: Sequence, n: int = RESAMPLES, seed: int = 0) -> Interval:
    """Mean difference a - b, case by case and seed by seed, with its bootstrap interval."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape:
        raise ValueError(f"Paired scores have shapes {a.shape} and {b.shape}: give both arms the same cases and seeds.")
    return interval(a - b, patients, n, seed)


def separate_bootstrap(
    a: np.ndarray,
    b: np.ndarray,
    patients_a: Sequence,
    patients_b: Sequence,
    times: float = 1.0,
    n: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Mean of a minus `times` the mean of b, on cases that differ but may be of the same patients.

    a: [seeds, cases of a], b: [seeds, cases of b]; patients and seeds are drawn once for both sides.
    """
    a, b = (np.atleast_2d(np.asarray(side, np.float64)) for side in (a, b))
    if len(a) != len(b):
        raise ValueError(f"The two sides have {len(a)} and {len(b)} seeds: give both the same ones.")
    in_a = np.r_[np.ones(a.shape[1]), np.zeros(b.shape[1])]
    sums = np.stack([np.c_[a, 0 * b], np.tile(in_a, (len(a), 1)), np.c_[0 * a, b], np.tile(1 - in_a, (len(a), 1))])
    patients = [*patients_a, *patients_b]
    draws = bootstrap_means(sums, patients, n, seed)
    with np.errstate(invalid="ignore"):  # a resample may hold no case of one side
        differences = draws[:, 0] / draws[:, 1] - times * draws[:, 2] / draws[:, 3]
    low, high = np.nanquantile(differences, _tails())
    method = f"percentile bootstrap over patients{' and seeds' if len(a) > 1 else ''}, sides apart, {n} resamples"
    mean = float(a.mean() - times * b.mean())
    counts = sums.shape[-1], len(set(map(str, patients))), len(a)
    drawn = differences[np.isfinite(differences)]
    return Interval(mean, float(low), float(high), *counts, method, drawn)


def ratio_bootstrap(
    part: np.ndarray, whole: np.ndarray, patients: Sequence, n: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Mean of `part` over mean of `whole`, both [cases] or [seeds, cases], with the same draws for both.

    All NaN where the interval of `whole` is not wholly above 0: what may be nothing has no shares.
    """
    part, whole = (np.atleast_2d(np.asarray(side, np.float64)) for side in (part, whole))
    if part.shape != whole.shape:
        raise ValueError(f"Part and whole have shapes {part.shape} and {whole.shape}: give both the same cases.")
    below = interval(whole, patients, n, seed)
    counts = below.n_cases, below.n_patients, below.n_seeds
    method = f"ratio of means, {below.method}"
    if below.low <= 0:
        return Interval(float("nan"), float("nan"), float("nan"), *counts, method)
    draws = bootstrap_means(part[None], patients, n, seed)[:, 0]
    # In the few draws that leave no whole, the share has no bound on the side of the part's sign.
    some = below.draws > 0
    ratios = np.where(some, draws / np.where(some, below.draws, 1), np.copysign(np.inf, draws))
    low, high = np.quantile(ratios, _tails(), method="nearest")
    return Interval(float(part.mean() / whole.mean()), float(low), float(high), *counts, method, ratios)


def paired_table(table: pd.DataFrame, metric: str, arm_a: str, arm_b: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Line up two arms of a tidy per-case table: scores of a and b [seeds, cases], and patients [cases].

    Columns used: arm, seed, dataset, case_id, patient_id and the metric; one row per arm, seed and case.
    """
    grids = {}
    for arm in (arm_a, arm_b):
        rows = table[table["arm"] == arm]
        if rows.empty:
            raise ValueError(f"No arm {arm!r} in this table: it holds {', '.join(sorted(table['arm'].unique()))}.")
        if rows.duplicated(["seed", "dataset", "case_id"]).any():
            raise ValueError(
                f"Arm {arm!r} has several rows for one seed and case: select one test and one threshold first."
            )
        grids[arm] = rows.pivot(index="seed", columns=["dataset", "case_id"], values=metric).sort_index(axis=1)
    a, b = grids[arm_a], grids[arm_b]
    if not a.index.equals(b.index) or not a.columns.equals(b.columns):
        raise ValueError(
            f"Arms {arm_a!r} and {arm_b!r} do not pair: {len(a)} and {len(b)} seeds, {a.shape[1]} and {b.shape[1]} "
            "cases, not all the same; run both arms with the same seeds on the same test."
        )
    patient = table.drop_duplicates(["dataset", "case_id"]).set_index(["dataset", "case_id"])["patient_id"]
    patients = np.array([f"{key[0]}/{patient[key]}" for key in a.columns])
    return a.to_numpy(np.float64), b.to_numpy(np.float64), patients


def _tails() -> list[float]:
    return [(1 - LEVEL) / 2, (1 + LEVEL) / 2]


def reliability(probability: np.ndarray, mask: np.ndarray, bins: int = 15) -> pd.DataFrame:
    """Compare forecast and frequency of foreground, a row per bin that holds pixels: forecast, frequency, share."""
    probability, mask = np.ravel(probability).astype(np.float64), np.ravel(mask).astype(np.float64)
    cell = np.minimum((probability * bins).astype(np.int64), bins - 1)
    count, *sums = (np.bincount(cell, weights, minlength=bins) for weights in (None, probability, mask))
    held = count > 0
    forecast, frequency = (total[held] / count[held] for total in sums)
    return pd.DataFrame({"forecast": forecast, "frequency": frequency, "share": count[held] / count.sum()})


# --- Tests


def holm(p: Sequence[float]) -> np.ndarray:
    """Adjust a family of p-values by Holm's step-down method (Holm 1979)."""
    p = np.asarray(p, np.float64)
    order = np.argsort(p)
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return adjusted


def wilcoxon_holm(pairs: Mapping[str, tuple[np.ndarray, np.ndarray]], patients: Sequence | None = None) -> pd.DataFrame:
    """Wilcoxon signed-rank test of each pair of arms, with Holm's correction over the family.

    pairs: name -> (a, b), each [cases] or [seeds, cases]. Seeds are averaged first, and where `patients` are given
    the cases of a patient too, since the test takes its units as independent. A pair without any difference has p = 1.
    """
    from scipy import stats  # here and below: verdicts need no SciPy, and are checked where it is not installed

    rows = []
    for name, (a, b) in pairs.items():
        difference = np.atleast_2d(np.asarray(a, np.float64) - np.asarray(b, np.float64)).mean(0)
        groups = np.arange(len(difference)) if patients is None else np.asarray(patients)
        _check(difference, groups)
        difference = pd.Series(difference).groupby(groups).mean().to_numpy()
        p = stats.wilcoxon(difference).pvalue if difference.any() else 1.0
        rows.append(
            {"pair": name, "n": len(difference), "median_difference": float(np.median(difference)), "p": float(p)}
        )
    table = pd.DataFrame(rows)
    return table.assign(p_holm=holm(table["p"]))


# --- Rankings


@dataclass(frozen=True)
class Ranking:
    """How sure an order of models is.

    order: names, best first; probability: [models, ranks 1..models] over the resamples (ties share the better rank);
    tau: Kendall's τ between the order of a resample and the order of the data, with its interval.
    """

    order: list[str]
    probability: pd.DataFrame
    tau: Interval


def ranking_stability(
    scores: Mapping[str, np.ndarray],
    patients: Sequence,
    higher_is_better: bool = True,
    n: int = RESAMPLES,
    seed: int = 0,
) -> Ranking:
    """Rank models by mean score in each bootstrap resample; scores: model -> [cases] or [seeds, cases]."""
    if len(scores) < 2:
        raise ValueError(f"A ranking needs two or more models but got {len(scores)}.")
    stacked = np.stack([np.atleast_2d(np.asarray(values, np.float64)) for values in scores.values()])
    sign = 1 if higher_is_better else -1
    observed = sign * stacked.mean((1, 2))
    means = sign * bootstrap_means(stacked, patients, n, seed)
    rank = 1 + (means[:, None, :] > means[:, :, None]).sum(-1)  # [n, models]
    models = np.arange(len(scores))
    probability = (rank[:, :, None] == models + 1).mean(0)
    first, second = np.triu_indices(len(scores), 1)
    agreement = np.sign(means[:, first] - means[:, second]) * np.sign(observed[first] - observed[second])
    tau = agreement.mean(1)
    names, best = list(scores), np.argsort(-observed, kind="stable")
    low, high = np.quantile(tau, _tails())
    _, seeds, cases = stacked.shape
    method = f"Kendall's tau to the observed order, {n} resamples"
    return Ranking(
        order=[names[i] for i in best],
        probability=pd.DataFrame(probability[best], index=[names[i] for i in best], columns=models + 1),
        tau=Interval(float(tau.mean()), float(low), float(high), cases, len(np.unique(patients)), seeds, method),
    )


# --- Which cases to keep, and which to send to a reader


def selective_risk(
    risk: np.ndarray,
    doubt: np.ndarray,
    patients: Sequence,
    kept: Sequence[float] = (0.8,),
    n: int = RESAMPLES // 5,
    seed: int = 0,
) -> np.ndarray:
    """Mean risk of the surest cases: a column for each share in `kept`, then the mean over all coverages (AURC).

    risk and doubt: [seeds, cases]; the result is [1 + n, shares + 1], the data themselves first and then resamples of
    patients and seeds. The draws depend on patients and `seed` alone, so results of several doubts may be subtracted.
    Cases of equal doubt count as kept in part, as if they were sent in random order; in the AURC they share the risk
    at the end of their step. Source: Geifman & El-Yaniv 2017 (arXiv 1705.08500), with cases in place of pixels.
    """
    risk, doubt = (np.atleast_2d(np.asarray(x, np.float64)) for x in (risk, doubt))
    if risk.shape != doubt.shape:
        raise ValueError(f"Risks of shape {risk.shape} and doubts of {doubt.shape} do not match: give one of each.")
    _check(risk, patients)
    _check(doubt, patients)
    if not all(0 < share <= 1 for share in kept):
        raise ValueError(f"The shares kept are {', '.join(map(str, kept))}: give shares above 0 and up to 1.")
    orders = [np.argsort(own, kind="stable") for own in doubt]
    steps = [np.flatnonzero(np.r_[True, np.diff(own[order]) > 0]) for own, order in zip(doubt, orders, strict=True)]

    def of_seed(weights: np.ndarray, s: int) -> np.ndarray:
        own = weights[:, orders[s]]
        cases = np.add.reduceat(own, steps[s], axis=1)
        lost = np.add.reduceat(own * risk[s, orders[s]], steps[s], axis=1)
        reached, sums = cases.cumsum(1), lost.cumsum(1)
        total, row = reached[:, -1], np.arange(len(own))
        columns = []
        for share in kept:
            wanted = share * total
            step = np.minimum((reached < wanted[:, None] * (1 - 1e-12)).sum(1), reached.shape[1] - 1)
            inside = wanted - (reached - cases)[row, step]
            columns.append(((sums - lost)[row, step] + inside * lost[row, step] / cases[row, step]) / wanted)
        rate = np.divide(sums, reached, out=np.zeros_like(sums), where=reached > 0)
        return np.column_stack([*columns, (cases * rate).sum(1) / total])

    return _resampled(of_seed, patients, len(risk), n, seed)


def separation(
    high: np.ndarray, low: np.ndarray, patients: Sequence, n: int = RESAMPLES // 5, seed: int = 0
) -> np.ndarray:
    """How likely a score of `high` is above one of `low`, ties half: the AUROC of telling two states of cases apart.

    high and low: [seeds, cases] of the same cases; the result is [1 + n], the data first and then resamples of patients
    and seeds, drawn as in `selective_risk`.
    """
    high, low = (np.atleast_2d(np.asarray(x, np.float64)) for x in (high, low))
    if high.shape != low.shape:
        raise ValueError(f"Scores of shapes {high.shape} and {low.shape} do not match: give both states of each case.")
    _check(high, patients)
    _check(low, patients)

    def of_seed(weights: np.ndarray, s: int) -> np.ndarray:
        above = (high[s][:, None] > low[s]) + 0.5 * (high[s][:, None] == low[s])
        return (((weights @ above) * weights).sum(1) / weights.sum(1) ** 2)[:, None]

    return _resampled(of_seed, patients, len(high), n, seed)[:, 0]


def _resampled(of_seed: Callable[[np.ndarray, int], np.ndarray], patients: Sequence, seeds: int, n: int, seed: int):
    """Average a statistic of weighted cases over seeds, for the data and for n draws of patients and seeds."""
    names, patient = np.unique(np.asarray(patients).astype(str), return_inverse=True)
    rows = [np.mean([of_seed(np.ones((1, len(patient))), s) for s in range(seeds)], axis=0)]
    chosen = np.concatenate(list(_drawn(seeds, n, seed, 1)))  # [n, seeds], as in bootstrap_means
    done = 0
    for drawn in _drawn(len(names), n, seed, 0):
        weights, share = drawn[:, patient], chosen[done : done + len(drawn)] / seeds
        rows.append(sum(share[:, s, None] * of_seed(weights, s) for s in range(seeds)))
        done += len(drawn)
    return np.concatenate(rows)


def ends(rows: np.ndarray) -> tuple[float, float, float]:
    """Value and 95 % interval of what stands first in `rows` [1 + n], with its resamples after it."""
    low, high = np.nanquantile(rows[1:], _tails())
    return float(rows[0]), float(low), float(high)


# --- Published numbers


def reconstruct_interval(mean: float, n: int, sd: float | None = None) -> Interval:
    """Interval that a published mean over n cases would have had.

    With `sd` (a per-case standard deviation, published or of a pilot): mean ± t·sd/√n, assuming near-normal means.
    Without: Wilson's score interval of a proportion. It assumes scores in [0, 1]: with mean m they cannot vary more
    than yes/no scores, whose variance is m(1-m) (Bhatia & Davis 2000), so for independent cases it is too wide, not
    too narrow.
    """
    if n < 2:
        raise ValueError(f"An interval needs two or more cases but n is {n}.")
    from scipy import stats

    if sd is not None:
        half = stats.t.ppf(_tails()[1], n - 1) * sd / np.sqrt(n)
        return Interval(mean, mean - half, mean + half, n, n, 1, f"reconstructed: normal, per-case SD {sd:g}")
    if not 0 <= mean <= 1:
        raise ValueError(f"A mean of {mean} is not within [0, 1]: give it as a fraction, or give a per-case sd.")
    z2 = stats.norm.ppf(_tails()[1]) ** 2
    centre = (mean + z2 / (2 * n)) / (1 + z2 / n)
    half = np.sqrt(z2 * (mean * (1 - mean) / n + z2 / (4 * n**2))) / (1 + z2 / n)
    method = "reconstructed: Wilson, largest SD that scores in [0, 1] allow"
    return Interval(mean, float(centre - half), float(centre + half), n, n, 1, method)


def resolvable_gap(sd_difference: float, n: int, power: float = 0.8) -> float:
    """Smallest true paired difference that n cases show at two-sided 5 % with this power.

    (z_{0.975} + z_power) · sd / √n for the standard deviation of the per-case difference. A difference that was not
    found and is smaller than this gap is no evidence that the arms are equal.
    """
    from scipy import stats

    return float((stats.norm.ppf(_tails()[1]) + stats.norm.ppf(power)) * sd_difference / np.sqrt(n))


def cases_needed(sd_difference: float, gap: float, power: float = 0.8) -> float:
    """Number of cases that show a true paired difference at two-sided 5 % with this power: resolvable_gap backwards.

    Infinite where there is no difference to show.
    """
    return float((resolvable_gap(sd_difference, 1, power) / abs(gap)) ** 2) if gap else float("inf")


def right_winner(
    a: np.ndarray, b: np.ndarray, patients: Sequence, sizes: Sequence[int], n: int = 2000, seed: int = 0
) -> pd.DataFrame:
    """How often the better of two models has the higher mean on a test set of so many patients, drawn with replacement.

    a, b: [cases] or [seeds, cases], of which the mean over seeds counts; columns: size, share (ties count half).
    """
    difference = np.atleast_2d(np.asarray(a, np.float64) - np.asarray(b, np.float64)).mean(0)
    names, patient = np.unique([str(p) for p in patients], return_inverse=True)
    sums, counts = np.bincount(patient, difference), np.bincount(patient)
    sign = np.sign(difference.mean()) or 1.0
    generator, rows = np.random.default_rng(seed), []
    for size in sizes:
        drawn = generator.integers(len(names), size=(n, size))
        means = sign * sums[drawn].sum(1) / counts[drawn].sum(1)
        rows.append({"size": int(size), "share": float((means > 0).mean() + 0.5 * (means == 0).mean())})
    return pd.DataFrame(rows)
