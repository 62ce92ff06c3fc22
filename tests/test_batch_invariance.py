"""Inside `batch_invariant` a row's bits are those it has alone, on the paths that otherwise choose by the number of rows."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from llava_fast import _cpu
from llava_fast.kernels import registry
from llava_fast.kernels.activation import activation, swiglu
from llava_fast.kernels.linear import linear, quantise
from llava_fast.kernels.norm import add_rms_norm, layer_norm, rms_norm
from llava_fast.kernels.paged_attention import paged_attention
from llava_fast.kernels.sampling import argmax, sample
from llava_fast.kernels.varlen_attention import varlen_attention

COUNTS = (1, 3, 8, 16, 17, 40)


@pytest.fixture(params=_cpu.supported_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    best, threads = _cpu.isa(), torch.get_num_threads()
    _cpu.set_isa(request.param)
    torch.set_num_threads(2)
    yield request.param
    _cpu.set_isa(best)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16", "int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("I, O, rows", [(352, 203, 40), (2816, 1024, 200), (4320, 96, 70)])
def test_linear(kind, dtype, I, O, rows, isa) -> None:
    """One block of columns and several, one thread and two, rows that fill tiles and do not."""
    torch.manual_seed(0)
    x, weight, bias = torch.randn(rows, I, dtype=dtype), torch.randn(O, I), torch.randn(O)
    matrix = quantise(weight, kind, group=32) if kind.startswith("int") else weight.to(getattr(torch, kind))
    residual = torch.randn(rows, O, dtype=dtype)

    def ask(first: int, last: int) -> torch.Tensor:
        return linear(x[first:last], matrix, bias, act="gelu", residual=residual[first:last])

    with registry.batch_invariant():
        whole = ask(0, rows)
        for first, last in [(0, 1), (1, 2), (rows - 1, rows), (3, 11), (2, 18), (0, 17), (5, rows)]:
            assert torch.equal(ask(first, last), whole[first:last]), (first, last)
    if dtype == torch.float32:  # or the paths would be one anyway; bf16 results round the difference away
        assert not torch.equal(ask(0, 1), whole[:1])


SEEDS = torch.zeros(300, dtype=torch.int64)
OPS = {
    "rms_norm": lambda x: rms_norm(x, torch.ones(x.shape[1]), 1e-6),
    "layer_norm": lambda x: layer_norm(x, torch.ones(x.shape[1]), torch.ones(x.shape[1]), 1e-6),
    "add_rms_norm": lambda x: add_rms_norm(x, x * 0.5, torch.ones(x.shape[1]), 1e-6)[0],
    "swiglu": swiglu,
    "gelu": activation("gelu"),
    "argmax": lambda x: argmax(x.float()),
    "sample": lambda x: sample(x.float(), temperature=torch.full((len(x),), 0.9), seeds=SEEDS[: len(x)], steps=SEEDS[: len(x)]),
}


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1152, 30])
def test_rows_of_other_ops(name, dtype, width, isa) -> None:
    x = torch.randn(300, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    with registry.batch_invariant():
        whole = OPS[name](x)
        for first, last in ((0, 1), (7, 8), (3, 60), (299, 300)):
            assert torch.equal(OPS[name](x[first:last]), whole[first:last])


@pytest.mark.parametrize("heads, groups, d", [(4, 4, 64), (14, 2, 64), (4, 1, 128)])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_paged_attention(heads, groups, d, stored) -> None:
    """The last 40 of 300 rows one at a time, in chunks, and beside another sequence."""
    torch.manual_seed(0)
    page, keys, rows = 16, 300, 40
    k, v = torch.randn(2, 64, page, groups, d).to(stored).unbind(0)
    table = torch.randperm(64).view(2, 32).int()
    q, other = torch.randn(rows, heads, d), torch.randn(5, heads, d)

    def ask(first: int, last: int) -> torch.Tensor:
        lengths = torch.tensor([keys - rows + last], dtype=torch.int32)
        return paged_attention(q[first:last], k, v, table[:1], torch.tensor([0, last - first], dtype=torch.int32), lengths)

    with registry.batch_invariant():
        alone = torch.cat([ask(i, i + 1) for i in range(rows)])
        for size in COUNTS:
            assert torch.equal(torch.cat([ask(i, min(i + size, rows)) for i in range(0, rows, size)]), alone), size
        bounds, lengths = torch.tensor([0, 5, 45], dtype=torch.int32), torch.tensor([77, keys], dtype=torch.int32)
        together = paged_attention(torch.cat([other, q]), k, v, table.flip(0), bounds, lengths)
        assert torch.equal(together[5:], alone)
    assert not torch.equal(ask(0, 1), alone[:1])


def test_varlen_attention() -> None:
    """A picture's rows, alone and between others of other lengths; d = 72."""
    torch.manual_seed(0)
    lengths = (5, 123, 1, 300)
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    q, k, v = torch.randn(3, int(bounds[-1]), 4, 72).unbind(0)
    with registry.batch_invariant():
        packed = varlen_attention(q, k, v, bounds, bounds, causal=False)
        for s, n in enumerate(lengths):
            own, rows = torch.tensor([0, n], dtype=torch.int32), slice(int(bounds[s]), int(bounds[s + 1]))
            assert torch.equal(varlen_attention(q[rows], k[rows], v[rows], own, own, causal=False), packed[rows])


def test_what_cannot_is_refused() -> None:
    x = torch.randn(3, 8, dtype=torch.float64)
    with registry.batch_invariant(), pytest.raises(ValueError, match="no batch-invariant implementation of linear"):
        linear(x, torch.randn(4, 8, dtype=torch.float64))
    with registry.use(linear="reference"), registry.batch_invariant(), pytest.raises(ValueError, match="depend on how many rows"):
        linear(x.float(), torch.randn(4, 8))
    linear(x, torch.randn(4, 8, dtype=torch.float64))
