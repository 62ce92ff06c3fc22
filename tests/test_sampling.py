"""Sampling: kept sets of transformers' processors, frequencies of draws, noise by seed and step, penalties, checks.

In the reference and in each instruction set of the C++ kernels, and these against the reference and against fp64.
"""

from __future__ import annotations

from collections.abc import Iterator

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

from llava_fast import _cpu
from llava_fast.kernels import registry
from llava_fast.kernels.sampling import argmax, kept, log_exponential, penalised, philox, sample, sample_cpu
from llava_fast.requests import SamplingParams

ISAS = _cpu.supported_isas()


def use(name: str) -> Iterator[str]:
    before = _cpu.isa()
    if name in ISAS:
        _cpu.set_isa(name)
    with registry.use(sampling="cpu" if name in ISAS else name):
        yield name
    _cpu.set_isa(before)


@pytest.fixture(params=["reference", *ISAS])
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """The reference, or the C++ kernels in one instruction set."""
    yield from use(request.param)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from use(request.param)


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


def test_cpu_is_the_default() -> None:
    assert registry.resolve_name("sampling", "cpu", torch.float32) == "cpu"


def kept_by(implementation: str, z: Tensor, top_k: Tensor | None, top_p: Tensor | None, min_p: Tensor | None) -> Tensor:
    if implementation == "reference":
        return kept(z, top_k, top_p, min_p)
    out, zeros = torch.full_like(z, torch.nan), torch.zeros(len(z), dtype=torch.int64)
    sample_cpu(z, full(len(z), 1.0), top_k, top_p, min_p, zeros, zeros, None, None, None, None, out)
    return torch.where(out.isnan(), z, out)  # rows without a filter are not written


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
def test_kept_sets_are_those_of_transformers(params: dict, levels: int, implementation: str) -> None:
    logits = torch.randn(6, 301, generator=torch.Generator().manual_seed(0)) * 3
    if levels:
        logits = (logits * levels / 3).round() / levels * 3  # many ties
    p = SamplingParams(**{"temperature": 1.0, **params})
    filters = full(6, p.top_k, torch.int64), full(6, p.top_p, torch.float64), full(6, p.min_p, torch.float64)
    ours = kept_by(implementation, logits / p.temperature, *filters)
    expected = warped(logits, p)
    assert torch.equal(ours.sort(-1).values, expected.sort(-1).values)  # which of equal logits top-p drops is left open there
    if not levels:
        assert torch.equal(ours, expected)
    for z, row in zip(logits / p.temperature, ours, strict=True):  # here the first of them go first
        border = row[row.isfinite()].min()
        among = row[z == border].isfinite()
        assert torch.equal(among, among.sort().values)


def test_draws_have_the_probabilities(implementation: str) -> None:
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


def test_greedy_takes_the_first_of_equal_logits_and_ignores_filters(implementation: str) -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, 3.0], [5.0, 5.0, 5.0, 5.0]])
    picks = sample(
        logits, temperature=full(2, 0.0), seeds=torch.arange(2), steps=torch.arange(2), top_k=torch.tensor([1, 1]), top_p=full(2, 0.1)
    )
    assert picks.tolist() == [1, 0]


def test_a_row_alone_is_the_row_in_a_batch(implementation: str) -> None:
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


def settings(S: int) -> dict[str, Tensor]:
    return {"temperature": torch.linspace(0, 1.5, S), "seeds": torch.arange(S) * 2**33 - 5, "steps": torch.arange(S) + 2**35}


FILTERS: dict[str, dict[str, Tensor]] = {
    "none": {},
    "top-k": {"top_k": torch.tensor([0, 1, 2, 50, 700, 3000], dtype=torch.int32)},
    "top-p": {"top_p": torch.tensor([1.0, 0.999, 0.9, 0.5, 1e-6, 0.0], dtype=torch.float64)},
    "min-p": {"min_p": torch.tensor([0.0, 1e-6, 0.01, 0.2, 1.0, 1.5]).half()},
    "all": {
        "top_k": torch.tensor([3, 40, 5, 700, 0, 20]),
        "top_p": torch.tensor([0.5, 0.8, 0.9, 0.7, 0.95, 1.0]).bfloat16(),
        "min_p": torch.tensor([0.1, 0.05, 0, 0.1, 0.001, 0.01]),
    },
}


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("V", [1, 2, 5, 33, 1023, 1024, 1025, 3001])
@pytest.mark.parametrize("ties", [False, True])
def test_cpu_draws_what_the_reference_draws(V: int, filters: str, ties: bool, isa: str) -> None:
    generator = torch.Generator().manual_seed(V)
    rows = settings(6)
    for _ in range(5):
        logits = torch.randn(6, V, generator=generator) * 3
        logits = (logits * 4).round() / 4 if ties else logits
        counts = torch.randint(0, 3, (6, V), generator=generator, dtype=torch.int32) * (torch.rand(6, V, generator=generator) < 0.1)
        penalties = {"repetition_penalty": torch.linspace(0.5, 2, 6), "frequency_penalty": torch.linspace(0, 1, 6)}
        for penalty in ({}, {**penalties, "presence_penalty": torch.linspace(-1, 1, 6), "counts": counts.int()}):
            ours = sample(logits, **rows, **FILTERS[filters], **penalty)
            with registry.use(sampling="reference"):
                assert torch.equal(ours, sample(logits, **rows, **FILTERS[filters], **penalty))
        rows = {**rows, "seeds": rows["seeds"] + 1}


@pytest.mark.parametrize("filters", [name for name in FILTERS if name != "none"])
@pytest.mark.parametrize("kind", ["normal", "bf16", "equal", "outliers", "steep", "flat"])
def test_cpu_kept_sets(kind: str, filters: str, isa: str) -> None:
    """The reference's but for tokens whose summed probability or whose ratio is within 1e-6 of the border."""
    logits = torch.randn(6, 20_011, generator=torch.Generator().manual_seed(3))
    logits = {
        "normal": logits * 3,
        "bf16": (logits * 3).bfloat16().float(),
        "equal": torch.full_like(logits, -0.25),
        "outliers": torch.where(logits > 1.5, logits * 20, torch.where(logits < -2, -torch.inf, torch.where(logits < -1, -3e38, logits))),
        "steep": torch.arange(20_011.0).expand(6, -1) * 0.37 - 1000,
        "flat": logits * 1e-6 + 1000,
    }[kind]
    k, p, m = (FILTERS[filters].get(name) for name in ("top_k", "top_p", "min_p"))
    ours, reference = kept_by(isa, logits, k, p, m), kept(logits, k, p, m)
    z = kept(logits, k, None, None).double()
    ascending, order = z.sort(stable=True)
    summed = torch.empty_like(z).scatter_(1, order, ascending.softmax(-1).cumsum(-1))
    nothing = torch.zeros(6, 1, dtype=torch.bool)
    near_p = nothing if p is None else ((summed / (1 - p).float()[:, None].double()) - 1).abs() < 1e-6
    near_m = nothing if m is None else ((z - z.amax(-1, keepdim=True)).exp() / m[:, None].double() - 1).abs() < 1e-6
    assert torch.equal(ours.where(~(near_p | near_m), 0), reference.where(~(near_p | near_m), 0))
    assert kind not in ("normal", "bf16", "equal") or near_p.sum() < 30
    if p is None and m is None:
        assert torch.equal(ours, reference)


def test_the_whole_vocabulary(isa: str) -> None:
    """A draw of the reference's, or one whose score in fp64 is within rounding of the best. The tokens of all instruction sets agree."""
    logits = torch.randn(6, 152_000, generator=torch.Generator().manual_seed(4)) * 3
    rows = {**settings(6), "seeds": torch.arange(6)}
    tokens = {name: sample(logits, **rows, **FILTERS[name]) for name in FILTERS}
    assert torch.equal(argmax(logits), logits.argmax(-1))
    with registry.use(sampling="reference"):
        for name, ours in tokens.items():
            assert torch.equal(ours, sample(logits, **rows, **FILTERS[name])), name
    u = ((philox(rows["seeds"], rows["steps"], 152_000) >> 1).double() + 0.5) * 2**-31
    score = logits.double() / rows["temperature"][:, None] - (-torch.log1p(-u)).log()
    assert (score.amax(-1) - score.gather(1, tokens["none"][:, None])[:, 0])[1:].max() < 1e-5


def test_any_number_of_threads_draws_the_same(isa: str) -> None:
    """One row too, which threads share, with its best score anywhere."""
    generator = torch.Generator().manual_seed(5)
    before = torch.get_num_threads()
    try:
        for S in (1, 2, 6):
            logits = torch.randn(S, 50_001, generator=generator)
            rows = {name: value[-S:] for name, value in settings(6).items()}
            for step in range(8):
                filters = {} if step % 2 else {name: value[-S:] for name, value in FILTERS["all"].items()}
                rows["steps"] = rows["steps"] + 1
                logits, picks = logits.roll(7000, 1), []
                for threads in (1, 2, 3, 5):
                    torch.set_num_threads(threads)
                    picks.append(sample(logits, **rows, **filters))
                    assert torch.equal(argmax(logits), logits.argmax(-1))
                assert all(torch.equal(pick, picks[0]) for pick in picks)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("filters", FILTERS)
def test_logits_that_are_not_finite(filters: str, implementation: str) -> None:
    """-inf is never drawn while another is left; without one it is token 0, with a NaN its first, with infinity the first of these."""
    rows = settings(6)
    logits = torch.full((6, 2100), -torch.inf)
    assert sample(logits, **rows, **FILTERS[filters]).tolist() == [0] * 6
    logits[:, 1300] = -5.0
    expected = [1300] * 5 + [0 if filters == "min-p" else 1300]  # a min-p over 1 keeps nothing
    assert sample(logits, **rows, **FILTERS[filters]).tolist() == expected
    logits[:, [1400, 1900]] = torch.inf
    if filters != "min-p":
        assert sample(logits, **rows, **FILTERS[filters]).tolist() == [1400] * 6
    logits[:, [1500, 2090]] = torch.nan
    assert sample(logits, **rows, **FILTERS[filters]).tolist() == [1500] * 6
    assert argmax(logits).tolist() == [1500] * 6


def test_rows_with_strides_and_no_rows(implementation: str) -> None:
    logits = torch.randn(6, 2000, generator=torch.Generator().manual_seed(6))
    rows = settings(6)
    plain = sample(logits[:, ::2].contiguous(), **rows), argmax(logits[:, ::2].contiguous())
    for view in (logits[:, ::2], torch.cat([logits[:, ::2], logits], 1)[:, :1000], logits[:, ::2].T.contiguous().T):
        assert torch.equal(sample(view, **rows), plain[0]) and torch.equal(argmax(view), plain[1])
    assert sample(logits[:0], **{name: value[:0] for name, value in rows.items()}).shape == argmax(logits[:0]).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_argmax(dtype: torch.dtype, implementation: str) -> None:
    for V in (1, 7, 16, 1025, 40_000):
        logits = (torch.randn(3, V, generator=torch.Generator().manual_seed(V), dtype=dtype) * 4).round()
        assert torch.equal(argmax(logits), logits.argmax(-1))


def test_compiles_without_graph_breaks(implementation: str) -> None:
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
