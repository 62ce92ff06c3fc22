"""Modules that hold parameters and call the ops; the stored dtype is the parameters', the arithmetic is the input's."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llava_fast.kernels.linear import linear
from llava_fast.kernels.norm import layer_norm, rms_norm


class Linear(nn.Linear):
    """nn.Linear (so that tools that look for it, adapters among them, find it) whose weight may be narrower than its input."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class LayerNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)
