"""Training losses, found by the name that an experiment stores."""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from inspect import signature

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
