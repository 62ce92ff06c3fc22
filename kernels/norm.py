"""RMSNorm and LayerNorm over the last dimension, with or without the residual addition before them.

    rms_norm(x) = w * x / sqrt(mean(x^2) + eps)          layer_norm(x) = w * (x - mean) / sqrt(var + eps) + b
    add_*_norm(x, residual) = (norm(s), s),  s = x + residual rounded to x's dtype

Statistics are fp32 (fp64 for fp64 inputs), the variance from centred values. RMSNorm rounds the normalised row to x's dtype before it
meets w, as transformers' Qwen2RMSNorm does, so that bf16 results agree. w and b may be narrower or wider than x: they are converted to
its dtype first. Backward, with n the normalised row, g = grad * w and means over the row:

    grad_x = (g - mean(g n) n - mean(g)) / deviation + grad_s      the third term for LayerNorm alone
    grad_w = sum of grad * n over rows,  grad_b = sum of grad      in fp32: parts of the rows first, then the parts, in a fixed order

Shape letters: T rows, D width. Below, a bias of None means RMSNorm.
"""

# mypy: disable-error-code="no-untyped-def"
# (of the kernels)

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llava_fast.kernels import _native, registry
from llava_fast.kernels._native import address, element
from llava_fast.kernels._triton import DEVICES, config, jit, on_device, tl, triton
from llava_fast.kernels.registry import Implementation

WIDEST = 16384  # of the Triton kernels, which hold a row in registers
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@jit
def _norm_kernel(
    out_ptr, sum_ptr, rstd_ptr, mean_ptr, x_ptr, residual_ptr, weight_ptr, bias_ptr, D, eps,
    CENTRED: tl.constexpr, RESIDUAL: tl.constexpr, STATS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < D
    dtype = x_ptr.dtype.element_ty
    x = tl.load(x_ptr + t * D + columns, mask=mask, other=0.0).to(tl.float32)
    if RESIDUAL:
        x += tl.load(residual_ptr + t * D + columns, mask=mask, other=0.0).to(tl.float32)
        narrow = x.to(dtype)
        tl.store(sum_ptr + t * D + columns, narrow, mask=mask)
        x = narrow.to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(dtype).to(tl.float32)
    if CENTRED:
        mean = tl.sum(x, 0) / D
        x = tl.where(mask, x - mean, 0.0)
        if STATS:
            tl.store(mean_ptr + t, mean)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, 0) / D + eps)
    if STATS:
        tl.store(rstd_ptr + t, rstd)
    if CENTRED:
        bias = tl.load(bias_ptr + columns, mask=mask, other=0.0).to(dtype).to(tl.float32)
        y = x * rstd * weight + bias
    else:
        y = (x * rstd).to(dtype).to(tl.float32) * weight
    tl.store(out_ptr + t * D + columns, y.to(dtype), mask=mask)


@jit
def _norm_backward_kernel(
    grad_x_ptr, weight_parts_ptr, bias_parts_ptr, grad_ptr, grad_sum_ptr, x_ptr, weight_ptr, rstd_ptr, mean_ptr, T, D, rows,
    CENTRED: tl.constexpr, GRAD_SUM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program walks `rows` rows and keeps their sums of grad * n and grad in registers."""
    part = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < D
    dtype = x_ptr.dtype.element_ty
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(dtype).to(tl.float32)
    grad_weight = tl.zeros([BLOCK], tl.float32)
    grad_bias = tl.zeros([BLOCK], tl.float32)
    for t in range(part * rows, tl.minimum(part * rows + rows, T)):
        n = tl.load(x_ptr + t * D + columns, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + t * D + columns, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + t)
        if CENTRED:
            n = (n - tl.load(mean_ptr + t)) * rstd  # past the end of the row grad is zero
            grad_weight += grad * n
            grad_bias += grad
        else:
            n *= rstd
            grad_weight += grad * n.to(dtype).to(tl.float32)
        g = grad * weight
        grad_x = g - tl.sum(g * n, 0) / D * n
        if CENTRED:
            grad_x -= tl.sum(g, 0) / D
        grad_x *= rstd
        if GRAD_SUM:
            grad_x += tl.load(grad_sum_ptr + t * D + columns, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad_x_ptr + t * D + columns, grad_x.to(dtype), mask=mask)
    tl.store(weight_parts_ptr + part * D + columns, grad_weight, mask=mask)
    if CENTRED:
        tl.store(bias_parts_ptr + part * D + columns, grad_bias, mask=mask)


def _as_read(x: Tensor, weight_D: Tensor, bias_D: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """weight and bias as the C++ kernels read them: both in one of their dtypes, or else in x's, as the formula says."""
    dtype = weight_D.dtype
    if dtype not in _DTYPES or (bias_D is not None and bias_D.dtype != dtype):  # .to alone takes 1 us
        weight_D, bias_D = weight_D.to(x.dtype), None if bias_D is None else bias_D.to(x.dtype)
    return weight_D.contiguous(), None if bias_D is None else bias_D.contiguous()


def _forward_cpu(
    x: Tensor, residual: Tensor | None, weight_D: Tensor, bias_D: Tensor | None, eps: float, keep_stats: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    D = x.shape[-1]
    T = x.numel() // D
    x = x.contiguous()
    weight_D, bias_D = _as_read(x, weight_D, bias_D)
    residual = None if residual is None else residual.contiguous()
    out = torch.empty_like(x)
    total = None if residual is None else torch.empty_like(x)
    stats = x.new_empty(T if bias_D is None else 2 * T, dtype=torch.float32) if keep_stats else None
    pointers = (x.data_ptr(), address(residual), weight_D.data_ptr(), address(bias_D), out.data_ptr(), address(total), address(stats))
    _native.cpu().norm_forward(element(x.dtype), element(weight_D.dtype), T, D, eps, *pointers, torch.get_num_threads())
    return out, total, stats


def _backward_cpu(
    grad: Tensor, grad_sum: Tensor | None, x: Tensor, weight_D: Tensor, stats: Tensor, centred: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    D = x.shape[-1]
    weight_D, _ = _as_read(x, weight_D, None)
    grad_x = torch.empty_like(x)
    grad_weight = weight_D.new_empty(D, dtype=torch.float32)
    grad_bias = torch.empty_like(grad_weight) if centred else None
    pointers = (grad.data_ptr(), address(grad_sum), x.data_ptr(), weight_D.data_ptr(), stats.data_ptr())
    results = (grad_x.data_ptr(), grad_weight.data_ptr(), address(grad_bias))
    dtypes = (element(x.dtype), element(weight_D.dtype))
    _native.cpu().norm_backward(*dtypes, x.numel() // D, D, *pointers, *results, torch.get_num_threads())
    return grad_x, grad_weight, grad_bias


def _launch(D: int, kernel: str, device: torch.device, **more: int) -> dict[str, Any]:
    """A thread holds 8 numbers of each array, or 16 where the backward pass walks many rows: 16-byte loads and no spills."""
    block = triton.next_power_of_2(D)
    default = {"num_warps": min(max(block // 256, 1), 16), **more}
    return {"BLOCK": block, **config(kernel, f"D{D}", default, device)}


def _forward_triton(
    x: Tensor, residual: Tensor | None, weight_D: Tensor, bias_D: Tensor | None, eps: float, keep_stats: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    D = x.shape[-1]
    T = x.numel() // D
    x, weight_D = x.contiguous(), weight_D.contiguous()
    residual = None if residual is None else residual.contiguous()
    bias_D = None if bias_D is None else bias_D.contiguous()
    out = torch.empty_like(x)
    total = None if residual is None else torch.empty_like(x)
    stats = x.new_empty(T if bias_D is None else 2 * T, dtype=torch.float32) if keep_stats else None
    if T > 0:
        with on_device(x):
            _norm_kernel[(T,)](
                out, total, stats, None if stats is None or bias_D is None else stats[T:], x, residual, weight_D, bias_D, D, eps,
                CENTRED=bias_D is not None, RESIDUAL=residual is not None, STATS=keep_stats, **_launch(D, "norm", x.device),
            )  # fmt: skip
    return out, total, stats


def _backward_triton(
    grad: Tensor, grad_sum: Tensor | None, x: Tensor, weight_D: Tensor, stats: Tensor, centred: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    D = x.shape[-1]
    T = x.numel() // D
    launch = _launch(D, "norm_backward", x.device, programs=264)  # two for each of an H200's 132 multiprocessors
    rows = max(1, triton.cdiv(T, launch.pop("programs")))
    programs = triton.cdiv(T, rows)
    grad_x = torch.empty_like(x)
    weight_parts = x.new_empty(programs, D, dtype=torch.float32)
    bias_parts = torch.empty_like(weight_parts) if centred else None
    if T > 0:
        with on_device(x):
            _norm_backward_kernel[(programs,)](
                grad_x, weight_parts, bias_parts, grad, grad_sum, x, weight_D, stats, stats[T:] if centred else None, T, D, rows,
                CENTRED=centred, GRAD_SUM=grad_sum is not None, **launch,
            )  # fmt: skip
    return grad_x, weight_parts.sum(0), None if bias_parts is None else bias_parts.sum(0)


_LAUNCHERS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "cpu": (_forward_cpu, _backward_cpu),
    "triton": (_forward_triton, _backward_triton),
}


def norm_reference(x: Tensor, residual: Tensor | None, weight_D: Tensor, bias_D: Tensor | None, eps: float) -> tuple[Tensor, Tensor | None]:
    """The same function from torch's ops, any device: what is normalised, and x + residual where there is one."""
    total = None if residual is None else x + residual
    x = x if total is None else total
    if bias_D is not None:
        return F.layer_norm(x, weight_D.shape, weight_D.to(x.dtype), bias_D.to(x.dtype), eps), total
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight_D.to(x.dtype) * normed.to(x.dtype), total


# Outputs are the normalised rows, the sum and the statistics; empty where there is no sum.
@torch.library.custom_op("llava_fast::norm", mutates_args=())
def _norm(
    x: Tensor, residual: Tensor | None, weight_D: Tensor, bias_D: Tensor | None, eps: float, implementation: str
) -> tuple[Tensor, Tensor, Tensor]:
    out, total, stats = _LAUNCHERS[implementation][0](x, residual, weight_D, bias_D, eps, True)
    return out, x.new_empty(0) if total is None else total, stats


@_norm.register_fake
def _(
    x: Tensor, residual: Tensor | None, weight_D: Tensor, bias_D: Tensor | None, eps: float, implementation: str
) -> tuple[Tensor, Tensor, Tensor]:
    x = x.contiguous()
    T = x.numel() // x.shape[-1]
    total = x.new_empty(0) if residual is None else torch.empty_like(x)
    return torch.empty_like(x), total, x.new_empty(T if bias_D is None else 2 * T, dtype=torch.float32)


# Outputs are the gradients of x (and of the residual), weight and bias, the last one empty for RMSNorm.
@torch.library.custom_op("llava_fast::norm_backward", mutates_args=())
def _norm_backward(
    grad: Tensor, grad_sum: Tensor | None, x: Tensor, weight_D: Tensor, stats: Tensor, centred: bool, implementation: str
) -> tuple[Tensor, Tensor, Tensor]:
    grad_sum = None if grad_sum is None else grad_sum.contiguous()
    launch = _LAUNCHERS[implementation][1]
    grad_x, grad_weight, grad_bias = launch(grad.contiguous(), grad_sum, x.contiguous(), weight_D.contiguous(), stats, centred)
    return grad_x, grad_weight, x.new_empty(0) if grad_bias is None else grad_bias


@_norm_backward.register_fake
def _(
    grad: Tensor, grad_sum: Tensor | None, x: Tensor, weight_D: Tensor, stats: Tensor, centred: bool, implementation: str
) -> tuple[Tensor, Tensor, Tensor]:
    grad_weight = weight_D.new_empty(x.shape[-1], dtype=torch.float32)
    return torch.empty_like(x.contiguous()), grad_weight, torch.empty_like(grad_weight) if centred else x.new_empty(0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, residual, weight_D, bias_D, _, implementation = inputs
    _, total, stats = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x if residual is None else total, weight_D, stats)
    ctx.has_residual, ctx.bias_dtype, ctx.implementation = residual is not None, None if bias_D is None else bias_D.dtype, implementation


def _backward(ctx: Any, grad: Tensor | None, grad_sum: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight_D, stats = ctx.saved_tensors
    grad_sum = grad_sum if ctx.has_residual else None
    if grad is None:  # only the sum is used further on
        return grad_sum, grad_sum, None, None, None, None
    centred = ctx.bias_dtype is not None
    grad_x, grad_weight, grad_bias = _norm_backward(grad, grad_sum, x, weight_D, stats, centred, ctx.implementation)
    grad_residual = grad_x if ctx.has_residual else None
    return grad_x, grad_residual, grad_weight.to(weight_D.dtype), grad_bias.to(ctx.bias_dtype) if centred else None, None, None


_norm.register_autograd(_backward, setup_context=_setup_context)


registry.register(
    "norm",
    {
        "cpu": Implementation(("cpu",), _DTYPES, modules=("llava_fast._cpu",), invariant=True),
        "reference": Implementation(),
        # Never run on hardware: by name only until it is measured.
        "triton": Implementation(DEVICES, _DTYPES, lambda D: D <= WIDEST, modules=("triton",), default=False, invariant=True),
    },
    shapes=(1024, 1152, 4096),
)


def _run(x: Tensor, residual: Tensor | None, weight_D: Tensor, bias_D: Tensor | None, eps: float) -> tuple[Tensor, Tensor | None]:
    D = x.shape[-1] if x.dim() else 0
    if D == 0 or weight_D.shape != (D,) or (bias_D is not None and bias_D.shape != (D,)):
        have = [list(tensor.shape) for tensor in (weight_D, bias_D) if tensor is not None]
        raise ValueError(f"expected weights of the last dimension of x {list(x.shape)}, got {', '.join(map(str, have))}")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(f"the residual must be like x, {x.dtype} {list(x.shape)}, got {residual.dtype} {list(residual.shape)}")
    for tensor in (weight_D, bias_D, residual):
        if tensor is not None and (tensor.device != x.device or not tensor.dtype.is_floating_point):
            raise ValueError(
                f"x is {x.dtype} on {x.device}, and its weights and residual must be floats there, got {tensor.dtype} on {tensor.device}"
            )
    name = registry.resolve_name("norm", x.device.type, x.dtype, D)
    if name == "reference":
        return norm_reference(x, residual, weight_D, bias_D, eps)
    if registry.as_op(x, residual, weight_D, bias_D):
        out, total, _ = _norm(x, residual, weight_D, bias_D, eps, name)
        return out, total
    out, total, _ = _LAUNCHERS[name][0](x, residual, weight_D, bias_D, eps, False)
    return out, total


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x [..., D], weight [D]; returns [..., D] in x's dtype. Differentiable.

    Raises ValueError for shapes, dtypes or devices that do not fit.
    """
    return _run(x, None, weight_D, None, eps)[0]


def layer_norm(x: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
    """x [..., D], weight and bias [D]; returns [..., D] in x's dtype. Differentiable. Raises ValueError as rms_norm does."""
    return _run(x, None, weight_D, bias_D, eps)[0]


def add_rms_norm(x: Tensor, residual: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual) in one pass; the residual has x's shape and dtype, else ValueError. Differentiable."""
    out, total = _run(x, residual, weight_D, None, eps)
    assert total is not None
    return out, total


def add_layer_norm(x: Tensor, residual: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(layer_norm(x + residual), x + residual) in one pass; the residual has x's shape and dtype, else ValueError. Differentiable."""
    out, total = _run(x, residual, weight_D, bias_D, eps)
    assert total is not None
    return out, total


def shipped_calls(device: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """The launches that a GPU build ships, for the ahead-of-time compile and the warm-up."""
    for D, dtype, centred in [
        (1152, torch.bfloat16, True),
        (1024, torch.bfloat16, False),
        (4096, torch.bfloat16, False),
        (1152, torch.float16, True),
        (4096, torch.float32, False),
    ]:
        x, residual = torch.empty(729, D, dtype=dtype, device=device), torch.empty(729, D, dtype=dtype, device=device)
        weight = torch.empty(D, dtype=dtype, device=device)
        bias = weight if centred else None
        stats = torch.empty(2 * 729 if centred else 729, device=device)
        name = f"{'layer' if centred else 'rms'}_norm D={D} {str(dtype).removeprefix('torch.')}"
        yield name, lambda x=x, w=weight, b=bias: _forward_triton(x, None, w, b, 1e-6, False)  # type: ignore[misc]
        yield f"add {name}", lambda x=x, r=residual, w=weight, b=bias: _forward_triton(x, r, w, b, 1e-6, True)  # type: ignore[misc]
        yield (
            f"{name} backward",
            lambda x=x, r=residual, w=weight, s=stats, c=centred: _backward_triton(x, r, x, w, s, c),  # type: ignore[misc]
        )


def candidates() -> dict[tuple[str, str], list[dict[str, int]]]:
    """Launch parameters for bench/tune.py."""
    found: dict[tuple[str, str], list[dict[str, int]]] = {}
    for D, warps in ((1024, (2, 4)), (1152, (4, 8)), (4096, (8, 16))):
        found["norm", f"D{D}"] = [{"num_warps": n} for n in warps]
        found["norm_backward", f"D{D}"] = [{"num_warps": n, "programs": programs} for n in warps for programs in (132, 264, 528)]
    return found
