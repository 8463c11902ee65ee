"""How risks are judged: as by scikit-survival where it has an answer, true to what was simulated where it has not."""

import time

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sksurv.linear_model import CoxPHSurvivalAnalysis
from sksurv.metrics import brier_score, concordance_index_censored, concordance_index_ipcw, integrated_brier_score
from sksurv.util import Surv

from lib import survival
from lib.survival import (
    brier,
    brier_of,
    check_training,
    concordance,
    concordance_difference,
    kaplan_meier,
    permutation_null,
    simulated_width,
    time_dependent_auc,
)

QUICK = settings(deadline=None, max_examples=30)


def patients(number=80, seed=0, slope=1.0, ties=False):
    """Exponential times with log hazard `slope`·true, a third or so censored; `risk` sees the truth through noise."""
    rng = np.random.default_rng(seed)
    true = rng.normal(size=number)
    fails, leaves = rng.exponential(500 * np.exp(-slope * true)), rng.exponential(900, number)
    table = pd.DataFrame({"patient_id": [f"p{i}" for i in range(number)], "true": true})
    table["time"] = np.minimum(fails, leaves)
    table["event"] = (fails <= leaves).astype(int)
    table["risk"] = true + rng.normal(size=number)
    if ties:
        table = table.assign(time=table["time"] // 200, risk=table["risk"].round())
    table.loc[0, ["time", "event"]] = (0.0, 1)  # never all censored
    return table


def outcome(table):
    return Surv.from_arrays(table["event"].astype(bool), table["time"])


# --- concordance --------------------------------------------------------------------------------------------------


@QUICK
@given(number=st.integers(3, 60), seed=st.integers(0, 999), ties=st.booleans())
def test_c_is_that_of_scikit_survival(number, seed, ties):
    table, train = patients(number, seed, ties=ties), patients(100, seed + 1, ties=ties)
    table.loc[1, "time"] += 300  # some pair can be compared
    expected = concordance_index_censored(table["event"].astype(bool), table["time"], table["risk"])[0]
    assert concordance(table, n=20).mean == pytest.approx(expected, abs=1e-12)
    tau = float(np.quantile(train["time"], 0.8)) + 0.5
    expected = concordance_index_ipcw(outcome(train), outcome(table), table["risk"], tau=tau)[0]
    assert concordance(table, "ipcw", train, tau, n=20).mean == pytest.approx(expected, abs=1e-12)


def test_a_resample_is_c_of_the_drawn_patients():
    """Rows written out as often as they were drawn have the same C as the multiplicities."""
    table = patients(30, ties=True)
    outcomes = survival.read(table)
    right, all_ = survival._pairs(outcomes, "harrell")
    for times in survival._draws(5, 30, seed=3, use=0):
        drawn = table.iloc[np.repeat(np.argsort(table["patient_id"].to_numpy()), times.astype(int))]
        expected = concordance_index_censored(drawn["event"].astype(bool), drawn["time"], drawn["risk"])[0]
        assert times @ right[0] @ times / (times @ all_ @ times) == pytest.approx(expected, abs=1e-12)


def test_two_thousand_resamples_of_500_patients_take_seconds_and_repeat():
    table = patients(500)
    began = time.perf_counter()
    found = concordance(table)
    assert time.perf_counter() - began < 5
    assert found == concordance(table.sample(frac=1, random_state=0))
    assert found != concordance(table, seed=1)
    assert found.low < found.mean < found.high and "2000 resamples" in found.method


def test_the_interval_covers_and_is_as_wide_as_new_samples_spread():
    """What the bootstrap says of one sample is what 120 fresh samples do."""
    fresh = [concordance(patients(120, seed), n=1).mean for seed in range(120)]
    found = concordance(patients(120, 1000))
    spread = np.quantile(fresh, 0.975) - np.quantile(fresh, 0.025)
    assert found.high - found.low == pytest.approx(spread, rel=0.25)
    assert found.low < np.mean(fresh) < found.high


def test_order_alone_counts_and_the_true_risk_is_the_ceiling():
    table = patients(200)
    assert concordance(table.assign(risk=np.exp(table["risk"]))) == concordance(table)
    assert concordance(table.assign(risk=-table["time"])).mean == 1
    assert concordance(table.assign(risk=table["time"])).mean == 0
    assert concordance(table.assign(risk=0.0)).mean == 0.5
    ceiling = concordance(table.assign(risk=table["true"])).mean
    assert concordance(table).mean < ceiling < 0.85


def test_a_paired_difference_is_sharper_than_two_intervals():
    table = patients(150)
    table["near"] = table["risk"] + 0.1 * np.sin(np.arange(150))
    pair = concordance_difference(table, "near", "risk")
    assert pair.mean == pytest.approx(concordance(table.assign(risk=table["near"])).mean - concordance(table).mean)
    alone = concordance(table)
    assert pair.high - pair.low < (alone.high - alone.low) / 3
    better = concordance_difference(table, "true", "risk")
    assert better.low > 0 and concordance_difference(table, "risk", "risk").high == 0
    assert concordance_difference(table, "true", "risk", "ipcw", tau=900).low > 0


def test_seeds_are_averaged_and_drawn():
    table = patients(60)
    seeds = pd.concat([table.assign(seed=s, risk=table["risk"] + s * np.cos(np.arange(60))) for s in range(3)])
    found = concordance(seeds)
    alone = [concordance(part).mean for _, part in seeds.groupby("seed")]
    assert found.n_seeds == 3 and found.mean == pytest.approx(np.mean(alone)) and np.ptp(alone) > 0.01
    same = concordance(pd.concat([table.assign(seed=s) for s in range(3)]))
    assert (same.mean, same.low, same.high) == pytest.approx((lambda i: (i.mean, i.low, i.high))(concordance(table)))


def test_a_patient_with_two_images_is_one_patient_and_datasets_are_not_compared():
    table = patients(60)
    twice = pd.concat([table.assign(case_id=table["patient_id"] + half) for half in "ab"])
    one, two = concordance(table), concordance(twice)
    assert (two.n_cases, two.n_patients) == (120, 60)
    assert (one.mean, one.low, one.high) == pytest.approx((two.mean, two.low, two.high))
    other = patients(60, 1).assign(dataset="b", risk=lambda t: t["risk"] + 100)
    both = concordance(pd.concat([table.assign(dataset="a"), other]))
    assert both.n_patients == 120
    parts = [concordance_index_censored(t["event"].astype(bool), t["time"], t["risk"])[1:4] for t in (table, other)]
    right, wrong, tied = np.sum(parts, 0)
    assert both.mean == pytest.approx((right + tied / 2) / (right + wrong + tied))


# --- chance -------------------------------------------------------------------------------------------------------


def test_a_risk_that_knows_nothing_is_found_out():
    table = patients(80, slope=2.0)
    null = permutation_null(table, 300)
    assert null.observed == pytest.approx(concordance(table).mean) and null.p == pytest.approx(1 / 301)
    assert null.values.mean() == pytest.approx(0.5, abs=0.01)
    noise = table.assign(risk=np.random.default_rng(1).normal(size=80))
    assert permutation_null(noise, 300).p > 0.05
    assert np.array_equal(permutation_null(table, 20).values, permutation_null(table, 20).values)


def test_p_values_of_chance_are_uniform():
    rng = np.random.default_rng(0)
    found = [permutation_null(patients(25, s).assign(risk=rng.normal(size=25)), 60).p for s in range(40)]
    assert np.mean(np.array(found) <= 0.1) < 0.25 and 0.35 < np.mean(found) < 0.65


def test_the_simulated_width_is_that_of_real_samples():
    """C of .69 among the uncensored; fewer events make it wider, and 274 patients cannot tell .69 from .67."""
    full, few = simulated_width(274, 0.69, repeats=300), simulated_width(274, 0.69, 0.75, repeats=300)
    assert full.mean == pytest.approx(0.69, abs=0.003)
    assert few.high - few.low > 1.5 * (full.high - full.low) and few.low < 0.67
    assert simulated_width(50, 0.5, 0.3, repeats=300).mean == pytest.approx(0.5, abs=0.01)
    narrow = simulated_width(1100, 0.69, repeats=100)
    assert narrow.high - narrow.low == pytest.approx((full.high - full.low) / 2, rel=0.3)
    true = [concordance(patients(120, s).assign(risk=lambda t: t["true"]), n=1).mean for s in range(80)]
    censored = 1 - np.mean([patients(120, s)["event"].mean() for s in range(20)])
    modelled = simulated_width(120, 0.7135, censored, repeats=500)  # C of a slope of 1 without censoring
    assert modelled.mean == pytest.approx(np.mean(true), abs=0.02)
    assert modelled.high - modelled.low == pytest.approx(np.quantile(true, 0.975) - np.quantile(true, 0.025), rel=0.3)
    for wrong in ((1, 0.7, 0), (50, 0.3, 0), (50, 0.7, 1)):
        with pytest.raises(ValueError, match="cannot be simulated"):
            simulated_width(*wrong)


# --- forecasts ----------------------------------------------------------------------------------------------------


def test_the_brier_score_is_that_of_a_fitted_cox_model():
    """Breslow's baseline from risks alone forecasts what scikit-survival's own model does."""
    train, table = patients(200), patients(100, 1)
    fitted = CoxPHSurvivalAnalysis().fit(train[["true"]].to_numpy(), outcome(train))
    train, table = (t.assign(risk=fitted.predict(t[["true"]].to_numpy())) for t in (train, table))
    times = np.array([50.0, 200.0, 400.0, 700.0])
    chances = np.stack([f(times) for f in fitted.predict_survival_function(table[["true"]].to_numpy())])
    found = brier(table, train, times)
    expected = brier_score(outcome(train), outcome(table), chances, times)[1]
    np.testing.assert_allclose(found.curve["brier"], expected, atol=1e-10)
    assert found.integrated == pytest.approx(
        integrated_brier_score(outcome(train), outcome(table), chances, times), abs=1e-10
    )
    assert found.integrated < found.reference
    shifted = brier(table.assign(risk=table["risk"] + 50), train.assign(risk=train["risk"] + 50), times)
    assert shifted.integrated == pytest.approx(found.integrated)
    assert brier(table, train).curve["time"].between(0, table["time"].max()).all()


def test_the_brier_score_of_a_model_s_own_chances_is_that_of_scikit_survival():
    table, train = patients(60, 4).assign(case_id=lambda t: t["patient_id"]), patients(90, 5)
    days = np.quantile(table["time"], [0.2, 0.5, 0.7])
    chances = pd.DataFrame(np.exp(-np.exp(table["risk"].to_numpy())[:, None] * days / 900), table["case_id"], days)
    expected = brier_score(outcome(train), outcome(table), chances.to_numpy(), days)[1]
    found = brier_of(table, train, chances)
    np.testing.assert_allclose(found.curve["brier"], expected, atol=1e-10)
    again = brier_of(table.sample(frac=1, random_state=0), train, chances.sample(frac=1, random_state=1)[days[::-1]])
    np.testing.assert_allclose(again.curve["brier"], expected, atol=1e-10)  # rows and days in any order
    assert found.reference == brier(table, train, days).reference
    with pytest.raises(ValueError, match="Case 'p0' and 0 more have no forecast: give a row for each"):
        brier_of(table, train, chances.drop("p0"))
    with pytest.raises(ValueError, match="has 2 seeds and forecasts are of one: select the seed"):
        brier_of(pd.concat([table.assign(seed=s) for s in (0, 1)]), train, chances)


def test_what_cannot_be_learned_from_is_refused_before_training():
    assert check_training([(10.0, True), (20.0, False), (0.0, 1)]) == (3, 2)
    for outcomes, words in (
        ([(10.0, False), (20.0, 0)], "All 2 training cases of lungs are censored, so that no risk can be learned"),
        ([(10.0, True), None], "1 of 2 training cases of lungs have no outcome: give times and events to all"),
        ([(-1.0, True), (2.0, True)], "1 of 2 training times of lungs are unusable: times must be days, 0 or more"),
    ):
        with pytest.raises(ValueError, match=words) as error:
            check_training(outcomes, "lungs")
        assert "\n" not in str(error.value)


def test_the_auc_over_time_is_one_for_an_oracle_and_half_for_noise():
    table, times = patients(200), [50, 150, 400]
    oracle = time_dependent_auc(table.assign(risk=-table["time"]), times)
    assert oracle["time"].tolist() == times and oracle["auc"].tolist() == pytest.approx([1, 1, 1])
    assert time_dependent_auc(table.assign(risk=0.0), times)["auc"].tolist() == pytest.approx([0.5] * 3)
    better = time_dependent_auc(table.assign(risk=table["true"]))["auc"].mean()
    assert 0.6 < time_dependent_auc(table, train=patients(300, 5))["auc"].mean() < better < 0.9


def test_risk_groups_have_their_kaplan_meier_curves():
    table = patients(120)
    found = kaplan_meier(table.assign(risk=table["true"]), 3)
    assert found.p < 1e-4 and found.curves["group"].unique().tolist() == [0, 1, 2]
    first = found.curves.groupby("group").first()
    assert (first["at_risk"] == 40).all()
    at = [part.loc[part["time"] <= 300, "survival"].iloc[-1] for _, part in found.curves.groupby("group")]
    assert at[0] > at[1] > at[2]
    inside = found.curves.dropna()
    assert (inside["low"] <= inside["survival"]).all() and (inside["survival"] <= inside["high"]).all()
    assert len(inside) == len(found.curves)
    noise = table.assign(risk=np.random.default_rng(3).normal(size=120))
    assert kaplan_meier(noise).p > 0.01


def test_kaplan_meier_by_hand_by_cut_and_by_column():
    table = pd.DataFrame(
        {
            "patient_id": list("abcdef"),
            "risk": [2.0, 2, 2, 1, 1, 1],
            "time": [1.0, 2, 3, 4, 5, 6],
            "event": [1, 0, 1, 1, 0, 0],
            "arm": ["x", "x", "x", "y", "y", "y"],
        }
    )
    for groups, names in (([1.5], [0, 1]), ("arm", ["y", "x"])):
        curves = kaplan_meier(table, groups).curves
        high, low = (curves[curves["group"] == name] for name in reversed(names))
        assert high["time"].tolist() == [0, 1, 2, 3] and high["at_risk"].tolist() == [3, 3, 2, 1]
        assert high["survival"].tolist() == pytest.approx([1, 2 / 3, 2 / 3, 0])
        assert low["survival"].tolist() == pytest.approx([1, 2 / 3, 2 / 3, 2 / 3])
    with pytest.raises(ValueError, match="fall into one risk group"):
        kaplan_meier(table.assign(risk=0.0))
    with pytest.raises(ValueError, match="no column 'sex'"):
        kaplan_meier(table, "sex")


# --- what cannot be judged ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.assign(event=0), "All 20 rows are censored"),
        (lambda t: t.assign(time=-t["time"] - 1), "20 of 20 times are unusable, first that of patient 'p0'"),
        (lambda t: t.assign(time=np.nan), "times must be days of 0 or more"),
        (lambda t: t.assign(risk=t["risk"].where(t.index != 3)), "1 of 20 risks are unusable, .* patient 'p3'"),
        (lambda t: t.assign(event=2), "20 of 20 events are unusable"),
        (lambda t: t.assign(patient_id="p", case_id=t["patient_id"]), "holds 1 patients: comparing risks takes two"),
        (lambda t: t.iloc[:0], "holds 0 patients"),
        (lambda t: t.drop(columns="time"), "lacks time: give a row per case with risk, time, event, patient_id"),
        (lambda t: pd.concat([t, t]), "'/p0' has several rows for one seed"),
        (lambda t: t.assign(event=(t["time"] == t["time"].max()).astype(int)), "None of the 20 cases can be compared"),
        (lambda t: pd.concat([t.assign(seed=0), t.iloc[1:].assign(seed=1)]), "Some seeds lack some cases"),
        (lambda t: pd.concat([t.assign(seed=0), t.assign(seed=1, time=5.0)]), "has different outcomes"),
    ],
)
def test_an_unusable_table_is_one_sentence(change, words):
    with pytest.raises(ValueError, match=words) as error:
        concordance(change(patients(20)))
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_other_mistakes_are_one_sentence():
    table = patients(40)
    late = table.assign(time=table["time"] + 1e5)
    for call, words in (
        (lambda: concordance(table, "uno"), "no concordance of kind 'uno'"),
        (lambda: concordance_difference(table, "risk", "luck"), r"no column \['luck'\]"),
        (lambda: concordance(late, "ipcw", table), "beyond the .* days that the training outcomes reach"),
        (lambda: time_dependent_auc(table, [1e6]), "cannot be judged: the first event is at day 0"),
        (lambda: time_dependent_auc(late, [5.0]), "cannot be judged"),
        (lambda: brier(table, table, [100.0]), "needs two or more"),
        (lambda: brier(table, pd.concat([table.assign(seed=s) for s in (0, 1)])), "1 seeds and the training table 2"),
        (
            lambda: permutation_null(
                pd.concat([table.assign(case_id=table.index), table.assign(case_id=-table.index - 1, time=3.0)])
            ),
            "different outcomes, which cannot be dealt out",
        ),
    ):
        with pytest.raises(ValueError, match=words) as error:
            call()
        assert "\n" not in str(error.value)


def test_importing_the_module_does_not_load_scikit_survival():
    import subprocess
    import sys

    program = "import lib.survival, sys; print('sksurv' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "False\n"
