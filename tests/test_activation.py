"""GELU in its three forms, SiLU and SwiGLU: the C++ kernels against torch; gradients, limits, compilation."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from llava_fast import _cpu
from llava_fast.kernels import registry
from llava_fast.kernels.activation import _activation, _activation_backward, activation, activation_reference, swiglu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS = ["gelu", "gelu_pytorch_tanh", "quick_gelu", "silu", "swiglu"]
SHAPES = [(1, 2816), (5, 246), (0, 64), (3, 2), (2, 7, 4304), (1000,)]


@pytest.fixture(params=_cpu.supported_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _cpu.isa()
    _cpu.set_isa(request.param)
    yield request.param
    _cpu.set_isa(before)


def function(kind: str):
    return swiglu if kind == "swiglu" else activation(kind)


def with_grad(x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    out = function(kind)(x)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(out.dtype))
    assert x.grad is not None
    return out.detach(), x.grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape: tuple[int, ...], kind: str, dtype: torch.dtype, isa: str) -> None:
    """The error against fp64 is at most twice that of torch in the same dtype, plus a rounding of the largest value."""
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * 3).to(dtype)
    ours = with_grad(x, kind)
    with registry.use(activation="reference"):
        torchs, exact = with_grad(x, kind), with_grad(x.double(), kind)
    for our, theirs, truth in zip(ours, torchs, exact, strict=True):
        assert our.dtype == dtype and our.shape == truth.shape
        if truth.numel() > 0:
            floor = truth.abs().max() * torch.finfo(dtype).eps
            assert (our.double() - truth).abs().max() <= 2 * (theirs.double() - truth).abs().max() + floor


@pytest.mark.parametrize("kind", KINDS[:4])
def test_fp32_over_the_whole_range(kind: str, isa: str) -> None:
    """Against torch's own error, in bands: a large value must not hide what happens at a small one."""
    for low, high in [(-12, -5.2), (-5.2, -3), (-3, -0.5), (-0.5, 0.5), (0.5, 3), (3, 12)]:
        x = torch.linspace(low, high, 20001)
        truth = activation_reference(x.double(), kind)
        ours, theirs = (activation(kind)(x) - truth).abs().max(), (activation_reference(x, kind) - truth).abs().max()
        assert ours <= 2 * theirs + 1.2e-7 * max(abs(low), abs(high)), (low, high)


@pytest.mark.parametrize("kind", KINDS[:4])
def test_every_bf16_number(kind: str, isa: str) -> None:
    """Half a unit in the last place and the table's own error, of which the slopes of wide intervals have the most."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = x[x.abs() < 50]
    wide = x.double().requires_grad_()
    truth = activation_reference(wide, kind)
    (slope,) = torch.autograd.grad(truth.sum(), wide)
    leaf = x.clone().requires_grad_()
    out = activation(kind)(leaf)
    (grad,) = torch.autograd.grad(out, leaf, torch.ones_like(out))
    for ours, exact, floor in ((out, truth, 2e-6), (grad, slope, 1.5e-5)):
        half = torch.exp2(exact.abs().clamp(min=1e-37).log2().floor() - 8)
        assert ((ours.double() - exact).abs() <= half + floor).all()


@pytest.mark.parametrize("kind", KINDS[:4])
def test_limits(kind: str, isa: str) -> None:
    x = torch.tensor([1e30, 1000.0, 90.0, 0.0, -0.0, -20.0, -90.0, -1000.0, torch.inf, torch.nan])
    out, grad = with_grad(x, kind)
    assert torch.equal(out[:4], x[:4]) and out[8] == torch.inf and out[9].isnan() and grad[9].isnan()
    assert (out[5:8].abs() < 1e-6).all() and out[4] == 0
    _, slope = with_grad(x[:8], kind)
    assert slope.isfinite().all() or kind == "gelu_pytorch_tanh"  # its cubic is infinite at 1e30, in torch too


def test_same_bits_in_every_run_and_thread_count() -> None:
    x = torch.randn(77, 2 * 1003)
    for kind in KINDS:
        before, results = torch.get_num_threads(), []
        for threads in (1, 2, 2, 3):
            torch.set_num_threads(threads)
            results.append(with_grad(x, kind))
        torch.set_num_threads(before)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_too_large_for_a_cache_are_the_same(kind: str, dtype: torch.dtype, isa: str) -> None:
    """They are written around the caches; 1003 columns begin within a line, 17 elements end within one."""
    x = torch.randn(4200, 2 * 1003).to(dtype)
    whole, part = with_grad(x, kind), with_grad(x[:9], kind)
    assert torch.equal(whole[0][:9], part[0])
    assert all(t.isfinite().all() for t in whole)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_opcheck_and_compile(kind: str) -> None:
    x = torch.randn(3, 6)
    assert torch.autograd.gradcheck(function(kind), x.double().requires_grad_())
    torch.library.opcheck(_activation, (x.clone().requires_grad_(), kind, "cpu"))
    torch.library.opcheck(_activation_backward, (torch.randn(3, 3 if kind == "swiglu" else 6), x, kind, "cpu"))

    def step(x: Tensor) -> Tensor:
        return function(kind)(x * 2).sin().sum()

    torch.compiler.reset()
    x.requires_grad_()
    (expected,) = torch.autograd.grad(step(x), x)
    (compiled,) = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(x), x)
    torch.testing.assert_close(compiled, expected)


def test_layouts_that_are_not_contiguous() -> None:
    wide = torch.randn(4, 6, 8)
    for x in (wide[:, 3], wide.transpose(0, 1), wide[..., ::2], wide.transpose(1, 2)):
        for kind in KINDS:
            ours = with_grad(x, kind)
            with registry.use(activation="reference"):
                theirs = with_grad(x, kind)
            for our, their in zip(ours, theirs, strict=True):
                torch.testing.assert_close(our, their, rtol=1e-5, atol=1e-6)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"got \[3, 7\]"):
        swiglu(torch.zeros(3, 7))
    with pytest.raises(ValueError, match="got 'relu'"):
        activation("relu")
    assert activation("linear")(x := torch.ones(2)) is x
