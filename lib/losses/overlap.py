"""Overlap losses: Dice and its relatives, on logits.

Unless a docstring says otherwise: logits [B, K, *S], mask [B, K, *S] with values in [0, 1], K = 1 for one
foreground class; the result is a scalar. Half-precision logits are raised to float32 first.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lib.losses import full


def dice(logits: Tensor, mask: Tensor) -> Tensor:
    """Soft Dice per image and class, 1 - (2 Σpy + 1) / (Σp + Σy + 1), averaged."""
    from monai.losses import DiceLoss

    return DiceLoss(sigmoid=True, smooth_nr=1.0, smooth_dr=1.0)(full(logits), mask)


def bce(logits: Tensor, mask: Tensor) -> Tensor:
    """Binary cross-entropy averaged over every pixel of the batch."""
    logits = full(logits)
    return F.binary_cross_entropy_with_logits(logits, mask.to(logits.dtype))


def dice_bce(logits: Tensor, mask: Tensor) -> Tensor:
    """Dice plus binary cross-entropy, equal weights."""
    return dice(logits, mask) + bce(logits, mask)


def tversky(logits: Tensor, mask: Tensor, alpha: float = 0.3, beta: float = 0.7) -> Tensor:
    """Tversky loss, 1 - (TP + 1) / (TP + α FP + β FN + 1), per image and class, averaged.

    The default favours sensitivity (Salehi et al. 2017, arXiv 1706.05721).
    """
    from monai.losses import TverskyLoss

    return TverskyLoss(sigmoid=True, alpha=alpha, beta=beta, smooth_nr=1.0, smooth_dr=1.0)(full(logits), mask)


def tversky_specific(logits: Tensor, mask: Tensor) -> Tensor:
    """Tversky loss with the weights turned round (α = .7, β = .3): it favours few false positives."""
    return tversky(logits, mask, alpha=0.7, beta=0.3)


def adaptive_tversky(logits: Tensor, mask: Tensor) -> Tensor:
    """Tversky loss of DuPLUS, 1 - TP / (TP + a FP + (1 - a) FN), per image and class, averaged.

    a = FP / (FP + FN) within .2 and .8 weighs whichever error is the larger one; the gradient flows through it.
    Source: BioMedIA-MBZUAI/DuPLUS @924beb3, training/losses.py; MONAI's Tversky loss has fixed weights.
    """
    probability, mask = full(logits).sigmoid().flatten(2), mask.flatten(2)
    hit = (probability * mask).sum(2)
    over, under = (probability * (1 - mask)).sum(2), ((1 - probability) * mask).sum(2)
    weight = (over / (over + under + 1e-6)).clamp(0.2, 0.8)
    return 1 - (hit / (hit + weight * over + (1 - weight) * under + 1e-6)).mean()


def duplus(logits: Tensor, mask: Tensor) -> Tensor:
    """The loss of DuPLUS: adaptive Tversky plus half the cross-entropy."""
    return adaptive_tversky(logits, mask) + 0.5 * bce(logits, mask)


def xbusnet_dice(logits: Tensor, mask: Tensor) -> Tensor:
    """Soft Dice of XBusNet, 1 - 2 (Σpy + 1) / (Σp + Σy + 1), averaged.

    The smoothing stands inside the doubled numerator, so an image without foreground can reach -1.
    Source: rmallina14/XBusNet @ba770f6, diceloss.py.
    """
    from monai.losses import DiceLoss

    return DiceLoss(sigmoid=True, smooth_nr=2.0, smooth_dr=1.0)(full(logits), mask)


def zept_dice(probability: Tensor, mask: Tensor) -> Tensor:
    """Binary Dice of ZePT, 1 - 2 Σpy / (Σp + Σy + 1), averaged over the rows that are labelled.

    probability, mask: [rows, *S]; a row whose first mask value is -1 is unlabelled and left out.
    Source: Yankai96/ZePT, utils/loss.py.
    """
    from monai.losses import DiceLoss

    labelled = mask.flatten(1)[:, 0] != -1
    return DiceLoss(smooth_nr=0.0, smooth_dr=1.0)(probability[labelled, None], mask[labelled, None])


def dice_ce(
    logits: Tensor,
    labels: Tensor,
    smooth: float = 1e-5,
    batch_dice: bool = False,
    do_bg: bool = False,
    ignore_label: int | None = None,
) -> Tensor:
    """Cross-entropy minus soft Dice of nnU-Net, for exclusive classes (softmax); -1 is its minimum.

    logits: [B, K >= 2, *S]; labels: [B, 1, *S] class numbers. `batch_dice` pools the batch before the ratio,
    `do_bg` keeps class 0 in the Dice, voxels of `ignore_label` count in neither term. MONAI's DiceCELoss has
    no ignored label, hence not used here. Source: MIC-DKFZ/nnUNet, training/loss/dice.py and compound_losses.py.
    """
    if logits.shape[1] < 2:
        raise ValueError("dice_ce was given one channel but compares at least two classes: use dice_bce instead.")
    logits, labels = full(logits), labels[:, 0].long()
    kept = torch.ones_like(labels, dtype=torch.bool) if ignore_label is None else labels != ignore_label
    labels = torch.where(kept, labels, 0)
    entropy = F.cross_entropy(logits, labels, reduction="none")[kept].sum() / kept.sum().clamp(min=1)

    probability = logits.softmax(1) * kept[:, None]
    truth = F.one_hot(labels, logits.shape[1]).movedim(-1, 1) * kept[:, None]
    if not do_bg:
        probability, truth = probability[:, 1:], truth[:, 1:]
    axes = ([0] if batch_dice else []) + list(range(2, logits.ndim))
    overlap = (probability * truth).sum(axes)
    total = probability.sum(axes) + truth.sum(axes)
    return entropy - ((2 * overlap + smooth) / (total + smooth).clamp(min=1e-8)).mean()


def nnunet(logits: Tensor, mask: Tensor) -> Tensor:
    """nnU-Net's loss for one class, with deep supervision where logits are [B, levels, 1, *S], the finest first.

    A sigmoid is a softmax whose background logit is 0, so that this is `dice_ce` on two classes. Levels weigh 2^-i,
    the coarsest nothing unless it is the only one, normalised to 1. Source: MIC-DKFZ/nnUNet, deep_supervision.py.
    """
    levels = logits.unbind(1) if logits.ndim > mask.ndim else (logits,)
    weights = [2.0**-i for i in range(len(levels))]
    if len(weights) > 1:
        weights[-1] = 0.0
    losses = [
        dice_ce(torch.cat([torch.zeros_like(x), x], 1), mask) * w for x, w in zip(levels, weights, strict=True) if w
    ]
    return torch.stack(losses).sum() / sum(weights)
