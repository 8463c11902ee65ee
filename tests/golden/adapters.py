"""How this book computes each function of the reference numbers: calls into `lib` and its dependencies, no maths.

An adapter takes a Case and returns its outputs by array name; it serves every case of its function, whatever the
seed, shape and arguments.
"""

import re
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
from lib.losses.contrastive import cosine_similarity, dhn_nce, dhn_nce_released, info_nce
from lib.losses.overlap import adaptive_tversky, bce, dice_ce, duplus, xbusnet_dice, zept_dice
from lib.losses.queries import mask_bce, mask_dice, mp_nce, radzero_mp_nce
from lib.losses.seu import released_dice, released_dice_ce, seu_terms
from lib.models.blocks import GroupNormResidual, ResidualFiLM, UpConv
from lib.models.clip import Tower
from lib.models.coarse import boxes, keep_largest, threshold, two_means
from lib.models.duplus import DuPLUSConfig, FiLM, Gate, build, halved, joined
from lib.models.duplus import Stage as DuPLUSStage
from lib.models.saliency import enlarged, m2ib
from lib.models.sam import SamConfig, SamFeatures, build_sam, from_square, resize, to_square, vit
from lib.models.scan import selective_scan
from lib.models.snapshots import ensemble, entropy, outer_ring, ring_uncertainty
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
from lib.text import Prompts
from lib.training import average_decay, cosine_rate, cyclic_rate, exponential_rate, poly_rate, restart_rate

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
    return {"lr": np.array([poly_rate(case.arguments["lr0"], epoch, epochs) for epoch in range(epochs)])}


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


def _contrast(case, loss):
    """A contrastive loss and its gradients; the reference computed in float64 from what it stores in float32."""
    image, text = (case.tensor(name).double().requires_grad_() for name in ("image", "text"))
    value = loss(image, text)
    gradients = torch.autograd.grad(value, (image, text))
    return value.detach().numpy(), dict(
        zip(("grad_image", "grad_text"), map(torch.Tensor.numpy, gradients), strict=True)
    )


@adapter("symmetric InfoNCE (CLIP) loss")
def symmetric_info_nce(case):
    # The reference's rows are unit vectors already, and its gradient takes them for free.
    tau = 1 / case.arguments["logit_scale_s"]
    loss, gradients = _contrast(case, lambda image, text: info_nce(image @ text.T, tau=tau))
    return {"loss": loss, **gradients}


@adapter(
    "DHN-NCE loss exactly as the official MedCLIP-SAMv2 training code computes it (class in loss/hnl.py and its "
    "open_clip copy; both copies were checked to agree)"
)
def released_dhn_nce(case):
    numbers = {name: case.arguments[name] for name in ("tau", "beta1", "beta2", "alpha")}
    numbers["batch"] = case.arguments["batch_size_arg"]
    loss, gradients = _contrast(case, lambda *pair: dhn_nce_released(cosine_similarity(*pair), **numbers))
    return {"loss": loss, **gradients}


@adapter("DHN-NCE as written in the paper (arXiv 2409.19483v4 Eq. 9-13)")
def published_dhn_nce(case):
    numbers = {name: case.arguments[name] for name in ("tau", "beta1", "beta2")}
    total, _ = _contrast(case, lambda *pair: dhn_nce(cosine_similarity(*pair), **numbers, reduction="sum"))
    mean, gradients = _contrast(case, lambda *pair: dhn_nce(cosine_similarity(*pair), **numbers))
    return {"loss_sum": total, "loss_mean": mean, **gradients}


def _cleaned(case, mask):
    # These cases state their tolerance in words: masks match exactly, centroids to what another start would give.
    case.tolerance = 0.006
    return {"mask": 255 * keep_largest(mask, case.arguments["num_contours_K"])}


@adapter("saliency map -> pseudo mask (kmeans + largest connected components)")
def two_means_clean_up(case):
    mask, centroids = two_means(case.array("sal") / 255)
    return _cleaned(case, mask) | {"centroids": centroids, "midpoint": centroids.mean()}


@adapter("saliency map -> pseudo mask (threshold + largest connected components)")
def threshold_clean_up(case):
    return _cleaned(case, threshold(case.array("sal") / 255, case.arguments["threshold"]))


@adapter("pseudo mask -> SAM box prompts")
def box_prompts(case):
    masks = case.array("masks")
    each = [sorted(boxes(mask, union=False).tolist()) for mask in masks]
    counts = [len(found) for found in each]
    return {
        "box_union": np.concatenate([boxes(mask) for mask in masks]),
        "n_contours": np.array(counts),
        "boxes_multi": np.concatenate(each),
        "boxes_multi_offset": np.cumsum([0, *counts]),
    }


@adapter("cyclic polynomial learning rate of the MedCLIP-SAMv2 nnU-Net (one value per epoch e=0..E-1)")
def cyclic_learning_rate(case):
    rates = {}
    for given in case.arguments:
        settings = (given["max_epochs_E"], given["cycles_C"], given["gamma"])
        rates[f"lr_{given['index']}"] = np.array(
            [cyclic_rate(given["initial_lr"], epoch, *settings) for epoch in range(settings[0])]
        )
    return rates


@adapter("SAM image encoder (ViT with windowed attention and decomposed relative positions), small configuration")
def sam_image_encoder(case):
    given = {"decoder_width" if name == "out_channels" else name: value for name, value in case.arguments.items()}
    encoder = vit(SamConfig(**given)).double()
    names = [name for name in case.arrays if name.startswith("param:")]
    encoder.load_state_dict({name.removeprefix("param:"): case.tensor(name) for name in names})
    with torch.no_grad():
        return {"y": encoder(case.tensor("x")).numpy()}


@adapter("SAM prompt encoder + mask decoder, small configuration")
def sam_prompt_decoder(case):
    given, side = case.arguments, case.arguments["model_input"]
    sam = build_sam(
        "tiny",
        image_size=side,
        patch=side // given["grid"],
        decoder_width=given["width_E"],
        decoder_heads=given["heads"],
        decoder_mlp=given["mlp_dim"],
        mask_channels=len(case.parameters("prompt")["mask_downscaling.3.bias"]),
        multimask=3,
        rasterise=False,
    )
    sam.prompt_encoder.load_state_dict(case.parameters("prompt"))
    sam.mask_decoder.load_state_dict(case.parameters("decoder"))
    # The released prompt encoder counts in float32.
    embedding = case.tensor("image_embedding").float().expand(given["prompts"], -1, -1, -1)
    points, boxes = (case.tensor("points").float(), case.tensor("labels")), case.tensor("boxes").float()
    outputs = {"dense_pe": sam.prompt_encoder.get_dense_pe()}
    with torch.no_grad():
        for name, prompt in {"points": (points, None), "boxes": (None, boxes), "both": (points, boxes)}.items():
            outputs[f"sparse_{name}"] = sam.prompt_encoder(*prompt, None)[0]
            outputs[f"masks_{name}"], outputs[f"iou_{name}"] = sam.predict_masks(embedding, *prompt)
    return {name: value.numpy() for name, value in outputs.items()}


@adapter("SAM pre- and post-processing")
def sam_pre_and_post_processing(case):
    sam = build_sam("tiny", image_size=case.arguments["S"])
    image = case.tensor("image").permute(2, 0, 1)[None] / 255
    square, inner = sam.prepare(image)
    features = SamFeatures(square, tuple(image.shape[2:]), inner)
    logits = from_square(case.tensor("low_res"), case.arguments["S"], features)
    return {
        "resized": (255 * resize(image, inner)).round().byte()[0].permute(1, 2, 0).numpy(),
        "model_input": square[0].numpy(),
        "coords_out": to_square(case.tensor("coords"), features).numpy(),
        "boxes_out": to_square(case.tensor("boxes"), features).numpy(),
        "mask_logits": logits.numpy(),
        "mask": (logits > 0).numpy(),
    }


@adapter(
    "M2IB (multi-modal information bottleneck) vision saliency: per-token/channel bottleneck optimised at one ViT block"
)
def m2ib_saliency(case):
    arguments = case.arguments
    weights = {
        name.removeprefix("param:"): case.tensor(name).double() for name in case.arrays if name.startswith("param:")
    }
    tower = Tower.from_hf(weights, arguments["heads"])
    with torch.no_grad():
        image = tower.tokens(case.tensor("image").double())
        hidden = tower.run(image, 0, arguments["layer_idx"] + 1)
        clean = tower.feature(tower.run(image))
    found = m2ib(
        tower,
        hidden,
        case.tensor("text_feature"),
        layer=arguments["layer_idx"],
        beta=arguments["beta"],
        steps=arguments["steps"],
        copies=arguments["noise_batch"],
        lr=arguments["adam_lr"],
        noise=case.tensor("eps").double(),
    )
    return {
        "image_feature_clean": clean.numpy(),
        "hidden_at_layer": hidden.numpy(),
        "losses": found.losses[:, 0].numpy(),
        "alpha_final": found.alpha.numpy(),
        "capacity_last": found.capacity[0].numpy(),
        "token_saliency": found.patches.flatten().numpy(),
        "saliency_224": enlarged(found.patches, (224, 224))[0].numpy(),
    }


@adapter("checkpoint ensemble: mask, entropy map, uncertainty score")
def checkpoint_ensemble(case):
    mean = ensemble(case.tensor("fg_prob"))
    ring = outer_ring(mean > 0.2)
    return {
        "mask": (mean > 0.2).numpy().astype(np.uint8),
        "entropy": entropy(mean).numpy(),
        "score": np.array(ring_uncertainty(mean, 0.2, released=True)),
        "ring_pixels": np.array(int(ring.sum())),
    }


@adapter("DuPLUS segmentation losses")
def duplus_losses(case):
    labelled = case.tensor("tgt_idx") < case.arguments["K"] - 1  # the last index is the padding class

    def value(function):
        logits = case.tensor("logits", grad=True)
        return _scalar_with_gradient(
            function(logits[labelled][:, None], case.tensor("mask")[labelled][:, None]), logits
        )

    (dice_loss, grad_dice), (bce_loss, grad_bce) = value(adaptive_tversky), value(bce)
    outputs = {"dice_loss": dice_loss, "grad_dice": grad_dice, "bce_loss": bce_loss, "grad_bce": grad_bce}
    return outputs | {"total": value(duplus)[0]}


@adapter("exponential moving average of the weights")
def duplus_average(case):
    average, steps = case.tensor("ema0").clone(), []
    for step, weights in enumerate(case.tensor("params")):
        average.lerp_(weights, 1 - average_decay(case.arguments["alpha"], step))
        steps.append(average.clone())
    return {"ema": torch.stack(steps).numpy()}


@adapter("DuPLUS learning-rate schedules, one value per epoch (columns: main group, text/LoRA group)")
def duplus_rates(case):
    outputs = {}
    for given in case.arguments:
        base, warmup, epochs = given["base_lr"], given["warmup_epochs"], given["max_epochs"]
        for name, rate, share in (
            ("cosine_restart", restart_rate, 0.1),
            ("cosine", cosine_rate, 1),
            ("exp", exponential_rate, 1),
        ):
            rates = np.array([rate(base, epoch, warmup, epochs) for epoch in range(epochs)])
            outputs[f"{name}_{given['index']}"] = np.stack([rates, rates * share], 1)
    return outputs


@adapter("text modulation of a 3-D feature map: FiLM and text-generated spatial gate")
def duplus_modulation(case):
    x, text = case.tensor("x"), case.tensor("prompt")
    film, gate = (kind(text.shape[1], x.shape[1], 256).double() for kind in (FiLM, Gate))
    film.load_state_dict(case.parameters("film"))
    gate.load_state_dict(case.parameters("dyn"))
    with torch.no_grad():
        outputs = {"y_film": film(x, text), "gate": gate.map(x, text), "y_gate": gate(x, text)}
    return {name: value.numpy() for name, value in outputs.items()}


DUPLUS_NAMES = (  # the released name of a tensor -> its name here
    (r"^inc_ct\.conv1\.", "stems.0.conv."),
    (r"^inc_mr\.conv1\.", "stems.1.conv."),
    (r"^inc_pet\.conv1\.", "stems.2.conv."),
    (r"^inc_ct\.conv2\.", "stems.0.block."),
    (r"^inc_mr\.conv2\.", "stems.1.block."),
    (r"^inc_pet\.conv2\.", "stems.2.block."),
    (r"^(down|up)(\d?)\.block_list\.(\d)\.", lambda m: f"{m[1]}s.{int(m[2] or 1) - 1}.{int(m[3]) - (m[1] == 'down')}."),
    (r"(conv1|conv2|shortcut)\.conv\.weight$", r"\1.weight"),
    (r"\.(film|dynamic_conv)\.", ".modulation."),
    (r"^precls_conv\.", "before_head."),
)


def _duplus_weights(case):
    """The case's weights by their names here."""
    weights = {}
    for released in [name.removeprefix("param:") for name in case.arrays if name.startswith("param:")]:
        name = released
        for pattern, ours in DUPLUS_NAMES:
            name = re.sub(pattern, ours, name)
        weights[name] = case.tensor(f"param:{released}")
    if "controller.weight" in weights:  # a convolution of a single voxel there, a linear layer here
        weights["controller.weight"] = weights["controller.weight"].flatten(1)
    return weights


@adapter("one encoder stage and the matching decoder stage with text modulation = film")
@adapter("one encoder stage and the matching decoder stage with text modulation = gate")
def duplus_stage(case):
    x, text = case.tensor("x"), case.tensor("prompt")
    given = case.arguments
    inputs, outputs, blocks = given["C_in"], given["C_out"], given["num_block"]
    config = DuPLUSConfig(text_dim=given["prompt_dim"], modulation=given["modulation"])
    stages = {
        "downs.0.": DuPLUSStage(config, inputs, outputs, blocks).double(),
        "ups.0.": DuPLUSStage(config, inputs + outputs, inputs, blocks).double(),
    }
    weights = _duplus_weights(case)
    for start, stage in stages.items():
        stage.load_state_dict({n.removeprefix(start): t for n, t in weights.items() if n.startswith(start)})
    with torch.no_grad():
        down = stages["downs.0."](halved(x), text)
        up = stages["ups.0."](joined(down, x), text)
    return {"y_down": down.numpy(), "y_up": up.numpy()}


@adapter("complete DuPLUS segmentation network on a small configuration, text modulation = film")
def duplus_network(case):
    base, classes = case.arguments["base_channels_b"], case.arguments["classes"]
    width = case.arguments["embedding_width"]
    channels = tuple(base * times for times in (1, 2, 4, 8, 10))
    model = build(channels=channels, blocks=1, text_dim=width, modulation=case.arguments["modulation"]).double()
    absent = model.load_state_dict(_duplus_weights(case), strict=False)
    assert not absent.unexpected_keys  # what we have beside: nulls, standardisation and the modalities' words
    assert {name.split(".")[0] for name in absent.missing_keys} == {"modalities", "context", "target"}
    words = torch.eye(3, width)
    model.modalities.copy_(words)
    texts = {
        "context": case.tensor("t1").repeat_interleave(classes, 0),
        "target": case.tensor("t2").flatten(0, 1),
        "attribute.modality": words[case.tensor("modality")].repeat_interleave(classes, 0),
    }
    present = {role: torch.ones(len(text), dtype=torch.bool) for role, text in texts.items()}
    prompts = Prompts({role: text.float() for role, text in texts.items()}, present)
    with torch.no_grad():
        return {"logits": model.eval()(case.tensor("x"), prompts).logits.numpy()}


# ---- Malenia ----------------------------------------------------------------------------------------------


@adapter("Mask2Former mask losses on matched query masks")
def mask2former(case):
    outputs = {}
    for name, loss in (("dice", mask_dice), ("ce", mask_bce)):
        logits = case.tensor("logits", grad=True)
        outputs[name], outputs[f"grad_{name}"] = _scalar_with_gradient(loss(logits, case.tensor("mask")), logits)
    return outputs


@adapter("multi-positive NCE over a similarity matrix (UniCLIP form and sum forms)")
def radzero(case):
    outputs = {}
    for row in (False, True):
        for column in (False, True):
            similarity = case.tensor("sim", grad=True)
            loss = radzero_mp_nce(similarity, case.tensor("group"), case.arguments["tau"], row, column)
            name = f"r{row:d}c{column:d}"
            outputs[f"loss_{name}"], outputs[f"grad_{name}"] = _scalar_with_gradient(loss, similarity)
    return outputs


@adapter(
    "MP-NCE between K matched mask tokens and their A attribute embeddings, one documented reading of Malenia's loss"
)
def malenia_mp_nce(case):
    tokens, bank = case.tensor("mask_tokens", grad=True), case.tensor("text_bank", grad=True)
    value = case.tensor("attribute_value")
    lesions, attributes = value.shape
    texts = torch.stack([bank[a, value[:, a]] for a in range(attributes)], 1).flatten(0, 1)  # [K·A, D]
    similarity = torch.nn.functional.normalize(tokens, dim=1) @ torch.nn.functional.normalize(texts, dim=1).T
    differs = (value[:, None] != value[None]).flatten(1)
    own = torch.eye(lesions, dtype=torch.bool).repeat_interleave(attributes, 1)
    loss = mp_nce(similarity, own, differs, case.arguments["tau"])
    grad_tokens, grad_bank = torch.autograd.grad(loss, (tokens, bank))
    negatives = differs.view(lesions, lesions, attributes)
    outputs = {"loss": loss.detach(), "grad_tokens": grad_tokens, "grad_bank": grad_bank, "negatives_mask": negatives}
    return {name: tensor.numpy() for name, tensor in outputs.items()}
