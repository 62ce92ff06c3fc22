"""Norms, activations and the rotary embedding against torch's ops on 32 MB, and on one row as in decoding.

They move bytes: the limit is the copy bandwidth, counting what must be read and written once. Both sides allocate their outputs, from
memory that the process keeps, as models loaded by lf.load do: with page faults the largest part of the time would be theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llava_fast.kernels.activation import activation, activation_reference, swiglu
from llava_fast.kernels.norm import add_rms_norm, layer_norm, norm_reference, rms_norm
from llava_fast.kernels.rope import rope_qk, rope_reference
from llava_fast.memory import keep_freed_memory

BYTES = 24 << 20  # of x: outputs past 32 MB are mapped and faulted in anew at each call
Op = Callable[..., object]
# name: width, ours, torch's, arrays of x's size that are moved forward and backward
CASES: dict[str, tuple[int, Op, Op, float, float]] = {
    "rms_norm": (1024, lambda x, w, b: rms_norm(x, w, 1e-6), lambda x, w, b: F.rms_norm(x, w.shape, w, 1e-6), 2, 3),
    "layer_norm": (1152, lambda x, w, b: layer_norm(x, w, b, 1e-6), lambda x, w, b: F.layer_norm(x, w.shape, w, b, 1e-6), 2, 3),
    "add_rms_norm": (1024, lambda x, w, b: add_rms_norm(x, x, w, 1e-6)[0], lambda x, w, b: norm_reference(x, x, w, None, 1e-6)[0], 3, 3),
    "swiglu": (5632, lambda x, w, b: swiglu(x), lambda x, w, b: activation_reference(x, "swiglu"), 1.5, 2.5),
    **{
        kind: (4304, lambda x, w, b, kind=kind: activation(kind)(x), lambda x, w, b, kind=kind: activation_reference(x, kind), 2, 3)
        for kind in ("gelu", "gelu_pytorch_tanh", "quick_gelu")
    },
}


@pytest.fixture(autouse=True)
def memory_that_is_there() -> Iterator[None]:
    keep_freed_memory()
    yield


def tensors(rows: int, D: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(rows, D).to(dtype), torch.rand(D).to(dtype), torch.randn(D).to(dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_forward(paired, name: str, dtype: str) -> None:
    D, ours, theirs, moved, _ = CASES[name]
    kind = getattr(torch, dtype)
    x, w, b = tensors(BYTES // D // kind.itemsize, D, kind)
    paired(lambda: ours(x, w, b), lambda: theirs(x, w, b), bytes_moved=moved * x.nbytes)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_backward(paired, name: str, dtype: str) -> None:
    D, ours, theirs, _, moved = CASES[name]
    kind = getattr(torch, dtype)
    x, w, b = (t.requires_grad_() for t in tensors(BYTES // D // kind.itemsize, D, kind))
    inputs = (x, w, b) if name == "layer_norm" else (x, w) if "norm" in name else (x,)
    outputs: list[Tensor] = [op(x, w, b) for op in (ours, theirs)]  # type: ignore[misc]
    grad = torch.randn_like(outputs[0])
    runs = [lambda out=out: torch.autograd.grad(out, inputs, grad, retain_graph=True) for out in outputs]  # type: ignore[misc]
    paired(*runs, bytes_moved=moved * x.nbytes)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rope(paired, dtype: str) -> None:
    kind = getattr(torch, dtype)
    T, H, d = BYTES // 3072 // kind.itemsize, 16, 64
    q, k, _ = (part.unflatten(-1, (H, d)) for part in torch.randn(T, 3 * H * d).to(kind).split(H * d, dim=-1))
    cos, sin = torch.randn(T, d // 2).to(kind), torch.randn(T, d // 2).to(kind)
    paired(lambda: rope_qk(q, k, cos, sin), lambda: rope_reference(q, k, cos, sin), bytes_moved=4 * q.numel() * kind.itemsize)


@pytest.mark.parametrize("name", CASES)
def test_one_row(paired, name: str) -> None:
    """As decoding calls it: the time is that of the call, not of the bytes."""
    D, ours, theirs, _, _ = CASES[name]
    x, w, b = tensors(1, D, torch.float32)

    def hundred(op: Op) -> None:
        for _ in range(100):
            op(x, w, b)

    with torch.no_grad():
        paired(lambda: hundred(ours), lambda: hundred(theirs))
