"""Attention of new rows to keys in the pages of a cache: decode, and prefill against what the cache already holds.

    keys of sequence s: rows j = 0 .. seqlens_k[s] - 1, row j is row j % page of k_cache[block_table[s, j // page]]
    out_i = softmax(scale * q_i K^T) V over the keys j <= seqlens_k[s] - n_s + i,   i = 0 .. n_s - 1 its query rows

The query rows are the last of the keys, whose own keys and values are in the cache before the call. Inference only: no gradient.

Shape letters: T query rows, S sequences, H heads, G key-value heads (H a multiple of G), d head dim, B blocks of `page` rows.
q is of any floating dtype; the cache of the same, of a narrower one, or fp8 e4m3 with a scale for each key-value head (k = k_cache *
k_scale). Accumulation: fp32, fp64 for fp64.

An implementation of ours is one launcher, in _LAUNCHERS; every one has this interface (the last dimension of q and the caches is
contiguous, their other strides are any; the index tensors and scales are contiguous):

    forward(q, k_cache, v_cache, block_table, cu_seqlens_q, seqlens_k, scale, k_scale, v_scale) -> out

out [T, H, d] is new and contiguous, in q's dtype. The shape class of the registry is (d, dtype of the cache). Source: PagedAttention
(Kwon et al. 2023, arXiv 2309.06180); split keys: Flash-Decoding (Dao et al. 2023).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from llava_fast.kernels import _native, _paged_attention_triton, registry
from llava_fast.kernels._native import address, element
from llava_fast.kernels._paged_attention_triton import candidates as candidates
from llava_fast.kernels._paged_attention_triton import shipped_calls as shipped_calls
from llava_fast.kernels._triton import DEVICES
from llava_fast.kernels.registry import Implementation


def _check_values(T: int, B: int, page: int, block_table: list[list[int]], cu_seqlens_q: list[int], seqlens_k: list[int]) -> None:
    """What a kernel would read or write out of bounds for."""
    if cu_seqlens_q[0] != 0 or cu_seqlens_q[-1] != T:
        raise ValueError(f"cu_seqlens_q must go from 0 to the number of rows, {T}, got {cu_seqlens_q[0]} to {cu_seqlens_q[-1]}")
    for s, n in enumerate(seqlens_k):
        first, last, blocks = cu_seqlens_q[s], cu_seqlens_q[s + 1], block_table[s]
        if last < first:
            raise ValueError(f"cu_seqlens_q must not decrease, got {first} before {last}")
        if not last - first <= n <= len(blocks) * page:
            raise ValueError(f"seqlens_k[{s}] must be {last - first}, its query rows, to {len(blocks) * page}, its pages, got {n}")
        for block in blocks[: -(-n // page)]:
            if not 0 <= block < B:
                raise ValueError(f"block_table[{s}] must name blocks 0 to {B - 1}, got {block}")


def paged_attention_reference(
    q_THd: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cu_seqlens_q: Tensor,
    seqlens_k: Tensor,
    *,
    scale: float | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """Gathers each sequence's keys and takes scaled_dot_product_attention. Reads lengths on the host: a GPU is waited for."""
    page, bounds, lengths = k_cache.shape[1], cu_seqlens_q.tolist(), seqlens_k.tolist()
    _check_values(q_THd.shape[0], k_cache.shape[0], page, block_table.tolist(), bounds, lengths)
    wide = torch.promote_types(q_THd.dtype, torch.float32)
    out = torch.empty_like(q_THd, memory_format=torch.contiguous_format)
    for s, own in enumerate(lengths):
        first, last = bounds[s], bounds[s + 1]
        if first == last:
            continue
        blocks = block_table[s, : -(-own // page)].long()
        k_GKd, v_GKd = (
            (cache[blocks].flatten(0, 1)[:own].to(wide) * (1 if factor is None else factor[:, None])).to(q_THd.dtype).transpose(0, 1)
            for cache, factor in ((k_cache, k_scale), (v_cache, v_scale))
        )
        seen = torch.arange(own - last + first, own, device=q_THd.device)
        mask = torch.arange(own, device=q_THd.device) <= seen[:, None]
        q_HTd = q_THd[first:last].transpose(0, 1)
        attended = F.scaled_dot_product_attention(
            q_HTd[None], k_GKd[None], v_GKd[None], attn_mask=mask, scale=scale, enable_gqa=q_HTd.shape[0] != k_GKd.shape[0]
        )
        out[first:last] = attended[0].transpose(0, 1)
    return out


def _forward_reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cu_seqlens_q: Tensor,
    seqlens_k: Tensor,
    scale: float,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> Tensor:
    return paged_attention_reference(
        q, k_cache, v_cache, block_table, cu_seqlens_q, seqlens_k, scale=scale, k_scale=k_scale, v_scale=v_scale
    )


def _forward_cpu(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cu_seqlens_q: Tensor,
    seqlens_k: Tensor,
    scale: float,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> Tensor:
    _cpu = _native.cpu()
    (T, H, d), (B, page, G, _) = q.shape, k_cache.shape
    out = q.new_empty(T, H, d)
    rows = [_cpu.Rows(x.data_ptr(), element(x.dtype), x.stride(0), x.stride(1)) for x in (q, out)]
    caches = [_cpu.Rows(x.data_ptr(), element(x.dtype), x.stride(1), x.stride(2)) for x in (k_cache, v_cache)]
    S, threads = seqlens_k.shape[0], torch.get_num_threads()
    task = _cpu.AttentionTask(T, B * page, S, H, G, d, True, scale, rows[0], *caches, rows[1], 0, 0, threads, registry.is_invariant())
    pages = (block_table.shape[1], page, B, k_cache.stride(0), v_cache.stride(0))
    _cpu.paged_attention(
        task, cu_seqlens_q.data_ptr(), seqlens_k.data_ptr(), block_table.data_ptr(), *pages, address(k_scale), address(v_scale)
    )
    return out


_LAUNCHERS: dict[str, Callable[..., Tensor]] = {
    "cpu": _forward_cpu,
    "reference": _forward_reference,
    "triton": _paged_attention_triton.forward,
}


@torch.library.custom_op("llava_fast::paged_attention", mutates_args=())
def _paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cu_seqlens_q: Tensor,
    seqlens_k: Tensor,
    scale: float,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    implementation: str,
) -> Tensor:
    return _LAUNCHERS[implementation](q, k_cache, v_cache, block_table, cu_seqlens_q, seqlens_k, scale, k_scale, v_scale)


@_paged_attention.register_fake
def _(q, k_cache, v_cache, block_table, cu_seqlens_q, seqlens_k, scale, k_scale, v_scale, implementation):
    return q.new_empty(q.shape)


registry.register(
    "paged_attention",
    {
        "cpu": Implementation(
            ("cpu",), (torch.float32, torch.bfloat16, torch.float16), lambda case: case[0] <= 256, ("llava_fast._cpu",), invariant=True
        ),
        "reference": Implementation(),
        # Compiled, and never run on hardware: by name only until it is measured.
        "triton": Implementation(
            DEVICES,
            (torch.float32, torch.bfloat16, torch.float16),
            modules=("triton",),
            default=False,
            invariant=True,
        ),
    },
    shapes=((64, "float32"), (128, "bfloat16")),
)


def _check(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cu_seqlens_q: Tensor,
    seqlens_k: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> None:
    if q.dim() != 3 or k_cache.dim() != 4 or k_cache.shape != v_cache.shape or q.shape[2] != k_cache.shape[3]:
        raise ValueError(
            f"expected q [T, H, d] and caches [B, page, G, d], got {list(q.shape)}, {list(k_cache.shape)} and {list(v_cache.shape)}"
        )
    page, G, d = k_cache.shape[1:]
    if d == 0 or G == 0 or q.shape[1] == 0 or q.shape[1] % G:
        raise ValueError(f"the {q.shape[1]} heads of q must be a multiple of the {G} of the cache, and d at least 1, got {d}")
    if not 16 <= page <= 256 or page & (page - 1):
        raise ValueError(f"a page must have 16 to 256 rows, a power of two, got {page}")
    fp8 = k_cache.dtype == torch.float8_e4m3fn
    narrower = q.dtype.is_floating_point and (fp8 or torch.promote_types(q.dtype, k_cache.dtype) == q.dtype)
    if k_cache.dtype != v_cache.dtype or not narrower:
        raise ValueError(
            f"the caches must have one dtype, q's, a narrower one or float8_e4m3fn; got {q.dtype}, {k_cache.dtype}, {v_cache.dtype}"
        )
    if d > 1 and (q.stride(2) != 1 or k_cache.stride(3) != 1 or v_cache.stride(3) != 1):
        raise ValueError(f"the last dimension must be contiguous, got strides {q.stride()}, {k_cache.stride()} and {v_cache.stride()}")
    if (k_scale is None) != (v_scale is None):
        raise ValueError(f"k_scale and v_scale go together, got {'v_scale' if k_scale is None else 'k_scale'} alone")
    S = seqlens_k.shape[0] if seqlens_k.dim() == 1 else -1
    blocks = block_table.shape[1] if block_table.dim() == 2 else -1
    for name, tensor, dtype, shape in (
        ("seqlens_k", seqlens_k, torch.int32, (S,)),
        ("cu_seqlens_q", cu_seqlens_q, torch.int32, (S + 1,)),
        ("block_table", block_table, torch.int32, (S, blocks)),
        ("k_scale", k_scale, torch.float32, (G,)),
        ("v_scale", v_scale, torch.float32, (G,)),
    ):
        if tensor is not None and (tensor.dtype != dtype or tensor.shape != shape):
            raise ValueError(f"{name} must be {dtype} {list(shape)}, got {tensor.dtype} {list(tensor.shape)}")
        if tensor is not None and tensor.device != q.device:
            raise ValueError(f"all tensors must be on one device, got {q.device} and {tensor.device}")
    if torch.is_grad_enabled() and (q.requires_grad or k_cache.requires_grad or v_cache.requires_grad):
        raise ValueError("paged_attention has no gradient: call it under torch.no_grad(), or varlen_attention")


def paged_attention(
    q_THd: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cu_seqlens_q: Tensor,
    seqlens_k: Tensor,
    *,
    scale: float | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """Attention of new rows to a paged cache; returns [T, H, d] in q's dtype.

    k_cache, v_cache [B, page, G, d], page a power of two from 16 to 256; block_table int32 [S, blocks], the pages of each sequence in
    order; cu_seqlens_q int32 [S+1]; seqlens_k int32 [S], the keys of each sequence, the new rows' own among them (the last ones; a
    row sees keys up to its own).  scale: 1 / sqrt(d) where None.  k_scale, v_scale: fp32 [G], factors of the stored values.
    Scores (scale q . k) must lie within 1e30 of 0: a running maximum begins at -1e30, and what is below counts as not seen.
    What is in pages past a sequence's length is never read. No gradient.
    Raises ValueError for shapes, dtypes, strides or devices that do not fit, for tensors that need a gradient, on the CPU also for
    lengths and blocks that do not fit (a GPU does not wait to look at them).
    """
    _check(q_THd, k_cache, v_cache, block_table, cu_seqlens_q, seqlens_k, k_scale, v_scale)
    d = q_THd.shape[2]
    name = registry.resolve_name("paged_attention", q_THd.device.type, q_THd.dtype, (d, str(k_cache.dtype).removeprefix("torch.")))
    scale = d**-0.5 if scale is None else float(scale)
    call = (q_THd, k_cache, v_cache, block_table.contiguous(), cu_seqlens_q.contiguous(), seqlens_k.contiguous(), scale)
    factors = [None if factor is None else factor.contiguous() for factor in (k_scale, v_scale)]
    if registry.as_op():
        return _paged_attention(*call, *factors, name)
    return _LAUNCHERS[name](*call, *factors)
