"""Sampling: kept sets of transformers' processors, frequencies of draws, noise by seed and step, penalties, checks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llava_fast.kernels.sampling import kept, log_exponential, penalised, philox, sample
from llava_fast.requests import SamplingParams


def full(S: int, value: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full((S,), value, dtype=dtype)


def test_philox_known_answers() -> None:
    """The three vectors of the authors' kat_vectors for philox4x32-10 whose counter our layout can express."""
    zero = philox(torch.tensor([0]), torch.tensor([0]), 4)
    assert zero[0].tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_noise_depends_on_seed_step_and_token_alone() -> None:
    seeds, steps = torch.tensor([7, 7, 8, 7 + 2**32, -1]), torch.tensor([0, 1, 0, 0, 2**40])
    words = philox(seeds, steps, 1001)
    assert words.shape == (5, 1001) and words.min() >= 0 and words.max() < 2**32
    assert len({tuple(row) for row in words[:, :8].tolist()}) == 5
    assert torch.equal(philox(seeds[2:3], steps[2:3], 37), words[2:3, :37])


def test_exponential_noise_is_exponential() -> None:
    noise = log_exponential(philox(torch.arange(4), torch.zeros(4, dtype=torch.int64), 100_000)).double().exp()
    assert noise.isfinite().all() and noise.min() > 0
    for quantile in (1e-4, 0.01, 0.5, 0.99):
        threshold = -torch.log1p(torch.tensor(-quantile, dtype=torch.float64))
        n, expected = noise.numel(), quantile * noise.numel()
        assert abs((noise < threshold).sum() - expected) < 4 * (n * quantile * (1 - quantile)) ** 0.5
    words = torch.tensor([0, 2**32 - 1, 1 << 25])
    exact = -torch.log1p(-((words >> 1).double() + 0.5) / 2**31)
    torch.testing.assert_close(log_exponential(words[[0, 2]]).double(), exact[[0, 2]].log(), rtol=1e-6, atol=1e-6)
    assert log_exponential(words[1:2]).isfinite().all()


def warped(logits: Tensor, p: SamplingParams) -> Tensor:
    """By transformers' processors."""
    chain = LogitsProcessorList([TemperatureLogitsWarper(p.temperature)])
    chain += [TopKLogitsWarper(p.top_k)] if p.top_k else []
    chain += [TopPLogitsWarper(p.top_p)] if p.top_p < 1 else []
    chain += [MinPLogitsWarper(p.min_p)] if p.min_p > 0 else []
    return chain(torch.zeros(len(logits), 1, dtype=torch.int64), logits)


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_k": 1},
        {"top_k": 500},
        {"top_p": 0.9},
        {"top_p": 1e-6},
        {"min_p": 0.05},
        {"top_k": 20, "top_p": 0.8, "min_p": 0.02, "temperature": 1.3},
    ],
)
@pytest.mark.parametrize("levels", [0, 4])
def test_kept_sets_are_those_of_transformers(params: dict, levels: int) -> None:
    logits = torch.randn(6, 301, generator=torch.Generator().manual_seed(0)) * 3
    if levels:
        logits = (logits * levels / 3).round() / levels * 3  # many ties
    p = SamplingParams(**{"temperature": 1.0, **params})
    ours = kept(logits / p.temperature, full(6, p.top_k, torch.int64), full(6, p.top_p, torch.float64), full(6, p.min_p, torch.float64))
    expected = warped(logits, p)
    assert torch.equal(ours.sort(-1).values, expected.sort(-1).values)  # which of equal logits top-p drops is left open there
    if not levels:
        assert torch.equal(ours, expected)
    for z, row in zip(logits / p.temperature, ours, strict=True):  # here the first of them go first
        border = row[row.isfinite()].min()
        among = row[z == border].isfinite()
        assert torch.equal(among, among.sort().values)


def test_draws_have_the_probabilities() -> None:
    """Chi-square of 20,000 draws over 12 tokens: the 0.9999 quantile at 11 degrees of freedom is 37.4."""
    logits = torch.tensor([2.0, 0.5, 0.0, -1.0, 1.5, -2.0, 0.3, 0.7, -0.5, 1.0, -3.0, 0.1])
    n = 20_000
    picks = sample(logits.expand(n, -1), temperature=full(n, 0.8), seeds=torch.full((n,), 11), steps=torch.arange(n))
    expected = (logits / 0.8).softmax(-1) * n
    chi_square = ((picks.bincount(minlength=12) - expected).square() / expected).sum()
    assert chi_square < 37.4
    filtered = sample(
        logits.expand(n, -1), temperature=full(n, 0.8), seeds=torch.full((n,), 12), steps=torch.arange(n), top_k=full(n, 3, torch.int64)
    )
    assert set(filtered.tolist()) == {0, 4, 9}


def test_greedy_takes_the_first_of_equal_logits_and_ignores_filters() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, 3.0], [5.0, 5.0, 5.0, 5.0]])
    picks = sample(
        logits, temperature=full(2, 0.0), seeds=torch.arange(2), steps=torch.arange(2), top_k=torch.tensor([1, 1]), top_p=full(2, 0.1)
    )
    assert picks.tolist() == [1, 0]


def test_a_row_alone_is_the_row_in_a_batch() -> None:
    logits = torch.randn(5, 999, generator=torch.Generator().manual_seed(1))
    rows = {
        "temperature": torch.tensor([0.0, 0.5, 1.0, 2.0, 1.0]),
        "seeds": torch.tensor([3, 3, 4, 5, 4]),
        "steps": torch.tensor([0, 1, 2, 3, 3]),
        "top_k": torch.tensor([0, 50, 0, 3, 0]),
        "top_p": torch.tensor([1.0, 0.9, 1.0, 1.0, 0.5]),
        "min_p": torch.tensor([0.0, 0.0, 0.1, 0.0, 0.0]),
    }
    together = sample(logits, **rows)
    for s in range(5):
        assert sample(logits[s : s + 1], **{name: value[s : s + 1] for name, value in rows.items()}).item() == together[s]
    assert len(set(sample(logits[2:3].expand(50, -1), temperature=full(50, 1.0), seeds=torch.arange(50), steps=full(50, 0).long()))) > 10


def test_penalties() -> None:
    logits = torch.randn(2, 40, generator=torch.Generator().manual_seed(2))
    counts = torch.zeros(2, 40, dtype=torch.int32)
    counts[0, [3, 5]], counts[1, 7] = torch.tensor([1, 4], dtype=torch.int32), 2
    repeated = penalised(logits, torch.tensor([1.3, 0.7]), None, None, counts)
    for row, seen, penalty in ((0, [3, 5], 1.3), (1, [7], 0.7)):
        processor = RepetitionPenaltyLogitsProcessor(penalty)
        assert torch.equal(repeated[row : row + 1], processor(torch.tensor([seen]), logits[row : row + 1].clone()))
    both = penalised(logits, None, torch.tensor([0.5, 1.0]), torch.tensor([0.25, 0.0]), counts)
    torch.testing.assert_close((logits - both)[0, [3, 5, 6]], torch.tensor([0.75, 1.5, 0.0]))
    torch.testing.assert_close((logits - both)[1, [7, 3]], torch.tensor([1.0, 0.0]))


def test_compiles_without_graph_breaks() -> None:
    logits, rows = torch.randn(3, 50), {"temperature": full(3, 0.9), "seeds": torch.arange(3), "steps": torch.arange(3)}
    compiled = torch.compile(lambda x: sample(x, **rows, top_p=full(3, 0.9)), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(logits), sample(logits, **rows, top_p=full(3, 0.9)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits_SV": torch.zeros(2, 5, dtype=torch.float64)}, "got torch.float64"),
        ({"temperature": torch.ones(3)}, r"expected temperature \[2\] on cpu, got \[3\] on cpu"),
        ({"top_k": torch.ones(2, 1)}, r"expected top_k \[2\] on cpu, got \[2, 1\]"),
        ({"seeds": torch.zeros(2)}, "expected seeds in torch.int64, got torch.float32"),
        ({"steps": torch.zeros(2, dtype=torch.int64, device="meta")}, r"expected steps \[2\] on cpu, got \[2\] on meta"),
        ({"temperature": torch.ones(2, dtype=torch.float64)}, "expected temperature in torch.float32, got torch.float64"),
        ({"temperature": torch.tensor([1.0, -0.5])}, "temperatures of at least 0, got -0.5"),
        ({"top_k": torch.ones(2)}, "expected top_k in torch.int32 or torch.int64, got torch.float32"),
        ({"top_p": torch.ones(2, dtype=torch.int64)}, "expected top_p in torch.float32 or .*, got torch.int64"),
        ({"counts": torch.zeros(2, 5, dtype=torch.int32, device="meta")}, "one device, got cpu and meta"),
        ({"presence_penalty": torch.zeros(2)}, "counts.*None"),
        ({"counts": torch.zeros(2, 5)}, "got torch.float32"),
    ],
)
def test_bad_arguments(change: dict, message: str) -> None:
    rows = {"temperature": torch.ones(2), "seeds": torch.zeros(2, dtype=torch.int64), "steps": torch.zeros(2, dtype=torch.int64)}
    with pytest.raises(ValueError, match=message):
        sample(**{"logits_SV": torch.zeros(2, 5), **rows, **change})
