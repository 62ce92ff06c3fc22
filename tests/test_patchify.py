"""Patch rows: the convolution they stand for, the normalisation's bits, gradients, checks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from llava_fast.inputs.images import CLIP_MEAN, CLIP_STD, HALF
from llava_fast.kernels.patchify import normalise, patchify


@pytest.mark.parametrize(("S", "patch"), [(28, 14), (33, 14), (16, 4), (5, 5), (7, 1)])
def test_product_with_the_weight_is_the_convolution(S: int, patch: int) -> None:
    views = torch.randn(2, 3, S, S, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 3, patch, patch, dtype=torch.float64)
    rows = patchify(views, patch, dtype=torch.float64)
    K = 3 * patch * patch
    assert rows.shape == (2, (S // patch) ** 2, -(-K // 8) * 8) and not rows[..., K:].any()
    expected = F.conv2d(views, weight, stride=patch).flatten(2).transpose(1, 2)
    ours = rows[..., :K] @ weight.view(6, K).T
    torch.testing.assert_close(ours, expected)
    grad = torch.randn_like(expected)
    (a,), (b,) = torch.autograd.grad(ours, views, grad), torch.autograd.grad(expected, views, grad)
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("mean", "std"), [(HALF, HALF), (CLIP_MEAN, CLIP_STD)])
def test_bytes_are_normalised_bit_for_bit(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    views = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(patchify(views, 8, mean, std), patchify(normalise(views, mean, std), 8))


@pytest.mark.parametrize("shape", [(2, 1, 28, 28), (2, 3, 28, 27), (3, 28, 28), (2, 3, 13, 13)])
def test_bad_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"patch of 14 a side, got \[{', '.join(map(str, shape))}\]"):
        patchify(torch.zeros(shape), 14)


def test_bad_dtype() -> None:
    with pytest.raises(ValueError, match="got torch.int32"):
        patchify(torch.zeros(1, 3, 28, 28, dtype=torch.int32), 14)
