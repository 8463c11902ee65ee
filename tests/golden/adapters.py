"""How this book computes each function of the reference numbers: calls into `lib` and its dependencies, no maths.

An adapter takes a Case and returns its outputs by array name; it serves every case of its function, whatever the
seed, shape and arguments.
"""

from collections.abc import Callable

import numpy as np
import torch
from monai.data.utils import compute_importance_map
from monai.inferers import sliding_window_inference

from lib.evaluation import (
    hausdorff,
    region_metrics,
    surface_dice,
    surface_distances,
    surface_element_sizes,
    xbusnet_scores,
)
from lib.losses.overlap import dice_ce, xbusnet_dice, zept_dice
from lib.models.blocks import GroupNormResidual, ResidualFiLM, UpConv

ADAPTERS: dict[str, Callable] = {}
# Who will bring the adapter of a function, by the first word of its cases' names.
CHAPTERS = {
    "clip": "MedCLIP-SAMv2",
    "dhnnce": "MedCLIP-SAMv2",
    "duplus": "DuPLUS",
    "languide": "UA-VLS",
    "m2ib": "MedCLIP-SAMv2",
    "malenia": "Malenia",
    "mamba": "UA-VLS",
    "mask2former": "Malenia",
    "mcs": "MedCLIP-SAMv2",
    "radzero": "Malenia",
    "sam": "MedCLIP-SAMv2",
    "uavls": "UA-VLS",
    "xbusnet": "NullBUS",
    "zept": "Malenia",
}


def adapter(function: str) -> Callable[[Callable], Callable]:
    """Register the adapter of this function; a function has exactly one."""

    def register(compute: Callable) -> Callable:
        if function in ADAPTERS:
            raise ValueError(f"Two adapters for {function!r}: keep one.")
        ADAPTERS[function] = compute
        return compute

    return register


def _scalar_with_gradient(loss: torch.Tensor, source: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    (gradient,) = torch.autograd.grad(loss, source)
    return loss.detach().numpy(), gradient.numpy()


@adapter("surface-distance metrics")
def surface_distance_metrics(case):
    spacing = tuple(case.arguments["spacing"])
    rows = []
    for truth, prediction in zip(case.array("gt"), case.array("pred"), strict=True):
        of_truth, of_prediction = pair = surface_distances(truth, prediction, spacing)
        scores = {
            "DSC": region_metrics(truth, prediction, [True])["Dice"][0],
            "ASD gt->pred": of_truth.mean(),
            "ASD pred->gt": of_prediction.mean(),
        }
        scores |= {f"HD{percent}": hausdorff(*pair, percent) for percent in (95, 100)}
        for tolerance in case.arguments["tolerances"]:
            scores[f"NSD@{tolerance}"] = surface_dice(*pair, tolerance)
            scores[f"overlap gt@{tolerance}"] = of_truth.overlap(tolerance)
            scores[f"overlap pred@{tolerance}"] = of_prediction.overlap(tolerance)
        rows.append([scores[column] for column in case.columns])
    return {"metrics": np.array(rows), "area_table": surface_element_sizes(spacing)}


@adapter("per-image DSC and NSD exactly as the official MedCLIP-SAMv2 evaluation computes them for 2-D images")
def one_slice_surface_dice(case):
    cube = (1.0, 1.0, 1.0)
    pairs = list(zip(case.array("gt"), case.array("pred"), strict=True))
    surfaces = [surface_distances(truth[..., None], prediction[..., None], cube) for truth, prediction in pairs]
    return {
        "dsc": np.array([region_metrics(*pair, [True])["Dice"][0] for pair in pairs]),
        "nsd": np.array([surface_dice(*pair, case.arguments["tolerance"]) for pair in surfaces]),
        "area_table": surface_element_sizes(cube),
    }


@adapter("nnU-Net label/region metrics for one case")
def nnunet_region_metrics(case):
    ignored = case.arguments["ignore_label"]
    table = region_metrics(case.array("ref"), case.array("pred"), case.arguments["regions"], ignored)
    return {"metrics": table[case.columns].to_numpy(float)}


@adapter("UA-VLS / LanGuide test metrics")
def pooled_metrics(case):
    scores = region_metrics(case.array("target"), case.array("prob") > 0.5, [True])
    return {"dice": scores["Dice"][0], "iou": scores["IoU"][0]}


@adapter("per-image scores as the XBusNet evaluation computes them")
def xbusnet_metrics(case):
    return {"scores": np.stack(list(xbusnet_scores(case.array("prob"), case.array("mask")).values()), axis=1)}


@adapter("soft Dice loss of XBusNet")
def xbusnet_softdice(case):
    logits = case.tensor("logits", grad=True)
    loss, gradient = _scalar_with_gradient(xbusnet_dice(logits, case.tensor("mask")), logits)
    return {"loss": loss, "grad": gradient}


@adapter("binary Dice loss of ZePT / CLIP-driven universal model family")
def zept_binary_dice(case):
    probability = case.tensor("prob", grad=True)
    loss, gradient = _scalar_with_gradient(zept_dice(probability, case.tensor("mask")), probability)
    return {"loss": loss, "grad": gradient}


@adapter("nnU-Net Dice + cross-entropy loss (both Dice variants)")
def nnunet_dice_ce(case):
    logits = case.tensor("logits", grad=True)
    chosen = {name: case.arguments[name] for name in ("batch_dice", "do_bg", "smooth", "ignore_label")}
    loss, gradient = _scalar_with_gradient(dice_ce(logits, case.tensor("target"), **chosen), logits)
    # The official code has a second variant that saves memory; ours is one function for both.
    return {"loss_soft": loss, "loss_mem": loss, "grad_soft": gradient, "grad_mem": gradient}


@adapter("nnU-Net polynomial learning rate")
def nnunet_polynomial_rate(case):
    epochs = case.arguments["E"]
    optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=case.arguments["lr0"])
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimiser, total_iters=epochs, power=0.9)
    rates = []
    for _ in range(epochs):
        rates += schedule.get_last_lr()
        optimiser.step()
        schedule.step()
    return {"lr": np.array(rates)}


@adapter("Gaussian-weighted sliding-window inference")
def gaussian_sliding_window(case):
    window, scale = case.arguments["roi"], case.arguments["sigma_scale"]
    blended = sliding_window_inference(
        case.tensor("x"),
        roi_size=window,
        sw_batch_size=1,
        predictor=lambda patch: patch - patch.mean(),
        overlap=case.arguments["overlap"],
        mode="gaussian",
        sigma_scale=scale,
    )
    return {"y": blended.numpy(), "importance": compute_importance_map(window, "gaussian", scale).numpy()}


@adapter(
    "XBusNet building blocks: SFA (text FiLM with residual), decoder up-block, fusion residual block; evaluation mode"
)
def xbusnet_blocks(case):
    x, text, skip = case.tensor("x"), case.tensor("text"), case.tensor("skip")
    channels = x.shape[1]
    weights = {name: case.parameters(name) for name in ("sfa", "up", "res")}
    blocks = {
        "sfa": ResidualFiLM(text.shape[1], channels),
        "up": UpConv(channels, skip.shape[1]),
        "res": GroupNormResidual(channels, weights["res"]["in_layers.2.weight"].shape[0]),
    }
    for name, block in blocks.items():
        # The reference stores no step counter of its batch norms, which evaluation does not read.
        absent = block.double().eval().load_state_dict(weights[name], strict=False)
        assert not absent.unexpected_keys
        assert all(key.endswith("num_batches_tracked") for key in absent.missing_keys)
    with torch.no_grad():
        outputs = {"y_sfa": blocks["sfa"](x, text), "y_up": blocks["up"](x, skip), "y_res": blocks["res"](x)}
    return {name: value.numpy() for name, value in outputs.items()}
