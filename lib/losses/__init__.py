"""Training losses, found by the name that an experiment stores.

Losses take logits, never probabilities. The output of a sigmoid or softmax is refused where autograd knows it for
one, and warned of where its values look like it; any other tensor is taken for logits.
"""

import warnings
from collections.abc import Callable
from functools import partial
from importlib import import_module
from inspect import signature

import torch
from torch import Tensor

LOSSES: dict[str, str] = {
    "dice": "lib.losses.overlap:dice",
    "bce": "lib.losses.overlap:bce",
    "dice_bce": "lib.losses.overlap:dice_bce",
    "dice_ce": "lib.losses.overlap:dice_ce",
    "nnunet": "lib.losses.overlap:nnunet",
    "tversky": "lib.losses.overlap:tversky",
    "tversky_specific": "lib.losses.overlap:tversky_specific",
    "adaptive_tversky": "lib.losses.overlap:adaptive_tversky",
    "duplus": "lib.losses.overlap:duplus",
    "xbusnet_dice": "lib.losses.overlap:xbusnet_dice",
    "seu": "lib.losses.seu:seu",
    "seu_binary": "lib.losses.seu:seu_binary",
    "seu_no_entropy": "lib.losses.seu:seu_no_entropy",
    "seu_no_spectral": "lib.losses.seu:seu_no_spectral",
    "uavls_dice": "lib.losses.seu:uavls_dice",
    "uavls_dice_ce": "lib.losses.seu:uavls_dice_ce",
    "info_nce": "lib.losses.contrastive:info_nce",
    "dcl": "lib.losses.contrastive:dcl",
    "hn_nce": "lib.losses.contrastive:hn_nce",
    "dhn_nce": "lib.losses.contrastive:dhn_nce",
    "dhn_nce_released": "lib.losses.contrastive:dhn_nce_released",
    "cox": "lib.losses.survival:cox",
    "cox_efron": "lib.losses.survival:cox_efron",
    "discrete": "lib.losses.survival:discrete",
}


def loss(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the loss function `(logits, mask) -> scalar` of a name such as "tversky" or "tversky@alpha=0.5,beta=0.5".

    What follows the @ sets the function's own numbers; raises ValueError for an unknown name or number.
    """
    stem, _, options = name.partition("@")
    if stem not in LOSSES:
        raise ValueError(f"Unknown loss {name!r}: choose one of {', '.join(sorted(LOSSES))}.")
    module, attribute = LOSSES[stem].split(":")
    function = getattr(import_module(module), attribute)
    if not options:
        return function
    numbers = [option.partition("=") for option in options.split(",")]
    known = [p.name for p in signature(function).parameters.values() if isinstance(p.default, float)]
    try:
        given = {key: float(value) for key, _, value in numbers}
    except ValueError as error:
        raise ValueError(f"Loss {name!r} cannot be read: write {stem}@name=number,name=number.") from error
    if unknown := sorted(given.keys() - set(known)):
        raise ValueError(f"Loss {stem!r} has no number {unknown[0]!r}: it has {', '.join(known) or 'none'}.")
    return partial(function, **given)


def full(logits: Tensor) -> Tensor:
    """Raise logits to float32 or better; raises ValueError for what a sigmoid or softmax gave.

    Without a graph only values can tell, and they are read on the CPU alone, since a GPU would have to wait.
    """
    node = logits.grad_fn
    while node is not None and node.name().startswith(("ToCopy", "View", "Clone", "UnsafeView")):
        node = node.next_functions[0][0]
    if node is not None and node.name().startswith(("Sigmoid", "Softmax")):
        raise ValueError(
            f"This loss takes logits and was given the output of a {node.name().removesuffix('Backward0').lower()}: "
            "give it what went into that, such as Prediction.logits."
        )
    if node is None and logits.device.type == "cpu" and logits.numel():
        low, high = logits.detach().aminmax()
        if low >= 0 and 0 < high <= 1:
            warnings.warn(
                "This loss takes logits, and all that it was given lies between 0 and 1: "
                "if those are probabilities, give it the logits instead.",
                stacklevel=3,
            )
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
