"""Two towers that meet: an image and the sentence about it are pulled together, all others pushed apart.

The image tower is a timm vision transformer whatever its weights: the book's own small one, BiomedCLIP's and CLIP's
(open_clip's layout), or a Hugging Face CLIP, whose tensors are renamed. So everything that opens a tower, such as
lib.models.saliency, is written once. Text arrives as frozen embeddings (lib.text).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer import checkpoint_filter_fn as timm_names
from torch import Tensor, nn
from torch.nn import functional as F

from lib.losses.contrastive import cosine_similarity, gather, retrieved
from lib.models import Prediction, configure
from lib.models.blocks import NullablePrompt, rgb
from lib.text import Prompts, pretrained_state

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
POOLS = ("map", "token", "avg")
TOWERS = ("book", "biomedclip", "clip-vit-b16")


class Tower(nn.Module):
    """An image tower opened at its blocks: image -> tokens -> (block, block, ...) -> feature.

    trunk: a timm VisionTransformer without a classifier; project: its pooled output -> feature.
    """

    def __init__(self, trunk: VisionTransformer, project: nn.Module, mean=CLIP_MEAN, std=CLIP_STD):
        super().__init__()
        self.trunk, self.project = trunk, project
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.trunk.blocks)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.trunk.patch_embed.grid_size

    @property
    def prefix(self) -> int:
        """Tokens that come before the patches and are none: the class token, where there is one."""
        return self.trunk.num_prefix_tokens

    def prepare(self, image: Tensor) -> Tensor:
        """Bring images [B, 1 or 3, H, W] in [0, 1] to the tower's size, channels and scale."""
        size = self.trunk.patch_embed.img_size
        image = F.interpolate(rgb(image), size, mode="bilinear", align_corners=False, antialias=True)
        return (image - self.mean) / self.std

    def tokens(self, image: Tensor) -> Tensor:
        """Embed prepared images as what the first block reads: [B, T, D]."""
        return self.trunk.norm_pre(self.trunk._pos_embed(self.trunk.patch_embed(image)))

    def run(self, tokens: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Let blocks start to stop - 1 work on tokens [B, T, D]."""
        for block in self.trunk.blocks[start:stop]:
            tokens = block(tokens)
        return tokens

    def feature(self, tokens: Tensor) -> Tensor:
        """Pool the last block's output to features [B, E]."""
        return self.project(self.trunk.forward_head(self.trunk.norm(tokens)))

    def forward(self, image: Tensor) -> Tensor:
        return self.feature(self.run(self.tokens(self.prepare(image))))

    @classmethod
    def from_open_clip(cls, state: Mapping[str, Tensor], heads: int, quick_gelu: bool = False) -> "Tower":
        """Build the tower that an open_clip state holds, be it timm's layout (BiomedCLIP) or CLIP's own."""
        visual = {name.removeprefix("visual."): t for name, t in state.items() if name.startswith("visual.")}
        if "trunk.pos_embed" in visual:
            trunk = {name.removeprefix("trunk."): t for name, t in visual.items() if name.startswith("trunk.")}
            return _filled(trunk, visual["head.proj.weight"], heads, clip=False)
        if "class_embedding" not in visual:
            raise ValueError(
                "These weights hold no vision transformer below 'visual.': give an open_clip model of ViT kind."
            )
        return _filled_clip(visual, heads, "quick_gelu" if quick_gelu else "gelu")

    @classmethod
    def from_hf(cls, state: Mapping[str, Tensor], heads: int, activation: str = "gelu", eps: float = 1e-5) -> "Tower":
        """Build the tower that a Hugging Face CLIPVisionModelWithProjection's state holds."""
        return _filled_clip(_open_clip_names(state), heads, activation, eps)


def _open_clip_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a Hugging Face CLIP vision state to open_clip's names; q, k and v become one matrix."""
    if "visual_projection.weight" not in state:
        raise ValueError("These weights lack 'visual_projection.weight': give a CLIPVisionModelWithProjection.")
    renamed = {"proj": state["visual_projection.weight"].T}
    found = {name.removeprefix("vision_model."): tensor for name, tensor in state.items()}
    for theirs, ours in (
        ("embeddings.class_embedding", "class_embedding"),
        ("embeddings.patch_embedding.weight", "conv1.weight"),
        ("embeddings.position_embedding.weight", "positional_embedding"),
        *((f"pre_layrnorm.{part}", f"ln_pre.{part}") for part in ("weight", "bias")),
        *((f"post_layernorm.{part}", f"ln_post.{part}") for part in ("weight", "bias")),
    ):
        renamed[ours] = found[theirs]
    depth = 1 + max(int(match[1]) for name in found if (match := re.match(r"encoder\.layers\.(\d+)\.", name)))
    parts = (("layer_norm1", "ln_1"), ("layer_norm2", "ln_2"), ("mlp.fc1", "mlp.c_fc"), ("mlp.fc2", "mlp.c_proj"))
    for layer in range(depth):
        source, target = f"encoder.layers.{layer}", f"transformer.resblocks.{layer}"
        for kind in ("weight", "bias"):
            for theirs, ours in (*parts, ("self_attn.out_proj", "attn.out_proj")):
                renamed[f"{target}.{ours}.{kind}"] = found[f"{source}.{theirs}.{kind}"]
            qkv = [found[f"{source}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            renamed[f"{target}.attn.in_proj_{kind}"] = torch.cat(qkv)
    return renamed


def _filled_clip(visual: Mapping[str, Tensor], heads: int, activation: str, eps: float = 1e-5) -> Tower:
    # timm renames CLIP's tensors itself; the projection stays outside the trunk.
    layout = {f"visual.{name}": tensor for name, tensor in visual.items() if name != "proj"}
    width, patch = visual["conv1.weight"].shape[0], visual["conv1.weight"].shape[-1]
    side = int((len(visual["positional_embedding"]) - 1) ** 0.5) * patch
    blank = VisionTransformer(side, patch, num_classes=0, embed_dim=width, depth=0, num_heads=heads, pre_norm=True)
    names = timm_names(layout, blank)
    names = {name: tensor for name, tensor in names.items() if not name.startswith("head.")}
    return _filled(names, visual["proj"].T, heads, clip=True, activation=activation, eps=eps)


def _filled(
    trunk: Mapping[str, Tensor],
    projection: Tensor,
    heads: int,
    *,
    clip: bool,
    activation: str = "gelu",
    eps: float | None = None,
) -> Tower:
    """A tower of the sizes that the tensors have."""
    width, patch = trunk["patch_embed.proj.weight"].shape[0], trunk["patch_embed.proj.weight"].shape[-1]
    vit = VisionTransformer(
        img_size=int((trunk["pos_embed"].shape[1] - 1) ** 0.5) * patch,
        patch_size=patch,
        num_classes=0,
        embed_dim=width,
        depth=1 + max(int(name.split(".")[1]) for name in trunk if name.startswith("blocks.")),
        num_heads=heads,
        mlp_ratio=trunk["blocks.0.mlp.fc1.weight"].shape[0] / width,
        pre_norm=clip,
        act_layer=activation,
        norm_layer=partial(nn.LayerNorm, eps=eps or (1e-5 if clip else 1e-6)),
    )
    tower = Tower(vit, nn.Linear(projection.shape[1], projection.shape[0], bias=False)).to(projection.dtype)
    vit.load_state_dict({name: tensor.view_as(vit.state_dict()[name]) for name, tensor in trunk.items()})
    tower.project.load_state_dict({"weight": projection.contiguous()})
    return tower.eval()


# ---- the pair ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClipConfig:
    """A book CLIP by default; `tower` names a pretrained one, whose text side is that encoder's own.

    The sizes are the smallest with which the probes of the book's authors found retrieval and saliency to work.
    """

    roles: tuple[str, ...] = ("global",)  # what a sentence may come as; the first one present is read
    text_dim: int = 512
    tower: str = "book"  # or "biomedclip", "clip-vit-b16"
    side: int = 224  # BiomedCLIP's image side, in pixels
    patch: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    pool: str = "token"  # BiomedCLIP: the class token; "map" (attention pooling) decided whether small towers learn
    dim: int = 512
    text_hidden: int = 640
    pretrained: bool = True  # False where the tower's weights come from the file that is being loaded


CLIP_SIZES = {
    "paper": {"tower": "biomedclip"},
    "small": {
        "side": 96,
        "patch": 8,
        "width": 128,
        "depth": 4,
        "heads": 4,
        "pool": "map",
        "dim": 128,
        "text_hidden": 256,
    },
    "tiny": {
        "side": 64,
        "patch": 8,
        "width": 64,
        "depth": 3,
        "heads": 4,
        "pool": "map",
        "dim": 128,
        "text_hidden": 256,
        "mlp_ratio": 2.0,
    },
}


def book_tower(config: ClipConfig) -> Tower:
    """Build an image tower of the config's sizes with fixed sine positions to start from."""
    trunk = VisionTransformer(
        img_size=config.side,
        patch_size=config.patch,
        num_classes=0,
        global_pool=config.pool,
        class_token=config.pool == "token",
        embed_dim=config.width,
        depth=config.depth,
        num_heads=config.heads,
        mlp_ratio=config.mlp_ratio,
        pre_norm=config.tower == "clip-vit-b16",
        act_layer="quick_gelu" if config.tower == "clip-vit-b16" else "gelu",
        norm_layer=partial(nn.LayerNorm, eps=1e-5 if config.tower == "clip-vit-b16" else 1e-6),
    )
    project = nn.Linear(config.width, config.dim, bias=False)
    if config.tower != "book":
        return Tower(trunk, project)
    place = timm.layers.build_sincos2d_pos_embed(trunk.patch_embed.grid_size, config.width)
    with torch.no_grad():  # random positions stalled in the probes
        trunk.pos_embed[0, trunk.num_prefix_tokens :].copy_(place)
    return Tower(trunk, project, (0.5,) * 3, (0.25,) * 3)


def pretrained_tower(config: ClipConfig) -> Tower:
    """Open a pretrained tower by name; raises ValueError where its folder holds another size than the config."""
    state = pretrained_state(config.tower)
    tower = Tower.from_open_clip(state, config.heads, quick_gelu=config.tower == "clip-vit-b16")
    found, wanted = (
        {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
        for module in (tower, book_tower(config))
    )
    for name in found | wanted:
        if found.get(name) != wanted.get(name):
            raise ValueError(
                f"The folder of '{config.tower}' holds {name} of the shape {found.get(name)} where the config asks for "
                f"{wanted.get(name)}: set side, patch, width, depth, mlp_ratio, pool and dim to its sizes."
            )
    return tower


class Clip(nn.Module):
    """Images [B, 1 or 3, H, W] and sentences -> cosine similarities [B, B], row i image i, column j sentence j.

    What is trained: the image tower and a projection of the frozen text embeddings (MedCLIP-SAMv2 trains both towers).
    """

    def __init__(self, config: ClipConfig, tower: Tower):
        super().__init__()
        self.config, self.roles = config, config.roles
        self.switches: dict[str, tuple] = {}
        self.tower = tower
        self.prompts = nn.ModuleList(NullablePrompt(role, config.text_dim) for role in config.roles)
        for prompt in self.prompts:
            prompt.null.requires_grad_(False)  # what is absent is compared with nothing
        self.text = nn.Identity()  # a pretrained pair meets without a further projection
        if config.tower == "book":
            self.text = nn.Sequential(
                nn.Linear(config.text_dim, config.text_hidden), nn.GELU(), nn.Linear(config.text_hidden, config.dim)
            )
        self.provenance = {"backbone": "trained from scratch"}
        self.external: dict[str, str] = {}  # the tower is trained further, so that it is stored whole

    def calibrate_text(self, prompts: Prompts) -> None:
        """Set the text standardisation of every role from the training prompts, once, before training."""
        for prompt in self.prompts:
            prompt.calibrate(prompts)

    def encode_image(self, image: Tensor) -> Tensor:
        """Features [B, E] of images, not normalised."""
        return self.tower(image)

    def encode_text(self, prompts: Prompts) -> tuple[Tensor, Tensor]:
        """Features [B, E] of the first present role of each case, and which cases [B] have one."""
        pooled = present = None
        for prompt in self.prompts:
            if prompt.role not in prompts.present:
                continue
            here, given = prompts.present[prompt.role], prompts.pooled[prompt.role]
            vector = prompt.text(given) if self.config.tower == "book" else given
            pooled = vector if pooled is None else torch.where(present[:, None], pooled, vector)
            present = here if present is None else present | here
        if pooled is None:
            raise ValueError(f"These prompts have none of the roles {', '.join(self.roles)}: feed one of them.")
        return self.text(pooled), present

    def average_text(self, batch: int) -> Tensor:
        """Features [B, E] of no sentence in particular: the mean of the training sentences in the first role."""
        prompt = self.prompts[0]
        average = torch.zeros_like(prompt.mean) if self.config.tower == "book" else prompt.mean
        return self.text(average[None]).expand(batch, -1)

    def decode(self, features: Tensor, prompts: Prompts) -> Prediction:
        """Compare image features with sentences; over several processes, with the sentences of all of them."""
        text, present = self.encode_text(prompts)
        if self.training and not present.all():
            raise ValueError(
                f"{int((~present).sum())} of {len(present)} training cases have no sentence in the roles "
                f"{', '.join(self.roles)}: train on cases with text only."
            )
        similarity = cosine_similarity(gather(features), gather(text))
        return Prediction(similarity, {"image": features, "text": text})

    def forward(self, image: Tensor, prompts: Prompts) -> Prediction:
        return self.decode(self.encode_image(image), prompts)

    def score(self, prediction: Prediction, _batch: object) -> Tensor:
        """Share [B] of the two directions in which a case's partner is nearest among the batch."""
        return retrieved(prediction.logits, prediction.aux["text"], 1).float().mean(0)


def build_clip(size: str = "paper", **fields) -> Clip:
    """Build the pair; raises ValueError for a pool or tower that is not there, FileNotFoundError without weights."""
    config = configure(ClipConfig, CLIP_SIZES, size, fields)
    for name, known in (("pool", POOLS), ("tower", TOWERS)):
        if getattr(config, name) not in known:
            raise ValueError(f"There is no {name} {getattr(config, name)!r}: use one of {', '.join(known)}.")
    named = config.tower != "book" and config.pretrained
    model = Clip(config, pretrained_tower(config) if named else book_tower(config))
    if named:
        model.provenance = {"backbone": config.tower}
    return model
