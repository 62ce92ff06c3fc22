"""Spatial pooling of views of 27 x 27, 32 MB or more, against torch's ops, eager and compiled; forward, and backward alone; over views.

"torch, in place" pools the table as it lies, channels last, with no gather: what a model does whose views are in order, ours being free to
take them from anywhere. The op moves bytes: its limit is the copy bandwidth, counting what it must read and write once. Outputs lie in
memory that is kept.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.baselines.kernels import check_agree, inductor
from llava_fast.kernels import registry
from llava_fast.kernels.spatial_pool import PoolMode, spatial_pool, spatial_pool_reference

BYTES, SIDE = 32 << 20, 27
SIZES: dict[str, tuple[int, int]] = {"average": (13, 13), "max": (13, 13), "bilinear": (14, 14)}
pytestmark = pytest.mark.usefixtures("kept_memory")


def in_place(table: Tensor, size: tuple[int, int], mode: PoolMode) -> Tensor:
    maps = table.view(-1, SIDE, SIDE, table.shape[1]).permute(0, 3, 1, 2)
    if mode == "bilinear":
        pooled = F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
    else:
        pooled = (F.avg_pool2d if mode == "average" else F.max_pool2d)(maps[:, :, :-1, :-1], 2)
    return pooled.permute(0, 2, 3, 1).reshape(-1, table.shape[1])


def sides(table: Tensor, source: Tensor, size: tuple[int, int], mode: PoolMode) -> dict[str, Callable[[], Tensor]]:
    compiled = inductor(spatial_pool_reference)
    return {
        "torch": lambda: spatial_pool_reference(table, source, size, mode),
        "torch.compile": lambda: compiled(table, source, size, mode),
        "torch, in place": lambda: in_place(table, size, mode),
    }


def views(K: int, D: int, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.randn(K * SIDE * SIDE, D).to(kind), torch.arange(K * SIDE * SIDE).view(K, SIDE, SIDE)


WIDE = pytest.param("average", 4096, marks=pytest.mark.long)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("mode", "D"), [("average", 1024), WIDE, ("max", 1024), ("bilinear", 1024)])
def test_spatial_pool(paired, mode: PoolMode, D: int, dtype: str, direction: str) -> None:
    size, kind = SIZES[mode], getattr(torch, dtype)
    K = -(-BYTES // (SIDE * SIDE * D * kind.itemsize))
    table, source = views(K, D, kind)
    rows = K * size[0] * size[1]
    cells = K * (SIDE if mode == "bilinear" else SIDE // 2 * 2) ** 2
    assert registry.resolve_name("spatial_pool", "cpu", table.dtype) == "cpu"
    if direction == "forward":
        rivals = sides(table, source, size, mode)
        check_agree(lambda: spatial_pool(table, source, size, mode), rivals)
        paired(lambda: spatial_pool(table, source, size, mode), rivals, bytes_moved=(cells + rows) * D * table.element_size())
        return
    table.requires_grad_()
    outs = {"ours": spatial_pool(table, source, size, mode), **{name: run() for name, run in sides(table, source, size, mode).items()}}
    grad = torch.randn_like(outs["ours"])
    runs = {name: lambda out=out: torch.autograd.grad(out, table, grad, retain_graph=True) for name, out in outs.items()}
    mine = runs.pop("ours")
    check_agree(mine, runs)
    moved = rows + K * SIDE * SIDE + (cells if mode == "max" else 0)
    paired(mine, runs, bytes_moved=moved * D * table.element_size())


@pytest.mark.parametrize("K", [1, 4, 16, 64])
def test_views(paired, K: int) -> None:
    """How the time grows: from views that lie in the caches to such that do not."""
    table, source = views(K, 1024, torch.float32)
    rivals = sides(table, source, (13, 13), "average")
    check_agree(lambda: spatial_pool(table, source, (13, 13), "average"), rivals)
    moved = K * (26 * 26 + 13 * 13) * 1024 * 4
    paired(lambda: spatial_pool(table, source, (13, 13), "average"), rivals, bytes_moved=moved, axis="views", at=K)
