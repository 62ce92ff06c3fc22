"""The next token of rows of 152,000 logits, against what torch does, eager and compiled: softmax and multinomial, after transformers'
processors where they filter; and the largest logit, against torch.argmax. The limit is reading the logits once: each call has rows that
no cache holds (bench/cold.py), though after the head's product some may lie there.

Draws cannot be equal: what is checked is that every one is of the tokens that torch's filters leave, and the likeliest where the
temperature is next to none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation.logits_process import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from bench.baselines.kernels import check_agree, inductor
from bench.cold import copied, copies_for, ring
from llava_fast.kernels import registry
from llava_fast.kernels.sampling import argmax, sample

V = 152_000
TEMPERATURE, TOP_K, TOP_P = 0.7, 50, 0.9


def logits_of(S: int) -> Tensor:
    assert registry.resolve_name("sampling", "cpu", torch.float32) == "cpu"
    return torch.randn(S, V, generator=torch.Generator().manual_seed(0)) * 3


def ours(S: int, **filters: float) -> Callable[[Tensor], Tensor]:
    rows = {name: torch.full((S,), value) for name, value in filters.items()}
    seeds, temperature = torch.arange(S), torch.full((S,), TEMPERATURE)
    return lambda logits: sample(logits, temperature=temperature, seeds=seeds, steps=seeds, **rows)


def multinomial(logits: Tensor) -> Tensor:
    return torch.multinomial((logits / TEMPERATURE).softmax(-1), 1)


def timed(paired, logits: Tensor, mine: Callable[[Tensor], Tensor], rivals: dict[str, Callable[[Tensor], Tensor]], **point: Any) -> None:
    """A call a round."""
    around = ring(copied([logits], copies_for(logits.nbytes)))
    paired(around(mine, 1), {name: around(op, 1) for name, op in rivals.items()}, bytes_read=logits.nbytes, rounds=3, **point)


@pytest.mark.parametrize("S", [1, 4, 16, 64])
def test_temperature(paired, S: int) -> None:
    logits = logits_of(S)
    cold = sample(logits, temperature=torch.full((S,), 1e-4), seeds=torch.arange(S), steps=torch.arange(S))
    check_agree(lambda: cold, {"torch.argmax": lambda: logits.argmax(-1)})
    timed(paired, logits, ours(S), {"torch": multinomial, "torch.compile": inductor(multinomial)}, axis="rows", at=S)


@pytest.mark.parametrize("S", [1, 8])
@pytest.mark.parametrize("filters", ["top_k", "top_p", "top_k-top_p"])
def test_filters(paired, filters: str, S: int) -> None:
    logits, ids = logits_of(S), torch.zeros(S, 1, dtype=torch.int64)
    values = {name: {"top_k": TOP_K, "top_p": TOP_P}[name] for name in filters.split("-")}
    chain = LogitsProcessorList([TemperatureLogitsWarper(TEMPERATURE)])
    chain += [{"top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper}[name](value) for name, value in values.items()]
    draw = ours(S, **values)
    assert chain(ids, logits).gather(1, draw(logits)[:, None]).isfinite().all(), "a token that the filters drop"
    timed(paired, logits, draw, {"transformers": lambda logits: torch.multinomial(chain(ids, logits).softmax(-1), 1)})


@pytest.mark.parametrize("S", [1, 8])
def test_argmax(paired, S: int) -> None:
    logits, largest = logits_of(S), lambda logits: logits.argmax(-1)
    rivals = {"torch": largest, "torch.compile": inductor(largest)}
    check_agree(lambda: argmax(logits), {name: lambda op=op: op(logits) for name, op in rivals.items()})
    timed(paired, logits, argmax, rivals)
