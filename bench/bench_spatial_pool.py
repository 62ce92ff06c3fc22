"""Spatial pooling of views of 27 x 27, 32 MB or more, against torch's ops, eager and compiled; forward, and backward alone; over views.

"torch, in place" pools the table as it lies, channels last, with no gather: what a model does whose views are in order, ours being free to
take them from anywhere. The op moves bytes: its limit is the copy bandwidth, counting what it must read and write once, or the bandwidth
of reading, of which it does four times as much. Tables and outputs walk round a ring that passes the caches (bench/cold.py), in memory that
is kept; those of test_views stay where the last call left them, and have no share of a limit.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.baselines.kernels import check_agree, inductor
from bench.cold import copied, copies_for, gradients, ring
from bench.paired import OURS
from llava_fast.kernels import registry
from llava_fast.kernels.spatial_pool import PoolMode, spatial_pool, spatial_pool_reference

BYTES, SIDE = 32 << 20, 27
SIZES: dict[str, tuple[int, int]] = {"average": (13, 13), "max": (13, 13), "bilinear": (14, 14)}
FEW = 3  # calls a round of the rivals, which take up to twenty times as long
pytestmark = pytest.mark.usefixtures("kept_memory")


def in_place(table: Tensor, size: tuple[int, int], mode: PoolMode) -> Tensor:
    maps = table.view(-1, SIDE, SIDE, table.shape[1]).permute(0, 3, 1, 2)
    if mode == "bilinear":
        pooled = F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
    else:
        pooled = (F.avg_pool2d if mode == "average" else F.max_pool2d)(maps[:, :, :-1, :-1], 2)
    return pooled.permute(0, 2, 3, 1).reshape(-1, table.shape[1])


def rivals(size: tuple[int, int], mode: PoolMode) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    compiled = inductor(spatial_pool_reference)
    return {
        "torch": lambda table, source: spatial_pool_reference(table, source, size, mode),
        "torch.compile": lambda table, source: compiled(table, source, size, mode),
        "torch, in place": lambda table, source: in_place(table, size, mode),
    }


def views(K: int, D: int, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.randn(K * SIDE * SIDE, D).to(kind), torch.arange(K * SIDE * SIDE).view(K, SIDE, SIDE)


WIDE = pytest.param("average", 4096, marks=pytest.mark.long)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.long)])
@pytest.mark.parametrize(("mode", "D"), [("average", 1024), WIDE, ("max", 1024), ("bilinear", 1024)])
def test_spatial_pool(paired, mode: PoolMode, D: int, dtype: str, direction: str) -> None:
    size, kind = SIZES[mode], getattr(torch, dtype)
    K = -(-BYTES // (SIDE * SIDE * D * kind.itemsize))
    table, source = views(K, D, kind)
    assert registry.resolve_name("spatial_pool", "cpu", table.dtype) == "cpu"
    rows, cells = K * size[0] * size[1], K * (SIDE if mode == "bilinear" else SIDE // 2 * 2) ** 2  # written, and looked at
    row, whole = D * table.element_size(), K * SIDE * SIDE

    def ours(table: Tensor, source: Tensor) -> Tensor:
        return spatial_pool(table, source, size, mode)

    theirs = rivals(size, mode)
    if direction == "forward":
        moved, read = (cells + rows) * row, cells * row
        sets = copied((table, source), copies_for(moved))
        check_agree(lambda: ours(*sets[0]), {name: lambda op=op: op(*sets[0]) for name, op in theirs.items()})
        around = ring(sets)
        sides, calls = {name: around(op, FEW) for name, op in theirs.items()}, {OURS: len(sets), **dict.fromkeys(theirs, FEW)}
        paired(around(ours), sides, bytes_moved=moved, bytes_read=read, calls=calls, rounds=3)
        return
    read = (rows + (cells if mode == "max" else 0)) * row
    moved = read + whole * row
    sets = copied((table.requires_grad_(), source), copies_for(moved))
    grads = copied([torch.randn(rows, D).to(kind)], len(sets))
    mine = gradients(ours, sets, grads)
    # The last sets: ours has passed all others when it comes to them, and keeping graphs of all takes the rivals longer than their rounds.
    runs = {name: gradients(op, sets[-FEW:], grads[-FEW:]) for name, op in theirs.items()}
    check_agree(lambda: mine(len(sets) - 1), {name: lambda run=run: run(FEW - 1) for name, run in runs.items()})
    sides = {name: ring([(i,) for i in range(FEW)])(run) for name, run in runs.items()}
    calls = {OURS: len(sets), **dict.fromkeys(runs, FEW)}
    paired(ring([(i,) for i in range(len(sets))])(mine), sides, bytes_moved=moved, bytes_read=read, calls=calls, rounds=3)


@pytest.mark.parametrize("K", [1, 4, 16, 64])
def test_views(paired, K: int) -> None:
    """How the time grows: from views that lie in the caches to such that do not."""
    table, source = views(K, 1024, torch.float32)
    sides = {name: lambda op=op: op(table, source) for name, op in rivals((13, 13), "average").items()}
    check_agree(lambda: spatial_pool(table, source, (13, 13), "average"), sides)
    paired(lambda: spatial_pool(table, source, (13, 13), "average"), sides, axis="views", at=K)
