"""The backward of varlen_attention in Triton, without atomics: each row of a gradient is written by one program, in one order.

    delta = rowsum(dout * out);   P = exp2(scale log2e q k^T - lse2);   dS = P * (dout v^T - delta)
    dq = scale dS k   by tiles of query rows;   dk = scale dS^T q,  dv = P^T dout   by tiles of key rows

A key tile runs over the query tiles of its sequence, head by head of its group, and then over those of every sequence that has
some of its rows in its prefix. Tiles, splits and letters: _varlen_attention_triton.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from llava_fast.kernels._triton import config, jit, on_device, tl, triton
from llava_fast.kernels._varlen_attention_triton import (
    _dot,
    _key_offsets,
    _own_keys,
    _seen,
    _sequence,
    _store,
    _tile,
    forward,
    launch_tiles,
    split_head_dim,
)


@jit
def _rows_kernel(out_ptr, grad_ptr, lse_ptr, delta_ptr, lse2_ptr, T, H, D: tl.constexpr, DP: tl.constexpr, BLOCK: tl.constexpr):
    """delta = rowsum(grad * out) and lse in base 2, both as [H, T]; +inf for a row that sees no key, so that its weights are 0."""
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    head = tl.program_id(1)
    valid = t < T
    rows = t.to(tl.int64) * H + head
    out = _tile(out_ptr, rows * D, valid, 0, DP, D, True).to(tl.float32)
    grad = _tile(grad_ptr, rows * D, valid, 0, DP, D, True).to(tl.float32)
    lse = tl.load(lse_ptr + rows, mask=valid, other=0.0)
    at = head.to(tl.int64) * T + t
    LOG2_E: tl.constexpr = 1.4426950408889634
    tl.store(delta_ptr + at, tl.sum(out * grad, 1), mask=valid)
    tl.store(lse2_ptr + at, tl.where(lse == float("-inf"), float("inf"), lse * LOG2_E), mask=valid)


# fmt: off
@jit
def _backward_q_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, delta_ptr, lse2_ptr, grad_q_ptr, cu_q_ptr, cu_k_ptr, q_index_ptr, seqused_k_ptr, prefix_ptr, S, T,
    scale, q_row, k_row, v_row, Q_HEAD: tl.constexpr, K_HEAD: tl.constexpr, V_HEAD: tl.constexpr, H: tl.constexpr, GROUP: tl.constexpr,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
# fmt: on
    tile = tl.num_programs(0) - 1 - tl.program_id(0) if CAUSAL else tl.program_id(0)
    head = tl.program_id(1)
    s, i0 = _sequence(tile, cu_q_ptr, S, BLOCK_M)
    q_start = tl.load(cu_q_ptr + s)
    n = tl.load(cu_q_ptr + s + 1) - q_start
    if i0 >= n:
        return
    PREFIX: tl.constexpr = prefix_ptr is not None
    k_start, own = _own_keys(s, cu_k_ptr, seqused_k_ptr)
    first, shared = 0, 0
    if PREFIX:
        first = tl.load(prefix_ptr + 2 * s)
        shared = tl.load(prefix_ptr + 2 * s + 1) - first
    k_ptr += head // GROUP * K_HEAD
    v_ptr += head // GROUP * V_HEAD

    i = i0 + tl.arange(0, BLOCK_M)
    valid = i < n
    q_offsets = (q_start + i).to(tl.int64) * q_row + head * Q_HEAD
    rows = ((q_start + i).to(tl.int64) * H + head) * D
    q1 = _tile(q_ptr, q_offsets, valid, 0, D1, D, True)
    grad1 = _tile(grad_ptr, rows, valid, 0, D1, D, True)
    if D2:
        q2 = _tile(q_ptr, q_offsets, valid, D1, D2, D, True)
        grad2 = _tile(grad_ptr, rows, valid, D1, D2, D, True)
    at = head.to(tl.int64) * T + q_start + i
    lse2 = tl.load(lse2_ptr + at, mask=valid, other=float("inf"))
    delta = tl.load(delta_ptr + at, mask=valid, other=0.0)
    seen = shared + _seen(i, q_start, n, own, q_index_ptr, CAUSAL)
    end = tl.max(seen, 0)
    full = tl.min(tl.where(valid, seen, end), 0) // BLOCK_N * BLOCK_N

    LOG2_E: tl.constexpr = 1.4426950408889634
    scale2 = scale * LOG2_E
    acc1 = tl.zeros([BLOCK_M, D1], tl.float32)
    if D2:
        acc2 = tl.zeros([BLOCK_M, D2], tl.float32)
    for MASK in tl.static_range(2):
        for j0 in range(full if MASK else 0, end if MASK else full, BLOCK_N):
            j = j0 + tl.arange(0, BLOCK_N)
            keep = j < end
            k_offsets = _key_offsets(j, keep, k_start, shared, first, k_row, 0, None, PREFIX, 0)
            v_offsets = _key_offsets(j, keep, k_start, shared, first, v_row, 0, None, PREFIX, 0)
            k1 = _tile(k_ptr, k_offsets, keep, 0, D1, D, MASK).to(q1.dtype)
            scores = _dot(q1, k1.T)
            grad_p = _dot(grad1, _tile(v_ptr, v_offsets, keep, 0, D1, D, MASK).to(q1.dtype).T)
            if D2:
                k2 = _tile(k_ptr, k_offsets, keep, D1, D2, D, MASK).to(q1.dtype)
                scores = _dot(q2, k2.T, scores)
                grad_p = _dot(grad2, _tile(v_ptr, v_offsets, keep, D1, D2, D, MASK).to(q1.dtype).T, grad_p)
            p = tl.exp2(scores * scale2 - lse2[:, None])
            if MASK:
                p = tl.where(j[None, :] < seen[:, None], p, 0.0)
            grad_s = (p * (grad_p - delta[:, None])).to(q1.dtype)
            acc1 = _dot(grad_s, k1, acc1)
            if D2:
                acc2 = _dot(grad_s, k2, acc2)
    _store(grad_q_ptr, rows, valid, acc1 * scale, 0, D1, D)
    if D2:
        _store(grad_q_ptr, rows, valid, acc2 * scale, D1, D2, D)


# fmt: off
@jit
def _key_tile_step(
    k1, k2, v1, v2, grad_k1, grad_k2, grad_v1, grad_v2, j, i, seen, n, q_start, head, q_ptr, grad_ptr, delta_ptr, lse2_ptr, T, scale2,
    q_row, Q_HEAD: tl.constexpr, H: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, MASK: tl.constexpr,
):
# fmt: on
    """Add what queries i give to the gradients of keys j; with MASK, those with j < seen. Transposed: [keys, queries].

    Queries past the last are zero rows with weight 0; keys past the last spoil only rows that are not stored.
    """
    valid = i < n
    q_offsets = (q_start + i).to(tl.int64) * q_row + head * Q_HEAD
    rows = ((q_start + i).to(tl.int64) * H + head) * D
    at = head.to(tl.int64) * T + q_start + i
    q1 = _tile(q_ptr, q_offsets, valid, 0, D1, D, True)
    scores = _dot(k1, q1.T)
    if D2:
        q2 = _tile(q_ptr, q_offsets, valid, D1, D2, D, True)
        scores = _dot(k2, q2.T, scores)
    p = tl.exp2(scores * scale2 - tl.load(lse2_ptr + at, mask=valid, other=float("inf"))[None, :])
    if MASK:
        keep = j[:, None] < seen[None, :]
        p = tl.where(keep, p, 0.0)
    grad1 = _tile(grad_ptr, rows, valid, 0, D1, D, True)
    grad_p = _dot(v1, grad1.T)
    grad_v1 = _dot(p.to(q1.dtype), grad1, grad_v1)
    if D2:
        grad2 = _tile(grad_ptr, rows, valid, D1, D2, D, True)
        grad_p = _dot(v2, grad2.T, grad_p)
        grad_v2 = _dot(p.to(q1.dtype), grad2, grad_v2)
    grad_s = p * (grad_p - tl.load(delta_ptr + at, mask=valid, other=0.0)[None, :])
    if MASK:  # again: an unwritten row of a cache may hold NaN
        grad_s = tl.where(keep, grad_s, 0.0)
    grad_s = grad_s.to(q1.dtype)
    grad_k1 = _dot(grad_s, q1, grad_k1)
    if D2:
        grad_k2 = _dot(grad_s, q2, grad_k2)
    return grad_k1, grad_k2, grad_v1, grad_v2


# fmt: off
@jit
def _backward_kv_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, delta_ptr, lse2_ptr, grad_k_ptr, grad_v_ptr, cu_tiles_ptr, cu_q_ptr, cu_k_ptr, q_index_ptr,
    seqused_k_ptr, prefix_ptr, S, T, K, scale, q_row, k_row, v_row, Q_HEAD: tl.constexpr, K_HEAD: tl.constexpr, V_HEAD: tl.constexpr,
    H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
# fmt: on
    """One tile of key rows; sums over the query heads of the group and the query tiles, in order, then over the readers of a prefix."""
    group = tl.program_id(1)
    s, j0 = _sequence(tl.program_id(0), cu_tiles_ptr, S, BLOCK_N)
    k_start, own = _own_keys(s, cu_k_ptr, seqused_k_ptr)
    # Rows before the first sequence and past the last are given to these: their gradient is zero unless they are a prefix.
    j0 += tl.load(cu_tiles_ptr + s) - k_start
    reserved = tl.where(s == S - 1, K, tl.load(cu_k_ptr + s + 1)) - k_start
    if j0 >= reserved:
        return
    q_start = tl.load(cu_q_ptr + s)
    n = tl.load(cu_q_ptr + s + 1) - q_start
    j = j0 + tl.arange(0, BLOCK_N)
    stored = j < reserved
    k_offsets = (k_start + j).to(tl.int64) * k_row + group * K_HEAD
    v_offsets = (k_start + j).to(tl.int64) * v_row + group * V_HEAD
    k1 = _tile(k_ptr, k_offsets, stored, 0, D1, D, True).to(q_ptr.dtype.element_ty)
    v1 = _tile(v_ptr, v_offsets, stored, 0, D1, D, True).to(q_ptr.dtype.element_ty)
    grad_k1 = tl.zeros([BLOCK_N, D1], tl.float32)
    grad_v1 = tl.zeros([BLOCK_N, D1], tl.float32)
    if D2:
        k2 = _tile(k_ptr, k_offsets, stored, D1, D2, D, True).to(q_ptr.dtype.element_ty)
        v2 = _tile(v_ptr, v_offsets, stored, D1, D2, D, True).to(q_ptr.dtype.element_ty)
        grad_k2 = tl.zeros([BLOCK_N, D2], tl.float32)
        grad_v2 = tl.zeros([BLOCK_N, D2], tl.float32)
    else:  # stand-ins, which no step reads
        k2, v2, grad_k2, grad_v2 = k1, v1, grad_k1, grad_v1

    # Queries low : full see some of this tile's keys (causal), from full on all of them. With q_index they are in no known order.
    low, full, last = 0, 0, tl.where(j0 < own, n, 0)
    if CAUSAL:
        if q_index_ptr is None:
            low = tl.maximum(j0 - own + n, 0) // BLOCK_M * BLOCK_M
            full = tl.minimum(tl.cdiv(tl.maximum(j0 + BLOCK_N - 1 - own + n, 0), BLOCK_M) * BLOCK_M, last)
        else:
            full = last
    LOG2_E: tl.constexpr = 1.4426950408889634
    scale2 = scale * LOG2_E
    for member in range(GROUP):
        head = group * GROUP + member
        for FULL in tl.static_range(2):
            if CAUSAL or FULL:
                for i0 in range(full if FULL else low, last if FULL else full, BLOCK_M):
                    i = i0 + tl.arange(0, BLOCK_M)
                    seen = _seen(i, q_start, n, own, q_index_ptr, CAUSAL)
                    # fmt: off
                    grad_k1, grad_k2, grad_v1, grad_v2 = _key_tile_step(
                        k1, k2, v1, v2, grad_k1, grad_k2, grad_v1, grad_v2, j, i, seen, n, q_start, head,
                        q_ptr, grad_ptr, delta_ptr, lse2_ptr, T, scale2, q_row, Q_HEAD, H, D, D1, D2, 1 - FULL,
                    )
                    # fmt: on
    if seqused_k_ptr is not None:
        used = ((j >= 0) & (j < own))[:, None]
        grad_k1, grad_v1 = tl.where(used, grad_k1, 0.0), tl.where(used, grad_v1, 0.0)
        if D2:
            grad_k2, grad_v2 = tl.where(used, grad_k2, 0.0), tl.where(used, grad_v2, 0.0)
    if prefix_ptr is not None:
        for member in range(GROUP):
            head = group * GROUP + member
            for reader in range(S):
                first = tl.load(prefix_ptr + 2 * reader) - k_start
                end = tl.load(prefix_ptr + 2 * reader + 1) - k_start
                r_start = tl.load(cu_q_ptr + reader)
                r_n = tl.load(cu_q_ptr + reader + 1) - r_start
                r_end = tl.where((first < j0 + BLOCK_N) & (end > j0) & (first < end), r_n, 0)
                outside = tl.where((j >= first) & (j < end), 0, 1)
                for i0 in range(0, r_end, BLOCK_M):
                    i = i0 + tl.arange(0, BLOCK_M)
                    # fmt: off
                    grad_k1, grad_k2, grad_v1, grad_v2 = _key_tile_step(
                        k1, k2, v1, v2, grad_k1, grad_k2, grad_v1, grad_v2, outside, i, i * 0 + 1, r_n, r_start, head,
                        q_ptr, grad_ptr, delta_ptr, lse2_ptr, T, scale2, q_row, Q_HEAD, H, D, D1, D2, True,
                    )
                    # fmt: on
    rows = ((k_start + j).to(tl.int64) * (H // GROUP) + group) * D
    _store(grad_k_ptr, rows, stored, grad_k1 * scale, 0, D1, D)
    _store(grad_v_ptr, rows, stored, grad_v1, 0, D1, D)
    if D2:
        _store(grad_k_ptr, rows, stored, grad_k2 * scale, D1, D2, D)
        _store(grad_v_ptr, rows, stored, grad_v2, D1, D2, D)


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    causal: bool,
    q_index: Tensor | None,
    seqused_k: Tensor | None,
    prefix: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_out = grad_out.contiguous()
    (T, H, d), (K, G, _), S = q.shape, k.shape, len(cu_q) - 1
    grad_q, grad_k, grad_v = q.new_empty(T, H, d), k.new_empty(K, G, d), v.new_empty(K, G, d)
    if T == 0 or K == 0:
        return grad_q.zero_(), grad_k.zero_(), grad_v.zero_()
    delta, lse2 = lse.new_empty(2, H, T).unbind(0)
    D1, D2 = split_head_dim(d)
    rows = config("varlen_attention_rows", f"d{d}", {"BLOCK": 32, "num_warps": 4}, q.device)
    by_q, by_k = launch_tiles("backward_q", q, causal), launch_tiles("backward_kv", q, causal)
    indices = (cu_q, cu_k, q_index, seqused_k, prefix, S, T)
    # Key rows need not begin with the first sequence where they are those of a cache.
    cu_tiles = cu_k if seqused_k is None else torch.cat([cu_k.new_zeros(1), cu_k[1:]])
    strides = (scale, q.stride(0), k.stride(0), v.stride(0))
    heads = {"Q_HEAD": q.stride(1), "K_HEAD": k.stride(1), "V_HEAD": v.stride(1), "H": H, "GROUP": H // G}
    shape = {**heads, "D": d, "D1": D1, "D2": D2, "CAUSAL": causal}
    with on_device(q):
        _rows_kernel[(triton.cdiv(T, rows["BLOCK"]), H)](out, grad_out, lse, delta, lse2, T, H, D=d, DP=triton.next_power_of_2(d), **rows)
        # fmt: off
        _backward_kv_kernel[(K // by_k["BLOCK_N"] + S, G)](
            q, k, v, grad_out, delta, lse2, grad_k, grad_v, cu_tiles, *indices, K, *strides, **shape, **by_k,
        )
        _backward_q_kernel[(T // by_q["BLOCK_M"] + S, H)](
            q, k, v, grad_out, delta, lse2, grad_q, *indices, *strides, **shape, **by_q,
        )
        # fmt: on
    return grad_q, grad_k, grad_v


def shipped_calls(device: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """The shapes of the models: SigLIP's 64 views of 729 rows (d 72), decoders of 64 and 128 wide heads, the other widths of towers."""

    def case(H: int, G: int, d: int, T: int, S: int, causal: bool, dtype: torch.dtype = torch.bfloat16, prefix: bool = False) -> Any:
        fused = torch.zeros(T, (H + 2 * G) * d, dtype=dtype, device=device)
        q, k, v = (part.unflatten(1, (-1, d)) for part in fused.split((H * d, G * d, G * d), 1))
        cu = torch.arange(0, T + 1, T // S, dtype=torch.int32, device=device)
        ranges = None
        if prefix:
            ranges = torch.zeros(S, 2, dtype=torch.int32, device=device)
            ranges[1:, 1] = T // S

        def run() -> None:
            arguments = (cu, cu, causal, None, None, ranges, d**-0.5)
            out, lse = forward(q, k, v, *arguments)
            backward(out, q, k, v, out, lse, *arguments)

        return run

    yield "d72 full", case(16, 16, 72, 64 * 729, 64, False)
    yield "d64 full", case(16, 16, 64, 8 * 576, 8, False)
    yield "d64 causal", case(16, 16, 64, 16384, 8, True)
    yield "d64 causal grouped", case(14, 2, 64, 16384, 8, True)
    yield "d128 causal", case(32, 32, 128, 16384, 4, True)
    yield "d128 causal fp16", case(32, 32, 128, 4096, 4, True, torch.float16)
    yield "d96 causal", case(32, 32, 96, 4096, 4, True)
    yield "d128 causal prefix", case(32, 32, 128, 16384, 8, True, prefix=True)
    yield "d64 causal fp32", case(16, 16, 64, 4096, 8, True, torch.float32)


# (BLOCK_M, BLOCK_N, num_warps, num_stages) for bench/tune.py, by head dim up to 96 and above.
_CANDIDATES = {
    "forward": (
        [(128, 64, 8, 2), (128, 128, 8, 2), (128, 128, 8, 3), (64, 64, 4, 3), (64, 128, 4, 2), (128, 64, 8, 4)],
        [(128, 64, 8, 2), (128, 128, 8, 2), (64, 64, 4, 2), (128, 32, 8, 3)],
    ),
    "backward_q": (
        [(128, 64, 8, 3), (64, 64, 4, 2), (64, 64, 4, 3), (128, 32, 8, 3), (128, 128, 8, 2)],
        [(128, 64, 8, 3), (64, 32, 4, 3), (128, 32, 8, 3), (128, 32, 8, 2)],
    ),
    "backward_kv": (
        [(32, 64, 4, 3), (32, 128, 8, 3), (64, 64, 8, 3)],
        [(32, 128, 8, 3), (32, 64, 4, 2), (32, 64, 8, 3), (64, 64, 8, 2)],
    ),
}


def candidates() -> dict[tuple[str, str], list[dict[str, int]]]:
    names = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
    return {
        (f"varlen_attention_{kernel}", f"bfloat16_{shape}"): [dict(zip(names, tiles, strict=True)) for tiles in lists[wide]]
        for kernel, lists in _CANDIDATES.items()
        for shape, wide in (("d64_full", 0), ("d72_full", 0), ("d64_causal", 0), ("d96_causal", 0), ("d128_causal", 1))
    }
