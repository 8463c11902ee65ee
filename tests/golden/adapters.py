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
from lib.losses.seu import released_dice, released_dice_ce, seu_terms
from lib.models.blocks import GroupNormResidual, ResidualFiLM, UpConv
from lib.models.scan import selective_scan
from lib.models.uavls import (
    MoDAB,
    SSMix,
    Stage,
    SubpixelHead,
    UAVLSConfig,
    Words,
    positions,
    released_input,
    released_name,
)

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


@adapter("selective state-space scan (reference)")
def mamba_scan(case, method=None):
    names = [name for name in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias") if name in case.arrays]
    given = {name: case.tensor(name, grad=True) for name in names}
    y, last = selective_scan(**given, softplus=case.arguments["softplus"], method=method)
    sources = {name: given[name] for name in ("u", "delta", "A", "B", "C")}
    return _value_and_gradients(case, y, **sources) | {"last_state": last.detach().numpy()}


def _value_and_gradients(case, y, **sources):
    gradients = torch.autograd.grad((y * case.tensor("cotangent")).sum(), list(sources.values()))
    named = zip(sources, gradients, strict=True)
    return {"y": y.detach().numpy(), **{f"grad_{name}": gradient.numpy() for name, gradient in named}}


def _released(module, case, part="", ours=""):
    """Fill a part of UA-VLS with the case's weights, which have the released names below `part`; ready to judge."""
    names = [name.removeprefix("param:") for name in case.arrays if name.startswith("param:")]
    tensors = {released_name(part + name).removeprefix(ours): case.tensor(f"param:{name}") for name in names}
    module.double().eval().load_state_dict(tensors)
    return module


@adapter("SSMix text layer")
def ssmix(case):
    x = case.tensor("x", grad=True)
    layer = SSMix(x.shape[2], x.shape[1], case.arguments["L_out"])
    return _value_and_gradients(case, _released(layer, case)(x), x=x)


@adapter("MoDAB block (modality decoding attention block), evaluation mode, dropout off")
def modab(case):
    x, text = case.tensor("x", grad=True), case.tensor("txt", grad=True)
    width, length = x.shape[2], case.arguments["L_out"]
    block = MoDAB(UAVLSConfig(text_dim=text.shape[2]), width, length)
    y, _ = _released(block, case)(x, text)
    return _value_and_gradients(case, y, x=x, txt=text) | _places(x.shape[1], length, width)


def _places(visual, length, width):
    return {"pe_vis_rows": positions(visual, width).numpy(), "pe_txt_rows": positions(length, width).numpy()}


@adapter(
    "guide decoder layer of the Ariadne/LanGuide parent model (the UA-VLS ablation 'without SSMix' is close to it)"
)
def languide_block(case):
    x, text = case.tensor("x"), case.tensor("txt")
    width, length = x.shape[2], case.arguments["L_out"]
    config = UAVLSConfig(text_dim=text.shape[2], mixer="linear", self_attention="languide")
    with torch.no_grad():
        y, _ = _released(MoDAB(config, width, length), case)(x, text)
    return {"y": y.numpy(), **_places(x.shape[1], length, width)}


@adapter("one decoder stage: MoDAB -> 2x up-sampling -> skip concatenation -> two conv-BN-LeakyReLU, evaluation mode")
def uavls_stage(case):
    given, side = case.arguments, case.arguments["S"]
    x = case.tensor("vis").transpose(1, 2).unflatten(2, (side, side))
    skip = case.tensor("skip").transpose(1, 2).unflatten(2, (2 * side, 2 * side))
    config = UAVLSConfig(text_dim=given["text_dim"])
    stage = _released(Stage(config, given["C"], given["C_out"], given["L_out"]), case, "decoder4.", "stages.2.")
    words = Words(case.tensor("txt"), torch.ones(len(x), dtype=torch.bool))
    with torch.no_grad():
        outputs = {"y": stage(x, skip, words)[0], "y_no_text": stage(x, skip, None)[0]}
    return {name: value.flatten(2).transpose(1, 2).numpy() for name, value in outputs.items()}


@adapter("final head: sub-pixel up-sampling + 1x1 conv + sigmoid")
def uavls_head(case):
    x = case.tensor("x")
    head = _released(SubpixelHead(x.shape[1], case.arguments["o"], 1), case, ours="head.")
    assert head.factor == case.arguments["k"]
    with torch.no_grad():
        return {"mid": head.upsample(x).numpy(), "y": head(x).sigmoid().numpy()}


@adapter("SEU loss (spectral + entropic uncertainty)")
def seu_loss(case):
    probability = case.tensor("prob", grad=True)
    terms = seu_terms(probability, case.tensor("target"))
    total = terms.weighted(case.arguments["lambda_F"], case.arguments["lambda_E"])
    loss, gradient = _scalar_with_gradient(total, probability)
    named = {"dice_term": terms.dice, "fourier_term": terms.spectral, "entropy_term": terms.entropy}
    return {"loss": loss, "grad_prob": gradient, **{name: term.detach().numpy() for name, term in named.items()}}


@adapter(
    "the loss that the published UA-VLS training script actually switches on: MONAI Dice+CE with all defaults, fed "
    "with already-sigmoided one-channel probabilities"
)
def uavls_dice_ce(case):
    probability, target = case.tensor("prob", grad=True), case.tensor("target")
    loss, gradient = _scalar_with_gradient(released_dice_ce(probability, target), probability)
    return {"loss_new": loss, "grad_new": gradient, "loss_old": released_dice(probability, target).detach().numpy()}


@adapter("UA-VLS test-time preprocessing of one image and its mask")
def uavls_input(case):
    x, y = released_input(case.array("image"), case.array("gt"), case.arguments["S"])
    return {"x": x.numpy(), "y": y.numpy()}
