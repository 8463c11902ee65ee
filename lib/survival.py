"""How well risks order, separate and forecast outcomes.

A table has a row per case (and seed): risk (higher = earlier), time in days, event (1, or 0 for censored), patient_id;
optional are seed, dataset and case_id, which `lib.evaluation` writes. Pairs are compared within a dataset and a seed.
As in `lib.statistics`, a resample draws patients and, independently, seeds, and depends on its `seed` alone. Harrell's
C is a ratio of two sums over pairs: with w_i the times that case i was drawn, Σ w_i w_j s_ij / Σ w_i w_j n_ij, so that
two products of matrices give all resamples at once, and no resample is computed anew.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from lib.statistics import LEVEL, Interval

RESAMPLES = 2_000
COLUMNS = ("risk", "time", "event", "patient_id")
KINDS = ("harrell", "ipcw")
TAILS = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
TIED = 1e-8  # risks this near are tied, as in scikit-survival


class Outcomes(NamedTuple):
    """A checked table: risk [seeds, cases], time, event (bool), patient and dataset (names) of each case."""

    risk: np.ndarray
    time: np.ndarray
    event: np.ndarray
    patient: np.ndarray
    dataset: np.ndarray


def read(table: pd.DataFrame) -> Outcomes:
    """Check a table and lay it out by seed and case; raises ValueError, one sentence for each way to be unusable."""
    if lacking := [name for name in COLUMNS if name not in table.columns]:
        raise ValueError(f"The table lacks {', '.join(lacking)}: give a row per case with {', '.join(COLUMNS)}.")
    risk, time, event = (table[name].to_numpy(np.float64) for name in COLUMNS[:3])
    for name, wrong, wanted in (
        ("risks", ~np.isfinite(risk), "finite numbers"),
        ("times", ~(np.isfinite(time) & (time >= 0)), "days of 0 or more"),
        ("events", (event != 0) & (event != 1), "1, or 0 for censored"),
    ):
        if wrong.any():
            raise ValueError(
                f"{wrong.sum()} of {len(table)} {name} are unusable, first that of patient "
                f"{table['patient_id'].iloc[wrong.argmax()]!r}: {name} must be {wanted}, so correct or leave out these."
            )
    dataset = table["dataset"].astype(str) if "dataset" in table else pd.Series("", table.index)
    patient = dataset + "/" + table["patient_id"].astype(str)
    if patient.nunique() < 2:
        raise ValueError(f"The table holds {patient.nunique()} patients: comparing risks takes two or more.")
    if not event.any():
        raise ValueError(f"All {len(table)} rows are censored, so that no risk can be judged: use cases with events.")
    rows = pd.DataFrame(
        {"risk": risk, "time": time, "event": event, "patient": patient, "dataset": dataset}, table.index
    ).assign(
        seed=table.get("seed", 0),
        case=dataset + "/" + table["case_id" if "case_id" in table else "patient_id"].astype(str),
    )
    if (double := rows.duplicated(["seed", "case"])).any():
        raise ValueError(
            f"Case {rows['case'][double].iloc[0]!r} has several rows for one seed: select one arm and test, "
            "and name the cases of a patient by case_id."
        )
    risks = rows.pivot(index="seed", columns="case", values="risk")
    cases = rows.drop_duplicates("case").set_index("case").loc[risks.columns]
    if risks.isna().any(axis=None):
        raise ValueError("Some seeds lack some cases: judge all seeds on the same cases.")
    same = rows.groupby("case")[["time", "event"]].nunique().eq(1).all(axis=1)
    if not same.all():
        raise ValueError(f"Case {same.idxmin()!r} has different outcomes in different rows: keep the right one.")
    return Outcomes(
        risks.to_numpy(),
        cases["time"].to_numpy(),
        cases["event"].to_numpy().astype(bool),
        cases["patient"].to_numpy().astype(str),
        cases["dataset"].to_numpy().astype(str),
    )


def check_training(outcomes: Iterable[tuple[float, float] | None], name: str = "the table") -> tuple[int, int]:
    """Count cases and events to learn from; raises ValueError before any training where nothing could be learned.

    outcomes: days and event (True or 1) of each training case of the dataset `name`, None where it has none.
    """
    outcomes = list(outcomes)
    if unknown := sum(outcome is None for outcome in outcomes):
        raise ValueError(
            f"{unknown} of {len(outcomes)} training cases of {name} have no outcome: give times and events to all, or "
            "use phantom_prognosis, kits19_clinical or hecktor."
        )
    days, event = np.array(outcomes, np.float64).reshape(-1, 2).T
    if wrong := int((~(np.isfinite(days) & (days >= 0))).sum()):
        raise ValueError(
            f"{wrong} of {len(days)} training times of {name} are unusable: times must be days, 0 or more."
        )
    if not event.any():
        raise ValueError(
            f"All {len(days)} training cases of {name} are censored, so that no risk can be learned: use cases with "
            "events."
        )
    return len(days), int(event.sum())


def _structured(outcomes: Outcomes) -> np.ndarray:
    from sksurv.util import Surv  # seconds to import

    return Surv.from_arrays(outcomes.event, outcomes.time)


# --- how risks order patients


def concordance(
    table: pd.DataFrame,
    kind: str = "harrell",
    train: pd.DataFrame | None = None,
    tau: float | None = None,
    n: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Share of comparable pairs whose higher risk failed first, with the percentile bootstrap interval over patients.

    kind: "harrell" (1996), or "ipcw" (Uno 2011), where each pair weighs by the inverse squared chance of being seen
    that long in the outcomes of `train` (default: those of the table itself; kept in all resamples), up to `tau` days.
    The C of the true risk is the ceiling that no model passes. Raises ValueError for what cannot be judged.
    """
    outcomes = read(table)
    return _interval(_pairs(outcomes, kind, train, tau), outcomes, kind, n, seed)


def concordance_difference(
    table: pd.DataFrame,
    a: str,
    b: str,
    kind: str = "harrell",
    train: pd.DataFrame | None = None,
    tau: float | None = None,
    n: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """C of the risks in column `a` minus that in column `b`, both on the same draws of the same patients."""
    if lacking := {a, b} - set(table.columns):
        raise ValueError(f"The table has no column {sorted(lacking)}: it has {', '.join(table.columns)}.")
    sides = [read(table.assign(risk=table[name])) for name in (a, b)]
    (right_a, all_), (right_b, _) = (_pairs(side, kind, train, tau) for side in sides)
    return _interval((right_a - right_b, all_), sides[0], f"difference of {kind}", n, seed)


def _pairs(
    outcomes: Outcomes, kind: str, train: pd.DataFrame | None = None, tau: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Weight of each ordered pair that is right, [seeds, cases, cases], and of each that can be compared."""
    if kind not in KINDS:
        raise ValueError(f"There is no concordance of kind {kind!r}: use one of {', '.join(KINDS)}.")
    right, all_ = _ordered(outcomes.risk, outcomes.time, outcomes.event)
    all_ = all_ & _together(outcomes.dataset)
    if kind == "ipcw":
        all_ = all_ * _seen_weights(outcomes, train, tau)[:, None] ** 2
    if not all_.any():
        raise ValueError(
            f"None of the {len(all_)} cases can be compared: no other one was seen beyond an event, so use more cases."
        )
    return right * all_, all_.astype(np.float64)


def _ordered(risk: np.ndarray, time: np.ndarray, event: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """1, ½ or 0 where the first of a pair has the higher, a tied or the lower risk; whether it is known to fail first.

    risk: [..., cases]; both are [..., cases, cases]. At the same time an event comes before a censored case.
    """
    ahead = risk[..., :, None] - risk[..., None, :]
    later = (time[..., None, :] > time[..., :, None]) | (
        (time[..., None, :] == time[..., :, None]) & ~event[..., None, :]
    )
    return np.where(np.abs(ahead) <= TIED, 0.5, ahead > 0), event[..., :, None] & later


def _together(dataset: np.ndarray) -> np.ndarray:
    """Which pairs of cases [cases, cases] stem from the same dataset: risks mean nothing across two of them."""
    return dataset[:, None] == dataset


def _seen_weights(outcomes: Outcomes, train: pd.DataFrame | None, tau: float | None) -> np.ndarray:
    """One over the chance to be still under observation, for each event before `tau`; 0 for the other cases."""
    from sksurv.nonparametric import CensoringDistributionEstimator

    used = outcomes.event & (outcomes.time < (np.inf if tau is None else tau))
    censoring = CensoringDistributionEstimator().fit(_structured(outcomes if train is None else read(train)))
    known = censoring.unique_time_[-1]
    if used.any() and outcomes.time[used].max() > known:
        raise ValueError(
            f"An event at day {outcomes.time[used].max():g} lies beyond the {known:g} days that the training outcomes "
            "reach: give a tau within them."
        )
    chance = censoring.predict_proba(outcomes.time[used])
    if (chance == 0).any():
        raise ValueError(
            "No training case was observed as long as some event here, so that its weight is infinite: give a tau."
        )
    weights = np.zeros(len(used))
    weights[used] = 1 / chance
    return weights


def _interval(pairs: tuple[np.ndarray, np.ndarray], outcomes: Outcomes, what: str, n: int, seed: int) -> Interval:
    right, all_ = pairs
    seeds, cases = outcomes.risk.shape
    names, patient = np.unique(outcomes.patient, return_inverse=True)
    # A patient with several cases comes and goes with all of them.
    member = np.zeros((cases, len(names)))
    member[np.arange(cases), patient] = 1
    right, all_ = member.T @ right @ member, member.T @ all_ @ member
    drawn = _draws(n, len(names), seed, 0)
    possible = ((drawn @ all_) * drawn).sum(1)
    shares = np.stack([((drawn @ part) * drawn).sum(1) for part in right], 1)[possible > 0]
    shares /= possible[possible > 0, None]
    times = _draws(n, seeds, seed, 1)[possible > 0]
    found = (shares * times).sum(1) / seeds
    low, high = np.quantile(found, TAILS)
    method = f"{what}, percentile bootstrap over patients{' and seeds' if seeds > 1 else ''}, {len(found)} resamples"
    mean = float((right.sum((1, 2)) / all_.sum()).mean())
    return Interval(mean, float(low), float(high), cases, len(names), seeds, method, found)


def _draws(n: int, size: int, seed: int, use: int) -> np.ndarray:
    """How often each of `size` units is drawn, [n, size]."""
    drawn = np.random.default_rng([seed, use]).integers(0, size, (n, size)) + size * np.arange(n)[:, None]
    return np.bincount(drawn.ravel(), minlength=n * size).reshape(n, size).astype(np.float64)


# --- what chance gives


class Null(NamedTuple):
    """C under outcomes dealt out anew, the C that was found, and the share of deals (and itself) that reach it."""

    values: np.ndarray
    observed: float
    p: float


def permutation_null(table: pd.DataFrame, n: int = RESAMPLES, seed: int = 0) -> Null:
    """Harrell's C where outcomes are dealt out at random among the patients of a dataset, as if risks knew nothing.

    A patient hands on one outcome for all of its cases: raises ValueError where they differ. p is one-sided.
    """
    outcomes = read(table)
    _, first, patient = np.unique(outcomes.patient, return_index=True, return_inverse=True)
    time, event, dataset = (part[first] for part in (outcomes.time, outcomes.event, outcomes.dataset))
    if (time[patient] != outcomes.time).any() or (event[patient] != outcomes.event).any():
        raise ValueError("Cases of one patient have different outcomes, which cannot be dealt out: keep one of them.")
    right, all_ = _pairs(outcomes, "harrell")
    observed = float(right.sum() / (len(right) * all_.sum()))
    right = _ordered(outcomes.risk, outcomes.time, outcomes.event)[0].sum(0)  # of all pairs, comparable now or not
    _, known = _ordered(np.zeros(len(first)), time, event)  # of patients
    together = _together(outcomes.dataset)
    strata = [np.flatnonzero(dataset == name) for name in np.unique(dataset)]
    generator, values = np.random.default_rng([seed, 2]), np.empty(n)
    for i in range(n):
        holder = np.empty(len(first), np.int64)  # whose outcome each patient is dealt
        for members in strata:
            holder[members] = generator.permutation(members)
        pairs = known[np.ix_(holder[patient], holder[patient])] & together
        values[i] = right[pairs].sum() / (len(outcomes.risk) * max(pairs.sum(), 1))
    return Null(values, observed, float((1 + (values >= observed).sum()) / (1 + n)))


def simulated_width(n: int, c: float, censored: float = 0.0, repeats: int = RESAMPLES, seed: int = 0) -> Interval:
    """Where 95 % of the C-indices of n new patients would lie, for a risk whose C among uncensored patients is c.

    Times are exponential with log hazard b·z of a normal z, b set by c; dropping out is exponential too, at the rate
    that leaves the share `censored` without event. The mean is that of Harrell's C, which censoring can move from c.
    """
    from scipy.optimize import brentq
    from scipy.special import expit
    from scipy.stats import norm

    if n < 2 or not 0.5 <= c < 0.98 or not 0 <= censored < 1:
        raise ValueError(
            f"A spread for n={n}, c={c}, censored={censored} cannot be simulated: give two or more patients, "
            "a C from 0.5 to below 0.98, and a share of censored patients from 0 to below 1."
        )
    z = norm.ppf((np.arange(2000) + 0.5) / 2000)
    # The hazards of two patients differ by b·√2·|z|, and the odds that the higher one fails first are its exponential.
    slope = brentq(lambda b: expit(b * np.sqrt(2) * np.abs(z)).mean() - c, 0, 100)
    leave = brentq(lambda x: expit(x - slope * z).mean() - censored, -100, 100) if censored else -np.inf
    generator, found = np.random.default_rng([seed, 3]), []
    at_once = max(1, (1 << 22) // n**2)
    for start in range(0, repeats, at_once):
        shape = (min(at_once, repeats - start), n)
        risk = generator.standard_normal(shape)
        fails = generator.standard_exponential(shape) * np.exp(-slope * risk)
        leaves = generator.standard_exponential(shape) * np.exp(-leave)
        right, all_ = _ordered(risk, np.minimum(fails, leaves), fails <= leaves)
        number = all_.sum((-2, -1))
        found.append(((right * all_).sum((-2, -1)) / np.maximum(number, 1))[number > 0])
    found = np.concatenate(found)
    if not len(found):
        raise ValueError(f"No sample of {n} patients with {censored:.0%} censored had a comparable pair: use more.")
    low, high = np.quantile(found, TAILS)
    method = f"harrell of {len(found)} simulated samples with {censored:.0%} censored, SD {found.std():.4f}"
    return Interval(float(found.mean()), float(low), float(high), n, n, 1, method)


# --- how risks forecast and separate


def time_dependent_auc(
    table: pd.DataFrame, times: Sequence[float] | None = None, train: pd.DataFrame | None = None
) -> pd.DataFrame:
    """Chance that who failed by a day has a higher risk than who is event-free after it, averaged over seeds.

    Cumulative/dynamic AUC, weighted for censoring by the outcomes of `train` (default: the table's own); columns time
    and auc. times: days (default: deciles of the event times); raises ValueError for days without cases on both sides.
    """
    from sksurv.metrics import cumulative_dynamic_auc

    outcomes = read(table)
    known = outcomes if train is None else read(train)
    times = _days(outcomes, known, times)
    asked = _structured(_until(outcomes, times[-1]))
    aucs = [cumulative_dynamic_auc(_structured(known), asked, risk, times)[0] for risk in outcomes.risk]
    return pd.DataFrame({"time": times, "auc": np.mean(aucs, 0)})


class Brier(NamedTuple):
    """A curve of Brier scores (columns time, brier, reference), and the means of both over its days; lower is better.

    reference: that of the training set's Kaplan-Meier curve, which forecasts the same for everyone.
    """

    curve: pd.DataFrame
    integrated: float
    reference: float


def brier(table: pd.DataFrame, train: pd.DataFrame, times: Sequence[float] | None = None) -> Brier:
    """Squared error of the forecast chance to be event-free, weighted for censoring (Graf 1999), averaged over seeds.

    The chances come from Breslow's baseline hazard: `train` holds the risks that the same models gave the training
    cases, for each seed, with their outcomes. times and raises as in `time_dependent_auc`, but two or more days.
    """
    from sksurv.linear_model.coxph import BreslowEstimator

    outcomes, known = read(table), read(train)
    if len(known.risk) != len(outcomes.risk):
        raise ValueError(
            f"The table has {len(outcomes.risk)} seeds and the training table {len(known.risk)}: give both the same."
        )
    times = _days(outcomes, known, times)
    forecasts = []
    for risk, own in zip(outcomes.risk, known.risk, strict=True):
        hazard = BreslowEstimator().fit(own - own.max(), known.event, known.time).cum_baseline_hazard_
        grown = np.r_[0.0, hazard.y][np.searchsorted(hazard.x, times, side="right")]
        forecasts.append(np.exp(-np.exp(risk - own.max())[:, None] * grown))
    return _brier(outcomes, known, times, forecasts)


def brier_of(table: pd.DataFrame, train: pd.DataFrame, forecasts: pd.DataFrame) -> Brier:
    """As `brier`, of chances that a model gives itself: `forecasts` has a column for each day, a row for each case_id.

    Raises ValueError as `brier`, and where the table has several seeds or a case without a forecast.
    """
    outcomes, known = read(table), read(train)
    if len(outcomes.risk) > 1:
        raise ValueError(f"The table has {len(outcomes.risk)} seeds and forecasts are of one: select the seed.")
    if lacking := sorted(set(table["case_id"]) - set(forecasts.index)):
        raise ValueError(f"Case {lacking[0]!r} and {len(lacking) - 1} more have no forecast: give a row for each.")
    times = _days(outcomes, known, forecasts.columns)
    dataset = table["dataset"].astype(str) if "dataset" in table else ""
    named = table["case_id"].iloc[np.argsort((dataset + "/" + table["case_id"].astype(str)).to_numpy(str))]
    return _brier(outcomes, known, times, [forecasts.sort_index(axis=1).loc[named].to_numpy(np.float64)])


def _brier(outcomes: Outcomes, known: Outcomes, times: np.ndarray, forecasts: list[np.ndarray]) -> Brier:
    """Score forecasts, each [cases, times], and that of the Kaplan-Meier curve of the training cases beside them."""
    from sksurv.metrics import brier_score
    from sksurv.nonparametric import SurvivalFunctionEstimator

    if len(times) < 2:
        raise ValueError(f"A Brier score was asked for at {len(times)} days, but its mean needs two or more: add some.")
    plain = SurvivalFunctionEstimator().fit(_structured(known)).predict_proba(times)
    told, asked = _structured(known), _structured(_until(outcomes, times[-1]))
    everyone = np.tile(plain, (len(outcomes.time), 1))
    reference, *scores = (brier_score(told, asked, forecast, times)[1] for forecast in (everyone, *forecasts))
    curve = pd.DataFrame({"time": times, "brier": np.mean(scores, 0), "reference": reference})
    means = (np.trapezoid(curve[name], times) / (times[-1] - times[0]) for name in ("brier", "reference"))
    return Brier(curve, *map(float, means))


def _days(outcomes: Outcomes, known: Outcomes, times: Sequence[float] | None) -> np.ndarray:
    if times is None:
        times = np.quantile(outcomes.time[outcomes.event], np.arange(1, 10) / 10)
        times = times[times < min(outcomes.time.max(), known.time.max())]
    times = np.unique(np.asarray(times, np.float64))
    failed, last = outcomes.time[outcomes.event].min(), min(outcomes.time.max(), known.time.max())
    if not len(times) or times[0] < failed or times[-1] >= last:
        raise ValueError(
            f"The days {times.tolist()} cannot be judged: the first event is at day {failed:g} and the last case "
            f"(also of the training outcomes) is seen until day {last:g}, so give days between them."
        )
    return times


def _until(outcomes: Outcomes, day: float) -> Outcomes:
    """The outcomes as seen shortly after a day: what comes later matters to no score until then."""
    end = np.nextafter(day, np.inf)
    return outcomes._replace(time=np.minimum(outcomes.time, end), event=outcomes.event & (outcomes.time <= day))


class KaplanMeier(NamedTuple):
    """Step curves (columns group, time, survival, low, high, at_risk) and the log-rank p that groups do not differ."""

    curves: pd.DataFrame
    p: float


def kaplan_meier(table: pd.DataFrame, groups: int | str | Sequence[float] = 2) -> KaplanMeier:
    """Estimate the share that is event-free over time in each risk group, with pointwise 95 % intervals.

    groups: a number of equal parts by risk (averaged over seeds), the risks at which to cut (e.g. the median of the
    training set), or a column. Curves start at day 0; `at_risk` counts cases just before a day. Raises ValueError
    where fewer than two groups hold cases. The log-rank test takes cases as independent: give one per patient.
    """
    from sksurv.compare import compare_survival
    from sksurv.nonparametric import kaplan_meier_estimator

    outcomes = read(table)
    if isinstance(groups, str):
        if groups not in table.columns:
            raise ValueError(f"The table has no column {groups!r}: it has {', '.join(table.columns)}.")
        one = table.assign(risk=pd.factorize(table[groups], sort=True)[0])
        names, group = sorted(table[groups].unique()), read(one).risk[0].astype(int)
    else:
        risk = outcomes.risk.mean(0)
        cuts = np.quantile(risk, np.arange(1, groups) / groups) if isinstance(groups, int) else np.sort(groups)
        group = np.searchsorted(cuts, risk, side="left")
        names = list(range(len(cuts) + 1))
    held = [i for i in range(len(names)) if (group == i).any()]
    if len(held) < 2:
        raise ValueError("All cases fall into one risk group: cut at other risks, or give risks that differ.")
    curves = []
    for i in held:
        time, event = outcomes.time[group == i], outcomes.event[group == i]
        days, share, (low, high) = kaplan_meier_estimator(event, time, conf_type="log-log")
        columns = {"time": days, "survival": share, "low": low, "high": high}
        columns["at_risk"] = [(time >= day).sum() for day in days]
        start = pd.DataFrame({"time": [0.0], "survival": 1.0, "low": 1.0, "high": 1.0, "at_risk": len(time)})
        steps = pd.DataFrame(columns)
        curves.append(pd.concat([start, steps] if days[0] > 0 else [steps]).assign(group=names[i]))
    p = compare_survival(_structured(outcomes), group)[1]
    return KaplanMeier(pd.concat(curves, ignore_index=True)[["group", *columns]], float(p))
