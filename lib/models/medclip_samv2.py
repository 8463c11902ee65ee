"""MedCLIP-SAMv2 (Koleilat et al., Medical Image Analysis 2025): from a sentence to a mask, without a label.

sentence + image --M2IB--> saliency --clean-up--> coarse mask --> boxes, points --SAM--> mask. Each stage is one method
on plain values, and `stage` says after which one to stop, so that a ladder of stages is one trained model looked at
several times. What is trained is the pair of towers (lib.models.clip, by a contrastive loss on image-sentence pairs);
the SAM (lib.models.sam) comes trained. The last stage, weak supervision, is lib.models.snapshots.
"""

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lib.models import Prediction, configure
from lib.models.clip import CLIP_SIZES, Clip, ClipConfig, book_tower, build_clip
from lib.models.coarse import METHODS as CLEANUPS
from lib.models.coarse import boxes, coarse_mask, keep_largest, points
from lib.models.saliency import METHODS, check_layer, saliency
from lib.models.sam import CHECKPOINTS, Sam, SamFeatures, SamPrompts, bounding_boxes, build_sam, load_checkpoint
from lib.text import Prompts

STAGES = ("saliency", "binary", "components", "box", "sam")
SAM_PROMPTS = ("box", "points", "both")
SURE = 6.0  # the logit of a pixel that a mask without probabilities holds, .998


@dataclass(frozen=True)
class MedClipSamConfig(ClipConfig):
    """The towers' config and how the stages are run; every field below may also be set at test time."""

    sam: str = "sam_vit_h_4b8939"  # a published checkpoint of lib.models.sam, or a size of the book's own
    stage: str = "sam"
    method: str = "m2ib"
    # released defaults; the book's own towers have theirs from validation cases of the brain phantom
    layer: int = 7
    beta: float = 0.1
    copies: int = 10  # of the image in each step of M2IB, each with its own noise; released
    cleanup: str = "otsu"  # paper v4; the released code still clusters (two_means)
    components: int = 1  # 2 for lungs (released)
    sam_prompt: str = "box"  # paper v4, Table 5: boxes are best on three of four tasks
    contrast: bool = False  # ours: subtract what the average sentence highlights, so that what is left is the words'
    trained: bool = True  # False: an untrained tower of the same shape (a control)


MEDCLIP_SIZES = {
    "paper": CLIP_SIZES["paper"],
    "small": CLIP_SIZES["small"] | {"sam": "small", "layer": 2, "beta": 1.0, "copies": 6},
    "tiny": CLIP_SIZES["tiny"] | {"sam": "tiny", "layer": 1, "beta": 1.0, "copies": 4},
}


class Features(NamedTuple):
    """What of an image no prompt changes: the image itself and, once SAM is reached, its embedding."""

    image: Tensor
    sam: SamFeatures | None


class Chain(NamedTuple):
    """All that a sentence became on its way: see MedClipSam's methods for shapes."""

    saliency: Tensor
    coarse: Tensor
    found: Tensor
    prompts: SamPrompts | None
    logits: Tensor


class MedClipSam(nn.Module):
    """Image [B, 1 or 3, H, W] and a sentence each -> logits [B, 1, H, W].

    A case without a sentence, or whose saliency is flat, gets an empty mask: a miss that is counted, never dropped.
    """

    def __init__(self, config: MedClipSamConfig, clip: Clip, sam: Sam):
        super().__init__()
        self.config, self.roles = config, config.roles
        self.clip, self.sam = clip, sam.requires_grad_(False)
        self.provenance = clip.provenance | {"sam": sam.provenance["backbone"]}
        self.external = {"sam": config.sam} if config.sam in CHECKPOINTS else {}
        self.switches = {
            "stage": STAGES,
            "method": METHODS,
            "layer": tuple(range(clip.tower.depth)),
            "beta": (0.01, 0.03, 0.1, 0.3, 1.0, 2.0),
            "cleanup": CLEANUPS,
            "components": (1, 2, 3),
            "sam_prompt": SAM_PROMPTS,
            "contrast": (False, True),
            "trained": (True, False),
        }
        for name in (*self.switches, "copies"):
            setattr(self, name, getattr(config, name))
        self.layer = check_layer(clip.tower, config.layer)
        self._untrained: list[Clip] = []  # not a module of this one: it is not stored

    @property
    def learner(self) -> Clip:
        """What training trains: the towers."""
        return self.clip

    def calibrate_text(self, prompts: Prompts) -> None:
        """Set the text standardisation from the training prompts, once, before training."""
        self.clip.calibrate_text(prompts)

    def adopt(self, sub: str, name: str) -> None:
        """Take a published SAM by name, after a file that does not store it."""
        self.sam.load_state_dict(load_checkpoint(name).state_dict())

    @property
    def towers(self) -> Clip:
        """The towers in use: the trained ones, or with `trained` off some that learned nothing."""
        return self.clip if self.trained else self._blank(next(self.clip.parameters()).device)

    def adopt_part(self, name: str, part: nn.Module) -> None:
        """Take over a trained SAM; raises ValueError for any other part, or a SAM of another size."""
        if name != "sam" or not isinstance(part, Sam):
            raise ValueError(f"MedCLIP-SAMv2 takes a part 'sam' that is a SAM, not '{name}' ({type(part).__name__}).")
        if part.config != self.sam.config:
            raise ValueError(
                f"The SAM is another one ({part.config}) than the config asks for: train the size {self.config.sam!r}."
            )
        self.sam.load_state_dict(part.state_dict())
        self.provenance = {**self.provenance, "sam": part.provenance.get("backbone", "trained here")}

    # ---- the stages -----------------------------------------------------------------------------------------

    def saliency(self, image: Tensor, prompts: Prompts) -> tuple[Tensor, Tensor]:
        """Saliency [B, H, W] from 0 to 1 of the sentences in the images, and which cases [B] have any contrast."""
        clip = self.towers
        text, present = clip.encode_text(prompts)
        options = dict(layer=self.layer, beta=self.beta, copies=self.copies)
        maps = saliency(clip.tower, image, text, self.method, **options)
        if self.contrast:
            maps = (
                maps - saliency(clip.tower, image, clip.average_text(len(image)), self.method, **options)
            ).clamp_min(0)
            maps = maps / maps.amax((1, 2), keepdim=True).clamp_min(torch.finfo(maps.dtype).tiny)
        maps = torch.where(present[:, None, None], maps, 0.0)
        return maps, maps.flatten(1).amax(1) > maps.flatten(1).amin(1)

    def coarse_mask(self, maps: Tensor, found: Tensor, components: int | None) -> Tensor:
        """Clean saliency up to masks [B, H, W]: the `components` best parts, all of them with None."""
        coarse = torch.zeros(maps.shape, dtype=torch.bool)
        for i in found.nonzero().flatten().tolist():
            coarse[i] = torch.from_numpy(coarse_mask(maps[i].float().cpu().numpy(), self.cleanup, components))
        return coarse.to(maps.device)

    def prompts_from_mask(self, coarse: Tensor) -> SamPrompts:
        """One box around each coarse mask [B, H, W], ten points inside it (released), or both."""
        inside = coarse.cpu()
        given = {"present": inside.flatten(1).any(1)}
        if self.sam_prompt != "points":
            given["boxes"] = bounding_boxes(inside)[:, None]
        if self.sam_prompt != "box":
            place, label = torch.zeros(len(inside), 1, 10, 2), torch.full((len(inside), 1, 10), -1)
            for i in given["present"].nonzero().flatten().tolist():
                drawn = torch.as_tensor(points(inside[i].numpy(), positive=10, seed=0))
                place[i, 0, : len(drawn)], label[i, 0, : len(drawn)] = drawn.float(), 1
            given |= {"points": place, "labels": label}
        return SamPrompts(**given).to(coarse.device)

    def segment(self, features: SamFeatures, prompts: SamPrompts, coarse: Tensor) -> Tensor:
        """Let SAM draw logits [B, 1, H, W], of which as many components are kept as the coarse mask has (released)."""
        logits = self.sam.decode(features, prompts).logits
        for i, mask in enumerate((logits[:, 0] > 0).cpu().numpy()):
            if mask.any():
                kept = torch.from_numpy(keep_largest(mask, max(1, len(boxes(coarse[i].cpu().numpy(), union=False)))))
                logits[i, 0][~kept.to(logits.device) & (logits[i, 0] > 0)] = -SURE
        return logits

    # ---- the chain ------------------------------------------------------------------------------------------

    def encode_image(self, image: Tensor) -> Features:
        """Embed images for SAM once; the towers read them with the sentence."""
        return Features(image, self.sam.encode_image(image) if self.stage == "sam" else None)

    def chain(self, features: Features, prompts: Prompts) -> Chain:
        """Run the stages up to `stage` and keep what each gave."""
        maps, found = self.saliency(features.image, prompts)
        coarse, asked = torch.zeros(maps.shape, dtype=torch.bool, device=maps.device), None
        if self.stage == "saliency":
            logits = torch.logit(maps, eps=1e-4)[:, None]
            return Chain(maps, coarse, found, None, torch.where(found[:, None, None, None], logits, -SURE))
        coarse = self.coarse_mask(maps, found, None if self.stage == "binary" else self.components)
        if self.stage == "sam":
            asked = self.prompts_from_mask(coarse)
            sam = features.sam or self.sam.encode_image(features.image)
            return Chain(maps, coarse, found, asked, self.segment(sam, asked, coarse))
        drawn = filled_boxes(coarse) if self.stage == "box" else coarse
        return Chain(maps, coarse, found, asked, torch.where(drawn, SURE, -SURE)[:, None])

    def decode(self, features: Features, prompts: Prompts) -> Prediction:
        """Segment by a sentence each; aux holds the saliency and the coarse mask."""
        chain = self.chain(features, prompts)
        return Prediction(chain.logits, {"saliency": chain.saliency, "coarse": chain.coarse, "found": chain.found})

    def forward(self, image: Tensor, prompts: Prompts) -> Prediction:
        return self.decode(self.encode_image(image), prompts)

    def _blank(self, device: torch.device) -> Clip:
        """Towers that learned nothing, the same ones each time; text keeps its standardisation."""
        if not self._untrained:
            with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
                torch.manual_seed(2**31 - 1)  # no experiment begins there
                blank = Clip(self.clip.config, book_tower(self.clip.config)).eval()
                blank.prompts.load_state_dict(self.clip.prompts.state_dict())
                self._untrained.append(blank)
        return self._untrained[0].to(device)


def filled_boxes(coarse: Tensor) -> Tensor:
    """Fill the box of each mask [B, H, W]: what a SAM must beat to have added anything."""
    rows, columns = coarse.any(2), coarse.any(1)
    return _span(rows)[:, :, None] & _span(columns)[:, None, :]


def _span(line: Tensor) -> Tensor:
    """True from the first to the last True of each row."""
    seen, ahead = line.cumsum(1) > 0, line.flip(1).cumsum(1).flip(1) > 0
    return seen & ahead


def build(size: str = "paper", **given) -> MedClipSam:
    """Build the chain; raises ValueError for a field, stage, method or clean-up that is not there."""
    config = configure(MedClipSamConfig, MEDCLIP_SIZES, size, given)
    known = {"stage": STAGES, "method": METHODS, "cleanup": CLEANUPS, "sam_prompt": SAM_PROMPTS}
    for name, values in known.items():
        if getattr(config, name) not in values:
            raise ValueError(f"There is no {name} {getattr(config, name)!r}: use one of {', '.join(values)}.")
    clip = build_clip("paper", **{field.name: getattr(config, field.name) for field in fields(ClipConfig)})
    named = config.sam in CHECKPOINTS
    sam = load_checkpoint(config.sam) if named and config.pretrained else None
    return MedClipSam(config, clip, sam or build_sam(CHECKPOINTS[config.sam].size if named else config.sam))
