"""What every paper is held against: a network that sees only the image, and a probe that sees only the prompt."""

from dataclasses import dataclass

import torch
from einops import rearrange
from monai.networks import nets
from torch import Tensor, nn
from torch.nn import functional as F

from lib.models import Prediction, configure
from lib.models.blocks import NULL_KINDS, ImageNetNorm, NullablePrompt, rgb
from lib.text import Prompts


@dataclass(frozen=True)
class UNetConfig:
    """Widths of MONAI's residual U-Net from stride 2 to 16; `tiny` and `small` cost what NullBUS costs."""

    classes: int = 1
    channels: tuple[int, ...] = (64, 128, 256, 512, 1024)


UNET_SIZES = {
    "paper": {},
    "small": {"channels": (24, 48, 96, 192, 320)},
    "tiny": {"channels": (8, 16, 32, 64, 128)},
}


class UNet(nn.Module):
    """An image-only U-Net: image [B, 1 or 3, H, W] in [0, 1] -> logits [B, classes, H, W]; prompts are ignored."""

    roles: tuple[str, ...] = ()
    switches: dict[str, tuple] = {}

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        self.provenance = {"backbone": "trained from scratch"}
        self.norm = ImageNetNorm()
        self.net = nets.UNet(2, 3, config.classes, config.channels, (2, 2, 2, 2), num_res_units=2)

    def encode_image(self, image: Tensor) -> Tensor:
        """Compute the logits; a prompt changes nothing."""
        image = self.norm(rgb(image))
        height, width = image.shape[-2:]
        # four halvings: pad to the next multiple of 16 and cut the margin off again
        padded = F.pad(image, (0, -width % 16, 0, -height % 16), mode="replicate")
        return self.net(padded)[..., :height, :width]

    def decode(self, features: Tensor, prompts: Prompts) -> Prediction:
        """Hand the logits on."""
        return Prediction(features, {})

    def forward(self, image: Tensor, prompts: Prompts) -> Prediction:
        return self.decode(self.encode_image(image), prompts)


def build_unet(size: str = "paper", **fields) -> UNet:
    """Build the image-only U-Net."""
    config = configure(UNetConfig, UNET_SIZES, size, fields)
    if len(config.channels) != 5:
        raise ValueError(f"UNetConfig.channels is {config.channels}, but it needs 5 entries.")
    return UNet(config)


@dataclass(frozen=True)
class TextOnlyConfig:
    """A small decoder from prompt vectors to a coarse map."""

    classes: int = 1
    roles: tuple[str, ...] = ("global", "local")
    text_dim: int = 512
    null_kind: str = "learned"
    hidden: int = 256
    grid: int = 16  # side of the coarse map: a prompt can say where, not how a border runs


TEXT_ONLY_SIZES = {"paper": {}, "small": {"hidden": 128}, "tiny": {"hidden": 64, "grid": 8}}


class TextOnly(nn.Module):
    """The leakage probe: predicts the mask from the prompts and never sees the image, only its size.

    What it scores above its own score without prompts is what the prompts give away of the mask.
    """

    def __init__(self, config: TextOnlyConfig):
        super().__init__()
        self.config = config
        self.roles = config.roles
        self.switches = {"null_kind": NULL_KINDS}
        self.provenance = {"backbone": "none: the image is not read"}
        self.prompts = nn.ModuleList(NullablePrompt(role, config.text_dim) for role in config.roles)
        self.null_kind = config.null_kind
        self.net = nn.Sequential(
            nn.Linear(config.text_dim * len(config.roles), config.hidden),
            nn.ReLU(),
            nn.Linear(config.hidden, config.hidden),
            nn.ReLU(),
            nn.Linear(config.hidden, config.classes * config.grid**2),
        )

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

    def encode_image(self, image: Tensor) -> tuple[int, ...]:
        """Keep nothing of the image but its shape."""
        return tuple(image.shape)

    def decode(self, features: tuple[int, ...], prompts: Prompts) -> Prediction:
        """Draw the coarse map that the prompts describe."""
        batch, _, *size = features
        z = torch.cat([prompt(prompts, batch) for prompt in self.prompts], dim=1)  # [B, roles * D]
        side = self.config.grid
        coarse = rearrange(self.net(z), "b (k h w) -> b k h w", h=side, w=side)
        return Prediction(F.interpolate(coarse, size=size, mode="bilinear", align_corners=False), {})

    def forward(self, image: Tensor, prompts: Prompts) -> Prediction:
        return self.decode(self.encode_image(image), prompts)


def build_text_only(size: str = "paper", **fields) -> TextOnly:
    """Build the text-only probe."""
    return TextOnly(configure(TextOnlyConfig, TEXT_ONLY_SIZES, size, fields))
