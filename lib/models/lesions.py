"""What Malenia is held against: a network that tells lesion from rest, and SAM asked with the box of the true mask."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from lib.models import Prediction, configure
from lib.models.malenia import SIZES as MALENIA
from lib.models.malenia import MaleniaConfig, Pyramid
from lib.models.sam import EMPTY, SIZES, SamFeatures, SamPrompts, build_sam, load_checkpoint
from lib.text import Prompts

# ---- lesion or rest --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RestConfig:
    """Widths of Malenia's image network, which this one shares."""

    channels: tuple[int, ...] = MaleniaConfig.channels
    width: int = MaleniaConfig.width


REST_SIZES = {size: {k: v for k, v in given.items() if k in ("channels", "width")} for size, given in MALENIA.items()}


class LesionOrRest(nn.Module):
    """Volume [B, 1, D, H, W] in [0, 1] -> the same logits of "any lesion" for every case asked for [B, K, D, H, W]."""

    roles: tuple[str, ...] = ()
    switches: dict[str, tuple] = {}

    def __init__(self, config: RestConfig):
        super().__init__()
        self.config = config
        self.provenance = {"backbone": "trained from scratch"}
        self.pyramid = Pyramid(config.channels, config.width)
        self.head = nn.Conv3d(self.pyramid.fine_width, 1, 1)

    def encode_image(self, image: Tensor) -> Tensor:
        """Compute the logits [B, 1, D, H, W]; a prompt changes nothing."""
        depth, height, width = image.shape[2:]
        return self.head(self.pyramid(image)[-1])[..., :depth, :height, :width]

    def decode(self, features: Tensor, prompts: Prompts) -> Prediction:
        """Answer every case of a volume alike."""
        return Prediction(features.expand(-1, max(1, len(prompts) // len(features)), -1, -1, -1), {})

    def forward(self, image: Tensor, prompts: Prompts) -> Prediction:
        return self.decode(self.encode_image(image), prompts)

    def objective(self, batch, loss) -> Tensor:
        """The loss against all lesions of a volume as one mask."""
        return loss(self.encode_image(batch.image), batch.mask.amax(1, keepdim=True).clamp(min=0))


def build_rest(size: str = "paper", **fields) -> LesionOrRest:
    """Build the network that tells lesion from rest."""
    config = configure(RestConfig, REST_SIZES, size, fields)
    if len(config.channels) < 4:
        raise ValueError(f"RestConfig.channels is {config.channels}, but it needs 4 widths or more, as Malenia's does.")
    return LesionOrRest(config)


# ---- SAM, slice by slice ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class SlicesConfig:
    """Which SAM reads the slices, and how exactly the box fits."""

    sam: str = "vit_b"  # a size of lib.models.sam
    checkpoint: str = ""  # a name or file for lib.models.sam.load_checkpoint; without one it learns from the slices
    jitter: float = 0.0  # share of its side by which each edge of the true box may move


SLICES_SIZES = {"paper": {}, "small": {"sam": "small"}, "tiny": {"sam": "tiny"}}


class Slices(NamedTuple):
    """The encoded slices of B volumes, those of a volume after one another."""

    features: SamFeatures
    volumes: int


class SlicedSam(nn.Module):
    """SAM on each axial slice of a volume [B, 1, D, H, W] in [0, 1], asked with the **true** mask's box -> [B, K, ...].

    An oracle: the box says where the lesion is and how large in every slice, which no text does.
    """

    roles: tuple[str, ...] = ()  # no text is read
    switches = {"jitter": (0.0, 0.1, 0.2)}

    def __init__(self, config: SlicesConfig):
        super().__init__()
        self.config = config
        self.sam = load_checkpoint(config.checkpoint) if config.checkpoint else build_sam(config.sam, kind="box")
        self.sam.kind = "box"
        self.jitter = config.jitter
        self.provenance = self.sam.provenance

    @property
    def jitter(self) -> float:
        """How far the edges of the true box may move; may be set at run time."""
        return self.sam.jitter

    @jitter.setter
    def jitter(self, share: float) -> None:
        self.sam.jitter = share

    def encode_image(self, image: Tensor) -> Slices:
        """Encode every slice, which no prompt changes."""
        return Slices(self.sam.encode_image(rearrange(image, "b c d h w -> (b d) c h w")), len(image))

    def decode(self, features: Slices, prompts: SamPrompts) -> Prediction:
        """Segment the slices that have a box; the others, and cases without a lesion, are empty."""
        slices = features.features
        depth = len(slices.embedding) // features.volumes
        each = len(prompts) // len(slices.embedding)  # cases of a volume
        image = repeat(torch.arange(len(slices.embedding)), "(b d) -> (b k d)", d=depth, k=each)
        rows = prompts.present.nonzero()[:, 0]
        embedding = slices.embedding[image.to(rows.device)[rows]]
        logits = EMPTY + 0 * slices.embedding.float().mean() + embedding.new_zeros(len(prompts), *slices.size)
        if len(rows):
            drawn = self.sam.decode(slices._replace(embedding=embedding), prompts[rows]).logits[:, 0]
            logits = logits.index_copy(0, rows, drawn.to(logits))
        return Prediction(rearrange(logits, "(b k d) h w -> b k d h w", k=each, d=depth), {})

    def forward(self, image: Tensor, prompts: SamPrompts) -> Prediction:
        return self.decode(self.encode_image(image), prompts)

    def draw(self, mask: Tensor, generator: torch.Generator) -> SamPrompts:
        """Box the true masks [B, K, D, H, W], slice by slice: prompts of B·K·D slices."""
        return self.sam.draw(rearrange(mask, "b k d h w -> (b k d) 1 h w"), generator)


def build_slices(size: str = "paper", **fields) -> SlicedSam:
    """Build SAM for volumes; raises as `build_sam` and `load_checkpoint` do."""
    config = configure(SlicesConfig, SLICES_SIZES, size, fields)
    if config.sam not in SIZES:
        raise ValueError(f"SlicesConfig.sam is {config.sam!r}, but it must be one of {', '.join(SIZES)}.")
    return SlicedSam(config)
