"""Losses of mask queries: what a positive, a negative and an ignored text do, and what a match costs."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.losses.queries import assignment_cost, mask_bce, mask_dice, mp_nce, radzero_mp_nce

# ---- masks -----------------------------------------------------------------------------------------------


def test_a_right_mask_costs_nothing_and_an_empty_one_is_smoothed():
    mask = torch.zeros(2, 4, 4)
    mask[0, :2] = 1
    logits = 60 * mask - 30
    assert mask_dice(logits, mask) == pytest.approx(0, abs=1e-6)
    assert mask_bce(logits, mask) == pytest.approx(0, abs=1e-6)
    assert mask_dice(torch.full((1, 2, 3), 30.0), torch.zeros(1, 2, 3)) == pytest.approx(1 - 1 / 7)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000))
def test_the_cost_of_a_match_is_the_loss_of_that_pair(seed):
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(3, 2, 5, generator=generator)
    mask = (torch.rand(2, 2, 5, generator=generator) > 0.5).float()
    cost = assignment_cost(logits, mask, dice=2.0, bce=3.0)
    for q in range(3):
        for m in range(2):
            pair = logits[q : q + 1], mask[m : m + 1]
            assert cost[q, m].item() == pytest.approx((2 * mask_dice(*pair) + 3 * mask_bce(*pair)).item(), rel=1e-4)


# ---- words -----------------------------------------------------------------------------------------------

POSITIVE = torch.tensor([[True, True, False, False]])
NEGATIVE = torch.tensor([[False, False, True, False]])


def test_positives_do_not_compete_and_the_rest_is_ignored():
    similarity = torch.tensor([[0.9, 0.2, 0.1, 0.5]])
    by_hand = sum(math.log1p(math.exp((0.1 - s) / 0.5)) for s in (0.9, 0.2)) / 2
    assert mp_nce(similarity, POSITIVE, NEGATIVE, 0.5).item() == pytest.approx(by_hand, rel=1e-5)
    other = similarity.clone()
    other[0, 3] = -0.7
    assert mp_nce(other, POSITIVE, NEGATIVE, 0.5) == mp_nce(similarity, POSITIVE, NEGATIVE, 0.5)


def test_with_one_positive_it_is_the_cross_entropy_of_finding_it():
    similarity = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    own = torch.zeros(5, 7, dtype=torch.bool)
    own[range(5), range(5)] = True
    expected = torch.nn.functional.cross_entropy(similarity / 0.3, torch.arange(5))
    torch.testing.assert_close(mp_nce(similarity, own, ~own, 0.3), expected)


def test_anchors_without_words_count_nowhere():
    similarity = torch.tensor([[0.9, 0.2, 0.1, 0.5], [0.3, 0.1, 0.2, 0.4]])
    none = torch.zeros(1, 4, dtype=torch.bool)
    both = mp_nce(similarity, torch.cat([POSITIVE, none]), torch.cat([NEGATIVE, NEGATIVE]))
    assert both == mp_nce(similarity[:1], POSITIVE, NEGATIVE)
    assert mp_nce(similarity[1:], none, NEGATIVE) == 0
    assert mp_nce(similarity[:1], POSITIVE, none) == 0  # nothing to be told from


def test_a_text_has_one_role():
    with pytest.raises(ValueError, match="give each pair one role"):
        mp_nce(torch.zeros(1, 4), POSITIVE, POSITIVE)


def test_the_temperature_may_learn():
    tau = torch.tensor(0.07, requires_grad=True)
    mp_nce(torch.tensor([[0.3, 0.2, 0.4, 0.0]]), POSITIVE, NEGATIVE, tau).backward()
    assert tau.grad.isfinite() and tau.grad != 0


def test_radzero_with_one_phrase_an_image_is_info_nce():
    similarity = torch.randn(6, 6, generator=torch.Generator().manual_seed(1)).double() / 3
    target = torch.arange(6)
    entropy = torch.nn.functional.cross_entropy
    expected = (entropy(similarity / 0.5, target) + entropy(similarity.T / 0.5, target)) / 2
    for sums in ((False, False), (True, True)):
        found = radzero_mp_nce(similarity, target, 0.5, *sums)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
