"""One U-Net for images and volumes into which text enters in seven ways, so that nothing but the way differs.

The ways are those of the five papers and of what they stand on, taken from their own files where those can be shared.
Text enters below the encoder alone: an image is encoded once, whatever is asked of it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from monai.networks.blocks import UnetResBlock, UnetrUpBlock
from torch import Tensor, nn
from torch.nn import functional as F

from lib.models import Prediction, configure
from lib.models.blocks import NULL_KINDS, NullablePrompt, ResidualFiLM
from lib.models.duplus import HEAD, FiLM, Gate
from lib.models.malenia import Attention, places, sinusoids
from lib.text import Prompts

ENTRIES = {  # name -> whose way it is
    "none": "no text at all: as many parameters that read the image",
    "tcm": "NullBUS: residual scale and shift, from the identity (TCM)",
    "film": "DuPLUS, paper: scale and shift of each channel",
    "gate": "DuPLUS, released: one map from 0 to 1 for all channels",
    "attention": "UA-VLS: places ask words",
    "tokens": "Malenia: mask tokens and words change each other, words choose the mask",
    "head": "DuPLUS: text writes the last layers",
    "box": "MedCLIP-SAMv2: text to map to box, and the box is the prompt",
}
HEADS = 4
TOKENS = 8  # mask tokens (ours: half of Malenia's, on a tenth of its voxels)


@dataclass(frozen=True)
class EntriesConfig:
    """The common network and how text enters it; all choices are ours, equal for every way."""

    dims: int = 2
    entry: str = "film"
    channels: tuple[int, ...] = (32, 64, 128, 256)  # at strides 1, 2, 4, 8
    roles: tuple[str, ...] = ("local",)
    text_dim: int = 384
    null_kind: str = "learned"
    extra: int = 400_000  # parameters that the way in may have: its width is the one that comes nearest
    inputs: int = 1
    stride: int = 1  # of the first stage; 2 works on half the grid and interpolates the logits, for volumes on CPUs


SIZES = {
    "paper": {},
    "small": {"channels": (16, 32, 64, 128), "extra": 200_000},
    "tiny": {"channels": (8, 16, 32, 64), "extra": 100_000},
}


class Text(NamedTuple):
    """What a way in may read: one vector of all roles [B, R·D], and their words [B, L, D] with `hidden` [B, L]."""

    vector: Tensor
    words: Tensor
    hidden: Tensor


# ---- ways that change a feature map ---------------------------------------------------------------------


def as_volume(x: Tensor, call: Callable[[Tensor], Tensor]) -> Tensor:
    """Let a part for volumes read images too, as volumes of one slice."""
    return call(x) if x.ndim == 5 else call(x[:, :, None])[:, :, 0]


def _pointwise(dims: int, inputs: int, outputs: int) -> nn.Module:
    return (nn.Conv2d if dims == 2 else nn.Conv3d)(inputs, outputs, 1)


class Unread(nn.Module):
    """Two pointwise layers with a residual, from the identity, that read no text: the control with equal parameters."""

    def __init__(self, config: EntriesConfig, channels: int, hidden: int):
        super().__init__()
        self.net = nn.Sequential(
            _pointwise(config.dims, channels, hidden), nn.ReLU(), _pointwise(config.dims, hidden, channels)
        )
        nn.init.zeros_(self.net[2].weight)  # so wide a block at a random start can keep the network from learning
        nn.init.zeros_(self.net[2].bias)

    def forward(self, x: Tensor, text: Text) -> Tensor:
        return x + self.net(x)


class Tcm(nn.Module):
    """NullBUS's text-conditioned modulation: y = γx + β + x, from the identity."""

    def __init__(self, config: EntriesConfig, channels: int, hidden: int):
        super().__init__()
        self.film = ResidualFiLM(config.text_dim * len(config.roles), channels, hidden, identity=True)

    def forward(self, x: Tensor, text: Text) -> Tensor:
        return self.film(x, text.vector)


class Film(nn.Module):
    """DuPLUS's modulation of the paper: y = γx + β, from a random start."""

    def __init__(self, config: EntriesConfig, channels: int, hidden: int):
        super().__init__()
        self.film = FiLM(config.text_dim * len(config.roles), channels, hidden)

    def forward(self, x: Tensor, text: Text) -> Tensor:
        return as_volume(x, lambda volume: self.film(volume, text.vector))


class Gated(nn.Module):
    """DuPLUS's modulation of the released code: all channels times one map that text draws."""

    def __init__(self, config: EntriesConfig, channels: int, hidden: int):
        super().__init__()
        self.gate = Gate(config.text_dim * len(config.roles), channels, hidden)

    def forward(self, x: Tensor, text: Text) -> Tensor:
        return as_volume(x, lambda volume: self.gate(volume, text.vector))


class Asked(nn.Module):
    """UA-VLS's cross-attention: every place asks every word, times a learned α; its mixing of words is left out."""

    def __init__(self, config: EntriesConfig, channels: int, hidden: int):
        super().__init__()
        hidden = HEADS * -(-hidden // HEADS)
        self.place, self.word = nn.Linear(channels, hidden), nn.Linear(config.text_dim, hidden)
        self.ask = Attention(hidden, HEADS)
        self.back = nn.Linear(hidden, channels)
        self.scale = nn.Parameter(torch.tensor(1.421))  # α of UA-VLS

    def forward(self, x: Tensor, text: Text) -> Tensor:
        size, flat = x.shape[2:], x.flatten(2).transpose(1, 2)  # [B, N, C]
        asked = self.place(flat)
        asked = asked + sinusoids(_places(size, x), asked.shape[2])
        said = self.ask(asked, self.word(text.words), hidden=text.hidden) - asked
        return x + self.scale * self.back(said).transpose(1, 2).unflatten(2, size)


class Boxed(nn.Module):
    """The dense prompt of a box: a learned vector is added inside it and another one outside, as SAM embeds masks."""

    def __init__(self, config: EntriesConfig, channels: int, hidden: int):
        super().__init__()
        self.net = nn.Sequential(
            _pointwise(config.dims, 1, hidden), nn.ReLU(), _pointwise(config.dims, hidden, channels)
        )

    def forward(self, x: Tensor, box: Tensor) -> Tensor:
        return x + self.net(drawn_box(box, x.shape[2:])[:, None])


def _places(size: tuple[int, ...], like: Tensor) -> Tensor:
    """The middles of a grid's voxels [N, 3]; an image is the middle slice of a volume."""
    return places(size if len(size) == 3 else (1, *size), like)


# ---- ways that draw -------------------------------------------------------------------------------------


class Direct(nn.Module):
    """The last layer of the ways that changed the features before."""

    def __init__(self, config: EntriesConfig, fine: int, hidden: int):
        super().__init__()
        self.out = _pointwise(config.dims, fine, 1)

    def forward(self, x: Tensor, deep: Tensor, text: Text) -> Tensor:
        return self.out(x)


class Written(nn.Module):
    """DuPLUS's generated head: text and the deepest map write three pointwise layers."""

    def __init__(self, config: EntriesConfig, fine: int, hidden: int):
        super().__init__()
        self.reduce = _pointwise(config.dims, fine, HEAD[0][1])
        self.text = nn.Linear(config.text_dim * len(config.roles), hidden)
        self.controller = nn.Linear(hidden + config.channels[-1], sum(out * inp + out for out, inp in HEAD))

    def forward(self, x: Tensor, deep: Tensor, text: Text) -> Tensor:
        numbers = self.controller(torch.cat([F.elu(self.text(text.vector)), deep.flatten(2).mean(2)], 1))
        parts = iter(numbers.split([n for out, inp in HEAD for n in (out * inp, out)], dim=1))
        size, x = x.shape[2:], self.reduce(x).flatten(2)  # [B, 8, N]
        for number, (out, inp) in enumerate(HEAD):
            weight, bias = next(parts).view(-1, out, inp), next(parts)[:, :, None]
            x = torch.baddbmm(bias, weight, x if number == 0 else F.elu(x))
        return x.unflatten(2, size)


class Chosen(nn.Module):
    """Malenia's alignment: tokens look at the deepest map, tokens and words change each other, and the mask is that
    of the tokens which the text is most like. One decoder block and one injection, trained by the mask alone (ours).
    """

    def __init__(self, config: EntriesConfig, fine: int, hidden: int):
        super().__init__()
        hidden = HEADS * -(-hidden // HEADS)
        self.tokens = nn.Parameter(torch.randn(TOKENS, hidden))
        self.deep, self.word = nn.Linear(config.channels[-1], hidden), nn.Linear(config.text_dim, hidden)
        self.look, self.own = Attention(hidden, HEADS), Attention(hidden, HEADS)
        self.to_text, self.to_tokens = Attention(hidden, HEADS), Attention(hidden, HEADS)
        self.draw, self.bias = nn.Linear(hidden, fine), nn.Parameter(torch.zeros(1))
        self.log_tau = nn.Parameter(torch.tensor(0.07).log())

    def forward(self, x: Tensor, deep: Tensor, text: Text) -> Tensor:
        flat, words = self.deep(deep.flatten(2).transpose(1, 2)), self.word(text.words)
        tokens = self.tokens.expand(len(x), -1, -1)
        tokens = self.look(tokens, flat, sinusoids(_places(deep.shape[2:], flat), flat.shape[2]))
        tokens = self.own(tokens, tokens)
        tokens, words = self.to_text(tokens, words, hidden=text.hidden), self.to_tokens(words, tokens)
        there = (~text.hidden)[..., None].to(words.dtype)
        said = (words * there).sum(1) / there.sum(1)  # [B, C]
        like = torch.einsum("bnc,bc->bn", F.normalize(tokens, dim=2), F.normalize(said, dim=1)) / self.log_tau.exp()
        query = (like.softmax(1)[..., None] * self.draw(tokens)).sum(1)  # [B, fine]
        return torch.einsum("bc,bc...->b...", query, x)[:, None] * x.shape[1] ** -0.5 + self.bias


class Box(nn.Module):
    """Where the text says: the text's likeness to each place of the deepest map, as a map and as the box about it.

    The box is the map's mean place, two spreads to each side, so that a mask's gradient reaches it.
    """

    def __init__(self, config: EntriesConfig, hidden: int):
        super().__init__()
        self.place = nn.Linear(config.channels[-1], hidden)
        self.text = nn.Linear(config.text_dim * len(config.roles), hidden)
        self.log_tau = nn.Parameter(torch.tensor(0.07).log())

    def forward(self, deep: Tensor, text: Text) -> Tensor:
        """deep [B, C, *s] -> box [B, axes, 2], middle and half side from -1 to 1."""
        flat = F.normalize(self.place(deep.flatten(2).transpose(1, 2)), dim=2)  # [B, N, hidden]
        like = torch.einsum("bnc,bc->bn", flat, F.normalize(self.text(text.vector), dim=1)) / self.log_tau.exp()
        share, where = like.softmax(1), _places(deep.shape[2:], deep)[:, 3 - (deep.ndim - 2) :]  # [N, axes]
        middle = share @ where
        own = deep.new_tensor(deep.shape[2:]).square().reciprocal() / 3  # a voxel's spread about its middle, squared
        spread = ((share @ where.square() - middle.square()).clamp_min(0) + own).sqrt()
        return torch.stack([middle, 2 * spread], 2)


def drawn_box(box: Tensor, size: tuple[int, ...]) -> Tensor:
    """Draw boxes [B, axes, 2] (middle, half side) with edges one voxel soft: [B, *size], 0 outside to 1 inside."""
    inside = box.new_ones(len(box), *[1] * len(size))
    for axis, length in enumerate(size):
        place = (torch.arange(length, device=box.device, dtype=box.dtype) * 2 + 1) / length - 1
        middle, half = box[:, axis, 0, None], box[:, axis, 1, None]
        edge = torch.sigmoid((half - (place - middle).abs()) * length)  # [B, length]
        inside = inside * edge.view(len(box), *[length if other == axis else 1 for other in range(len(size))])
    return inside


CHANGING = {"none": Unread, "tcm": Tcm, "film": Film, "gate": Gated, "attention": Asked, "box": Boxed}
DRAWING = {"head": Written, "tokens": Chosen}


# ---- the model ------------------------------------------------------------------------------------------


class Features(NamedTuple):
    """What no text enters: the maps at strides 1, 2, 4, ... of N images, and their own size."""

    maps: tuple[Tensor, ...]
    size: tuple[int, ...]


class Entries(nn.Module):
    """A residual U-Net with one way in for text, at its deepest map and at all decoder stages but the last.

    image [B, C, *S] in [0, 1]; prompts of B·K cases, those of an image after one another -> logits [B, K, *S].
    """

    def __init__(self, config: EntriesConfig, hidden: int):
        super().__init__()
        self.config, self.hidden = config, hidden
        self.roles = config.roles if config.entry != "none" else ()
        self.switches = {"null_kind": NULL_KINDS} if self.roles else {}
        self.provenance = {"backbone": "trained from scratch"}
        dims, widths = config.dims, config.channels
        self.downs = nn.ModuleList(
            UnetResBlock(dims, a, b, 3, config.stride if first else 2, norm_name="instance")
            for first, a, b in zip((True, *[False] * (len(widths) - 1)), (config.inputs, *widths), widths, strict=False)
        )
        rising = widths[::-1]
        self.ups = nn.ModuleList(
            UnetrUpBlock(dims, a, b, 3, 2, norm_name="instance", res_block=True)
            for a, b in zip(rising, rising[1:], strict=False)
        )
        self.prompts = nn.ModuleList(NullablePrompt(role, config.text_dim) for role in self.roles)
        if self.roles:
            self.null_kind = config.null_kind
        change = CHANGING.get(config.entry)
        self.changes = nn.ModuleList(change(config, width, hidden) for width in rising[:-1]) if change else None
        self.box = Box(config, hidden) if config.entry == "box" else None
        self.last = DRAWING.get(config.entry, Direct)(config, widths[0], hidden)

    @property
    def null_kind(self) -> str:
        """What an absent prompt is replaced by: "learned" or "zero"; may be set at run time."""
        return self.prompts[0].kind

    @null_kind.setter
    def null_kind(self, kind: str) -> None:
        for prompt in self.prompts:
            prompt.kind = kind

    def calibrate_text(self, prompts: Prompts) -> None:
        """Set the text standardisation of every role from the training prompts, once, before training."""
        for prompt in self.prompts:
            prompt.calibrate(prompts)

    def encode_image(self, image: Tensor) -> Features:
        """Compute all that a prompt cannot change: one pass per image."""
        dims, step = self.config.dims, self.config.stride * 2 ** (len(self.downs) - 1)
        if image.ndim != dims + 2 or image.shape[1] not in (1, self.config.inputs):
            raise ValueError(
                f"This network was given images of the shape {tuple(image.shape)}: it needs [B, {self.config.inputs}, "
                f"{'D, H, W' if dims == 3 else 'H, W'}], or one channel, which is repeated."
            )
        x = image.expand(-1, self.config.inputs, *[-1] * dims)
        x = (x - x.mean(tuple(range(2, x.ndim)), keepdim=True)) / 0.25  # as dark and light as the others
        margins = [margin for side in reversed(image.shape[2:]) for margin in (0, -side % step)]
        x, maps = F.pad(x, margins, mode="replicate"), []
        if dims == 3:
            x = x.contiguous(memory_format=torch.channels_last_3d)  # a step takes a quarter less on a CPU
        for down in self.downs:
            x = down(x)
            maps.append(x)
        return Features(tuple(maps), tuple(image.shape[2:]))

    def read(self, prompts: Prompts, batch: int) -> Text:
        """What the ways in read of the prompts: absent ones are nulls, and words that there are not are one vector."""
        vectors = [prompt(prompts, batch) for prompt in self.prompts]
        words, hidden = [], []
        for prompt, vector in zip(self.prompts, vectors, strict=True):
            if prompt.role in prompts.tokens:
                there = prompts.present[prompt.role]
                own, mask = prompts.tokens[prompt.role].to(vector.dtype), prompts.token_mask[prompt.role]
                own = F.normalize(own, dim=2) * prompt.dim**0.5
                # the sentence or its null comes first, so that there is always a word to ask
                words += [vector[:, None], torch.where(there[:, None, None], own, 0)]
                hidden += [mask.new_zeros(batch, 1), ~(mask & there[:, None])]
            else:
                words.append(vector[:, None])
                hidden.append(torch.zeros(batch, 1, dtype=torch.bool, device=vector.device))
        return Text(torch.cat(vectors, 1), torch.cat(words, 1), torch.cat(hidden, 1))

    def decode(self, features: Features, prompts: Prompts) -> Prediction:
        """Segment the targets of encoded images."""
        maps, size = features
        count = len(maps[0])
        each = max(1, len(prompts) // count) if self.roles else 1
        text = self.read(prompts, count * each) if self.roles else None
        maps = [x.repeat_interleave(each, 0) if each > 1 else x for x in maps]
        deep = x = maps[-1]
        guide = self.box(deep, text) if self.box is not None else text
        for number, (up, skip) in enumerate(zip(self.ups, maps[-2::-1], strict=True)):
            if self.changes is not None:
                x = self.changes[number](x, guide)
            x = up(x, skip)
        logits = self.last(x, deep, text)
        if self.config.stride > 1:
            scale, mode = float(self.config.stride), "bilinear" if self.config.dims == 2 else "trilinear"
            logits = F.interpolate(logits, scale_factor=scale, mode=mode, align_corners=False)
        logits = logits[(..., *(slice(side) for side in size))]
        aux = {} if self.box is None else {"box": guide}
        return Prediction(logits.reshape(count, each, *size), aux)

    def forward(self, image: Tensor, prompts: Prompts) -> Prediction:
        prediction = self.decode(self.encode_image(image), prompts)
        wanted = max(1, len(prompts) // len(image))
        if not self.roles and wanted > 1:  # it cannot be told which: the same mask for all
            return prediction._replace(logits=prediction.logits.expand(-1, wanted, *[-1] * self.config.dims))
        return prediction


def parameters_of_entry(config: EntriesConfig, hidden: int) -> int:
    """Count what the network has beyond the one that text does not enter and that has nothing in its place."""
    with torch.device("meta"):
        model = Entries(config, hidden)
    common = (model.downs, model.ups)
    return sum(p.numel() for p in model.parameters()) - sum(p.numel() for part in common for p in part.parameters())


def width_for(config: EntriesConfig) -> int:
    """Find the width of the way in with which its parameters come nearest to `config.extra`."""
    low, high = 1, 2
    while parameters_of_entry(config, high) < config.extra:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if parameters_of_entry(config, middle) < config.extra else (low, middle)
    return min((low, high), key=lambda hidden: abs(parameters_of_entry(config, hidden) - config.extra))


def build(size: str = "paper", **fields) -> Entries:
    """Build the common network with one of ENTRIES."""
    config = configure(EntriesConfig, SIZES, size, fields)
    if config.entry not in ENTRIES:
        raise ValueError(f"There is no way in '{config.entry}': use one of {', '.join(ENTRIES)}.")
    if config.dims not in (2, 3):
        raise ValueError(f"EntriesConfig.dims is {config.dims}: give 2 for images or 3 for volumes.")
    if not config.roles or len(config.channels) < 2:
        raise ValueError("EntriesConfig needs a role and two channels or more: name what the network reads.")
    return Entries(config, width_for(config))
