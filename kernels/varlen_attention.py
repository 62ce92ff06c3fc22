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
    out = torch.empty_like(q_THd)
    q_bounds, k_bounds = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    used = None if seqused_k is None else seqused_k.tolist()
    prefixes = None if prefix is None else prefix.tolist()
    for s in range(len(q_bounds) - 1):
        q0, q1 = q_bounds[s], q_bounds[s + 1]
        if q0 == q1:
            continue
        k0 = k_bounds[s]
        k1 = k_bounds[s + 1] if used is None else k0 + used[s]
        k, v, shared = k_KGd[k0:k1], v_KGd[k0:k1], 0
        if prefixes is not None and prefixes[s][0] < prefixes[s][1]:
            p0, p1 = prefixes[s]
            shared = p1 - p0
            k, v = torch.cat([k_KGd[p0:p1], k]), torch.cat([v_KGd[p0:p1], v])
        queries, keys = q1 - q0, k1 - k0
        aligned = q_index is None and queries == keys and not shared
        mask = None
        if causal and not aligned and not (q_index is None and queries == 1):
            index = q_index[q0:q1] if q_index is not None else torch.arange(keys - queries, keys, device=q_THd.device)
            mask = torch.arange(shared + keys, device=q_THd.device) <= index[:, None] + shared
        out[q0:q1] = F.scaled_dot_product_attention(
            q_THd[q0:q1].transpose(0, 1)[None],
            k.transpose(0, 1)[None],
            v.transpose(0, 1)[None],
            attn_mask=mask,
            is_causal=causal and aligned and queries > 1,
            scale=scale,
            enable_gqa=q_THd.shape[1] != k_KGd.shape[1],
        )[0].transpose(0, 1)
    return out


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
