"""The Triton kernels of `linear`, interpreted on the CPU in fp32 and fp16 (bf16 is silently wrong there)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llava_fast.kernels import _linear_triton, registry
from llava_fast.kernels.linear import Quantised, linear, linear_reference, quantise

KINDS = [("float", None), ("int8", None), ("int8", 32), ("int4", None), ("int4", 32), ("int4", 96), ("fp8", None), ("fp8", 64)]
SHAPES = [(1, 5, 123), (3, 33, 200), (8, 7, 130), (9, 5, 96), (70, 33, 200)]


def make(kind: str, group: int | None, M: int, O: int, I: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | Quantised, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(M * 10000 + O * 100 + I)
    x, weight, bias, residual = (torch.randn(*shape, generator=generator) for shape in ((M, I), (O, I), (O,), (M, O)))
    matrix = (weight / I**0.5).to(dtype) if kind == "float" else quantise(weight / I**0.5, kind, group)
    return x.to(dtype), matrix, bias.to(dtype), residual.to(dtype)


def rounded(x: Tensor) -> Tensor:
    """x as the fp8 product sees it: e4m3 with one scale a row. (The interpreter rounds 127.4 to 64: the numbers go unchecked.)"""
    numbers, scale = _linear_triton.fp8_rows(x)
    torch.testing.assert_close(scale, x.float().abs().amax(1) / 448)
    return numbers.double() * scale.double()[:, None]


@pytest.mark.parametrize(
    ("M", "O", "I", "dtype"), [*((*shape, torch.float32) for shape in SHAPES), (3, 33, 200, torch.float16), (70, 33, 200, torch.float16)]
)
@pytest.mark.parametrize(("kind", "group"), KINDS)
def test_values(kind: str, group: int | None, M: int, O: int, I: int, dtype: torch.dtype) -> None:
    """The error against fp64 is at most twice that of torch in the same dtype, plus a rounding of the largest value."""
    if kind == "int4" and I % 2:
        I += 1
    x, weight, bias, residual = make(kind, group, M, O, I, dtype)
    with registry.use(linear="triton"):
        ours = linear(x, weight, bias, act="silu", residual=residual)
    torchs = linear_reference(x, weight, bias, "silu", residual)
    wide = rounded(x) if kind == "fp8" and M > _linear_triton.FEW_ROWS else x.double()
    exact = linear_reference(wide, weight, bias.double(), "silu", residual.double())
    assert ours.dtype == dtype and ours.shape == (M, O)
    floor = 4 * exact.abs().max() * torch.finfo(dtype).eps
    assert (ours.double() - exact).abs().max() <= 2 * (0 if kind == "fp8" else (torchs.double() - exact).abs().max()) + floor


@pytest.mark.parametrize(
    ("kind", "act"),
    [*(("float", act) for act in ("gelu", "gelu_pytorch_tanh", "quick_gelu", "silu", None)), ("int8", "gelu"), ("int4", "silu")],
)
@pytest.mark.parametrize("M", [2, 20])
def test_activations_and_rows(M: int, act: str | None, kind: str) -> None:
    """Rows go where `rows` says, the others stay; what the backward pass needs is kept."""
    x, weight, bias, residual = make(kind, None, M, 40, 64, torch.float32)
    rows = torch.randperm(M + 5, generator=torch.Generator().manual_seed(0))[:M]
    expected = torch.full((M + 5, 40), 7.0)
    expected[rows] = linear_reference(x, weight, bias, act, residual)
    out = torch.full((M + 5, 40), 7.0)
    with registry.use(linear="triton"):
        linear(x, weight, bias, act=act, residual=residual, out=out, rows=rows)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        if kind == "float":
            leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
            ours = torch.autograd.grad(linear(*leaves, act=act).square().sum(), leaves)
            theirs = torch.autograd.grad(linear_reference(*leaves, act).square().sum(), leaves)
            for our, their in zip(ours, theirs, strict=True):
                torch.testing.assert_close(our, their, rtol=1e-4, atol=1e-4)


def test_strided_rows_and_gather() -> None:
    """x as a slice of a wider product; a gathered row outside x leaves its row of the output alone."""
    x, weight, bias, _ = make("float", None, 30, 40, 64, torch.float32)
    wide = torch.cat((x, x), 1)[:, 64:]
    assert wide.stride(0) == 128
    for M in (5, 30):
        with registry.use(linear="triton"):
            torch.testing.assert_close(linear(wide[:M], weight, bias), linear_reference(x[:M], weight, bias), rtol=1e-5, atol=1e-5)
    gather, out = torch.tensor([3, 30, 3, 29, 0]), torch.full((5, 40), 7.0)
    _linear_triton.gemm(out, wide, weight, bias, "", gather=gather)
    expected = linear_reference(x, weight, bias)[[3, 3, 3, 29, 0]]
    expected[1] = 7.0
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_same_bits_twice() -> None:
    for kind, group in KINDS:
        for M in (3, 20):
            x, weight, bias, _ = make(kind, group, M, 33, 96, torch.float16)
            with registry.use(linear="triton"):
                assert torch.equal(linear(x, weight, bias), linear(x, weight, bias))
