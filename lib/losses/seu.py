"""The spectral and entropic uncertainty (SEU) loss of UA-VLS (arXiv 2602.14498), and what its code trains with.

Source: arya-domain/UA-VLS @3dfec41, engine/loss.py and engine/wrapper.py. The loss there takes probabilities; here,
as everywhere in this library, it takes logits [B, K, H, W] and mask [B, K, H, W].
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lib.losses import full

SPECTRAL, ENTROPY = 0.3, 0.1  # the paper's weights λ
ENTROPIES = ("one-sided", "binary")


class SEUTerms(NamedTuple):
    """The three terms, unweighted."""

    dice: Tensor
    spectral: Tensor
    entropy: Tensor

    def weighted(self, spectral: float = SPECTRAL, entropy: float = ENTROPY) -> Tensor:
        """L = L_dice + λ_F L_F + λ_E L_E."""
        return self.dice + spectral * self.spectral + entropy * self.entropy


def seu_terms(probability: Tensor, mask: Tensor, entropy: str = "one-sided") -> SEUTerms:
    """Measure a probability map [B, K, H, W] against its mask [B, K, H, W], or class numbers [B, H, W].

    L_dice = 1 - mean over image and class of (2 Σpt + 1e-6) / (Σp + Σt + 1e-6);
    L_F = mean (|F p| - |F t|)², F the orthonormal 2-D Fourier transform;
    L_E = mean over pixels of Σ_k -p log(p + 1e-8), "one-sided" as published: of one class it is half the entropy,
    largest at p = 1/e. "binary" adds the same of 1 - p.
    Raises ValueError for another entropy.
    """
    if entropy not in ENTROPIES:
        raise ValueError(f"There is no entropy {entropy!r} of the SEU loss: use one of {', '.join(ENTROPIES)}.")
    with torch.autocast(probability.device.type, enabled=False):  # half a float has no Fourier transform
        p = probability.to(torch.promote_types(probability.dtype, torch.float32))
        if mask.ndim < p.ndim:
            mask = F.one_hot(mask.long(), p.shape[1]).movedim(-1, 1)
        t = mask.to(p.dtype)
        total = p.sum((2, 3)) + t.sum((2, 3))
        dice = 1 - ((2 * (p * t).sum((2, 3)) + 1e-6) / (total + 1e-6)).mean()
        of_p, of_t = (torch.fft.fft2(x, norm="ortho").abs() for x in (p, t))
        sides = (p,) if entropy == "one-sided" else (p, 1 - p)
        uncertain = sum((-q * torch.log(q + 1e-8)).sum(1).mean() for q in sides)
        return SEUTerms(dice, (of_p - of_t).square().mean(), uncertain)


def seu(logits: Tensor, mask: Tensor, spectral: float = SPECTRAL, entropy: float = ENTROPY) -> Tensor:
    """The SEU loss with the entropy as published; a sweep names its weights: "seu@spectral=0.1,entropy=0.03"."""
    return seu_terms(full(logits).sigmoid(), mask).weighted(spectral, entropy)


def seu_binary(logits: Tensor, mask: Tensor, spectral: float = SPECTRAL, entropy: float = ENTROPY) -> Tensor:
    """The SEU loss with the two-sided binary entropy."""
    return seu_terms(full(logits).sigmoid(), mask, "binary").weighted(spectral, entropy)


def seu_no_entropy(logits: Tensor, mask: Tensor, spectral: float = SPECTRAL) -> Tensor:
    """The SEU loss without its entropy."""
    return seu(logits, mask, spectral, 0.0)


def seu_no_spectral(logits: Tensor, mask: Tensor, entropy: float = ENTROPY) -> Tensor:
    """The SEU loss without its spectral term."""
    return seu(logits, mask, 0.0, entropy)


def released_dice(probability: Tensor, mask: Tensor) -> Tensor:
    """Soft Dice of MONAI's default: smoothing 1e-5, averaged over images and classes."""
    from monai.losses import DiceLoss

    return DiceLoss()(probability, mask)


def released_dice_ce(probability: Tensor, mask: Tensor) -> Tensor:
    """MONAI's DiceCELoss() from version 1.3 on, on probabilities, which its cross-entropy takes for logits."""
    return released_dice(probability, mask) + F.binary_cross_entropy_with_logits(probability, mask.to(probability))


def uavls_dice(logits: Tensor, mask: Tensor) -> Tensor:
    """What the released training minimises with the MONAI that its data set needs (1.2 or older).

    There the cross-entropy of one channel is zero, so that Dice is all that is left of DiceCELoss().
    """
    return released_dice(full(logits).sigmoid(), mask)


def uavls_dice_ce(logits: Tensor, mask: Tensor) -> Tensor:
    """What the same line minimises with MONAI 1.3 or newer: Dice plus the cross-entropy of a twofold sigmoid."""
    return released_dice_ce(full(logits).sigmoid(), mask)
