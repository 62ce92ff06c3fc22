"""Resizes maps of view features: K maps of H x W cells, each cell a row of a table, become K maps of H' x W' rows.

    average, max:  out[k, y, x] = mean or max over the window of (H // H') x (W // W') cells that starts at
                   (y * (H // H'), x * (W // W')); cells past the last window are left out (27 -> 13 reads 26)
    bilinear:      out[k, y, x] = sum of the four cells around ((y + .5) H / H' - .5, (x + .5) W / W' - .5), clamped to the map

These are torch's avg_pool2d and max_pool2d with kernel = stride = H // H', and interpolate(mode="bilinear",
align_corners=False). Source: get_2dPool and anyres_max of LLaVA-NeXT (llava/model/llava_arch.py).

Shape letters: M table rows, D width, K maps, H x W cells. fp32, fp64, bf16 and fp16; accumulation is fp32, fp64 for fp64.
Maximum: the first of equal values takes the gradient, NaN wins, as in torch.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from llava_fast.kernels import registry
from llava_fast.kernels.registry import Implementation

PoolMode = Literal["average", "max", "bilinear"]


def _call(module: Any, values: Tensor, rows: int, source_KHW: Tensor, size: list[int], mode: str) -> tuple[Any, Any, Any]:
    """The first arguments of the native functions; `values` is [*, D] in the dtype that is pooled."""
    dtype = getattr(module.DType, str(values.dtype).removeprefix("torch."))
    return dtype, getattr(module.PoolMode, mode), module.PoolShape(rows, values.shape[1], *source_KHW.shape, *size)


def _forward_cpu(table_MD: Tensor, source_KHW: Tensor, out: Tensor, size: list[int], mode: str) -> None:
    from llava_fast import _cpu

    call = _call(_cpu, table_MD, table_MD.shape[0], source_KHW, size, mode)
    _cpu.spatial_pool_forward(*call, table_MD.data_ptr(), source_KHW.data_ptr(), out.data_ptr(), torch.get_num_threads())


def _backward_cpu(grad: Tensor, table_MD: Tensor | None, source_KHW: Tensor, rows: int, size: list[int], mode: str) -> Tensor:
    from llava_fast import _cpu

    grad_table, table = grad.new_empty(rows, grad.shape[1]), 0 if table_MD is None else table_MD.data_ptr()
    call = _call(_cpu, grad, rows, source_KHW, size, mode)
    _cpu.spatial_pool_backward(*call, grad.data_ptr(), table, source_KHW.data_ptr(), grad_table.data_ptr(), torch.get_num_threads())
    return grad_table


def _forward_cuda(table_MD: Tensor, source_KHW: Tensor, out: Tensor, size: list[int], mode: str) -> None:
    from llava_fast import _cuda

    call = _call(_cuda, table_MD, table_MD.shape[0], source_KHW, size, mode)
    with torch.cuda.device(out.device):
        stream = torch.cuda.current_stream().cuda_stream
        _cuda.spatial_pool_forward(*call, table_MD.data_ptr(), source_KHW.data_ptr(), out.data_ptr(), stream)


def _backward_cuda(grad: Tensor, table_MD: Tensor | None, source_KHW: Tensor, rows: int, size: list[int], mode: str) -> Tensor:
    from llava_fast import _cuda

    # Several readers add to one row with atomics: in fp32, and in no fixed order.
    total = grad.new_zeros(rows, grad.shape[1], dtype=torch.promote_types(grad.dtype, torch.float32))
    call, table = _call(_cuda, grad, rows, source_KHW, size, mode), 0 if table_MD is None else table_MD.data_ptr()
    with torch.cuda.device(grad.device):
        stream = torch.cuda.current_stream().cuda_stream
        _cuda.spatial_pool_backward(*call, grad.data_ptr(), table, source_KHW.data_ptr(), total.data_ptr(), stream)
    return total.to(grad.dtype)


_LAUNCHERS = {"cpu": (_forward_cpu, _backward_cpu), "cuda": (_forward_cuda, _backward_cuda)}


def spatial_pool_reference(table_MD: Tensor, source_KHW: Tensor, size: tuple[int, int], mode: PoolMode = "average") -> Tensor:
    """The same function from torch's ops, any device."""
    K, H, W = source_KHW.shape
    if K == 0:
        return table_MD[:0]  # torch's pooling refuses an empty batch
    wide = table_MD.to(torch.promote_types(table_MD.dtype, torch.float32))
    maps_KDHW = F.embedding(source_KHW, wide).permute(0, 3, 1, 2)
    if mode == "bilinear":
        pooled = F.interpolate(maps_KDHW, size=size, mode="bilinear", align_corners=False)
    else:
        window = (H // size[0], W // size[1])
        maps_KDHW = maps_KDHW[:, :, : window[0] * size[0], : window[1] * size[1]]
        pooled = (F.avg_pool2d if mode == "average" else F.max_pool2d)(maps_KDHW, window)
    return pooled.permute(0, 2, 3, 1).reshape(K * size[0] * size[1], -1).to(table_MD.dtype)


@torch.library.custom_op("llava_fast::spatial_pool", mutates_args=())
def _spatial_pool(table_MD: Tensor, source_KHW: Tensor, size: list[int], mode: str, implementation: str) -> Tensor:
    out = table_MD.new_empty(source_KHW.shape[0] * size[0] * size[1], table_MD.shape[1])
    _LAUNCHERS[implementation][0](table_MD.contiguous(), source_KHW.contiguous(), out, size, mode)
    return out


@_spatial_pool.register_fake
def _(table_MD: Tensor, source_KHW: Tensor, size: list[int], mode: str, implementation: str) -> Tensor:
    return table_MD.new_empty(source_KHW.shape[0] * size[0] * size[1], table_MD.shape[1])


@torch.library.custom_op("llava_fast::spatial_pool_backward", mutates_args=())
def _spatial_pool_backward(
    grad: Tensor, table_MD: Tensor | None, source_KHW: Tensor, rows: int, size: list[int], mode: str, implementation: str
) -> Tensor:
    table_MD = None if table_MD is None else table_MD.contiguous()
    return _LAUNCHERS[implementation][1](grad.contiguous(), table_MD, source_KHW.contiguous(), rows, size, mode)


@_spatial_pool_backward.register_fake
def _(grad: Tensor, table_MD: Tensor | None, source_KHW: Tensor, rows: int, size: list[int], mode: str, implementation: str) -> Tensor:
    return grad.new_empty(rows, grad.shape[1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    table_MD, source_KHW, size, mode, implementation = inputs
    ctx.save_for_backward(source_KHW, table_MD if mode == "max" else None)
    ctx.arguments = (table_MD.shape[0], size, mode, implementation)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    source_KHW, table_MD = ctx.saved_tensors
    return _spatial_pool_backward(grad, table_MD, source_KHW, *ctx.arguments), None, None, None, None


_spatial_pool.register_autograd(_backward, setup_context=_setup_context)


def _spatial_pool_cpu(table_MD: Tensor, source_KHW: Tensor, size: tuple[int, int], mode: PoolMode) -> Tensor:
    return _spatial_pool(table_MD, source_KHW, list(size), mode, "cpu")


def _spatial_pool_cuda(table_MD: Tensor, source_KHW: Tensor, size: tuple[int, int], mode: PoolMode) -> Tensor:
    return _spatial_pool(table_MD, source_KHW, list(size), mode, "cuda")


_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
registry.register(
    "spatial_pool",
    {
        "cpu": Implementation(_spatial_pool_cpu, ("cpu",), _DTYPES, modules=("llava_fast._cpu",)),
        "reference": Implementation(spatial_pool_reference),
        # Compiled, and never run on hardware: by name only until it is measured.
        "cuda": Implementation(_spatial_pool_cuda, ("cuda",), _DTYPES, modules=("llava_fast._cuda",), default=False),
    },
)


def spatial_pool(table_MD: Tensor, source_KHW: Tensor, size: tuple[int, int], mode: PoolMode = "average") -> Tensor:
    """Pool maps of table rows to `size` = (H', W').

    table_MD [M, D] floating; source_KHW int64 [K, H, W], the table row of each cell, rows may repeat -> [K * H' * W', D] in
    the table's dtype, map by map, row-major. Differentiable in the table. Raises ValueError for shapes, a mode, or a size that
    do not fit (average and max: a size that no window gives exactly). For a row outside the table the CPU kernel raises ValueError and
    the reference, on the CPU, IndexError; a GPU stops at a device-side assertion.
    """
    if table_MD.dim() != 2 or source_KHW.dim() != 3 or source_KHW.dtype != torch.int64:
        raise ValueError(
            "expected a table [M, D] and int64 sources [K, H, W], "
            f"got {list(table_MD.shape)} and {source_KHW.dtype} {list(source_KHW.shape)}"
        )
    H, W = source_KHW.shape[1:]
    if mode not in ("average", "max", "bilinear"):
        raise ValueError(f"mode must be average, max or bilinear, got {mode!r}")
    fits = min(H, W, *size) >= 1 and (mode == "bilinear" or all(n <= h and h // (h // n) == n for h, n in zip((H, W), size, strict=True)))
    if not fits:
        raise ValueError(f"{mode} pooling cannot make maps of {tuple(size)} from maps of {(H, W)}")
    run = registry.resolve("spatial_pool", table_MD.device.type, table_MD.dtype)
    return run(table_MD, source_KHW, size, mode)
