"""A row over several devices: each has some of its tokens, and in attention all tokens and some of the heads (Ulysses, arXiv 2309.14509).

Shape letters: T own rows, N rows of all devices, H heads, h heads a device, d head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llava_fast.kernels.varlen_attention import varlen_attention


@dataclass(frozen=True)
class Split:
    """How a row lies over a group of processes. rows, needed: how many rows, and needed rows, each has, in the row's order;
    needed_rows: int64, all of the needed ones by their place in the whole row."""

    group: Any
    rows: tuple[int, ...]
    needed: tuple[int, ...]
    needed_rows: Tensor

    def to(self, device: torch.device | str) -> Split:
        return Split(self.group, self.rows, self.needed, self.needed_rows.to(device))


def split_attention(
    q_THd: Tensor,
    k_TGd: Tensor,
    v_TGd: Tensor,
    split: Split,
    narrow: bool,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    q_index: Tensor | None,
    prefix: Tensor | None,
) -> Tensor:
    """varlen_attention of the whole row, whose lengths and places are given; q, k, v and the result are this device's rows of it.

    narrow: the queries are the needed rows alone.
    """
    asked = split.needed if narrow else split.rows
    q = _ToHeads.apply(q_THd, asked, split.group)
    k, v = _ToHeads.apply(k_TGd, split.rows, split.group), _ToHeads.apply(v_TGd, split.rows, split.group)
    return _ToRows.apply(varlen_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, q_index=q_index, prefix=prefix), asked, split.group)


def _to_heads(x_THd: Tensor, rows: Sequence[int], group: Any) -> Tensor:
    """Own rows of all heads -> all rows of own heads [N, h, d]."""
    parts, (T, H, d) = len(rows), x_THd.shape
    sent = x_THd.view(T, parts, H // parts, d).transpose(0, 1).contiguous().view(parts * T, H // parts, d)
    made = sent.new_empty(sum(rows), H // parts, d)
    dist.all_to_all_single(made, sent, list(rows), [T] * parts, group=group)
    return made


def _to_rows(x_Nhd: Tensor, rows: Sequence[int], group: Any) -> Tensor:
    """The way back: all rows of own heads -> own rows of all heads [T, H, d]."""
    parts, (_, h, d) = len(rows), x_Nhd.shape
    T = rows[dist.get_rank(group)]
    made = x_Nhd.new_empty(parts * T, h, d)
    dist.all_to_all_single(made, x_Nhd.contiguous(), [T] * parts, list(rows), group=group)
    return made.view(parts, T, h, d).transpose(0, 1).reshape(T, parts * h, d)


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Sequence[int], group: Any) -> Tensor:
        ctx.rows, ctx.group = rows, group
        return _to_heads(x, rows, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _to_rows(grads[0], ctx.rows, ctx.group), None, None


class _ToRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Sequence[int], group: Any) -> Tensor:
        ctx.rows, ctx.group = rows, group
        return _to_rows(x, rows, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _to_heads(grads[0].contiguous(), ctx.rows, ctx.group), None, None
