"""One case of bench/cases.py held against fp64: values, gradients, the same bits twice, no wait for the device.

Used by tests/gpu and, where pytest is not installed, by bench.gpu.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bench.cases import Case
from llava_fast.kernels import registry


@contextmanager
def no_waiting(device: str) -> Iterator[None]:
    """Inside, an operation that makes the host wait for the GPU raises."""
    if device != "cuda":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def results(case: Case, inputs: dict[str, Any], implementation: str, quiet: bool = False) -> list[Tensor]:
    """Outputs, then the gradients of a fixed random weighting of them, by the implementation of that name."""
    leaves = {
        name: value.detach().requires_grad_(name in case.grads) if isinstance(value, Tensor) else value for name, value in inputs.items()
    }
    device = next(value.device.type for value in inputs.values() if isinstance(value, Tensor))
    weights: list[Tensor] = []
    with registry.use(**{case.op: implementation}):
        if quiet:  # compiled and resolved before the watch begins
            results(case, inputs, implementation)
        with no_waiting(device if quiet else "cpu"):
            out = case.run(**leaves)
        outs = [out] if isinstance(out, Tensor) else list(out)
        if not case.grads:
            return outs
        weights = [torch.randn(o.shape, generator=torch.Generator().manual_seed(1)).to(o) for o in outs]
        with no_waiting(device if quiet else "cpu"):
            grads = torch.autograd.grad(outs, [leaves[name] for name in case.grads], weights)
    return [o.detach() for o in outs] + list(grads)


def wider(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def check(case: Case, device: str, dtype: torch.dtype, implementation: str, small: bool = False) -> dict[str, float]:
    """Raise AssertionError where the implementation is wrong in `dtype`; returns each result's error relative to torch's in that dtype.

    Wrong: an error against the fp64 reference of more than twice the reference's in the same dtype and two roundings of the largest
    entry; other bits in a second call; a wait for the device.
    """
    inputs = case.inputs(device, dtype, small)
    truth = results(case, {name: wider(value) for name, value in inputs.items()}, "reference")
    torchs = results(case, inputs, "reference")
    first = results(case, inputs, implementation, quiet=implementation != "reference")
    second = results(case, inputs, implementation)
    names = [f"output {i}" for i in range(len(truth) - len(case.grads))] + [f"gradient of {name}" for name in case.grads]
    ratios = {}
    for name, exact, reference, ours, again in zip(names, truth, torchs, first, second, strict=True):
        assert ours.shape == exact.shape and ours.dtype == reference.dtype, (
            f"{name}: {ours.dtype} {list(ours.shape)}, expected {list(exact.shape)}"
        )
        assert torch.equal(ours, again), f"{name}: other bits in a second call"
        error, theirs, largest = ((x - exact).abs().max().item() if x.numel() else 0.0 for x in (ours, reference, torch.zeros_like(exact)))
        bound = 2 * theirs + 2 * torch.finfo(dtype).eps * largest + 1e-7
        assert error <= bound, f"{name}: off by {error:.3g}, torch in {dtype} by {theirs:.3g}, largest entry {largest:.3g}"
        ratios[name] = error / bound
    return ratios
