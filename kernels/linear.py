"""y = act(x W^T + b) + residual, computed in x's precision (at least fp32) whatever type W is stored in.

    act       "gelu" (exact, erf), "gelu_pytorch_tanh", "quick_gelu" (x sigmoid(1.702 x), of CLIP) or "silu"
    W         fp32, bf16, fp16, fp64, or Quantised: int8, int4 or fp8 with one fp32 scale for each `group` columns of a row

Released checkpoints are bf16, and most CPUs multiply bf16 at a sixth of their fp32 rate: there W stays narrow in memory and is
widened on its way into registers, which gives the results of fp32 weights at half the bytes (or a quarter, or an eighth).
Accumulation is fp32 (fp64 for fp64 x). Quantised weights are dequantised, and activations are left as they are, with one exception:
the Triton implementation with fp8 weights and more than 8 rows (any number inside `batch_invariant`) rounds x to e4m3, one scale a row, for
Hopper's fp8 products.
With AMX many rows of x go through tiles of bf16: every number is split into up to three, exactly, so the accuracy is still fp32's.
There an x below 1e-33 loses its last bits, and an infinity in W, or in an x that meets a W wider than bf16, may come out as NaN.

Shape letters: M rows of x, I inputs, O outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llava_fast.kernels import _linear_triton, _native, linear_gradient, registry
from llava_fast.kernels._linear_triton import candidates as candidates
from llava_fast.kernels._linear_triton import shipped_calls as shipped_calls
from llava_fast.kernels._native import address, element
from llava_fast.kernels._triton import DEVICES
from llava_fast.kernels.registry import Implementation

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
}
# The reference's bytes of widened weight at a time. A product with few rows reads each block once: 512 KiB stays in L2. With many
# rows a weight is widened whole up to 256 MiB: in blocks of 8 MiB, writing the columns of the output took 1.7 of 14.1 s to a first token.
BLOCK_BYTES = 256 << 20
BLOCK_BYTES_FEW_ROWS = 512 << 10
FEW_ROWS = 16

_LARGEST = {"int8": 127.0, "int4": 7.0, "fp8": 448.0}
_STORED = {"int8": torch.int8, "int4": torch.uint8, "fp8": torch.float8_e4m3fn}


@dataclass(frozen=True)
class Quantised:
    """W [O, I] as small numbers times scales: W[o, i] = number[o, i] * scale[o, i // group]. Symmetric, no zero point.

    weight  "int8": int8 [O, I], -127 to 127.  "fp8": float8_e4m3fn [O, I].  "int4": uint8 [O, I / 2], two numbers a byte, -7 to 7
            stored with 8 added; the low four bits are the even column.
    scale   fp32 [O, ceil(I / group)], contiguous; group is a multiple of 32 or, for one scale a row, I.

    Raises ValueError for anything else, and for tensors on two devices: kernels read both by address.
    """

    weight: Tensor
    scale: Tensor
    kind: str
    group: int

    def __post_init__(self) -> None:
        weight, scale, kind, group = self.weight, self.scale, self.kind, self.group
        if kind not in _STORED:
            raise ValueError(f"kind must be one of {', '.join(_STORED)}, got {kind!r}")
        if weight.dtype != _STORED[kind] or weight.dim() != 2:
            raise ValueError(f"{kind} weights are a matrix of {_STORED[kind]}, got {weight.dtype} {list(weight.shape)}")
        O, I = self.shape
        _check_group(group, I)
        groups = -(-I // group)
        if scale.dtype != torch.float32 or scale.shape != (O, groups) or not scale.is_contiguous() or scale.device != weight.device:
            raise ValueError(
                f"expected contiguous scales torch.float32 {[O, groups]} on {weight.device}, "
                f"got {scale.dtype} {list(scale.shape)} with strides {scale.stride()} on {scale.device}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight.shape[1] * (2 if self.kind == "int4" else 1)

    def rows(self, block: slice) -> Quantised:
        """Some rows of W, as views."""
        return Quantised(self.weight[block], self.scale[block], self.kind, self.group)

    def dequantise(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W [O, I]."""
        numbers = self.weight
        if self.kind == "int4":
            numbers = torch.stack((numbers & 15, numbers >> 4), dim=-1).flatten(1).to(torch.int8) - 8
        scale = self.scale.to(dtype).repeat_interleave(self.group, dim=1)[:, : numbers.shape[1]]
        return numbers.to(dtype) * scale


def _check_group(group: int, I: int) -> None:
    if group < 1 or (group % 32 and group != I):
        raise ValueError(f"group must be a multiple of 32 or cover the {I} columns, got {group}")


def quantise(weight_OI: Tensor, kind: str, group: int | None = None) -> Quantised:
    """Round W to the nearest multiple of each group's scale, which is its largest magnitude over what `kind` can hold.

    kind "int8", "int4" or "fp8" (e4m3); group: columns that share a scale, a multiple of 32, or None for the whole row. The last group
    of a row may be shorter. Raises ValueError for another kind or group, and for int4 with an odd number of columns.
    """
    if kind not in _LARGEST:
        raise ValueError(f"kind must be one of {', '.join(_LARGEST)}, got {kind!r}")
    O, I = weight_OI.shape
    group = I if group is None else min(group, I)
    _check_group(group, I)
    if kind == "int4" and I % 2:
        raise ValueError(f"int4 stores two columns in a byte: the number of columns must be even, got {I}")
    wide = F.pad(weight_OI.detach().float(), (0, -I % group)).view(O, -1, group)
    scale = (wide.abs().amax(-1) / _LARGEST[kind]).contiguous()  # of a transposed W the maxima lie transposed, too
    numbers = (wide / torch.where(scale == 0, 1.0, scale).unsqueeze(-1)).view(O, -1)[:, :I]
    if kind == "fp8":
        return Quantised(numbers.to(torch.float8_e4m3fn).contiguous(), scale, kind, group)
    numbers = numbers.round()
    if kind == "int8":
        return Quantised(numbers.to(torch.int8).contiguous(), scale, kind, group)
    nibbles = (numbers + 8).to(torch.uint8).view(O, -1, 2)
    return Quantised((nibbles[..., 0] | nibbles[..., 1] << 4).contiguous(), scale, kind, group)


def _widened(weight: Tensor | Quantised, dtype: torch.dtype) -> Tensor:
    return weight.dequantise(dtype) if isinstance(weight, Quantised) else weight.to(dtype)


class _Dequantised(torch.autograd.Function):
    """x W^T on the reference path. W is dequantised again for the backward pass: kept, it would be as large as before it was quantised."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Quantised) -> Tensor:
        ctx.weight = weight
        return _product(x, weight, None)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        return grad @ ctx.weight.dequantise(grad.dtype), None


def _product(x: Tensor, weight: Tensor | Quantised, bias_O: Tensor | None) -> Tensor:
    if isinstance(weight, Quantised) and torch.is_grad_enabled() and x.requires_grad:
        y = _Dequantised.apply(x, weight)
        return y if bias_O is None else y + bias_O
    if isinstance(weight, Tensor) and (weight.dtype == x.dtype or registry.in_graph(x, weight)):
        return F.linear(x, weight.to(x.dtype), bias_O)
    O, I = weight.shape
    few = x.numel() <= FEW_ROWS * I
    rows = max(1, (BLOCK_BYTES_FEW_ROWS if few else BLOCK_BYTES) // max(1, I * x.element_size()))
    if O <= rows or registry.in_graph(x):
        return F.linear(x, _widened(weight, x.dtype), bias_O)
    out = x.new_empty(*x.shape[:-1], O)
    for start in range(0, O, rows):
        block = slice(start, start + rows)
        part = weight.rows(block) if isinstance(weight, Quantised) else weight[block]
        out[..., block] = F.linear(x, _widened(part, x.dtype), None if bias_O is None else bias_O[block])
    return out


def linear_reference(
    x: Tensor, weight: Tensor | Quantised, bias_O: Tensor | None = None, act: str | None = None, residual: Tensor | None = None
) -> Tensor:
    """The same function from torch's ops, any device; a narrower W is widened block by block."""
    y = _product(x, weight, None if bias_O is None else bias_O.to(x.dtype))
    y = y if act is None else ACTIVATIONS[act](y)
    return y if residual is None else y + residual


# launch(out [R, O], x [M, I], weight, scale, bias, residual [M, O], kind, group, act, rows, pre [M, O])
# writes act(x W^T + b) + residual to row rows[m] of out (row m where rows is None), and x W^T + b to pre where one is given.
# kind is the stored dtype's name or Quantised.kind; act "" is none. x, residual, out and pre have one dtype and contiguous last
# dimensions; weight, scale, bias and rows are contiguous; out's rows do not overlap, nor meet x.
LAUNCHERS: dict[str, Callable[..., None]] = {}


@torch.library.custom_op("llava_fast::linear", mutates_args=())
def _linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    kind: str,
    group: int,
    act: str,
    keep: bool,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    """(y, the values before act where `keep`, else empty)."""
    x_MI = x.reshape(-1, x.shape[-1])
    out = x.new_empty(x_MI.shape[0], weight.shape[0])
    pre = torch.empty_like(out) if keep else x.new_empty(0)
    residual = None if residual is None else residual.reshape(out.shape)
    _launch(implementation, out, x_MI, weight, scale, bias, residual, kind, group, act, None, pre if keep else None)
    return out.view(*x.shape[:-1], weight.shape[0]), pre.view(*x.shape[:-1], weight.shape[0]) if keep else pre


@_linear.register_fake
def _(x, weight, scale, bias, residual, kind, group, act, keep, implementation):
    out = x.new_empty(*x.shape[:-1], weight.shape[0])
    return out, torch.empty_like(out) if keep else x.new_empty(0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, scale, bias, _, kind, group, act, keep, implementation = inputs
    ctx.set_materialize_grads(False)  # of the values before act, which have none
    ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight, scale, output[1] if keep else None)
    ctx.kind, ctx.group, ctx.act, ctx.implementation = kind, group, act, implementation
    ctx.bias_dtype = None if bias is None else bias.dtype


def _act_backward(grad: Tensor, pre: Tensor, act: str) -> Tensor:
    if act == "silu":
        return torch.ops.aten.silu_backward(grad, pre)
    if act == "quick_gelu":
        sigmoid = torch.sigmoid(1.702 * pre)
        return grad * sigmoid * (1 + 1.702 * pre * (1 - sigmoid))
    return torch.ops.aten.gelu_backward(grad, pre, approximate="tanh" if act == "gelu_pytorch_tanh" else "none")


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 10
    x, weight, scale, pre = ctx.saved_tensors
    needs = ctx.needs_input_grad
    before = grad if pre is None else _act_backward(grad, pre, ctx.act)
    flat_MO = before.reshape(-1, before.shape[-1])
    grad_x = grad_weight = grad_bias = None
    if needs[0]:
        matrix = weight if scale is None else Quantised(weight, scale, ctx.kind, ctx.group).dequantise(before.dtype)
        grad_x = linear_gradient.multiply(flat_MO, matrix, False, ctx.implementation).view(*before.shape[:-1], matrix.shape[1])
    if needs[1]:
        grad_weight = linear_gradient.multiply(flat_MO, x.reshape(-1, x.shape[-1]), True, ctx.implementation).to(weight.dtype)
    if needs[3]:
        grad_bias = flat_MO.sum(0).to(ctx.bias_dtype)
    return grad_x, grad_weight, None, grad_bias, grad if needs[4] else None, None, None, None, None, None


_linear.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("llava_fast::linear_into", mutates_args=("out",))
def _linear_into(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    kind: str,
    group: int,
    act: str,
    rows: Tensor | None,
    implementation: str,
) -> None:
    _launch(implementation, out, x, weight, scale, bias, residual, kind, group, act, rows, None)


@_linear_into.register_fake
def _(out, x, weight, scale, bias, residual, kind, group, act, rows, implementation):
    return None


def _launch(
    implementation: str,
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    kind: str,
    group: int,
    act: str,
    rows: Tensor | None,
    pre: Tensor | None,
) -> None:
    """Calls the launcher with operands laid out as it expects them."""
    if x.stride(1) != 1 or x.stride(0) < x.shape[1]:
        x = x.contiguous()
    if residual is not None and (residual.stride(1) != 1 or residual.stride(0) < residual.shape[1]):
        residual = residual.contiguous()
    weight = weight if weight.is_contiguous() else weight.contiguous()
    bias = bias if bias is None or bias.is_contiguous() else bias.contiguous()
    rows = rows if rows is None or rows.is_contiguous() else rows.contiguous()
    LAUNCHERS[implementation](out, x, weight, scale, bias, residual, kind, group, act, rows, pre)


_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_KINDS = {dtype: str(dtype).removeprefix("torch.") for dtype in (*_FLOATS, torch.float64)}
_NAMES = tuple(_KINDS.values())


def _launch_cpu(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    kind: str,
    group: int,
    act: str,
    rows: Tensor | None,
    pre: Tensor | None,
) -> None:
    _cpu = _native.cpu()
    _cpu.linear(
        *(_cpu_names or _name_cpu(_cpu))[x.dtype, kind, act],
        *x.shape,
        weight.shape[0],
        x.data_ptr(),
        x.stride(0),
        weight.data_ptr(),
        address(scale),
        group,
        address(bias),
        element(torch.float32 if bias is None else bias.dtype),
        address(residual),
        0 if residual is None else residual.stride(0),
        out.data_ptr(),
        out.stride(0),
        out.shape[0],
        address(rows),
        address(pre),
        torch.get_num_threads(),
        registry.is_invariant(),
    )


_cpu_names: dict[tuple[torch.dtype, str, str], tuple[Any, Any, Any]] = {}


def _name_cpu(module: Any) -> dict[tuple[torch.dtype, str, str], tuple[Any, Any, Any]]:
    """The C++ names of every (dtype, kind, act): a look-up in an enumeration takes longer than one here."""
    global _cpu_names
    _cpu_names = {  # whole at once: another thread may be looking
        (dtype, kind, act): (getattr(module.DType, _KINDS[dtype]), getattr(module.WeightType, kind), getattr(module.Act, act or "none"))
        for dtype in _FLOATS
        for kind in _CPU_KINDS
        for act in ("", *ACTIVATIONS)
    }
    return _cpu_names


_CPU_KINDS = ("float32", "bfloat16", "float16", "int8", "int4")
LAUNCHERS["cpu"] = _launch_cpu
LAUNCHERS["triton"] = _linear_triton.launch
registry.register(
    "linear",
    {
        "cpu": Implementation(("cpu",), _FLOATS, serves=lambda kind: kind in _CPU_KINDS, modules=("llava_fast._cpu",), invariant=True),
        "reference": Implementation(),
        # Compiled and interpreted, and never run on hardware: by name only until it is measured.
        "triton": Implementation(DEVICES, _FLOATS, _linear_triton.serves, modules=("triton",), default=False, invariant=True),
    },
    shapes=("float32", "bfloat16", "int8", "int4", "fp8"),
)


def linear(
    x: Tensor,
    weight: Tensor | Quantised,
    bias: Tensor | None = None,
    *,
    act: str | None = None,
    residual: Tensor | None = None,
    out: Tensor | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """act(x W^T + b) + residual.

    x [..., I], weight [O, I] of any float dtype or Quantised, bias [O], residual [..., O] in x's dtype -> [..., O] in x's dtype.
    x and bias are fp32, bf16, fp16 or fp64, each its own. Differentiable in x, weight (not Quantised), bias and residual.

    out: a tensor [..., O] to write to. With rows, int64 [number of x's rows], `out` is [R, O] and row m of the result goes to row
    rows[m] of it; other rows stay. Rows must differ, which only the C++ kernel checks: of two that go to one row, others leave either
    or parts of both. Both are for inference: they raise where a gradient is wanted.
    Rows of `out` must not overlap, and without a copy it must be a matrix with contiguous columns. From its first to its last element
    it shares no memory with x, nor with the residual; without rows it may be the residual itself.
    Raises ValueError for shapes, dtypes, devices or an activation that do not fit and, on the CPU, for a row outside `out`.
    """
    if isinstance(weight, Quantised):
        matrix, scale, kind, group = weight.weight, weight.scale, weight.kind, weight.group
    else:
        matrix, scale, kind, group = weight, None, _KINDS.get(weight.dtype, str(weight.dtype)), 0
    O, I = weight.shape
    floats = x.dtype in _KINDS and (bias is None or bias.dtype in _KINDS)
    if not floats or (scale is None and kind not in _NAMES and not matrix.dtype.is_floating_point):
        raise ValueError(
            f"x and bias must be {', '.join(_NAMES)}, the weight of any float dtype or Quantised, "
            f"got x {x.dtype}, bias {None if bias is None else bias.dtype} and weight {matrix.dtype}"
        )
    if x.shape[-1] != I or matrix.device != x.device:
        raise ValueError(f"expected x [..., {I}] for a weight [{O}, {I}] on {matrix.device}, got {x.dtype} {list(x.shape)} on {x.device}")
    if bias is not None and (bias.shape != (O,) or bias.device != x.device):
        raise ValueError(f"expected a bias [{O}] on {x.device}, got {list(bias.shape)} on {bias.device}")
    if act is not None and act not in ACTIVATIONS:
        raise ValueError(f"act must be one of {', '.join(ACTIVATIONS)}, got {act!r}")
    shape = (*x.shape[:-1], O)
    if residual is not None and (residual.shape != shape or residual.dtype != x.dtype or residual.device != x.device):
        raise ValueError(
            f"expected a residual {x.dtype} {list(shape)} on {x.device}, got {residual.dtype} {list(residual.shape)} on {residual.device}"
        )
    if out is None and rows is not None:
        raise ValueError("rows are rows of `out`, and none was given")
    name = registry.resolve_name("linear", x.device.type, x.dtype, kind)
    graph = registry.as_op(x, matrix, bias, residual)
    if out is not None:
        return _write(name, out, x, weight, matrix, scale, bias, residual, kind, group, act, rows)
    if name == "reference":
        return linear_reference(x, weight, bias, act, residual)
    if graph:
        grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, matrix, bias))
        return _linear(x, matrix, scale, bias, residual, kind, group, act or "", act is not None and grad, name)[0]
    x_MI = x if x.dim() == 2 else x.reshape(-1, I)
    made = x.new_empty(x_MI.shape[0], O)
    _launch(
        name, made, x_MI, matrix, scale, bias, None if residual is None else residual.reshape(-1, O), kind, group, act or "", None, None
    )
    return made if x.dim() == 2 else made.view(shape)


def _place(matrix: Tensor) -> tuple[int, int]:
    return matrix.data_ptr(), matrix.stride(0) if matrix.shape[0] > 1 else 0


def _check_apart(out: Tensor, other: Tensor, name: str) -> None:
    """Two matrices: the other is read while out is written."""
    starts, ends = [], []
    for matrix in (out, other):
        last = sum((n - 1) * stride for n, stride in zip(matrix.shape, matrix.stride(), strict=True))
        starts.append(matrix.data_ptr())
        ends.append(starts[-1] + (last + 1) * matrix.element_size())
    if out.numel() and other.numel() and starts[0] and max(starts) < min(ends):
        raise ValueError(
            f"`out` must not share memory with {name}, got addresses {starts[0]:#x} to {ends[0]:#x} and {starts[1]:#x} to {ends[1]:#x}"
        )


def _write(
    name: str,
    out: Tensor,
    x: Tensor,
    weight: Tensor | Quantised,
    matrix: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    kind: str,
    group: int,
    act: str | None,
    rows: Tensor | None,
) -> Tensor:
    """`linear` into `out`."""
    O = matrix.shape[0]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, matrix, bias, residual, out)):
        raise ValueError("`out` is for inference: call linear under torch.no_grad(), or without out")
    M = math.prod(x.shape[:-1])
    if rows is None:
        fits = out.shape == (*x.shape[:-1], O)
    else:
        fits = out.dim() == 2 and out.shape[1] == O and rows.shape == (M,) and rows.dtype == torch.int64 and rows.device == x.device
    if not fits or out.dtype != x.dtype or out.device != x.device or out.stride(-1) != 1:
        expected = f"[{'R' if rows is not None else ', '.join(map(str, x.shape[:-1]))}, {O}]"
        given = "" if rows is None else f" and rows {rows.dtype} {list(rows.shape)} for {M} rows of x"
        raise ValueError(
            f"expected `out` {x.dtype} {expected} with contiguous columns on {x.device} (rows: int64 [{M}]), "
            f"got {out.dtype} {list(out.shape)} with strides {out.stride()} on {out.device}{given}"
        )
    try:
        flat = out if rows is not None else out.view(M, O)
    except RuntimeError:
        flat = None
    if flat is None or (flat.shape[0] > 1 and flat.stride(0) < O):
        raise ValueError(f"`out` must be a view of a matrix [{M}, {O}] whose rows do not overlap, got strides {out.stride()}")
    x_MI, residual_MO = x.reshape(M, x.shape[-1]), None if residual is None else residual.reshape(M, O)
    if not torch.compiler.is_compiling():
        _check_apart(flat, x_MI, "x")
        itself = rows is None and residual_MO is not None and _place(residual_MO) == _place(flat)
        if residual_MO is not None and not itself:
            _check_apart(flat, residual_MO, "the residual")
    if name == "reference":
        made = linear_reference(x, weight, bias, act, residual)
        if rows is None:
            return out.copy_(made)
        if rows.numel() and rows.device.type == "cpu" and not 0 <= int(rows.min()) <= int(rows.max()) < out.shape[0]:
            raise ValueError(f"rows must be 0 to {out.shape[0] - 1}, got {int(rows.min())} to {int(rows.max())}")
        return out.index_copy_(0, rows, made.reshape(-1, O))
    if registry.as_op():
        _linear_into(flat, x_MI, matrix, scale, bias, residual_MO, kind, group, act or "", rows, name)
    else:
        _launch(name, flat, x_MI, matrix, scale, bias, residual_MO, kind, group, act or "", rows, None)
    return out
