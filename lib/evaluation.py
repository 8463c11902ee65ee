"""How a prediction is judged: one row of scores per case, with each definition named.

Masks are binary arrays; `spacing` is the size of a pixel along each axis in mm (1 where it is unknown, so
that distances are in pixels). A pixel is predicted foreground when its probability is above the threshold.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Self

import numpy as np
import pandas as pd
import torch
from scipy.ndimage import distance_transform_edt
from torch import Tensor, nn

from lib.losses.contrastive import retrieved
from lib.models import segment

EMPTY_RULE = (
    "Where truth and prediction are both empty, DSC, IoU, NSD and precision are 1 and HD95 is 0; where only one is "
    "empty, DSC, IoU, NSD and precision are 0 and HD95 is the diagonal of the image. FNR is undefined (NaN) for a "
    "case without true foreground, FPR for one without true background."
)
NSD_VARIANT = "surface Dice (DeepMind, area-weighted), tolerance in mm (pixels where spacing is unknown)"
CALIBRATION_BINS = 15
COLUMNS = [
    *(
        "dataset",
        "case_id",
        "patient_id",
        "threshold",
        "dsc",
        "iou",
        "nsd",
        "hd95",
        "fpr",
        "fnr",
        "precision",
    ),
    *("area_true", "area_pred", "area_both", "ece", "ece_band", "brier", "macro_dice", "macro_iou", "xbusnet_fpr"),
]
COVERAGES = (0.5, 0.8, 0.9, 0.95, 0.99)
UNCERTAINTY_COLUMNS = [
    *("ace", "entropy", "confidence", "error_auroc", "error_auprc", "aurc"),
    *(f"risk_{coverage:g}" for coverage in COVERAGES),
]


# --- Surfaces


@dataclass(frozen=True)
class Surface:
    """The surface elements of a mask, sorted by their distance to the surface of another mask.

    distance: [n] mm, infinite if the other mask is empty; size: [n] contour length (2-D) or area (3-D). An
    empty mask has no elements.
    """

    distance: np.ndarray
    size: np.ndarray

    def near(self, tolerance: float) -> float:
        """Size of the part that is within `tolerance` of the other surface."""
        return float(self.size[self.distance <= tolerance].sum())

    def overlap(self, tolerance: float) -> float:
        """Share of the surface that is within `tolerance` of the other one; NaN without elements."""
        return _ratio(self.near(tolerance), self.size.sum())

    def percentile(self, percent: float) -> float:
        """Smallest distance that covers `percent` of the surface's size; infinite without elements."""
        if len(self.size) == 0:
            return np.inf
        covered = np.cumsum(self.size) / self.size.sum()
        return float(self.distance[min(np.searchsorted(covered, percent / 100), len(covered) - 1)])

    def mean(self) -> float:
        """Size-weighted mean distance; NaN without elements."""
        return _ratio((self.distance * self.size).sum(), self.size.sum())


def surface_distances(truth: np.ndarray, prediction: np.ndarray, spacing: Sequence[float]) -> tuple[Surface, Surface]:
    """Measure the surfaces of two masks of 2 or 3 axes against each other: (truth's, prediction's).

    Source: google-deepmind/surface-distance. The sizes come from MONAI's tables of the same origin; MONAI's own
    surface Dice gives one float32 number, and its HD95 is not weighted by size.
    """
    truth, prediction = np.asarray(truth, bool), np.asarray(prediction, bool)
    if truth.shape != prediction.shape or truth.ndim != len(spacing):
        raise ValueError(
            f"Surfaces need two masks of one shape and a spacing per axis, but got masks of {truth.shape} "
            f"and {prediction.shape} with {len(spacing)} spacings."
        )
    either = truth | prediction
    if not either.any():
        nothing = Surface(np.zeros(0), np.zeros(0))
        return nothing, nothing
    box = tuple(slice(where.min(), where.max() + 1) for where in np.nonzero(either))
    spacing = tuple(float(size) for size in spacing)
    sizes = surface_element_sizes(spacing)
    codes = [_neighbour_codes(mask[box]) for mask in (truth, prediction)]
    edges = [(code > 0) & (code < len(sizes) - 1) for code in codes]

    def surface(code: np.ndarray, edge: np.ndarray, other: np.ndarray) -> Surface:
        if not other.any():
            return Surface(np.full(edge.sum(), np.inf), sizes[code[edge]])
        distance, size = distance_transform_edt(~other, sampling=spacing)[edge], sizes[code[edge]]
        order = np.lexsort((size, distance))
        return Surface(distance[order], size[order])

    return surface(codes[0], edges[0], edges[1]), surface(codes[1], edges[1], edges[0])


def surface_dice(truth: Surface, prediction: Surface, tolerance: float) -> float:
    """Share of both surfaces within `tolerance` of the other one (`NSD_VARIANT`); NaN if both are empty."""
    return _ratio(truth.near(tolerance) + prediction.near(tolerance), truth.size.sum() + prediction.size.sum())


def hausdorff(truth: Surface, prediction: Surface, percent: float = 95.0) -> float:
    """Larger of the two size-weighted distance percentiles in mm; infinite if a mask is empty."""
    return max(truth.percentile(percent), prediction.percentile(percent))


@lru_cache
def surface_element_sizes(spacing: tuple[float, ...]) -> np.ndarray:
    """Contour length or area of the surface element at a lattice point, for each pattern of the pixels around it."""
    from monai.metrics.utils import get_code_to_measure_table  # seconds to import

    return get_code_to_measure_table(spacing)[0].numpy().astype(np.float64)


def _neighbour_codes(mask: np.ndarray) -> np.ndarray:
    """Number the pattern of the 2^n pixels around each lattice point of an n-axis mask, first corner highest."""
    codes = np.zeros([size + 1 for size in mask.shape], np.uint8)
    padded = np.pad(mask, 1).astype(np.uint8)
    for bit, corner in enumerate(reversed(list(np.ndindex((2,) * mask.ndim)))):
        window = tuple(slice(start, start + size + 1) for start, size in zip(corner, mask.shape, strict=True))
        codes += padded[window] << bit
    return codes


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole > 0 else np.nan


# --- Overlap


def region_metrics(
    truth: np.ndarray,
    prediction: np.ndarray,
    regions: Sequence[int | Sequence[int]],
    ignore_label: int | None = None,
) -> pd.DataFrame:
    """Count and score each region (a label or a set of labels) of one case, a row per region.

    Dice and IoU are NaN where neither mask holds the region; voxels whose true label is `ignore_label` do not
    count. Source: MIC-DKFZ/nnUNet, evaluation/evaluate_predictions.py.
    """
    kept = np.ones(truth.shape, bool) if ignore_label is None else truth != ignore_label
    rows = []
    for region in regions:
        true, predicted = np.isin(truth, region) & kept, np.isin(prediction, region) & kept
        tp = int((true & predicted).sum())
        fp, fn = int(predicted.sum()) - tp, int(true.sum()) - tp
        tn = int(kept.sum()) - tp - fp - fn
        scores = {"Dice": _ratio(2 * tp, 2 * tp + fp + fn), "IoU": _ratio(tp, tp + fp + fn)}
        rows.append(scores | {"FP": fp, "TP": tp, "FN": fn, "TN": tn, "n_pred": tp + fp, "n_ref": tp + fn})
    return pd.DataFrame(rows)


def confusion(truth: np.ndarray, prediction: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Count the (TP, FP, FN, TN) pixels of each image; masks [N, *S], four arrays [N]."""
    truth, prediction = (np.asarray(mask, bool).reshape(len(mask), -1) for mask in (truth, prediction))
    tp = (truth & prediction).sum(1)
    fp, fn = prediction.sum(1) - tp, truth.sum(1) - tp
    return tp, fp, fn, truth.shape[1] - tp - fp - fn


def overlap_scores(truth: np.ndarray, prediction: np.ndarray) -> dict[str, np.ndarray]:
    """Score the foreground of each image: dsc, iou, fpr, fnr, precision and three areas in pixels; masks [N, *S].

    fpr = FP / (FP + TN) and fnr = FN / (FN + TP) over pixels; empty masks follow `EMPTY_RULE`.
    """
    tp, fp, fn, tn = confusion(truth, prediction)

    def ratio(part, whole, otherwise):
        return np.where(whole > 0, part / np.maximum(whole, 1), otherwise)

    return {
        "dsc": ratio(2 * tp, 2 * tp + fp + fn, 1.0),
        "iou": ratio(tp, tp + fp + fn, 1.0),
        "fpr": ratio(fp, fp + tn, np.nan),
        "fnr": ratio(fn, fn + tp, np.nan),
        "precision": ratio(tp, tp + fp, np.where(fn == 0, 1.0, 0.0)),
        "area_true": tp + fn,
        "area_pred": tp + fp,
        "area_both": tp,
    }


def xbusnet_scores(probability: np.ndarray, mask: np.ndarray, threshold: float = 0.5) -> dict[str, np.ndarray]:
    """Score each image as XBusNet's evaluation does; probability and mask [N, *S], six arrays [N].

    iou, dice, f1, fpr and fnr are means over background and foreground. Its "fpr" puts 2 (FP + FN) where true
    negatives belong and so lies between 1/6 and 1/5 for every imperfect image; for a pixel FPR see
    `overlap_scores`.
    Source: rmallina14/XBusNet @ba770f6, metrics.py.
    """
    tp, fp, fn, tn = confusion(mask, np.asarray(probability) > threshold)
    hit = np.stack([tn, tp]).astype(float)  # [background | foreground, N]
    true, predicted = np.stack([tn + fp, tp + fn]), np.stack([tn + fn, tp + fp])
    false = predicted - hit

    def ratio(part, whole):
        return np.divide(part, whole, out=np.zeros_like(hit), where=whole > 0)

    precision, recall = ratio(hit, predicted), ratio(hit, true)
    wrong = (true + predicted - 2 * hit).sum(0)
    return {
        "accuracy": hit.sum(0) / (predicted.sum(0) + 1e-10),
        "iou": ratio(hit, true + predicted - hit).mean(0),
        "dice": ratio(2 * hit, true + predicted).mean(0),
        "f1": ratio(2 * precision * recall, precision + recall).mean(0),
        "fpr": (false / (false + wrong + 1e-10)).mean(0),
        "fnr": ((true - hit) / (true + 1e-10)).mean(0),
    }


# --- Calibration


def calibration_error(
    probability: np.ndarray,
    mask: np.ndarray,
    where: np.ndarray | None = None,
    bins: int = CALIBRATION_BINS,
) -> np.ndarray:
    """Expected calibration error of each image's foreground probability, over the pixels of `where`.

    Σ_bins (share of pixels) · |mean probability - share of foreground|, equal-width bins over [0, 1] (Guo et
    al. 2017, Eq. 3, for the foreground class). probability, mask, where: [N, *S]; the result [N] is NaN where no
    pixel is chosen. As MONAI's calibration_binning, which takes no region and sums in float32.
    """
    count = len(probability)
    probability, mask = (np.asarray(x, np.float64).reshape(count, -1) for x in (probability, mask))
    weight = np.ones_like(mask) if where is None else np.asarray(where, np.float64).reshape(count, -1)
    cell = np.minimum((probability * bins).astype(np.int64), bins - 1) + bins * np.arange(count)[:, None]
    excess = np.bincount(cell.ravel(), ((probability - mask) * weight).ravel(), minlength=count * bins)
    pixels = weight.sum(1)
    return np.abs(excess).reshape(count, bins).sum(1) / np.where(pixels > 0, pixels, np.nan)


def boundary_band(mask: np.ndarray, width: float, spacing: Sequence[float]) -> np.ndarray:
    """Mark the pixels within `width` mm of a pixel of the other class; nothing if there is only one class."""
    mask = np.asarray(mask, bool)
    if mask.all() or not mask.any():
        return np.zeros_like(mask)
    across = np.where(mask, distance_transform_edt(mask, spacing), distance_transform_edt(~mask, spacing))
    return across <= width


# --- Uncertainty


def binary_entropy(probability: np.ndarray) -> np.ndarray:
    """Entropy of each pixel's foreground probability in nats, 0 at 0 and 1, ln 2 at one half."""
    from scipy.special import entr

    return entr(probability) + entr(1 - probability)


def adaptive_calibration_error(probability: np.ndarray, mask: np.ndarray, bins: int = CALIBRATION_BINS) -> np.ndarray:
    """Calibration error of each image over bins that hold equally many pixels; [N, *S] twice -> [N].

    Source: Nixon et al. 2019 (arXiv 1904.01685), for the foreground class.
    """
    count = len(probability)
    probability, mask = (np.asarray(x, np.float64).reshape(count, -1) for x in (probability, mask))
    order = np.argsort(probability, axis=1, kind="stable")
    excess = np.take_along_axis(probability - mask, order, axis=1)
    return sum(np.abs(part.sum(1)) for part in np.array_split(excess, bins, axis=1)) / probability.shape[1]


@dataclass(frozen=True)
class DoubtCurve:
    """Pixels of one image from the surest to the least sure, those of equal doubt as one step: counts [steps].

    All of `uncertainty_scores` follows from it, so that an image is sorted once: scikit-learn's functions give the
    same numbers in six times the time.
    """

    wrong: np.ndarray
    right: np.ndarray

    @classmethod
    def of(cls, wrong: np.ndarray, doubt: np.ndarray) -> Self:
        """Sort pixels by doubt; wrong [P] bool, doubt [P]."""
        order = np.argsort(doubt, kind="stable")
        ordered = doubt[order]
        starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
        errors = np.add.reduceat(wrong[order].astype(np.int64), starts)
        return cls(errors, np.diff(np.r_[starts, len(doubt)]) - errors)

    def auroc(self) -> float:
        """How likely a wrong pixel is doubted more than a right one; NaN where all are right or all wrong."""
        below = np.cumsum(self.right) - self.right
        return _ratio((self.wrong * (below + self.right / 2)).sum(), self.wrong.sum() * self.right.sum())

    def auprc(self) -> float:
        """Average precision of doubt as a detector of wrong pixels; NaN where all are right or all wrong."""
        if not self.right.sum():
            return np.nan
        wrong, right = (np.cumsum(counts[::-1]) for counts in (self.wrong, self.right))
        return _ratio((self.wrong[::-1] * wrong / (wrong + right)).sum(), self.wrong.sum())

    def risk(self) -> np.ndarray:
        """Error rate among the k + 1 surest pixels for each k [P]; pixels of one step share the rate at its end.

        Source: Geifman & El-Yaniv 2017 (arXiv 1705.08500); the mean is the AURC.
        """
        pixels = self.wrong + self.right
        return np.repeat(np.cumsum(self.wrong) / np.cumsum(pixels), pixels)


def uncertainty_scores(probability: np.ndarray, mask: np.ndarray, threshold: float = 0.5) -> dict[str, np.ndarray]:
    """Ask of each image whether the model's doubt is where its errors are; probability and mask [N, *S].

    ace: `adaptive_calibration_error`; entropy: mean `binary_entropy`; confidence: mean probability in the
    predicted foreground (NaN without one); error_auroc and error_auprc: how well the entropy of a pixel tells that
    it is wrong; aurc and risk_<coverage>: the error rate among the surest pixels (`DoubtCurve`).
    """
    rows = []
    for image, truth in zip(probability, mask, strict=True):
        image, truth = image.astype(np.float64).ravel(), truth.astype(bool).ravel()
        predicted, doubt = image > threshold, binary_entropy(image)
        curve = DoubtCurve.of(predicted != truth, doubt)
        risk = curve.risk()
        rows.append(
            {
                "entropy": doubt.mean(),
                "confidence": image[predicted].mean() if predicted.any() else np.nan,
                "error_auroc": curve.auroc(),
                "error_auprc": curve.auprc(),
                "aurc": risk.mean(),
                **{f"risk_{c:g}": risk[math.ceil(c * len(risk)) - 1] for c in COVERAGES},
            }
        )
    return {"ace": adaptive_calibration_error(probability, mask), **pd.DataFrame(rows).to_dict("list")}


def saliency_scores(probability: np.ndarray, mask: np.ndarray) -> dict[str, list[float]]:
    """Ask whether a map lies on the target, at whatever threshold; probability and mask [N, *S].

    auroc: how likely a pixel of the target is above one beside it, ties half (NaN for an empty or full mask);
    pointing: share of the highest pixels that lie on the target, the pointing game with ties shared.
    """
    scores = {"auroc": [], "pointing": []}
    for image, truth in zip(probability, mask, strict=True):
        truth = truth.astype(bool).ravel()
        scores["auroc"].append(DoubtCurve.of(truth, image.astype(np.float64).ravel()).auroc())
        scores["pointing"].append(float(truth[image.ravel() == image.max()].mean()))
    return scores


def slab_surface_dice(mask: np.ndarray, prediction: np.ndarray, tolerance: float = 2.0) -> float:
    """MedCLIP-SAMv2's NSD: the surface Dice of 2-D masks taken for volumes of one slice, in pixels.

    Every pixel of a single slice is surface, so this is an overlap with a halo and lies far above the surface Dice of
    the outlines. Empty masks follow `EMPTY_RULE`. Source: HealthX-Lab/MedCLIP-SAMv2 @07047e3, evaluation/eval.py.
    """
    if not mask.any() or not prediction.any():
        return float(mask.any() == prediction.any())
    return surface_dice(*surface_distances(mask[..., None], prediction[..., None], (1, 1, 1)), tolerance)


def retrieval(model: nn.Module, feed, pairs: int, *, shuffles: int = 5, seed: int = 0) -> pd.DataFrame:
    """Score a pair of towers (`model.towers` or the model itself): does each image find its sentence, and the reverse?

    Cases are shuffled `shuffles` times into groups of `pairs`; what is left over joins no group. A row per case with
    the share of its groups in which its partner was the nearest (top1) or among the two nearest (top2), image to text
    (i2t) and text to image (t2i); cases that were always left over, or have no sentence, have no row. Raises ValueError
    for too few cases.
    """
    clip = getattr(model, "towers", model).eval()
    device = next(clip.parameters()).device
    image, text, worded = [], [], []
    with torch.inference_mode():
        for index in torch.arange(len(feed)).split(64):
            inputs = feed.batch(index)
            sentence, present = clip.encode_text(inputs.prompts.to(device))
            image.append(clip.encode_image(inputs.image.to(device))[present])
            text.append(sentence[present])
            worded += present.tolist()
        image, text = nn.functional.normalize(torch.cat(image), dim=-1), torch.cat(text)
        if len(text) < pairs or pairs < 2:
            raise ValueError(
                f"Retrieval among {pairs} pairs needs 2 or more, and {len(text)} cases have a sentence: ask for fewer."
            )
        directions = nn.functional.normalize(text, dim=-1)
        hits, times = torch.zeros(len(text), 4, device=device), torch.zeros(len(text), 1, device=device)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(shuffles):
            order = torch.randperm(len(text), generator=generator).to(device)
            for group in order[: len(text) // pairs * pairs].view(-1, pairs):
                similarity = image[group] @ directions[group].T
                found = [retrieved(similarity, text[group], top) for top in (1, 2)]
                hits[group] += torch.cat(found).T.float()
                times[group] += 1
    cases = [case for case, here in zip(feed.cache.cases, worded, strict=True) if here]
    names = ["top1_i2t", "top1_t2i", "top2_i2t", "top2_t2i"]
    table = pd.DataFrame(
        {name: [getattr(case, name) for case in cases] for name in ("dataset", "case_id", "patient_id")}
        | {"threshold": 0.5}  # where every table has a column
        | dict(zip(names, (hits / times).T.cpu().numpy(), strict=True))
    )
    return table.dropna(ignore_index=True)


def fit_temperature(model: nn.Module, feed, *, batch: int = 16, device: str | torch.device | None = None) -> float:
    """Find the T > 0 for which sigmoid(logits / T) has the least cross-entropy over every pixel of a feed.

    Source: Guo et al. 2017 (arXiv 1706.04599); fit it on validation cases.
    """
    from scipy.optimize import minimize_scalar

    logits, masks = [], []
    for inputs, logit, _ in predictions(model, feed, batch, device):
        logits.append(logit.cpu())
        masks.append(inputs.mask.cpu())
    logits, masks = torch.cat(logits), torch.cat(masks)

    def cost(log_temperature: float) -> float:
        scaled = logits / math.exp(log_temperature)
        return nn.functional.binary_cross_entropy_with_logits(scaled, masks).item()

    return math.exp(minimize_scalar(cost, bounds=(math.log(0.05), math.log(20)), method="bounded").x)


# --- A model on a data set


def evaluate(
    model: nn.Module,
    feed,
    *,
    thresholds: Sequence[float] = (0.5,),
    tolerance: float = 2.0,
    uncertainty: bool = False,
    saliency: bool = False,
    slab: bool = False,
    temperature: float = 1.0,
    batch: int = 16,
    device: str | torch.device | None = None,
) -> pd.DataFrame:
    """Score a model on every case of a feed: a row per case and threshold.

    Empty masks follow `EMPTY_RULE`. `nsd` is `NSD_VARIANT` at `tolerance`, `hd95` is in mm; both are computed
    at the first threshold and NaN at the others. Areas are in pixels. `ece` and `brier` cover the whole image,
    `ece_band` the `boundary_band` of the truth at width `tolerance`, or one pixel where pixels are larger (NaN
    without a boundary). `macro_dice`, `macro_iou` and `xbusnet_fpr` are `xbusnet_scores`; `uncertainty` adds
    `uncertainty_scores` at the first threshold, `saliency` adds `saliency_scores`, `slab` adds `slab_surface_dice`.
    Logits are divided by `temperature`. `seconds` is the model's wall time per case of a batch. A model that `learns`
    outcomes has `outcome_scores` in place of all this.
    """
    if getattr(model, "learns", "mask") == "outcome":
        return outcome_scores(model, feed, batch=batch, device=device)
    tables = []
    for inputs, logits, seconds in predictions(model, feed, batch, device):
        known = inputs.mask.flatten(2)[..., 0] >= 0  # [B, K]: an image may have fewer cases than another
        probability = (logits / temperature).sigmoid()[known].cpu().numpy()
        mask = inputs.mask[known].cpu().numpy() > 0.5
        rows = feed.cache.rows[inputs.index]
        cases = [feed.cache.cases[row] for row in rows[rows >= 0].tolist()]
        spacing = feed.cache.spacing[inputs.index].repeat_interleave(known.sum(1).to(rows.device), 0).tolist()
        table = _score(cases, probability, mask, spacing, thresholds, tolerance)
        if uncertainty:  # each threshold has a row per case, in the same order
            scores = pd.DataFrame(uncertainty_scores(probability, mask, thresholds[0]))[UNCERTAINTY_COLUMNS]
            table = pd.concat([table, scores], axis=1)
        if saliency:
            table = table.assign(**saliency_scores(probability, mask))
        if slab:
            table["nsd_slab"] = [
                slab_surface_dice(t, p > thresholds[0]) for t, p in zip(mask, probability, strict=True)
            ]
        tables.append(table.assign(seconds=seconds / len(cases)))
    return pd.concat(tables, ignore_index=True)


def outcome_scores(
    model: nn.Module, feed, *, batch: int = 16, device: str | torch.device | None = None
) -> pd.DataFrame:
    """List what a model of outcomes says of each image: risk (its first logit), time in days and event (0 or 1).

    How well risks order patients is no mean of cases: see lib.survival. Raises ValueError where an outcome is unknown.
    """
    tables = []
    for inputs, logits, seconds in predictions(model, feed, batch, device):
        cases = [feed.cache.cases[row] for row in feed.cache.rows[inputs.index, 0].tolist()]
        known = inputs.outcome.isfinite().all(1).tolist()
        if not all(known):
            unknown = cases[known.index(False)]
            raise ValueError(f"Case '{unknown.case_id}' has no outcome: give times and events in its cases.csv.")
        columns = {name: [getattr(case, name) for case in cases] for name in ("dataset", "case_id", "patient_id")}
        time_, event = inputs.outcome.double().cpu().numpy().T
        columns |= {"threshold": 0.5, "risk": logits[:, 0].double().cpu().numpy(), "time": time_, "event": event}
        tables.append(pd.DataFrame(columns).assign(seconds=seconds / len(cases)))
    return pd.concat(tables, ignore_index=True)


@torch.inference_mode()
def predictions(
    model: nn.Module, feed, batch: int = 16, device: str | torch.device | None = None
) -> Iterator[tuple[object, Tensor, float]]:
    """Yield (inputs, float32 logits, the model's wall seconds) batch by batch, with the model in evaluation mode."""
    if device is None:
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    was_training = model.training
    model.to(device).eval()
    try:
        for index in torch.arange(len(feed)).split(batch):
            inputs = feed.batch(index)
            prompts = inputs.prompts_for(model, torch.Generator().manual_seed(int(index[0]))).to(device)
            began = time.perf_counter()
            logits = segment(model, inputs.image.to(device), prompts, getattr(feed, "window", None)).logits.float()
            if torch.device(device).type == "cuda":
                torch.cuda.synchronize(device)
            seconds = time.perf_counter() - began
            if logits.shape != inputs.mask.shape and getattr(model, "learns", "mask") == "mask":
                raise ValueError(
                    f"The model gave logits of shape {tuple(logits.shape)} for masks of shape "
                    f"{tuple(inputs.mask.shape)}: evaluate needs one channel for each case at the size of the mask."
                )
            yield inputs, logits, seconds
    finally:
        model.train(was_training)


def _score(cases, probability, mask, spacing, thresholds, tolerance) -> pd.DataFrame:
    for case, image in zip(cases, probability, strict=True):
        if np.isnan(image).any():
            raise ValueError(f"The model gave NaN logits for case {case.case_id}: check its weights and that image.")
    # At least one pixel wide: a coarse grid has none closer to the boundary.
    band = np.stack([boundary_band(m, max(tolerance, *grid), grid) for m, grid in zip(mask, spacing, strict=True)])
    error = (probability.astype(np.float64) - mask).reshape(len(mask), -1)
    common = {
        "dataset": [case.dataset for case in cases],
        "case_id": [case.case_id for case in cases],
        "patient_id": [case.patient_id for case in cases],
        "ece": calibration_error(probability, mask),
        "ece_band": calibration_error(probability, mask, band),
        "brier": (error**2).mean(1),
    }
    tables = []
    for rank, threshold in enumerate(thresholds):
        prediction = probability > threshold
        surface = np.full((len(mask), 2), np.nan)
        if rank == 0:
            surface[:] = [_surface_scores(*pair, tolerance) for pair in zip(mask, prediction, spacing, strict=True)]
        macro = xbusnet_scores(probability, mask, threshold)
        scores = {
            "threshold": threshold,
            **overlap_scores(mask, prediction),
            "nsd": surface[:, 0],
            "hd95": surface[:, 1],
            "macro_dice": macro["dice"],
            "macro_iou": macro["iou"],
            "xbusnet_fpr": macro["fpr"],
        }
        tables.append(pd.DataFrame(common | scores)[COLUMNS])
    return pd.concat(tables, ignore_index=True)


def _surface_scores(mask, prediction, spacing, tolerance) -> tuple[float, float]:
    if not mask.any() and not prediction.any():
        return 1.0, 0.0
    if not mask.any() or not prediction.any():
        return 0.0, float(np.linalg.norm(np.multiply(mask.shape, spacing)))
    surfaces = surface_distances(mask, prediction, spacing)
    return surface_dice(*surfaces, tolerance), hausdorff(*surfaces)
