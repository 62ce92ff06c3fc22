"""The pass over a chunk of logits of linear_cross_entropy.py: losses by online softmax, and gradients in the logits' place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from llava_fast.kernels._triton import config, jit, on_device, tl


@jit
def _losses_kernel(
    logits, labels, loss, lse, V, scale, smoothing, z_loss, SMOOTH: tl.constexpr, GRADIENTS: tl.constexpr, R: tl.constexpr, N: tl.constexpr
):
    """One row a program: loss and lse by online softmax, then, with GRADIENTS, scale * d loss / d z over the logits.

    Lanes of a [R, N] tile keep maxima and sums of their own until the end: no exchange between threads in the loop, and
    1 + 1/R exponentials a logit.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * V
    label = tl.load(labels + row)
    at_label = tl.load(logits + label, mask=(label >= 0) & (label < V), other=float("nan")).to(tl.float32)
    offsets = tl.arange(0, R)[:, None] * N + tl.arange(0, N)[None, :]
    best = tl.full([N], -float("inf"), tl.float32)
    total = tl.zeros([N], tl.float32)
    summed = tl.zeros([N], tl.float32)
    for start in range(0, V, R * N):
        z = tl.load(logits + start + offsets, mask=start + offsets < V, other=-float("inf")).to(tl.float32)
        high = tl.maximum(best, tl.max(z, axis=0))
        base = tl.where(high == -float("inf"), 0.0, high)
        total = total * tl.exp(best - base) + tl.sum(tl.exp(z - base[None, :]), axis=0)
        best = high
        if SMOOTH:
            summed += tl.sum(tl.where(start + offsets < V, z, 0.0), axis=0)
    high = tl.max(best, axis=0)
    row_total = tl.sum(total * tl.exp(best - high), axis=0)
    row_lse = high + tl.log(row_total)
    target = at_label
    if SMOOTH:
        target += smoothing * (tl.sum(summed, axis=0) / V - at_label)
    tl.store(lse + row, row_lse)
    tl.store(loss + row, row_lse - target + z_loss * row_lse * row_lse)
    if GRADIENTS:
        # exp(z - high) / total loses less than exp(z - lse): the difference from the largest logit is small where it matters.
        factor = scale * (1 + 2 * z_loss * row_lse) / row_total
        _write_gradients(logits, label, high, factor, scale, V, smoothing, R, N)


@jit
def _gradients_kernel(logits, labels, lse, grad, V, smoothing, z_loss, R: tl.constexpr, N: tl.constexpr):
    """One row a program, whose lse is known: grad[row] * d loss / d z over the logits."""
    row = tl.program_id(0).to(tl.int64)
    label, row_lse, scale = tl.load(labels + row), tl.load(lse + row), tl.load(grad + row)
    _write_gradients(logits + row * V, label, row_lse, scale * (1 + 2 * z_loss * row_lse), scale, V, smoothing, R, N)


@jit
def _write_gradients(logits, label, base, factor, scale, V, smoothing, R: tl.constexpr, N: tl.constexpr):
    shift, at_label = scale * smoothing / V, scale * (1 - smoothing)
    offsets = tl.arange(0, R)[:, None] * N + tl.arange(0, N)[None, :]
    for start in range(0, V, R * N):
        z = tl.load(logits + start + offsets, mask=start + offsets < V).to(tl.float32)
        dz = factor * tl.exp(z - base) - shift - tl.where(start + offsets == label, at_label, 0.0)
        tl.store(logits + start + offsets, dz.to(logits.dtype.element_ty), mask=start + offsets < V)


def rows_triton(
    logits: Tensor,
    labels: Tensor,
    loss: Tensor | None,
    lse: Tensor,
    grad: Tensor | None,
    scale: float,
    smoothing: float,
    z_loss: float,
    gradients: bool,
) -> None:
    """The pass over a chunk of logits as linear_cross_entropy.py describes it."""
    rows, V = logits.shape
    # With the sum of the logits beside maximum and total, R = 4 spills 16 bytes (triton 3.6).
    default = {"R": 2 if smoothing else 4, "N": 2048, "num_warps": 8}
    launch = config("cross_entropy", str(logits.dtype).removeprefix("torch."), default, logits.device)
    with on_device(logits):
        if loss is not None:
            assert grad is None
            _losses_kernel[(rows,)](
                logits, labels, loss, lse, V, scale, smoothing, z_loss, SMOOTH=smoothing != 0, GRADIENTS=gradients, **launch
            )
        else:
            assert grad is not None
            _gradients_kernel[(rows,)](logits, labels, lse, grad, V, smoothing, z_loss, **launch)


def shipped_calls(device: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """The Triton launches that the models make, on tensors of `device`."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        logits = torch.zeros(256, 152000, dtype=dtype, device=device)
        labels = torch.zeros(256, dtype=torch.int64, device=device)
        loss, lse, grad = (torch.zeros(256, device=device) for _ in range(3))
        name = str(dtype).removeprefix("torch.")
        if dtype == torch.bfloat16:
            yield f"{name} losses", partial(rows_triton, logits, labels, loss, lse, None, 1.0, 0.0, 0.0, False)
            yield f"{name} gradients", partial(rows_triton, logits, labels, None, lse, grad, 1.0, 0.0, 0.0, True)
        yield f"{name} losses and gradients", partial(rows_triton, logits, labels, loss, lse, None, 1.0, 0.0, 0.0, True)
        yield f"{name} smoothed losses and gradients", partial(rows_triton, logits, labels, loss, lse, None, 1.0, 0.1, 1e-4, True)


def candidates() -> dict[tuple[str, str], list[dict[str, int]]]:
    """Launch parameters for bench/tune.py."""
    tiles = [(2, 2048, 4), (2, 2048, 8), (2, 4096, 8), (4, 1024, 4), (4, 2048, 16), (8, 1024, 8), (8, 2048, 16)]
    return {("cross_entropy", "bfloat16"): [dict(zip(("R", "N", "num_warps"), tile, strict=True)) for tile in tiles]}
