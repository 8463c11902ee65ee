"""The SEU loss: its terms by hand and by property, its names, and what it says to probabilities and empty masks."""

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lib import losses
from lib.losses import overlap, seu

NAMES = ("seu", "seu_binary", "seu_no_entropy", "seu_no_spectral", "uavls_dice", "uavls_dice_ce")
LOGITS = ("dice", "bce", "dice_bce", "tversky", "xbusnet_dice", *NAMES)
maps = arrays("float32", (2, 1, 6, 8), elements=st.floats(-30, 30, width=32)).map(torch.from_numpy)
masks = arrays("uint8", (2, 1, 6, 8), elements=st.integers(0, 1)).map(torch.from_numpy)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 1, 8, 6, generator=generator)
    return logits, (torch.rand(3, 1, 8, 6, generator=generator) > 0.6).float()


def test_terms_of_a_counted_example():
    p, t = torch.tensor([[[[1.0, 0.5], [0.0, 0.0]]]]), torch.tensor([[[[1.0, 0.0], [1.0, 0.0]]]])
    dice, spectral, entropy = seu.seu_terms(p, t)
    assert dice.item() == pytest.approx(1 - 2 * 1 / 3.5, abs=1e-5)
    # |F p| / 2 of [1, .5; 0, 0] is .75 .25 .75 .25, that of [1, 0; 1, 0] is 1 1 0 0
    assert spectral.item() == pytest.approx((0.25**2 + 0.75**2 + 0.75**2 + 0.25**2) / 4)
    assert entropy.item() == pytest.approx(0.5 * math.log(2) / 4, abs=1e-5)
    assert seu.seu_terms(p, t, "binary").entropy.item() == pytest.approx(math.log(2) / 4, abs=1e-5)


@settings(max_examples=40, deadline=None)
@given(maps, masks)
def test_every_term_and_its_gradient_are_finite_and_in_range(logits, mask):
    for kind in seu.ENTROPIES:
        logits = logits.detach().requires_grad_()
        terms = seu.seu_terms(logits.sigmoid(), mask, kind)
        terms.weighted().backward()
        assert logits.grad.isfinite().all()
        assert -1e-5 <= terms.dice <= 1 + 1e-5 and terms.spectral >= 0
        assert -1e-5 <= terms.entropy <= (1 / math.e if kind == "one-sided" else math.log(2)) + 1e-5


@settings(max_examples=20, deadline=None)
@given(maps, masks, st.integers(0, 5), st.integers(0, 7))
def test_the_spectral_term_does_not_see_where_a_shape_is(logits, mask, down, right):
    moved = torch.roll(mask, (down, right), (2, 3))
    p = logits.sigmoid()
    torch.testing.assert_close(seu.seu_terms(p, moved).spectral, seu.seu_terms(p, mask).spectral, atol=1e-5, rtol=1e-4)


def test_the_one_sided_entropy_charges_background_twice_as_much_as_foreground():
    """As published: p = .1 costs more than p = .9, though both are as far from one half."""
    nothing = torch.zeros(1, 1, 4, 4)

    def entropy(p, kind):
        return seu.seu_terms(torch.full((1, 1, 4, 4), p), nothing, kind).entropy.item()

    assert entropy(0.1, "one-sided") > 2 * entropy(0.9, "one-sided")
    assert entropy(0.1, "binary") == pytest.approx(entropy(0.9, "binary"))
    assert max((p / 100 for p in range(101)), key=lambda p: entropy(p, "one-sided")) == pytest.approx(
        1 / math.e, abs=0.01
    )


def test_class_numbers_are_spread_over_channels(batch):
    p = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(1)).softmax(1)
    labels = torch.randint(0, 3, (2, 4, 5), generator=torch.Generator().manual_seed(2))
    spread = torch.stack([labels == k for k in range(3)], dim=1)
    for a, b in zip(seu.seu_terms(p, labels), seu.seu_terms(p, spread), strict=True):
        torch.testing.assert_close(a, b)


def test_names_are_the_terms_with_their_weights(batch):
    logits, mask = batch
    one, two = (seu.seu_terms(logits.sigmoid(), mask, kind) for kind in seu.ENTROPIES)
    expected = {
        "seu": one.dice + 0.3 * one.spectral + 0.1 * one.entropy,
        "seu_binary": one.dice + 0.3 * one.spectral + 0.1 * two.entropy,
        "seu_no_entropy": one.dice + 0.3 * one.spectral,
        "seu_no_spectral": one.dice + 0.1 * one.entropy,
        "seu@spectral=0.5,entropy=0.02": one.dice + 0.5 * one.spectral + 0.02 * one.entropy,
        "seu_binary@entropy=0": one.dice + 0.3 * one.spectral,
        "seu@spectral=0,entropy=0": one.dice,
        "seu_no_spectral@entropy=0.7": one.dice + 0.7 * one.entropy,
    }
    for name, value in expected.items():
        torch.testing.assert_close(losses.loss(name)(logits, mask), value)


def test_the_released_line_means_dice_or_a_twofold_sigmoid(batch):
    logits, mask = batch
    p = logits.sigmoid()
    torch.testing.assert_close(losses.loss("uavls_dice")(logits, mask), seu.released_dice(p, mask))
    twice = losses.loss("uavls_dice_ce")(logits, mask) - losses.loss("uavls_dice")(logits, mask)
    torch.testing.assert_close(twice, torch.nn.functional.binary_cross_entropy(p.sigmoid(), mask))


def test_an_unknown_entropy_is_one_sentence(batch):
    with pytest.raises(ValueError, match="no entropy 'two-sided' of the SEU loss: use one of one-sided, binary"):
        seu.seu_terms(*batch, "two-sided")


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_raised_under_autocast_too(name, batch):
    logits, mask = batch
    expected = losses.loss(name)(logits.bfloat16().float(), mask)
    with torch.autocast("cpu", torch.bfloat16):
        value = losses.loss(name)(logits.bfloat16(), mask.to(torch.uint8))
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected)


# ---- bad input -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOGITS)
@pytest.mark.parametrize("logit", [-200.0, -30.0, -3.0, 0.0, 200.0])
def test_masks_that_are_all_empty_give_a_finite_loss_and_gradient(name, logit):
    logits = torch.full((2, 1, 8, 8), logit).requires_grad_()
    value = losses.loss(name)(logits, torch.zeros(2, 1, 8, 8))
    value.backward()
    assert value.isfinite() and logits.grad.isfinite().all()


@pytest.mark.parametrize("name", LOGITS)
def test_the_output_of_a_sigmoid_is_refused(name, batch):
    logits, mask = batch
    logits.requires_grad_()
    for probability in (logits.sigmoid(), logits.sigmoid().clone(), logits.bfloat16().sigmoid().float()):
        with pytest.raises(
            ValueError, match="takes logits and was given the output of a sigmoid: give it what went in"
        ):
            losses.loss(name)(probability, mask)


def test_the_output_of_a_softmax_is_refused():
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    with pytest.raises(ValueError, match="output of a softmax"):
        overlap.dice_ce(logits.softmax(1), torch.zeros(2, 1, 4, 4))


@pytest.mark.parametrize("name", LOGITS)
def test_values_that_look_like_probabilities_are_warned_of(name, batch):
    logits, mask = batch
    with pytest.warns(UserWarning, match="takes logits, and all that it was given lies between 0 and 1"):
        losses.loss(name)(logits.sigmoid(), mask)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # not of logits, whatever their graph; nor of a start at zero
        losses.loss(name)(logits, mask)
        losses.loss(name)(torch.zeros_like(logits), mask)
        losses.loss(name)(logits.requires_grad_().abs().clamp(max=1), mask)
