"""Rotary position embedding, in the half-split form of Llama and Qwen2.

    rope(x) = x * cos + rotate_half(x) * sin,   rotate_half([a, b]) = [-b, a],   angle[t, i] = position[t] * inv_freq[i]

Backward is the rotation by -angle. Arithmetic is fp32 (fp64 for fp64), rounded once. x may be a row-strided view, such as the q of a fused
[T, (H + 2 G) d] product; only its last dimension has to be contiguous. A cache in fp8 (e4m3) holds value / scale, saturated at 448.

Shape letters: T rows, H query heads, G key heads, d head dim, R cache rows.
Source: arXiv 2104.09864; the layout is that of transformers' apply_rotary_pos_emb.
"""

# mypy: disable-error-code="no-untyped-def"
# (of the kernels)

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from llava_fast.kernels import _native, registry
from llava_fast.kernels._native import address, element
from llava_fast.kernels._triton import DEVICES, config, jit, on_device, tl, triton
from llava_fast.kernels.registry import Implementation

CACHE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn)
_E4M3_MAX = 448.0


@jit
def _to_e4m3(x):
    """The bits, rounded to nearest even and saturated. By hand: sm_80 has no instruction and the interpreter truncates."""
    bits = x.to(tl.uint32, bitcast=True)
    sign = (bits >> 24) & 0x80
    bits = bits & 0x7FFFFFFF
    magnitude = tl.minimum(bits, 0x43E00000)
    normal = (magnitude + 0x7FFFF + ((magnitude >> 20) & 1) - 0x3C000000) >> 20
    # Below 2^-6 the spacing is 2^-9, which is that of fp32 numbers next to 2^14.
    subnormal = (magnitude.to(tl.float32, bitcast=True) + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
    rounded = tl.where(bits > 0x7F800000, 0x7F, tl.where(magnitude < 0x3C800000, subnormal, normal))
    return (rounded | sign).to(tl.uint8)


@jit
def _store_scaled(pointers, value, scale_ptr, h, G, mask, SCALED: tl.constexpr):
    if SCALED:
        value = value / tl.load(scale_ptr + h, mask=h < G, other=1.0)[:, None]
    if pointers.dtype.element_ty == tl.uint8:
        tl.store(pointers, _to_e4m3(value), mask=mask)
    else:
        tl.store(pointers, value.to(pointers.dtype.element_ty), mask=mask)


@jit
def _rope_kernel(
    q_out_ptr, k_out_ptr, v_out_ptr, q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, slots_ptr, k_scale_ptr, v_scale_ptr,
    q_row, q_head, k_row, k_head, v_row, v_head, sign, H, G,
    HALF: tl.constexpr, CACHE: tl.constexpr, SCALED: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    """A program rotates BLOCK_H heads of one row: of q first, then of k, with which v goes into a cache."""
    t = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    q_blocks = tl.cdiv(H, BLOCK_H)
    i = tl.arange(0, BLOCK_HALF)
    cos = tl.load(cos_ptr + t * HALF + i, mask=i < HALF, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + t * HALF + i, mask=i < HALF, other=0.0).to(tl.float32)[None, :] * sign
    if block < q_blocks:
        h = block * BLOCK_H + tl.arange(0, BLOCK_H)
        mask = (h < H)[:, None] & (i < HALF)[None, :]
        source = q_ptr + t * q_row + h[:, None] * q_head + i[None, :]
        a = tl.load(source, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(source + HALF, mask=mask, other=0.0).to(tl.float32)
        out = q_out_ptr + (t * H + h[:, None]) * (2 * HALF) + i[None, :]
        tl.store(out, (a * cos - b * sin).to(q_out_ptr.dtype.element_ty), mask=mask)
        tl.store(out + HALF, (b * cos + a * sin).to(q_out_ptr.dtype.element_ty), mask=mask)
    else:
        h = (block - q_blocks) * BLOCK_H + tl.arange(0, BLOCK_H)
        row, heads = t, G
        if CACHE:
            row = tl.load(slots_ptr + t)
            heads = tl.where(row >= 0, G, 0)
        mask = (h < heads)[:, None] & (i < HALF)[None, :]
        source = k_ptr + t * k_row + h[:, None] * k_head + i[None, :]
        a = tl.load(source, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(source + HALF, mask=mask, other=0.0).to(tl.float32)
        offset = (row * G + h[:, None]) * (2 * HALF) + i[None, :]
        _store_scaled(k_out_ptr + offset, a * cos - b * sin, k_scale_ptr, h, G, mask, SCALED)
        _store_scaled(k_out_ptr + offset + HALF, b * cos + a * sin, k_scale_ptr, h, G, mask, SCALED)
        if CACHE:
            source = v_ptr + t * v_row + h[:, None] * v_head + i[None, :]
            a = tl.load(source, mask=mask, other=0.0).to(tl.float32)
            b = tl.load(source + HALF, mask=mask, other=0.0).to(tl.float32)
            _store_scaled(v_out_ptr + offset, a, v_scale_ptr, h, G, mask, SCALED)
            _store_scaled(v_out_ptr + offset + HALF, b, v_scale_ptr, h, G, mask, SCALED)


def _rows(x_THd: Tensor) -> tuple[int, int, int, int]:
    """As the extension takes them: address, strides of rows and heads, heads."""
    return x_THd.data_ptr(), x_THd.stride(0), x_THd.stride(1), x_THd.shape[1]


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _forward_cpu(q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor | None]:
    T, _, d = q.shape
    q_out = q.new_empty(q.shape)
    k_out = None if k is None else k.new_empty(k.shape)
    k_rows = (0, 0, 0, 0) if k is None else _rows(k)
    dtypes = (element(q.dtype), element(cos.dtype))
    tables = (cos.data_ptr(), sin.data_ptr(), inverse)
    outs = (q_out.data_ptr(), address(k_out))
    _native.cpu().rope(*dtypes, T, d, *tables, *_rows(q), outs[0], *k_rows, outs[1], torch.get_num_threads())
    return q_out, k_out


def _into_cache_cpu(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor,
    k_scale: Tensor | None, v_scale: Tensor | None,
) -> Tensor:  # fmt: skip
    T, _, d = q.shape
    q_out = q.new_empty(q.shape)
    cache = (element(k_cache.dtype), k_cache.shape[0], k_cache.data_ptr(), v_cache.data_ptr(), slots.data_ptr())
    _native.cpu().rope_into_cache(
        element(q.dtype), element(cos.dtype), T, d, cos.data_ptr(), sin.data_ptr(), *_rows(q), q_out.data_ptr(), *_rows(k),
        v.data_ptr(), v.stride(0), v.stride(1), *cache, address(k_scale), address(v_scale), torch.get_num_threads(),
    )  # fmt: skip
    return q_out


def _launch(q: Tensor, k: Tensor | None) -> tuple[tuple[int, int], dict[str, Any]]:
    T, H, d = q.shape
    G = 0 if k is None else k.shape[1]
    block_half = triton.next_power_of_2(d // 2)
    block_h = min(triton.next_power_of_2(max(H, G)), 16)
    # Eight numbers a thread: with more threads the loads of bf16 are narrower than 16 bytes.
    default = {"BLOCK_H": block_h, "num_warps": min(max(block_h * block_half // 256, 1), 8)}
    launch = {"BLOCK_HALF": block_half, **config("rope", f"H{H}_d{d}", default, q.device)}
    return (T, triton.cdiv(H, launch["BLOCK_H"]) + triton.cdiv(G, launch["BLOCK_H"])), launch


def _forward_triton(q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor | None]:
    q_out = q.new_empty(q.shape)
    k_out = None if k is None else k.new_empty(k.shape)
    grid, launch = _launch(q, k)
    k_strides = (0, 0, 0) if k is None else (k.stride(0), k.stride(1), k.shape[1])
    if q.shape[0] > 0:
        with on_device(q):
            _rope_kernel[grid](
                q_out, k_out, None, q, k, None, cos, sin, None, None, None, q.stride(0), q.stride(1), k_strides[0], k_strides[1], 0, 0,
                -1.0 if inverse else 1.0, q.shape[1], k_strides[2], HALF=q.shape[2] // 2, CACHE=False, SCALED=False, **launch,
            )  # fmt: skip
    return q_out, k_out


def _into_cache_triton(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor,
    k_scale: Tensor | None, v_scale: Tensor | None,
) -> Tensor:  # fmt: skip
    q_out = q.new_empty(q.shape)
    grid, launch = _launch(q, k)
    if k_cache.dtype == torch.float8_e4m3fn:
        k_cache, v_cache = k_cache.view(torch.uint8), v_cache.view(torch.uint8)
    if q.shape[0] > 0:
        with on_device(q):
            _rope_kernel[grid](
                q_out, k_cache, v_cache, q, k, v, cos, sin, slots, k_scale, v_scale, q.stride(0), q.stride(1), k.stride(0), k.stride(1),
                v.stride(0), v.stride(1), 1.0, q.shape[1], k.shape[1],
                HALF=q.shape[2] // 2, CACHE=True, SCALED=k_scale is not None, **launch,
            )  # fmt: skip
    return q_out


def _rotated(x_THd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x_THd.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x_THd.dtype)


def rope_reference(q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor | None]:
    """The same function from torch's ops, any device; rounds as transformers does, after every operation."""
    return _rotated(q, cos, sin), None if k is None else _rotated(k, cos, sin)


def rope_into_cache_reference(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor,
    k_scale: Tensor | None, v_scale: Tensor | None,
) -> Tensor:  # fmt: skip
    """From torch's ops, any device; waits for the device, to leave out the rows without a slot."""
    kept = slots >= 0
    for cache, value, scale in ((k_cache, _rotated(k, cos, sin), k_scale), (v_cache, v, v_scale)):
        value = value.to(torch.promote_types(value.dtype, torch.float32))
        value = value if scale is None else value / scale[:, None]
        value = value.clamp(-_E4M3_MAX, _E4M3_MAX) if cache.dtype == torch.float8_e4m3fn else value
        cache[slots[kept]] = value[kept].to(cache.dtype)
    return _rotated(q, cos, sin)


_LAUNCHERS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "cpu": (_forward_cpu, _into_cache_cpu),
    "triton": (_forward_triton, _into_cache_triton),
}


# k' is empty where there is no k. Backward is the op itself, with the other direction.
@torch.library.custom_op("llava_fast::rope", mutates_args=())
def _rope(q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, inverse: bool, implementation: str) -> tuple[Tensor, Tensor]:
    q, k = _last_contiguous(q), None if k is None else _last_contiguous(k)
    q_out, k_out = _LAUNCHERS[implementation][0](q, k, cos.contiguous(), sin.contiguous(), inverse)
    return q_out, q.new_empty(0) if k_out is None else k_out


@_rope.register_fake
def _(q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, inverse: bool, implementation: str) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(0) if k is None else k.new_empty(k.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, k, cos, sin, inverse, implementation = inputs
    ctx.save_for_backward(cos, sin)
    ctx.has_k, ctx.inverse, ctx.implementation = k is not None, inverse, implementation


def _backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
    cos, sin = ctx.saved_tensors
    grad_q, grad_k = _rope(grad_q, grad_k if ctx.has_k else None, cos, sin, not ctx.inverse, ctx.implementation)
    return grad_q, grad_k if ctx.has_k else None, None, None, None, None


_rope.register_autograd(_backward, setup_context=_setup_context)


_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
registry.register(
    "rope",
    {
        "cpu": Implementation(("cpu",), _DTYPES, modules=("llava_fast._cpu",), invariant=True),
        "reference": Implementation(),
        # Never run on hardware: by name only until it is measured.
        "triton": Implementation(DEVICES, _DTYPES, modules=("triton",), default=False, invariant=True),
    },
)


def rope_tables(positions_T: Tensor, inv_freq: Tensor, scaling: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin, each [T, d/2]; angles in fp32 (as transformers), rounded to `dtype` at the end."""
    angles = positions_T[:, None].to(inv_freq.dtype) * inv_freq
    return (angles.cos() * scaling).to(dtype), (angles.sin() * scaling).to(dtype)


def _check(q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor) -> None:
    T, d = (q.shape[0], q.shape[2]) if q.dim() == 3 else (-1, -1)
    if d < 2 or d % 2 or d > 512 or (k is not None and (k.dim() != 3 or k.shape[0] != T or k.shape[2] != d or k.dtype != q.dtype)):
        have = "" if k is None else f" and {k.dtype} {list(k.shape)}"
        raise ValueError(f"expected rows [T, heads, d] of one dtype with an even d up to 512, got {q.dtype} {list(q.shape)}{have}")
    if cos.shape != (T, d // 2) or sin.shape != cos.shape or cos.dtype != sin.dtype or cos.dtype not in (q.dtype, torch.float32):
        raise ValueError(
            f"cos and sin must be {[T, d // 2]} in {q.dtype} or float32, "
            f"got {cos.dtype} {list(cos.shape)} and {sin.dtype} {list(sin.shape)}"
        )
    for tensor in (k, cos, sin):
        if tensor is not None and tensor.device != q.device:
            raise ValueError(f"all tensors must be on one device, got {q.device} and {tensor.device}")


def _run(q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor | None]:
    _check(q, k, cos, sin)
    name = registry.resolve_name("rope", q.device.type, q.dtype)
    if name == "reference":
        return rope_reference(q, k, cos, sin)
    if registry.as_op(q, k):
        q_out, k_out = _rope(q, k, cos, sin, False, name)
        return q_out, None if k is None else k_out
    q, k = _last_contiguous(q), None if k is None else _last_contiguous(k)
    return _LAUNCHERS[name][0](q, k, cos.contiguous(), sin.contiguous(), False)


def rope(x_THd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, H, d], cos and sin [T, d/2] in x's dtype or fp32 -> its rotation, contiguous, in x's dtype.

    Differentiable in x. Raises ValueError for an odd d, one above 512, and shapes, dtypes or devices that do not fit.
    """
    return _run(x_THd, None, cos, sin)[0]


def rope_qk(q_THd: Tensor, k_TGd: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """(rope(q), rope(k)) in one launch; q and k have the same rows, d and dtype."""
    q_out, k_out = _run(q_THd, k_TGd, cos, sin)
    assert k_out is not None
    return q_out, k_out


def rope_into_cache(
    q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, slots_T: Tensor,
    k_scale: Tensor | None = None, v_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Returns rope(q) and writes rope(k) / k_scale and v / v_scale to rows `slots_T` of the caches, in the caches' dtype.

    k_cache, v_cache [R, G, d] or [B, block, G, d], contiguous, in fp32, bf16, fp16, e4m3 or q's dtype; slots int64 [T], each in 0 to
    R - 1 and there once, or -1 for a row that is written nowhere; scales fp32 [G], both or none. Inference only: it mutates the caches.
    Raises ValueError for shapes, dtypes and devices that do not fit, where a gradient is asked for and, on the CPU, for a slot outside
    the cache.
    """
    if registry.in_graph(q_THd, k_TGd, v_TGd, k_cache, v_cache):
        raise ValueError("rope_into_cache has no gradient and is not for torch.compile: call it under torch.no_grad(), or rope_qk")
    _check(q_THd, k_TGd, cos, sin)
    T, G, d = k_TGd.shape
    if v_TGd.shape != (T, G, d) or v_TGd.dtype != k_TGd.dtype:
        raise ValueError(f"v must be like k, {k_TGd.dtype} {[T, G, d]}, got {v_TGd.dtype} {list(v_TGd.shape)}")
    for cache in (k_cache, v_cache):
        fits = cache.dim() in (3, 4) and cache.shape[-2:] == (G, d) and cache.is_contiguous()
        fits = fits and (cache.dtype in CACHE_DTYPES or cache.dtype == q_THd.dtype)
        if not fits or cache.shape != k_cache.shape or cache.dtype != k_cache.dtype:
            raise ValueError(
                f"caches must be contiguous [rows, {G}, {d}] or [blocks, block, {G}, {d}] of one dtype, "
                f"got {k_cache.dtype} {list(k_cache.shape)} and {v_cache.dtype} {list(v_cache.shape)}"
            )
    if slots_T.shape != (T,) or slots_T.dtype != torch.int64:
        raise ValueError(f"slots must be int64 [{T}], got {slots_T.dtype} {list(slots_T.shape)}")
    for scale in (k_scale, v_scale):
        if (scale is None) != (k_scale is None) or (scale is not None and (scale.shape != (G,) or scale.dtype != torch.float32)):
            have = [None if s is None else (s.dtype, list(s.shape)) for s in (k_scale, v_scale)]
            raise ValueError(f"k_scale and v_scale must both be fp32 [{G}] or None, got {have[0]} and {have[1]}")
    for tensor in (v_TGd, k_cache, v_cache, slots_T, k_scale, v_scale):
        if tensor is not None and tensor.device != q_THd.device:
            raise ValueError(f"all tensors must be on one device, got {q_THd.device} and {tensor.device}")
    name = registry.resolve_name("rope", q_THd.device.type, q_THd.dtype)
    run = rope_into_cache_reference if name == "reference" else _LAUNCHERS[name][1]
    k_scale, v_scale = None if k_scale is None else k_scale.contiguous(), None if v_scale is None else v_scale.contiguous()
    q_THd, k_TGd, v_TGd = _last_contiguous(q_THd), _last_contiguous(k_TGd), _last_contiguous(v_TGd)
    k_cache, v_cache = k_cache.view(-1, G, d), v_cache.view(-1, G, d)
    return run(q_THd, k_TGd, v_TGd, cos.contiguous(), sin.contiguous(), k_cache, v_cache, slots_T.contiguous(), k_scale, v_scale)


def shipped_calls(device: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """The launches that a GPU build ships, for the ahead-of-time compile and the warm-up."""
    T = 64
    for H, G, d, dtypes in [(16, 16, 64, (torch.bfloat16,)), (14, 2, 64, (torch.float16,)), (32, 32, 128, (torch.bfloat16, torch.float32))]:
        for dtype in dtypes:
            fused = torch.empty(T, (H + 2 * G) * d, dtype=dtype, device=device)
            q, k, v = (part.unflatten(-1, (-1, d)) for part in fused.split((H * d, G * d, G * d), dim=-1))
            cos = torch.empty(T, d // 2, dtype=dtype, device=device)
            name = f"H={H} G={G} d={d} {str(dtype).removeprefix('torch.')}"
            yield f"qk {name}", lambda q=q, k=k, c=cos: _forward_triton(q, k, c, c, False)  # type: ignore[misc]
            yield f"qk {name} inverse", lambda q=q, k=k, c=cos: _forward_triton(q, k, c, c, True)  # type: ignore[misc]
            slots = torch.arange(T, device=device)
            for cache_dtype in (dtype, torch.float8_e4m3fn):
                cache = torch.empty(T, G, d, dtype=cache_dtype, device=device)
                scale = torch.ones(G, device=device) if cache_dtype == torch.float8_e4m3fn else None
                yield (
                    f"{str(cache_dtype).removeprefix('torch.')} cache {name}",
                    lambda q=q, k=k, v=v, c=cos, cache=cache, slots=slots, s=scale: _into_cache_triton(  # type: ignore[misc]
                        q, k, v, c, c, cache, cache.clone(), slots, s, s
                    ),
                )
