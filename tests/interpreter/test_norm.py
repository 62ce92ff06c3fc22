"""The Triton norms in the interpreter, against the same checks as the C++ kernels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llava_fast.kernels import norm, registry
from llava_fast.kernels.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm


def run(implementation: str, x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in (x, residual, weight, bias) if t is not None]
    function = {(0, 0): rms_norm, (1, 0): add_rms_norm, (0, 1): layer_norm, (1, 1): add_layer_norm}[residual is not None, bias is not None]
    with registry.use(norm=implementation):
        outputs = function(*leaves, 1e-6)  # type: ignore[operator]
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        with torch.no_grad():
            again = function(*leaves, 1e-6)  # type: ignore[operator]
    assert torch.equal(again[0] if isinstance(again, tuple) else again, outputs[0])
    grads = [torch.randn(o.shape, generator=torch.Generator().manual_seed(i)).half().to(o.dtype) for i, o in enumerate(outputs)]
    return [*(o.detach() for o in outputs), *torch.autograd.grad(outputs, leaves, grads)]


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("T", "D"), [(1, 1152), (5, 123), (0, 16), (11, 40)])
def test_norms(T: int, D: int, dtype: torch.dtype, centred: bool, residual: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # Three programs of the backward pass, so that they walk several rows.
    few = {"norm": {}, "norm_backward": {"programs": 3}}
    monkeypatch.setattr(norm, "config", lambda kernel, shape, default, device: {**default, **few[kernel]})
    generator = torch.Generator().manual_seed(T + D)
    x, r = ((torch.randn(T, D, generator=generator) + 3).to(dtype) for _ in range(2))
    weight, bias = (torch.rand(D, generator=generator) + 0.5).to(dtype), torch.randn(D, generator=generator).to(dtype)
    inputs = (x, r if residual else None, weight, bias if centred else None)
    ours, torchs = run("triton", *inputs), run("reference", *inputs)
    exact = run("reference", *(None if t is None else t.double() for t in inputs))  # type: ignore[arg-type]
    for our, theirs, truth in zip(ours, torchs, exact, strict=True):
        assert our.dtype == dtype and our.shape == truth.shape
        if truth.numel() > 0:
            floor = truth.abs().max() * torch.finfo(dtype).eps
            assert (our.double() - truth).abs().max() <= 2 * (theirs.double() - truth).abs().max() + floor


def test_a_width_past_the_registers_is_refused() -> None:
    with registry.use(norm="triton"), pytest.raises(ValueError, match="does not serve shape class 16385"):
        rms_norm(torch.zeros(1, 16385), torch.zeros(16385), 1e-6)
