"""linear with narrow weights against torch's fp32 F.linear of the same shape (its weights widened beforehand), and against the same
compiled with its weights frozen, which lays them out for oneDNN; over rows.

One to eight rows: the limit is reading the weights once, so the share is of the read bandwidth. Each round walks through copies of the
weight that together pass the caches (bench/cold.py), as the layers of a model do. Many rows: the limit is the rate of fp32 multiply-adds
of AVX-512. On a machine with AMX the share passes 100 %: one product at fp32's accuracy is three products of bf16 tiles (W in bf16, and
int8 with one scale a row), five (fp16) or six (fp32, int4), and a tile does 14 times the multiply-adds of AVX-512 in the same time.
LLAVA_FAST_ISA=avx512 shows the path without it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.baselines.kernels import check_agree, frozen_linear
from bench.cold import copies_for
from llava_fast.kernels.linear import Quantised, linear, quantise

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


def widened(weight: Tensor | Quantised) -> Tensor:
    """What torch multiplies with to compute the same."""
    return (weight.dequantise() if isinstance(weight, Quantised) else weight).float()


def copy_of(weight: Tensor | Quantised) -> Tensor | Quantised:
    return dataclasses.replace(weight, weight=weight.weight.clone()) if isinstance(weight, Quantised) else weight.clone()


# The others' sizes lie between those that stay.
FEW_SHAPES = [*FEW[:2], pytest.param(*FEW[2], marks=pytest.mark.long), FEW[3], pytest.param(*FEW[4], marks=pytest.mark.long), FEW[5]]
LONG = {("int8", shape) for shape in MANY[2:]} | {("int4", shape) for shape in MANY[1:]}
LONG |= {(kind, MANY[i]) for kind in ("float32", "bfloat16") for i in (4, 6)}


@pytest.mark.parametrize("kind", ["bfloat16", "int8", "int4"])
@pytest.mark.parametrize(("M", "I", "O"), FEW_SHAPES)
def test_few_rows(paired, M: int, I: int, O: int, kind: str) -> None:
    x, weight = torch.randn(M, I), torch.randn(O, I)
    made, size = stored(weight, kind)
    # The baseline's are four or more times as large: as many of each as the narrow ones need to pass the caches, or 2 GB of fp32.
    copies = max(1, min(copies_for(size), (2 << 30) // weight.nbytes))
    ours = [copy_of(made) for _ in range(copies)]
    baseline = [widened(made).clone() for _ in range(copies)]
    with torch.no_grad():
        check_agree(lambda: linear(x, made), {"torch": lambda: F.linear(x, baseline[0])})
        paired(
            lambda: [linear(x, w) for w in ours],
            lambda: [F.linear(x, w) for w in baseline],
            bytes_read=size,
            calls=copies,
        )


@pytest.mark.parametrize(
    ("M", "I", "O", "kind"),
    [
        pytest.param(*shape, kind, marks=[pytest.mark.long] if (kind, shape) in LONG else [], id="-".join(map(str, (*shape, kind))))
        for shape in MANY
        for kind in ("float32", "bfloat16", "int8", "int4")
    ],
)
def test_many_rows(paired, limits: Callable, M: int, I: int, O: int, kind: str) -> None:
    many_rows(paired, limits, M, I, O, kind)


@pytest.mark.parametrize("M", [1, 8, 64, 512, 2048])
def test_rows(paired, limits: Callable, M: int) -> None:
    """How the time grows: from reading the weight to multiplying with it."""
    many_rows(paired, limits, M, 1024, 5632, "float32", axis="rows", at=M)


def many_rows(paired, limits: Callable, M: int, I: int, O: int, kind: str, **point) -> None:
    x, ours = torch.randn(M, I), stored(torch.randn(O, I), kind)[0]
    weight = widened(ours)
    with torch.no_grad():
        frozen = frozen_linear(weight, x)
        rivals = {"torch": lambda: F.linear(x, weight), "torch.compile, frozen": lambda: frozen(x)}
        check_agree(lambda: linear(x, ours), rivals)
        limit = limits("cpu").fma_fp32_gflops * 1e9
        paired(lambda: linear(x, ours), rivals, operations=2 * M * I * O, limit=limit, **point)
