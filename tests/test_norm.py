"""RMSNorm and LayerNorm, with and without the residual addition: the C++ kernels against torch; gradients, determinism, compilation."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from llava_fast import _cpu
from llava_fast.kernels import registry
from llava_fast.kernels.norm import _norm, _norm_backward, add_layer_norm, add_rms_norm, layer_norm, norm_reference, rms_norm

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1024), (5, 123), (2, 7, 1152), (0, 64), (67, 17), (3, 3), (40, 4096)]


@pytest.fixture(params=_cpu.supported_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _cpu.isa()
    _cpu.set_isa(request.param)
    yield request.param
    _cpu.set_isa(before)


def make(shape: tuple[int, ...], dtype: torch.dtype, weight_dtype: torch.dtype, centred: bool, residual: bool) -> list[Tensor | None]:
    """x, residual, weight, bias; a mean of 3 shows a variance that is not taken from centred values."""
    generator = torch.Generator().manual_seed(sum(shape))
    x, r = (torch.randn(shape, generator=generator) + 3 for _ in range(2))
    weight, bias = torch.rand(shape[-1], generator=generator) + 0.5, torch.randn(shape[-1], generator=generator)
    weight, bias = weight.to(weight_dtype), bias.to(weight_dtype)
    return [x.to(dtype), r.to(dtype) if residual else None, weight, bias if centred else None]


def call(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
    if bias is None:
        return (rms_norm(x, weight, 1e-6),) if residual is None else add_rms_norm(x, residual, weight, 1e-6)
    return (layer_norm(x, weight, bias, 1e-6),) if residual is None else add_layer_norm(x, residual, weight, bias, 1e-6)


def with_grads(run: Callable[..., tuple[Tensor, ...]], inputs: list[Tensor | None], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Outputs, then gradients of the inputs that there are."""
    leaves = [None if t is None else t.detach().to(dtype or t.dtype).clone().requires_grad_() for t in inputs]
    outputs = run(*leaves)
    grads = [torch.randn(o.shape, generator=torch.Generator().manual_seed(i)).bfloat16().to(o.dtype) for i, o in enumerate(outputs)]
    torch.autograd.backward(outputs, grads)
    return [o.detach() for o in outputs] + [leaf.grad for leaf in leaves if leaf is not None and leaf.grad is not None]


def check(ours: list[Tensor], torchs: list[Tensor], exact: list[Tensor]) -> None:
    for our, theirs, truth in zip(ours, torchs, exact, strict=True):
        assert our.dtype == theirs.dtype and our.shape == theirs.shape
        if truth.numel() > 0:
            floor = truth.abs().max() * torch.finfo(our.dtype).eps
            assert (our.double() - truth).abs().max() <= 2 * (theirs.double() - truth).abs().max() + floor


def reference(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
    with registry.use(norm="reference"):
        return call(x, residual, weight, bias)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape: tuple[int, ...], dtype: torch.dtype, centred: bool, residual: bool, isa: str) -> None:
    """The error against fp64 is at most twice that of torch in the same dtype, plus a rounding of the largest value."""
    inputs = make(shape, dtype, dtype, centred, residual)
    check(with_grads(call, inputs), with_grads(reference, inputs), with_grads(reference, inputs, torch.float64))


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize(("dtype", "weight_dtype"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_weights_of_another_dtype(dtype: torch.dtype, weight_dtype: torch.dtype, centred: bool, isa: str) -> None:
    inputs = make((5, 123), dtype, weight_dtype, centred, True)
    ours = with_grads(call, inputs)
    check(ours, with_grads(reference, inputs), with_grads(reference, inputs, torch.float64))
    assert ours[4].dtype == weight_dtype


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("weight_dtype", [torch.float64, torch.float8_e4m3fn])
def test_weights_of_dtypes_that_are_converted(weight_dtype: torch.dtype, centred: bool) -> None:
    inputs = make((5, 123), torch.float32, weight_dtype, centred, True)
    for ours, theirs in zip(with_grads(call, inputs), with_grads(reference, inputs), strict=True):
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=0.1 if ours.dtype == torch.float8_e4m3fn else 1e-5, atol=1e-5)


def test_a_bias_keeps_the_precision_of_x() -> None:
    x, _, weight, bias = make((5, 123), torch.float32, torch.float32, True, False)
    torch.testing.assert_close(call(x, None, weight.bfloat16(), bias), reference(x, None, weight.bfloat16(), bias), rtol=1e-5, atol=1e-5)


def test_bf16_equals_transformers(isa: str) -> None:
    x, _, weight, _ = make((33, 1024), torch.bfloat16, torch.bfloat16, False, False)
    theirs = Qwen2RMSNorm(1024, 1e-6).bfloat16()
    theirs.weight.data = weight
    ours = rms_norm(x, weight, 1e-6)
    # A sum in another order moves one normalised value in some hundred to the neighbouring bf16 number.
    assert (ours != theirs(x)).float().mean() < 0.01
    torch.testing.assert_close(ours, theirs(x), rtol=2**-7, atol=0)


def test_a_large_mean_costs_layer_norm_nothing(isa: str) -> None:
    x = torch.randn(4, 1152) + 1e4
    out, exact = (layer_norm(t, torch.ones(1152, dtype=t.dtype), torch.zeros(1152, dtype=t.dtype), 1e-6) for t in (x, x.double()))
    assert (out - exact).abs().max() < 5e-3  # of the input's own rounding; E[x^2] - E[x]^2 is off by 1 here


@pytest.mark.parametrize("centred", [False, True])
def test_same_bits_in_every_run_and_thread_count(centred: bool) -> None:
    inputs = make((300, 1152), torch.float32, torch.float32, centred, True)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 2, 3):
        torch.set_num_threads(threads)
        results.append(with_grads(call, inputs))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_outputs_too_large_for_a_cache_are_the_same(isa: str) -> None:
    """They are written around the caches, here with rows that begin within a line."""
    for dtype in DTYPES:
        x, residual, weight, bias = make((4200, 1003), dtype, dtype, True, True)
        whole = with_grads(call, [x, residual, weight, bias])
        part = with_grads(call, [x[:50], residual[:50], weight, bias])  # type: ignore[index]
        assert all(torch.equal(a[:50], b) for a, b in zip(whole[:2], part[:2], strict=True))
        assert all(t.isfinite().all() for t in whole)


def test_gradient_through_one_output_alone() -> None:
    for used in (0, 1):
        inputs = make((5, 123), torch.float32, torch.float32, False, True)
        ours = with_grads(lambda *a: (call(*a)[used],), inputs)  # noqa: B023
        theirs = with_grads(lambda *a: (reference(*a)[used],), inputs)  # noqa: B023
        for our, their in zip(ours, theirs, strict=True):
            torch.testing.assert_close(our, their, rtol=1e-5, atol=1e-5)


def test_gradcheck_in_fp64() -> None:
    inputs = [t.double().requires_grad_() for t in make((3, 5), torch.float32, torch.float32, True, True)]  # type: ignore[union-attr]
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradcheck(call, [*inputs[:3], None])


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("centred", [False, True])
def test_opcheck(centred: bool, residual: bool) -> None:
    inputs = [None if t is None else t.requires_grad_() for t in make((3, 10), torch.float32, torch.float32, centred, residual)]
    torch.library.opcheck(_norm, (*inputs, 1e-6, "cpu"))
    x, weight, stats = inputs[0].detach(), inputs[2].detach(), torch.rand(6 if centred else 3)  # type: ignore[union-attr]
    torch.library.opcheck(_norm_backward, (torch.randn(3, 10), x if residual else None, x, weight, stats, centred, "cpu"))


@pytest.mark.parametrize("implementation", ["cpu", "reference"])
def test_compiles_without_graph_breaks(implementation: str) -> None:
    inputs = [t.requires_grad_() for t in make((3, 10), torch.float32, torch.float32, True, True)]  # type: ignore[union-attr]

    def step(*inputs: Tensor) -> Tensor:
        normed, total = call(*inputs)
        return (normed.sin() + rms_norm(total, inputs[2], 1e-5)).sum()

    torch.compiler.reset()
    with registry.use(norm=implementation):
        expected = torch.autograd.grad(step(*inputs), inputs)
        compiled = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(*inputs), inputs)
    for ours, theirs in zip(compiled, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_layouts_that_are_not_contiguous() -> None:
    wide = torch.randn(10, 6, 32)
    for x in (wide[:, 3], wide.transpose(0, 1), wide[..., ::2], torch.ones(()).expand(3, 8)):
        weight = torch.rand(x.shape[-1])
        for our, their in zip(with_grads(call, [x, x, weight, None]), with_grads(reference, [x, x, weight, None]), strict=True):
            torch.testing.assert_close(our, their, rtol=1e-5, atol=1e-5)


def test_bad_arguments() -> None:
    x, weight = torch.zeros(3, 8), torch.ones(8)
    with pytest.raises(ValueError, match=r"last dimension of x \[3, 8\], got \[7\]"):
        rms_norm(x, torch.ones(7), 1e-6)
    with pytest.raises(ValueError, match=r"\[3, 8\], got \[8\], \[1\]"):
        layer_norm(x, weight, torch.ones(1), 1e-6)
    with pytest.raises(ValueError, match=r"torch.float32 \[3, 8\], got torch.float64 \[3, 8\]"):
        add_rms_norm(x, x.double(), weight, 1e-6)
    with pytest.raises(ValueError, match=r"\[3, 8\], got torch.float32 \[1, 8\]"):
        add_layer_norm(x, x[:1], weight, weight, 1e-6)
    with pytest.raises(ValueError, match=r"x \[3, 0\]"):
        rms_norm(torch.zeros(3, 0), torch.ones(0), 1e-6)
    with pytest.raises(ValueError, match="x is torch.float32 on cpu.* got torch.int64 on cpu"):
        rms_norm(x, weight.long(), 1e-6)
    for bad in ((x, weight.to("meta"), weight), (x, weight, weight.to("meta"))):
        with pytest.raises(ValueError, match="x is torch.float32 on cpu.* got torch.float32 on meta"):
            layer_norm(*bad, 1e-6)
    with pytest.raises(ValueError, match="got torch.float32 on meta"):
        add_rms_norm(x, x.to("meta"), weight, 1e-6)


def test_reference_is_its_formula() -> None:
    x = torch.randn(4, 9, dtype=torch.float64)
    weight, bias = torch.randn(9, dtype=torch.float64), torch.randn(9, dtype=torch.float64)
    rms, total = norm_reference(x, 2 * x, weight, None, 0.1)
    torch.testing.assert_close(total, 3 * x)
    torch.testing.assert_close(rms, weight * 3 * x / (9 * (x * x).mean(-1, keepdim=True) + 0.1).sqrt())
    centred = x - x.mean(-1, keepdim=True)
    expected = weight * centred / ((centred * centred).mean(-1, keepdim=True) + 0.1).sqrt() + bias
    torch.testing.assert_close(layer_norm(x, weight, bias, 0.1), expected)
