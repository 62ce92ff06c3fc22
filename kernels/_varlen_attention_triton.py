"""The forward of varlen_attention in Triton, over packed rows or the pages of a cache; the backward is in _varlen_attention_backward.

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

from math import log2

import torch
from torch import Tensor

from llava_fast.kernels import registry
from llava_fast.kernels._triton import config, device_class, jit, on_device, tl

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
def _widen(x, dtype: tl.constexpr):
    """x in another dtype. Bytes are fp8 e4m3 where a GPU has none: its bits, shifted into an fp16, are 1/256 of it (NaN apart)."""
    if x.dtype == tl.uint8:
        bits = x.to(tl.uint16)
        half = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
        return (half * 256.0).to(dtype)
    return x.to(dtype)


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
        # One of two numbers, not of two rows of offsets: that is a branch, and ptxas then serialises wgmma (C7511).
        return (j + tl.where(j < shared, first, start - shared)).to(tl.int64) * row
    return (start + j).to(tl.int64) * row


# fmt: off
@jit
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, cu_q_ptr, cu_k_ptr, q_index_ptr, seqused_k_ptr, prefix_ptr, table_ptr, k_scale_ptr,
    v_scale_ptr, S, scale, q_row, k_row, v_row, k_page, v_page, table_row, Q_HEAD: tl.constexpr, K_HEAD: tl.constexpr,
    V_HEAD: tl.constexpr, H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    CAUSAL: tl.constexpr, PAGE: tl.constexpr, INVARIANT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
# fmt: on
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
        table_ptr += s * table_row
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
    # Of two loops, compiled apart, which of them a row's keys meet would depend on the rows of its tile.
    full = 0 if INVARIANT else tl.min(tl.where(valid, seen, end), 0) // BLOCK_N * BLOCK_N

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
            scores = _dot(q1, _widen(_tile(k_ptr, k_offsets, keep, 0, D1, D, MASK), q1.dtype).T)
            if D2:
                scores = _dot(q2, _widen(_tile(k_ptr, k_offsets, keep, D1, D2, D, MASK), q1.dtype).T, scores)
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
            acc1 = _dot(p, _widen(_tile(v_ptr, v_offsets, keep, 0, D1, D, MASK), q1.dtype), acc1 * shrink[:, None])
            if D2:
                acc2 = _dot(p, _widen(_tile(v_ptr, v_offsets, keep, D1, D2, D, MASK), q1.dtype), acc2 * shrink[:, None])

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


def split_head_dim(d: int) -> tuple[int, int]:
    """(D1, D2): the largest power of two in d and what covers the rest; a product takes no fewer than 16 columns."""
    first = max(16, 1 << int(log2(d)))
    return first, 0 if d <= first else max(16, 1 << (d - first - 1).bit_length())


# (BLOCK_M, BLOCK_N, num_warps, num_stages) that spill nothing with triton 3.6 and 3.9. Not timed. sm_80 stands for sm_86 and sm_89 too,
# which have less shared memory; two stages of its backward_kv spill up to 156 bytes with triton 3.6.
_TILES = {
    "sm_90": {"forward": (128, 64, 8, 3), "backward_q": (128, 64, 8, 2), "backward_kv": (64, 128, 8, 2)},
    "sm_80": {"forward": (128, 32, 8, 3), "backward_q": (128, 32, 8, 2), "backward_kv": (32, 64, 8, 1)},
}


def launch_tiles(kernel: str, q: Tensor, causal: bool) -> dict[str, int]:
    d, arch = q.shape[2], "sm_80" if device_class(q.device).startswith("sm_8") else "sm_90"
    block_m, block_n, warps, stages = _TILES[arch][kernel]
    if arch == "sm_90" and kernel == "forward" and d <= 96 and not causal:
        block_n, stages = 128, 2
    if arch == "sm_90" and kernel == "backward_kv" and (d > 96 or causal):
        block_m = 32  # 64 rows spill 56 bytes beside two [128, d] accumulators, 48 where heads are grouped (triton 3.6)
    if q.element_size() == 4:  # products without tensor cores: with 4 warps the backward spills 2 KB, with 32 keys the forward 40 bytes
        block_m, block_n, warps, stages = (32, 16, 4, 1) if kernel == "forward" else (32, 32, 8, 1)
    default = {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": warps, "num_stages": stages}
    shape_class = f"{str(q.dtype).removeprefix('torch.')}_d{d}_{'causal' if causal else 'full'}"
    return config(f"varlen_attention_{kernel}", shape_class, default, q.device)


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
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)
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
    tiles = launch_tiles("forward", q, causal)
    D1, D2 = split_head_dim(d)
    page = 0 if block_table is None else k.shape[1]
    with on_device(q):
        # fmt: off
        _forward_kernel[(T // tiles["BLOCK_M"] + S, H)](
            q, k, v, out, lse, cu_q, cu_k, q_index, seqused_k, prefix, block_table, k_scale, v_scale, S, scale * _LOG2_E, q.stride(0),
            k.stride(-3), v.stride(-3), k.stride(0), v.stride(0), 0 if block_table is None else block_table.stride(0),
            Q_HEAD=q.stride(1), K_HEAD=k.stride(-2), V_HEAD=v.stride(-2), H=H, GROUP=H // k.shape[-2], D=d, D1=D1, D2=D2, CAUSAL=causal,
            PAGE=page, INVARIANT=registry.is_invariant(), **tiles,
        )
        # fmt: on
