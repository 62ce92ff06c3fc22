"""Spatial pooling of views of 27 x 27, 32 MB or more, against the reference in torch; forward, and backward alone.

The op moves bytes: its limit is the copy bandwidth, counting what it must read and write once. Outputs lie in memory that is kept.
"""

from __future__ import annotations

import pytest
import torch

from llava_fast.kernels import registry
from llava_fast.kernels.spatial_pool import PoolMode, spatial_pool, spatial_pool_reference

BYTES, SIDE = 32 << 20, 27
SIZES: dict[str, tuple[int, int]] = {"average": (13, 13), "max": (13, 13), "bilinear": (14, 14)}
pytestmark = pytest.mark.usefixtures("kept_memory")


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("mode", "D"), [("average", 1024), ("average", 4096), ("max", 1024), ("bilinear", 1024)])
def test_spatial_pool(paired, mode: PoolMode, D: int, dtype: str, direction: str) -> None:
    size, kind = SIZES[mode], getattr(torch, dtype)
    K = -(-BYTES // (SIDE * SIDE * D * kind.itemsize))
    table = torch.randn(K * SIDE * SIDE, D).to(kind).requires_grad_(direction == "backward")
    source = torch.arange(K * SIDE * SIDE).view(K, SIDE, SIDE)
    rows = K * size[0] * size[1]
    cells = K * (SIDE if mode == "bilinear" else SIDE // 2 * 2) ** 2
    assert registry.resolve_name("spatial_pool", "cpu", table.dtype) == "cpu"

    if direction == "forward":
        ours, baseline = (lambda: spatial_pool(table, source, size, mode)), (lambda: spatial_pool_reference(table, source, size, mode))
        moved = cells + rows
    else:
        out, out_reference = spatial_pool(table, source, size, mode), spatial_pool_reference(table, source, size, mode)
        grad = torch.randn_like(out)
        ours = lambda: torch.autograd.grad(out, table, grad, retain_graph=True)  # noqa: E731
        baseline = lambda: torch.autograd.grad(out_reference, table, grad, retain_graph=True)  # noqa: E731
        moved = rows + K * SIDE * SIDE + (cells if mode == "max" else 0)
    paired(ours, baseline, bytes_moved=moved * D * table.element_size())
