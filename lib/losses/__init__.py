"""Training losses, found by the name that an experiment stores."""

from collections.abc import Callable
from importlib import import_module

from torch import Tensor

LOSSES: dict[str, str] = {
    "dice": "lib.losses.overlap:dice",
    "bce": "lib.losses.overlap:bce",
    "dice_bce": "lib.losses.overlap:dice_bce",
    "dice_ce": "lib.losses.overlap:dice_ce",
    "tversky": "lib.losses.overlap:tversky",
    "tversky_specific": "lib.losses.overlap:tversky_specific",
    "xbusnet_dice": "lib.losses.overlap:xbusnet_dice",
}


def loss(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the loss function `(logits, mask) -> scalar` of this name."""
    if name not in LOSSES:
        raise ValueError(f"Unknown loss {name!r}: choose one of {', '.join(sorted(LOSSES))}.")
    module, function = LOSSES[name].split(":")
    return getattr(import_module(module), function)
