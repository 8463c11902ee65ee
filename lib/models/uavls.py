"""UA-VLS: the words of a report guide the decoder of a segmentation, stage by stage (arXiv 2602.14498).

Source of all that the defaults build: arya-domain/UA-VLS @3dfec41, utils/model.py, layers.py and mamba.py.
"""

import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from monai.networks.blocks.unetr_block import UnetrUpBlock
from monai.networks.utils import icnr_init
from timm import create_model
from torch import Tensor, nn
from torch.nn import functional as F

from lib.models import BACKBONES, Prediction, backbone_file, configure, load_backbone
from lib.models.blocks import ImageNetNorm, rgb
from lib.models.scan import selective_scan
from lib.text import Prompts


@dataclass(frozen=True)
class UAVLSConfig:
    """Sizes and switches of UA-VLS; the defaults are the released code's, which differs from the paper's text."""

    classes: int = 1
    roles: tuple[str, ...] = ("report",)  # one text
    text_dim: int = 768  # CXR-BERT's states; any encoder's width will do
    text_tokens: int = 24  # longer texts are cut, shorter ones padded
    standardise_text: bool = True  # ours: by statistics of the training words; only where `calibrate_text` is called
    normalise: str = "zscore"  # each image by its own mean and spread; "imagenet" is the backbone's own way
    # image encoder
    backbone: str = "convnext-tiny"  # "narrow" has its own widths and no pretrained weights
    channels: tuple[int, ...] = (96, 192, 384, 768)  # strides 4, 8, 16, 32
    depths: tuple[int, ...] = (3, 3, 9, 3)
    # decoder, from stride 32 up
    lengths: tuple[int, ...] = (24, 12, 9)  # mixed text tokens per stage
    heads: int = 4
    states: int = 16  # of the selective scan
    dropout: float = 0.1  # of the self-attention's weights and output
    head_channels: int = 24
    # switches
    modab: bool = True  # False: no text and no attention in the decoder, "w/o MoDAB"
    mixer: str = "ssmix"  # "linear": the text layer of the parent model LanGuideMedSeg, "SSMix -> linear"
    combine: str = "concat"  # released code; "gate": the product that the paper's figure draws
    fusion: str = "attention"  # "addition": the mean text token is added everywhere (ours: how is not stated)
    self_attention: str = "uavls"  # "languide": the parent's, one head, without position in the value
    absent: str = "skip"  # no text: MoDAB is skipped, the released None branch; "empty": 24 empty tokens are read
    test_dropout: bool = False  # True: attention weights are dropped out at test too, the released behaviour
    attention_maps: bool = False  # return what each stage attends to in `aux`


CHOICES = {
    "normalise": ("zscore", "imagenet"),
    "mixer": ("ssmix", "linear"),
    "combine": ("concat", "gate"),
    "fusion": ("attention", "addition"),
    "self_attention": ("uavls", "languide"),
    "absent": ("skip", "empty"),
}
SIZES = {
    "paper": {},
    "small": {
        "backbone": "narrow",
        "channels": (32, 64, 96, 128),
        "depths": (1, 1, 3, 1),
        "head_channels": 16,
    },
    "tiny": {
        "backbone": "narrow",
        "channels": (16, 24, 32, 48),
        "depths": (1, 1, 1, 1),
        "heads": 2,  # attention weights are what a step at 96x96 waits for
        "states": 8,
        "head_channels": 8,
    },
}


class Words(NamedTuple):
    """One text per image as the decoder reads it."""

    tokens: Tensor  # [B, 24, D], zero where there is no word
    read: Tensor  # [B] bool: whether this image's decoder reads a text at all


# ---- text ------------------------------------------------------------------------------------------------


class SSMix(nn.Module):
    """Mix 24 tokens into L_out: half the channels by a selective scan, half by a convolution: [B, 24, d] -> [B, L, d].

    The convolutions look ahead (two tokens right, one left) and Δ's bias enters twice, as released. "gate" multiplies
    the halves instead of joining them, for which the input is projected to twice the width (ours).
    """

    def __init__(self, width: int, tokens: int, length: int, states: int = 16, combine: str = "concat"):
        super().__init__()
        self.combine = combine
        half = width if combine == "gate" else width // 2
        self.sizes = [math.ceil(width / 16), states, states]  # of Δ before its projection, B, C
        self.in_proj = nn.Linear(width, 2 * half, bias=False)
        self.conv1d_x = nn.Conv1d(half, half, 4, groups=half, bias=False)
        self.conv1d_z = nn.Conv1d(half, half, 4, groups=half, bias=False)
        self.x_proj = nn.Linear(half, sum(self.sizes), bias=False)
        self.dt_proj = nn.Linear(self.sizes[0], half)
        self.A_log = nn.Parameter(torch.arange(1.0, states + 1).log().repeat(half, 1))
        self.D = nn.Parameter(torch.ones(half))
        self.out_proj = nn.Linear(tokens, length, bias=False)  # over the tokens
        # Mamba's start: steps Δ spread from .001 to .1, written into the bias before its softplus
        nn.init.uniform_(self.dt_proj.weight, -(self.sizes[0] ** -0.5), self.sizes[0] ** -0.5)
        steps = torch.empty(half).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        self.dt_proj.bias = nn.Parameter(steps + torch.log(-torch.expm1(-steps)))

    @property
    def shares(self) -> Tensor:
        """How much each mixed token takes of each text token [L, tokens], rows summing to one."""
        return F.normalize(self.out_proj.weight.detach().abs(), p=1, dim=1)

    def forward(self, text: Tensor) -> Tensor:
        x, z = F.pad(rearrange(self.in_proj(text), "b l d -> b d l"), (1, 2)).chunk(2, dim=1)
        x, z = self.conv1d_x(x).tanh(), self.conv1d_z(z).tanh()
        step, B, C = self.x_proj(rearrange(x, "b d l -> b l d")).split(self.sizes, dim=-1)
        y, _ = selective_scan(
            x,
            rearrange(self.dt_proj(step), "b l d -> b d l"),
            -self.A_log.exp(),
            rearrange(B, "b l n -> b n l"),
            rearrange(C, "b l n -> b n l"),
            self.D,
            delta_bias=self.dt_proj.bias,
            softplus=True,
        )
        y = y.to(z.dtype)  # the scan counts in float32 under autocast too
        y = y * z if self.combine == "gate" else torch.cat([y, z], dim=1)
        return rearrange(self.out_proj(y), "b d l -> b l d")


class TokenConv(nn.Conv1d):
    """Mix tokens by a convolution of width 1 over them: [B, tokens, D] -> [B, L, D]."""

    def __init__(self, tokens: int, length: int):
        super().__init__(tokens, length, 1)

    @property
    def shares(self) -> Tensor:
        """How much each mixed token takes of each text token [L, tokens], rows summing to one."""
        return F.normalize(self.weight.detach()[..., 0].abs(), p=1, dim=1)


def text_layer(config: UAVLSConfig, width: int, length: int) -> nn.Sequential:
    """From raw text tokens [B, 24, text_dim] to those of one stage [B, L, width]."""
    project = nn.Linear(config.text_dim, width)
    if config.mixer == "linear":
        return nn.Sequential(TokenConv(config.text_tokens, length), nn.GELU(), project, nn.LeakyReLU())
    mix = SSMix(width, config.text_tokens, length, config.states, config.combine)
    return nn.Sequential(project, nn.LeakyReLU(), mix, nn.GELU())


# ---- attention -------------------------------------------------------------------------------------------


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def positions(length: int, width: int, device: torch.device | None = None) -> Tensor:
    """The sinusoids of places 0, 1, ... [length, width] in float32: sine in even channels, cosine in odd ones."""
    rates = torch.exp(torch.arange(0, width, 2) * -(math.log(10000.0) / width))
    angles = torch.arange(length)[:, None] * rates  # [length, width / 2]
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1).to(device)


def placed(x: Tensor) -> Tensor:
    """Tokens [B, N, C] with their places, in the order in which they come."""
    return x + positions(x.shape[1], x.shape[2], x.device).to(x.dtype)


class SelfAttention(nn.Module):
    """Four heads that all read x with its places, queries and keys layer-normalised: [B, N, C] -> [B, N, C]."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.at_test = False  # whether attention weights are dropped out in evaluation mode too
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm, self.k_norm = nn.LayerNorm(width // heads), nn.LayerNorm(width // heads)
        self.proj = nn.Linear(width, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(placed(x)), "b n (qkv h d) -> qkv b h n d", qkv=3, h=self.heads)
        p = self.dropout if self.training or self.at_test else 0.0
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)  # norms answer in float32 under autocast
        seen = F.scaled_dot_product_attention(q, k, v, dropout_p=p)
        return self.drop(self.proj(rearrange(seen, "b h n d -> b n (h d)")))


class LanGuideSelfAttention(nn.MultiheadAttention):
    """The parent model's: one head, the value without its place, no dropout."""

    def __init__(self, width: int):
        super().__init__(width, 1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(placed(x), placed(x), x, need_weights=False)[0]


class MoDAB(nn.Module):
    """Modality decoding attention block: the image attends to itself, then to the mixed text, by a learned α.

    x [B, N, C] and text [B, 24, D] -> y [B, N, C] and, if asked for, the weights [B, N, L] of the text's mixed tokens.
    There is no feed-forward layer and no mask for padding.
    """

    def __init__(self, config: UAVLSConfig, width: int, length: int):
        super().__init__()
        self.fusion = config.fusion
        self.text_project = text_layer(config, width, length)
        self.norm1, self.self_attn_norm, self.cross_attn_norm = (nn.LayerNorm(width) for _ in range(3))
        own = config.self_attention == "uavls"
        self.self_attn = SelfAttention(width, config.heads, config.dropout) if own else LanGuideSelfAttention(width)
        if self.fusion == "attention":
            self.norm2 = nn.LayerNorm(width)
            self.cross_attn = nn.MultiheadAttention(width, config.heads, batch_first=True)
        self.scale = nn.Parameter(torch.tensor(1.421))  # α

    @property
    def shares(self) -> Tensor:
        """How much each mixed token takes of each text token [L, 24], rows summing to one."""
        return next(layer.shares for layer in self.text_project if hasattr(layer, "shares"))

    def forward(self, x: Tensor, text: Tensor, weights: bool = False) -> tuple[Tensor, Tensor | None]:
        mixed = self.text_project(text)  # [B, L, C]
        x = x + self.self_attn_norm(self.self_attn(self.norm1(x)))
        if self.fusion == "addition":
            return x + self.scale * self.cross_attn_norm(mixed.mean(1, keepdim=True)), None
        query = placed(self.norm2(x))
        said, attention = self.cross_attn(query, placed(mixed), mixed, need_weights=weights)
        return x + self.scale * self.cross_attn_norm(said), attention


# ---- decoder ---------------------------------------------------------------------------------------------


class Stage(nn.Module):
    """MoDAB, then twice the size: [B, C, h, w] and the skip [B, C', 2h, 2w] -> [B, C', 2h, 2w]."""

    def __init__(self, config: UAVLSConfig, width: int, skip_width: int, length: int):
        super().__init__()
        self.modab = MoDAB(config, width, length) if config.modab else None
        # transposed convolution, [up, skip], twice convolution-BN-LeakyReLU; not residual, as released
        self.up = UnetrUpBlock(2, width, skip_width, 3, 2, norm_name="batch")

    def forward(
        self, x: Tensor, skip: Tensor, words: Words | None, weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        attention = None
        if self.modab is not None and words is not None:
            height = x.shape[2]
            tokens = rearrange(x, "b c h w -> b (h w) c")
            guided, attention = self.modab(tokens, words.tokens, weights)
            # where, not arithmetic: an image whose text is skipped neither sees nor trains this block
            tokens = torch.where(words.read[:, None, None], guided, tokens)
            x = rearrange(tokens, "b (h w) c -> b c h w", h=height)
            if attention is not None:
                attention = rearrange(attention * words.read[:, None, None], "b (h w) l -> b l h w", h=height)
        return self.up(x, skip), attention


class SubpixelHead(nn.Module):
    """Four times the size by sub-pixel convolution, a 4x4 average against chequerboards, then 1x1 to the logits.

    All of it is linear, so that the two convolutions are multiplied first: the same logits and gradients from a
    twenty-fourth of the channels, without the [B, 24, H, W] in between that `upsample` returns.
    """

    factor = 4

    def __init__(self, channels: int, hidden: int, classes: int):
        super().__init__()
        self.expand = nn.Conv2d(channels, hidden * self.factor**2, 3, padding=1)
        icnr_init(self.expand, self.factor)
        self.out = nn.Conv2d(hidden, classes, 1)

    def smooth(self, x: Tensor) -> Tensor:
        """Put channels where they belong and average each pixel with those above and to the left of it."""
        x = F.pad(F.pixel_shuffle(x, self.factor), (self.factor - 1, 0, self.factor - 1, 0))
        for axis in (2, 3):  # two sums of shifted views: a tenth of the time of avg_pool2d on CPU
            size = x.shape[axis] - self.factor + 1
            x = sum(x.narrow(axis, shift, size) for shift in range(self.factor))
        return x / self.factor**2

    def upsample(self, x: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, hidden, 4h, 4w], the map that the 1x1 convolution reads."""
        return self.smooth(self.expand(x))

    def forward(self, x: Tensor) -> Tensor:
        mix = self.out.weight[:, :, 0, 0]  # [K, hidden]
        kernel, bias = (
            torch.tensordot(mix, t.unflatten(0, (-1, self.factor**2)), 1).flatten(0, 1)
            for t in (self.expand.weight, self.expand.bias)
        )
        return self.smooth(F.conv2d(x, kernel, bias, padding=1)) + self.out.bias[:, None, None]


# ---- the model -------------------------------------------------------------------------------------------


class UAVLS(nn.Module):
    """Four image scales and one text (arXiv 2602.14498, Fig. 2; released code).

    image [B, 1 or 3, H, W] in [0, 1] with sides divisible by 32 -> logits [B, classes, H, W]. `encoder` maps a
    normalised image [B, 3, H, W] to its maps at strides 4, 8, 16, 32. The text is read word by word; prompts without
    tokens are read as one word, their pooled embedding. `aux` holds "alpha" [stages] and, with `attention_maps` on,
    for each stage i: "attention_i" [B, L, h, w], the weight of each mixed token at each place, and "words_i"
    [B, 24, h, w], the same shared out among the text's tokens by how the mixing weighs them (ours: the scan's own
    spread over neighbours is left out).
    """

    def __init__(self, config: UAVLSConfig, encoder: nn.Module):
        super().__init__()
        self.config = config
        self.switches = {
            "absent": CHOICES["absent"],
            "test_dropout": (False, True),
            "attention_maps": (False, True),
        }
        self.roles = config.roles if config.modab else ()
        self.external: dict[str, str] = {}  # the encoder is trained, so that its weights are stored with the rest
        self.provenance = {"backbone": "random start, trained"}
        self.absent, self.attention_maps = config.absent, config.attention_maps
        self._warned = False

        self.norm = ImageNetNorm() if config.normalise == "imagenet" else ZScore()
        self.encoder = encoder
        self.register_buffer("text_mean", torch.zeros(config.text_dim))
        self.register_buffer("text_std", torch.ones(config.text_dim))
        widths = config.channels[::-1]
        self.stages = nn.ModuleList(
            Stage(config, width, skip, length)
            for width, skip, length in zip(widths[:-1], widths[1:], config.lengths, strict=True)
        )
        self.head = SubpixelHead(config.channels[0], config.head_channels, config.classes)
        self.test_dropout = config.test_dropout

    @property
    def test_dropout(self) -> bool:
        """Whether attention weights are dropped out in evaluation mode too; may be set at run time."""
        return self._test_dropout

    @test_dropout.setter
    def test_dropout(self, on: bool) -> None:
        self._test_dropout = on
        for module in self.modules():
            if isinstance(module, SelfAttention):
                module.at_test = on

    def calibrate_text(self, prompts: Prompts) -> None:
        """Set mean and spread of the words from the training prompts, once, before training.

        A linear layer reads them, so that this changes only where training starts. Words that never vary are left
        as they are.
        """
        if not self.roles or not self.config.standardise_text or self.roles[0] not in prompts.present:
            return
        states, there = self._states(prompts)
        words = states[there].float()  # [words, D]
        if len(words) < 2 or (spread := words.std(0, correction=0)).square().mean().sqrt() < 1e-5:
            return
        self.text_mean.copy_(words.mean(0))
        self.text_std.copy_(spread.clamp_min(0.1 * spread.square().mean().sqrt()))  # a dead dimension stays quiet

    def _states(self, prompts: Prompts) -> tuple[Tensor, Tensor]:
        """The word embeddings [B, L, D] of this model's role and which of them are words [B, L]."""
        (role,) = self.roles
        present = prompts.present[role][:, None]
        if role in prompts.tokens:
            return prompts.tokens[role], prompts.token_mask[role] & present
        return prompts.pooled[role][:, None], present

    def words(self, prompts: Prompts, batch: int) -> Words | None:
        """What the decoder reads of the prompts; None where it reads nothing at all.

        Raises ValueError for embeddings of another width or number than the model and the images have.
        """
        if not self.roles:
            return None
        (role,), limit, dim = self.roles, self.config.text_tokens, self.config.text_dim
        like = self.text_mean
        if role not in prompts.present:
            nothing = like.new_zeros(batch, limit, dim)
            return None if self.absent == "skip" else Words(nothing, nothing.new_ones(batch, dtype=torch.bool))
        states, there = self._states(prompts)
        if (len(states), states.shape[2]) != (batch, dim):
            raise ValueError(
                f"The '{role}' prompts have the shape {tuple(states.shape)}, but {batch} images and text_dim={dim} "
                f"need ({batch}, words, {dim}): embed one prompt per image with that encoder."
            )
        if states.shape[1] > limit and not self._warned:
            self._warned = True
            warnings.warn(
                f"A '{role}' prompt has {states.shape[1]} tokens and this model reads {limit}: the rest is cut off.",
                stacklevel=2,
            )
        states, there = states[:, :limit], there[:, :limit, None]
        states = (states.to(like.dtype) - self.text_mean) / self.text_std
        # where, not arithmetic: no text row leaks into an absent one
        tokens = F.pad(torch.where(there, states, 0), (0, 0, 0, limit - states.shape[1]))
        read = prompts.present[role]
        return Words(tokens, read if self.absent == "skip" else torch.ones_like(read))

    def encode_image(self, image: Tensor) -> tuple[Tensor, ...]:
        """Compute the maps at strides 4, 8, 16, 32, which no prompt changes; raises ValueError for odd sizes."""
        height, width = image.shape[-2:]
        if height % 32 or width % 32:
            raise ValueError(
                f"The image is {height}x{width}, but UA-VLS halves it five times: resize it to multiples of 32, "
                f"such as {math.ceil(height / 32) * 32}x{math.ceil(width / 32) * 32}."
            )
        image = self.norm(rgb(image)).contiguous(memory_format=torch.channels_last)
        return tuple(self.encoder(image))

    def decode(self, features: tuple[Tensor, ...], prompts: Prompts) -> Prediction:
        """Segment an encoded image under the given prompts."""
        *skips, x = features
        words = self.words(prompts, len(x))
        aux = {"alpha": torch.stack([stage.modab.scale for stage in self.stages]).detach()} if self.roles else {}
        for i, (stage, skip) in enumerate(zip(self.stages, reversed(skips), strict=True), start=1):
            x, attention = stage(x, skip, words, self.attention_maps)
            if attention is not None:
                aux[f"attention_{i}"] = attention
                aux[f"words_{i}"] = torch.einsum("blhw, lt -> bthw", attention, stage.modab.shares)
        return Prediction(self.head(x), aux)

    def forward(self, image: Tensor, prompts: Prompts) -> Prediction:
        return self.decode(self.encode_image(image), prompts)


class ZScore(nn.Module):
    """Each channel of each image by its own mean and spread over all pixels (MONAI's NormalizeIntensity)."""

    def forward(self, image: Tensor) -> Tensor:
        image = image - image.mean((2, 3), keepdim=True)
        spread = image.square().mean((2, 3), keepdim=True).sqrt()
        return image / spread.clamp_min(1e-6)  # a plain image becomes zero


def build(size: str = "paper", pretrained: bool | None = None, **fields) -> UAVLS:
    """Build UA-VLS; a `pretrained` backbone is True required, False never, None taken where offered."""
    config = configure(UAVLSConfig, SIZES, size, fields)
    for field, count in (("roles", 1), ("channels", 4), ("depths", 4), ("lengths", 3)):
        if len(getattr(config, field)) != count:
            raise ValueError(f"UAVLSConfig.{field} is {getattr(config, field)}, but it needs {count} entries.")
    for field, choices in CHOICES.items():
        if getattr(config, field) not in choices:
            raise ValueError(
                f"UAVLSConfig.{field} is {getattr(config, field)!r}, but it must be one of {', '.join(choices)}."
            )
    if odd := [width for width in config.channels[1:] if width % config.heads or width % 2]:
        raise ValueError(
            f"UAVLSConfig.channels has the width {odd[0]}, which {config.heads} heads and two halves cannot share."
        )
    if config.backbone not in ("convnext-tiny", "narrow"):
        raise ValueError(f"There is no backbone '{config.backbone}' of UA-VLS: use convnext-tiny or narrow.")
    sizes = {"depths": config.depths, "dims": config.channels}
    model = UAVLS(config, create_model("convnext_tiny", features_only=True, feature_cls="getter", **sizes))
    name = config.backbone
    if name in BACKBONES and (backbone_file(name) is not None if pretrained is None else pretrained):
        digest = load_backbone(model.encoder.model, name)
        model.provenance["backbone"] = f"pretrained {name} ({digest[:12]})"
    return model.to(memory_format=torch.channels_last)  # tokens are then a view of a map


# ---- beside the released code ----------------------------------------------------------------------------


def count_parameters(model: UAVLS) -> dict[str, int]:
    """Count the parameters of each part; "unused" are those that the released encoder has and nothing reads.

    They are its projection to 512 and its last norm. With them the released layout has 43.43 M.
    """
    parts = {"encoder": model.encoder, **{f"stage {i}": s for i, s in enumerate(model.stages, 1)}, "head": model.head}
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    width = model.config.channels[-1]
    return counts | {"unused": (width + 1) * 512 + 2 * width}


RELEASED_NAMES = {  # part of a name in the released checkpoint -> here, in this order
    "encoder.model.encoder.stages.": "encoder.model.stages.",
    ".embeddings.patch_embeddings.": ".stem.0.",
    ".embeddings.layernorm.": ".stem.1.",
    ".downsampling_layer.": ".downsample.",
    ".layers.": ".blocks.",
    ".layer_scale_parameter": ".gamma",
    ".dwconv.": ".conv_dw.",
    ".layernorm.": ".norm.",
    ".pwconv": ".mlp.fc",
    "decoder16.": "stages.0.",
    "decoder8.": "stages.1.",
    "decoder4.": "stages.2.",
    ".guide_layer.": ".modab.",
    ".decoder.": ".up.",
    "decoder1.conv_block.": "head.expand.",
    "out.conv.conv.": "head.out.",
}
RELEASED_UNUSED = re.compile(r"encoder\.project_head\..*|encoder\.model\.layernorm\..*|.*_pos\.pe")


def released_name(name: str) -> str | None:
    """What a tensor of the released checkpoint is called here; None for one that nothing reads."""
    name = name.removeprefix("model.")  # of the training wrapper
    if RELEASED_UNUSED.fullmatch(name):
        return None
    for theirs, ours in RELEASED_NAMES.items():
        name = name.replace(theirs, ours)
    return name


def load_released(model: UAVLS, state_dict: Mapping[str, Tensor]) -> list[str]:
    """Fill the model from a checkpoint of the released layout and return the names that were left out.

    Raises ValueError when tensors are missing, unexpected or of another shape. The text is then read raw.
    """
    named = {name: released_name(name) for name in state_dict}
    tensors = {ours: state_dict[name] for name, ours in named.items() if ours is not None}
    raw = {"text_mean": torch.zeros_like(model.text_mean), "text_std": torch.ones_like(model.text_std)}
    own = model.state_dict()
    wrong = sorted((own.keys() - raw.keys()) ^ tensors.keys())
    wrong += sorted(name for name in own.keys() & tensors.keys() if own[name].shape != tensors[name].shape)
    if wrong:
        raise ValueError(
            f"These weights are not of the released layout for this configuration: {len(wrong)} tensors differ, "
            f"first '{wrong[0]}'; build the model with the sizes and switches that they were trained with."
        )
    model.load_state_dict(tensors | raw)
    return [name for name, ours in named.items() if ours is None]


def released_input(image: np.ndarray, mask: np.ndarray, size: int = 224) -> tuple[Tensor, Tensor]:
    """Prepare one image [H, W] or [H, W, C] and its mask [H, W] as the released data set does for testing.

    Both are transposed (MONAI's reader), the image resized bicubically without antialiasing and standardised per
    channel, the mask resized to the nearest pixel and true where it is exactly 255: [C, S, S] and [1, S, S].
    Source: utils/dataset.py.
    """
    image, mask = (torch.from_numpy(np.atleast_3d(array)).permute(2, 1, 0)[None] for array in (image, mask))
    resized = F.interpolate(image.float(), (size, size), mode="bicubic", align_corners=False)
    truth = F.interpolate(mask.float(), (size, size), mode="nearest") == 255
    return ZScore()(resized)[0], truth[0]
