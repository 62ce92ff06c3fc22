"""y = x W^T + b, computed in x's dtype whatever dtype W is stored in.

Released checkpoints are bf16, and a CPU without bf16 units multiplies bf16 at a sixth of its fp32 rate: there W stays bf16 in
memory and is widened block by block, which gives the results of fp32 weights at half the bytes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_BYTES = 8 << 20  # of widened weight at a time: below glibc's mmap threshold (32 MiB), so that the memory is reused


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x [..., I], weight [O, I], bias [O] of any float dtype; returns [..., O] in x's dtype, accumulated by the BLAS in use."""
    bias_O = None if bias_O is None else bias_O.to(x.dtype)
    if weight_OI.dtype == x.dtype:
        return F.linear(x, weight_OI, bias_O)
    if torch.is_grad_enabled() and (weight_OI.requires_grad or x.requires_grad):
        return F.linear(x, weight_OI.to(x.dtype), bias_O)
    rows = max(1, BLOCK_BYTES // (weight_OI.shape[1] * x.element_size()))
    if weight_OI.shape[0] <= rows:
        return F.linear(x, weight_OI.to(x.dtype), bias_O)
    out = x.new_empty(*x.shape[:-1], weight_OI.shape[0])
    for start in range(0, weight_OI.shape[0], rows):
        block = slice(start, start + rows)
        out[..., block] = F.linear(x, weight_OI[block].to(x.dtype), None if bias_O is None else bias_O[block])
    return out
