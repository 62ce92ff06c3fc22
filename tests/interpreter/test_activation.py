"""The Triton activations in the interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llava_fast.kernels import registry
from llava_fast.kernels.activation import activation, swiglu


def run(implementation: str, x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    with registry.use(activation=implementation):
        out = (swiglu if kind == "swiglu" else activation(kind))(x)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).half().to(out.dtype))
    assert x.grad is not None
    return out.detach(), x.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", ["gelu", "gelu_pytorch_tanh", "quick_gelu", "silu", "swiglu"])
@pytest.mark.parametrize("shape", [(2, 2816), (5, 246), (0, 64), (3, 2)])
def test_activations(shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> None:
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * 3).to(dtype)
    ours, torchs, exact = run("triton", x, kind), run("reference", x, kind), run("reference", x.double(), kind)
    for our, theirs, truth in zip(ours, torchs, exact, strict=True):
        assert our.dtype == dtype and our.shape == truth.shape
        if truth.numel() > 0:
            floor = truth.abs().max() * torch.finfo(dtype).eps
            assert (our.double() - truth).abs().max() <= 2 * (theirs.double() - truth).abs().max() + floor
