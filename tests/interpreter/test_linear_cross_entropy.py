"""The Triton pass over logits in the interpreter, against fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llava_fast.kernels import _linear_cross_entropy_triton as module
from llava_fast.kernels import _triton, registry
from llava_fast.kernels.linear_cross_entropy import linear_cross_entropy


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles a row at a vocabulary that the interpreter is done with soon."""
    monkeypatch.setattr(module, "config", lambda *_: {"R": 2, "N": 64, "num_warps": 4})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.0, 0.0), (0.1, 1e-2)])
@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize(("L", "V"), [(3, 300), (1, 5), (5, 128)])
def test_values_and_gradients(L: int, V: int, reduction: str, smoothing: float, z_loss: float, dtype: torch.dtype) -> None:
    assert _triton.INTERPRETED
    generator = torch.Generator().manual_seed(V)
    h, w = torch.randn(L, 16, generator=generator).to(dtype), (torch.randn(V, 16, generator=generator) / 2).to(dtype)
    labels = torch.randint(0, V, (L,), generator=generator)
    grad = torch.randn(L, generator=generator) if reduction == "none" else torch.tensor(0.7)

    def run(name: str, wide: torch.dtype) -> list[Tensor]:
        leaves = [t.to(wide).requires_grad_() for t in (h, w)]
        with registry.use(linear_cross_entropy=name):
            loss = linear_cross_entropy(*leaves, labels, reduction=reduction, label_smoothing=smoothing, z_loss=z_loss)
        return [loss.detach(), *torch.autograd.grad(loss, leaves, grad.to(loss.dtype))]

    for our, theirs, truth in zip(run("triton", dtype), run("reference", dtype), run("reference", torch.float64), strict=True):
        assert our.dtype == theirs.dtype
        floor = truth.abs().max() * torch.finfo(our.dtype).eps * 2
        assert (our.double() - truth).abs().max() <= 2 * (theirs.double() - truth).abs().max() + floor


def test_infinite_logits_and_a_label_outside() -> None:
    logits = torch.randn(3, 200)
    logits[0, :150] = -torch.inf
    labels = torch.tensor([199, 200, -1])
    expected = F.cross_entropy(logits[:1].double(), labels[:1])
    loss, lse = torch.empty(3), torch.empty(3)
    module.rows_triton(logits, labels, loss, lse, None, 1.0, 0.0, 0.0, True)
    torch.testing.assert_close(loss[0].double(), expected)
    assert loss[1:].isnan().all() and not logits[0].isnan().any()
