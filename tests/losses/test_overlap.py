"""Overlap losses by hand, by property, and by name."""

import pytest
import torch

from lib import losses
from lib.losses import overlap

BINARY = ("dice", "bce", "dice_bce", "tversky", "tversky_specific", "xbusnet_dice")


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 1, 6, 7, generator=generator)
    return logits, (torch.rand(3, 1, 6, 7, generator=generator) > 0.6).float()


def test_dice_of_a_counted_example():
    logits = torch.tensor([[[[40.0, 40.0, 40.0, -40.0]]]])
    mask = torch.tensor([[[[1.0, 1.0, 0.0, 1.0]]]])  # TP 2, FP 1, FN 1
    assert overlap.dice(logits, mask).item() == pytest.approx(1 - (2 * 2 + 1) / (3 + 3 + 1))
    assert overlap.tversky(logits, mask, alpha=0.2, beta=0.6).item() == pytest.approx(1 - 3 / (3 + 0.2 + 0.6))
    assert overlap.xbusnet_dice(logits, mask).item() == pytest.approx(1 - 2 * (2 + 1) / (3 + 3 + 1))


def test_doubled_smoothing_rewards_an_empty_image_below_zero():
    nothing = torch.full((1, 1, 4, 4), -40.0)
    assert overlap.xbusnet_dice(nothing, torch.zeros(1, 1, 4, 4)).item() == pytest.approx(-1)
    assert overlap.dice(nothing, torch.zeros(1, 1, 4, 4)).item() == pytest.approx(0)


@pytest.mark.parametrize("name", BINARY)
def test_the_truth_beats_its_opposite_and_the_gradient_points_there(name, batch):
    logits, mask = batch
    loss = losses.loss(name)
    right = 20 * (2 * mask - 1)
    assert loss(right, mask) < loss(logits, mask) < loss(-right, mask)
    logits.requires_grad_()
    loss(logits, mask).backward()
    assert (torch.sign(-logits.grad) == torch.sign(2 * mask - 1)).all()


@pytest.mark.parametrize("name", BINARY)
def test_half_precision_is_raised_and_integer_masks_are_taken(name, batch):
    logits, mask = batch
    expected = losses.loss(name)(logits.bfloat16().float(), mask)
    value = losses.loss(name)(logits.bfloat16(), mask.to(torch.uint8))
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, expected)


def test_dice_bce_weighs_its_terms_equally(batch):
    torch.testing.assert_close(overlap.dice_bce(*batch), overlap.dice(*batch) + overlap.bce(*batch))


def test_two_class_dice_ce_with_ignored_voxels_sees_the_others_only():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 3, 5, 8, generator=generator)
    labels = torch.randint(0, 3, (2, 1, 5, 8), generator=generator)
    labels[..., 6:] = 7
    cropped = overlap.dice_ce(logits[..., :6], labels[..., :6], do_bg=True)
    torch.testing.assert_close(overlap.dice_ce(logits, labels, do_bg=True, ignore_label=7), cropped)


def test_pooling_the_batch_is_the_dice_of_one_large_image():
    generator = torch.Generator().manual_seed(2)
    logits, labels = torch.randn(2, 3, 4, 5, generator=generator), torch.randint(0, 3, (2, 1, 4, 5))
    wide = (torch.cat(list(x), dim=-1)[None] for x in (logits, labels))
    torch.testing.assert_close(overlap.dice_ce(logits, labels, batch_dice=True), overlap.dice_ce(*wide))


def test_dice_ce_refuses_one_channel(batch):
    with pytest.raises(ValueError, match="given one channel .* use dice_bce"):
        overlap.dice_ce(*batch)


def test_nnunet_on_one_level_is_dice_ce_on_two_classes(batch):
    logits, mask = batch
    expected = overlap.dice_ce(torch.cat([torch.zeros_like(logits), logits], dim=1), mask)
    torch.testing.assert_close(overlap.nnunet(logits, mask), expected)
    torch.testing.assert_close(overlap.nnunet(logits[:, None], mask), expected)


@pytest.mark.parametrize(("levels", "weights"), [(2, (1, 0)), (3, (2 / 3, 1 / 3, 0)), (4, (4 / 7, 2 / 7, 1 / 7, 0))])
def test_each_level_weighs_half_of_the_finer_one_and_the_coarsest_nothing(batch, levels, weights):
    _, mask = batch
    logits = torch.randn(3, levels, 1, 6, 7, generator=torch.Generator().manual_seed(4)).requires_grad_()
    value = overlap.nnunet(logits, mask)
    alone = [overlap.nnunet(level, mask) for level in logits.unbind(1)]
    torch.testing.assert_close(value, sum(w * loss for w, loss in zip(weights, alone, strict=True)))
    value.backward()
    assert [bool(logits.grad[:, i].any()) for i in range(levels)] == [w > 0 for w in weights]


def test_zept_dice_leaves_unlabelled_rows_out():
    generator = torch.Generator().manual_seed(3)
    probability, mask = torch.rand(3, 4, 5, generator=generator), (torch.rand(3, 4, 5, generator=generator) > 0.5) * 1.0
    expected = overlap.zept_dice(probability[[0, 2]], mask[[0, 2]])
    mask[1] = -1
    torch.testing.assert_close(overlap.zept_dice(probability, mask), expected)


def test_every_named_loss_exists_and_an_unknown_one_lists_them():
    assert all(callable(losses.loss(name)) for name in losses.LOSSES)
    with pytest.raises(ValueError, match="Unknown loss 'focal': choose one of adaptive_tversky, bce, cox"):
        losses.loss("focal")


def test_a_name_may_carry_the_numbers_of_its_loss(batch):
    assert losses.loss("tversky@alpha=0.7,beta=0.3")(*batch) == losses.loss("tversky_specific")(*batch)
    assert losses.loss("tversky@alpha=0.5")(*batch) != losses.loss("tversky")(*batch)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("tversky@gamma=1", "Loss 'tversky' has no number 'gamma': it has alpha, beta"),
        ("dice@alpha=1", "has no number 'alpha': it has none"),
        ("tversky@alpha", "cannot be read: write tversky@name=number"),
        ("jaccard@alpha=1", "Unknown loss 'jaccard@alpha=1': choose one of"),
    ],
)
def test_a_number_that_a_loss_does_not_have_is_refused(name, sentence):
    with pytest.raises(ValueError, match=sentence):
        losses.loss(name)
