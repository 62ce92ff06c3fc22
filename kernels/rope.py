"""Rotary position embedding, in the half-split form of Llama and Qwen2.

    rope(x) = x * cos + rotate_half(x) * sin,   rotate_half([a, b]) = [-b, a],   angle[t, i] = position[t] * inv_freq[i]

Source: arXiv 2104.09864; the layout is that of transformers' apply_rotary_pos_emb.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rope_tables(positions_T: Tensor, inv_freq: Tensor, scaling: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin, each [T, d/2]; angles in fp32 (as transformers), rounded to `dtype` at the end."""
    angles = positions_T[:, None].to(inv_freq.dtype) * inv_freq
    return (angles.cos() * scaling).to(dtype), (angles.sin() * scaling).to(dtype)


def rope(x_THd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, H, d]; returns its rotation, same shape and dtype."""
    a, b = x_THd.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
