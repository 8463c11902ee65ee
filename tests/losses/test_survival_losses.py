"""Survival losses: by loops over pairs, by hand, against scikit-survival, at their corners and limits."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib import losses
from lib.losses.survival import TIES, cox, cox_efron, discrete, discrete_risk, discrete_survival, discrete_time

QUICK = settings(deadline=None, max_examples=40)


def cases(number, seed=0, levels=0, censored=0.4):
    """Random risks and outcomes in float64; `levels` > 0 rounds the days so that many tie."""
    rng = np.random.default_rng(seed)
    days = rng.exponential(300, number)
    if levels:
        days = np.floor(days / 900 * levels)
    event = rng.random(number) >= censored
    event[0] = True
    return torch.tensor(rng.normal(size=number)), torch.tensor(np.stack([days, event], 1))


def by_loops(risk, outcome, ties):
    """The partial likelihood as the papers write it, event by event over all cases."""
    risk, (days, event) = risk.tolist(), outcome.T.tolist()
    total, seen = 0.0, {}
    for i, time in enumerate(days):
        if not event[i]:
            continue
        at_risk = sum(math.exp(r) for r, t in zip(risk, days, strict=True) if t >= time)
        tied = [math.exp(r) for r, t, e in zip(risk, days, event, strict=True) if e and t == time]
        gone = seen.get(time, 0) / len(tied) * sum(tied) if ties == "efron" else 0.0
        seen[time] = seen.get(time, 0) + 1
        total += math.log(at_risk - gone) - risk[i]
    return total / sum(event)


@QUICK
@given(
    number=st.integers(1, 40),
    levels=st.integers(0, 6),
    seed=st.integers(0, 9999),
    censored=st.sampled_from([0.0, 0.4, 0.9]),
    ties=st.sampled_from(TIES),
)
def test_cox_is_its_equation(number, levels, seed, censored, ties):
    risk, outcome = cases(number, seed, levels, censored)
    assert cox(risk, outcome, ties).item() == pytest.approx(by_loops(risk, outcome, ties), abs=1e-10)


@QUICK
@given(number=st.integers(1, 30), levels=st.integers(0, 4), shift=st.floats(-1e3, 1e3), ties=st.sampled_from(TIES))
def test_only_differences_of_risk_and_the_order_of_days_count(number, levels, shift, ties):
    risk, outcome = cases(number, number, levels)
    value = cox(risk, outcome, ties)
    torch.testing.assert_close(cox(risk + shift, outcome, ties), value)
    later = torch.stack([outcome[:, 0].exp2().log1p() * 7 if levels else outcome[:, 0] ** 2, outcome[:, 1]], 1)
    torch.testing.assert_close(cox(risk, later, ties), value)
    again = torch.randperm(number, generator=torch.Generator().manual_seed(levels))
    torch.testing.assert_close(cox(risk[again], outcome[again], ties), value)


def test_cox_by_hand():
    """Risks a, b, c, d: two fail on day 1, one is lost on day 1, one fails on day 2."""
    a, b, c, d = (math.exp(r) for r in (0.5, -1.0, 2.0, 0.3))
    risk = torch.tensor([0.5, -1.0, 2.0, 0.3])
    outcome = torch.tensor([[1.0, 1], [1, 1], [1, 0], [2, 1]])
    everyone = a + b + c + d
    breslow = -math.log(a / everyone) - math.log(b / everyone) - math.log(d / d)
    efron = -math.log(a / everyone) - math.log(b / (everyone - (a + b) / 2))
    assert cox(risk, outcome).item() == pytest.approx(breslow / 3, rel=1e-6)
    assert cox(risk, outcome, "efron").item() == pytest.approx(efron / 3, rel=1e-6)
    assert cox_efron(risk[:, None], outcome).item() == pytest.approx(efron / 3, rel=1e-6)


def test_without_ties_both_ways_agree_and_with_ties_efron_is_smaller():
    risk, outcome = cases(30)
    torch.testing.assert_close(cox(risk, outcome), cox_efron(risk, outcome))
    risk, outcome = cases(30, levels=3)
    assert cox_efron(risk, outcome) < cox(risk, outcome) - 0.1


@pytest.mark.parametrize("ties", TIES)
def test_the_coefficients_of_scikit_survival_are_a_stationary_point(ties):
    from sksurv.linear_model import CoxPHSurvivalAnalysis
    from sksurv.util import Surv

    rng = np.random.default_rng(3)
    x = rng.normal(size=(80, 3))
    days = np.ceil(rng.exponential(np.exp(-x @ [1.0, -0.5, 0.0])) * 8)
    event = rng.random(80) < 0.7
    fitted = CoxPHSurvivalAnalysis(ties=ties, tol=1e-12).fit(x, Surv.from_arrays(event, days)).coef_
    outcome = torch.tensor(np.stack([days, event], 1))

    def slope(coefficients, how):
        weights = torch.tensor(coefficients, requires_grad=True)
        return torch.autograd.grad(cox(torch.tensor(x) @ weights, outcome, how), weights)[0].abs().max().item()

    assert slope(fitted, ties) < 1e-6
    assert slope(fitted, TIES[ties == "breslow"]) > 1e-3
    assert slope(fitted + 0.1, ties) > 1e-3


@pytest.mark.parametrize("ties", TIES)
def test_gradients_are_right_and_finite_for_any_risk(ties):
    risk, outcome = cases(12, levels=3)
    assert torch.autograd.gradcheck(lambda r: cox(r, outcome, ties), risk.requires_grad_())
    for scale in (0.0, 1e2, 1e4, -1e4):
        large = (risk.detach().float() * scale).requires_grad_()
        value = cox(large, outcome.float(), ties)
        value.backward()
        assert value.isfinite() and large.grad.isfinite().all()
        assert large.grad.sum().abs() < 1e-3  # as fine as float32 tells risks of 10,000 apart
    assert cox(risk.detach().half(), outcome, ties).dtype == torch.float32


@pytest.mark.parametrize("ties", TIES)
def test_the_loss_leads_to_the_true_order(ties):
    risk, outcome = torch.zeros(20, requires_grad=True), torch.stack([torch.arange(20.0), torch.ones(20)], 1)
    optimiser = torch.optim.Adam([risk], lr=0.1)
    for _ in range(100):
        optimiser.zero_grad()
        cox(risk, outcome, ties).backward()
        optimiser.step()
    assert (risk.diff() < 0).all()


def test_a_batch_without_events_teaches_nothing_and_a_data_set_is_refused():
    risk, outcome = torch.randn(5, requires_grad=True), torch.tensor([[3.0, 0]] * 5)
    value = cox(risk, outcome)
    value.backward()
    assert value == 0 and not risk.grad.any()
    with pytest.raises(ValueError, match="All 5 cases are censored, which says nothing about risk"):
        cox(risk, outcome, strict=True)
    with pytest.raises(ValueError, match="All 5 cases are censored"):
        discrete_time(torch.randn(5, 2), outcome, [0, 1, 2], strict=True)


@pytest.mark.parametrize("bad", [[-1.0, 1], [math.nan, 1], [math.inf, 0], [3.0, 2], [3.0, math.nan]])
@pytest.mark.parametrize("name", ["cox", "cox_efron", "discrete"])
def test_an_unusable_outcome_is_one_sentence(name, bad):
    outcome = torch.tensor([[5.0, 1], bad, [2.0, 0]])
    with pytest.raises(ValueError, match="1 of 3 outcomes are unusable, first") as error:
        losses.loss(name)(torch.randn(3, 1), outcome)
    assert "\n" not in str(error.value)


def test_shapes_that_do_not_fit_are_one_sentence():
    risk, outcome = cases(4)
    for call, words in (
        (lambda: cox(risk.view(2, 2), outcome), r"shape \(2, 2\): give Cox's loss one for each case"),
        (lambda: cox(risk, outcome[:3]), r"Outcomes \(3, 2\) do not fit 4 cases"),
        (lambda: cox(risk, outcome, "exact"), "no handling of ties 'exact': use one of breslow, efron"),
        (lambda: discrete_time(risk[:, None], outcome, [0, 1, 2]), "do not fit: give .B, K. and .K . 1."),
        (lambda: discrete_time(risk[:, None], outcome, [1, 2]), "must rise from 0"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


# --- discrete time ------------------------------------------------------------------------------------------------


def hazards_by_loops(logits, outcome, edges):
    """Interval by interval, with the credit for half an interval that the paper gives to the censored."""
    total = 0.0
    for row, (time, event) in zip(logits.tolist(), outcome.tolist(), strict=True):
        for logit, start, stop in zip(row, edges, edges[1:], strict=False):
            hazard = 1 / (1 + math.exp(-logit))
            if event and start <= time < stop:
                total -= math.log(hazard)
            elif time >= (stop if event else (start + stop) / 2):
                total -= math.log(1 - hazard)
    return total / len(outcome)


@pytest.mark.filterwarnings("ignore:This loss takes logits")
@QUICK
@given(number=st.integers(1, 20), intervals=st.integers(1, 6), seed=st.integers(0, 999))
def test_hazards_are_their_equation(number, intervals, seed):
    _, outcome = cases(number, seed, levels=9)
    rng = np.random.default_rng(seed)
    edges = [0.0, *np.cumsum(rng.integers(1, 4, intervals)).astype(float)]
    logits = torch.tensor(rng.normal(size=(number, intervals)))
    expected = hazards_by_loops(logits, outcome, edges)
    assert discrete_time(logits, outcome, edges).item() == pytest.approx(expected, abs=1e-12)


def test_the_best_hazards_are_the_life_table():
    """Ten cases: 3 fail in the first year, 2 leave at its end, 1 of 5 fails in the second, 4 stay."""
    outcome = torch.tensor([[100.0, 1]] * 3 + [[365, 0]] * 2 + [[500, 1]] + [[800, 0]] * 4)
    logits = torch.zeros(2, requires_grad=True)
    optimiser = torch.optim.LBFGS([logits], line_search_fn="strong_wolfe", max_iter=50)

    def step():
        optimiser.zero_grad()
        value = discrete(logits.expand(10, 2), outcome, end=730.0)
        value.backward()
        return value

    optimiser.step(step)
    torch.testing.assert_close(logits.sigmoid(), torch.tensor([3 / 10, 1 / 5]), atol=1e-3, rtol=0)


def test_hazards_are_found_by_name_and_make_one_risk():
    _, outcome = cases(6)
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    edges = [0, 250, 500, 750, 1000]
    torch.testing.assert_close(losses.loss("discrete@end=1000")(logits, outcome), discrete_time(logits, outcome, edges))
    risk = discrete_risk(torch.tensor([[0.0, 0.0], [-50.0, -50.0], [50.0, 0.0]]))
    torch.testing.assert_close(risk, torch.tensor([-0.75, -2.0, 0.0]))
    left = discrete_survival(torch.tensor([[0.0, 0.0], [-50.0, -50.0]]))
    torch.testing.assert_close(left, torch.tensor([[0.5, 0.25], [1.0, 1.0]]))
    assert discrete_time(logits * 1e4, outcome, edges).isfinite()
