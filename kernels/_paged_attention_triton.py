"""paged_attention in Triton: few rows a sequence with split keys and a second pass, many with the tile loop of varlen_attention.

Decode reads each key once and computes little: the number of programs in flight is what counts. Each program takes one query row, the
heads of one key-value head and one of SPLITS runs of keys. The number of splits comes from shapes (nothing waits for the device), their
length from the sequence's own length. The second kernel adds the splits, weighted by their sums.

One head a key-value head: no product of 16 rows; each of the BLOCK_N key places has a softmax of its own, and these are joined once at
the end, so that inside the loop only the d columns of a score are summed across threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from llava_fast.kernels import registry
from llava_fast.kernels._triton import config, device_class, jit, on_device, tl, triton
from llava_fast.kernels._varlen_attention_triton import _dot, _key_offsets, _store, _tile, _widen, launch_forward

_LOG2_E = 1.4426950408889634


# fmt: off
@jit
def _decode_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse2_ptr, cu_q_ptr, seqlens_k_ptr, table_ptr, k_scale_ptr, v_scale_ptr, S, scale, q_row, k_row, v_row,
    k_page, v_page, table_row, Q_HEAD: tl.constexpr, K_HEAD: tl.constexpr, V_HEAD: tl.constexpr, H: tl.constexpr, GROUP: tl.constexpr,
    D: tl.constexpr, DP: tl.constexpr, PAGE: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):
# fmt: on
    """out [T, H, SPLITS, d] and the sums of each split, log2, [T, H, SPLITS]."""
    t, group, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    s, high = 0, S
    while high - s > 1:
        middle = (s + high) // 2
        if tl.load(cu_q_ptr + middle) <= t:
            s = middle
        else:
            high = middle
    n = tl.maximum(tl.load(seqlens_k_ptr + s) - tl.load(cu_q_ptr + s + 1) + t + 1, 0)
    length = tl.cdiv(tl.cdiv(n, SPLITS), BLOCK_N) * BLOCK_N
    low = split * length
    end = tl.minimum(low + length, n)
    table_ptr += s * table_row
    k_ptr += group * K_HEAD
    v_ptr += group * V_HEAD
    if k_scale_ptr is not None:
        scale *= tl.load(k_scale_ptr + group)

    member = tl.arange(0, ROWS)
    heads = group * GROUP + member
    c = tl.arange(0, DP)
    q_ptr += t.to(tl.int64) * q_row
    if GROUP == 1:
        q = tl.load(q_ptr + group * Q_HEAD + c, mask=c < D, other=0.0).to(tl.float32) * scale
        top = tl.full([BLOCK_N], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_N], tl.float32)
        acc = tl.zeros([BLOCK_N, DP], tl.float32)
        for j0 in tl.range(low, end, BLOCK_N, num_stages=3):  # said here: without a product Triton would not load ahead
            j = j0 + tl.arange(0, BLOCK_N)
            keep = j < end
            k_offsets = _key_offsets(j, keep, 0, 0, 0, k_row, k_page, table_ptr, False, PAGE)
            v_offsets = _key_offsets(j, keep, 0, 0, 0, v_row, v_page, table_ptr, False, PAGE)
            k = _widen(_tile(k_ptr, k_offsets, keep, 0, DP, D, True), tl.float32)
            v = _widen(_tile(v_ptr, v_offsets, keep, 0, DP, D, True), tl.float32)
            scores = tl.where(keep, tl.sum(k * q[None, :], 1), float("-inf"))
            new_top = tl.maximum(top, scores)
            origin = tl.where(new_top == float("-inf"), 0.0, new_top)
            p = tl.exp2(scores - origin)
            shrink = tl.exp2(top - origin)
            total = total * shrink + p
            acc = acc * shrink[:, None] + p[:, None] * v
            top = new_top
        peak = tl.max(top, 0)
        weights = tl.exp2(top - tl.where(peak == float("-inf"), 0.0, peak))
        sums = tl.sum(total * weights, 0) + tl.zeros([ROWS], tl.float32)
        rows = tl.sum(acc * weights[:, None], 0)[None, :]
        tops = peak + tl.zeros([ROWS], tl.float32)
    else:
        q = _tile(q_ptr, heads * Q_HEAD, member < GROUP, 0, DP, D, True)
        tops = tl.full([ROWS], float("-inf"), tl.float32)
        sums = tl.zeros([ROWS], tl.float32)
        rows = tl.zeros([ROWS, DP], tl.float32)
        for j0 in range(low, end, BLOCK_N):
            j = j0 + tl.arange(0, BLOCK_N)
            keep = j < end
            k_offsets = _key_offsets(j, keep, 0, 0, 0, k_row, k_page, table_ptr, False, PAGE)
            v_offsets = _key_offsets(j, keep, 0, 0, 0, v_row, v_page, table_ptr, False, PAGE)
            k = _widen(_tile(k_ptr, k_offsets, keep, 0, DP, D, True), q.dtype)
            scores = tl.where(keep[None, :], _dot(q, k.T) * scale, float("-inf"))
            new_top = tl.maximum(tops, tl.max(scores, 1))  # finite: a run begins with a key
            p = tl.exp2(scores - new_top[:, None])
            shrink = tl.exp2(tops - new_top)
            sums = sums * shrink + tl.sum(p, 1)
            v = _widen(_tile(v_ptr, v_offsets, keep, 0, DP, D, True), q.dtype)
            rows = _dot(p.to(q.dtype), v, rows * shrink[:, None])
            tops = new_top
    factor = 1.0 / tl.where(sums == 0.0, 1.0, sums)
    if v_scale_ptr is not None:
        factor *= tl.load(v_scale_ptr + group)
    at = (t.to(tl.int64) * H + heads) * SPLITS + split
    _store(out_ptr, at * D, member < GROUP, rows * factor[:, None], 0, DP, D)
    if SPLITS > 1:
        tl.store(lse2_ptr + at, tl.where(sums == 0.0, float("-inf"), tops + tl.log2(sums)), mask=member < GROUP)


@jit
def _join_kernel(parts_ptr, lse2_ptr, out_ptr, D: tl.constexpr, DP: tl.constexpr, SPLITS: tl.constexpr):
    """One row and head: the mean of its splits, weighted by their sums."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS)
    lse2 = tl.load(lse2_ptr + row * SPLITS + split)
    peak = tl.max(lse2, 0)
    weights = tl.exp2(lse2 - tl.where(peak == float("-inf"), 0.0, peak))
    total = tl.sum(weights, 0)
    parts = _tile(parts_ptr, (row * SPLITS + split) * D, lse2 > float("-inf"), 0, DP, D, True)
    c = tl.arange(0, DP)
    joined = tl.sum(parts * weights[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out_ptr + row * D + c, joined.to(out_ptr.dtype.element_ty), mask=c < D)


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def split_count(rows: int, groups: int, keys: int, device: torch.device) -> int:
    """A power of two: four programs a multiprocessor, of 64 keys or more."""
    wanted = min(4 * _multiprocessors(device) / (rows * groups), keys / 64, 64)
    return 1 << max(0, int(wanted) - 1).bit_length() if wanted > 1 else 1


def forward(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cu_seqlens_q: Tensor,
    seqlens_k: Tensor,
    scale: float,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> Tensor:
    (T, H, d), (_, page, G, _), (S, blocks) = q.shape, k_cache.shape, block_table.shape
    out = q.new_empty(q.shape)
    if T == 0:
        return out
    if k_cache.dtype == torch.float8_e4m3fn and device_class(q.device) in ("sm_80", "sm_86", "sm_87"):
        k_cache, v_cache = k_cache.view(torch.uint8), v_cache.view(torch.uint8)  # no fp8 there: widened by hand
    if T > 4 * S or registry.is_invariant():  # the number of splits would depend on how many rows there are
        pages = (block_table, k_scale, v_scale)
        launch_forward(q, k_cache, v_cache, out, None, cu_seqlens_q, None, True, None, seqlens_k, None, scale, *pages)
        return out
    splits = split_count(T, G, blocks * page, q.device)
    default = {"BLOCK_N": 32 if H == G else 64, "num_warps": 4, "num_stages": 2}
    if q.element_size() == 4:
        default |= {"BLOCK_N": 32, "num_stages": 1}
    tiles = config("paged_attention_decode", f"{str(k_cache.dtype).removeprefix('torch.')}_d{d}_g{H // G}", default, q.device)
    shape: dict[str, Any] = {"D": d, "DP": max(16, triton.next_power_of_2(d)), "SPLITS": splits}
    parts = out if splits == 1 else q.new_empty(T, H, splits, d, dtype=torch.float32)
    lse2 = None if splits == 1 else q.new_empty(T, H, splits, dtype=torch.float32)
    rows = 1 if H == G else max(16, triton.next_power_of_2(H // G))
    with on_device(q):
        # fmt: off
        _decode_kernel[(T, G, splits)](
            q, k_cache, v_cache, parts, lse2, cu_seqlens_q, seqlens_k, block_table, k_scale, v_scale, S, scale * _LOG2_E, q.stride(0),
            k_cache.stride(1), v_cache.stride(1), k_cache.stride(0), v_cache.stride(0), block_table.stride(0), Q_HEAD=q.stride(1),
            K_HEAD=k_cache.stride(2), V_HEAD=v_cache.stride(2), H=H, GROUP=H // G, PAGE=page, ROWS=rows, **shape, **tiles,
        )
        # fmt: on
        if splits > 1:
            _join_kernel[(T * H,)](parts, lse2, out, **shape, num_warps=4)
    return out


def shipped_calls(device: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """Decode of one and of 32 sequences, 4096 keys at most; 2048 new rows of 4 sequences."""

    def case(H: int, G: int, d: int, T: int, S: int, stored: torch.dtype, page: int = 16, dtype: torch.dtype = torch.bfloat16) -> Any:
        q = torch.zeros(T, H, d, dtype=dtype, device=device)
        k, v = torch.zeros(2, 512, page, G, d, dtype=dtype, device=device).to(stored).unbind(0)
        table = torch.zeros(S, 4096 // page, dtype=torch.int32, device=device)
        cu = torch.arange(0, T + 1, T // S, dtype=torch.int32, device=device)
        lengths = torch.full((S,), 4096, dtype=torch.int32, device=device)
        scales = torch.ones(G, device=device) if stored == torch.float8_e4m3fn else None
        return lambda: forward(q, k, v, table, cu, lengths, d**-0.5, scales, scales)

    bf16, fp8 = torch.bfloat16, torch.float8_e4m3fn
    for H, d in ((16, 64), (32, 128)):
        for name, stored in (("bf16", bf16), ("fp8", fp8)):
            yield f"decode d{d} {name}", case(H, H, d, 1, 1, stored)
            if name == "bf16" or d == 128:
                yield f"prefill d{d} {name}", case(H, H, d, 2048, 4, stored)
    yield "decode d64 bf16 grouped", case(14, 2, 64, 32, 32, bf16, 256)
    yield "decode d128 fp8 grouped", case(28, 4, 128, 32, 32, fp8, 64)
    yield "decode d128 fp16", case(32, 32, 128, 1, 1, torch.float16, dtype=torch.float16)
    yield "decode d64 fp32", case(16, 16, 64, 1, 1, torch.float32, dtype=torch.float32)


def candidates() -> dict[tuple[str, str], list[dict[str, int]]]:
    """Launch parameters for bench/tune.py: one head a key-value head keeps [BLOCK_N, d] sums in registers, a group does not."""
    alone = [(16, 2, 2), (16, 4, 2), (32, 8, 2), (64, 4, 2), (64, 8, 2)]
    grouped = [(32, 4, 2), (32, 4, 3), (64, 8, 2), (128, 4, 2), (128, 8, 3)]
    names = ("BLOCK_N", "num_warps", "num_stages")
    shapes = {"bfloat16_d64_g1": alone, "bfloat16_d128_g1": alone, "float8_e4m3fn_d128_g1": alone}
    shapes |= {"bfloat16_d64_g7": grouped, "float8_e4m3fn_d128_g7": grouped}
    return {("paged_attention_decode", shape): [dict(zip(names, tiles, strict=True)) for tiles in lists] for shape, lists in shapes.items()}
