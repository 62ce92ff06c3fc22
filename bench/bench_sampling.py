"""The next token of rows of 152,000 logits, against what torch does: softmax and multinomial, after transformers' processors where they
filter; and the largest logit, against torch.argmax. The limit is reading the logits once.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers.generation.logits_process import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from llava_fast.kernels import registry
from llava_fast.kernels.sampling import argmax, sample

V = 152_000
TEMPERATURE, TOP_K, TOP_P = 0.7, 50, 0.9


def logits_of(S: int) -> Tensor:
    assert registry.resolve_name("sampling", "cpu", torch.float32) == "cpu"
    return torch.randn(S, V, generator=torch.Generator().manual_seed(0)) * 3


def ours(logits: Tensor, **filters: float) -> Callable[[], object]:
    S = len(logits)
    rows = {name: torch.full((S,), value) for name, value in filters.items()}
    seeds, temperature = torch.arange(S), torch.full((S,), TEMPERATURE)
    return lambda: sample(logits, temperature=temperature, seeds=seeds, steps=seeds, **rows)


@pytest.mark.parametrize("S", [1, 8])
def test_temperature(paired, S: int) -> None:
    logits = logits_of(S)
    paired(ours(logits), lambda: torch.multinomial((logits / TEMPERATURE).softmax(-1), 1), bytes_read=S * V * 4)


@pytest.mark.parametrize("S", [1, 8])
@pytest.mark.parametrize("filters", ["top_k", "top_p", "top_k-top_p"])
def test_filters(paired, filters: str, S: int) -> None:
    logits, ids = logits_of(S), torch.zeros(S, 1, dtype=torch.int64)
    values = {name: {"top_k": TOP_K, "top_p": TOP_P}[name] for name in filters.split("-")}
    chain = LogitsProcessorList([TemperatureLogitsWarper(TEMPERATURE)])
    chain += [{"top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper}[name](value) for name, value in values.items()]
    paired(ours(logits, **values), lambda: torch.multinomial(chain(ids, logits).softmax(-1), 1), bytes_read=S * V * 4)


@pytest.mark.parametrize("S", [1, 8])
def test_argmax(paired, S: int) -> None:
    logits = logits_of(S)
    paired(lambda: argmax(logits), lambda: logits.argmax(-1), bytes_read=S * V * 4)
