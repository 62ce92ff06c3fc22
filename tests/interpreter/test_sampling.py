"""The Triton sampling kernels in the interpreter: the same noise, the same kept sets and the same picks as the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llava_fast.kernels import _sampling_triton, _triton, registry
from llava_fast.kernels.sampling import sample, sample_reference


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_sampling_triton, "config", lambda *_: {"BLOCK": 64, "num_warps": 4})
    monkeypatch.setattr(_sampling_triton, "SPLIT", 96)


def both(logits: Tensor, **rows: Tensor) -> tuple[Tensor, Tensor]:
    assert _triton.INTERPRETED
    picks = []
    for name in ("triton", "reference"):
        with registry.use(sampling=name):
            picks.append(sample(logits, **rows))
    return picks[0], picks[1]


def rows(S: int, **change: Tensor) -> dict[str, Tensor]:
    values = {"temperature": torch.linspace(0, 1.5, S), "seeds": torch.arange(S) * 2**33 - 5, "steps": torch.arange(S) + 2**35}
    return {**values, **change}


@pytest.mark.parametrize("V", [1, 5, 64, 301])
def test_greedy_and_temperature(V: int) -> None:
    logits = torch.randn(6, V, generator=torch.Generator().manual_seed(V))
    counts = torch.randint(0, 3, (6, V), generator=torch.Generator().manual_seed(V), dtype=torch.int32)
    ours, expected = both(logits, **rows(6))
    assert torch.equal(ours, expected)
    penalties = {"repetition_penalty": torch.linspace(0.5, 2, 6), "frequency_penalty": torch.linspace(0, 1, 6)}
    ours, expected = both(logits, **rows(6), **penalties, presence_penalty=torch.linspace(-1, 1, 6), counts=counts)
    assert torch.equal(ours, expected)


def test_greedy_takes_the_first_of_equal_logits() -> None:
    ours, expected = both(torch.zeros(2, 200).index_fill(1, torch.tensor([70, 150]), 1.0), **rows(2, temperature=torch.zeros(2)))
    assert ours.tolist() == expected.tolist() == [70, 70]


@pytest.mark.parametrize("levels", [0, 2])
@pytest.mark.parametrize(
    "filters",
    [
        {"top_k": torch.tensor([0, 1, 3, 500])},
        {"top_p": torch.tensor([1.0, 0.9, 0.3, 1e-6])},
        {"min_p": torch.tensor([0.0, 0.01, 0.2, 1.0])},
        {"top_k": torch.tensor([40, 5, 20, 0]), "top_p": torch.tensor([0.8, 0.9, 1.0, 0.7]), "min_p": torch.tensor([0.05, 0, 0.1, 0])},
    ],
)
def test_filters(filters: dict[str, Tensor], levels: int) -> None:
    """Four seeds a case: with flat logits that the noise dominates a wrong set soon shows."""
    logits = torch.randn(4, 70, generator=torch.Generator().manual_seed(levels))
    if levels:
        logits = (logits * levels).round() / levels  # ties at every threshold
    ours, expected = both(logits, **rows(4, temperature=torch.tensor([0.5, 1.0, 2.0, 3.0])), **filters)
    assert torch.equal(ours, expected)


def test_the_kept_set_of_tied_logits() -> None:
    """Ten equal tokens at top-p 0.45: the first five are dropped, and every draw is among the last five."""
    S = 8
    ours, expected = both(torch.zeros(S, 10), **rows(S, temperature=torch.ones(S)), top_p=torch.full((S,), 0.45))
    assert torch.equal(ours, expected) and ours.min() >= 5 and len(set(ours.tolist())) > 1


def test_parameters_with_strides() -> None:
    logits = torch.randn(4, 150, generator=torch.Generator().manual_seed(5)) * 0.1
    filters = {"top_k": torch.tensor([9, 40, 3, 70]), "top_p": torch.tensor([0.9, 0.5, 0.99, 0.7]), "min_p": torch.full((4,), 0.01)}
    for given in (rows(4), rows(4) | filters):
        apart = {name: torch.stack([value, torch.zeros_like(value)], 1)[:, 0] for name, value in given.items()}
        ours, expected = both(logits, **apart)
        assert torch.equal(ours, expected) and torch.equal(expected, both(logits, **given)[1])


def test_a_negative_temperature_is_greedy_where_nobody_looks() -> None:
    logits, nothing = torch.randn(2, 150, generator=torch.Generator().manual_seed(6)), (None,) * 4
    row = torch.arange(2)
    for run in (_sampling_triton.sample_triton, sample_reference):
        for top_k in (None, torch.tensor([5, 9])):
            assert torch.equal(run(logits, torch.tensor([-1.0, 0.0]), top_k, None, None, row, row, *nothing), logits.argmax(1))
