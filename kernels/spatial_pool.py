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

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from llava_fast.kernels import _native, registry
from llava_fast.kernels._native import address
from llava_fast.kernels._triton import DEVICES, config, jit, on_device, tl
from llava_fast.kernels.registry import Implementation

PoolMode = Literal["average", "max", "bilinear"]


@jit
def _tap(o, n_in, n_out):
    """(low, weight of the next cell) of bilinear output o on one axis, in whole numbers up to the last division."""
    place = tl.maximum((2 * o + 1) * n_in - n_out, 0)
    low = place // (2 * n_out)
    return low, (place - low * 2 * n_out).to(tl.float32) / (2 * n_out)


@jit
def _forward_kernel(
    out, arg, table, source, M, D, H, W, out_H, out_W,
    MODE: tl.constexpr, WY: tl.constexpr, WX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One output row and BLOCK columns a program. MODE "argmax" writes the tap of the maximum, int16, and no output."""
    r = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    program = tl.program_id(0)  # 64-bit divisions would be calls
    oy, ox = program // out_W % out_H, program % out_W
    cells = source + program // (out_H * out_W) * H * W
    if MODE == "bilinear":
        y, high_y = _tap(oy, H, out_H)
        x, high_x = _tap(ox, W, out_W)
    acc = tl.zeros([BLOCK], tl.float32)
    if MODE == "max" or MODE == "argmax":
        acc = tl.full([BLOCK], -float("inf"), tl.float32)
    best = tl.zeros([BLOCK], tl.int32)
    for j in range(WY * WX):
        if MODE == "bilinear":
            cell = tl.minimum(y + j // 2, H - 1) * W + tl.minimum(x + j % 2, W - 1)
            weight = tl.where(j // 2 == 0, 1 - high_y, high_y) * tl.where(j % 2 == 0, 1 - high_x, high_x)
        else:
            cell = (oy * WY + j // WX) * W + ox * WX + j % WX
        row = tl.load(cells + cell)
        inside = (row >= 0) & (row < M)
        value = tl.load(table + tl.where(inside, row, 0) * D + d, mask=d < D, other=0.0).to(tl.float32)
        value = tl.where(inside, value, float("nan"))
        if MODE == "average":
            acc += value
        elif MODE == "bilinear":
            acc += weight * value
        else:
            wins = (value > acc) | (value != value)
            acc = tl.where(wins, value, acc)
            best = tl.where(wins, j, best)
    if MODE == "average":
        acc = acc / (WY * WX)
    if MODE == "argmax":
        tl.store(arg + r * D + d, best.to(tl.int16), mask=d < D)
    else:
        tl.store(out + r * D + d, acc.to(out.dtype.element_ty), mask=d < D)


@jit
def _backward_kernel(
    grad_table, grad, arg, reader_start, reader_cell, D, H, W, out_H, out_W,
    MODE: tl.constexpr, WY: tl.constexpr, WX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One table row and BLOCK columns a program: the sum of what its readers' outputs hand back, in the order of the cells."""
    m = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.float32)
    for e in range(tl.load(reader_start + m), tl.load(reader_start + m + 1)):
        cell = tl.load(reader_cell + e).to(tl.int32)  # 64-bit divisions would be calls
        k, y, x = cell // (H * W), cell // W % H, cell % W
        if MODE == "bilinear":
            # The outputs whose place lies between cells y - 1 and y + 1; those at the ends of the range may have weight 0.
            last_y = tl.minimum((2 * y + 3) * out_H // (2 * H), out_H - 1)
            last_x = tl.minimum((2 * x + 3) * out_W // (2 * W), out_W - 1)
            for oy in range(tl.maximum((2 * y - 1) * out_H - H, 0) // (2 * H), last_y + 1):
                low_y, high_y = _tap(oy, H, out_H)
                weight_y = tl.where(low_y == y, 1 - high_y, 0.0) + tl.where(tl.minimum(low_y + 1, H - 1) == y, high_y, 0.0)
                for ox in range(tl.maximum((2 * x - 1) * out_W - W, 0) // (2 * W), last_x + 1):
                    low_x, high_x = _tap(ox, W, out_W)
                    weight = tl.where(low_x == x, 1 - high_x, 0.0) + tl.where(tl.minimum(low_x + 1, W - 1) == x, high_x, 0.0)
                    weight *= weight_y
                    r = ((k * out_H + oy) * out_W + ox).to(tl.int64)
                    acc += weight * tl.load(grad + r * D + d, mask=d < tl.where(weight != 0, D, 0), other=0.0).to(tl.float32)
        else:
            oy, ox = y // WY, x // WX
            r = ((k * out_H + oy) * out_W + ox).to(tl.int64)
            mask = d < tl.where((oy < out_H) & (ox < out_W), D, 0)
            value = tl.load(grad + r * D + d, mask=mask, other=0.0).to(tl.float32)
            if MODE == "max":
                tap = (y - oy * WY) * WX + x - ox * WX
                value = tl.where(tl.load(arg + r * D + d, mask=mask, other=-1) == tap, value, 0.0)
            acc += value
    if MODE == "average":
        acc = acc / (WY * WX)
    tl.store(grad_table + m * D + d, acc.to(grad_table.dtype.element_ty), mask=d < D)


def _window(source_KHW: Tensor, size: list[int], mode: str) -> dict[str, int]:
    return {"WY": 2, "WX": 2} if mode == "bilinear" else {"WY": source_KHW.shape[1] // size[0], "WX": source_KHW.shape[2] // size[1]}


def _launch(
    kernel: Any, name: str, mode: str, source_KHW: Tensor, size: list[int], pointers: tuple[Any, ...], rows: int, columns: int
) -> None:
    launch = config(name, mode, {"BLOCK": 512, "num_warps": 2}, source_KHW.device)
    window = _window(source_KHW, size, "max" if mode == "argmax" else mode)
    if rows:
        with on_device(source_KHW):
            grid = (rows, -(-columns // launch["BLOCK"]))
            kernel[grid](*pointers, columns, *source_KHW.shape[1:], *size, MODE=mode, **window, **launch)


def _forward_triton(table_MD: Tensor, source_KHW: Tensor, out: Tensor, size: list[int], mode: str) -> None:
    M, D = table_MD.shape
    _launch(_forward_kernel, "spatial_pool", mode, source_KHW, size, (out, out, table_MD, source_KHW, M), len(out), D)


def _backward_triton(grad: Tensor, table_MD: Tensor | None, source_KHW: Tensor, rows: int, size: list[int], mode: str) -> Tensor:
    grad_table, arg = grad.new_empty(rows, grad.shape[1]), grad
    if table_MD is not None:
        arg = torch.empty_like(grad, dtype=torch.int16)
        _launch(_forward_kernel, "spatial_pool", "argmax", source_KHW, size, (arg, arg, table_MD, source_KHW, rows), *grad.shape)
    # Which cells read a row: a stable sort keeps them in the maps' order, so that sums come out the same every time.
    row, reader_cell = source_KHW.reshape(-1).sort(stable=True)
    reader_start = torch.searchsorted(row, torch.arange(rows + 1, device=row.device))
    pointers = grad_table, grad, arg, reader_start, reader_cell
    _launch(_backward_kernel, "spatial_pool_backward", mode, source_KHW, size, pointers, rows, grad.shape[1])
    return grad_table


def shipped_calls(device: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """The Triton launches of two views of 27 x 27."""
    source = torch.arange(2 * 27 * 27, device=device).view(2, 27, 27)
    for mode, side in (("average", 13), ("max", 13), ("bilinear", 14)):
        for dtype, D in ((torch.bfloat16, 1152), (torch.bfloat16, 4096), (torch.float32, 1024)):
            table = torch.zeros(2 * 27 * 27, D, dtype=dtype, device=device)
            out, name = table.new_zeros(2 * side * side, D), f"{mode} {str(dtype).removeprefix('torch.')} {D}"
            yield name, partial(_forward_triton, table, source, out, [side, side], mode)
            yield (
                f"{name} backward",
                partial(_backward_triton, out, table if mode == "max" else None, source, len(table), [side, side], mode),
            )


def candidates() -> dict[tuple[str, str], list[dict[str, int]]]:
    """Launch parameters for bench/tune.py: columns a program, 8 to 16 a thread."""
    tiles = [{"BLOCK": block, "num_warps": warps} for block, warps in ((256, 1), (512, 1), (512, 2), (1024, 2), (1024, 4), (2048, 4))]
    keys = [(name, mode) for name in ("spatial_pool", "spatial_pool_backward") for mode in ("average", "max", "bilinear")]
    return dict.fromkeys([*keys, ("spatial_pool", "argmax")], tiles)


def _call(module: Any, values: Tensor, rows: int, source_KHW: Tensor, size: list[int], mode: str) -> tuple[Any, Any, Any]:
    """The first arguments of the native functions; `values` is [*, D] in the dtype that is pooled."""
    dtype = getattr(module.DType, str(values.dtype).removeprefix("torch."))
    return dtype, getattr(module.PoolMode, mode), module.PoolShape(rows, values.shape[1], *source_KHW.shape, *size)


def _forward_cpu(table_MD: Tensor, source_KHW: Tensor, out: Tensor, size: list[int], mode: str) -> None:
    _cpu = _native.cpu()
    call = _call(_cpu, table_MD, table_MD.shape[0], source_KHW, size, mode)
    _cpu.spatial_pool_forward(*call, table_MD.data_ptr(), source_KHW.data_ptr(), out.data_ptr(), torch.get_num_threads())


def _backward_cpu(grad: Tensor, table_MD: Tensor | None, source_KHW: Tensor, rows: int, size: list[int], mode: str) -> Tensor:
    _cpu = _native.cpu()
    grad_table, call = grad.new_empty(rows, grad.shape[1]), _call(_cpu, grad, rows, source_KHW, size, mode)
    pointers = grad.data_ptr(), address(table_MD), source_KHW.data_ptr(), grad_table.data_ptr()
    _cpu.spatial_pool_backward(*call, *pointers, torch.get_num_threads())
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
    call = _call(_cuda, grad, rows, source_KHW, size, mode)
    with torch.cuda.device(grad.device):
        stream = torch.cuda.current_stream().cuda_stream
        _cuda.spatial_pool_backward(*call, grad.data_ptr(), address(table_MD), source_KHW.data_ptr(), total.data_ptr(), stream)
    return total.to(grad.dtype)


_LAUNCHERS = {"cpu": (_forward_cpu, _backward_cpu), "triton": (_forward_triton, _backward_triton), "cuda": (_forward_cuda, _backward_cuda)}


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


_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
registry.register(
    "spatial_pool",
    {
        "cpu": Implementation(("cpu",), _DTYPES, modules=("llava_fast._cpu",), invariant=True),
        "reference": Implementation(),
        # Compiled, and never run on hardware: by name only until they are measured.
        "triton": Implementation(
            DEVICES, (torch.float32, torch.bfloat16, torch.float16), modules=("triton",), default=False, invariant=True
        ),
        "cuda": Implementation(("cuda",), _DTYPES, modules=("llava_fast._cuda",), default=False),
    },
)


def check_maps(source_KHW: Tensor, size: tuple[int, int], mode: str, device: torch.device) -> None:
    """Raises ValueError for what no kernel can pool into maps of `size`."""
    if source_KHW.dim() != 3 or source_KHW.dtype != torch.int64:
        raise ValueError(f"expected int64 sources [K, H, W], got {source_KHW.dtype} {list(source_KHW.shape)}")
    if source_KHW.device != device:
        raise ValueError(f"the sources must be on the table's device, {device}, got {source_KHW.device}")
    H, W = source_KHW.shape[1:]
    if mode not in ("average", "max", "bilinear"):
        raise ValueError(f"mode must be average, max or bilinear, got {mode!r}")
    fits = min(H, W, *size) >= 1 and (mode == "bilinear" or all(n <= h and h // (h // n) == n for h, n in zip((H, W), size, strict=True)))
    if not fits:
        raise ValueError(f"{mode} pooling cannot make maps of {tuple(size)} from maps of {(H, W)}")


def spatial_pool(table_MD: Tensor, source_KHW: Tensor, size: tuple[int, int], mode: PoolMode = "average") -> Tensor:
    """Pool maps of table rows to `size` = (H', W').

    table_MD [M, D] floating; source_KHW int64 [K, H, W], the table row of each cell, rows may repeat -> [K * H' * W', D] in
    the table's dtype, map by map, row-major. Differentiable in the table. Raises ValueError for shapes, a mode, or a size that
    do not fit (average and max: a size that no window gives exactly). For a row outside the table the CPU kernel raises ValueError and
    the reference, on the CPU, IndexError; on a GPU the CUDA kernel and the reference stop at a device-side assertion, and Triton reads NaN.
    """
    if table_MD.dim() != 2:
        raise ValueError(f"expected a table [M, D], got {list(table_MD.shape)}")
    check_maps(source_KHW, size, mode, table_MD.device)
    name = registry.resolve_name("spatial_pool", table_MD.device.type, table_MD.dtype)
    if name == "reference":
        return spatial_pool_reference(table_MD, source_KHW, size, mode)
    return _spatial_pool(table_MD, source_KHW, list(size), mode, name)
