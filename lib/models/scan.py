"""The selective scan of state-space models (Mamba, arXiv 2312.00752, Sec. 3.2), by its definition and fast.

Δ' = Δ + bias, softplus if asked;   h_0 = 0
h_t = exp(Δ'_t A) h_{t-1} + Δ'_t B_t u_t;   y_t = <h_t, C_t> + D u_t;   y silu(z) where z is given
"""

from collections.abc import Callable

import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

LONG = 64  # steps from which a GPU waits longer for kernels to start than it computes

Solver = Callable[..., Tensor]  # decay between neighbours [L - 1, ...], drive [L, ...] -> states [L, ...]


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    softplus: bool = False,
    method: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the scan in float32 or better, also under autocast; return y and the last state h_L.

    u, delta, z, y: [b, d, L]; A: [d, n]; D, delta_bias: [d]; h_L: [b, d, n]. B and C are constant [d, n], shared
    by the channels [b, n, L], or grouped [b, g, n, L], where channel i belongs to group i // (d / g).
    method: one of METHODS; None takes "doubling" for long sequences on a GPU and "loop" otherwise.
    Raises ValueError for another method and ImportError where "mamba_ssm" is asked for and absent.
    """
    if method is None:
        method = "doubling" if u.is_cuda and u.shape[-1] >= LONG else "loop"
    if method not in METHODS:
        raise ValueError(f"There is no scan method {method!r}: use one of {', '.join(METHODS)}.")
    with torch.autocast(u.device.type, enabled=False):
        given = (u, delta, A, B, C, D, z, delta_bias)
        u, delta, A, B, C, D, z, delta_bias = (
            t if t is None else t.to(torch.promote_types(t.dtype, torch.float32)) for t in given
        )
        if method == "mamba_ssm":
            return _mamba_ssm(u, delta, A, B, C, D, z, delta_bias, softplus)
        if delta_bias is not None:
            delta = delta + delta_bias[:, None]
        if softplus:
            delta = F.softplus(delta)
        y, last = METHODS[method](u, delta, A, B, C)
        if D is not None:
            y = y + D[:, None] * u
        return (y if z is None else y * F.silu(z)), last


def _by_definition(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """One step after the other, by index: to read, and to hold the others against."""
    B, C = (_per_channel(t, *u.shape) for t in (B, C))  # [L, b or 1, d or 1, n]
    h, y = torch.zeros_like(u[..., :1]), []  # [b, d, 1], which the first step widens to n
    for t in range(u.shape[-1]):
        step = delta[:, :, t, None]
        h = torch.exp(step * A) * h + step * B[t] * u[:, :, t, None]  # [b, d, n]
        y.append((h * C[t]).sum(-1))
    return torch.stack(y, dim=-1), h


def _by(solve: Solver) -> Callable[..., tuple[Tensor, Tensor]]:
    """The scan with everything but the recurrence done for all steps at once."""

    def scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
        B, C = (_per_channel(t, *u.shape) for t in (B, C))
        step, drive = (rearrange(t, "b d l -> l b d 1").contiguous() for t in (delta, delta * u))
        states = Recurrence.apply((step * A).exp_(), drive * B, solve)  # [L, b, d, n]
        return torch.einsum("lbdn, lbdn -> bdl", states, C), states[-1]

    return scan


def _per_channel(t: Tensor, batch: int, channels: int, length: int) -> Tensor:
    """B or C of any kind with the time first, to broadcast over [L, b, d, n]."""
    if t.ndim == 2:
        return t.expand(length, 1, *t.shape)
    if t.ndim == 3:
        return rearrange(t, "b n l -> l b 1 n")
    return repeat(t, "b g n l -> l b (g r) n", r=channels // t.shape[1])


class Recurrence(torch.autograd.Function):
    """h_t = decay_t h_{t-1} + drive_t along the first axis; its gradient is the same recurrence, backwards in time."""

    @staticmethod
    def forward(ctx, decay: Tensor, drive: Tensor, solve: Solver) -> Tensor:
        states = solve(decay[1:], drive)
        ctx.save_for_backward(decay, states)
        ctx.solve = solve
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        decay, states = ctx.saved_tensors
        # Backwards, h_{t+1} hands its gradient on to h_t through the same decay_{t+1}.
        gradient = ctx.solve(decay[1:], gradient, backwards=True)
        of_decay = torch.zeros_like(decay)
        torch.mul(gradient[1:], states[:-1], out=of_decay[1:])
        return of_decay, gradient, None


def _loop(decay: Tensor, drive: Tensor, backwards: bool = False) -> Tensor:
    """One multiply-add for each step, on views made at once."""
    states = drive.clone(memory_format=torch.contiguous_format)
    rows, factors = states.unbind(), decay.unbind()
    if backwards:
        rows, factors = rows[::-1], factors[::-1]
    for factor, before, row in zip(factors, rows, rows[1:], strict=False):
        row.addcmul_(factor, before)
    return states


def _doubling(decay: Tensor, drive: Tensor, backwards: bool = False) -> Tensor:
    """log2(L) rounds over the whole sequence: each joins what reaches back `reach` steps with what lies before it."""
    if backwards:
        return _doubling(decay.flip(0), drive.flip(0)).flip(0)
    reach = 1
    while reach < len(drive):  # decay[i] is now the product that carries drive[i] into drive[i + reach]
        drive = torch.cat([drive[:reach], torch.addcmul(drive[reach:], decay, drive[:-reach])])
        decay = decay[reach:] * decay[:-reach]
        reach *= 2
    return drive


def _mamba_ssm(u, delta, A, B, C, D, z, delta_bias, softplus):
    """The CUDA kernel of state-spaces/mamba."""
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ImportError as error:
        raise ImportError(
            "The scan method 'mamba_ssm' needs the package mamba-ssm, which is not installed: "
            "install it beside its CUDA, or use 'loop' or 'doubling'."
        ) from error
    u, delta, B, C = (t.contiguous() for t in (u, delta, B, C))
    return selective_scan_fn(u, delta, A, B, C, D, z, delta_bias, softplus, return_last_state=True)


METHODS: dict[str, Callable] = {
    "indexed": _by_definition,
    "loop": _by(_loop),
    "doubling": _by(_doubling),
    "mamba_ssm": _mamba_ssm,
}
