"""The Triton kernel of patch rows in the interpreter: the reference's bits, both ways."""

from __future__ import annotations

import pytest
import torch

from llava_fast.inputs.images import CLIP_MEAN, CLIP_STD, HALF
from llava_fast.kernels import _triton, registry
from llava_fast.kernels.patchify import _patchify, patchify


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("N", "S", "patch"), [(2, 28, 14), (1, 33, 14), (3, 9, 3), (0, 28, 14)])
def test_same_bits_as_the_reference(N: int, S: int, patch: int, dtype: torch.dtype) -> None:
    assert _triton.INTERPRETED
    for mean, std in ((HALF, HALF), (CLIP_MEAN, CLIP_STD)):
        views = torch.randint(0, 256, (N, 3, S, S), dtype=torch.uint8)
        with registry.use(patchify="triton"):
            ours = patchify(views, patch, mean, std, dtype=dtype)
        assert ours.dtype == dtype and torch.equal(ours, patchify(views, patch, mean, std, dtype=dtype))

    views, results = torch.randn(N, 3, S, S).to(dtype), []
    for name in ("triton", "reference"):
        leaf = views.clone().requires_grad_()
        with registry.use(patchify=name):
            rows = patchify(leaf, patch, dtype=dtype)
        rows.backward((torch.arange(rows.numel()) % 101).view(rows.shape).to(dtype))
        results.append((rows.detach(), leaf.grad))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_opcheck_and_compile() -> None:
    views = torch.randn(1, 3, 9, 9, requires_grad=True)
    torch.library.opcheck(_patchify, (views, 4, HALF, HALF, 1 / 255, torch.float32, 48))
    with registry.use(patchify="triton"):
        torch.compiler.reset()
        compiled = torch.compile(lambda x: patchify(x, 4).sin().sum(), fullgraph=True, backend="aot_eager")(views)
    torch.testing.assert_close(compiled, patchify(views, 4).sin().sum())
