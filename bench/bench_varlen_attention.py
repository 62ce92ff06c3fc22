"""varlen_attention against torch's scaled_dot_product_attention: a pack of mixed samples, the vision tower, one token.

The pack is the first 8 samples of bench/workloads/m4_mix.jsonl, a view being 196 rows (14 x 14 after pooling): 358 to 2,807 rows. Its
baseline is what a model without packing does: the same rows padded to the longest sample, is_causal=True. The ratio holds both the
padding, a factor of 4.9 in operations, and the kernels. Operations are those of the pairs that are seen; the limit is the
multiply-add rate. Decoding reads the cache: the limit is the read bandwidth; rounds walk through caches that together pass the
last-level cache.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llava_fast.kernels.varlen_attention import varlen_attention

WORKLOAD = Path(__file__).parent / "workloads" / "m4_mix.jsonl"
COLD_BYTES = 256 << 20
H, D = 16, 64


def pack_lengths() -> list[int]:
    records = [json.loads(line) for line in WORKLOAD.read_text().splitlines()[:8]]
    return [196 * record["views"] + sum(sum(turn) for turn in record["turns"]) for record in records]


def pack_calls(G: int) -> tuple[Callable[[], Tensor], Callable[[], Tensor], list[Tensor], list[Tensor]]:
    """Ours, torch's on padded rows, and the inputs of each."""
    lengths = pack_lengths()
    cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    packed = [torch.randn(sum(lengths), heads, D, requires_grad=True) for heads in (H, G, G)]
    padded = [
        torch.nn.utils.rnn.pad_sequence(x.detach().split(lengths), batch_first=True).transpose(1, 2).contiguous().requires_grad_()
        for x in packed
    ]

    def ours() -> Tensor:
        return varlen_attention(*packed, cu, cu)

    def baseline() -> Tensor:
        return F.scaled_dot_product_attention(*padded, is_causal=True, enable_gqa=G != H)

    with torch.no_grad():
        for one, two, n in zip(ours().split(lengths), baseline(), lengths, strict=True):
            torch.testing.assert_close(one, two.transpose(0, 1)[:n], rtol=1e-4, atol=1e-5)
    return ours, baseline, packed, padded


def operations() -> float:
    return sum(4.0 * n * (n + 1) / 2 * H * D for n in pack_lengths())


@pytest.mark.parametrize("G", [16, 2])
def test_pack_forward(paired, limits, G: int) -> None:
    ours, baseline, _, _ = pack_calls(G)
    with torch.no_grad():
        paired(ours, baseline, operations=operations(), limit=limits("cpu").fma_fp32_gflops * 1e9)


@pytest.mark.parametrize("G", [16])
def test_pack_forward_and_backward(paired, limits, G: int) -> None:
    ours, baseline, packed, padded = pack_calls(G)

    def both(run: Callable[[], Tensor], inputs: list[Tensor]) -> Callable[[], object]:
        grad = torch.randn(run().shape)
        return lambda: torch.autograd.grad(run(), inputs, grad)

    paired(both(ours, packed), both(baseline, padded), operations=3.5 * operations(), limit=limits("cpu").fma_fp32_gflops * 1e9)


def test_tower(paired, limits) -> None:
    """Four views, q, k and v slices of one product as the tower has them."""
    views, n, d = 4, 729, 72
    q, k, v = torch.randn(views * n, 3 * H, d).split(H, 1)
    cu = torch.arange(0, (views + 1) * n, n, dtype=torch.int32)

    def baseline() -> Tensor:
        return F.scaled_dot_product_attention(*(x.unflatten(0, (views, n)).transpose(1, 2) for x in (q, k, v)))

    limit = limits("cpu").fma_fp32_gflops * 1e9
    paired(lambda: varlen_attention(q, k, v, cu, cu, causal=False), baseline, operations=4.0 * views * n * n * H * d, limit=limit)


@pytest.mark.parametrize("heads", [(16, 16), (14, 2)], ids=["16-16", "14-2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_decode(paired, heads: tuple[int, int], dtype: str) -> None:
    """One row against 1,500 keys; torch has q in the cache's dtype, ours in fp32."""
    n, (Hq, G) = 1500, heads
    stored = getattr(torch, dtype)
    bytes_read = 2 * n * G * D * stored.itemsize
    caches = [(torch.randn(n, G, D).to(stored), torch.randn(n, G, D).to(stored)) for _ in range(COLD_BYTES // bytes_read + 1)]
    q = torch.randn(1, Hq, D)
    cu_q, cu_k = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([0, n], dtype=torch.int32)
    narrow = q.to(stored)[None].transpose(1, 2)
    layers, others = itertools.cycle(caches), itertools.cycle(caches)

    def ours() -> None:
        for _ in range(24):
            k, v = next(layers)
            varlen_attention(q, k, v, cu_q, cu_k)

    def baseline() -> None:
        for _ in range(24):
            k, v = (x[None].transpose(1, 2) for x in next(others))
            F.scaled_dot_product_attention(narrow, k, v, enable_gqa=G != Hq)

    with torch.no_grad():
        paired(ours, baseline, bytes_read=24 * bytes_read)
