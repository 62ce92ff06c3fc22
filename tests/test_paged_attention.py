"""paged_attention: the reference against gathered keys in one softmax, the custom op, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from llava_fast import _cpu
from llava_fast.kernels.paged_attention import _paged_attention, paged_attention, paged_attention_reference


def make(
    lengths_q: list[int],
    lengths_k: list[int],
    H: int = 4,
    G: int = 2,
    d: int = 64,
    page: int = 16,
    dtype: torch.dtype = torch.float64,
    stored: torch.dtype | None = None,
) -> dict[str, Any]:
    """Pages in no order, NaN wherever no sequence has a key."""
    generator = torch.Generator().manual_seed(7)
    pages = [-(-n // page) for n in lengths_k]
    B = sum(pages) + 2
    order = torch.randperm(B, generator=generator).to(torch.int32)
    table = torch.full((len(lengths_k), max(pages, default=0) + 1), B - 1, dtype=torch.int32)
    caches = torch.full((2, B, page, G, d), torch.nan)
    at = 0
    for s, (count, n) in enumerate(zip(pages, lengths_k, strict=True)):
        table[s, :count] = order[at : at + count]
        for j in range(n):
            caches[:, table[s, j // page], j % page] = torch.randn(2, G, d, generator=generator)
        at += count
    k_cache, v_cache = caches.to(stored or dtype).unbind(0)
    call = dict(
        q_THd=torch.randn(sum(lengths_q), H, d, generator=generator).to(dtype),
        k_cache=k_cache,
        v_cache=v_cache,
        block_table=table,
        cu_seqlens_q=torch.tensor([0, *lengths_q]).cumsum(0).to(torch.int32),
        seqlens_k=torch.tensor(lengths_k, dtype=torch.int32),
    )
    if stored == torch.float8_e4m3fn:
        call |= dict(k_scale=torch.rand(G, generator=generator) + 0.5, v_scale=torch.rand(G, generator=generator) + 0.5)
    return call


def expected(call: dict[str, Any]) -> Tensor:
    """fp64, a row and a head at a time."""
    q, table, cu, lengths = (call[name] for name in ("q_THd", "block_table", "cu_seqlens_q", "seqlens_k"))
    page, group = call["k_cache"].shape[1], q.shape[1] // call["k_cache"].shape[2]
    out = torch.zeros(q.shape, dtype=torch.float64)
    for s in range(len(lengths)):
        n = int(cu[s + 1] - cu[s])
        for i in range(n):
            seen = int(lengths[s]) - n + i + 1
            places = [(int(table[s, j // page]), j % page) for j in range(seen)]
            blocks, rows = (torch.tensor(part, dtype=torch.long) for part in zip(*places, strict=True))
            for h in range(q.shape[1]):
                k, v = (call[name].to(torch.float64)[blocks, rows, h // group] for name in ("k_cache", "v_cache"))
                if "k_scale" in call:
                    k, v = k * call["k_scale"][h // group], v * call["v_scale"][h // group]
                weights = (k @ q[cu[s] + i, h].double() * call.get("scale", q.shape[2] ** -0.5)).softmax(0)
                out[cu[s] + i, h] = weights @ v
    return out


@pytest.mark.parametrize(
    "call",
    [
        make([1, 0, 1, 1], [40, 0, 1, 16]),
        make([5, 1, 20], [37, 33, 20], H=2, d=72),
        make([3], [300], page=256) | {"scale": 0.3},
        make([2, 2], [30, 2], stored=torch.bfloat16),
        make([1, 2], [30, 20], stored=torch.float8_e4m3fn),
    ],
)
def test_reference(call: dict[str, Any]) -> None:
    torch.testing.assert_close(paged_attention(**call), expected(call), rtol=1e-10, atol=1e-10)


def test_no_rows() -> None:
    assert paged_attention(**make([0, 0], [5, 0])).shape == (0, 4, 64)
    assert paged_attention(**make([], [])).shape == (0, 4, 64)


def test_custom_op() -> None:
    call = make([1, 3], [20, 17], dtype=torch.float32)
    torch.library.opcheck(_paged_attention, (*call.values(), 0.125, None, None, "reference"))
    torch._dynamo.reset()
    compiled = torch.compile(paged_attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**call), paged_attention(**call))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(q_THd=torch.zeros(2, 4, 32)), r"expected q \[T, H, d\].*32"),
        (dict(q_THd=torch.zeros(2, 3, 64)), "3 heads of q must be a multiple of the 2"),
        (dict(k_cache=torch.zeros(4, 17, 2, 64), v_cache=torch.zeros(4, 17, 2, 64)), "power of two, got 17"),
        (dict(q_THd=torch.zeros(2, 4, 64, dtype=torch.bfloat16)), "bfloat16.*float32"),
        (dict(q_THd=torch.zeros(2, 64, 4).transpose(1, 2)), "must be contiguous, got strides"),
        (dict(k_scale=torch.ones(2)), "k_scale and v_scale go together, got k_scale alone"),
        (dict(v_scale=torch.ones(2)), "k_scale and v_scale go together, got v_scale alone"),
        (dict(k_scale=torch.ones(4), v_scale=torch.ones(4)), r"k_scale must be torch.float32 \[2\].*\[4\]"),
        (dict(seqlens_k=torch.tensor([20, 17])), "seqlens_k must be torch.int32.*int64"),
        (dict(seqlens_k=torch.tensor([20, 17, 3], dtype=torch.int32)), r"cu_seqlens_q must be torch.int32 \[4\].*\[3\]"),
        (
            dict(seqlens_k=torch.tensor([20, 1000], dtype=torch.int32)),
            r"seqlens_k\[1\] must be 1, its query rows, to 48, its pages, got 1000",
        ),
        (dict(seqlens_k=torch.tensor([20, 0], dtype=torch.int32)), r"seqlens_k\[1\] must be 1, .*got 0"),
        (dict(cu_seqlens_q=torch.tensor([0, 3, 2], dtype=torch.int32)), "must not decrease, got 3 before 2"),
        (dict(cu_seqlens_q=torch.tensor([0, 1, 3], dtype=torch.int32)), "number of rows, 2, got 0 to 3"),
        (dict(block_table=torch.full((2, 3), 99, dtype=torch.int32)), r"block_table\[0\] must name blocks 0 to 5, got 99"),
        (dict(q_THd=torch.zeros(2, 4, 64, requires_grad=True)), "no gradient"),
    ],
)
def test_bad_calls(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        paged_attention(**make([1, 1], [20, 17], dtype=torch.float32) | change)


@pytest.mark.parametrize("isa", _cpu.supported_isas())
@pytest.mark.parametrize("heads", [(4, 4), (14, 2)])
@pytest.mark.parametrize(
    "types",
    [("float32", "float32"), ("float32", "bfloat16"), ("bfloat16", "bfloat16"), ("float32", "float16"), ("float32", "float8_e4m3fn")],
    ids="-".join,
)
def test_cpu(types: tuple[str, str], heads: tuple[int, int], isa: str) -> None:
    """Decode, a few rows, prefill, and nothing; the error against the reference in fp64 is at most twice the reference's in q's dtype."""
    dtype, stored = (getattr(torch, name) for name in types)
    before = _cpu.isa()
    for d, page in ((64, 16), (72, 32), (128, 256)):
        call = make([1, 3, 0, 40, 1], [300, 37, 5, 170, 1], *heads, d, page, dtype, stored)
        _cpu.set_isa(isa)
        ours = paged_attention(**call)
        _cpu.set_isa(before)
        theirs, truth = paged_attention_reference(**call), paged_attention_reference(**{**call, "q_THd": call["q_THd"].double()})
        allowed = 2 * (theirs.double() - truth).abs().max() + truth.abs().max() * torch.finfo(dtype).eps
        assert ours.dtype == dtype and (ours.double() - truth).abs().max() <= allowed


@pytest.mark.parametrize("isa", _cpu.supported_isas())
@pytest.mark.parametrize("rows", [1, 2, 5, 8])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_cpu_splits(stored: torch.dtype, rows: int, isa: str) -> None:
    """Few rows against lengths around the borders of a thread's 64 keys: the error, and the same bits from any number of threads."""
    lengths = [8, 15, 17, 63, 64, 65, 127, 128, 129, 320]
    call = make([rows] * len(lengths), lengths, 4, 4, 72, 32, torch.float32, stored)
    before, threads = _cpu.isa(), torch.get_num_threads()
    _cpu.set_isa(isa)
    try:
        torch.set_num_threads(1)
        alone = paged_attention(**call)
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(paged_attention(**call), alone)
    finally:
        torch.set_num_threads(threads)
        _cpu.set_isa(before)
    theirs, truth = paged_attention_reference(**call), paged_attention_reference(**{**call, "q_THd": call["q_THd"].double()})
    allowed = 2 * (theirs.double() - truth).abs().max() + truth.abs().max() * torch.finfo(torch.float32).eps
    assert (alone.double() - truth).abs().max() <= allowed


@pytest.mark.parametrize("isa", _cpu.supported_isas())
def test_cpu_reads_every_fp8_value(isa: str) -> None:
    """One key: the output is its value."""
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).view(2, 128)
    cache = torch.zeros(2, 16, 1, 128, dtype=torch.float8_e4m3fn)
    cache[:, 0, 0] = values
    before = _cpu.isa()
    _cpu.set_isa(isa)
    ones, lengths = torch.ones(2, 1, 128), torch.ones(2, dtype=torch.int32)
    table, cu = torch.tensor([[0], [1]], dtype=torch.int32), torch.arange(3, dtype=torch.int32)
    out = paged_attention(ones, torch.zeros_like(cache), cache, table, cu, lengths)
    _cpu.set_isa(before)
    torch.testing.assert_close(out[:, 0], values.float(), rtol=0, atol=0, equal_nan=True)
