"""The Triton kernels of spatial pooling in the interpreter, against fp64 and torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llava_fast.kernels import _triton, registry
from llava_fast.kernels.spatial_pool import _backward_triton, spatial_pool

# mode, K, H, W, size, D
CASES = [
    ("average", 2, 7, 7, (3, 3), 20),
    ("max", 2, 7, 7, (3, 3), 20),
    ("bilinear", 2, 7, 7, (4, 4), 20),
    ("max", 1, 7, 5, (7, 1), 513),
    ("average", 1, 7, 5, (1, 5), 1),
    ("bilinear", 1, 6, 9, (3, 5), 5),
    ("bilinear", 1, 1, 5, (3, 9), 7),
    ("bilinear", 1, 4, 4, (4, 4), 3),
    ("bilinear", 1, 3, 2, (7, 5), 3),
    ("average", 0, 27, 27, (13, 13), 8),
]


def run(name: str, table: Tensor, source: Tensor, size, mode, grad: Tensor) -> tuple[Tensor, Tensor]:
    table = table.clone().requires_grad_()
    with registry.use(spatial_pool=name):
        out = spatial_pool(table, source, size, mode)
    out.backward(grad.to(out.dtype))
    return out.detach(), table.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("mode", "K", "H", "W", "size", "D"), CASES)
def test_values_and_gradients(mode: str, K: int, H: int, W: int, size, D: int, dtype: torch.dtype) -> None:
    assert _triton.INTERPRETED
    generator = torch.Generator().manual_seed(H * 100 + W)
    table = torch.randn(K * H * W + 3, D, generator=generator).bfloat16().to(dtype)
    source = torch.randint(0, K * H * W + 3, (K, H, W), generator=generator)  # rows repeat, some are read by nobody
    grad = torch.randn(K * size[0] * size[1], D, generator=generator).bfloat16()
    ours, torchs = run("triton", table, source, size, mode, grad), run("reference", table, source, size, mode, grad)
    exact = run("reference", table.double(), source, size, mode, grad)
    for our, theirs, truth in zip(ours, torchs, exact, strict=True):
        assert our.dtype == dtype and our.shape == truth.shape
        if truth.numel():
            floor = truth.abs().max() * torch.finfo(dtype).eps
            assert (our.double() - truth).abs().max() <= 2 * (theirs.double() - truth).abs().max() + floor
    assert torch.equal(ours[1], run("triton", table, source, size, mode, grad)[1])


def test_maximum_of_equal_infinite_and_nan_values() -> None:
    table = torch.tensor([[1, -0.0, 2, -torch.inf], [1, 0.0, torch.nan, -torch.inf], [0, 0, 3, -torch.inf], [1, 0, torch.nan, -torch.inf]])
    source, grad = torch.arange(4).view(1, 2, 2), torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    for our, theirs in zip(
        run("triton", table, source, (1, 1), "max", grad), run("reference", table, source, (1, 1), "max", grad), strict=True
    ):
        torch.testing.assert_close(our, theirs, rtol=0, atol=0, equal_nan=True)


def test_a_row_outside_the_table_reads_nan_and_takes_no_gradient() -> None:
    table, source = torch.ones(4, 3), torch.tensor([[[0, 4], [-1, 2]]])
    with registry.use(spatial_pool="triton"):
        assert spatial_pool(table, source, (1, 1), "average").isnan().all()
    assert _backward_triton(torch.ones(1, 3), None, source, 4, [1, 1], "average")[:, 0].tolist() == [0.25, 0, 0.25, 0]
