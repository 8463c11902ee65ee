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
CACHED = 2**17  # numbers: half a megabyte of states at a time

Solver = Callable[..., Tensor]  # decay between neighbours [l - 1, ...], drive [l, ...] -> states [l, ...]


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
    B, C = (_timed(t, u).expand(u.shape[-1], -1, -1, -1) for t in (B, C))
    h, y = torch.zeros_like(u[..., :1]), []  # [b, d, 1], which the first step widens to n
    for t in range(u.shape[-1]):
        step = delta[:, :, t, None]
        h = torch.exp(step * A) * h + step * B[t] * u[:, :, t, None]  # [b, d, n]
        y.append((h * C[t]).sum(-1))
    return torch.stack(y, dim=-1), h


def _timed(t: Tensor, u: Tensor) -> Tensor:
    """B or C of any kind with the time first, [L or 1, b or 1, d or 1, n]."""
    if t.ndim == 2:
        return t[None, None]
    if t.ndim == 3:
        return rearrange(t, "b n l -> l b 1 n")
    return repeat(t, "b g n l -> l b (g r) n", r=u.shape[1] // t.shape[1])


def _by(solve: Solver) -> Callable[..., tuple[Tensor, Tensor]]:
    """The scan with all but the recurrence done for many steps at once."""

    def scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
        step, drive = (rearrange(t, "b d l -> l b d 1").contiguous() for t in (delta, delta * u))
        y, last = Scan.apply(step, drive, A, *(_timed(t, u).contiguous() for t in (B, C)), solve)
        return rearrange(y, "l b d -> b d l"), last

    return scan


class Scan(torch.autograd.Function):
    """y_t = <h_t, C_t>, h_t = exp(step_t A) h_{t-1} + drive_t B_t; the gradient is the same recurrence backwards.

    Works through the sequence by chunks and keeps the state before each; states [L, b, d, n] are never all there.
    """

    @staticmethod
    def forward(
        ctx, step: Tensor, drive: Tensor, A: Tensor, B: Tensor, C: Tensor, solve: Solver
    ) -> tuple[Tensor, Tensor]:
        ctx.solve, starts, y = solve, [A.new_zeros(*step.shape[1:3], A.shape[1])], []
        for rows in _chunks(step, A):
            _, states = _states(step[rows], drive[rows], A, _rows(B, rows), starts[-1], solve)
            y.append((states * _rows(C, rows)).sum(-1))
            starts.append(states[-1].clone())  # a view would keep all states
        ctx.save_for_backward(step, drive, A, B, C, *starts[:-1])
        return torch.cat(y), starts[-1]

    @staticmethod
    @once_differentiable
    def backward(ctx, of_y: Tensor, carried: Tensor) -> tuple[Tensor | None, ...]:
        step, drive, A, B, C, *starts = ctx.saved_tensors
        of_step, of_drive, of_A, of_B, of_C = (torch.zeros_like(t) for t in (step, drive, A, B, C))
        for rows, start in zip(_chunks(step, A)[::-1], starts[::-1], strict=True):
            b, c = _rows(B, rows), _rows(C, rows)
            decay, states = _states(step[rows], drive[rows], A, b, start, ctx.solve)
            gradient = of_y[rows, ..., None] * c
            gradient[-1] += carried
            gradient = ctx.solve(decay[1:], gradient, backwards=True)
            carried = decay[0] * gradient[0]
            _rows(of_C, rows).add_((of_y[rows, ..., None] * states).sum_to_size(c.shape))
            _rows(of_B, rows).add_((gradient * drive[rows]).sum_to_size(b.shape))
            of_drive[rows] = (gradient * b).sum(-1, keepdim=True)
            # through the decay, exp(step A): what it multiplied was the state before
            gradient[1:] *= states[:-1]
            gradient[0] *= start
            gradient *= decay
            of_step[rows] = (gradient * A).sum(-1, keepdim=True)
            of_A += (gradient * step[rows]).sum((0, 1))
        return of_step, of_drive, of_A, of_B, of_C, None


def _chunks(step: Tensor, A: Tensor) -> list[slice]:
    """Chunks whose states stay in a processor's cache; a GPU has the memory, and would wait between them."""
    length, batch, channels, _ = step.shape
    size = length if step.is_cuda else max(1, CACHED // (batch * channels * A.shape[1]))
    return [slice(start, start + size) for start in range(0, length, size)]


def _rows(t: Tensor, rows: slice) -> Tensor:
    """A chunk of what may be the same at all times."""
    return t if len(t) == 1 else t[rows]


def _states(step: Tensor, drive: Tensor, A: Tensor, B: Tensor, start: Tensor, solve: Solver) -> tuple[Tensor, Tensor]:
    """Decays and states of one chunk [l, b, d, n] after the state `start` [b, d, n]."""
    decay, driven = (step * A).exp_(), drive * B
    driven[0].addcmul_(decay[0], start)
    return decay, solve(decay[1:], driven)


def _loop(decay: Tensor, drive: Tensor, backwards: bool = False) -> Tensor:
    """One multiply-add for each step, in place, on views made at once."""
    rows, factors = drive.unbind(), decay.unbind()
    if backwards:
        rows, factors = rows[::-1], factors[::-1]
    for factor, before, row in zip(factors, rows, rows[1:], strict=False):
        row.addcmul_(factor, before)
    return drive


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
