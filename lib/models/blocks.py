"""Blocks that two or more of the papers' models share."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.segmentation import deeplabv3

from lib.text import Prompts

NULL_KINDS = ("learned", "zero")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def rgb(image: Tensor) -> Tensor:
    """Repeat a grey image to three channels; raises ValueError unless it is [B, 1 or 3, H, W]."""
    if image.ndim != 4 or image.shape[1] not in (1, 3):
        raise ValueError(
            f"The image has the shape {tuple(image.shape)}, but this model takes [batch, 1 or 3, height, width]: "
            "load it with channels=1 or channels=3."
        )
    return image.expand(-1, 3, -1, -1)


class ImageNetNorm(nn.Module):
    """Map [0, 1] RGB to the mean and spread that ImageNet (and CLIPSeg's) encoders expect."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        return (image - self.mean) / self.std


class NullablePrompt(nn.Module):
    """One role's prompt vector, or a null where it is absent: z = m * T + (1 - m) * n (NullBUS, Eq. 1).

    Text is standardised per dimension with statistics of the training prompts (`calibrate`; identity before),
    then both text and learned null are L2-normalised and scaled by sqrt(dim), so that what reads them sees
    unit-variance input whichever it is (ours: the paper states no normalisation). `kind` may be switched at
    run time: "learned" feeds the trained null, "zero" exact zeros (the ablation). Without `normalise` text is fed as
    it is, as papers do whose embeddings are normalised by their encoder.
    """

    def __init__(self, role: str, dim: int, kind: str = "learned", normalise: bool = True):
        super().__init__()
        self.role, self.dim, self.kind, self.normalise = role, dim, kind, normalise
        self.null = nn.Parameter(0.02 * torch.randn(dim))  # ours: N(0, .02), not stated
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("std", torch.ones(dim))

    @property
    def kind(self) -> str:
        """What stands for an absent prompt: one of NULL_KINDS; raises ValueError when set to another."""
        return self._kind

    @kind.setter
    def kind(self, kind: str) -> None:
        if kind not in NULL_KINDS:
            raise ValueError(f"There is no null_kind {kind!r}: use one of {', '.join(NULL_KINDS)}.")
        self._kind = kind

    def calibrate(self, prompts: Prompts) -> None:
        """Set mean and spread from the present prompts; text that never varies is left as it is."""
        if self.role not in prompts.present:
            return
        text = prompts.pooled[self.role][prompts.present[self.role]].float()
        if len(text) < 2 or (spread := text.std(0, correction=0)).square().mean().sqrt() < 1e-5:
            return
        self.mean.copy_(text.mean(0))
        self.std.copy_(spread.clamp_min(0.1 * spread.square().mean().sqrt()))  # a dead dimension stays quiet

    def text(self, pooled: Tensor) -> Tensor:
        """Normalise pooled embeddings [B, D] as the model sees them."""
        if not self.normalise:
            return pooled
        return F.normalize((pooled - self.mean) / self.std, dim=-1) * self.dim**0.5

    def absent(self) -> Tensor:
        """The vector [D] that stands for an absent prompt."""
        if self.kind == "zero":
            return torch.zeros_like(self.null)
        return F.normalize(self.null, dim=0) * self.dim**0.5

    def forward(self, prompts: Prompts, batch: int) -> Tensor:
        absent = self.absent().expand(batch, -1)
        if self.role not in prompts.present:
            return absent
        pooled, present = prompts.pooled[self.role], prompts.present[self.role]
        if pooled.shape != (batch, self.dim):
            raise ValueError(
                f"The '{self.role}' prompts have the shape {tuple(pooled.shape)}, but {batch} images and "
                f"text_dim={self.dim} need {(batch, self.dim)}: embed one prompt per image with that encoder."
            )
        # where, not arithmetic: no text row leaks and no null gradient flows through the wrong side
        return torch.where(present[:, None], self.text(pooled), absent)


class ResidualFiLM(nn.Module):
    """Scale and shift a feature map by a text vector: y = gamma * x + beta + x (XBusNet's SFA).

    text [B, D] and x [B, C, *S] give y [B, C, *S]. `identity` zero-initialises the last layer, so that
    training starts from y = x; `hidden` defaults to XBusNet's max(256, C).
    """

    def __init__(self, text_dim: int, channels: int, hidden: int | None = None, identity: bool = False):
        super().__init__()
        hidden = hidden or max(256, channels)
        self.proj = nn.Sequential(nn.Linear(text_dim, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, 2 * channels))
        if identity:
            nn.init.zeros_(self.proj[2].weight)
            nn.init.zeros_(self.proj[2].bias)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        gamma, beta = self.proj(text).unflatten(1, (2, -1) + (1,) * (x.ndim - 2)).unbind(1)  # [B, C, 1, ...]
        return (1 + gamma) * x + beta


class ConvPair(nn.Module):
    """Twice convolution 3x3 with bias, batch norm, ReLU."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class UpConv(nn.Module):
    """Transposed convolution to twice the size and half the channels, [skip, up], then a conv pair (XBusNet)."""

    def __init__(self, in_channels: int, skip_channels: int):
        super().__init__()
        out_channels = in_channels // 2
        self.up = nn.ConvTranspose2d(in_channels, out_channels, 2, stride=2)
        self.conv_block = ConvPair(skip_channels + out_channels, out_channels)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.conv_block(torch.cat([skip, self.up(x)], dim=1))


class GroupNormResidual(nn.Module):
    """Twice GroupNorm(8), SiLU, convolution 3x3, plus the input (XBusNet's fusion block)."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(8, in_channels), nn.SiLU(), nn.Conv2d(in_channels, out_channels, 3, padding=1)
        )
        self.out_layers = nn.Sequential(
            nn.GroupNorm(8, out_channels), nn.SiLU(), nn.Conv2d(out_channels, out_channels, 3, padding=1)
        )
        same = in_channels == out_channels
        self.skip = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x) + self.out_layers(self.in_layers(x))


class ASPP(deeplabv3.ASPP):
    """DeepLabV3's atrous spatial pyramid with two changes that let small budgets and a batch of one train.

    The pooling branch has no batch norm (one pixel per image has no spread in a batch of one), and there is
    no dropout (a resumed run then needs no random state of the model).
    """

    def __init__(self, in_channels: int, rates: tuple[int, ...], out_channels: int):
        super().__init__(in_channels, rates, out_channels)
        self.convs[-1][2] = nn.Identity()
        self.project[3] = nn.Identity()
