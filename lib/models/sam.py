"""SAM: an image is encoded once, then any number of boxes and points are each answered by a mask (arXiv 2304.02643).

Built from the modules of facebookresearch/segment-anything 1.0, whose tensor names it keeps. The sizes "small" and
"tiny" are the book's own and learn from masks within minutes.
"""

import os
import pickle
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import safetensors
import torch
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, TwoWayTransformer
from segment_anything.modeling.common import LayerNorm2d
from segment_anything.utils.transforms import ResizeLongestSide
from timm import create_model
from torch import Tensor, nn
from torch.nn import functional as F

from lib.files import sha256_file
from lib.models import WEIGHTS, Prediction, configure, load
from lib.models.blocks import ImageNetNorm, rgb

EMPTY = -30.0  # the logit of a mask that nothing asked for


@dataclass(frozen=True)
class SamConfig:
    """Sizes and switches of SAM; the defaults are ViT-H's, which MedCLIP-SAMv2 uses."""

    # image encoder
    encoder: str = "vit"  # "tinyvit": MobileSAM's, which has its own widths
    input: str = "sam"  # longest side resized in 8 bits, rest padded; "medsam": stretched to a square, min-max
    image_size: int = 1024
    patch: int = 16
    width: int = 1280
    depth: int = 32
    heads: int = 16
    mlp_ratio: float = 4.0
    window: int = 14  # side of a window of tokens; 0: every block is global
    global_blocks: tuple[int, ...] = (7, 15, 23, 31)  # these see the whole image, the others one window
    # prompt encoder and mask decoder
    decoder_width: int = 256
    decoder_depth: int = 2
    decoder_heads: int = 8
    decoder_mlp: int = 2048
    mask_channels: int = 16  # through which a mask input becomes a dense prompt
    multimask: int = 3  # masks for ambiguous prompts, not used here; 0: neither them nor a quality head
    rasterise: bool = False  # ours: prompts are also drawn into the mask input, without which a small SAM hardly learns
    # what `draw` makes of a true mask, and what is read of what is given
    kind: str = "any"  # per case "box", "points", "both", or any of the three by chance
    points: int = 10  # at most, inside the mask; MedCLIP-SAMv2's number
    negatives: int = 0  # at most, outside it
    jitter: float = 0.2  # each edge of a box moves by up to this share of its side (ours)
    prompt: str = "given"  # "box" or "points": read nothing else


CHOICES = {
    "encoder": ("vit", "tinyvit"),
    "input": ("sam", "medsam"),
    "kind": ("box", "points", "both", "any"),
    "prompt": ("given", "box", "points"),
}
VIT_B = {"width": 768, "depth": 12, "heads": 12, "global_blocks": (2, 5, 8, 11)}
BOOK = {
    "patch": 8,
    "width": 64,
    "depth": 2,
    "heads": 4,
    "window": 0,
    "global_blocks": (),
    "decoder_width": 32,
    "decoder_heads": 4,
    "decoder_mlp": 256,
    "multimask": 0,
    "rasterise": True,
}
SIZES = {
    "vit_h": {},
    "vit_l": {"width": 1024, "depth": 24, "global_blocks": (5, 11, 17, 23)},
    "vit_b": VIT_B,
    "medsam": {**VIT_B, "input": "medsam"},
    "mobile": {"encoder": "tinyvit"},
    "small": {**BOOK, "image_size": 128},
    "tiny": {**BOOK, "image_size": 64},
}


# ---- prompts ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SamPrompts:
    """N geometric prompts for each of B images, in pixels (x, y) of the images that are given with them.

    present: [B] bool, whether anything was found; boxes: [B, N, 4] as x0, y0, x1, y1, the last two exclusive, NaN for
    no box; points: [B, N, P, 2] with labels: [B, N, P] int64, 1 inside, 0 outside, -1 padding. Raises ValueError for
    other shapes.
    """

    present: Tensor
    boxes: Tensor | None = None
    points: Tensor | None = None
    labels: Tensor | None = None

    def __post_init__(self):
        shapes = {name: tuple(t.shape) for name, t in vars(self).items() if t is not None}
        rows = (len(self.present), *shapes.get("boxes", shapes.get("labels", ()))[1:2])
        places = shapes.get("labels", ())[2:3]
        wanted = {"present": rows[:1], "boxes": (*rows, 4), "points": (*rows, *places, 2), "labels": (*rows, *places)}
        if len(rows) < 2 or len(places) != ("points" in shapes) or any(shapes[name] != wanted[name] for name in shapes):
            raise ValueError(
                f"SamPrompts got the shapes {shapes}: give present [B] and either boxes [B, N, 4], or points "
                "[B, N, P, 2] with labels [B, N, P], or both."
            )

    def __len__(self) -> int:
        return len(self.present)

    def _map(self, function) -> "SamPrompts":
        return SamPrompts(**{name: function(t) for name, t in vars(self).items() if t is not None})

    def to(self, device: torch.device | str) -> "SamPrompts":
        """Move every tensor to a device."""
        return self._map(lambda t: t.to(device))

    def __getitem__(self, index: Tensor | slice | list[int]) -> "SamPrompts":
        return self._map(lambda t: t[index])

    def read(self, what: str = "given") -> tuple[Tensor, Tensor, Tensor]:
        """Boxes, points and labels, filled up where there are none; `what` "box" or "points" leaves the other out."""
        if (what == "box" and self.boxes is None) or (what == "points" and self.points is None):
            raise ValueError(
                f"SAM is to read only prompts of the kind '{what}', but none are given: set prompt='given'."
            )
        boxes, points, labels = self.boxes, self.points, self.labels
        if points is None or what == "box":
            points = boxes.new_zeros(*boxes.shape[:2], 1, 2)
            labels = torch.full(points.shape[:3], -1, device=points.device)
        if boxes is None or what == "points":
            boxes = points.new_full((*points.shape[:2], 4), torch.nan)
        return boxes, points, labels


def rasterise(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Draw boxes [..., 4] as the share of each pixel that they cover [..., H, W]; `> 0.5` fills them."""

    def covered(start: Tensor, stop: Tensor, length: int) -> Tensor:
        left = torch.arange(length, device=boxes.device, dtype=boxes.dtype)
        return (stop[..., None].minimum(left + 1) - start[..., None].maximum(left)).clamp(0, 1)

    x0, y0, x1, y1 = boxes.unbind(-1)
    return covered(y0, y1, size[0])[..., :, None] * covered(x0, x1, size[1])[..., None, :]


def bounding_boxes(mask: Tensor) -> Tensor:
    """Box each whole mask [B, H, W] bool as MedCLIP-SAMv2 does: [B, 4] as xmin, ymin, xmax + 1, ymax + 1.

    The last two are at most W - 1 and H - 1; an empty mask gives NaN. Source: prompt_sam.py, scoremap2bbox.
    """
    (height, width), rows, columns = mask.shape[1:], mask.any(2).byte(), mask.any(1).byte()
    x0, y0 = columns.argmax(1), rows.argmax(1)  # the first of equals
    x1 = (width - columns.flip(1).argmax(1)).clamp(max=width - 1)
    y1 = (height - rows.flip(1).argmax(1)).clamp(max=height - 1)
    boxes = torch.stack([x0, y0, x1, y1], dim=1).float()
    return boxes.masked_fill(~mask.flatten(1).any(1, keepdim=True), torch.nan)


def jitter(boxes: Tensor, share: float, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Move every edge of boxes [..., 4] by up to a share of its side, within an image of `size` (H, W)."""
    if not 0 <= share < 0.5:
        raise ValueError(f"The jitter is {share}, but edges that move by half a side can meet: choose from 0 to 0.5.")
    side = boxes[..., 2:] - boxes[..., :2]
    steps = 2 * torch.rand(boxes.shape, generator=generator) - 1
    return _clipped(boxes + share * steps * torch.cat([side, side], dim=-1), size)


def scatter_points(mask: Tensor, inside: int, outside: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw different pixels inside and outside each mask [B, H, W] bool: points [B, P, 2] and labels [B, P].

    Where a region has too few pixels, the label is -1.
    """
    chance, drawn = torch.rand(mask.flatten(1).shape, generator=generator), []
    for region, count, label in ((mask, inside, 1), (~mask, outside, 0)):
        value, index = chance.where(region.flatten(1), -1).topk(count)
        drawn.append((index, torch.where(value >= 0, label, -1)))
    index, labels = (torch.cat(parts, dim=1) for parts in zip(*drawn, strict=True))
    return torch.stack([index % mask.shape[2], index // mask.shape[2]], dim=-1).float(), labels


def _clipped(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    height, width = size
    return boxes.clamp_min(0).minimum(boxes.new_tensor([width, height, width, height]))


# ---- images ----------------------------------------------------------------------------------------------


class SamFeatures(NamedTuple):
    """An encoded batch of images."""

    embedding: Tensor  # [B, C, side / patch, side / patch]
    size: tuple[int, int]  # of the image as given
    inner: tuple[int, int]  # of the image within the square that the encoder sees


def resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize [B, C, H, W] in [0, 1] as Pillow resizes 8 bits: antialiased, rows then columns, each rounded half up."""
    if image.shape[2:] == size:
        return image
    levels = (255 * image).round()
    for step in ((image.shape[2], size[1]), size):
        levels = F.interpolate(levels, step, mode="bilinear", align_corners=False, antialias=True).add(0.5).floor()
    return levels / 255


def to_square(places: Tensor, features: SamFeatures) -> Tensor:
    """Carry places (x, y, x, y, ...) in the given image [..., 2 or 4] over to the square."""
    (height, width), (inner_height, inner_width) = features.size, features.inner
    factor = places.new_tensor([inner_width / width, inner_height / height])
    return places * factor.repeat(places.shape[-1] // 2)


def from_square(low: Tensor, side: int, features: SamFeatures) -> Tensor:
    """Enlarge maps [B, N, h, w] to the square, cut its padding off and return to the given image [B, N, H, W]."""
    square = F.interpolate(low, (side, side), mode="bilinear", align_corners=False)
    inner = square[..., : features.inner[0], : features.inner[1]]
    return F.interpolate(inner, features.size, mode="bilinear", align_corners=False)


def vit(config: SamConfig) -> ImageEncoderViT:
    """SAM's image encoder: windowed attention with a few global blocks, [B, 3, S, S] -> [B, C, h, w]."""
    return ImageEncoderViT(
        img_size=config.image_size,
        patch_size=config.patch,
        embed_dim=config.width,
        depth=config.depth,
        num_heads=config.heads,
        mlp_ratio=config.mlp_ratio,
        out_chans=config.decoder_width,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=config.window,
        global_attn_indexes=config.global_blocks,
    )


class TinyViT(nn.Module):
    """MobileSAM's image encoder: timm's TinyViT-5M without its last halving, and SAM's neck (arXiv 2306.14289)."""

    def __init__(self, config: SamConfig):
        super().__init__()
        net = create_model("tiny_vit_5m_224", drop_path_rate=0.0)
        net.stages[3].downsample.conv2.conv.stride = (1, 1)
        self.patch_embed, self.stages = net.patch_embed, net.stages
        width = config.decoder_width
        self.neck = nn.Sequential(
            nn.Conv2d(net.num_features, width, 1, bias=False),
            LayerNorm2d(width),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            LayerNorm2d(width),
        )

    def forward(self, image: Tensor) -> Tensor:
        return self.neck(self.stages(self.patch_embed(image)))


# ---- the model -------------------------------------------------------------------------------------------


class Sam(nn.Module):
    """Image [B, 1 or 3, H, W] in [0, 1] and one geometric prompt each -> logits [B, 1, H, W] and `aux["quality"]`."""

    roles: tuple[str, ...] = ()  # no text is read
    switches = {"prompt": CHOICES["prompt"], "kind": CHOICES["kind"], "jitter": (0.0, 0.1, 0.2)}

    def __init__(self, config: SamConfig, image_encoder: nn.Module, prompts: PromptEncoder, decoder: MaskDecoder):
        super().__init__()
        self.config = config
        self.prompt, self.kind, self.jitter = config.prompt, config.kind, config.jitter
        self.provenance = {"backbone": "trained from scratch"}
        self.norm = ImageNetNorm()
        self.image_encoder, self.prompt_encoder, self.mask_decoder = image_encoder, prompts, decoder
        # What a loss on the single mask's logits never reaches stays as it came; quality unlearned is not given.
        prompts.mask_downscaling.requires_grad_(config.rasterise)
        prompts.no_mask_embed.requires_grad_(not config.rasterise)
        decoder.output_hypernetworks_mlps[1:].requires_grad_(False)
        decoder.iou_prediction_head.requires_grad_(False)
        if not config.multimask:
            decoder.iou_prediction_head = nn.Identity()

    def prepare(self, image: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Bring images [B, 1 or 3, H, W] in [0, 1] to the encoder's square [B, 3, S, S]; also the part they fill."""
        side = self.config.image_size
        image = rgb(image)
        if self.config.input == "medsam":
            low, high = image.amin((1, 2, 3), keepdim=True), image.amax((1, 2, 3), keepdim=True)
            image = (image - low) / (high - low).clamp_min(1e-8)
            square = F.interpolate(image, (side, side), mode="bicubic", align_corners=False, antialias=True)
            return square.clamp(0, 1), (side, side)
        inner = ResizeLongestSide.get_preprocess_shape(*image.shape[2:], side)
        image = self.norm(resize(image, inner))
        return F.pad(image, (0, side - inner[1], 0, side - inner[0])), inner

    def encode_image(self, image: Tensor) -> SamFeatures:
        """Encode images of any size, which no prompt changes."""
        square, inner = self.prepare(image)
        return SamFeatures(self.image_encoder(square), tuple(image.shape[2:]), inner)

    def predict_masks(
        self, embedding: Tensor, points: tuple[Tensor, Tensor] | None = None, boxes: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Answer R prompts, each on its own embedding [R, C, h, w]: logits [R, K, 4h, 4w] and quality [R, K].

        points (places [R, P, 2], labels [R, P]) and boxes [R, 4] are in pixels of the square; mask 0 is the single one.
        """
        with torch.autocast(embedding.device.type, enabled=False):  # a place needs more than bfloat16's 8 bits
            drawn = self._drawn(points, boxes) if self.config.rasterise else None
            sparse, dense = self.prompt_encoder(points, boxes, drawn)
            places = self.prompt_encoder.get_dense_pe()
        # The decoder repeats one image for all prompts and adds the dense prompt to it: with the image within the
        # dense prompt, a batch of images goes through it at once.
        nothing = embedding.new_zeros(1, embedding.shape[1], 1, 1)
        return self.mask_decoder.predict_masks(nothing, places, sparse, embedding + dense)

    def _drawn(self, points: tuple[Tensor, Tensor] | None, boxes: Tensor | None) -> Tensor:
        """Prompts as a mask input [R, 1, 4h, 4w]: boxes filled with 1, points as dots of a token's width, +1 or -1."""
        grid, side = self.prompt_encoder.mask_input_size, self.config.image_size
        drawn = 0 if boxes is None else rasterise(boxes * (grid[0] / side), grid)
        if points is not None:
            (places, labels), reach = points, self.config.patch / 2
            dots = rasterise(torch.cat([places - reach, places + reach], dim=-1) * (grid[0] / side), grid)
            drawn = drawn + torch.einsum("rphw, rp -> rhw", dots, (labels == 1).float() - (labels == 0).float())
        return drawn[:, None]

    def decode(self, features: SamFeatures, prompts: SamPrompts) -> Prediction:
        """Segment encoded images under N prompts each: logits [B, N, H, W], quality [B, N].

        Where nothing was found the mask is empty and its quality 0. Raises ValueError for places outside the image.
        """
        boxes, points, labels = self._placed(prompts, features)
        batch, n = boxes.shape[:2]
        embedding, grid = features.embedding, self.prompt_encoder.mask_input_size
        if batch != len(embedding):
            raise ValueError(f"There are prompts for {batch} images, but {len(embedding)} images: give both alike.")
        logits = EMPTY + 0 * embedding.float().mean() + embedding.new_zeros(batch, n, *grid, dtype=torch.float32)
        quality = torch.zeros_like(logits[..., 0, 0])
        boxed, pointed = ~boxes.isnan().any(-1), (labels >= 0).any(-1)  # [B, N]
        # SAM knows no mask over its prompt tokens: kinds go through it apart, so that no case sees another's padding.
        for with_box, with_points in ((True, False), (False, True), (True, True)):
            rows = (boxed == with_box) & (pointed == with_points) & prompts.present[:, None]
            if not rows.any():
                continue
            own_points = (points[rows], labels[rows]) if with_points else None
            own_boxes = boxes[rows] if with_box else None
            masks, scores = self.predict_masks(embedding[rows.nonzero()[:, 0]], own_points, own_boxes)
            logits[rows] = masks[:, 0].float()
            quality[rows] = scores[:, 0].float() if self.config.multimask else stability(masks[:, 0])
        return Prediction(from_square(logits, self.config.image_size, features), {"quality": quality})

    def forward(self, image: Tensor, prompts: SamPrompts) -> Prediction:
        return self.decode(self.encode_image(image), prompts)

    def _placed(self, prompts: SamPrompts, features: SamFeatures) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes, points and labels that are read, checked and carried over to the square."""
        boxes, points, labels = prompts.read(self.prompt)
        height, width = features.size
        x0, y0, x1, y1 = boxes[prompts.present].unbind(-1)
        x, y = points[(labels >= 0) & prompts.present[:, None, None]].unbind(-1)
        wrong = (x1 <= 0) | (y1 <= 0) | (x0 >= width) | (y0 >= height) | (x1 < x0) | (y1 < y0)
        if wrong.any() or ((x < 0) | (y < 0) | (x >= width) | (y >= height)).any():
            raise ValueError(
                f"A prompt lies outside its image of {height}x{width} pixels, or a box ends before it starts: "
                "give x0, y0, x1, y1 and x, y in pixels of the very image that is segmented."
            )
        return to_square(_clipped(boxes, features.size), features), to_square(points, features), labels

    def draw(self, mask: Tensor, generator: torch.Generator) -> SamPrompts:
        """Prompt for whole true masks [B, 1, H, W]: a jittered box, points inside, or both, as `kind` says per case.

        Everything is drawn on the CPU, so the same generator state gives the same prompts on any device.
        """
        inside = mask[:, 0].cpu() > 0.5
        kinds = torch.randint(3, (len(mask),), generator=generator)
        if self.kind != "any":
            kinds.fill_(CHOICES["kind"].index(self.kind))
        boxes = jitter(bounding_boxes(inside), self.jitter, tuple(inside.shape[1:]), generator)
        boxes[kinds == 1] = torch.nan
        points, labels = scatter_points(inside, self.config.points, self.config.negatives, generator)
        share = torch.rand(len(mask), 1, generator=generator)
        kept = torch.rand(labels.shape, generator=generator) < share  # from one point to all
        kept[:, 0] = True
        labels[~kept | (kinds == 0)[:, None]] = -1
        drawn = {"boxes": boxes[:, None], "points": points[:, None], "labels": labels[:, None]}
        return SamPrompts(present=inside.flatten(1).any(1), **drawn).to(mask.device)


def stability(logits: Tensor) -> Tensor:
    """IoU of a mask [..., H, W] at the logits 1 and -1: SAM's stability score, the quality where there is no head."""
    return (logits > 1).sum((-2, -1)) / (logits > -1).sum((-2, -1)).clamp_min(1)


def build_sam(size: str = "vit_h", **fields) -> Sam:
    """Build SAM with random weights; `load_checkpoint` fills it."""
    config = configure(SamConfig, SIZES, size, fields)
    for field, choices in CHOICES.items():
        if getattr(config, field) not in choices:
            raise ValueError(
                f"SamConfig.{field} is {getattr(config, field)!r}, but it must be one of {', '.join(choices)}."
            )
    if config.image_size % config.patch or config.points < 1:
        raise ValueError(
            f"SamConfig has image_size {config.image_size}, patch {config.patch} and points {config.points}: "
            "the first must be a multiple of the second, and the last at least 1."
        )
    grid, side, width = config.image_size // config.patch, config.image_size, config.decoder_width
    prompts = PromptEncoder(width, (grid, grid), (side, side), config.mask_channels)
    transformer = TwoWayTransformer(config.decoder_depth, width, config.decoder_heads, config.decoder_mlp)
    decoder = MaskDecoder(
        transformer_dim=width,
        transformer=transformer,
        num_multimask_outputs=config.multimask,
        iou_head_hidden_dim=width,
    )
    return Sam(config, vit(config) if config.encoder == "vit" else TinyViT(config), prompts, decoder)


# ---- published weights -----------------------------------------------------------------------------------


class Checkpoint(NamedTuple):
    """A published weight file; `bytes` and `sha256` are None where its publisher states none."""

    size: str
    url: str
    bytes: int | None = None
    sha256: str | None = None


META = "https://dl.fbaipublicfiles.com/segment_anything/"
MOBILE = "https://github.com/ChaoningZhang/MobileSAM/raw/master/weights/"
CHECKPOINTS = {  # by the name of the file
    "sam_vit_h_4b8939": Checkpoint(
        "vit_h", META, 2564550879, "a7bf3b02f3ebf1267aba913ff637d9a2d5c33d3173bb679e46d9f338c26f262e"
    ),
    "sam_vit_l_0b3195": Checkpoint(
        "vit_l", META, 1249524607, "3adcc4315b642a4d2101128f611684e8734c41232a17c648ed1693702a49a622"
    ),
    "sam_vit_b_01ec64": Checkpoint(
        "vit_b", META, 375042383, "ec2df62732614e57411cdcf32a23ffdf28910380d03139ee0f4fcbe91eb8c912"
    ),
    "medsam_vit_b": Checkpoint("medsam", "https://github.com/bowang-lab/MedSAM"),
    "mobile_sam": Checkpoint(
        "mobile", MOBILE, 40728226, "6dbb90523a35330fedd7f1d3dfc66f995213d81b29a5ca8108dbcdd4e37d6c2f"
    ),
}


def load_checkpoint(name_or_path: str | Path, size: str = "") -> Sam:
    """Load SAM in evaluation mode, by a name of CHECKPOINTS from $PROMPT_TO_MASK_WEIGHTS/<name>/, or from a file.

    A file was written by `lib.models.save`, or holds the official tensors as safetensors or as a pickle, which is
    read without running its code; `size` says what to build where the file's name does not. Raises FileNotFoundError
    or ValueError with one sentence: missing file, wrong length or sha256, a pickle with code, another model's tensors.
    """
    path = _locate(str(name_or_path))
    known = CHECKPOINTS.get(path.stem)
    try:
        if path.suffix == ".safetensors":
            with safetensors.safe_open(path, framework="pt") as file:
                if "meta" in (file.metadata() or {}):
                    return load(path)[0]
                names = file.keys()
                tensors = {name: file.get_tensor(name) for name in names}
        else:
            if known:
                _verify(path, known)
            tensors = torch.load(path, map_location="cpu", weights_only=True)
            tensors = tensors if isinstance(tensors, dict) else {}
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors and could run code, so it was not opened: get it from its publisher."
        ) from error
    except (safetensors.SafetensorError, RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is damaged or no weight file: fetch it again.") from error
    if not (size or known):
        raise ValueError(f"{path} does not say what it is a checkpoint of: give size as one of {', '.join(SIZES)}.")
    model = build_sam(size or known.size)
    if model.config.encoder == "tinyvit":
        tensors = {ours: tensor for name, tensor in tensors.items() if (ours := mobile_name(name)) is not None}
    own = model.state_dict()
    wrong = sorted(own.keys() ^ tensors.keys())
    wrong += sorted(name for name in own.keys() & tensors.keys() if own[name].shape != tensors[name].shape)
    if wrong:
        raise ValueError(
            f"{path} holds the tensors of another model: {len(wrong)} names or shapes differ, first '{wrong[0]}'; "
            f"give the size that it was trained with, one of {', '.join(SIZES)}."
        )
    model.load_state_dict(tensors)
    model.provenance["backbone"] = f"pretrained {path.stem} ({sha256_file(path)[:12]})"
    return model.eval()


def mobile_name(name: str) -> str | None:
    """What a tensor of mobile_sam.pt is called here; None for its classifier, which nothing reads."""
    if re.match(r"image_encoder\.(norm_head|head)\.", name):
        return None
    name = name.replace(".seq.0.", ".conv1.").replace(".seq.2.", ".conv2.").replace(".c.", ".conv.")
    name = name.replace("encoder.layers.", "encoder.stages.")
    # timm halves at the start of a stage, MobileSAM at the end of the one before
    return re.sub(r"stages\.(\d)\.downsample", lambda found: f"stages.{int(found[1]) + 1}.downsample", name)


def _locate(name: str) -> Path:
    if name not in CHECKPOINTS:
        if Path(name).is_file():
            return Path(name)
        raise FileNotFoundError(
            f"There is no checkpoint {name}: correct the path, or use one of {', '.join(CHECKPOINTS)}."
        )
    for suffix in (".pth", ".pt", ".safetensors"):
        if WEIGHTS in os.environ and (path := Path(os.environ[WEIGHTS], name, name + suffix)).is_file():
            return path
    raise FileNotFoundError(
        f"The checkpoint '{name}' is not offered: get its file from {CHECKPOINTS[name].url} into ${WEIGHTS}/{name}."
    )


def _verify(path: Path, known: Checkpoint) -> None:
    found = {"bytes": path.stat().st_size}
    found["sha256"] = sha256_file(path) if found["bytes"] == known.bytes else None
    for what, value in found.items():
        expected = getattr(known, what)
        if expected is not None and value != expected:
            raise ValueError(
                f"{path} has the {what} {value} where {expected} was published: it was cut short or is another "
                f"file, so fetch it again from {known.url}."
            )
