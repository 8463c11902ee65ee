"""One fit() for every model, in which a kill costs nothing but the time since the last validation.

All randomness of a step is a function of (seed, step): which cases, how they are augmented, which prompts
are dropped, which units a dropout layer silences. There is no generator state to lose, so a resumed run
repeats the uninterrupted one bit by bit on the same device.
"""

import hashlib
import io
import math
import os
import pickle
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import pandas as pd
import psutil
import torch
from torch import Tensor, nn
from tqdm import tqdm

from lib.data import Batch, Feed
from lib.files import atomic_write
from lib.models import Prediction, segment

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
SCHEDULES = ("cosine", "restart", "exponential", "poly", "cyclic", "cyclic_full")
OPTIMIZERS = ("adamw", "sgd", "lamb")


@dataclass(frozen=True)
class Budget:
    """How long and how fast a model learns."""

    steps: int = 500
    batch: int = 8
    lr: float = 1e-3
    weight_decay: float = 1e-4
    warmup: float = 0.05  # share of the steps with a linearly rising learning rate
    clip: float = 1.0  # largest gradient norm
    ema: float | None = None  # decay of a weight average, which is then what is validated and kept
    validate_every: int = 50
    patience: int | None = None  # validations without improvement before stopping
    precision: str = "32-true"
    optimizer: str = "adamw"  # or "sgd" with Nesterov momentum .99, as nnU-Net does, or "lamb"
    schedule: str = "cosine"  # of the learning rate after the warm-up, see learning_rate
    cycles: int = 1  # of a cyclic schedule
    gamma: float = 0.8  # share of a cycle after which its learning rate stays
    snapshots: int = 0  # validated weights kept of each cycle, the last ones

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "validate_every", "lr", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"Budget.{name} is {getattr(self, name)!r}: give a number above 0.")
        for name, known in (("precision", PRECISIONS), ("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
            if getattr(self, name) not in known:
                raise ValueError(f"Budget.{name} is {getattr(self, name)!r}: use one of {', '.join(known)}.")
        if self.cycles < 1 or self.steps % self.cycles or (self.cycles > 1 and not self.schedule.startswith("cyclic")):
            raise ValueError(
                f"Budget.cycles is {self.cycles} for {self.steps} steps of the schedule '{self.schedule}': "
                "give a number that divides the steps, and 1 unless the schedule is cyclic."
            )
        if not 0 < self.gamma <= 1:
            raise ValueError(f"Budget.gamma is {self.gamma!r}: give a share above 0 and up to 1.")
        if not 0 <= self.snapshots * self.validate_every <= self.steps // self.cycles:
            raise ValueError(
                f"Budget.snapshots is {self.snapshots}, but a cycle of {self.steps // self.cycles} steps is validated "
                f"every {self.validate_every}: ask for fewer or validate more often."
            )


@dataclass
class Fit:
    """What a training leaves beside the weights."""

    log: pd.DataFrame  # one row per validation: step, lr, loss (mean since the last row), valid_score
    best_step: int
    seconds: float  # summed over resumes
    peak_memory_mb: float
    resumed_at: int
    snapshots: list[dict[str, Tensor]]  # Budget.snapshots states of each cycle, in order, without frozen parameters

    @classmethod
    def none(cls) -> "Fit":
        """Of a model without anything to train."""
        return cls(pd.DataFrame(columns=["step", "lr", "loss", "valid_score"]), 0, 0.0, 0.0, 0, [])


def stream(seed: int, use: str, number: int) -> int:
    """Derive the 32-bit seed of one use of randomness, such as the augmentation of step 7."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{use}/{number}".encode()).digest()[:4], "big")


def order(seed: int, cases: int, batch: int, step: int) -> Tensor:
    """Case indices of one step; shuffled epochs follow each other without a gap, so every batch is full."""
    positions = range(step * batch, (step + 1) * batch)
    epochs = {
        epoch: torch.randperm(cases, generator=torch.Generator().manual_seed(stream(seed, "order", epoch)))
        for epoch in {position // cases for position in positions}
    }
    return torch.stack([epochs[position // cases][position % cases] for position in positions])


def learning_rate(budget: Budget, step: int) -> float:
    """Linear warm-up, then the schedule: "cosine" and "poly" (nnU-Net) fall to zero, cyclic ones in each cycle anew.

    "restart" and "exponential" are DuPLUS's other two (see restart_rate, exponential_rate). "cyclic" is
    MedCLIP-SAMv2's as released, where a cycle ends hardly below its start; in "cyclic_full" a cycle decays over its own
    length, as snapshots of different optima would need.
    """
    steps, lr = budget.steps, budget.lr
    warm = max(1, round(budget.warmup * steps))
    if budget.schedule == "exponential":
        return exponential_rate(lr, step, warm, steps)
    if step < warm:
        return lr * (step + 1) / warm
    if budget.schedule == "cosine":
        return cosine_rate(lr, step, warm, steps)
    if budget.schedule == "restart":
        return restart_rate(lr, step, warm, steps)
    # The other schedules have no warm-up where they come from, and count from the first step.
    if budget.schedule == "poly":
        return poly_rate(lr, step, steps)
    if budget.schedule == "cyclic":
        return cyclic_rate(lr, step, steps, budget.cycles, budget.gamma, inside=lr)
    length = steps // budget.cycles
    return poly_rate(lr, min(step % length, int(budget.gamma * length)), length)


def cosine_rate(initial: float, epoch: int, warmup: int, epochs: int) -> float:
    """Learning rate that rises over the warm-up and then falls to zero along half a cosine."""
    if epoch < warmup:
        return initial * (epoch + 1) / warmup
    return initial * 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / max(1, epochs - warmup)))


def restart_rate(initial: float, epoch: int, warmup: int, epochs: int, floor: float = 0.01) -> float:
    """DuPLUS's "cosine_restart": a cosine over the first half, a rise over an eighth of the rest, a cosine to 1 %.

    The released code counts 200 of 400 epochs and ten of warm-up; here these are the halves and a fortieth of any
    length. Source: BioMedIA-MBZUAI/DuPLUS @924beb3, training/utils.py.
    """
    half, second = epochs // 2, max(1, epochs // 40)
    if epoch < half:
        return cosine_rate(initial, epoch, warmup, half)
    since = epoch - half
    if since < second:
        return initial * (floor + (1 - floor) * since / second)
    fallen = 0.5 * (1 + math.cos(math.pi * (since - second) / max(1, epochs - half - second)))
    return initial * max(floor, fallen)


def exponential_rate(initial: float, epoch: int, warmup: int, epochs: int) -> float:
    """DuPLUS's "exp": an exponential warm-up to the rate, then (1 - epoch / epochs)^0.9 of it (same source)."""
    if epoch <= warmup:
        return initial * 2.718 ** (10 * (epoch / warmup - 1))  # the released code writes e so
    return poly_rate(initial, epoch, epochs)


def average_decay(limit: float, step: int) -> float:
    """How much of a weight average stays at step 0, 1, ...: nothing of its random start, later `limit`.

    Source: BioMedIA-MBZUAI/DuPLUS @924beb3, training/utils.py.
    """
    return min(1 - 1 / (step + 1), limit)


def poly_rate(initial: float, epoch: int, epochs: int) -> float:
    """Learning rate of nnU-Net, initial (1 - epoch / epochs)^0.9 (MIC-DKFZ/nnUNet, training/lr_scheduler)."""
    return initial * (1 - epoch / epochs) ** 0.9


def cyclic_rate(initial: float, epoch: int, epochs: int, cycles: int, gamma: float, inside: float = 0.01) -> float:
    """Learning rate of the MedCLIP-SAMv2 nnU-Net as released (weak_segmentation, lr_scheduler/polylr.py).

    It falls until the share gamma of a cycle and then stays, but on the scale of all epochs, hence only a little.
    """
    if cycles == 1:
        return poly_rate(initial, epoch, epochs)
    length = epochs // cycles
    within = epoch % length
    # Past the first epoch of a cycle the released code puts the constant .01 in the place of its initial rate. The two
    # are equal in the paper; learning_rate gives the rate that was asked for as both, so that any rate has the shape.
    return initial if within == 0 else poly_rate(inside, min(within, int(gamma * length)), epochs)


def labelled(logits: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The labelled structures of a batch as images of one class each: [B, K, *S] twice -> [n, 1, *S] twice.

    A loss then treats a volume's K structures like K images, and what is not labelled (-1) reaches none.
    """
    if mask.shape[1] == 1:
        return logits, mask
    known = mask.flatten(2)[..., 0] >= 0
    return logits[known][:, None], mask[known][:, None]


def foreground_dice(logits: Tensor, mask: Tensor) -> Tensor:
    """Dice [B] at probability 0.5, averaged over the labelled structures of an image; both empty = 1."""
    predicted, true = (logits > 0).flatten(2), (mask > 0.5).flatten(2)
    known = mask.flatten(2)[..., 0] >= 0
    total = predicted.sum(2) + true.sum(2)
    dice = torch.where(total == 0, 1.0, 2 * (predicted & true).sum(2) / total.clamp(min=1))
    return (dice * known).sum(1) / known.sum(1)


def fit(
    model: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    train: Feed,
    valid: Feed,
    budget: Budget,
    *,
    seed: int,
    prompt_dropout: float = 0.0,
    checkpoint: Path | None = None,
    device: str | torch.device | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> Fit:
    """Train until the budget or the patience ends, and leave the model with its best validation weights.

    loss takes (logits, mask); on_step is called with (steps done, loss). A checkpoint is written at every
    validation and continued from when it exists; removing it is the caller's decision. A model that has
    `score(prediction, batch) -> [B]` is validated by it, and one that has `draw(mask, generator)` gets the prompts
    that it draws in place of those of the feed. Where a model has `learns = "outcome"`, the loss takes the outcomes in
    place of the masks; one that has `objective(batch, loss) -> scalar` learns by that, as where masks are matched to
    tokens. Validation volumes are read in windows of the feed's size.
    Raises FloatingPointError when the loss or its gradient stop being finite, ValueError for dropout of drawn prompts.
    """
    # Imported here because it costs seconds, which a reader of cached runs need not pay.
    from lightning.fabric import Fabric

    draw = getattr(model, "draw", None)
    if draw and prompt_dropout > 0:
        raise ValueError("This model draws its prompts itself, so there are none to drop: set prompt_dropout to 0.")
    objective = getattr(model, "objective", None)
    learns = getattr(model, "learns", "mask")
    score = getattr(model, "score", None) or (lambda prediction, batch: foreground_dice(prediction.logits, batch.mask))
    started = time.perf_counter()
    place = torch.device(device) if device else None
    fabric = Fabric(
        accelerator=place.type if place else "auto",
        devices=[place.index] if place and place.index is not None else 1,
        precision=budget.precision,
    )
    model.to(fabric.device)
    # Fabric wraps only the optimiser: its wrapper for models refuses frozen dataclasses, and Prompts is one.
    # Fused: one kernel for all parameters takes a sixth off a small model's step; it cannot clip scaled gradients.
    fused = budget.precision != "16-mixed"
    kinds = {
        "adamw": partial(torch.optim.AdamW, fused=fused),
        "sgd": partial(torch.optim.SGD, momentum=0.99, nesterov=True, fused=fused),
        "lamb": _lamb,
    }
    optimizer = fabric.setup_optimizers(kinds[budget.optimizer](_groups(model, budget.weight_decay), lr=budget.lr))
    state = {"step": 0, "log": [], "best": {}, "seconds": 0.0, "peak": 0.0}
    state["snapshots"] = [[] for _ in range(budget.cycles)]
    state["average"] = _copy(_live(model)) if budget.ema else {}
    if checkpoint:
        state["identity"] = _identity(model, loss, train, valid, budget, seed, prompt_dropout)
        if checkpoint.exists():
            state = _read(checkpoint, state["identity"], fabric.device)
            model.load_state_dict(state.pop("model"), strict=False)
            optimizer.load_state_dict(state.pop("optimizer"))
            fabric.strategy.precision.load_state_dict(state.pop("precision"))
    resumed_at, seconds_before, log = state["step"], state["seconds"], state["log"]

    def seeded(use: str, number: int) -> torch.Generator:
        return torch.Generator().manual_seed(stream(seed, use, number))

    def placed(batch: Batch, generator: torch.Generator) -> Batch:
        """On the device, with the prompts that a model draws for itself."""
        prompts = batch.prompts_for(model, generator)
        image, mask, prompts, outcome = (
            part.to(fabric.device) for part in (batch.image, batch.mask, prompts, batch.outcome)
        )
        return Batch(image, mask, prompts, batch.index, outcome)

    def predict(batch: Batch, window: int | None = None) -> Prediction:
        with fabric.autocast():
            prediction = segment(model, batch.image, batch.prompts, window)
        return prediction._replace(logits=prediction.logits.float())

    @torch.no_grad()
    def validate() -> float:
        model.eval()
        generator = seeded("prompts", -1)  # the same prompts at every validation
        batches = (placed(valid.batch(index), generator) for index in torch.arange(len(valid)).split(4 * budget.batch))
        return torch.cat([score(predict(batch, valid.window), batch) for batch in batches]).mean().item()

    def learn(batch: Batch) -> Tensor:
        if objective:
            with fabric.autocast():
                return objective(batch, loss)
        logits = predict(batch).logits
        return loss(logits, batch.outcome) if learns == "outcome" else loss(*labelled(logits, batch.mask))

    used_memory = _used_memory(fabric.device)
    health: list[Tensor] = []  # (loss, gradient norm) of each step since the last validation
    silent = "PAPERMILL" in os.environ or not sys.stderr.isatty()
    bar = tqdm(total=budget.steps, initial=resumed_at, disable=silent, unit="step", leave=False)
    with _fixed_numerics(fabric.device), bar:
        while state["step"] < budget.steps and not _exhausted(log, budget.patience):
            step = state["step"]
            model.train()
            batch = train.batch(order(seed, len(train), budget.batch, step), stream(seed, "augment", step))
            if prompt_dropout > 0:
                batch = replace(batch, prompts=batch.prompts.drop(prompt_dropout, seeded("prompt dropout", step)))
            batch = placed(batch, seeded("prompts", step))
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(budget, step) * group["share"]
            torch.manual_seed(stream(seed, "forward", step))
            value = learn(batch)
            state["peak"] = max(state["peak"], used_memory())
            optimizer.zero_grad()
            fabric.backward(value)
            norm = fabric.clip_gradients(model, optimizer, max_norm=budget.clip, error_if_nonfinite=False)
            optimizer.step()
            state["step"] = step = step + 1
            health.append(torch.stack([value.detach(), norm]))
            bar.update()
            if on_step:
                on_step(step, value.item())
            if budget.ema:
                _blend(state["average"], _live(model), average_decay(budget.ema, step - 1))
            if step % budget.validate_every and step < budget.steps:
                continue

            mean_loss = _healthy(health, step, budget)
            health.clear()
            current = _copy(_live(model)) if budget.ema else {}
            model.load_state_dict(state["average"], strict=False)
            found = validate()
            if not log or found > _best(log)["valid_score"]:
                state["best"] = _copy(_live(model))
            if budget.snapshots:
                cycle = state["snapshots"][(step - 1) * budget.cycles // budget.steps]
                cycle[:] = [*cycle, _copy(_live(model))][-budget.snapshots :]
            model.load_state_dict(current, strict=False)
            lr = learning_rate(budget, step - 1)
            log.append({"step": step, "lr": lr, "loss": mean_loss, "valid_score": found})
            bar.set_postfix(loss=f"{mean_loss:.3f}", score=f"{found:.3f}")
            state["seconds"] = seconds_before + time.perf_counter() - started
            if checkpoint:
                moving = {
                    "optimizer": optimizer.state_dict(),
                    "precision": fabric.strategy.precision.state_dict(),
                }
                buffer = io.BytesIO()
                torch.save({**state, **moving, "model": _live(model)}, buffer)
                atomic_write(checkpoint, buffer.getvalue())
    model.load_state_dict(state["best"], strict=False)
    model.eval()
    snapshots = [kept for cycle in state["snapshots"] for kept in cycle]
    return Fit(pd.DataFrame(log), _best(log)["step"], state["seconds"], state["peak"], resumed_at, snapshots)


def _groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Trainable parameters only; norms, biases and single learned vectors are not decayed.

    A model may give some of its parts (`rates`: start of their parameters' names -> share) less of the learning rate.
    """
    rates = getattr(model, "rates", {})
    groups: dict[tuple[float, float], list] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            share = next((share for start, share in rates.items() if name.startswith(start)), 1.0)
            groups.setdefault((weight_decay if parameter.ndim > 1 else 0.0, share), []).append(parameter)
    return [{"params": params, "weight_decay": decay, "share": share} for (decay, share), params in groups.items()]


def _lamb(groups: list[dict], lr: float) -> torch.optim.Optimizer:
    from timm.optim import Lamb  # seconds to import

    return Lamb(groups, lr=lr)


def _live(model: nn.Module) -> dict[str, Tensor]:
    """All that training can change: the state without frozen parameters (usually a large backbone)."""
    frozen = {name for name, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in frozen}


def _copy(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def _blend(average: dict[str, Tensor], state: dict[str, Tensor], decay: float) -> None:
    for name, tensor in state.items():
        if tensor.is_floating_point():
            average[name].lerp_(tensor, 1 - decay)
        else:
            average[name].copy_(tensor)


def _best(log: list[dict]) -> dict:
    return max(log, key=lambda row: row["valid_score"])  # max keeps the earliest of equals


def _exhausted(log: list[dict], patience: int | None) -> bool:
    return bool(patience and log) and len(log) - 1 - log.index(_best(log)) >= patience


def _healthy(health: list[Tensor], step: int, budget: Budget) -> float:
    """Mean loss since the last validation; checked all at once, so that a GPU need not wait at each step."""
    rows = torch.stack(health).tolist()
    for number, (loss, norm) in enumerate(rows, start=step - len(rows) + 1):
        # In float16 an infinite gradient is normal: the loss scaler skips that step and scales down.
        if not math.isfinite(loss) or not (math.isfinite(norm) or budget.precision == "16-mixed"):
            culprit = "gradient" if math.isfinite(loss) else "loss"
            raise FloatingPointError(
                f"The {culprit} stopped being finite at step {number} of {budget.steps}: lower Budget.lr (now "
                f"{budget.lr:g}), lengthen Budget.warmup (now {budget.warmup:g}) or use precision '32-true' "
                f"(now '{budget.precision}')."
            )
    return sum(loss for loss, _ in rows) / len(rows)


def _identity(model, loss, train: Feed, valid: Feed, budget: Budget, seed: int, prompt_dropout: float) -> str:
    """Fingerprint of what decides the numbers of a training, so that no foreign checkpoint is continued."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    function = getattr(loss, "func", loss)  # a loss with numbers of its own is a partial
    name = (getattr(function, "__qualname__", type(function)), getattr(loss, "keywords", {}))
    settings = (asdict(budget), seed, prompt_dropout, name, shapes)
    digest = hashlib.sha256(repr(settings).encode())
    for feed in (train, valid):
        for index in torch.arange(len(feed)).split(64):
            batch = feed.batch(index)
            others = [prompts[index].pooled for prompts in feed.rewordings]
            pooled = [group[role] for group in (batch.prompts.pooled, *others) for role in sorted(group)]
            for tensor in (batch.image, batch.mask, batch.outcome, *pooled):
                digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _read(checkpoint: Path, identity: str, device: torch.device) -> dict:
    try:
        state = torch.load(checkpoint, map_location=device, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"Checkpoint {checkpoint} is damaged: delete it to train from the start.") from error
    if state.get("identity") != identity:
        raise ValueError(
            f"Checkpoint {checkpoint} belongs to another run (its budget, seed, data or model differ): "
            "give another checkpoint path, or delete the file to train from the start."
        )
    return state


def _used_memory(device: torch.device) -> Callable[[], float]:
    """A gauge in MB since now: the allocator's own peak on a GPU, the growth of the process on a CPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return lambda: torch.cuda.max_memory_allocated(device) / 2**20
    process = psutil.Process()
    before = process.memory_info().rss
    return lambda: (process.memory_info().rss - before) / 2**20


@contextmanager
def _fixed_numerics(device: torch.device) -> Iterator[None]:
    """Leave the caller's random state alone and, on a GPU, ask for kernels that add in a fixed order."""
    cuda = device.type == "cuda"
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    with torch.random.fork_rng(devices=[device] if cuda else []):
        if cuda:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before, warn_only=warn_only)
