"""Weak supervision's segmenter: nnU-Net's network, and an ensemble of what it was at several moments of its training.

MedCLIP-SAMv2 trains it on masks that nobody drew, with a learning rate that starts anew three times, keeps the last
ten checkpoints of each cycle and averages their probabilities (paper Eq. 21-23).
"""

from copy import deepcopy
from dataclasses import dataclass, replace

import numpy as np
import torch
from monai.networks.nets import DynUNet
from scipy.ndimage import binary_dilation
from torch import Tensor, nn
from torch.nn import functional as F

from lib.models import Prediction, configure
from lib.models.blocks import ImageNetNorm, rgb
from lib.text import Prompts

USES = ("ensemble", "last_cycle", "last", "best", "flips")


@dataclass(frozen=True)
class DynUNetConfig:
    """Widths of nnU-Net's plan for 2-D images of 224 to 256 pixels, as nnU-Net v2 draws it up."""

    filters: tuple[int, ...] = (32, 64, 128, 256, 512, 512)
    supervised: int = 2  # levels below the finest with an output, the last of which weighs nothing (nnU-Net)
    members: int = 0  # networks kept beside the best one
    cycles: int = 3


DYNUNET_SIZES = {
    "paper": {},
    "small": {"filters": (16, 32, 64, 128)},
    "tiny": {"filters": (8, 16, 32, 64), "supervised": 1},
}


class SnapshotUNet(nn.Module):
    """Image [B, 1 or 3, H, W] -> logits [B, 1, H, W]; no prompt reaches it. In training, logits are
    [B, 1 + supervised, 1, H, W], the finest level first.

    `use` says who answers: the `best` network on validation, the `last`, the mean of the `last_cycle`, of the whole
    `ensemble`, or the best one's mean over four `flips` of the image.
    """

    roles: tuple[str, ...] = ()

    def __init__(self, config: DynUNetConfig):
        super().__init__()
        self.config = config
        self.provenance = {"backbone": "trained from scratch"}
        self.switches = {"use": USES}
        self.norm = ImageNetNorm()
        self.net = _network(config)
        self.members = nn.ModuleList(_network(config) for _ in range(config.members))
        self.use = "ensemble" if config.members else "best"

    @property
    def learner(self) -> nn.Module | None:
        """What training trains: itself, or nothing where it consists of networks trained before."""
        return None if self.members else self

    def adopt_snapshots(self, states: list[dict[str, Tensor]]) -> None:
        """Keep the network as it was at several moments, in their order."""
        self.members = nn.ModuleList(deepcopy(self.net) for _ in states)
        for member, state in zip(self.members, states, strict=True):
            own = {name.removeprefix("net."): tensor for name, tensor in state.items() if name.startswith("net.")}
            member.load_state_dict(own)
        self.config, self.use = replace(self.config, members=len(states)), "ensemble"

    def adopt_part(self, name: str, part: nn.Module) -> None:
        """Take over another trained network as a member, by its number: a deep ensemble."""
        if not isinstance(part, SnapshotUNet) or not name.isdigit() or int(name) >= len(self.members):
            raise ValueError(
                f"An ensemble of {len(self.members)} networks has no place '{name}' for {type(part).__name__}."
            )
        self.members[int(name)].load_state_dict(part.net.state_dict())

    def encode_image(self, image: Tensor) -> Tensor:
        """Compute the logits; a prompt changes nothing."""
        image = self.norm(rgb(image))
        height, width = image.shape[-2:]
        step = 2 ** (len(self.config.filters) - 1)
        padded = F.pad(image, (0, -width % step, 0, -height % step), mode="replicate")
        if self.training:
            logits = self.net(padded)
            return logits[..., :height, :width]
        return self._answer(padded)[..., :height, :width]

    def _answer(self, image: Tensor) -> Tensor:
        nets = {"best": [self.net], "flips": [self.net], "last": self.members[-1:]}.get(self.use, list(self.members))
        if not nets:
            raise ValueError(
                f"This network was saved without others to average, so it has no '{self.use}': set use='best'."
            )
        if self.use == "last_cycle":
            nets = nets[-max(1, len(nets) // self.config.cycles) :]
        turns = [(), (-1,), (-2,), (-2, -1)] if self.use == "flips" else [()]
        answers = [net(image.flip(axes)).flip(axes) for net in nets for axes in turns]
        return answers[0] if len(answers) == 1 else torch.logit(ensemble(torch.stack(answers).sigmoid()), eps=1e-6)

    def decode(self, features: Tensor, prompts: Prompts) -> Prediction:
        """Hand the logits on."""
        return Prediction(features, {})

    def forward(self, image: Tensor, prompts: Prompts) -> Prediction:
        return self.decode(self.encode_image(image), prompts)


def _network(config: DynUNetConfig) -> DynUNet:
    levels = len(config.filters)
    strides = (1,) + (2,) * (levels - 1)
    return DynUNet(
        2,
        3,
        1,
        kernel_size=(3,) * levels,
        strides=strides,
        upsample_kernel_size=strides[1:],
        filters=config.filters,
        deep_supervision=config.supervised > 0,
        deep_supr_num=max(1, config.supervised),
    )


def ensemble(probabilities: Tensor) -> Tensor:
    """Mean foreground probability [...] of members' probabilities [M, ...] (paper Eq. 21)."""
    return probabilities.mean(0)


def entropy(probability: Tensor) -> Tensor:
    """Entropy [...] in bits of foreground probabilities (paper Eq. 23; log2 as released)."""
    p = probability.double().clamp(1e-7, 1 - 1e-7)
    return -(p * p.log2() + (1 - p) * (1 - p).log2())


def outer_ring(mask: Tensor) -> Tensor:
    """The pixels outside a mask [H, W] that touch it, also at a corner."""
    mask = mask.cpu().numpy()
    return torch.from_numpy(binary_dilation(mask, structure=np.ones((3, 3))) & ~mask)


def ring_uncertainty(probability: Tensor, threshold: float = 0.5, *, released: bool = False) -> float:
    """Mean entropy in bits on the ring around the mask {p > threshold}, where doubt should live; probability [H, W].

    `released` computes the authors' score: the entropy of the whole image in percent of 255 times the ring's pixels,
    as an unsigned subtraction wraps round. NaN without a ring.
    """
    doubt, ring = entropy(probability), outer_ring(probability > threshold).to(probability.device)
    if not ring.any():
        return float("nan")
    return float(100 * doubt.sum() / (255 * ring.sum()) if released else doubt[ring].mean())


def build(size: str = "paper", **fields) -> SnapshotUNet:
    """Build the network, with room for `members` others."""
    return SnapshotUNet(configure(DynUNetConfig, DYNUNET_SIZES, size, fields))
