"""varlen_attention in Triton: forward, and a backward without atomics (one kernel a gradient, each row written by one program).

Grids come from shapes alone, so nothing waits for the device: of N rows in S sequences, sequence s owns the tiles from
cu[s] // BLOCK + s on, which are enough for any lengths, and a program finds its sequence by bisection; N // BLOCK + S programs
a head, the surplus ones return at once.

A head dim that is no power of two is split, d = D1 + D2 (72 = 64 + 8 of 16): two products for the scores, two accumulators for the
output, against one of the next power of two that computes and stores up to twice as much. Keys are counted as one row of
prefix ++ own keys; a tile that every query of the program sees takes no mask.

Letters: T query rows, K key rows, S sequences, H heads, G key-value heads, d head dim; i a query, j a key of its sequence.
Scores are kept in base 2 (scale * log2 e is folded into one multiplication); products and sums are fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from math import log2
from typing import Any

import torch
from torch import Tensor

from llava_fast.kernels._triton import config, device_class, jit, tl, triton

_LOG2_E = 1.4426950408889634


@jit
def _sequence(tile, cu_ptr, S, BLOCK: tl.constexpr):
    """(sequence, its row of this tile's first row)."""
    low, high = 0, S
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(cu_ptr + middle) // BLOCK + middle <= tile:
            low = middle
        else:
            high = middle
    return low, (tile - tl.load(cu_ptr + low) // BLOCK - low) * BLOCK


@jit
def _own_keys(s, cu_k_ptr, seqused_k_ptr):
    """(first row, number) of the own keys of sequence s."""
    start = tl.load(cu_k_ptr + s)
    if seqused_k_ptr is None:
        own = tl.load(cu_k_ptr + s + 1) - start
    else:
        own = tl.load(seqused_k_ptr + s)
    return start, own


@jit
def _seen(i, start, n, own, q_index_ptr, CAUSAL: tl.constexpr):
    """How many of the own keys the queries i of a sequence see; 0 past its last query."""
    if not CAUSAL:
        return tl.where(i < n, own, 0)
    if q_index_ptr is None:
        place = own - n + i
    else:
        place = tl.load(q_index_ptr + start + i, mask=i < n, other=-1).to(tl.int32)
    return tl.where(i < n, tl.minimum(tl.maximum(place + 1, 0), own), 0)


@jit
def _tile(ptr, offsets, keep, C0: tl.constexpr, C: tl.constexpr, D: tl.constexpr, MASK: tl.constexpr):
    """Columns C0 : C0 + C of the rows at `offsets`; zero from column D on and, with MASK, in rows that are not kept."""
    c = C0 + tl.arange(0, C)
    at = ptr + offsets[:, None] + c[None, :]
    if MASK:
        return tl.load(at, mask=keep[:, None] & (c < D)[None, :], other=0.0)
    if C0 + C > D:
        return tl.load(at, mask=(c < D)[None, :], other=0.0)
    return tl.load(at)


@jit
def _store(ptr, offsets, keep, values, C0: tl.constexpr, C: tl.constexpr, D: tl.constexpr):
    c = C0 + tl.arange(0, C)
    tl.store(ptr + offsets[:, None] + c[None, :], values.to(ptr.dtype.element_ty), mask=keep[:, None] & (c < D)[None, :])


@jit
def _dot(a, b, accumulator=None):
    # fp32 would become tf32 in silence; for 16-bit inputs the word has no effect.
    return tl.dot(a, b, accumulator, input_precision="ieee")


@jit
def _key_offsets(j, keep, start, shared, first, row, page, table_ptr, PREFIX: tl.constexpr, PAGE: tl.constexpr):
    """Element offsets of keys j of prefix ++ own keys; with a table, of keys j in the pages of a cache."""
    if PAGE:
        number = tl.load(table_ptr + j // PAGE, mask=keep, other=0).to(tl.int64)
        return number * page + (j % PAGE) * row
    if PREFIX:
        return tl.where(j < shared, first + j, start + j - shared).to(tl.int64) * row
    return (start + j).to(tl.int64) * row


@jit
def _forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    cu_q_ptr,
    cu_k_ptr,
    q_index_ptr,
    seqused_k_ptr,
    prefix_ptr,
    table_ptr,
    k_scale_ptr,
    v_scale_ptr,
    S,
    scale,
    q_row,
    k_row,
    v_row,
    k_page,
    v_page,
    table_row,
    Q_HEAD: tl.constexpr,
    K_HEAD: tl.constexpr,
    V_HEAD: tl.constexpr,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    CAUSAL: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # Causal: the last tiles of a sequence see most, and go first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0) if CAUSAL else tl.program_id(0)
    head = tl.program_id(1)
    s, i0 = _sequence(tile, cu_q_ptr, S, BLOCK_M)
    q_start = tl.load(cu_q_ptr + s)
    n = tl.load(cu_q_ptr + s + 1) - q_start
    if i0 >= n:
        return
    PREFIX: tl.constexpr = prefix_ptr is not None
    if PAGE:
        k_start, own = 0, tl.load(seqused_k_ptr + s)
        table_ptr += s.to(tl.int64) * table_row
    else:
        k_start, own = _own_keys(s, cu_k_ptr, seqused_k_ptr)
    first, shared = 0, 0
    if PREFIX:
        first = tl.load(prefix_ptr + 2 * s)
        shared = tl.load(prefix_ptr + 2 * s + 1) - first
    k_ptr += head // GROUP * K_HEAD
    v_ptr += head // GROUP * V_HEAD
    if k_scale_ptr is not None:
        scale *= tl.load(k_scale_ptr + head // GROUP)

    i = i0 + tl.arange(0, BLOCK_M)
    valid = i < n
    q_offsets = (q_start + i).to(tl.int64) * q_row + head * Q_HEAD
    q1 = _tile(q_ptr, q_offsets, valid, 0, D1, D, True)
    if D2:
        q2 = _tile(q_ptr, q_offsets, valid, D1, D2, D, True)
    seen = shared + _seen(i, q_start, n, own, q_index_ptr, CAUSAL)
    end = tl.max(seen, 0)
    full = tl.min(tl.where(valid, seen, end), 0) // BLOCK_N * BLOCK_N

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc1 = tl.zeros([BLOCK_M, D1], tl.float32)
    if D2:
        acc2 = tl.zeros([BLOCK_M, D2], tl.float32)
    for MASK in tl.static_range(2):
        for j0 in range(full if MASK else 0, end if MASK else full, BLOCK_N):
            j = j0 + tl.arange(0, BLOCK_N)
            keep = j < end
            k_offsets = _key_offsets(j, keep, k_start, shared, first, k_row, k_page, table_ptr, PREFIX, PAGE)
            scores = _dot(q1, _tile(k_ptr, k_offsets, keep, 0, D1, D, MASK).to(q1.dtype).T)
            if D2:
                scores = _dot(q2, _tile(k_ptr, k_offsets, keep, D1, D2, D, MASK).to(q1.dtype).T, scores)
            if MASK:
                scores = tl.where(j[None, :] < seen[:, None], scores, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, 1) * scale)
            if MASK:
                # A row that has seen no key yet: its weights must be 0, not exp2(-inf + inf).
                origin = tl.where(new_top == float("-inf"), 0.0, new_top)
            else:
                origin = new_top
            p = tl.exp2(scores * scale - origin[:, None])
            shrink = tl.exp2(top - origin)
            total = total * shrink + tl.sum(p, 1)
            top = new_top
            p = p.to(q1.dtype)
            v_offsets = _key_offsets(j, keep, k_start, shared, first, v_row, v_page, table_ptr, PREFIX, PAGE)
            acc1 = _dot(p, _tile(v_ptr, v_offsets, keep, 0, D1, D, MASK).to(q1.dtype), acc1 * shrink[:, None])
            if D2:
                acc2 = _dot(p, _tile(v_ptr, v_offsets, keep, D1, D2, D, MASK).to(q1.dtype), acc2 * shrink[:, None])

    factor = 1.0 / tl.where(total == 0.0, 1.0, total)
    if v_scale_ptr is not None:
        factor *= tl.load(v_scale_ptr + head // GROUP)
    rows = (q_start + i).to(tl.int64) * H + head
    _store(out_ptr, rows * D, valid, acc1 * factor[:, None], 0, D1, D)
    if D2:
        _store(out_ptr, rows * D, valid, acc2 * factor[:, None], D1, D2, D)
    if lse_ptr is not None:
        LN_2: tl.constexpr = 0.6931471805599453
        lse = tl.where(total == 0.0, float("-inf"), (top + tl.log2(total)) * LN_2)
        tl.store(lse_ptr + rows, lse, mask=valid)


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


@jit
def _backward_q_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_ptr,
    delta_ptr,
    lse2_ptr,
    grad_q_ptr,
    cu_q_ptr,
    cu_k_ptr,
    q_index_ptr,
    seqused_k_ptr,
    prefix_ptr,
    S,
    T,
    scale,
    q_row,
    k_row,
    v_row,
    Q_HEAD: tl.constexpr,
    K_HEAD: tl.constexpr,
    V_HEAD: tl.constexpr,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
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


@jit
def _key_tile_step(
    k1,
    k2,
    v1,
    v2,
    grad_k1,
    grad_k2,
    grad_v1,
    grad_v2,
    j,
    i,
    seen,
    n,
    q_start,
    head,
    q_ptr,
    grad_ptr,
    delta_ptr,
    lse2_ptr,
    T,
    scale2,
    q_row,
    Q_HEAD: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    MASK: tl.constexpr,
):
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


@jit
def _backward_kv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_ptr,
    delta_ptr,
    lse2_ptr,
    grad_k_ptr,
    grad_v_ptr,
    cu_tiles_ptr,
    cu_q_ptr,
    cu_k_ptr,
    q_index_ptr,
    seqused_k_ptr,
    prefix_ptr,
    S,
    T,
    K,
    scale,
    q_row,
    k_row,
    v_row,
    Q_HEAD: tl.constexpr,
    K_HEAD: tl.constexpr,
    V_HEAD: tl.constexpr,
    H: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,
    D2: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
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


def split_head_dim(d: int) -> tuple[int, int]:
    """(D1, D2): the largest power of two in d and what covers the rest; a product takes no fewer than 16 columns."""
    first = max(16, 1 << int(log2(d)))
    return first, 0 if d <= first else max(16, 1 << (d - first - 1).bit_length())


def on_device(tensor: Tensor) -> Any:
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _unit_columns(*tensors: Tensor) -> list[Tensor]:
    return [tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in tensors]


# (BLOCK_M, BLOCK_N, num_warps, num_stages) that spill nothing (aot.csv). Not timed.
# sm_80 also stands for what has less shared memory than Hopper (sm_86, sm_89).
_TILES = {
    ("forward", "sm_90"): {"causal": (128, 64, 8, 3), "full": (128, 128, 8, 2)},
    ("backward_q", "sm_90"): {"causal": (128, 64, 8, 2), "full": (128, 64, 8, 2)},
    ("backward_kv", "sm_90"): {"causal": (64, 128, 8, 2), "full": (64, 128, 8, 2)},
    ("forward", "sm_80"): {"causal": (128, 32, 8, 3), "full": (128, 32, 8, 3)},
    ("backward_q", "sm_80"): {"causal": (128, 32, 8, 2), "full": (128, 32, 8, 2)},
    ("backward_kv", "sm_80"): {"causal": (32, 64, 8, 2), "full": (32, 64, 8, 2)},
}


def _tiles(kernel: str, q: Tensor, causal: bool) -> dict[str, int]:
    older = device_class(q.device) in ("sm_80", "sm_86", "sm_87", "sm_89")
    mask = "causal" if causal else "full"
    block_m, block_n, warps, stages = _TILES[kernel, "sm_80" if older else "sm_90"][mask]
    if kernel == "backward_kv" and q.shape[2] > 96 and not older:
        block_m = 32  # two [128, d] accumulators: 64 rows spill 56 bytes
    if q.element_size() == 4:  # products without tensor cores
        block_m, block_n, warps, stages = 32, 32, 4, 1
    default = {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": warps, "num_stages": stages}
    dtype = str(q.dtype).removeprefix("torch.")
    return config(f"varlen_attention_{kernel}", f"{dtype}_d{q.shape[2]}_{mask}", default, q.device)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    causal: bool,
    q_index: Tensor | None,
    seqused_k: Tensor | None,
    prefix: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(out [T, H, d], lse fp32 [T, H], natural)."""
    q, k, v = _unit_columns(q, k, v)
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)
    if prefix is not None:
        prefix = prefix.contiguous()
    launch_forward(q, k, v, out, lse, cu_q, cu_k, causal, q_index, seqused_k, prefix, scale)
    return out, lse


def launch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor | None,
    cu_q: Tensor,
    cu_k: Tensor | None,
    causal: bool,
    q_index: Tensor | None,
    seqused_k: Tensor | None,
    prefix: Tensor | None,
    scale: float,
    block_table: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """k and v are rows [K, G, d], or with a block table [S, blocks] pages of a cache [B, page, G, d] and seqused_k its lengths."""
    (T, H, d), S = q.shape, len(cu_q) - 1
    if T == 0:
        return
    assert scale > 0, scale  # the maximum is taken before it is applied
    tiles = _tiles("forward", q, causal)
    D1, D2 = split_head_dim(d)
    page = 0 if block_table is None else k.shape[1]
    with on_device(q):
        _forward_kernel[(T // tiles["BLOCK_M"] + S, H)](
            q,
            k,
            v,
            out,
            lse,
            cu_q,
            cu_k,
            q_index,
            seqused_k,
            prefix,
            block_table,
            k_scale,
            v_scale,
            S,
            scale * _LOG2_E,
            q.stride(0),
            k.stride(-3),
            v.stride(-3),
            k.stride(0),
            v.stride(0),
            0 if block_table is None else block_table.stride(0),
            Q_HEAD=q.stride(1),
            K_HEAD=k.stride(-2),
            V_HEAD=v.stride(-2),
            H=H,
            GROUP=H // k.shape[-2],
            D=d,
            D1=D1,
            D2=D2,
            CAUSAL=causal,
            PAGE=page,
            **tiles,
        )


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
    q, k, v = _unit_columns(q, k, v)
    grad_out, out, lse = grad_out.contiguous(), out.contiguous(), lse.contiguous()
    if prefix is not None:
        prefix = prefix.contiguous()
    (T, H, d), (K, G, _), S = q.shape, k.shape, len(cu_q) - 1
    grad_q, grad_k, grad_v = q.new_empty(T, H, d), k.new_empty(K, G, d), v.new_empty(K, G, d)
    if T == 0 or K == 0:
        return grad_q.zero_(), grad_k.zero_(), grad_v.zero_()
    delta, lse2 = lse.new_empty(2, H, T).unbind(0)
    D1, D2 = split_head_dim(d)
    rows = config("varlen_attention_rows", f"d{d}", {"BLOCK": 32, "num_warps": 4}, q.device)
    by_q, by_k = _tiles("backward_q", q, causal), _tiles("backward_kv", q, causal)
    indices = (cu_q, cu_k, q_index, seqused_k, prefix, S, T)
    # Key rows need not begin with the first sequence where they are those of a cache.
    cu_tiles = cu_k if seqused_k is None else torch.cat([cu_k.new_zeros(1), cu_k[1:]])
    strides = (scale, q.stride(0), k.stride(0), v.stride(0))
    shape = {"Q_HEAD": q.stride(1), "K_HEAD": k.stride(1), "V_HEAD": v.stride(1), "H": H, "GROUP": H // G, "D": d, "D1": D1, "D2": D2, "CAUSAL": causal}
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
    yield "d80 full", case(16, 16, 80, 8 * 576, 8, False)
    yield "d96 causal", case(32, 32, 96, 4096, 4, True)
    yield "d64 causal prefix", case(16, 16, 64, 16384, 8, True, prefix=True)
    yield "d128 causal prefix", case(32, 32, 128, 16384, 8, True, prefix=True)
    yield "d64 causal fp32", case(16, 16, 64, 4096, 8, True, torch.float32)
