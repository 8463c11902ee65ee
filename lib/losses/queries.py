"""Losses of mask queries: Mask2Former's mask losses, and the multi-positive NCE that ties a query to its words.

MP-NCE (UniCLIP's form, as Malenia's Eq. 6 has it) is, for an anchor i with positives P(i) and negatives N(i),

    l_i = -1/|P(i)| Σ_{p in P(i)} log( e^{s_ip/tau} / (e^{s_ip/tau} + Σ_{n in N(i)} e^{s_in/tau}) )

so that positives never compete with one another, and what is neither positive nor negative counts nowhere.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from lib.losses import full

GUARD = 1e-8  # RadZero's, in every quotient and logarithm

# ---- masks -----------------------------------------------------------------------------------------------


def mask_dice(logits: Tensor, mask: Tensor) -> Tensor:
    """Mean over queries of 1 - (2 Σpy + 1) / (Σp + Σy + 1); logits and mask [Q, ...] (Mask2Former, criterion.py)."""
    p, y = full(logits).sigmoid().flatten(1), mask.to(logits.dtype).flatten(1)
    return (1 - (2 * (p * y).sum(1) + 1) / (p.sum(1) + y.sum(1) + 1)).mean()


def mask_bce(logits: Tensor, mask: Tensor) -> Tensor:
    """Mean over queries of the mean cross-entropy over their points; logits and mask [Q, ...] (Mask2Former)."""
    return F.binary_cross_entropy_with_logits(full(logits), mask.to(full(logits).dtype))


def assignment_cost(logits: Tensor, mask: Tensor, dice: float = 5.0, bce: float = 5.0) -> Tensor:
    """What it would cost to give mask [M, ...] to query [Q, ...]: [Q, M], Mask2Former's weights of Dice and BCE."""
    x, y = full(logits).flatten(1), mask.to(full(logits).dtype).flatten(1)
    p = x.sigmoid()
    overlap = 1 - (2 * p @ y.T + 1) / (p.sum(1)[:, None] + y.sum(1)[None] + 1)
    entropy = (F.softplus(x).sum(1)[:, None] - x @ y.T) / x.shape[1]
    return dice * overlap + bce * entropy


# ---- words -----------------------------------------------------------------------------------------------


def mp_nce(similarity: Tensor, positive: Tensor, negative: Tensor, tau: Tensor | float = 0.07) -> Tensor:
    """Multi-positive NCE of anchors [M] against texts [T], the mean over anchors that have a positive.

    similarity: [M, T] cosines; positive and negative: [M, T] bool, and what is neither is ignored. The loss is 0
    where no anchor has a positive. Raises ValueError where a text is both.
    """
    if (positive & negative).any():
        raise ValueError("A text is positive and negative for the same query: give each pair one role.")
    s = _wide(similarity) / tau
    rivals = s.masked_fill(~negative, -math.inf).logsumexp(1, keepdim=True)
    each = torch.logaddexp(s, rivals) - s
    number = positive.sum(1)
    own = each.masked_fill(~positive, 0).sum(1) / number.clamp_min(1)
    return own.sum() / (number > 0).sum().clamp_min(1)


def _wide(x: Tensor) -> Tensor:
    # Not lib.losses.full: similarities may well all lie between 0 and 1, where it would warn of probabilities.
    return x.to(torch.promote_types(x.dtype, torch.float32))


def radzero_mp_nce(
    similarity: Tensor, group: Tensor, tau: float = 0.07, row_sum: bool = False, column_sum: bool = False
) -> Tensor:
    """RadZero's loss of phrases [M] against images [B] of which `group` [M] names each phrase's own.

    The mean of a term over phrases (row) and one over images (column); `row_sum` and `column_sum` add an image's
    phrases up within the logarithm. Without both it is MP-NCE from images to phrases with its mirror image.
    Source: deepnoid-ai/RadZero, exp/cxr_pt/model/losses.py.
    """
    s = (_wide(similarity) / tau).exp()
    own = F.one_hot(group, s.shape[1]).bool()
    mine = s[own]
    per_image = s.new_zeros(s.shape[1])
    if row_sum:
        top = per_image.index_add(0, group, mine)
        row = top / (per_image.index_add(0, group, s.sum(1)) + GUARD)
    else:
        row = mine / (s.sum(1) + GUARD)
    if column_sum:
        column = per_image.index_add(0, group, mine) / (s.sum(0) + GUARD)
    else:
        rivals = s.masked_fill(own, 0).sum(0)[group]
        column = mine / (mine + rivals + GUARD)
    return -((row + GUARD).log().mean() + (column + GUARD).log().mean()) / 2
