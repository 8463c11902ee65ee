"""NullBUS: nullable global and local prompts steer a breast-ultrasound segmentation (arXiv 2512.20783)."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import rearrange
from timm import create_model
from timm.models.resnet import BasicBlock, downsample_conv
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import Conv2dNormActivation

from lib.models import Prediction, backbone_file, configure, load_backbone
from lib.models.blocks import ASPP, NULL_KINDS, ImageNetNorm, NullablePrompt, ResidualFiLM, rgb
from lib.text import Prompts


@dataclass(frozen=True)
class NullBUSConfig:
    """Sizes and switches of NullBUS; the defaults are the paper's where it states them."""

    classes: int = 1  # Sec. 2.1: one lesion mask
    roles: tuple[str, ...] = ("global", "local")  # Sec. 2.2: what the global and the local path read
    text_dim: int = 512  # ours: not stated; the width of CLIP's text tower
    null_kind: str = "learned"  # Eq. 1; "zero" is the ablation
    # global path, Sec. 2.3
    global_backbone: str = "clip-vit-b16"  # paper; "tiny-vit" where a small one is trained from scratch
    global_size: int = 224  # ours: not stated; CLIP's own input size
    global_patch: int = 16  # paper: ViT-B/16
    global_width: int = 768  # ViT-B
    global_depth: int = 9  # ours: not stated; CLIPSeg blends after block 9 of 12
    global_heads: int = 12  # ViT-B
    global_channels: int = 2048  # paper: GFP to 2,048 channels
    freeze_global: bool = True  # paper: CLIP is frozen; without its pretrained weights it is trained
    # local path, Sec. 2.4
    local_backbone: str = "resnet50"  # paper, any timm ResNet; "narrow" is built from local_channels
    local_channels: tuple[int, ...] = (64, 256, 512, 1024, 2048)  # ResNet-50, strides 2 to 32
    tcm_hidden: int = 512  # ours: not stated
    aspp_channels: int = 256  # ours: not stated; DeepLabV3's
    aspp_rates: tuple[int, ...] = (1, 2, 3)  # ours: not stated; DeepLabV3's 6, 12, 18 leave an 11x11 map
    # fusion and decoder, Sec. 2.5
    fusion_channels: int = 512  # ours: not stated
    decoder_channels: tuple[int, ...] = (256, 128, 64, 32)  # paper: four UpFusion stages; ours: their widths
    # path ablation, Table 4
    use_global: bool = True
    use_local: bool = True
    use_tcm: bool = True


SIZES = {
    "paper": {},
    "small": {
        "global_backbone": "tiny-vit",
        "global_size": 96,
        "global_patch": 16,
        "global_width": 128,
        "global_depth": 3,
        "global_heads": 4,
        "global_channels": 256,
        "local_backbone": "narrow",
        "local_channels": (16, 32, 64, 128, 256),
        "tcm_hidden": 128,
        "aspp_channels": 96,
        "aspp_rates": (1, 2),
        "fusion_channels": 128,
        "decoder_channels": (96, 64, 32, 16),
    },
    "tiny": {
        "global_backbone": "tiny-vit",
        "global_size": 64,
        "global_patch": 16,
        "global_width": 48,
        "global_depth": 2,
        "global_heads": 3,
        "global_channels": 64,
        "local_backbone": "narrow",
        "local_channels": (8, 16, 32, 48, 64),
        "tcm_hidden": 64,
        "aspp_channels": 32,
        "aspp_rates": (1,),
        "fusion_channels": 48,
        "decoder_channels": (32, 24, 16, 8),
    },
}


class Features(NamedTuple):
    """All of an image that does not depend on a prompt."""

    tokens: Tensor  # [B, N, W] of the global tower
    skips: tuple[Tensor, ...]  # what the UpFusion stages take from strides 8, 4, 2 (already convolved)
    stage4: Tensor  # [B, C4, H/16, W/16]
    stage5: Tensor  # [B, C5, H/32, W/32]
    size: tuple[int, int]


# ---- global path ----------------------------------------------------------------------------------------


class CLIPTower(nn.Module):
    """CLIP's ViT up to the block whose tokens are blended: image [B, 3, S, S] -> tokens [B, N, W]."""

    weights_prefix = "visual."  # where open_clip's files keep this tower

    def __init__(self, size: int, patch: int, width: int, depth: int, heads: int):
        super().__init__()
        from open_clip.transformer import QuickGELU, VisionTransformer  # seconds to import, not for small nets

        self.visual = VisionTransformer(
            size, patch, width, depth, heads, 4.0, act_layer=QuickGELU
        )  # quick GELU: what OpenAI's weights were trained with
        self.visual.prune_intermediate_layers(depth, prune_norm=True)  # nothing reads the norm and projection
        self.last = depth - 1

    def forward(self, image: Tensor) -> Tensor:
        return self.visual.forward_intermediates(image, indices=[self.last], intermediates_only=True, output_fmt="NLC")[
            "image_intermediates"
        ][0]


class TinyTower(nn.Module):
    """A small ViT in CLIP's place, trained from scratch: image [B, 3, S, S] -> [B, N, W]."""

    def __init__(self, size: int, patch: int, width: int, depth: int, heads: int):
        super().__init__()
        self.visual = VisionTransformer(
            size, patch, num_classes=0, global_pool="", embed_dim=width, depth=depth, num_heads=heads
        )

    def forward(self, image: Tensor) -> Tensor:
        return self.visual(image)[:, 1:]  # without the class token


class GlobalPath(nn.Module):
    """Blend image tokens with z_g, spatialise, and project to `channels` (GFP): F_g on the deepest map's size."""

    def __init__(self, width: int, text_dim: int, channels: int):
        super().__init__()
        self.blend = nn.Linear(text_dim, 2 * width)  # ours: FiLM as in CLIPSeg; identity at the start
        nn.init.zeros_(self.blend.weight)
        nn.init.zeros_(self.blend.bias)
        self.project = Conv2dNormActivation(width, channels, 1)

    def forward(self, tokens: Tensor, z: Tensor, size: tuple[int, int]) -> Tensor:
        gamma, beta = self.blend(z)[:, None].chunk(2, dim=-1)  # [B, 1, W]
        side = round(tokens.shape[1] ** 0.5)
        grid = rearrange((1 + gamma) * tokens + beta, "b (h w) c -> b c h w", h=side)
        return F.interpolate(self.project(grid), size=size, mode="bilinear", align_corners=False)


# ---- local path -----------------------------------------------------------------------------------------


class NarrowResNet(nn.Module):
    """A ResNet of one basic block per stage for small budgets, with the attributes of timm's ResNet."""

    def __init__(self, channels: tuple[int, ...]):
        super().__init__()
        self.feature_info = [{"num_chs": width} for width in channels]
        self.conv1 = nn.Conv2d(3, channels[0], 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels[0])
        self.act1 = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            BasicBlock(wide, out, stride, downsample_conv(wide, out, 1, stride))
            for wide, out, stride in zip(channels, channels[1:], (1, 2, 2, 2), strict=False)
        )


def local_backbone(name: str, channels: tuple[int, ...]) -> nn.Module:
    """A timm ResNet by name, or the narrow one with the given widths."""
    net = NarrowResNet(channels) if name == "narrow" else create_model(name, num_classes=0)
    found = tuple(stage["num_chs"] for stage in net.feature_info)
    if found != channels:
        raise ValueError(
            f"The local backbone '{name}' has the widths {found}, not {channels}: set local_channels={found}."
        )
    return net


def resnet_stages(net: nn.Module, image: Tensor) -> list[Tensor]:
    """The feature maps of a ResNet at strides 2, 4, 8, 16, 32."""
    maps = [net.act1(net.bn1(net.conv1(image)))]
    x = net.maxpool(maps[0])
    for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
        x = stage(x)
        maps.append(x)
    return maps


# ---- decoder --------------------------------------------------------------------------------------------


class UpFusion(nn.Module):
    """Bilinear to the skip's size, concatenate the skip, twice convolution-BN-ReLU.

    The first convolution of a concatenation is the sum of two convolutions, one per input; the skip's half
    (`take`) needs no prompt below stage 4, so it is done once per image.
    """

    def __init__(self, in_channels: int, skip_channels: int, out_channels: int):
        super().__init__()
        self.from_skip = nn.Conv2d(skip_channels, out_channels, 3, padding=1, bias=False)
        self.from_below = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)
        self.refine = Conv2dNormActivation(out_channels, out_channels, 3)

    def take(self, skip: Tensor) -> Tensor:
        return self.from_skip(skip)

    def forward(self, x: Tensor, taken: Tensor) -> Tensor:
        x = F.interpolate(x, size=taken.shape[-2:], mode="bilinear", align_corners=False)
        return self.refine(F.relu(self.norm(self.from_below(x) + taken)))


# ---- the model ------------------------------------------------------------------------------------------


class NullBUS(nn.Module):
    """Two nullable prompts, a global and a local image path, one decoder (arXiv 2512.20783, Fig. 1).

    image [B, 1 or 3, H, W] in [0, 1] -> logits [B, classes, H, W]. `tower` maps a normalised image
    [B, 3, S, S] to tokens [B, N, global_width]; `resnet` has timm's ResNet attributes.
    """

    def __init__(self, config: NullBUSConfig, tower: nn.Module, resnet: nn.Module):
        super().__init__()
        self.config = config
        self.switches = {
            "null_kind": NULL_KINDS,
            "use_global": (True, False),
            "use_local": (True, False),
            "use_tcm": (True, False),
        }
        self.roles = tuple(dict.fromkeys(config.roles))
        self.external: dict[str, str] = {}
        self.provenance = {"global_backbone": "random start, trained", "local_backbone": "random start, trained"}
        self.use_global, self.use_local, self.use_tcm = config.use_global, config.use_local, config.use_tcm

        global_role, local_role = config.roles
        self.global_prompt = NullablePrompt(global_role, config.text_dim)
        self.local_prompt = NullablePrompt(local_role, config.text_dim)
        self.null_kind = config.null_kind

        self.norm = ImageNetNorm()
        self.tower = tower
        self.global_path = GlobalPath(config.global_width, config.text_dim, config.global_channels)

        *shallow, c4, c5 = config.local_channels
        self.resnet = resnet
        self.tcm4 = ResidualFiLM(config.text_dim, c4, config.tcm_hidden, identity=True)
        self.tcm5 = ResidualFiLM(config.text_dim, c5, config.tcm_hidden, identity=True)
        self.aspp = ASPP(c5, config.aspp_rates, config.aspp_channels)

        self.fuse = nn.Sequential(
            Conv2dNormActivation(config.global_channels + config.aspp_channels, config.fusion_channels, 1),
            ASPP(config.fusion_channels, config.aspp_rates, config.aspp_channels),
        )
        below = (config.aspp_channels, *config.decoder_channels)
        self.up = nn.ModuleList(
            UpFusion(b, skip, out)
            for b, skip, out in zip(below, (c4, *reversed(shallow)), config.decoder_channels, strict=False)
        )
        last = config.decoder_channels[-1]
        self.head = nn.Sequential(Conv2dNormActivation(last, last, 3), nn.Conv2d(last, config.classes, 1))

    @property
    def null_kind(self) -> str:
        """What an absent prompt is replaced by: "learned" or "zero"; may be set at run time."""
        return self.global_prompt.kind

    @null_kind.setter
    def null_kind(self, kind: str) -> None:
        self.global_prompt.kind = self.local_prompt.kind = kind

    def train(self, mode: bool = True) -> "NullBUS":
        super().train(mode)
        if "tower" in self.external:  # frozen
            self.tower.eval()
        return self

    def adopt(self, submodule: str, backbone: str) -> None:
        """Fill the global tower with pretrained weights and freeze it as the paper does."""
        digest = load_backbone(self.tower.visual, backbone, self.tower.weights_prefix)
        self.provenance["global_backbone"] = f"pretrained {backbone} ({digest[:12]})"
        if self.config.freeze_global:
            self.tower.requires_grad_(False).eval()
            self.external[submodule] = backbone
            self.provenance["global_backbone"] += ", frozen"

    def calibrate_text(self, prompts: Prompts) -> None:
        """Set the text standardisation of both roles from the training prompts, once, before training."""
        self.global_prompt.calibrate(prompts)
        self.local_prompt.calibrate(prompts)

    def encode_image(self, image: Tensor) -> Features:
        """Compute all that a prompt cannot change."""
        image = self.norm(rgb(image)).contiguous(memory_format=torch.channels_last)  # a fifth faster on CPU
        side = self.config.global_size
        seen = F.interpolate(image, size=(side, side), mode="bilinear", align_corners=False, antialias=True)
        with torch.set_grad_enabled(torch.is_grad_enabled() and "tower" not in self.external):
            tokens = self.tower(seen)
        # stage 5 reads the unmodulated stage 4 (ours: the equation names F_k only): text enters in decode alone
        *shallow, stage4, stage5 = resnet_stages(self.resnet, image)
        skips = tuple(up.take(skip) for up, skip in zip(self.up[1:], reversed(shallow), strict=True))
        return Features(tokens, skips, stage4, stage5, tuple(image.shape[-2:]))

    def decode(self, features: Features, prompts: Prompts) -> Prediction:
        """Segment an encoded image under the given prompts; a few milliseconds against `encode_image`."""
        tokens, skips, stage4, stage5, size = features
        z_g = self.global_prompt(prompts, len(stage5))  # [B, D]
        z_l = self.local_prompt(prompts, len(stage5))

        f_g = self.global_path(tokens, z_g, stage5.shape[-2:])  # [B, 2048, H/32, W/32]
        if self.use_tcm:
            stage4, stage5 = self.tcm4(stage4, z_l), self.tcm5(stage5, z_l)
        f_l = self.aspp(stage5)  # [B, 256, H/32, W/32]
        skips = (self.up[0].take(stage4), *skips)
        if not self.use_global:
            f_g = torch.zeros_like(f_g)
        if not self.use_local:  # no local evidence at all, neither through the bottleneck nor past it
            f_l, skips = torch.zeros_like(f_l), tuple(map(torch.zeros_like, skips))

        x = self.fuse(torch.cat([f_g, f_l], dim=1))
        for up, skip in zip(self.up, skips, strict=True):
            x = up(x, skip)  # strides 16, 8, 4, 2
        logits = F.interpolate(self.head(x), size=size, mode="bilinear", align_corners=False)
        return Prediction(logits, {})

    def forward(self, image: Tensor, prompts: Prompts) -> Prediction:
        return self.decode(self.encode_image(image), prompts)


def build(size: str = "paper", pretrained: bool | None = None, **fields) -> NullBUS:
    """Build NullBUS; `pretrained` backbones are True required, False never, None taken where offered."""
    config = configure(NullBUSConfig, SIZES, size, fields)
    for field, count in (("roles", 2), ("local_channels", 5), ("decoder_channels", 4)):
        if len(getattr(config, field)) != count:
            raise ValueError(f"NullBUSConfig.{field} is {getattr(config, field)}, but it needs {count} entries.")
    towers = {"clip-vit-b16": CLIPTower, "tiny-vit": TinyTower}
    if config.global_backbone not in towers:
        raise ValueError(f"There is no global backbone '{config.global_backbone}': use one of {', '.join(towers)}.")
    tower = towers[config.global_backbone](
        config.global_size,
        config.global_patch,
        config.global_width,
        config.global_depth,
        config.global_heads,
    )
    model = NullBUS(config, tower, local_backbone(config.local_backbone, config.local_channels))
    if wanted(config.global_backbone, pretrained):
        model.adopt("tower", config.global_backbone)
    if wanted(config.local_backbone, pretrained):
        digest = load_backbone(model.resnet, config.local_backbone)
        model.provenance["local_backbone"] = f"pretrained {config.local_backbone} ({digest[:12]})"
    return model.to(
        memory_format=torch.channels_last
    )  # as the images: a prompt change takes 140 ms, not 226, on 2 CPUs


def wanted(backbone: str, pretrained: bool | None) -> bool:
    """Whether a backbone is to be filled with pretrained weights; the small ones have none."""
    if backbone in ("tiny-vit", "narrow"):
        return False
    return backbone_file(backbone) is not None if pretrained is None else pretrained
