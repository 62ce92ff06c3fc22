"""Norms, activations and the rotary embedding against torch's ops, eager and compiled, on 32 MB, on one row as in decoding, and over rows.

They move bytes: the limit is the copy bandwidth, counting what must be read and written once, of a copy into memory that is there.
Both sides allocate their outputs, from memory that the process keeps (kept_memory), in pages of 4 KiB. The limit is the best of several
copies of 256 MB in large pages: `test_copy` is the median of a copy under the conditions of the ops.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.baselines.kernels import check_agree, inductor
from llava_fast.kernels.activation import activation, activation_reference, swiglu
from llava_fast.kernels.norm import add_layer_norm, add_rms_norm, layer_norm, norm_reference, rms_norm
from llava_fast.kernels.rope import rope_into_cache, rope_into_cache_reference, rope_qk, rope_reference

BYTES = 32 << 20  # of x, at least


Op = Callable[..., object]
# name: width, ours, torch's, arrays of x's size that are moved forward and backward
CASES: dict[str, tuple[int, Op, Op, float, float]] = {
    "rms_norm": (1024, lambda x, r, w, b: rms_norm(x, w, 1e-6), lambda x, r, w, b: F.rms_norm(x, w.shape, w, 1e-6), 2, 3),
    "layer_norm": (1152, lambda x, r, w, b: layer_norm(x, w, b, 1e-6), lambda x, r, w, b: F.layer_norm(x, w.shape, w, b, 1e-6), 2, 3),
    "add_rms_norm": (1024, lambda x, r, w, b: add_rms_norm(x, r, w, 1e-6), lambda x, r, w, b: norm_reference(x, r, w, None, 1e-6), 4, 4),
    "add_layer_norm": (
        1152,
        lambda x, r, w, b: add_layer_norm(x, r, w, b, 1e-6),
        lambda x, r, w, b: norm_reference(x, r, w, b, 1e-6),
        4,
        4,
    ),
    "swiglu": (5632, lambda x, r, w, b: swiglu(x), lambda x, r, w, b: activation_reference(x, "swiglu"), 1.5, 2.5),
    **{
        kind: (4304, lambda x, r, w, b, kind=kind: activation(kind)(x), lambda x, r, w, b, kind=kind: activation_reference(x, kind), 2, 3)
        for kind in ("gelu", "gelu_pytorch_tanh", "quick_gelu", "silu")
    },
}
pytestmark = pytest.mark.usefixtures("kept_memory")


def rows_for(width: int, dtype: torch.dtype) -> int:
    return -(-BYTES // (width * dtype.itemsize))


def tensors(rows: int, D: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, residual, weight, bias."""
    return torch.randn(rows, D).to(dtype), torch.randn(rows, D).to(dtype), torch.rand(D).to(dtype), torch.randn(D).to(dtype)


def test_copy(paired) -> None:
    """Its baseline, a longer copy, leaves none of it in the caches, as the ops' baselines do."""
    x, out = torch.randn(BYTES // 4), torch.zeros(BYTES // 4)
    longer = torch.zeros(2, 2 * BYTES)
    paired(lambda: out.copy_(x), lambda: longer[0].copy_(longer[1]), bytes_moved=2 * x.nbytes)


# Near-duplicates of gelu_pytorch_tanh, in other models' towers and decoders: with --long.
NAMES = [pytest.param(name, marks=pytest.mark.long) if name in ("gelu", "quick_gelu", "silu") else name for name in CASES]


def rivals(theirs: Op, *arguments: Tensor) -> dict[str, Callable[[], object]]:
    compiled = inductor(theirs)
    return {"torch": lambda: theirs(*arguments), "torch.compile": lambda: compiled(*arguments)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_forward(paired, name: str, dtype: str) -> None:
    D, ours, theirs, moved, _ = CASES[name]
    kind = getattr(torch, dtype)
    arguments = tensors(rows_for(D, kind), D, kind)
    sides = rivals(theirs, *arguments)
    check_agree(lambda: ours(*arguments), sides)
    paired(lambda: ours(*arguments), sides, bytes_moved=moved * arguments[0].nbytes)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.long)])
@pytest.mark.parametrize("name", NAMES)
def test_backward(paired, name: str, dtype: str) -> None:
    D, ours, theirs, _, moved = CASES[name]
    kind = getattr(torch, dtype)
    x, r, w, b = (t.requires_grad_() for t in tensors(rows_for(D, kind), D, kind))
    inputs = (x, *[r] * ("add" in name), *[w] * ("norm" in name), *[b] * ("layer" in name))
    outputs = {"ours": ours(x, r, w, b), **{side: run() for side, run in rivals(theirs, x, r, w, b).items()}}
    grads = [torch.randn_like(out) for out in (outputs["ours"] if "add" in name else [outputs["ours"]])]  # type: ignore[attr-defined]
    runs = {
        # torch.compile refuses a second backward pass of one graph unless the first keeps it, as these do.
        side: lambda out=out: torch.autograd.grad(out, inputs, grads, retain_graph=True)
        for side, out in outputs.items()
    }
    mine = runs.pop("ours")
    # torch sums a layer norm's weight gradient over 14,000 rows in bf16, and loses 14 %: compared are those of x and the residual.
    compared = len(inputs) if kind == torch.float32 else 1 + ("add" in name)
    check_agree(lambda: mine()[:compared], {side: lambda run=run: run()[:compared] for side, run in runs.items()})
    paired(mine, runs, bytes_moved=moved * x.nbytes)


@pytest.mark.parametrize("rows", [16, 1024, 32768, *(pytest.param(rows, marks=pytest.mark.long) for rows in (128, 8192))])
@pytest.mark.parametrize("name", ["rms_norm", "swiglu"])
def test_rows(paired, name: str, rows: int) -> None:
    """How the time grows: a call's own cost, then that of the caches, then that of memory."""
    D, ours, theirs, moved, _ = CASES[name]
    arguments = tensors(rows, D, torch.float32)
    sides = rivals(theirs, *arguments)
    check_agree(lambda: ours(*arguments), sides)
    paired(lambda: ours(*arguments), sides, bytes_moved=moved * arguments[0].nbytes, axis="rows", at=rows)


def rope_inputs(dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q and k of 32 MB together and v, views of the fused product; cos and sin."""
    H, d = 16, 64
    T = rows_for(2 * H * d, dtype)
    q, k, v = (part.unflatten(-1, (H, d)) for part in torch.randn(T, 3 * H * d).to(dtype).split(H * d, dim=-1))
    return q, k, v, torch.randn(T, d // 2).to(dtype), torch.randn(T, d // 2).to(dtype)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rope(paired, dtype: str, direction: str) -> None:
    q, k, _, cos, sin = rope_inputs(getattr(torch, dtype))
    moved = 4 * q.numel() * q.element_size()
    if direction == "forward":
        sides = rivals(rope_reference, q, k, cos, sin)
        check_agree(lambda: rope_qk(q, k, cos, sin), sides)
        paired(lambda: rope_qk(q, k, cos, sin), sides, bytes_moved=moved)
        return
    q, k = q.contiguous().requires_grad_(), k.contiguous().requires_grad_()
    grads = torch.randn_like(q), torch.randn_like(k)
    outs = {"ours": rope_qk(q, k, cos, sin), **{side: run() for side, run in rivals(rope_reference, q, k, cos, sin).items()}}
    runs = {side: lambda out=out: torch.autograd.grad(out, (q, k), grads, retain_graph=True) for side, out in outs.items()}
    mine = runs.pop("ours")
    check_agree(mine, runs)
    paired(mine, runs, bytes_moved=moved)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rope_into_cache(paired, dtype: str) -> None:
    q, k, v, cos, sin = rope_inputs(getattr(torch, dtype))
    cache, slots = torch.zeros(2, *k.shape, dtype=k.dtype), torch.randperm(len(k))
    arguments = (q, k, v, cos, sin, cache[0], cache[1], slots, None, None)
    moved = 6 * q.numel() * q.element_size()

    def result(op: Op) -> tuple[object, Tensor]:
        cache.zero_()
        return op(*arguments), cache.clone()

    check_agree(lambda: result(rope_into_cache), {"torch": lambda: result(rope_into_cache_reference)})
    paired(lambda: rope_into_cache(*arguments), {"torch": lambda: rope_into_cache_reference(*arguments)}, bytes_moved=moved)


@pytest.mark.parametrize("name", NAMES)
def test_one_row(paired, name: str) -> None:
    """As decoding calls it: the time is that of the call, not of the bytes."""
    D, ours, theirs, _, _ = CASES[name]
    arguments = tensors(1, D, torch.float32)
    compiled = inductor(theirs)

    def hundred(op: Op) -> Callable[[], None]:
        def run() -> None:
            for _ in range(100):
                op(*arguments)

        return run

    with torch.no_grad():
        check_agree(lambda: ours(*arguments), {"torch.compile": lambda: compiled(*arguments)})
        paired(hundred(ours), {"torch": hundred(theirs), "torch.compile": hundred(compiled)})
