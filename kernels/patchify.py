"""Views to rows of patches, normalised, as the matrix product of the patch embedding reads them.

    out[n, y grid + x, (c p + i) p + j] = value(views[n, c, y p + i, x p + j]),   zero for columns past K = 3 p^2

which is the order of the strided convolution's weight [E, 3, p, p] reshaped to [E, K]; the S % p rows and columns left over are not
read. K is padded (588 -> 592 for p = 14) so that rows are whole 16-byte units. uint8 views are normalised on the way, by a table of 256
values a channel ; float views are taken as normalised, and differentiable.

Shape letters: N views, S side, p patch, K = 3 p^2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from llava_fast.kernels import registry
from llava_fast.kernels._triton import DEVICES, config, jit, on_device, tl
from llava_fast.kernels.registry import Implementation

HALF = (0.5, 0.5, 0.5)


@jit
def _patchify_kernel(
    out, views, levels, S, grid, K, K_PADDED, BYTES: tl.constexpr, PATCH: tl.constexpr, BACKWARD: tl.constexpr, BLOCK: tl.constexpr
):
    """One row of patches of one view a program: BLOCK columns of a patch at a time. BACKWARD copies the other way, out to views."""
    row = tl.program_id(0)
    n, y, x = (row // (grid * grid)).to(tl.int64), row // grid % grid, row % grid
    for start in range(0, K_PADDED, BLOCK):
        k = start + tl.arange(0, BLOCK)
        c, i, j = k // (PATCH * PATCH), k // PATCH % PATCH, k % PATCH
        pixel = views + (n * 3 + c) * S * S + (y * PATCH + i) * S + x * PATCH + j
        cell = out + row.to(tl.int64) * K_PADDED + k
        if BACKWARD:
            tl.store(pixel, tl.load(cell, mask=k < K), mask=k < K)
        else:
            value = tl.load(pixel, mask=k < K, other=0)
            if BYTES:
                value = tl.load(levels + c * 256 + value.to(tl.int32), mask=k < K, other=0.0)
            tl.store(cell, value.to(out.dtype.element_ty), mask=k < K_PADDED)


def _launch(out: Tensor, views: Tensor, levels: Tensor, patch: int, backward: bool) -> None:
    N, _, S, _ = views.shape
    launch = config("patchify", "uint8" if views.dtype == torch.uint8 else "float", {"BLOCK": 1024, "num_warps": 4}, views.device)
    if out.numel():
        with on_device(views):
            _patchify_kernel[(N * (S // patch) ** 2,)](
                out, views, levels, S, S // patch, 3 * patch**2, out.shape[2],
                BYTES=views.dtype == torch.uint8, PATCH=patch, BACKWARD=backward, **launch,
            )  # fmt: skip


def _forward_triton(
    views: Tensor, patch: int, mean: Sequence[float], std: Sequence[float], rescale: float, dtype: torch.dtype, padded: int
) -> Tensor:
    levels = _levels(tuple(mean), tuple(std), rescale, views.device)[0] if views.dtype == torch.uint8 else views  # not read for floats
    out = torch.empty(views.shape[0], (views.shape[2] // patch) ** 2, padded, dtype=dtype, device=views.device)
    _launch(out, views.contiguous(), levels, patch, False)
    return out


def _backward_triton(grad: Tensor, patch: int, S: int, dtype: torch.dtype) -> Tensor:
    # Rows and columns that no patch reads stay zero.
    views = (torch.empty if S % patch == 0 else torch.zeros)(grad.shape[0], 3, S, S, dtype=dtype, device=grad.device)
    _launch(grad.contiguous(), views, grad, patch, True)
    return views


def shipped_calls(device: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """The Triton launches for SigLIP (384 / 14) and CLIP (336 / 14)."""
    for S, dtypes in ((384, (torch.bfloat16, torch.float32)), (336, (torch.bfloat16,))):
        views = torch.zeros(4, 3, S, S, dtype=torch.uint8, device=device)
        for dtype in dtypes:
            name = f"{S} {str(dtype).removeprefix('torch.')}"
            yield f"{name} of uint8", partial(_forward_triton, views, 14, HALF, HALF, 1 / 255, dtype, 592)
            yield name, partial(_forward_triton, views.to(dtype), 14, HALF, HALF, 1 / 255, dtype, 592)
            grad = torch.zeros(4, (S // 14) ** 2, 592, dtype=dtype, device=device)
            yield f"{name} backward", partial(_backward_triton, grad, 14, S, dtype)


@lru_cache(maxsize=16)
def _levels(mean: tuple[float, ...], std: tuple[float, ...], rescale: float, device: torch.device) -> tuple[Tensor, bool]:
    """fp32 [3, 256], the pixel value of each byte in each channel, in transformers' own arithmetic: the byte times `rescale` in fp64,
    rounded to fp32, minus mean, over std in fp32; and whether all of it equals x / 127.5 - 1."""
    rescaled = (np.arange(256).astype(np.float64) * rescale).astype(np.float32)
    levels = (rescaled[None] - np.array(mean, np.float32)[:, None]) / np.array(std, np.float32)[:, None]
    plain = np.arange(256, dtype=np.float32) / np.float32(127.5) - np.float32(1)
    return torch.from_numpy(levels).to(device), bool((levels == plain).all())


def normalise(views: Tensor, mean: tuple[float, ...] = HALF, std: tuple[float, ...] = HALF, rescale: float = 1 / 255) -> Tensor:
    """uint8 [N, 3, S, S] to fp32 of the same shape, on the views' device: the pixel_values of transformers' PIL processors, bit for bit.

    A table of 256 values a channel; for SigLIP it is x / 127.5 - 1, which is computed instead. ValueError for another dtype.
    """
    if views.dtype != torch.uint8 or views.ndim != 4 or views.shape[1] != 3:
        raise ValueError(f"views must be uint8 [N, 3, S, S], got {views.dtype} {list(views.shape)}")
    levels, plain = _levels(tuple(mean), tuple(std), rescale, views.device)
    if plain:
        return views.to(torch.float32).div_(127.5).sub_(1.0)
    # index_select takes int32 indices: half the bytes of indexing with int64.
    channels = [levels[c].index_select(0, views[:, c].reshape(-1).to(torch.int32)).view(views[:, c].shape) for c in range(3)]
    return torch.stack(channels, dim=1)


def patchify_reference(views: Tensor, patch: int, dtype: torch.dtype, padded: int) -> Tensor:
    """Of normalised views, by a permutation."""
    N, _, S, _ = views.shape
    grid = S // patch
    rows = views[:, :, : grid * patch, : grid * patch].reshape(N, 3, grid, patch, grid, patch).permute(0, 2, 4, 1, 3, 5)
    return F.pad(rows.reshape(N, grid * grid, 3 * patch * patch).to(dtype), (0, padded - 3 * patch * patch))


@torch.library.custom_op("llava_fast::patchify", mutates_args=())
def _patchify(
    views: Tensor, patch: int, mean: Sequence[float], std: Sequence[float], rescale: float, dtype: torch.dtype, padded: int
) -> Tensor:
    return _forward_triton(views, patch, mean, std, rescale, dtype, padded)


@_patchify.register_fake
def _(views: Tensor, patch: int, mean: Sequence[float], std: Sequence[float], rescale: float, dtype: torch.dtype, padded: int) -> Tensor:
    return views.new_empty(views.shape[0], (views.shape[2] // patch) ** 2, padded, dtype=dtype)


@torch.library.custom_op("llava_fast::patchify_backward", mutates_args=())
def _unpatchify(grad: Tensor, patch: int, S: int, dtype: torch.dtype) -> Tensor:
    return _backward_triton(grad, patch, S, dtype)


@_unpatchify.register_fake
def _(grad: Tensor, patch: int, S: int, dtype: torch.dtype) -> Tensor:
    return grad.new_empty(grad.shape[0], 3, S, S, dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.arguments = inputs[1], inputs[0].shape[2], inputs[0].dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _unpatchify(grad, *ctx.arguments), None, None, None, None, None, None


_patchify.register_autograd(_backward, setup_context=_setup_context)

_DTYPES = (torch.uint8, torch.float32, torch.bfloat16, torch.float16)
registry.register(
    "patchify",
    {
        "reference": Implementation(invariant=True),
        # Never run on hardware: by name only until it is measured.
        "triton": Implementation(DEVICES, _DTYPES, modules=("triton",), default=False, invariant=True),
    },
)


def patchify(
    views: Tensor,
    patch: int,
    mean: tuple[float, ...] = HALF,
    std: tuple[float, ...] = HALF,
    rescale: float = 1 / 255,
    dtype: torch.dtype = torch.float32,
    pad_to: int = 8,
) -> Tensor:
    """Rows of patches [N, (S // patch)^2, K rounded up to pad_to] in `dtype`.

    views [N, 3, S, S]: uint8, normalised with mean, std and rescale in fp32; or floating, taken as they are, differentiable. Raises
    ValueError for other shapes and for a patch that does not fit.
    """
    if views.dim() != 4 or views.shape[1] != 3 or views.shape[2] != views.shape[3] or not 1 <= patch <= views.shape[2]:
        raise ValueError(f"expected views [N, 3, S, S] of at least one patch of {patch} a side, got {list(views.shape)}")
    if views.dtype != torch.uint8 and not views.is_floating_point():
        raise ValueError(f"expected uint8 or floating views, got {views.dtype}")
    padded = -(-3 * patch * patch // pad_to) * pad_to
    name = registry.resolve_name("patchify", views.device.type, views.dtype)
    if name == "reference":
        return patchify_reference(normalise(views, mean, std, rescale) if views.dtype == torch.uint8 else views, patch, dtype, padded)
    return (_patchify if registry.as_op(views) else _forward_triton)(views, patch, mean, std, rescale, dtype, padded)
