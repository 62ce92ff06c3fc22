"""Norms, activations and the rotary embedding against torch's ops, eager and compiled, on 32 MB, on one row as in decoding, and over rows.

They move bytes: the limit is the copy bandwidth, counting what must be read and written once. Both sides allocate their outputs, from
memory that the process keeps (kept_memory), in pages of 4 KiB; the limit is the best of several copies in large pages, and `test_copy`
the median of one under the conditions of the ops: inputs and outputs walk round a ring of copies that passes the caches (bench/cold.py).
test_rows and test_one_row find theirs where the last call left them, as a model's layers do, and have no share of a limit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.baselines.kernels import check_agree, inductor
from bench.cold import copied, copies_for, gradients, ring
from llava_fast import _cpu
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


def tensors(name: str, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """x, the residual of those that add one, weight, bias."""
    D = CASES[name][0]
    residual = torch.randn(rows, D).to(dtype) if "add" in name else None
    return torch.randn(rows, D).to(dtype), residual, torch.rand(D).to(dtype), torch.randn(D).to(dtype)


def test_copy(paired) -> None:
    """Written around the caches, as the ops write, against torch's."""
    moved, threads = 2 * BYTES, torch.get_num_threads()
    sets = copied((torch.randn(BYTES // 4), torch.zeros(BYTES // 4)), copies_for(moved))
    around = ring(sets)
    ours = around(lambda x, out: _cpu.copy_past_caches(out.data_ptr(), x.data_ptr(), BYTES, threads))
    ours()
    check_agree(lambda: [out for _, out in sets], {"torch": lambda: [x for x, _ in sets]})
    paired(ours, {"torch": around(lambda x, out: out.copy_(x))}, bytes_moved=moved, calls=len(sets))


# On the CPU the runtime computes in fp32; bf16 is for whoever calls the ops.
DTYPES = ["float32", pytest.param("bfloat16", marks=pytest.mark.long)]
# Near-duplicates of gelu_pytorch_tanh, in other models' towers and decoders: with --long.
NAMES = [pytest.param(name, marks=pytest.mark.long) if name in ("gelu", "quick_gelu", "silu") else name for name in CASES]


def rivals(theirs: Op) -> dict[str, Op]:
    return {"torch": theirs, "torch.compile": inductor(theirs)}


def forward(paired, ours: Op, theirs: dict[str, Op], sets: Sequence[Sequence[Any]], moved: float) -> None:
    check_agree(lambda: ours(*sets[0]), {name: lambda op=op: op(*sets[0]) for name, op in theirs.items()})
    around = ring(sets)
    paired(around(ours), {name: around(op) for name, op in theirs.items()}, bytes_moved=moved, calls=len(sets), rounds=3)


def backward(paired, ours: Op, theirs: dict[str, Op], sets: Sequence[Sequence[Any]], moved: float, compared: int | None = None) -> None:
    """compared: how many of the gradients are held against the others'."""
    outs = ours(*sets[0])
    grads = copied([torch.randn_like(out) for out in ([outs] if isinstance(outs, Tensor) else outs)], len(sets))  # type: ignore[attr-defined]
    mine, runs = gradients(ours, sets, grads), {name: gradients(op, sets, grads) for name, op in theirs.items()}
    check_agree(lambda: mine(0)[:compared], {name: lambda run=run: run(0)[:compared] for name, run in runs.items()})
    around = ring([(i,) for i in range(len(sets))])
    paired(around(mine), {name: around(run) for name, run in runs.items()}, bytes_moved=moved, calls=len(sets), rounds=3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_forward(paired, name: str, dtype: str) -> None:
    D, ours, theirs, arrays, _ = CASES[name]
    kind = getattr(torch, dtype)
    inputs = tensors(name, rows_for(D, kind), kind)
    moved = arrays * inputs[0].nbytes
    forward(paired, ours, rivals(theirs), copied(inputs, copies_for(moved)), moved)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_backward(paired, name: str, dtype: str) -> None:
    D, ours, theirs, _, arrays = CASES[name]
    kind = getattr(torch, dtype)
    inputs = tensors(name, rows_for(D, kind), kind)
    for x, used in zip(inputs, (True, "add" in name, "norm" in name, "layer" in name), strict=True):
        if x is not None:
            x.requires_grad_(used)
    moved = arrays * inputs[0].nbytes
    # torch sums a layer norm's weight gradient over 14,000 rows in bf16, and loses 14 %: compared are those of x and the residual.
    compared = None if kind == torch.float32 else 1 + ("add" in name)
    backward(paired, ours, rivals(theirs), copied(inputs, copies_for(moved)), moved, compared)


@pytest.mark.parametrize("rows", [16, 1024, *(pytest.param(rows, marks=pytest.mark.long) for rows in (128, 8192, 32768))])
@pytest.mark.parametrize("name", ["rms_norm", "swiglu"])
def test_rows(paired, name: str, rows: int) -> None:
    """How the time grows: a call's own cost, then that of the caches, then that of memory."""
    _, ours, theirs, _, _ = CASES[name]
    inputs = tensors(name, rows, torch.float32)
    sides = {side: lambda op=op: op(*inputs) for side, op in rivals(theirs).items()}
    check_agree(lambda: ours(*inputs), sides)
    paired(lambda: ours(*inputs), sides, axis="rows", at=rows)


def rope_inputs(dtype: torch.dtype, arrays: int) -> tuple[list[tuple[Tensor, ...]], float]:
    """Sets of q and k of 32 MB together and v, views of the fused product, cos and sin; and the bytes of `arrays` of q's size."""
    H, d = 16, 64
    T = rows_for(2 * H * d, dtype)
    moved = arrays * T * H * d * dtype.itemsize
    whole = torch.randn(T, 3 * H * d).to(dtype), torch.randn(T, d // 2).to(dtype), torch.randn(T, d // 2).to(dtype)
    made = copied(whole, copies_for(moved))
    return [(*(part.unflatten(-1, (H, d)) for part in fused.split(H * d, dim=-1)), cos, sin) for fused, cos, sin in made], moved


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rope(paired, dtype: str, direction: str) -> None:
    made, moved = rope_inputs(getattr(torch, dtype), 4)
    sets = [(q, k, cos, sin) for q, k, _, cos, sin in made]
    if direction == "forward":
        forward(paired, rope_qk, rivals(rope_reference), sets, moved)
        return
    leaves = [(q.contiguous().requires_grad_(), k.contiguous().requires_grad_(), cos, sin) for q, k, cos, sin in sets]
    backward(paired, rope_qk, rivals(rope_reference), leaves, moved)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rope_into_cache(paired, dtype: str) -> None:
    made, moved = rope_inputs(getattr(torch, dtype), 6)
    slots = torch.randperm(len(made[0][0]))
    caches = [torch.zeros(2, *k.shape, dtype=k.dtype) for _, k, _, _, _ in made]
    sets = [(*each, cache[0], cache[1], slots, None, None) for each, cache in zip(made, caches, strict=True)]

    def result(op: Op) -> tuple[object, Tensor]:
        caches[0].zero_()
        return op(*sets[0]), caches[0].clone()

    check_agree(lambda: result(rope_into_cache), {"torch": lambda: result(rope_into_cache_reference)})
    around = ring(sets)
    paired(around(rope_into_cache), {"torch": around(rope_into_cache_reference)}, bytes_moved=moved, calls=len(sets))


@pytest.mark.parametrize("name", NAMES)
def test_one_row(paired, name: str) -> None:
    """As decoding calls it: the time is that of the call, not of the bytes."""
    _, ours, theirs, _, _ = CASES[name]
    inputs = tensors(name, 1, torch.float32)
    around = ring([inputs] * 100)
    with torch.no_grad():
        sides = rivals(theirs)
        check_agree(lambda: ours(*inputs), {name: lambda op=op: op(*inputs) for name, op in sides.items()})
        paired(around(ours), {name: around(op) for name, op in sides.items()}, calls=100)
