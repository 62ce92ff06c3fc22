"""Attention over packed rows: every sequence attends to its own keys, and to an optional range of an earlier sequence's.

    out_i = softmax(scale * q_i K_s^T) V_s,   K_s = k[prefix_s] ++ k[own rows of s]

Shape letters: T query rows, K key rows, S sequences, H heads, G key-value heads (H a multiple of G), d head dim.
Accumulation: fp32, or the inputs' own dtype where that is wider.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def varlen_attention_reference(
    q_THd: Tensor,
    k_KGd: Tensor,
    v_KGd: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    causal: bool = True,
    q_index: Tensor | None = None,
    seqused_k: Tensor | None = None,
    prefix: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """One scaled_dot_product_attention a sequence. Reads the lengths on the host: on a GPU this waits for the device."""
    starts_k = cu_seqlens_k.tolist()
    lengths_q, lengths_k = cu_seqlens_q.diff().tolist(), (cu_seqlens_k.diff() if seqused_k is None else seqused_k).tolist()
    prefixes = [(0, 0)] * len(lengths_q) if prefix is None else prefix.tolist()
    # split and cat, not slices: the gradient of a slice is as large as the whole, once a sequence.
    if seqused_k is None:
        keys, values = k_KGd.split(lengths_k), v_KGd.split(lengths_k)
    else:
        ranges = [slice(start, start + n) for start, n in zip(starts_k, lengths_k, strict=False)]
        keys, values = tuple(k_KGd[r] for r in ranges), tuple(v_KGd[r] for r in ranges)
    places = [None] * len(lengths_q) if q_index is None else q_index.split(lengths_q)
    out: list[Tensor] = []
    for q, k, v, place, (first, last) in zip(q_THd.split(lengths_q), keys, values, places, prefixes, strict=True):
        n, shared = q.shape[0], last - first
        if n == 0:
            continue
        own = k.shape[0]
        if shared:
            k, v = torch.cat([k_KGd[first:last], k]), torch.cat([v_KGd[first:last], v])
        whole = place is None and n == own and not shared
        mask = None
        if causal and not whole and not (place is None and n == 1):
            place = torch.arange(own - n, own, device=q.device) if place is None else place
            mask = torch.arange(shared + own, device=q.device) <= place[:, None] + shared
        attended = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            k.transpose(0, 1)[None],
            v.transpose(0, 1)[None],
            attn_mask=mask,
            is_causal=causal and whole and n > 1,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        out.append(attended[0].transpose(0, 1))
    return torch.cat(out) if out else torch.empty_like(q_THd)


def varlen_attention(
    q_THd: Tensor,
    k_KGd: Tensor,
    v_KGd: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    causal: bool = True,
    q_index: Tensor | None = None,
    seqused_k: Tensor | None = None,
    prefix: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention of packed rows; returns [T, H, d] in q's dtype.

    cu_seqlens_q, cu_seqlens_k: int32 [S+1]; sequence s has query rows cu_seqlens_q[s] : cu_seqlens_q[s+1] and own key rows from
    cu_seqlens_k[s], all of them or the first seqused_k[s] (int32 [S], for key rows reserved in a cache).
    q_index: int64 [T], the place of each query row among its sequence's own keys, for queries that are a subset of the rows;
    None: the queries are the last ones.  prefix: int32 [S, 2], key rows seen whole before the own keys (empty range: none).
    causal: a query sees own keys up to its place.  scale: 1 / sqrt(d) where None.
    """
    return varlen_attention_reference(
        q_THd,
        k_KGd,
        v_KGd,
        cu_seqlens_q,
        cu_seqlens_k,
        causal=causal,
        q_index=q_index,
        seqused_k=seqused_k,
        prefix=prefix,
        scale=scale,
    )
