"""RMSNorm and LayerNorm over the last dimension.

    rms_norm(x) = w * x / sqrt(mean(x^2) + eps)          layer_norm(x) = w * (x - mean) / sqrt(var + eps) + b

Statistics in fp32 (fp64 for fp64 inputs). The normalised row is rounded to x's dtype before it meets w, as in transformers'
Qwen2RMSNorm, so that bf16 results agree.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x [..., D], weight [D]; returns [..., D] in x's dtype."""
    wide = x_TD.to(torch.promote_types(x_TD.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight_D.to(x_TD.dtype) * normed.to(x_TD.dtype)


def layer_norm(x_TD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
    """x [..., D], weight and bias [D]; returns [..., D] in x's dtype."""
    return F.layer_norm(x_TD, weight_D.shape, weight_D.to(x_TD.dtype), bias_D.to(x_TD.dtype), eps)
