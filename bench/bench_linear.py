"""linear with narrow weights against torch's fp32 F.linear of the same shape (its weights widened beforehand).

One to eight rows: the limit is reading the weights once, so the share is of the read bandwidth. Each round walks through copies of the
weight that together pass the caches, as the layers of a model do. Many rows: the limit is the rate of fp32 multiply-adds of AVX-512.
On a machine with AMX the share passes 100 %: one product at fp32's accuracy is three products of bf16 tiles (W in bf16, and int8 with
one scale a row), five (fp16) or six (fp32, int4), and a tile does 14 times the multiply-adds of AVX-512 in the same time.
LLAVA_FAST_ISA=avx512 shows the path without it.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from llava_fast.kernels.linear import Quantised, linear, quantise

COLD_BYTES = 256 << 20  # past the last-level cache of most machines
FEW = [(1, 1024, 152000), (1, 1024, 3072), (1, 1024, 1024), (1, 1024, 5632), (1, 2816, 1024), (8, 1024, 5632)]
MANY = [(729, 1152, 4304), (729, 4304, 1152), (729, 1152, 1152), (2916, 1152, 3456), (729, 592, 1152)]
MANY += [(1500, 1024, 3072), (1500, 1024, 5632), (1500, 2816, 1024)]


def stored(weight: torch.Tensor, kind: str) -> tuple[torch.Tensor | Quantised, int]:
    """The weight as `kind` with the groups that models are quantised in, and its bytes."""
    if kind in ("int8", "int4"):
        made = quantise(weight, kind, 32 if kind == "int4" else None)
        return made, made.weight.nbytes + made.scale.nbytes
    narrow = weight.to(getattr(torch, kind))
    return narrow, narrow.nbytes


@pytest.mark.parametrize("kind", ["bfloat16", "int8", "int4"])
@pytest.mark.parametrize(("M", "I", "O"), FEW)
def test_few_rows(paired, M: int, I: int, O: int, kind: str) -> None:
    x, weight = torch.randn(M, I), torch.randn(O, I)
    size = stored(weight, kind)[1]
    # fp32 copies for the baseline are four or more times as large: as many of each as the smaller ones need to pass the caches.
    copies = max(1, min(COLD_BYTES // size, (2 << 30) // weight.nbytes))
    ours = [stored(weight, kind)[0] for _ in range(copies)]
    baseline = [weight.clone() for _ in range(copies)]
    with torch.no_grad():
        paired(
            lambda: [linear(x, w) for w in ours],
            lambda: [F.linear(x, w) for w in baseline],
            bytes_read=copies * size,
        )


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize(("M", "I", "O"), MANY)
def test_many_rows(paired, limits: Callable, M: int, I: int, O: int, kind: str) -> None:
    x, weight = torch.randn(M, I), torch.randn(O, I)
    ours = stored(weight, kind)[0]
    with torch.no_grad():
        paired(lambda: linear(x, ours), lambda: F.linear(x, weight), operations=2 * M * I * O, limit=limits("cpu").fma_fp32_gflops * 1e9)
