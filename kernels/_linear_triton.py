"""Triton kernels of `linear`: act(x W^T + b) + residual, where W is stored in a float type, int8, int4 or fp8.

Up to FEW_ROWS rows (not inside `batch_invariant`), all kinds: `_gemv_kernel`. A program covers all of K for a few outputs, so nothing is
reduced across programs.
More rows: `_gemm_kernel` for float weights and for fp8 (x rounded to e4m3 row by row, as Hopper's tensor cores take it);
`_gemm_quantised_kernel` for int8 and int4, widened in registers as the first operand of the product, which on Hopper may be in registers.
Accumulation is fp32, the scales meet the accumulator: int8 and int4 numbers are exact in bf16 and fp16.

Shape letters: M rows of x, I inputs, O outputs, C numbers in a load of a weight, 16 bytes at most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from llava_fast.kernels import registry
from llava_fast.kernels._triton import config, device_class, jit, on_device, tl, triton

FEW_ROWS = 8
_CHUNK = {"float32": 4, "bfloat16": 8, "float16": 8, "int8": 16, "fp8": 16, "int4": 32}  # in 16 bytes


@jit
def activate(x, ACT: tl.constexpr):
    """fp32 in and out."""
    if ACT == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    if ACT == "gelu_pytorch_tanh":  # 1 + tanh(u) = 2 sigmoid(2 u)
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    if ACT == "quick_gelu":
        x = x * tl.sigmoid(1.702 * x)
    if ACT == "silu":
        x = x * tl.sigmoid(x)
    return x


@jit
def _finish(y, m, o, M, O, valid_m, out_ptr, out_stride, bias_ptr, residual_ptr, residual_stride, rows_ptr, pre_ptr, ACT: tl.constexpr):
    """Epilogue of a tile y [rows m, columns o]: bias, activation, residual, and the store to row rows[m]."""
    mask = valid_m[:, None] & (o < O)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + o, mask=o < O, other=0.0).to(tl.float32)[None, :]
    if pre_ptr is not None:
        tl.store(pre_ptr + m.to(tl.int64)[:, None] * O + o[None, :], y.to(pre_ptr.dtype.element_ty), mask=mask)
    y = activate(y, ACT)
    if residual_ptr is not None:
        y += tl.load(residual_ptr + m.to(tl.int64)[:, None] * residual_stride + o[None, :], mask=mask, other=0.0).to(tl.float32)
    row = m.to(tl.int64)
    if rows_ptr is not None:
        row = tl.load(rows_ptr + m, mask=valid_m, other=0)
    tl.store(out_ptr + row[:, None] * out_stride + o[None, :], y.to(out_ptr.dtype.element_ty), mask=mask)


@jit
def _gemv_kernel(
    out_ptr,
    x_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    residual_ptr,
    rows_ptr,
    pre_ptr,
    M,
    O,
    I,
    groups,
    x_stride,
    out_stride,
    residual_stride,
    INT4: tl.constexpr,
    GROUP: tl.constexpr,
    ACT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    CHUNKS: tl.constexpr,
    C: tl.constexpr,
):
    # Axes: rows of x, outputs, chunks (over the threads), numbers of a chunk (within a thread). A chunk lies in one group.
    m = tl.arange(0, ROWS)
    o = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    chunk = tl.arange(0, CHUNKS)
    number = tl.arange(0, C)
    BYTES: tl.constexpr = C // 2 if INT4 else C
    x_row = (x_ptr + m.to(tl.int64) * x_stride)[:, None, None, None]
    w_row = (weight_ptr + o.to(tl.int64) * (I // 2 if INT4 else I))[None, :, None, None]
    s_row = None if scale_ptr is None else (scale_ptr + o.to(tl.int64) * groups)[None, :, None, None]
    total = tl.zeros((ROWS, BLOCK_O, CHUNKS), dtype=tl.float32)
    for start in range(0, I, CHUNKS * C):
        column = (start + chunk * C)[:, None] + number[None, :]
        x = tl.load(x_row + column[None, None, :, :], mask=(m < M)[:, None, None, None] & (column < I)[None, None, :, :], other=0.0)
        x = x.to(tl.float32)
        byte = (start // 2 + chunk * BYTES if INT4 else start + chunk * BYTES)[:, None] + tl.arange(0, BYTES)[None, :]
        inside = (o < O)[None, :, None, None] & (byte < (I // 2 if INT4 else I))[None, None, :, :]
        w = tl.load(w_row + byte[None, None, :, :], mask=inside, other=0.0)
        if INT4:
            # A nibble under the exponent of 2^23 is the number 2^23 + nibble: one operation where a conversion would take more.
            even, odd = tl.split(tl.reshape(x, (ROWS, 1, CHUNKS, BYTES, 2)))
            bits = w.to(tl.int32)
            low = ((bits & 15) | 0x4B000000).to(tl.float32, bitcast=True) - 8388616.0
            high = ((bits >> 4) | 0x4B000000).to(tl.float32, bitcast=True) - 8388616.0
            part = tl.sum(low * even + high * odd, 3)
        else:
            part = tl.sum(w.to(tl.float32) * x, 3)
        if GROUP > 0:
            group = (start + chunk * C)[None, None, :, None] // GROUP  # four axes: one layout with x and w, nothing goes through memory
            scale = tl.load(s_row + group, mask=(o < O)[None, :, None, None] & (group < groups), other=0.0)
            part = tl.sum(tl.expand_dims(part, 3) * scale, 3)
        total += part
    y = tl.sum(total, 2)
    if scale_ptr is not None and GROUP == 0:
        y *= tl.load(scale_ptr + o, mask=o < O, other=0.0)[None, :]
    _finish(y, m, o, M, O, m < M, out_ptr, out_stride, bias_ptr, residual_ptr, residual_stride, rows_ptr, pre_ptr, ACT)


@jit
def _tile(M, O, BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr):
    """Tile (m, o) of this program: bands of 8 tiles of rows, so that programs at work together share operands in L2."""
    pid = tl.program_id(0)
    tiles_m, tiles_o = tl.cdiv(M, BLOCK_M), tl.cdiv(O, BLOCK_O)
    band = pid // (8 * tiles_o)
    height = tl.minimum(tiles_m - band * 8, 8)
    return band * 8 + (pid % (8 * tiles_o)) % height, (pid % (8 * tiles_o)) // height


@jit
def _gemm_kernel(
    out_ptr,
    x_ptr,
    x_scale_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    residual_ptr,
    rows_ptr,
    pre_ptr,
    gather_ptr,
    M,
    O,
    I,
    groups,
    x_rows,
    x_stride,
    out_stride,
    residual_stride,
    GROUP: tl.constexpr,
    ACT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """Float weights, and fp8 by fp8 with scales. With gather, row m is x[gather[m]]; one outside x is neither computed nor stored."""
    tile_m, tile_o = _tile(M, O, BLOCK_M, BLOCK_O)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o = tile_o * BLOCK_O + tl.arange(0, BLOCK_O)
    k = tl.arange(0, BLOCK_I)
    row, valid = m.to(tl.int64), m < M
    if gather_ptr is not None:
        row = tl.load(gather_ptr + m, mask=valid, other=x_rows)
        valid &= (row >= 0) & (row < x_rows)
    x_block = x_ptr + row[:, None] * x_stride + k[None, :]
    w_block = weight_ptr + o.to(tl.int64)[None, :] * I + k[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_O), dtype=tl.float32)
    for start in range(0, I, BLOCK_I):
        x = tl.load(x_block + start, mask=valid[:, None] & (start + k < I)[None, :], other=0.0)
        w = tl.load(w_block + start, mask=(o < O)[None, :] & (start + k < I)[:, None], other=0.0)
        if scale_ptr is not None and GROUP > 0:
            scale = tl.load(scale_ptr + o.to(tl.int64) * groups + start // GROUP, mask=o < O, other=0.0)
            total += tl.dot(x, w) * scale[None, :]
        else:
            total = tl.dot(x, w.to(x.dtype), total, input_precision=PRECISION)
    if scale_ptr is not None:
        total *= tl.load(x_scale_ptr + m, mask=m < M, other=0.0)[:, None]
        if GROUP == 0:
            total *= tl.load(scale_ptr + o, mask=o < O, other=0.0)[None, :]
    _finish(total, m, o, M, O, valid, out_ptr, out_stride, bias_ptr, residual_ptr, residual_stride, rows_ptr, pre_ptr, ACT)


@jit
def _gemm_quantised_kernel(
    out_ptr,
    x_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    residual_ptr,
    rows_ptr,
    pre_ptr,
    M,
    O,
    I,
    groups,
    x_stride,
    out_stride,
    residual_stride,
    INT4: tl.constexpr,
    GROUP: tl.constexpr,
    ACT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """W x^T, so that the widened weight is the first operand. For int4 x holds its even columns, then its odd ones."""
    tile_m, tile_o = _tile(M, O, BLOCK_M, BLOCK_O)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o = tile_o * BLOCK_O + tl.arange(0, BLOCK_O)
    BYTES: tl.constexpr = BLOCK_I // 2 if INT4 else BLOCK_I
    k = tl.arange(0, BYTES)
    bytes = I // 2 if INT4 else I  # of a row of the weight
    x_block = x_ptr + m.to(tl.int64)[None, :] * x_stride + k[:, None]
    w_block = weight_ptr + o.to(tl.int64)[:, None] * bytes + k[None, :]
    total = tl.zeros((BLOCK_O, BLOCK_M), dtype=tl.float32)
    for start in range(0, bytes, BYTES):
        inside = start + k < bytes
        x = tl.load(x_block + start, mask=(m < M)[None, :] & inside[:, None], other=0.0)
        w = tl.load(w_block + start, mask=(o < O)[:, None] & inside[None, :], other=0)
        part = tl.zeros((BLOCK_O, BLOCK_M), dtype=tl.float32) if GROUP > 0 else total
        if INT4:
            odd = tl.load(x_block + bytes + start, mask=(m < M)[None, :] & inside[:, None], other=0.0)
            low, high = (w & 15).to(tl.int8) - 8, (w >> 4).to(tl.int8) - 8
            part = tl.dot(low.to(x.dtype), x, part, input_precision=PRECISION)
            part = tl.dot(high.to(x.dtype), odd, part, input_precision=PRECISION)
        else:
            part = tl.dot(w.to(x.dtype), x, part, input_precision=PRECISION)
        if GROUP > 0:
            group = (2 * start if INT4 else start) // GROUP
            total += part * tl.load(scale_ptr + o.to(tl.int64) * groups + group, mask=o < O, other=0.0)[:, None]
        else:
            total = part
    if GROUP == 0:
        total *= tl.load(scale_ptr + o, mask=o < O, other=0.0)[:, None]
    _finish(tl.trans(total), m, o, M, O, m < M, out_ptr, out_stride, bias_ptr, residual_ptr, residual_stride, rows_ptr, pre_ptr, ACT)


@jit
def _fp8_rows_kernel(out_ptr, scale_ptr, x_ptr, I, x_stride, BLOCK: tl.constexpr):
    """x[m] = out[m] * scale[m], the largest magnitude at e4m3's 448."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * x_stride + columns, mask=columns < I, other=0.0).to(tl.float32)
    scale = tl.max(tl.abs(x), 0) / 448.0
    tl.store(scale_ptr + row, scale)
    x = x / tl.where(scale == 0.0, 1.0, scale)
    tl.store(out_ptr + row * I + columns, x.to(tl.float8e4nv), mask=columns < I)


def serves(kind: str) -> bool:
    """Whether there are kernels for weights of this kind; fp8 needs a device that has it, Ada or Hopper."""
    if kind == "fp8" and torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9):
        return False
    return kind in _CHUNK


def fp8_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [M, I] as e4m3 [M, I] and fp32 scales [M]."""
    M, I = x.shape
    out, scale = x.new_empty(M, I, dtype=torch.float8_e4m3fn), x.new_empty(M, dtype=torch.float32)
    if M:
        BLOCK = triton.next_power_of_2(I)
        options = config("_fp8_rows_kernel", f"{I}", {"num_warps": 4 if BLOCK <= 4096 else 8}, x.device)
        _fp8_rows_kernel[(M,)](out, scale, x, I, x.stride(0), BLOCK=BLOCK, **options)
    return out, scale


def launch(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    kind: str,
    group: int,
    act: str,
    rows: Tensor | None,
    pre: Tensor | None,
) -> None:
    """The launcher of kernels/linear.py: see LAUNCHERS there."""
    with on_device(x):
        _launch(out, x, weight, scale, bias, residual, kind, group, act, rows, pre)


def _launch(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    kind: str,
    group: int,
    act: str,
    rows: Tensor | None,
    pre: Tensor | None,
) -> None:
    M, I = x.shape
    O = weight.shape[0]
    if M == 0 or O == 0:
        return
    group = 0 if group >= I else group  # one scale a row meets the sum alone
    if M <= FEW_ROWS and not registry.is_invariant():
        _gemv(out, x, weight, scale, bias, residual, kind, group, act, rows, pre)
        return
    if kind not in ("int8", "int4"):
        x_scale = None
        if kind == "fp8":
            x, x_scale = fp8_rows(x)
        gemm(out, x, weight, bias, act, rows=rows, pre=pre, residual=residual, scale=scale, x_scale=x_scale, group=group)
        return
    if kind == "int4":
        x = x.unflatten(1, (I // 2, 2)).transpose(1, 2).reshape(M, I)
    assert scale is not None, kind
    precision = "ieee" if x.dtype == torch.float32 else "tf32"
    default = {"BLOCK_M": 128, "BLOCK_O": 128, "BLOCK_I": 64, "num_warps": 8, "num_stages": 3}
    if _rows(M) <= 64:
        default |= {"BLOCK_M": max(16, triton.next_power_of_2(_rows(M))), "BLOCK_O": 64, "num_warps": 4, "num_stages": 4}
    if x.dtype == torch.float32:
        default |= {"BLOCK_M": min(64, default["BLOCK_M"]), "BLOCK_O": 64, "BLOCK_I": default["BLOCK_I"] // 2, "num_stages": 2}
    options = _tiles("_gemm_quantised_kernel", f"{kind} {_size(M)}x{O}x{I}", default, x.device)
    options["BLOCK_I"] = _divisor(group, options["BLOCK_I"])
    _gemm_quantised_kernel[(triton.cdiv(M, options["BLOCK_M"]) * triton.cdiv(O, options["BLOCK_O"]),)](
        out,
        x,
        weight,
        scale,
        bias,
        residual,
        rows,
        pre,
        M,
        O,
        I,
        scale.shape[1],
        x.stride(0),
        out.stride(0),
        0 if residual is None else residual.stride(0),
        INT4=kind == "int4",
        GROUP=group,
        ACT=act,
        PRECISION=precision,
        **options,
    )


def _gemv(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    kind: str,
    group: int,
    act: str,
    rows: Tensor | None,
    pre: Tensor | None,
) -> None:
    M, I = x.shape
    O = weight.shape[0]
    ROWS = triton.next_power_of_2(M)
    BLOCK_O = {1: 4, 2: 4, 4: 2, 8: 2}[ROWS]
    C = min(_CHUNK[kind], 128 // (ROWS * BLOCK_O))  # registers: ROWS x BLOCK_O x C products; 256 spill with triton 3.6
    # Chunks of a program are at most 32 threads x 4 warps; a short row takes fewer warps rather than idle ones.
    CHUNKS = min(128, max(32, triton.next_power_of_2(triton.cdiv(I, C))))
    default = {"C": C, "BLOCK_O": BLOCK_O, "CHUNKS": CHUNKS, "num_warps": CHUNKS // 32, "num_stages": 1}
    options = config("_gemv_kernel", f"{kind} {ROWS}x{O}x{I}", default, x.device)
    _gemv_kernel[(triton.cdiv(O, options["BLOCK_O"]),)](
        out,
        x,
        weight,
        scale,
        bias,
        residual,
        rows,
        pre,
        M,
        O,
        I,
        0 if scale is None else scale.shape[1],
        x.stride(0),
        out.stride(0),
        0 if residual is None else residual.stride(0),
        INT4=kind == "int4",
        GROUP=group,
        ACT=act,
        ROWS=ROWS,
        **options,
    )


def gemm(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    act: str,
    *,
    gather: Tensor | None = None,
    rows: Tensor | None = None,
    pre: Tensor | None = None,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    x_scale: Tensor | None = None,
    group: int = 0,
) -> None:
    """out[rows[m]] = act(x[gather[m]] W^T + b) + residual[m]; a gather[m] outside x leaves its row alone. Scales: fp8's."""
    M, (O, I) = x.shape[0] if gather is None else gather.shape[0], weight.shape
    if M == 0:
        return
    default = {"BLOCK_M": 128, "BLOCK_O": 128, "BLOCK_I": 128 // x.element_size(), "num_warps": 8, "num_stages": 3}
    if _rows(M) <= 64:
        default |= {"BLOCK_M": max(16, triton.next_power_of_2(_rows(M))), "BLOCK_O": 64, "num_warps": 4, "num_stages": 4}
    if x.dtype == torch.float32:
        default |= {"BLOCK_M": min(64, default["BLOCK_M"]), "BLOCK_O": 64, "num_warps": 4, "num_stages": 2}
    options = _tiles("_gemm_kernel", f"{str(x.dtype).removeprefix('torch.')} {_size(M)}x{O}x{I}", default, x.device)
    options["BLOCK_I"] = _divisor(group, options["BLOCK_I"])
    _gemm_kernel[(triton.cdiv(M, options["BLOCK_M"]) * triton.cdiv(O, options["BLOCK_O"]),)](
        out,
        x,
        x_scale,
        weight,
        scale,
        bias,
        residual,
        rows,
        pre,
        gather,
        M,
        O,
        I,
        0 if scale is None else scale.shape[1],
        x.shape[0],
        x.stride(0),
        out.stride(0),
        0 if residual is None else residual.stride(0),
        GROUP=group,
        ACT=act,
        PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
        **options,
    )


def _rows(M: int) -> int:
    """Rows that tiles are chosen for: 64 for any number where one must not depend on the others."""
    return 64 if registry.is_invariant() else M


def _size(M: int) -> str:
    """Rows as a shape class: the next power of two, 4096 at most."""
    return f"{min(4096, triton.next_power_of_2(M))}"


def _tiles(kernel: str, shape_class: str, default: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """As tuned; where a row must not depend on the others the default, since one weight is met alone and joined with others."""
    return dict(default) if registry.is_invariant() else config(kernel, shape_class, default, device)


def _divisor(group: int, block: int) -> int:
    """The largest power of two up to `block` that divides the group (0: one scale a row): a block has one scale."""
    return block if group == 0 else min(block, group & -group)


def shipped_calls(device: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """Every kernel at the widths of the 7b model, as make aot compiles it and make gpu warms it up."""

    def case(kind: str, M: int, O: int, I: int, group: int = 0, act: str = "", dtype: torch.dtype = torch.bfloat16) -> Callable[[], object]:
        stored = {"int8": torch.int8, "int4": torch.uint8, "fp8": torch.float8_e4m3fn}.get(kind) or getattr(torch, kind)
        weight = torch.empty(O, I // 2 if kind == "int4" else I, device=device, dtype=stored)
        scale = torch.empty(O, -(-I // group), device=device) if group else None
        x, out, bias = (torch.empty(*shape, device=device, dtype=dtype) for shape in ((M, I), (M, O), (O,)))
        return lambda: launch(out, x, weight, scale, bias, torch.empty_like(out), kind, group, act, None, None)

    fp8 = device_class(torch.device(device)) >= "sm_89"
    O, I = 4096, 11008
    for M in (1, 8):
        yield f"gemv bfloat16 {M}x{O}x{I}", case("bfloat16", M, O, I)
        yield f"gemv int8 {M}x{O}x{I}", case("int8", M, O, I, I)
        yield f"gemv int4 {M}x{O}x{I}", case("int4", M, O, I, 128)
        if fp8:
            yield f"gemv fp8 {M}x{O}x{I}", case("fp8", M, O, I, I)
    for M in (2, 4):
        yield f"gemv int4 {M}x{O}x{I}", case("int4", M, O, I, 128)
    for M in (32, 4096):
        yield f"gemm int8 {M}x{O}x{I}", case("int8", M, O, I, I)
        yield f"gemm int4 {M}x{O}x{I}", case("int4", M, O, I, 128)
        if fp8:
            yield f"gemm fp8 {M}x{O}x{I}", case("fp8", M, O, I, I)
    yield f"gemm int8 by group 4096x{O}x{I}", case("int8", 4096, O, I, 128)
    yield "gemv bfloat16 1x152000x1024", case("bfloat16", 1, 152000, 1024)
    yield "gemv float16", case("float16", 1, 4096, 4096, dtype=torch.float16)
    yield "gemm float16", case("float16", 4096, 1024, 1152, act="gelu", dtype=torch.float16)
    yield "gemm bfloat16", case("bfloat16", 4096, 1024, 1152, act="gelu_pytorch_tanh")
    yield "gemm float32", case("float32", 4096, 1024, 1152, dtype=torch.float32)


_GEMM_NAMES = ("BLOCK_M", "BLOCK_O", "BLOCK_I", "num_warps", "num_stages")
_TALL = [(128, 128, 64, 8, 4), (128, 64, 64, 4, 4), (128, 64, 64, 4, 3), (64, 128, 64, 4, 4), (64, 128, 64, 4, 3), (256, 64, 64, 8, 3)]


def gemm_candidates(*shapes: str) -> dict[tuple[str, str], list[dict[str, int]]]:
    """Of bf16 products of many rows, by shape class."""
    return {("_gemm_kernel", shape): [dict(zip(_GEMM_NAMES, tiles, strict=True)) for tiles in _TALL] for shape in shapes}


def candidates() -> dict[tuple[str, str], list[dict[str, int]]]:
    """Launch parameters for bench/tune.py, for the shape classes of shipped_calls."""
    fp8 = [(128, 128, 128, 8, 4), (128, 128, 128, 4, 3), (128, 128, 64, 8, 4), (64, 128, 128, 4, 4)]
    few = [(32, 64, 128, 4, 3), (32, 64, 128, 4, 4), (32, 128, 64, 4, 4), (32, 64, 64, 4, 5), (32, 128, 128, 8, 3)]
    mixed = [(128, 64, 64, 4, 3), (128, 128, 64, 8, 2), (128, 128, 32, 8, 4), (256, 64, 64, 8, 3)]
    size = "4096x11008"
    shapes = {
        ("_gemm_kernel", f"float8_e4m3fn 4096x{size}"): fp8,
        ("_gemm_kernel", f"float8_e4m3fn 32x{size}"): few,
        ("_gemm_quantised_kernel", f"int8 32x{size}"): [(32, 64, 64, 4, 3), (32, 64, 64, 4, 5)],  # ptxas serialises larger ones
        ("_gemm_quantised_kernel", f"int4 32x{size}"): few,
        ("_gemm_quantised_kernel", f"int8 4096x{size}"): mixed,
        ("_gemm_quantised_kernel", f"int4 4096x{size}"): mixed,
    }
    found = {key: [dict(zip(_GEMM_NAMES, tiles, strict=True)) for tiles in lists] for key, lists in shapes.items()}
    names = ("BLOCK_O", "CHUNKS", "num_warps")
    one = [(1, 128, 4), (2, 128, 4), (2, 256, 8), (4, 64, 2), (8, 32, 1), (8, 64, 2)]
    eight = [(1, 32, 1), (1, 64, 2), (1, 128, 4), (2, 64, 2), (1, 256, 8)]
    gemv = {f"{kind} {rows}x{size}": lists for kind in ("bfloat16", "int8", "int4", "fp8") for rows, lists in ((1, one), (8, eight))}
    gemv["bfloat16 1x152000x1024"] = one
    found |= {("_gemv_kernel", shape): [dict(zip(names, tiles, strict=True)) for tiles in lists] for shape, lists in gemv.items()}
    return found | gemm_candidates("bfloat16 4096x1024x1152")
