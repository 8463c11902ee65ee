"""Malenia (arXiv 2410.15744): 3-D lesions of unseen diseases, segmented by aligning mask tokens with attributes.

No code was released (github.com/Yankai96/Malenia @6955662 holds tables and a drawing). Sources of the defaults:
"paper" = what the paper's summary, drawing and review thread say, "M2F" = Mask2Former, on which it builds, "ZePT" =
the authors' earlier code, "ours" = not stated anywhere.
"""

import math
import warnings
from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import rearrange
from monai.networks.blocks import Convolution
from monai.networks.blocks.dynunet_block import UnetResBlock, UnetUpBlock
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional as F

from lib.losses.queries import assignment_cost, mp_nce
from lib.models import Prediction, configure
from lib.models.blocks import NullablePrompt
from lib.text import Prompts

ATTRIBUTES = ("location", "shape", "density", "variation", "enhancement", "surface", "relation", "features")
NOTHING = -12.0  # the logit of a mask that no token draws
SAME = 1 - 1e-4  # the cosine from which two sentences are one
CHOICES = {
    "alignment": ("mp_nce", "single", "paragraph", "naive"),
    "negatives": ("vocabulary", "batch"),
    "cmki": ("both", "mask", "text", "none"),
    "ensemble": ("probability", "logit"),
    "describe": ("token", "pooled"),
    "naming": ("similarity", "values", "none"),
    "branch": ("both", "mask", "text"),
}


@dataclass(frozen=True)
class MaleniaConfig:
    """Sizes and choices of Malenia; the defaults are the paper's where it states them."""

    roles: tuple[str, ...] = tuple(f"attribute.{name}" for name in ATTRIBUTES)  # paper: eight, each embedded alone
    text_dim: int = 768  # paper: Clinical-BERT, frozen
    # image
    channels: tuple[int, ...] = (32, 64, 128, 256, 320)  # of strides 1, 2, 4, 8, 16: nnU-Net's
    width: int = 256  # C; M2F and the drawing
    # tokens
    tokens: int = 16  # paper
    heads: int = 8  # M2F
    anchored: float = 0.0  # ours: how strongly a token keeps to a place, which the blocks move; 0: free (paper)
    reach: float = 0.35  # ours: how far it sees and draws at first, in halves of the volume's edge
    masked_attention: bool = False  # M2F's: a token attends to where its last mask lies; not in the paper's drawing
    rate: float = 1.0  # share of the learning rate for tokens and blocks (ours)
    # alignment
    levels: int = 3  # blocks from the last one on that are trained to draw and to agree (paper, table 3: 3)
    describe: str = "token"  # paper; "pooled" adds what lies under the mask and around it (ours)
    attribute_heads: bool = False  # ours: one map from a token to each attribute; the paper compares one vector
    alignment: str = "mp_nce"  # paper, Eq. 6
    negatives: str = "vocabulary"  # ours: the values of an attribute that a lesion lacks; "batch": other lesions' only
    temperature: float = 0.07  # ZePT
    learn_temperature: bool = True  # ZePT; kept at 100 at most in 1 / tau
    values: int = 64  # most values of an attribute that training may hold
    # injection
    cmki: str = "both"  # paper: the mean of a mask branch and a text branch
    fusions: int = 3  # paper
    ensemble: str = "probability"  # ours: the paper says mean
    # naming
    naming: str = "similarity"  # ours: mean cosine; "values": how probable each value is among all that training and
    # the prompts name; "none": all tokens answer
    # loss
    dice_weight: float = 1.0  # ours, as the next three
    similarity_weight: float = 1.0
    segmentation_weight: float = 1.0
    empty_weight: float = 0.1  # M2F's no-object
    upsampled: bool = True  # paper: masks of a block are drawn at full size; False compares them at their own
    points: int = 0  # of a mask in the loss, drawn evenly; M2F: 12544; 0: every voxel


SIZES = {
    "paper": {},
    "small": {
        "channels": (16, 32, 64, 96, 128),
        "width": 96,
        "heads": 4,
        "text_dim": 384,
        "anchored": 1.0,
        "describe": "pooled",
        "attribute_heads": True,
        "naming": "values",
        "rate": 0.4,
        "upsampled": False,
    },
    # A small net and few steps: without what keeps tokens apart, all of them settle on the same lesions.
    "tiny": {
        "channels": (8, 16, 24, 32),
        "width": 48,
        "tokens": 8,
        "heads": 4,
        "text_dim": 384,
        "anchored": 1.0,
        "describe": "pooled",
        "attribute_heads": True,
        "naming": "values",
        "rate": 0.4,
        "upsampled": False,
    },
}

# ---- image -----------------------------------------------------------------------------------------------


class Pyramid(nn.Module):
    """nnU-Net's encoder and decoder in residual blocks: [B, 1, D, H, W] -> F¹, F², F³ from coarse to fine, and F⁴.

    The levels have strides 16, 8 and 4 (with four widths 8, 4 and 2) and `width` channels each. F⁴ joins the next
    finer decoder level with the stem at full resolution, without a convolution there, which would cost the most.
    """

    def __init__(self, channels: tuple[int, ...], width: int):
        super().__init__()
        block = {"norm_name": ("INSTANCE", {"affine": True})}
        pairs = list(zip(channels, channels[1:], strict=False))
        self.stem = Convolution(3, 1, channels[0], norm=block["norm_name"], act="LEAKYRELU")
        self.downs = nn.ModuleList(UnetResBlock(3, low, high, 3, 2, **block) for low, high in pairs)
        self.ups = nn.ModuleList(UnetUpBlock(3, high, low, 3, 1, 2, **block) for low, high in pairs[:0:-1])
        self.levels = nn.ModuleList(nn.Conv3d(c, width, 1) for c in channels[:-4:-1])
        self.fine_width = channels[0] + channels[1]
        self.stride = 2 ** len(pairs)

    def forward(self, image: Tensor) -> list[Tensor]:
        """Features of an image padded to a multiple of the coarsest stride."""
        margin = [end for size in image.shape[:1:-1] for end in (0, -size % self.stride)]
        skips = [self.stem(F.pad(image, margin, mode="replicate") * 2 - 1)]
        for down in self.downs:
            skips.append(down(skips[-1]))
        x, maps = skips[-1], [skips[-1]]
        for up, skip in zip(self.ups, skips[-2:0:-1], strict=True):
            x = up(x, skip)
            maps.append(x)
        joined = torch.cat([skips[0], F.interpolate(x, scale_factor=2, mode="trilinear")], 1)
        return [level(x) for level, x in zip(self.levels, maps, strict=False)] + [joined]


def places(size: tuple[int, ...], like: Tensor) -> Tensor:
    """The middles of a grid's voxels from -1 to 1: [D·H·W, 3]."""
    axes = [(torch.arange(n, device=like.device, dtype=like.dtype) * 2 + 1) / n - 1 for n in size]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 2)


def sinusoids(position: Tensor, width: int) -> Tensor:
    """Sines and cosines [V, width] of places [V, 3] in [-1, 1], a third of the channels for each axis."""
    number = -(-width // 6)
    rates = math.pi * 2.0 ** torch.linspace(-1, 3, number, device=position.device, dtype=position.dtype)
    angles = position[..., None] * rates
    return torch.cat([angles.sin(), angles.cos()], -1).flatten(1)[:, :width]


# ---- tokens ----------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Pre-norm multi-head attention with a residual: x [B, N, C] attends to y [B, M, C]."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm, self.norm_y = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attend = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(
        self,
        x: Tensor,
        y: Tensor,
        place: Tensor | None = None,
        bias: Tensor | None = None,
        hidden: Tensor | None = None,
    ) -> Tensor:
        """place: [M, C] added to y; bias: [B, N, M] added to the scores; hidden: [B, M] true for no key."""
        key = self.norm_y(y) if place is None else self.norm_y(y) + place  # also the value: a token learns where it is
        if bias is not None:
            bias = bias.repeat_interleave(self.attend.num_heads, 0)
        if hidden is not None:
            hidden = torch.zeros_like(hidden, dtype=x.dtype).masked_fill(hidden, -math.inf)
        found, _ = self.attend(self.norm(x), key, key, hidden, need_weights=False, attn_mask=bias)
        return x + found


class Block(nn.Module):
    """One decoder block: tokens attend to a level of features, then to each other; `draw` and `move` read them."""

    def __init__(self, width: int, heads: int, anchored: bool):
        super().__init__()
        self.cross, self.own = Attention(width, heads), Attention(width, heads)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.draw = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width))
        if anchored:
            self.move = nn.Linear(width, 4)  # of the token's place and the logarithm of its reach; none at the start
            nn.init.zeros_(self.move.weight)
            nn.init.zeros_(self.move.bias)

    def forward(self, tokens: Tensor, level: Tensor, bias: Tensor | None) -> Tensor:
        """tokens [B, N, C] and features [B, C, d, h, w] -> new tokens."""
        flat = level.flatten(2).transpose(1, 2)
        place = sinusoids(places(level.shape[2:], level), level.shape[1])
        tokens = self.cross(tokens, flat, place, bias)
        tokens = self.own(tokens, tokens)
        return tokens + self.mlp(tokens)


def drawn(tokens: Tensor, level: Tensor) -> Tensor:
    """Masks of tokens [B, N, C] in features [B, C, d, h, w], scaled so that they start within a few units."""
    return torch.einsum("bnc, bcdhw -> bndhw", tokens, level) * level.shape[1] ** -0.5


def remoteness(where: Tensor, size: tuple[int, ...]) -> Tensor:
    """Squared distance of a grid's voxels from places [B, N, 4] (z, y, x, log reach), in reaches: [B, N, d, h, w]."""
    away = torch.cdist(where[..., :3], places(size, where)[None]).square() * (-2 * where[..., 3:]).exp()
    return away.unflatten(2, size)


# ---- injection -------------------------------------------------------------------------------------------


class CMKI(nn.Module):
    """Cross-modal knowledge injection: tokens and what their words say change each other, to draw in F⁴ both.

    Source: the paper's drawing. Bidirectional cross-attention with residuals, then self-attention, `fusions` times.
    """

    def __init__(self, roles: int, width: int, heads: int, fusions: int, fine: int):
        super().__init__()
        self.mask_in = nn.Linear(width, width)
        self.text_in = nn.Linear(roles * width, width)
        kinds = ("mask_to_text", "text_to_mask", "mask_own", "text_own")
        self.fusions = nn.ModuleList(
            nn.ModuleDict({kind: Attention(width, heads) for kind in kinds}) for _ in range(fusions)
        )
        self.mask_out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, fine))
        self.text_out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, fine))
        self.key = nn.Conv3d(fine, fine, 1)

    def forward(self, tokens: Tensor, texts: Tensor, fine: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """tokens [B, N, C], texts [B, N, A, C], hidden [B, N] for tokens that none attends to -> two queries, a key."""
        m, t = self.mask_in(tokens), self.text_in(texts.flatten(2))
        for fusion in self.fusions:
            m, t = (
                fusion["mask_to_text"](m, t, hidden=hidden),
                fusion["text_to_mask"](t, m, hidden=hidden),
            )
            m, t = fusion["mask_own"](m, m, hidden=hidden), fusion["text_own"](t, t, hidden=hidden)
        return self.mask_out(m), self.text_out(t), self.key(fine)


# ---- the model -------------------------------------------------------------------------------------------


class Features(NamedTuple):
    """What no text enters: per block the tokens [B, N, C], their places [B, N, 4], masks and descriptions
    [B, N, A, C]; and F⁴.
    """

    tokens: list[Tensor]
    where: list[Tensor]
    masks: list[Tensor]
    descriptions: list[Tensor]
    fine: Tensor
    size: tuple[int, ...]


class Malenia(nn.Module):
    """Volumes [B, 1, D, H, W] in [0, 1] and K candidate prompts each -> logits [B, K, D, H, W].

    The prompts of a volume compete for its tokens. `aux`: names [B, N], which prompt each token got; scores [B, N, K];
    token_masks, a list of logits per block; descriptions [B, N, A, C]; mask_branch and text_branch [B, K, D, H, W].
    """

    switches = {name: CHOICES[name] for name in ("branch", "ensemble", "naming")}

    def __init__(self, config: MaleniaConfig):
        super().__init__()
        self.config, self.roles = config, config.roles
        self.branch, self.ensemble, self.naming = "both", config.ensemble, config.naming
        self.provenance = {"backbone": "trained from scratch"}
        width, count = config.width, len(config.roles)
        self.rates = dict.fromkeys(("query", "blocks.", "cmki."), config.rate)
        self.pyramid = Pyramid(config.channels, width)
        self.query = nn.Parameter(0.5 * torch.randn(config.tokens, width))
        self.blocks = nn.ModuleList(Block(width, config.heads, config.anchored > 0) for _ in range(3))
        pooled = 3 * width if config.describe == "pooled" else width
        maps = count if config.attribute_heads else 1
        self.describers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(pooled), nn.Linear(pooled, width), nn.GELU(), nn.Linear(width, maps * width))
            for _ in range(3)
        )
        self.prompts = nn.ModuleList(NullablePrompt(role, config.text_dim) for role in config.roles)
        self.read = nn.Linear(config.text_dim, width)
        self.log_scale = nn.Parameter(torch.tensor(-math.log(config.temperature)), config.learn_temperature)
        fine = self.pyramid.fine_width
        self.cmki = CMKI(count, width, config.heads, config.fusions, fine) if config.cmki != "none" else None
        self.last = None if self.cmki else nn.Sequential(nn.LayerNorm(width), nn.Linear(width, fine))
        self.register_buffer("vocabulary", torch.full((count, config.values, config.text_dim), torch.nan))
        self.register_buffer("anchors", spread(config.tokens))

    def adopt_part(self, name: str, part: nn.Module) -> None:
        """Start from the image network of another model; raises ValueError for what has none, or one of other sizes."""
        wanted = {key: value.shape for key, value in self.pyramid.state_dict().items()}
        given = getattr(part, "pyramid", nn.Module()).state_dict()
        if name != "image" or {key: value.shape for key, value in given.items()} != wanted:
            raise ValueError(
                f"Malenia takes a part 'image' whose network has the same widths, not '{name}' ({type(part).__name__})."
            )
        self.pyramid.load_state_dict(given)
        self.provenance = {**self.provenance, "image": "trained before to tell lesion from rest"}

    # -- text

    def calibrate_text(self, prompts: Prompts) -> None:
        """Learn the standardisation of the training prompts and which values each attribute has there."""
        for number, prompt in enumerate(self.prompts):
            if prompt.role not in prompts.present:
                continue
            prompt.calibrate(prompts)
            text = prompts.pooled[prompt.role][prompts.present[prompt.role]]
            found, times = text.unique(dim=0, return_counts=True)
            kept = found[times.argsort(descending=True)][: self.config.values]  # free text: the most frequent ones
            self.vocabulary[number].fill_(torch.nan)[: len(kept)] = kept

    def _embedded(self, prompts: Prompts) -> tuple[Tensor, Tensor]:
        """Unit vectors [R, A, C] of R prompts, nulls where absent, and which are present [R, A]."""
        if unknown := set(prompts.present) - set(self.roles):
            raise ValueError(f"Malenia was built for the roles {', '.join(self.roles)}, not '{min(unknown)}'.")
        rows = len(prompts)
        nowhere = torch.zeros(rows, dtype=torch.bool, device=self.query.device)
        present = torch.stack([prompts.present.get(role, nowhere) for role in self.roles], 1)
        texts = torch.stack([self.read(prompt(prompts, rows)) for prompt in self.prompts], 1)
        return F.normalize(texts, dim=-1), present

    # -- image

    def encode_image(self, image: Tensor) -> Features:
        """Everything that no text enters: features, tokens, their masks and descriptions."""
        size = tuple(image.shape[2:])
        *levels, fine = self.pyramid(image)
        tokens, mask = self.query.expand(len(image), -1, -1), None
        where = F.pad(self.anchors, (0, 1), value=math.log(self.config.reach)).expand(len(image), -1, -1)
        features = Features([], [], [], [], fine, size)
        for block, level, describer in zip(self.blocks, levels, self.describers, strict=True):
            tokens = block(tokens, level, self._bias(level, where, mask))
            if self.config.anchored:
                where = where + 0.5 * block.move(tokens)
            mask = self._kept(drawn(block.draw(tokens), level), where)
            features.tokens.append(tokens)
            features.where.append(where)
            features.masks.append(mask)
            features.descriptions.append(self._described(describer, tokens, level, mask))
        return features

    def _kept(self, masks: Tensor, where: Tensor) -> Tensor:
        """Mask logits [B, N, d, h, w] less the distance from the token's place."""
        if not self.config.anchored:
            return masks
        return masks - self.config.anchored * remoteness(where, masks.shape[2:])

    def _bias(self, level: Tensor, where: Tensor, mask: Tensor | None) -> Tensor | None:
        """What keeps tokens apart in attention [B, N, V]: the distance from their places, or their last masks."""
        bias = None
        if self.config.anchored:
            bias = -self.config.anchored / 4 * remoteness(where, level.shape[2:]).flatten(2)
        if self.config.masked_attention and mask is not None:
            inside = F.interpolate(mask.detach(), level.shape[2:], mode="trilinear").flatten(2) > 0
            blocked = torch.zeros_like(inside, dtype=level.dtype).masked_fill(~inside & inside.any(-1, True), -math.inf)
            bias = blocked if bias is None else bias + blocked
        return bias

    def _described(self, describer: nn.Module, tokens: Tensor, level: Tensor, mask: Tensor) -> Tensor:
        """Unit vectors [B, N, A, C] that are compared with the words."""
        if self.config.describe == "pooled":
            inside = mask.detach().sigmoid()
            around = (F.max_pool3d(inside, 3, 1, 1) - inside).clamp_min(0)
            parts = [tokens]
            for weight in (inside, around):
                share = weight.flatten(2) / weight.flatten(2).sum(-1, keepdim=True).clamp_min(1e-3)
                parts.append(share @ level.flatten(2).transpose(1, 2))
            tokens = torch.cat(parts, -1)
        found = rearrange(describer(tokens), "b n (a c) -> b n a c", c=self.config.width)
        return F.normalize(found.expand(-1, -1, len(self.roles), -1), dim=-1)

    # -- naming and masks

    def scores(self, descriptions: Tensor, texts: Tensor, present: Tensor) -> Tensor:
        """How well each token fits each prompt: descriptions [B, N, A, C], texts [B, K, A, C], present [B, K, A]."""
        weight = present.to(descriptions)
        if self.config.alignment == "paragraph":  # named by what it was trained to agree with: all words at once
            whole = F.normalize(torch.einsum("bnac, bka -> bnkc", descriptions, weight), dim=-1)
            return (whole * F.normalize((texts * weight[..., None]).sum(2), dim=-1)[:, None]).sum(-1)
        fit = torch.einsum("bnac, bkac -> bnka", descriptions, texts)
        if self.naming == "values":
            scale = self.log_scale.exp().clamp_max(100)
            fit = fit * scale - self._rivals(descriptions, texts, present, scale)[:, :, None]
            fit = fit.masked_fill(~present[:, None], 0)
        return (fit * weight[:, None]).sum(-1) / weight[:, None].sum(-1).clamp_min(1)

    def _rivals(self, descriptions: Tensor, texts: Tensor, present: Tensor, scale: Tensor) -> Tensor:
        """The logarithm of what the values of each attribute weigh together for a token: [B, N, A].

        They are those of training and those that are asked for, each once: so one prompt alone has rivals as well.
        """
        words, known = self._values()
        new = present & ~((torch.einsum("bkac, vac -> bkva", texts, words) > SAME) & known).any(2)  # [B, K, A]
        earlier = torch.ones(2 * texts.shape[1:2], dtype=torch.bool, device=texts.device).tril(-1)[..., None]
        same = torch.einsum("bkac, bjac -> bkja", texts, texts) > SAME
        new = new & ~(same & new[:, None] & earlier).any(2)
        logits = torch.cat(
            [
                torch.einsum("bnac, vac -> bnva", descriptions, words).masked_fill(~known, -math.inf),
                torch.einsum("bnac, bkac -> bnka", descriptions, texts).masked_fill(~new[:, None], -math.inf),
            ],
            2,
        )
        return (logits * scale).logsumexp(2)

    def decode(self, features: Features, prompts: Prompts) -> Prediction:
        """Name the tokens by the prompts, inject the words, and draw a mask for each prompt."""
        batch = len(features.fine)
        texts, present = (rearrange(x, "(b k) ... -> b k ...", b=batch) for x in self._embedded(prompts))
        masks = features.masks[-1]
        scores = self.scores(features.descriptions[-1], texts, present)  # [B, N, K]
        names = scores.argmax(-1)
        own = texts.gather(1, names[..., None, None].expand(-1, -1, *texts.shape[2:]))
        found = masks.detach().flatten(2).amax(-1) > 0
        mask, text = self._branches(features, own, ~found & found.any(1, keepdim=True))
        k = torch.arange(texts.shape[1], device=names.device)
        given = (names[..., None] == k) & found[..., None]  # [B, N, K]: a token that found nothing answers nothing
        if len(k) == 1 and self.naming != "none":  # nothing competes: only the token that fits best answers
            best = scores[..., 0].masked_fill(~found, -math.inf).argmax(1)
            given = F.one_hot(best, scores.shape[1]).bool()[..., None] & found[..., None]
        if self.naming == "none":
            given = torch.ones_like(given)

        def answered(logits: Tensor) -> Tensor:
            """The largest logit of a prompt's tokens: [B, K, D, H, W] at the size of the image."""
            logits = torch.stack(
                [logits.masked_fill(~given[..., j, None, None, None], NOTHING).amax(1) for j in range(len(k))], 1
            )
            logits = upsampled(logits, features.fine)
            return logits[..., : features.size[0], : features.size[1], : features.size[2]]

        logits = answered(self._ensembled(mask, text))
        aux = {
            "names": names,
            "scores": scores,
            "token_masks": features.masks,
            "descriptions": features.descriptions[-1],
            "mask_branch": answered(mask),
            "text_branch": answered(text),
        }
        return Prediction(logits, aux)

    def forward(self, image: Tensor, prompts: Prompts) -> Prediction:
        return self.decode(self.encode_image(image), prompts)

    def _branches(
        self, features: Features, texts: Tensor, hidden: Tensor, pick: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mask logits of the two branches [B, N, ...], or of the (volume, token) pairs in `pick` alone [M, 1, ...].

        Without injection both are the token's own mask in F⁴.
        """
        tokens, where, key = features.tokens[-1], features.where[-1], features.fine
        if self.cmki:
            mask, text, key = self.cmki(tokens, texts, key, hidden)
        else:
            mask = text = self.last(tokens)
        if pick:
            mask, text, where = (x[pick][:, None] for x in (mask, text, where))
            key = key[pick[0]]
        mask, text = (self._kept(drawn(query, key), where) for query in (mask, text))
        return mask, text

    def _ensembled(self, mask: Tensor, text: Tensor) -> Tensor:
        branch = self.branch if self.config.cmki == "both" else self.config.cmki
        if branch in ("mask", "text", "none"):
            return text if branch == "text" else mask
        if self.ensemble == "logit":
            return (mask + text) / 2
        return ((mask.sigmoid() + text.sigmoid()) / 2).logit(1e-6)

    def agreement(self, description: Tensor, role: str, prompts: Prompts) -> Tensor:
        """Cosines of descriptions [B, A, C] of tokens with the sentences of one attribute [T]: [B, T]."""
        texts, _ = self._embedded(prompts)
        number = self.roles.index(role)
        return description[:, number] @ texts[:, number].T

    # -- learning

    def objective(self, batch, loss) -> Tensor:
        """Mask, alignment and segmentation losses of a training batch, lesions matched to tokens at every block.

        Lesions are the masks of the batch that are not empty; of more than there are tokens the largest are kept.
        """
        features = self.encode_image(batch.image)
        volume, row = self._lesions(batch.mask)
        truth = batch.mask[volume, row].clamp_min(0)  # [M, D, H, W]
        said = (rearrange(x, "(b k) ... -> b k ...", b=len(batch.image)) for x in self._embedded(batch.prompts))
        texts, present = (x[volume, row] for x in said)
        total = features.fine.new_zeros(())
        chosen = None
        for level in range(3 - self.config.levels, 3):
            masks = features.masks[level]
            small = F.adaptive_avg_pool3d(truth[:, None], masks.shape[2:])[:, 0] if len(truth) else truth
            chosen = self._matched(masks.detach(), small, volume)
            free = torch.ones(masks.shape[:2], dtype=torch.bool, device=masks.device)
            free[volume, chosen] = False
            if free.any():
                total = total + self.config.empty_weight * F.softplus(masks[free]).mean()
            if not len(truth):
                continue
            drawing = masks[volume, chosen]
            cost = (
                self._mask_loss(drawing, truth, features, loss)
                if self.config.upsampled
                else loss(drawing[:, None], small[:, None])
            )
            total = total + self.config.dice_weight * cost
            if self.naming != "none":
                total = total + self.config.similarity_weight * self._alignment(
                    features.descriptions[level][volume, chosen], texts, present, batch.prompts, volume, row
                )
        if len(truth):
            total = total + self.config.segmentation_weight * self._injected(
                features, volume, chosen, texts, truth, loss
            )
        return total

    def _lesions(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Volume and row of every mask [B, K, D, H, W] that holds something."""
        sizes = (mask > 0.5).flatten(2).sum(-1)
        if (sizes > 0).sum(1).max() > self.config.tokens:
            warnings.warn(
                f"A volume has more than the {self.config.tokens} lesions that there are tokens for: "
                "only the largest are learned; raise MaleniaConfig.tokens.",
                stacklevel=2,
            )
            kept = sizes.topk(self.config.tokens, 1)
            sizes = torch.zeros_like(sizes).scatter(1, kept.indices, kept.values)
        return (sizes > 0).nonzero(as_tuple=True)

    def _matched(self, masks: Tensor, truth: Tensor, volume: Tensor) -> Tensor:
        """The token of each lesion: [M], one to one within a volume, at the least cost."""
        chosen = torch.zeros(len(truth), dtype=torch.long, device=masks.device)
        for number in volume.unique().tolist():
            own = volume == number
            cost = assignment_cost(masks[number], truth[own])
            tokens, order = linear_sum_assignment(cost.cpu().numpy())
            rows = torch.empty(len(order), dtype=torch.long)
            rows[torch.from_numpy(order)] = torch.from_numpy(tokens)
            chosen[own] = rows.to(chosen)
        return chosen

    def _mask_loss(self, logits: Tensor, truth: Tensor, features: Features, loss) -> Tensor:
        """The experiment's loss of masks [M, d, h, w] against [M, D, H, W], at full size or on points of it."""
        size = truth.shape[1:]
        logits = upsampled(logits[:, None], features.fine)[..., : size[0], : size[1], : size[2]]
        truth = truth[:, None]
        if 0 < self.config.points < truth[0].numel():
            drawn_points = torch.randint(truth[0].numel(), (self.config.points,), device=truth.device)
            logits, truth = (x.flatten(2)[..., drawn_points, None, None] for x in (logits, truth))
        return loss(logits, truth)

    def _alignment(
        self, described: Tensor, texts: Tensor, present: Tensor, prompts: Prompts, volume: Tensor, row: Tensor
    ) -> Tensor:
        """The similarity loss of M matched tokens [M, A, C] and their words [M, A, C]."""
        tau = 1 / self.log_scale.exp().clamp_max(100)
        kind, lesions = self.config.alignment, len(texts)
        if kind == "paragraph":  # all words at once, against those of the other lesions
            weight = present[..., None].to(texts)
            whole, told = (F.normalize((x * weight).sum(1), dim=-1) for x in (described, texts))
            same = told @ told.T > SAME
            return mp_nce(whole @ told.T, torch.eye(lesions, dtype=torch.bool, device=same.device), ~same, tau)
        same = torch.einsum("iac, jac -> ija", texts, texts) > SAME  # [M, M, A]
        both = present[:, None] & present[None]
        if kind == "naive" or self.config.negatives == "batch":
            similarity = torch.einsum("iac, jac -> ija", described, texts)
            own = torch.eye(lesions, dtype=torch.bool, device=same.device)[..., None]
            positive = own & both
            negative = both & (~own if kind == "naive" else ~same)
        else:
            similarity, positive, negative = self._against_vocabulary(described, texts, present)
        if kind == "single":  # one of the eight, drawn anew at each step
            lot = torch.rand(present.shape, device=present.device).masked_fill(~present, -1).argmax(1)
            keep = F.one_hot(lot, present.shape[1]).bool()[:, None]
            positive, negative = positive & keep, negative & keep
        return mp_nce(similarity.flatten(1), positive.flatten(1), negative.flatten(1), tau)

    def _against_vocabulary(self, described: Tensor, texts: Tensor, present: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cosines [M, V, A] with every value of training, and which of them a lesion has and lacks."""
        words, known = self._values()
        similarity = torch.einsum("iac, vac -> iva", described, words)
        same = (torch.einsum("iac, vac -> iva", texts, words) > SAME) & known
        return similarity, same & present[:, None], ~same & known & present[:, None]

    def _values(self) -> tuple[Tensor, Tensor]:
        """Unit vectors [V, A, C] of the values that training held, and where there is one [V, A]."""
        words = [self.read(prompt.text(self.vocabulary[n].nan_to_num())) for n, prompt in enumerate(self.prompts)]
        return F.normalize(torch.stack(words, 1), dim=-1), ~self.vocabulary.isnan().any(-1).T

    def _injected(
        self, features: Features, volume: Tensor, chosen: Tensor, texts: Tensor, truth: Tensor, loss
    ) -> Tensor:
        """The loss of the masks after injection, in which every lesion has its own words."""
        shape = features.tokens[-1].shape[:2]
        words = texts.new_zeros(*shape, *texts.shape[1:]).index_put((volume, chosen), texts)
        hidden = torch.ones(shape, dtype=torch.bool, device=volume.device)
        hidden[volume, chosen] = False
        hidden = hidden & ~hidden.all(1, keepdim=True)
        branches = self._branches(features, words, hidden, (volume, chosen))
        mask, text = (branch[:, 0] for branch in branches)
        kinds = {"both": (mask, text), "mask": (mask,), "text": (text,), "none": (mask,)}[self.config.cmki]
        parts = [self._mask_loss(x, truth, features, loss) for x in kinds]
        if len(parts) == 2:
            parts.append(self._mask_loss(((mask.sigmoid() + text.sigmoid()) / 2).logit(1e-4), truth, features, loss))
        return sum(parts) / len(parts)


def upsampled(logits: Tensor, fine: Tensor) -> Tensor:
    """Masks [B, N, d, h, w] at the size of the finest features."""
    same = logits.shape[2:] == fine.shape[2:]
    return logits if same else F.interpolate(logits, fine.shape[2:], mode="trilinear")


def spread(number: int) -> Tensor:
    """Places [N, 3] in [-1, 1] that lie apart: the first points of a Sobol sequence."""
    return torch.quasirandom.SobolEngine(3).draw(number + 1)[1:] * 1.6 - 0.8


def build(size: str = "paper", **fields) -> Malenia:
    """Build Malenia."""
    config = configure(MaleniaConfig, SIZES, size, fields)
    for field, choices in CHOICES.items():
        if field != "branch" and getattr(config, field) not in choices:
            raise ValueError(
                f"MaleniaConfig.{field} is {getattr(config, field)!r}, but it must be one of {', '.join(choices)}."
            )
    if len(config.channels) < 4:
        raise ValueError(f"MaleniaConfig.channels is {config.channels}, but three scales need 4 widths or more.")
    if not 1 <= config.levels <= 3 or config.tokens < 1 or not config.roles:
        raise ValueError(
            f"MaleniaConfig has levels {config.levels}, tokens {config.tokens} and {len(config.roles)} roles: "
            "give 1 to 3 levels, and at least one token and role."
        )
    if config.width % config.heads:
        raise ValueError(f"MaleniaConfig.width is {config.width}, which {config.heads} heads do not divide.")
    return Malenia(config)
