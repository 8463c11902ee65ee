"""Intervals and tests against slow loops, simulations and hand computations."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from lib import statistics

PATIENTS = np.array(["a", "a", "a", "b", "c", "c", "d", "e", "f", "f"])


@pytest.fixture
def rng():
    return np.random.default_rng(20)


def test_bootstrap_has_the_distribution_of_a_naive_loop(rng):
    scores = rng.normal(size=(2, 3, 10))  # models, seeds, cases
    groups = [np.flatnonzero(name == PATIENTS) for name in np.unique(PATIENTS)]
    loop = []
    for _ in range(4000):
        cases = np.concatenate([groups[i] for i in rng.integers(0, len(groups), len(groups))])
        seeds = rng.integers(0, 3, 3)
        loop.append(scores[:, seeds][..., cases].mean((1, 2)))
    fast = statistics.bootstrap_means(scores, PATIENTS, n=4000)
    for model in range(2):
        assert stats.ks_2samp(fast[:, model], np.array(loop)[:, model]).pvalue > 1e-3
    np.testing.assert_allclose(np.cov(fast.T), np.cov(np.array(loop).T), atol=0.03)


def test_every_resample_is_a_mean_over_whole_patients():
    scores = np.array([[1.0, 0, 0, 0, 0, 0, 0, 0, 0, 0]])  # one of patient a's three cases
    means = statistics.bootstrap_means(scores, PATIENTS, n=500)[:, 0]
    # Six patients are drawn: a, k times, with three cases each; the others with one or two cases each.
    possible = [k / (3 * k + rest) for k in range(7) for rest in range(6 - k, 2 * (6 - k) + 1)]
    assert np.abs(means[:, None] - possible).min(1).max() < 1e-12


@settings(max_examples=30, deadline=None)
@given(arrays(np.float64, (2, 10), elements=st.floats(-1e4, 1e4)), st.integers(0, 2**32))
def test_bootstrap_repeats_bit_for_bit(scores, seed):
    means = [statistics.bootstrap_means(scores, PATIENTS, n=50, seed=seed) for _ in range(2)]
    assert (means[0] == means[1]).all()


def test_sums_are_exact_in_any_order(rng):
    scores = rng.random((2000, 3))
    table = statistics._exactly_summable(scores, 2000)
    np.testing.assert_allclose(table, scores, rtol=0, atol=1e-12)
    weights = next(statistics._draws(2000, 20, rng))
    order = rng.permutation(2000)
    assert (weights @ table == weights[:, order] @ table[order]).all()


def test_the_order_of_the_cases_does_not_matter(rng):
    scores, order = rng.random((2, 10)), rng.permutation(10)
    moved = statistics.bootstrap_means(scores[:, order], PATIENTS[order], n=50)
    np.testing.assert_allclose(moved, statistics.bootstrap_means(scores, PATIENTS, n=50), rtol=1e-9)


def test_the_number_of_resamples_drawn_at_once_does_not_matter(rng, monkeypatch):
    scores = rng.random((2, 10))
    whole = statistics.bootstrap_means(scores, PATIENTS, n=300)
    monkeypatch.setattr(statistics, "_CHUNK", 70)
    assert (statistics.bootstrap_means(scores, PATIENTS, n=300) == whole).all()


def test_intervals_of_normals_cover_their_mean_about_95_times_in_100(rng):
    covered = 0
    for trial in range(300):
        values = rng.normal(0.3, 1.0, 80)
        result = statistics.interval(values, np.arange(80), n=600, seed=trial)
        covered += result.low <= 0.3 <= result.high
    assert 0.91 <= covered / 300 <= 0.98


def test_grouped_cases_are_not_counted_as_independent(rng):
    values = np.repeat(rng.normal(size=40), 5)
    by_patient = statistics.interval(values, np.repeat(np.arange(40), 5))
    by_case = statistics.interval(values, np.arange(200))
    assert by_patient.high - by_patient.low > 1.8 * (by_case.high - by_case.low)
    assert (by_patient.n_cases, by_patient.n_patients, by_patient.n_seeds) == (200, 40, 1)


def test_seeds_that_disagree_widen_the_interval(rng):
    values = rng.normal(0.8, 0.01, (1, 100))
    alike, apart = values + np.zeros((4, 1)), values + np.array([[-0.1], [0.1], [-0.1], [0.1]])
    narrow, wide = (statistics.interval(v, np.arange(100)) for v in (alike, apart))
    assert wide.high - wide.low > 5 * (narrow.high - narrow.low)
    assert wide.n_seeds == 4 and wide.mean == pytest.approx(narrow.mean)


def test_pairing_removes_what_the_arms_share(rng):
    cases = rng.normal(0.7, 0.2, 200)
    a, b = cases + 0.02 + rng.normal(0, 0.02, 200), cases + rng.normal(0, 0.02, 200)
    difference = statistics.paired_bootstrap(a, b, np.arange(200))
    assert 0 < difference.low < 0.02 < difference.high
    apart = [statistics.interval(arm, np.arange(200)) for arm in (a, b)]
    assert apart[0].low < apart[1].high


@pytest.mark.parametrize(
    ("scores", "patients", "sentence"),
    [
        ([[0.1, 0.2]], ["a"], r"shape \(1, 1, 2\) and 1 patients do not match"),
        ([[0.1, np.nan]], ["a", "b"], "1 of 2 scores are NaN"),
        ([[]], [], "0 patients do not match"),
    ],
)
def test_bad_scores_are_named(scores, patients, sentence):
    with pytest.raises(ValueError, match=sentence):
        statistics.bootstrap_means(np.array(scores), patients)


def test_unpaired_shapes_are_refused():
    with pytest.raises(ValueError, match=r"shapes \(2, 3\) and \(1, 3\)"):
        statistics.paired_bootstrap(np.zeros((2, 3)), np.zeros((1, 3)), list("abc"))


# --- Tables


@pytest.fixture
def table():
    rows = [
        {"arm": arm, "seed": seed, "dataset": "d", "case_id": f"c{i}", "patient_id": f"p{i // 2}", "dsc": value}
        for arm, shift in (("with", 0.5), ("without", 0.0))
        for seed in (0, 1)
        for i, value in enumerate(shift + 0.01 * np.arange(4) + 0.1 * seed)
    ]
    return pd.DataFrame(rows).sample(frac=1, random_state=0)


def test_a_shuffled_table_is_lined_up(table):
    a, b, patients = statistics.paired_table(table, "dsc", "with", "without")
    np.testing.assert_allclose(b, [[0, 0.01, 0.02, 0.03], [0.1, 0.11, 0.12, 0.13]])
    np.testing.assert_allclose(a - b, 0.5)
    assert patients.tolist() == ["d/p0", "d/p0", "d/p1", "d/p1"]


def test_tables_that_do_not_pair_are_refused(table):
    with pytest.raises(ValueError, match="No arm 'witout' in this table: it holds with, without"):
        statistics.paired_table(table, "dsc", "with", "witout")
    with pytest.raises(ValueError, match="several rows for one seed and case"):
        statistics.paired_table(pd.concat([table, table]), "dsc", "with", "without")
    with pytest.raises(ValueError, match="do not pair: 2 and 1 seeds"):
        statistics.paired_table(table[(table["arm"] == "with") | (table["seed"] == 0)], "dsc", "with", "without")


# --- Tests


def test_holm_by_hand():
    # 0.01 x 4; 0.02 x 3; 0.03 x 2 stays at least 0.06; 0.04 x 1 too.
    np.testing.assert_allclose(statistics.holm([0.04, 0.01, 0.03, 0.02]), [0.06, 0.04, 0.06, 0.06])
    np.testing.assert_allclose(statistics.holm([0.6, 0.7]), [1, 1])


def test_wilcoxon_finds_the_shift_and_not_the_noise(rng):
    base = rng.normal(size=(3, 60))
    pairs = {"shift": (base + 0.5 + 0.3 * rng.normal(size=base.shape), base), "same": (base, base)}
    result = statistics.wilcoxon_holm(pairs).set_index("pair")
    assert result.loc["shift", "p_holm"] == 2 * result.loc["shift", "p"] < 1e-6
    assert result.loc["same", "p"] == 1
    expected = stats.wilcoxon(pairs["shift"][0].mean(0) - base.mean(0)).pvalue
    assert result.loc["shift", "p"] == pytest.approx(expected)


def test_wilcoxon_takes_a_patient_once():
    difference = np.repeat([0.1, 0.2, 0.3, 0.4, 0.5], 20)
    once = statistics.wilcoxon_holm({"x": (difference, 0 * difference)}, np.repeat(list("abcde"), 20))
    assert once.loc[0, "n"] == 5 and once.loc[0, "p"] == pytest.approx(2 / 2**5)  # all five positive


# --- Rankings and published means


def test_a_clear_order_is_certain_and_a_tie_is_not(rng):
    cases = rng.normal(0.7, 0.1, 100)
    scores = {"b": cases, "best": cases + 0.1, "twin": cases + rng.normal(0, 0.01, 100)}
    ranking = statistics.ranking_stability(scores, np.arange(100), n=2000)
    assert ranking.order[0] == "best" and ranking.probability.loc["best", 1] == 1
    assert ranking.probability.sum(axis=1).tolist() == pytest.approx([1, 1, 1])
    assert ranking.probability.loc["twin", 2] not in (0, 1)
    swapped = ranking.probability.iloc[2][2]  # the last model overtakes the second: one pair of three turns
    assert ranking.tau.mean == pytest.approx(1 - swapped * 2 / 3)
    assert statistics.ranking_stability(scores, np.arange(100), higher_is_better=False, n=50).order[-1] == "best"


def test_tau_is_kendalls(rng):
    scores = {str(i): rng.normal(size=8) for i in range(5)}
    ranking = statistics.ranking_stability(scores, np.arange(8), n=40)
    means = statistics.bootstrap_means(np.stack(list(scores.values())), np.arange(8), n=40)
    observed = [values.mean() for values in scores.values()]
    expected = np.mean([stats.kendalltau(row, observed).statistic for row in means])
    assert ranking.tau.mean == pytest.approx(expected)


def test_one_model_has_no_rank():
    with pytest.raises(ValueError, match="two or more models but got 1"):
        statistics.ranking_stability({"only": np.ones(3)}, list("abc"))


def test_reconstructed_intervals_by_hand():
    wilson = statistics.reconstruct_interval(0.8, 10)
    assert (wilson.low, wilson.high) == pytest.approx((0.4902, 0.9433), abs=1e-4)  # 8 of 10, textbook value
    normal = statistics.reconstruct_interval(0.8, 25, sd=0.1)
    assert normal.high - 0.8 == pytest.approx(2.0639 * 0.1 / 5, abs=1e-5)
    assert normal.method != wilson.method


@settings(max_examples=50, deadline=None)
@given(arrays(np.float64, 30, elements=st.floats(0, 1)))
def test_without_an_sd_the_interval_assumes_the_most_that_the_scores_can_vary(scores):
    spread = scores.std()
    assert spread**2 <= scores.mean() * (1 - scores.mean()) + 1e-12


def test_published_means_must_be_fractions_of_several_cases():
    with pytest.raises(ValueError, match="not within .0, 1.: give it as a fraction"):
        statistics.reconstruct_interval(85.7, 100)
    with pytest.raises(ValueError, match="n is 1"):
        statistics.reconstruct_interval(0.8, 1)


def test_a_resolvable_gap_is_found_with_the_stated_power(rng):
    gap = statistics.resolvable_gap(0.2, 50)
    means = rng.normal(gap, 0.2, (2000, 50)).mean(1)
    found = np.abs(means) > stats.norm.ppf(0.975) * 0.2 / 50**0.5
    assert 0.76 <= found.mean() <= 0.84


def test_reliability_of_a_known_forecast():
    table = statistics.reliability(np.array([0.1, 0.1, 0.9, 0.9]), np.array([0, 0, 1, 0]), bins=5)
    assert table["forecast"].tolist() == pytest.approx([0.1, 0.9])
    assert table["frequency"].tolist() == [0, 0.5] and table["share"].tolist() == [0.5, 0.5]


def test_sides_of_different_cases_share_the_draws_of_their_patients():
    rng = np.random.default_rng(0)
    patient = rng.normal(0, 0.2, 60)
    a, b = 0.7 + patient, 0.6 + patient[:50]
    names = [f"p{i}" for i in range(60)]
    found = statistics.separate_bootstrap(a, b, names, names[:50], n=1000)
    assert found.mean == pytest.approx(a.mean() - b.mean())
    assert found.low < found.mean < found.high and (found.n_cases, found.n_patients, found.n_seeds) == (110, 60, 1)
    strangers = statistics.separate_bootstrap(a, b, names, [f"q{i}" for i in range(50)], n=1000)
    assert found.high - found.low < 0.6 * (strangers.high - strangers.low)  # what patients share cancels out
    half = statistics.separate_bootstrap(a, b, names, names[:50], times=0.5, n=1000)
    assert half.mean == pytest.approx(a.mean() - 0.5 * b.mean())


def test_sides_with_other_seeds_are_refused():
    with pytest.raises(ValueError, match="2 and 1 seeds"):
        statistics.separate_bootstrap(np.ones((2, 3)), np.ones((1, 3)), "abc", "abc")


@pytest.mark.parametrize("power", [0.5, 0.8, 0.95])
def test_cases_needed_and_the_gap_that_they_resolve_are_inverse(power):
    for n in (7, 100, 2113):
        gap = statistics.resolvable_gap(0.3, n, power)
        assert statistics.cases_needed(0.3, gap, power) == pytest.approx(n)
        assert statistics.cases_needed(0.3, -gap, power) == pytest.approx(n)
    assert statistics.cases_needed(0.3, 0.0) == float("inf")


def test_more_patients_find_the_right_winner_more_often():
    rng = np.random.default_rng(0)
    b = rng.uniform(0.3, 0.9, 400)
    a = b + rng.normal(0.02, 0.1, 400)
    found = statistics.right_winner(a, b, range(400), (1, 25, 400))
    swapped = statistics.right_winner(b, a, range(400), (1, 25, 400))
    assert found["share"].is_monotonic_increasing and found["share"].iloc[-1] > 0.95
    np.testing.assert_allclose(found["share"], swapped["share"])  # the better one is the better one from both sides
    assert statistics.right_winner(b, b, range(400), (5,))["share"].item() == 0.5


def test_a_ratio_shares_its_draws(rng):
    whole = rng.normal(0.4, 0.2, (3, 80))
    names = [f"p{i}" for i in range(80)]
    found = statistics.ratio_bootstrap(0.5 * whole, whole, names, n=1000)
    # part and whole vary together, so that a constant share has no spread at all
    assert (found.mean, found.low, found.high) == pytest.approx((0.5, 0.5, 0.5))
    assert (found.n_cases, found.n_patients, found.n_seeds) == (80, 80, 3)
    apart = statistics.ratio_bootstrap(rng.normal(0.2, 0.2, (3, 80)), whole, names, n=1000)
    assert apart.low < apart.mean < apart.high


def test_what_may_be_nothing_has_no_shares(rng):
    names = [f"p{i}" for i in range(40)]
    nothing = rng.normal(0, 1, 40)
    assert np.isnan(statistics.ratio_bootstrap(np.ones(40), nothing, names, n=1000).mean)
    with pytest.raises(ValueError, match="give both the same cases"):
        statistics.ratio_bootstrap(np.ones(3), np.ones(2), "abc")


# --- Which cases to keep


def kept_by_hand(risk, doubt, share):
    """Mean risk of the surest `share` of cases without ties."""
    order = np.argsort(doubt)
    return risk[order][: round(share * len(risk))].mean()


def test_the_surest_cases_are_kept_and_the_area_is_their_mean(rng):
    risk, doubt = rng.random((2, 3, 10))
    found = statistics.selective_risk(risk, doubt, range(10), kept=(0.5, 0.8, 1.0), n=10)
    for column, share in enumerate((0.5, 0.8, 1.0)):
        by_hand = [kept_by_hand(*pair, share) for pair in zip(risk, doubt, strict=True)]
        assert found[0, column] == pytest.approx(np.mean(by_hand))
    area = [np.mean([kept_by_hand(*pair, k / 10) for k in range(1, 11)]) for pair in zip(risk, doubt, strict=True)]
    assert found[0, -1] == pytest.approx(np.mean(area))


def test_a_resample_is_what_repeated_cases_give(rng):
    risk, doubt = rng.random((2, 1, 10))
    found = statistics.selective_risk(risk, doubt, PATIENTS, kept=(0.7,), n=5)
    names, where = np.unique(PATIENTS, return_inverse=True)
    for row, drawn in zip(found[1:], next(iter(statistics._drawn(len(names), 5, 0, 0))), strict=True):
        repeated = np.repeat(np.arange(10), drawn[where].astype(int))
        alone = statistics.selective_risk(risk[:, repeated], doubt[:, repeated], repeated, kept=(0.7,), n=1)
        np.testing.assert_allclose(row, alone[0])


def test_a_doubt_that_says_nothing_keeps_the_mean_risk(rng):
    risk = rng.random((2, 10))
    found = statistics.selective_risk(risk, np.zeros((2, 10)), PATIENTS, kept=(0.3, 0.8), n=20)
    np.testing.assert_allclose(found, found[:, [-1] * 3])
    assert found[0, 0] == pytest.approx(risk.mean())
    spread = statistics.interval(risk, PATIENTS, n=20)
    np.testing.assert_allclose(found[1:, 0], spread.draws)  # drawn as every other interval


def test_true_risk_is_the_best_doubt(rng):
    risk, doubt = rng.random((2, 2, 10))
    best, found = (statistics.selective_risk(risk, by, PATIENTS, kept=(0.5,), n=200) for by in (risk, doubt))
    assert (best <= found + 1e-12).all()


def test_separation_is_the_area_under_the_roc_curve(rng):
    high, low = rng.normal(0.5, 1, (2, 10)), rng.normal(0, 1, (2, 10))
    by_hand = [stats.mannwhitneyu(a, b).statistic / 100 for a, b in zip(high, low, strict=True)]
    found = statistics.separation(high, low, PATIENTS, n=200)
    assert found[0] == pytest.approx(np.mean(by_hand)) and len(found) == 201
    mean, below, above = statistics.ends(found)
    assert below < mean < above
    np.testing.assert_allclose(statistics.separation(high, high, PATIENTS, n=3), 0.5)


def test_doubts_that_do_not_fit_are_one_sentence():
    with pytest.raises(ValueError, match="do not match"):
        statistics.selective_risk(np.zeros((1, 3)), np.zeros((2, 3)), "abc")
    with pytest.raises(ValueError, match="above 0 and up to 1"):
        statistics.selective_risk(np.zeros(3), np.zeros(3), "abc", kept=(0.0,))
    with pytest.raises(ValueError, match="both states"):
        statistics.separation(np.zeros(3), np.zeros(2), "abc")
