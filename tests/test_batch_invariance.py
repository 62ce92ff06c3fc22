"""Inside `batch_invariant` a row's bits are those it has alone, on the paths that otherwise choose by the number of rows."""

from __future__ import annotations

import pytest
import torch

from llava_fast.kernels import registry
from llava_fast.kernels.linear import linear, quantise
from llava_fast.kernels.paged_attention import paged_attention
from llava_fast.kernels.varlen_attention import varlen_attention

COUNTS = (1, 3, 8, 16, 17, 40)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16", "int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear(kind, dtype) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(40, 352, dtype=dtype), torch.randn(203, 352), torch.randn(203)
    matrix = quantise(weight, kind, group=32) if kind.startswith("int") else weight.to(getattr(torch, kind))
    residual = torch.randn(40, 203, dtype=dtype)
    with registry.batch_invariant():
        alone = torch.cat([linear(x[i : i + 1], matrix, bias, act="gelu", residual=residual[i : i + 1]) for i in range(40)])
        for count in COUNTS:
            assert torch.equal(linear(x[:count], matrix, bias, act="gelu", residual=residual[:count]), alone[:count]), count
    if dtype == torch.float32:  # or the paths would be one anyway; bf16 results round the difference away
        assert not torch.equal(linear(x[:1], matrix, bias, act="gelu", residual=residual[:1]), alone[:1])


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
