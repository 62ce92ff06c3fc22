"""The Triton paths of `batch_invariant`: a row's bits are those it has alone."""

from __future__ import annotations

import pytest
import torch

from llava_fast.kernels import registry
from llava_fast.kernels.linear import linear, quantise
from llava_fast.kernels.paged_attention import paged_attention


@pytest.mark.parametrize("kind", ["same", "int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_linear(kind, dtype) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(70, 96).to(dtype), torch.randn(40, 96), torch.randn(40)
    matrix = weight.to(dtype) if kind == "same" else quantise(weight, kind, group=32)
    with registry.use(linear="triton"), registry.batch_invariant():
        whole = linear(x, matrix, bias, act="gelu")
        for first, last in ((0, 1), (3, 11), (5, 38), (69, 70)):
            assert torch.equal(linear(x[first:last], matrix, bias, act="gelu"), whole[first:last])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_paged_attention(dtype) -> None:
    torch.manual_seed(0)
    page, keys, rows = 16, 100, 9
    k, v = torch.randn(2, 16, page, 2, 64).to(dtype).unbind(0)
    table, q = torch.randperm(16).view(2, 8).int(), torch.randn(rows, 4, 64).to(dtype)

    def ask(first: int, last: int) -> torch.Tensor:
        lengths = torch.tensor([keys - rows + last], dtype=torch.int32)
        return paged_attention(q[first:last], k, v, table[:1], torch.tensor([0, last - first], dtype=torch.int32), lengths)

    with registry.use(paged_attention="triton"), registry.batch_invariant():
        whole = ask(0, rows)
        for size in (1, 4):
            assert torch.equal(torch.cat([ask(i, min(i + size, rows)) for i in range(0, rows, size)]), whole)
