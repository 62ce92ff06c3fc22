"""Triton kernels of sampling.py: one pass with a second reduction where nothing is filtered, bisection on the logits' bits where it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from llava_fast.kernels._triton import config, jit, on_device, tl


@jit
def _processed(z, v, mask, row_counts, repetition, presence, frequency, PENALTIES: tl.constexpr):
    if PENALTIES:
        count = tl.load(row_counts + v, mask=mask, other=0).to(tl.float32)
        z = tl.where(count > 0, tl.where(z < 0, z * repetition, z / repetition) - presence, z) - frequency * count
    return z


@jit
def _log_exponential(v, seed, step):
    """log E of token v; sampling.log_exponential has the reasons."""
    counter = (v // 4).to(tl.uint32)
    low = counter * 0 + (step & 0xFFFFFFFF).to(tl.uint32)
    high = counter * 0 + ((step >> 32) & 0xFFFFFFFF).to(tl.uint32)
    a, b, c, d = tl.philox(seed, counter, counter * 0, low, high)
    word = tl.where(v % 4 == 0, a, tl.where(v % 4 == 1, b, tl.where(v % 4 == 2, c, d)))
    u = ((word >> 1).to(tl.int32).to(tl.float32) + 0.5) * 4.656612873077393e-10  # 2^-31
    series = u * (1 + u * (0.5 + u * (0.3333333333333333 + u * 0.25)))
    return tl.log(tl.where(u < 0.01, series, -tl.log(1 - tl.minimum(u, 0.9999999403953552))))


@jit
def _parameter(pointer, row, none, HAVE: tl.constexpr):
    value = none
    if HAVE:
        value = tl.load(pointer + row).to(tl.float32)
    return value


@jit
def _split_kernel(
    best, token, logits, temperature, seeds, steps, repetition, presence, frequency, counts, V, width,
    REPETITION: tl.constexpr, PRESENCE: tl.constexpr, FREQUENCY: tl.constexpr, PENALTIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (row, split): the best score of `width` tokens and its first token."""
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    t, seed, step = tl.load(temperature + row), tl.load(seeds + row), tl.load(steps + row)
    r = _parameter(repetition, row, 1.0, REPETITION)
    p = _parameter(presence, row, 0.0, PRESENCE)
    f = _parameter(frequency, row, 0.0, FREQUENCY)
    high, where = -float("inf"), split * width
    for start in range(split * width, tl.minimum((split + 1) * width, V), BLOCK):
        v = start + tl.arange(0, BLOCK)
        mask = v < tl.minimum((split + 1) * width, V)
        z = tl.load(logits + row * V + v, mask=mask, other=-float("inf"))
        z = _processed(z, v, mask, counts + row * V, r, p, f, PENALTIES)
        if t > 0:
            z = z / t - _log_exponential(v, seed, step)
        top = tl.max(z, axis=0)
        first = tl.min(tl.where(z == top, v, V), axis=0)
        where = tl.where(top > high, first, where)
        high = tl.maximum(top, high)
    tl.store(best + row * tl.num_programs(1) + split, high)
    tl.store(token + row * tl.num_programs(1) + split, where)


@jit
def _key(z):
    """int32 in the order of the floats (-0 beside 0: equal in z, so made equal here)."""
    bits = (z + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@jit
def _filter_kernel(
    out, work, logits, temperature, top_k, excess, min_p, seeds, steps, repetition, presence, frequency, counts, V,
    TOP_K: tl.constexpr, TOP_P: tl.constexpr, MIN_P: tl.constexpr,
    REPETITION: tl.constexpr, PRESENCE: tl.constexpr, FREQUENCY: tl.constexpr, PENALTIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row a program; work [S, V] holds its processed logits. excess = 1 - top_p.

    Thresholds are found bit by bit, 32 passes over a row that stays in L2: the largest key with k keys at or above it, and the
    smallest whose summed weight from below passes the excess.
    """
    row = tl.program_id(0).to(tl.int64)
    t, seed, step = tl.load(temperature + row), tl.load(seeds + row), tl.load(steps + row)
    r = _parameter(repetition, row, 1.0, REPETITION)
    p = _parameter(presence, row, 0.0, PRESENCE)
    f = _parameter(frequency, row, 0.0, FREQUENCY)
    greedy = t <= 0
    lanes = tl.arange(0, BLOCK)
    high = tl.full([BLOCK], -float("inf"), tl.float32)
    work += row * V
    for start in range(0, V, BLOCK):
        v = start + lanes
        z = tl.load(logits + row * V + v, mask=v < V, other=-float("inf"))
        z = _processed(z, v, v < V, counts + row * V, r, p, f, PENALTIES) / tl.where(greedy, 1.0, t)
        tl.store(work + v, z, mask=v < V)
        high = tl.maximum(high, z)
    tl.debug_barrier()  # other threads of the program read what this one wrote
    top = tl.max(high, axis=0)

    least = tl.full([], -2147483648, tl.int32)  # keys below are out
    if TOP_K:
        k = tl.load(top_k + row).to(tl.int32)
        if (k > 0) & (k < V) & (t > 0):
            for i in range(32):
                bit = (tl.full([], 1, tl.int32) << (31 - i)).to(tl.int32)
                candidate = least ^ bit if i == 0 else least | bit
                count = tl.zeros([BLOCK], tl.int32)
                for start in range(0, V, BLOCK):
                    z = tl.load(work + start + lanes, mask=start + lanes < V, other=-float("inf"))
                    count += ((_key(z) >= candidate) & (start + lanes < V)).to(tl.int32)
                least = tl.where(tl.sum(count, axis=0) >= k, candidate, least)
    edge, ties_out = least, 0  # the first ties_out tokens whose key is `edge` are out too
    if TOP_P:
        limit = tl.load(excess + row)
        if (limit > 0) & (t > 0):
            total = tl.zeros([BLOCK], tl.float32)
            for start in range(0, V, BLOCK):
                z = tl.load(work + start + lanes, mask=start + lanes < V, other=-float("inf"))
                total += tl.where(_key(z) >= least, tl.exp(z - top), 0.0)
            limit = limit * tl.sum(total, axis=0)
            # The largest key whose keys below sum to the limit at most.
            edge = tl.full([], -2147483648, tl.int32)
            base = 0.0
            for i in range(32):
                bit = (tl.full([], 1, tl.int32) << (31 - i)).to(tl.int32)
                candidate = edge ^ bit if i == 0 else edge | bit
                below = tl.zeros([BLOCK], tl.float32)
                for start in range(0, V, BLOCK):
                    z = tl.load(work + start + lanes, mask=start + lanes < V, other=-float("inf"))
                    key = _key(z)
                    below += tl.where((key >= least) & (key < candidate), tl.exp(z - top), 0.0)
                mass = tl.sum(below, axis=0)
                fits = (mass <= limit) & (candidate <= _key(top))
                edge = tl.where(fits, candidate, edge)
                base = tl.where(fits, mass, base)
            ties, weight = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.float32)
            for start in range(0, V, BLOCK):
                z = tl.load(work + start + lanes, mask=start + lanes < V, other=-float("inf"))
                same = (_key(z) == edge) & (start + lanes < V)
                ties += same.to(tl.int32)
                weight = tl.where(same, tl.exp(z - top), weight)
            number, each = tl.sum(ties, axis=0), tl.max(weight, axis=0)
            ties_out = tl.where(each > 0, ((limit - base) / tl.maximum(each, 1e-38)).to(tl.int32), number)
            ties_out = tl.where(edge == _key(top), tl.minimum(ties_out, number - 1), tl.minimum(ties_out, number))
            edge = tl.maximum(edge, least)
    floor = 0.0
    if MIN_P:
        floor = tl.load(min_p + row).to(tl.float32)

    best, where, passed = -float("inf"), 0, 0
    for start in range(0, V, BLOCK):
        v = start + lanes
        z = tl.load(work + v, mask=v < V, other=-float("inf"))
        score = z
        if t > 0:
            key = _key(z)
            same = (key == edge) & (v < V)
            order = passed + tl.cumsum(same.to(tl.int32), axis=0)
            passed += tl.sum(same.to(tl.int32), axis=0)
            inside = (key > edge) | (same & (order > ties_out))
            inside = inside & (tl.exp(z - top) >= floor)
            score = tl.where(inside, z - _log_exponential(v, seed, step), -float("inf"))
        block_best = tl.max(score, axis=0)
        first = tl.min(tl.where(score == block_best, v, V), axis=0)
        where = tl.where(block_best > best, first, where)
        best = tl.maximum(best, block_best)
    tl.store(out + row, where)


SPLIT = 8192  # tokens a program: 19 of them for a vocabulary of 152,000


def sample_triton(
    logits_SV: Tensor,
    temperature: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    seeds: Tensor,
    steps: Tensor,
    repetition: Tensor | None,
    presence: Tensor | None,
    frequency: Tensor | None,
    counts: Tensor | None,
) -> Tensor:
    S, V = logits_SV.shape
    logits_SV, counts = logits_SV.contiguous(), None if counts is None else counts.contiguous()
    if S == 0:
        return logits_SV.new_empty(0, dtype=torch.int64)
    none = logits_SV  # a pointer that is not read
    penalties = [none if tensor is None else tensor for tensor in (repetition, presence, frequency, counts)]
    given = [tensor is not None for tensor in (repetition, presence, frequency, counts)]
    have = dict(zip(("REPETITION", "PRESENCE", "FREQUENCY", "PENALTIES"), given, strict=True))
    with on_device(logits_SV):
        if top_k is None and top_p is None and min_p is None:
            launch = config("sample_split", "fp32", {"BLOCK": 2048, "num_warps": 4}, logits_SV.device)
            splits = -(-V // SPLIT)
            best = logits_SV.new_empty(S, splits)
            token = torch.empty_like(best, dtype=torch.int64)
            pointers = best, token, logits_SV, temperature, seeds, steps, *penalties
            _split_kernel[(S, splits)](*pointers, V, SPLIT, **have, **launch)
            return token.gather(1, best.argmax(1, keepdim=True))[:, 0]
        launch = config("sample_filter", "fp32", {"BLOCK": 4096, "num_warps": 16}, logits_SV.device)
        out = torch.empty_like(seeds)
        excess = none if top_p is None else (1 - top_p).float()
        filters = none if top_k is None else top_k, excess, none if min_p is None else min_p
        chosen = {"TOP_K": top_k is not None, "TOP_P": top_p is not None, "MIN_P": min_p is not None}
        pointers = out, torch.empty_like(logits_SV), logits_SV, temperature, *filters, seeds, steps, *penalties
        _filter_kernel[(S,)](*pointers, V, **chosen, **have, **launch)
        return out


def shipped_calls(device: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """64 rows of a vocabulary of 152,000."""
    logits = torch.zeros(64, 152000, device=device)
    value, number = torch.ones(64, device=device), torch.ones(64, dtype=torch.int64, device=device)
    counts = torch.zeros(64, 152000, dtype=torch.int32, device=device)
    penalties = value, value, value, counts
    nothing = None, None, None, None
    yield "temperature", partial(sample_triton, logits, value, None, None, None, number, number, *nothing)
    yield "top-k, top-p, min-p", partial(sample_triton, logits, value, number, value, value, number, number, *nothing)
    yield "all", partial(sample_triton, logits, value, number, value, value, number, number, *penalties)
