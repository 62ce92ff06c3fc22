"""varlen_attention against torch's scaled_dot_product_attention: a pack of mixed samples, the vision tower, one token.

The pack is the first 8 samples of bench/workloads/m4_mix.jsonl, a view being 196 rows (14 x 14 after pooling): 358 to 2,807 rows. Its
baseline is what a model without packing does: the same rows padded to the longest sample, is_causal=True. The ratio holds both the
padding, a factor of 4.9 in operations, and the kernels. test_pack_rivals holds them against what packs without it: a call a sample, one
call with a mask, FlexAttention. Operations are those of the pairs that are seen; the limit is the multiply-add rate. Decoding reads the
cache: the limit is the read bandwidth; calls walk round caches that together pass those of the processor (bench/cold.py).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.baselines.kernels import check_agree, flex_packed, packed_mask, sdpa_by_sample, sdpa_masked
from bench.cold import copied, copies_for, ring
from bench.workload import records
from llava_fast.kernels.varlen_attention import varlen_attention

H, D = 16, 64


def pack_lengths() -> list[int]:
    return [196 * record["views"] + sum(sum(turn) for turn in record["turns"]) for record in records(8)]


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
        paired(ours, baseline, operations=operations(), limit=limits("cpu").fma_fp32_gflops * 1e9, rounds=3)


@pytest.mark.parametrize("G", [16])
def test_pack_forward_and_backward(paired, limits, G: int) -> None:
    ours, baseline, packed, padded = pack_calls(G)

    def both(run: Callable[[], Tensor], inputs: list[Tensor]) -> Callable[[], object]:
        grad = torch.randn(run().shape)
        return lambda: torch.autograd.grad(run(), inputs, grad)

    limit = limits("cpu").fma_fp32_gflops * 1e9
    paired(both(ours, packed), both(baseline, padded), operations=3.5 * operations(), limit=limit, rounds=3)


@pytest.mark.parametrize("G", [16, pytest.param(2, marks=pytest.mark.long)])
@pytest.mark.parametrize("direction", ["forward", "both"])
def test_pack_rivals(paired, limits, direction: str, G: int) -> None:
    """FlexAttention has no backward pass on a CPU, and a mask takes four seconds both ways."""
    lengths = pack_lengths()
    cu, mask = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32), packed_mask(lengths)
    q, k, v = (torch.randn(sum(lengths), heads, D, requires_grad=direction == "both") for heads in (H, G, G))
    calls: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: varlen_attention(q, k, v, cu, cu),
        "SDPA, a call a sample": lambda: sdpa_by_sample(q, k, v, lengths),
        "SDPA with a mask": lambda: sdpa_masked(q, k, v, mask),
    }
    limit = limits("cpu").fma_fp32_gflops * 1e9
    if direction == "forward":
        flex = flex_packed(lengths)
        calls["FlexAttention"] = lambda: flex(q, k, v)
        mine = calls.pop("ours")
        with torch.no_grad():
            check_agree(mine, calls)
            paired(mine, calls, operations=operations(), limit=limit, rounds=3)
        return
    del calls["SDPA with a mask"]
    grad = torch.randn_like(q)
    runs: dict[str, Callable[[], object]] = {
        name: lambda call=call: torch.autograd.grad(call(), (q, k, v), grad)  # type: ignore[misc]
        for name, call in calls.items()
    }
    ours = runs.pop("ours")
    check_agree(ours, runs)
    paired(ours, runs, operations=3.5 * operations(), limit=limit, rounds=3)


@pytest.mark.parametrize("n", [512, 2048, *(pytest.param(n, marks=pytest.mark.long) for n in (128, 4096))])
def test_length(paired, limits, n: int) -> None:
    """How the time grows with the length of one causal sequence."""
    q, k, v = (torch.randn(n, H, D) for _ in range(3))
    cu, flex = torch.tensor([0, n], dtype=torch.int32), flex_packed([n])
    rivals = {"SDPA": lambda: sdpa_by_sample(q, k, v, [n]), "FlexAttention": lambda: flex(q, k, v)}
    with torch.no_grad():
        check_agree(lambda: varlen_attention(q, k, v, cu, cu), rivals)
        facts = {"operations": 4.0 * n * (n + 1) / 2 * H * D, "limit": limits("cpu").fma_fp32_gflops * 1e9}
        paired(lambda: varlen_attention(q, k, v, cu, cu), rivals, **facts, axis="tokens", at=n, rounds=3)


def test_tower(paired, limits) -> None:
    """Four views, q, k and v slices of one product as the tower has them."""
    views, n, d = 4, 729, 72
    q, k, v = torch.randn(views * n, 3 * H, d).split(H, 1)
    cu = torch.arange(0, (views + 1) * n, n, dtype=torch.int32)

    def baseline() -> Tensor:
        out = F.scaled_dot_product_attention(*(x.unflatten(0, (views, n)).transpose(1, 2) for x in (q, k, v)))
        return out.transpose(1, 2).flatten(0, 1)

    with torch.no_grad():
        check_agree(lambda: varlen_attention(q, k, v, cu, cu, causal=False), {"SDPA": baseline})
        limit = limits("cpu").fma_fp32_gflops * 1e9
        paired(lambda: varlen_attention(q, k, v, cu, cu, causal=False), baseline, operations=4.0 * views * n * n * H * d, limit=limit)


@pytest.mark.parametrize("heads", [(16, 16), (14, 2)], ids=["16-16", "14-2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_decode(paired, heads: tuple[int, int], dtype: str) -> None:
    """One row against 1,500 keys; torch has q in the cache's dtype, ours in fp32."""
    n, (Hq, G) = 1500, heads
    stored = getattr(torch, dtype)
    bytes_read = 2 * n * G * D * stored.itemsize
    keys_and_values = torch.randn(n, G, D).to(stored), torch.randn(n, G, D).to(stored)
    q = torch.randn(1, Hq, D)
    cu_q, cu_k = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([0, n], dtype=torch.int32)
    narrow = q.to(stored)[None].transpose(1, 2)

    def ours(k: Tensor, v: Tensor) -> Tensor:
        return varlen_attention(q, k, v, cu_q, cu_k)

    def theirs(k: Tensor, v: Tensor) -> Tensor:
        k, v = (x[None].transpose(1, 2) for x in (k, v))
        return F.scaled_dot_product_attention(narrow, k, v, enable_gqa=G != Hq)

    with torch.no_grad():
        check_agree(lambda: ours(*keys_and_values), {"SDPA": lambda: theirs(*keys_and_values)[0].transpose(0, 1)})
        around = ring(copied(keys_and_values, copies_for(bytes_read)))
        paired(around(ours, 24), around(theirs, 24), bytes_read=bytes_read, calls=24)
