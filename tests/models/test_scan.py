"""Every way to run the selective scan is the definition, forward and backward."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.models.scan import METHODS, selective_scan
from tests.golden.adapters import mamba_scan
from tests.golden.test_golden import FOLDER, compare, read_case

FAST = ("loop", "doubling")
CASES = sorted(FOLDER.glob("mamba_scan_*.json"))


def inputs(batch=2, channels=4, length=9, states=3, kind="shared", groups=2, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    shape = {
        "constant": (channels, states),
        "shared": (batch, states, length),
        "grouped": (batch, groups, states, length),
    }[kind]
    tensors = {
        "u": draw(batch, channels, length),
        "delta": draw(batch, channels, length),
        "A": -draw(channels, states).exp(),
        "B": draw(*shape),
        "C": draw(*shape),
        "D": draw(channels),
        "z": draw(batch, channels, length),
        "delta_bias": draw(channels),
    }
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}


def run(given, method, **options):
    """y, the last state, and the gradients of a weighted sum of both."""
    y, last = selective_scan(**given, softplus=True, method=method, **options)
    weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)
    gradients = torch.autograd.grad((y * weights).sum() + last.square().sum(), list(given.values()))
    return y, last, *gradients


@pytest.mark.parametrize("path", CASES or [pytest.param(None, marks=pytest.mark.skip(reason=f"no case in {FOLDER}"))])
@pytest.mark.parametrize("method", ["indexed", *FAST])
def test_every_method_gives_the_reference_numbers(path, method):
    case = read_case(path)
    compare(case, mamba_scan(case, method))


@pytest.mark.parametrize("kind", ["constant", "shared", "grouped"])
@pytest.mark.parametrize("method", FAST)
@settings(max_examples=15, deadline=None)
@given(length=st.integers(1, 40), batch=st.integers(1, 3), seed=st.integers(0, 99))
def test_every_method_is_the_definition_forward_and_backward(method, kind, length, batch, seed):
    given = inputs(batch, 4, length, kind=kind, seed=seed)
    for value, expected in zip(run(given, method), run(given, "indexed"), strict=True):
        torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("method", FAST)
def test_the_written_gradient_is_the_numerical_one(method):
    given = inputs(length=5)
    assert torch.autograd.gradcheck(lambda *t: selective_scan(*t, softplus=True, method=method), tuple(given.values()))


@pytest.mark.parametrize("method", ["indexed", *FAST])
def test_a_long_sequence_stays_near_double_precision(method):
    given = inputs(length=784, states=16, seed=3)
    with torch.no_grad():
        exact, _ = selective_scan(**given, softplus=True, method="indexed")
        single, _ = selective_scan(**{n: t.float() for n, t in given.items()}, softplus=True, method=method)
    torch.testing.assert_close(single.double(), exact, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", ["indexed", *FAST])
def test_half_precision_is_counted_in_float32_under_autocast_too(method):
    given = inputs(length=64, dtype=torch.bfloat16)
    whole = {name: tensor.detach().float() for name, tensor in given.items()}
    expected, _ = selective_scan(**whole, softplus=True, method="indexed")
    with torch.autocast("cpu", torch.bfloat16):
        y, last = selective_scan(**given, softplus=True, method=method)
    assert y.dtype == last.dtype == torch.float32
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("method", ["indexed", *FAST])
@pytest.mark.parametrize(("delta", "rate"), [(1e4, 16.0), (1e18, 1e18), (1e-30, 1e-30), (1e30, 1e30)])
def test_huge_and_tiny_steps_stay_finite(method, delta, rate):
    given = {name: tensor.detach() for name, tensor in inputs(length=40, dtype=torch.float32).items()}
    given |= {"delta": torch.full_like(given["delta"], delta), "A": torch.full_like(given["A"], -rate)}
    given["u"] = given["u"] / max(1.0, delta)  # the drive Δ B u stays of order one
    for tensor in given.values():
        tensor.requires_grad_()
    y, _ = selective_scan(**given, method=method)
    gradients = torch.autograd.grad(y.sum(), [given[name] for name in ("u", "B", "C", "D", "z", "A", "delta")])
    assert y.isfinite().all() and not any(g.isnan().any() for g in gradients)


def test_a_gpu_gets_the_short_way_for_long_sequences_only(monkeypatch):
    used = []
    for name in FAST:
        scan = METHODS[name]
        monkeypatch.setitem(METHODS, name, lambda *t, name=name, scan=scan: used.append(name) or scan(*t))
    selective_scan(**inputs(length=24))
    selective_scan(**inputs(length=784))
    assert used == ["loop", "loop"]
    if torch.cuda.is_available():
        selective_scan(**{name: tensor.cuda() for name, tensor in inputs(length=784).items()})
        assert used[-1] == "doubling"


def test_the_cuda_kernel_is_used_only_where_it_is_installed():
    given = {name: tensor.detach().float() for name, tensor in inputs().items()}
    try:
        import mamba_ssm  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match="'mamba_ssm' needs the package mamba-ssm.*use 'loop' or 'doubling'"):
            selective_scan(**given, method="mamba_ssm")
        return
    if not torch.cuda.is_available():
        pytest.skip("mamba-ssm needs a GPU")
    given = {name: tensor.cuda() for name, tensor in given.items()}
    for value, expected in zip(
        selective_scan(**given, softplus=True, method="mamba_ssm"),
        selective_scan(**given, softplus=True, method="indexed"),
        strict=True,
    ):
        torch.testing.assert_close(value, expected, atol=1e-3, rtol=1e-3)


def test_an_unknown_method_is_one_sentence():
    with pytest.raises(ValueError, match="no scan method 'magic': use one of indexed, loop, doubling, mamba_ssm"):
        selective_scan(**inputs(), method="magic")
