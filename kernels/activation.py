"""Activations by the names that transformers' configs use, and SwiGLU from one buffer.

    gelu               x Phi(x), Phi the normal distribution function    gelu_pytorch_tanh  x sigmoid(2 sqrt(2 / pi) (x + 0.044715 x^3))
    quick_gelu         x sigmoid(1.702 x), of CLIP                       silu               x sigmoid(x)
    swiglu([g, u])     silu(g) * u, of arXiv 2002.05202

gelu_pytorch_tanh is torch's (1 + tanh(y)) / 2 written as sigmoid(2 y). Arithmetic is fp32 (fp64 for fp64), rounded once. The gradient of
x sigmoid(u(x)) is s + x s (1 - s) u'(x); of gelu, Phi(x) + x phi(x).

Shape letters: T rows, F MLP width.
"""

# mypy: disable-error-code="no-untyped-def"
# (of the kernels)

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llava_fast.kernels import _native, registry
from llava_fast.kernels._native import element
from llava_fast.kernels._triton import DEVICES, config, jit, on_device, tl, triton
from llava_fast.kernels.registry import Implementation


@jit
def _inner(x, KIND: tl.constexpr):
    """u(x) of x sigmoid(u(x))."""
    if KIND == "gelu_pytorch_tanh":
        x = x * (1.5957691216057308 + 0.07135481282553446 * x * x)
    if KIND == "quick_gelu":
        x = 1.702 * x
    return x


@jit
def _inner_slope(x, KIND: tl.constexpr):
    """u'(x). One return: the compiler wants all of them to have one type, where the interpreter does not mind."""
    slope = tl.full(x.shape, 1.0, tl.float32)
    if KIND == "gelu_pytorch_tanh":
        slope = 1.5957691216057308 + 0.21406443847660338 * x * x
    if KIND == "quick_gelu":
        slope = tl.full(x.shape, 1.702, tl.float32)
    return slope


@jit
def _activation_kernel(out_ptr, x_ptr, n, KIND: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=0.0).to(tl.float32)
    if KIND == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        y = x * tl.sigmoid(_inner(x, KIND))
    tl.store(out_ptr + i, y.to(out_ptr.dtype.element_ty), mask=i < n)


@jit
def _activation_backward_kernel(grad_x_ptr, grad_ptr, x_ptr, n, KIND: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + i, mask=i < n, other=0.0).to(tl.float32)
    if KIND == "gelu":
        slope = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    else:
        u = _inner(x, KIND)
        s = tl.sigmoid(u)
        slope = s + x * s * tl.sigmoid(-u) * _inner_slope(x, KIND)  # 1 - s would lose what u'(x) makes large
    tl.store(grad_x_ptr + i, (grad * slope).to(grad_x_ptr.dtype.element_ty), mask=i < n)


@jit
def _swiglu_kernel(out_ptr, gate_up_ptr, F, BLOCK: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_up_ptr + t * 2 * F + i, mask=i < F, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + t * 2 * F + F + i, mask=i < F, other=0.0).to(tl.float32)
    tl.store(out_ptr + t * F + i, (gate * tl.sigmoid(gate) * up).to(out_ptr.dtype.element_ty), mask=i < F)


@jit
def _swiglu_backward_kernel(grad_gate_up_ptr, grad_ptr, gate_up_ptr, F, BLOCK: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_up_ptr + t * 2 * F + i, mask=i < F, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + t * 2 * F + F + i, mask=i < F, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + t * F + i, mask=i < F, other=0.0).to(tl.float32)
    s = tl.sigmoid(gate)
    dtype = grad_gate_up_ptr.dtype.element_ty
    tl.store(grad_gate_up_ptr + t * 2 * F + i, (grad * up * (s + gate * s * (1.0 - s))).to(dtype), mask=i < F)
    tl.store(grad_gate_up_ptr + t * 2 * F + F + i, (grad * gate * s).to(dtype), mask=i < F)


@cache
def _kind(kind: str) -> Any:
    return getattr(_native.cpu().Activation, kind)


def _forward_cpu(x: Tensor, kind: str) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    dtype = element(x.dtype)
    if kind == "swiglu":
        F = x.shape[-1] // 2
        out = x.new_empty(*x.shape[:-1], F)
        _native.cpu().swiglu_forward(dtype, out.numel() // F, F, x.data_ptr(), out.data_ptr(), torch.get_num_threads())
    else:
        _native.cpu().activation_forward(dtype, _kind(kind), x.numel(), x.data_ptr(), out.data_ptr(), torch.get_num_threads())
    return out


def _backward_cpu(grad: Tensor, x: Tensor, kind: str) -> Tensor:
    grad_x = torch.empty_like(x)
    dtype, pointers = element(x.dtype), (x.data_ptr(), grad.data_ptr(), grad_x.data_ptr(), torch.get_num_threads())
    if kind == "swiglu":
        _native.cpu().swiglu_backward(dtype, grad.numel() // grad.shape[-1], grad.shape[-1], *pointers)
    else:
        _native.cpu().activation_backward(dtype, _kind(kind), x.numel(), *pointers)
    return grad_x


def _launch(kernel: str, size: int, device: torch.device) -> dict[str, Any]:
    return config(kernel, f"n{size}" if kernel.startswith("swiglu") else "any", {"BLOCK": 1024, "num_warps": 4}, device)


def _forward_triton(x: Tensor, kind: str) -> Tensor:
    x = x.contiguous()
    F = x.shape[-1] // 2
    out = x.new_empty(*x.shape[:-1], F) if kind == "swiglu" else torch.empty_like(x)
    if out.numel() == 0:
        return out
    with on_device(x):
        if kind == "swiglu":
            launch = _launch("swiglu", F, x.device)
            _swiglu_kernel[(out.numel() // F, triton.cdiv(F, launch["BLOCK"]))](out, x, F, **launch)
        else:
            launch = _launch("activation", 0, x.device)
            _activation_kernel[(triton.cdiv(x.numel(), launch["BLOCK"]),)](out, x, x.numel(), KIND=kind, **launch)
    return out


def _backward_triton(grad: Tensor, x: Tensor, kind: str) -> Tensor:
    grad_x = torch.empty_like(x)
    if x.numel() == 0:
        return grad_x
    with on_device(x):
        if kind == "swiglu":
            F = grad.shape[-1]
            launch = _launch("swiglu_backward", F, x.device)
            _swiglu_backward_kernel[(grad.numel() // F, triton.cdiv(F, launch["BLOCK"]))](grad_x, grad, x, F, **launch)
        else:
            launch = _launch("activation_backward", 0, x.device)
            _activation_backward_kernel[(triton.cdiv(x.numel(), launch["BLOCK"]),)](grad_x, grad, x, x.numel(), KIND=kind, **launch)
    return grad_x


_LAUNCHERS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "cpu": (_forward_cpu, _backward_cpu),
    "triton": (_forward_triton, _backward_triton),
}


def activation_reference(x: Tensor, kind: str) -> Tensor:
    """The same functions from torch's ops, any device."""
    if kind == "swiglu":
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up
    if kind == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    return F.silu(x) if kind == "silu" else F.gelu(x, approximate="tanh" if kind == "gelu_pytorch_tanh" else "none")


@torch.library.custom_op("llava_fast::activation", mutates_args=())
def _activation(x: Tensor, kind: str, implementation: str) -> Tensor:
    return _LAUNCHERS[implementation][0](x, kind)


@_activation.register_fake
def _(x: Tensor, kind: str, implementation: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2) if kind == "swiglu" else torch.empty_like(x.contiguous())


@torch.library.custom_op("llava_fast::activation_backward", mutates_args=())
def _activation_backward(grad: Tensor, x: Tensor, kind: str, implementation: str) -> Tensor:
    return _LAUNCHERS[implementation][1](grad.contiguous(), x.contiguous(), kind)


@_activation_backward.register_fake
def _(grad: Tensor, x: Tensor, kind: str, implementation: str) -> Tensor:
    return torch.empty_like(x.contiguous())


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.kind, ctx.implementation = inputs
    ctx.save_for_backward(x)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _activation_backward(grad, ctx.saved_tensors[0], ctx.kind, ctx.implementation), None, None


_activation.register_autograd(_backward, setup_context=_setup_context)


_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
registry.register(
    "activation",
    {
        "cpu": Implementation(("cpu",), _DTYPES, modules=("llava_fast._cpu",), invariant=True),
        "reference": Implementation(),
        # Never run on hardware: by name only until it is measured.
        "triton": Implementation(DEVICES, _DTYPES, modules=("triton",), default=False, invariant=True),
    },
)


def _run(x: Tensor, kind: str) -> Tensor:
    name = registry.resolve_name("activation", x.device.type, x.dtype)
    if name == "reference":
        return activation_reference(x, kind)
    if registry.as_op(x):
        return _activation(x, kind, name)
    return _LAUNCHERS[name][0](x, kind)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up: [..., 2 F], the gate first -> [..., F] in its dtype. Differentiable. Raises ValueError for an odd width."""
    if gate_up.dim() == 0 or gate_up.shape[-1] % 2 or gate_up.shape[-1] == 0:
        raise ValueError(f"expected [..., 2 F], the gate and the up projection side by side, got {list(gate_up.shape)}")
    return _run(gate_up, "swiglu")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    **{kind: partial(_run, kind=kind) for kind in ("gelu", "gelu_pytorch_tanh", "quick_gelu", "silu")},
    "linear": lambda x: x,
}


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The function of that name, of a tensor of any shape; differentiable. Raises ValueError for a name we do not have."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {sorted(ACTIVATIONS)}, got {name!r}")
    return ACTIVATIONS[name]


def shipped_calls(device: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """The launches that a GPU build ships, for the ahead-of-time compile and the warm-up."""
    for kind, width, dtype in [
        *((kind, 4304, torch.bfloat16) for kind in ("gelu", "gelu_pytorch_tanh", "quick_gelu", "silu")),
        ("swiglu", 2 * 11008, torch.bfloat16),
        ("swiglu", 2 * 2816, torch.float16),
        ("gelu", 4304, torch.float32),
    ]:
        x = torch.empty(729, width, dtype=dtype, device=device)
        grad = torch.empty(729, width // 2 if kind == "swiglu" else width, dtype=dtype, device=device)
        name = f"{kind} {width} {str(dtype).removeprefix('torch.')}"
        yield name, lambda x=x, kind=kind: _forward_triton(x, kind)  # type: ignore[misc]
        yield f"{name} backward", lambda g=grad, x=x, kind=kind: _backward_triton(g, x, kind)  # type: ignore[misc]
