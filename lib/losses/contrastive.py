"""Contrastive losses of image-text pairs, from InfoNCE to the DHN-NCE of MedCLIP-SAMv2 (arXiv 2409.19483).

Each takes the cosine similarities [B, B] of B images (rows) and B texts (columns), pairs on the diagonal, and returns
a scalar; `mask` is there for the house's signature and ignored. With S = similarity / tau, one row of all of them is

    l_i = -S_ii + log(alpha e^{S_ii} + Σ_{j≠i} W_ij e^{S_ij}),  W_ij = (B - 1) e^{beta S_ij} / Σ_{k≠i} e^{beta S_ik}

            beta = 0   beta > 0
alpha = 1   info_nce   hn_nce
alpha = 0   dcl        dhn_nce

The mean over rows is added to the same of the columns; InfoNCE alone halves that, as CLIP does. The temperature is
DHN-NCE's for all of them, so that a comparison changes nothing but the loss.
"""

import math

import torch
from torch import Tensor, distributed
from torch.nn import functional as F

TAU, BETA = 0.6, 0.15  # paper, fine-tuning details; BETA in both directions


def cosine_similarity(image: Tensor, text: Tensor) -> Tensor:
    """Compare every image [B, D] with every text [B, D]: [B, B], in float32 or better, also under autocast."""
    if image.ndim != 2 or image.shape != text.shape:
        raise ValueError(
            f"Images {tuple(image.shape)} and texts {tuple(text.shape)} make no pairs: give both as [B, D] features."
        )
    with torch.autocast(image.device.type, enabled=False):
        image, text = (F.normalize(_full(features), dim=1) for features in (image, text))
        return image @ text.T


def gather(features: Tensor) -> Tensor:
    """Collect features [b, D] of all processes as [B, D], in order of rank; alone, they stay as they are.

    Gradients flow back to every rank and add up there, B / b times those of one process with the joint batch, which
    is what an average over processes (DistributedDataParallel) divides by. Every rank must bring equally many rows.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return features
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(features))


def info_nce(similarity: Tensor, mask: Tensor | None = None, tau: float = TAU) -> Tensor:
    """Symmetric InfoNCE, the mean cross-entropy of finding the partner in both directions (CLIP, arXiv 2103.00020)."""
    return _both(similarity, tau, alpha=1.0).mean() / 2


def dcl(similarity: Tensor, mask: Tensor | None = None, tau: float = TAU) -> Tensor:
    """Decoupled contrastive loss: the pair does not compete with itself (Yeh et al. 2022, arXiv 2110.06848)."""
    return _both(similarity, tau).mean()


def hn_nce(
    similarity: Tensor,
    mask: Tensor | None = None,
    tau: float = TAU,
    beta1: float = BETA,
    beta2: float = BETA,
    alpha: float = 1.0,
) -> Tensor:
    """InfoNCE with hard negatives weighing more (Radenovic et al. 2023, arXiv 2301.02280, after Robinson et al. 2021).

    beta1 is the hardness from image to text, beta2 from text to image; alpha > 0 is the share of the pair itself.
    """
    return _both(similarity, tau, beta1, beta2, alpha).mean()


def dhn_nce(
    similarity: Tensor,
    mask: Tensor | None = None,
    tau: float = TAU,
    beta1: float = BETA,
    beta2: float = BETA,
    *,
    reduction: str = "mean",
) -> Tensor:
    """Decoupled hard-negative NCE as published (Eq. 9-13).

    The paper adds up the batch; the default is the mean, whose scale does not hang on the batch (ours).
    Raises ValueError for a reduction other than mean and sum.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"There is no reduction {reduction!r} of DHN-NCE: use mean, or sum as in the paper.")
    return getattr(_both(similarity, tau, beta1, beta2), reduction)()


def dhn_nce_released(
    similarity: Tensor,
    mask: Tensor | None = None,
    tau: float = TAU,
    beta1: float = BETA,
    beta2: float = BETA,
    alpha: float = 0.0,
    batch: float = 0.0,
) -> Tensor:
    """What the released code computes in the name of DHN-NCE (HealthX-Lab/MedCLIP-SAMv2 @07047e3, loss/hnl.py).

    Nothing is summed over negatives: the mean runs over all B² entries, where masked logits are 0 and so count as
    e^0 = 1, and column j is divided by what belongs to row j. `batch` is the size that the released loss is told
    when it is made, whatever it is given later; 0 stands for the true one.
    """
    logits = _logits(similarity, tau)
    pair = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    own = logits.masked_fill(~pair, 0)

    def direction(logits: Tensor, beta: float) -> Tensor:
        rivals = logits.masked_fill(pair, 0)
        weight = math.log((batch or len(logits)) - 1) + beta * rivals - rivals.logsumexp(1)
        return _with_own(own, rivals + weight, alpha) - own

    return (direction(logits, beta1) + direction(logits.T, beta2)).mean()


def retrieved(similarity: Tensor, text: Tensor, top: int) -> Tensor:
    """Whether each case's partner is among the `top` nearest: [2, B], image to text, then text to image.

    Images that share their sentence (equal rows of text [B, E]) are each other's partners and never rivals.
    """
    rival = (text[:, None] != text[None]).any(-1)
    own = similarity.diagonal()
    ahead = [((similarity >= own[:, None]) & rival).sum(1), ((similarity >= own[None, :]) & rival).sum(0)]
    return torch.stack([number < top for number in ahead])


def _full(x: Tensor) -> Tensor:
    # Not lib.losses.full: similarities may well all lie between 0 and 1, where it would warn of probabilities.
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _logits(similarity: Tensor, tau: float) -> Tensor:
    if similarity.ndim != 2 or similarity.shape[0] != similarity.shape[1]:
        raise ValueError(
            f"Similarities of shape {tuple(similarity.shape)} are not square: give [B, B] with pairs on the diagonal."
        )
    if len(similarity) < 2:
        raise ValueError(f"A batch of {len(similarity)} pairs has no negatives: give a contrastive loss 2 or more.")
    if not tau > 0:
        raise ValueError(f"The temperature tau is {tau:g}: give a number above 0.")
    return _full(similarity) / tau


def _both(similarity: Tensor, tau: float, beta1: float = 0.0, beta2: float = 0.0, alpha: float = 0.0) -> Tensor:
    """l_i of the rows plus that of the columns, [B]."""
    logits = _logits(similarity, tau)
    return _rows(logits, beta1, alpha) + _rows(logits.T, beta2, alpha)


def _rows(logits: Tensor, beta: float, alpha: float) -> Tensor:
    own, pair = logits.diagonal(), torch.eye(len(logits), dtype=torch.bool, device=logits.device)

    def negatives(power: float) -> Tensor:
        """log Σ_{j≠i} e^{power S_ij}."""
        return (power * logits).masked_fill(pair, -math.inf).logsumexp(1)

    return _with_own(own, math.log(len(logits) - 1) + negatives(1 + beta) - negatives(beta), alpha) - own


def _with_own(own: Tensor, rivals: Tensor, alpha: float) -> Tensor:
    """log(alpha e^own + e^rivals)."""
    return torch.logaddexp(own + math.log(alpha), rivals) if alpha else rivals
