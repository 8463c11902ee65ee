"""Several answers in place of one: networks that were trained apart, or one at several moments, or one asked again.

Any model of `lib.models` whose prompts enter in `decode` can be a member; its probabilities are averaged.
"""

import json
from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lib.models import Prediction, build, configure
from lib.text import Prompts

USES = ("mean", "first", "jitter")


@dataclass(frozen=True)
class EnsembleConfig:
    """Who the members are, and how often one of them is asked; all choices are ours."""

    member: str = "entries"
    settings: str = "{}"  # of a member, as JSON
    members: int = 0  # trained before and adopted; 0: one network is trained, and kept at moments of its training
    trained: bool = True  # whether there is a network of its own to train
    jitters: tuple[float, ...] = (0.7, 0.85, 1.0, 1.2, 1.4)  # exponents of the grey values that `jitter` asks under


class Ensemble(nn.Module):
    """Image [B, C, *S] and prompts as its members read them -> logits of the mean probability.

    `use` says who answers: the `mean` of all members, the `first` of them (or the network trained here at its best),
    or that one under each of `jitters` of the image's contrast, which moves nothing that a sentence could name.
    """

    def __init__(self, config: EnsembleConfig):
        super().__init__()
        self.config = config
        self.provenance = {"backbone": f"{config.members or 'moments of one'} {config.member}"}
        self.net = self._member() if config.trained else None
        self.members = nn.ModuleList(self._member() for _ in range(config.members))
        one = self.net if config.trained else self.members[0]
        self.roles = one.roles
        self.switches = {"use": USES} | one.switches
        self.use = "mean" if config.members else "first"

    def _member(self) -> nn.Module:
        return build(self.config.member, **json.loads(self.config.settings))

    @property
    def learner(self) -> nn.Module | None:
        """What training trains: its own network, or nothing where it consists of networks trained before."""
        return self.net

    def calibrate_text(self, prompts: Prompts) -> None:
        """Set the text standardisation of the network that is trained here; adopted members have theirs."""
        if self.net is not None:
            self.net.calibrate_text(prompts)

    def adopt_part(self, name: str, part: nn.Module) -> None:
        """Take over a trained network as a member, by its number."""
        if not name.isdigit() or int(name) >= len(self.members):
            raise ValueError(f"An ensemble of {len(self.members)} networks has no place '{name}'.")
        self.members[int(name)].load_state_dict(part.state_dict())

    def adopt_snapshots(self, states: list[dict[str, Tensor]]) -> None:
        """Keep the network trained here as it was at several moments, in their order."""
        self.members = nn.ModuleList(deepcopy(self.net) for _ in states)
        for member, state in zip(self.members, states, strict=True):
            member.load_state_dict(state)
        self.config, self.use = replace(self.config, members=len(states)), "mean"

    def _asked(self) -> list[tuple[nn.Module, float]]:
        """Which networks answer, each with the exponent of the grey values that it sees."""
        first = self.net if self.net is not None else self.members[0]
        if self.use == "mean" and self.members:
            return [(member, 1.0) for member in self.members]
        return [(first, exponent) for exponent in (self.config.jitters if self.use == "jitter" else (1.0,))]

    def encode_image(self, image: Tensor) -> list:
        """Compute what a prompt cannot change, for each that is asked."""
        return [member.encode_image(image if e == 1 else image.clamp_min(0) ** e) for member, e in self._asked()]

    def decode(self, features: list, prompts: Prompts) -> Prediction:
        """Segment encoded images; aux: the spread of the answers [B, K, *S]."""
        asked = zip(self._asked(), features, strict=True)
        logits = torch.stack([member.decode(own, prompts).logits for (member, _), own in asked])
        if len(logits) == 1:
            return Prediction(logits[0], {})
        probabilities = logits.sigmoid()
        spread = probabilities.std(0, correction=0)
        return Prediction(torch.logit(probabilities.mean(0), eps=1e-6), {"spread": spread})

    def forward(self, image: Tensor, prompts: Prompts) -> Prediction:
        return self.decode(self.encode_image(image), prompts)


def build_ensemble(size: str = "paper", **fields) -> Ensemble:
    """Build an ensemble; `size` is there for its like and changes nothing, the members' is in `settings`."""
    config = configure(EnsembleConfig, {"paper": {}, "small": {}, "tiny": {}}, size, fields)
    if not config.trained and not config.members:
        raise ValueError("An ensemble without a network to train needs members: say how many were trained before.")
    return Ensemble(config)
