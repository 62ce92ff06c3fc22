"""y = x W^T + b, computed in x's dtype whatever dtype W is stored in.

Released checkpoints are bf16, and a CPU without bf16 units multiplies bf16 at a sixth of its fp32 rate: there W stays bf16 in
memory and is widened block by block, which gives the results of fp32 weights at half the bytes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Bytes of widened weight at a time. A product with few rows reads each block once: 512 KiB stays in L2 (2026-11, [1, 1024] x
# [152000, 1024] on one thread: 69 ms, 82 ms with 8 MiB blocks, 98 ms with 128 KiB; 55 ms with weights kept in fp32). With many
# rows a weight is widened whole up to 256 MiB: in blocks of 8 MiB, writing the columns of the output took 1.7 of 14.1 s to a first token.
BLOCK_BYTES = 256 << 20
BLOCK_BYTES_FEW_ROWS = 512 << 10
FEW_ROWS = 16


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x [..., I], weight [O, I], bias [O] of any float dtype; returns [..., O] in x's dtype, accumulated by the BLAS in use."""
    bias_O = None if bias_O is None else bias_O.to(x.dtype)
    if weight_OI.dtype == x.dtype:
        return F.linear(x, weight_OI, bias_O)
    if torch.is_grad_enabled() and (weight_OI.requires_grad or x.requires_grad):
        return F.linear(x, weight_OI.to(x.dtype), bias_O)
    few = x.numel() <= FEW_ROWS * x.shape[-1]
    rows = max(1, (BLOCK_BYTES_FEW_ROWS if few else BLOCK_BYTES) // (weight_OI.shape[1] * x.element_size()))
    if weight_OI.shape[0] <= rows:
        return F.linear(x, weight_OI.to(x.dtype), bias_O)
    out = x.new_empty(*x.shape[:-1], weight_OI.shape[0])
    for start in range(0, weight_OI.shape[0], rows):
        block = slice(start, start + rows)
        out[..., block] = F.linear(x, weight_OI[block].to(x.dtype), None if bias_O is None else bias_O[block])
    return out
