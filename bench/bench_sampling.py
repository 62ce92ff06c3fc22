"""The next token of rows of 152,000 logits, against what torch does, eager and compiled: softmax and multinomial, after transformers'
processors where they filter; and the largest logit, against torch.argmax. The limit is reading the logits once.

Draws cannot be equal: what is checked is that every one is of the tokens that torch's filters leave, and the likeliest where the
temperature is next to none.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers.generation.logits_process import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from bench.baselines.kernels import check_agree, inductor
from llava_fast.kernels import registry
from llava_fast.kernels.sampling import argmax, sample

V = 152_000
TEMPERATURE, TOP_K, TOP_P = 0.7, 50, 0.9


def logits_of(S: int) -> Tensor:
    assert registry.resolve_name("sampling", "cpu", torch.float32) == "cpu"
    return torch.randn(S, V, generator=torch.Generator().manual_seed(0)) * 3


def ours(logits: Tensor, **filters: float) -> Callable[[], Tensor]:
    S = len(logits)
    rows = {name: torch.full((S,), value) for name, value in filters.items()}
    seeds, temperature = torch.arange(S), torch.full((S,), TEMPERATURE)
    return lambda: sample(logits, temperature=temperature, seeds=seeds, steps=seeds, **rows)


def multinomial(logits: Tensor) -> Tensor:
    return torch.multinomial((logits / TEMPERATURE).softmax(-1), 1)


@pytest.mark.parametrize("S", [1, 4, 16, 64])
def test_temperature(paired, S: int) -> None:
    logits, compiled = logits_of(S), inductor(multinomial)
    cold = sample(logits, temperature=torch.full((S,), 1e-4), seeds=torch.arange(S), steps=torch.arange(S))
    check_agree(lambda: cold, {"torch.argmax": lambda: logits.argmax(-1)})
    rivals = {"torch": lambda: multinomial(logits), "torch.compile": lambda: compiled(logits)}
    paired(ours(logits), rivals, bytes_read=S * V * 4, axis="rows", at=S)


@pytest.mark.parametrize("S", [1, 8])
@pytest.mark.parametrize("filters", ["top_k", "top_p", "top_k-top_p"])
def test_filters(paired, filters: str, S: int) -> None:
    logits, ids = logits_of(S), torch.zeros(S, 1, dtype=torch.int64)
    values = {name: {"top_k": TOP_K, "top_p": TOP_P}[name] for name in filters.split("-")}
    chain = LogitsProcessorList([TemperatureLogitsWarper(TEMPERATURE)])
    chain += [{"top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper}[name](value) for name, value in values.items()]
    draw, left = ours(logits, **values), chain(ids, logits)
    assert left.gather(1, draw()[:, None]).isfinite().all(), "a token that the filters drop"
    rivals = {"transformers": lambda: torch.multinomial(chain(ids, logits).softmax(-1), 1)}
    paired(draw, rivals, bytes_read=S * V * 4)


@pytest.mark.parametrize("S", [1, 8])
def test_argmax(paired, S: int) -> None:
    logits, compiled = logits_of(S), inductor(lambda logits: logits.argmax(-1))
    rivals = {"torch": lambda: logits.argmax(-1), "torch.compile": lambda: compiled(logits)}
    check_agree(lambda: argmax(logits), rivals)
    paired(lambda: argmax(logits), rivals, bytes_read=S * V * 4)
