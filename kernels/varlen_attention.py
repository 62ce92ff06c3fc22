"""Attention over packed rows: every sequence attends to its own keys, and to an optional range of an earlier sequence's.

    s_ij = scale * q_i . k_j         for the keys j that row i sees: those of the prefix, then its own up to its place if causal
    lse_i = log sum_j exp(s_ij),     out_i = sum_j exp(s_ij - lse_i) v_j

    P_ij = exp(s_ij - lse_i),  dS_ij = P_ij (dout_i . v_j - dout_i . out_i)
    dv_j = sum_i P_ij dout_i,  dk_j = scale sum_i dS_ij q_i,  dq_i = scale sum_j dS_ij k_j

The sums of dk and dv run over all rows that see the key: of every query head of its group, and of every sequence that has it in
its prefix. Source: FlashAttention-2 (Dao 2023, arXiv 2307.08691), sections 2.3 and 3.1.

Shape letters: T query rows, K key rows, S sequences, H heads, G key-value heads (H a multiple of G), d head dim.
q is of any floating dtype, k and v of the same or of a narrower one (a bf16 cache). Accumulation and lse: fp32, fp64 for fp64.

An implementation is a pair of launchers, in _LAUNCHERS; every one has this interface (tensors as in varlen_attention;
q, k, v and grad_out have a contiguous last dimension and any other strides, the index tensors are contiguous, scale is a number):

    forward(q, k, v, cu_seqlens_q, cu_seqlens_k, causal, q_index, seqused_k, prefix, scale) -> out, lse
    backward(grad_out, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, causal, q_index, seqused_k, prefix, scale) -> dq, dk, dv

out [T, H, d] and dq have q's dtype, dk and dv [K, G, d] those of k and v, lse is fp32 [T, H]; all are new and contiguous.
The shape class of the registry is (d, what else is asked for), such as (72, "causal grouped prefix"): the words are causal or full,
grouped (G < H), k's dtype where it is not q's, q_index, seqused_k, prefix, lse.

A row that sees no key has out 0, lse -inf and gradient 0; a key that no row sees has gradient 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llava_fast.kernels import _native, registry
from llava_fast.kernels import _varlen_attention_backward as _triton
from llava_fast.kernels import _varlen_attention_others as _others
from llava_fast.kernels._native import address, element
from llava_fast.kernels._triton import DEVICES
from llava_fast.kernels._varlen_attention_backward import candidates as candidates
from llava_fast.kernels._varlen_attention_backward import shipped_calls as shipped_calls
from llava_fast.kernels.registry import Implementation


def _check_lengths(
    rows: int, keys: int, cu_seqlens_q: list[int], cu_seqlens_k: list[int], seqused_k: list[int] | None, prefix: list[list[int]] | None
) -> None:
    for name, bounds, end in (("cu_seqlens_q", cu_seqlens_q, rows), ("cu_seqlens_k", cu_seqlens_k, keys)):
        for low, high in zip(bounds, bounds[1:], strict=False):
            if high < low:
                raise ValueError(f"{name} must not decrease, got {low} before {high}")
        reserved = name == "cu_seqlens_k" and seqused_k is not None
        if bounds[0] < 0 or bounds[-1] > end or not reserved and (bounds[0], bounds[-1]) != (0, end):
            raise ValueError(f"{name} must go from 0 to the number of rows, {end}, got {bounds[0]} to {bounds[-1]}")
    for s, used in enumerate(seqused_k or ()):
        if not 0 <= used <= cu_seqlens_k[s + 1] - cu_seqlens_k[s]:
            raise ValueError(f"seqused_k[{s}] must be 0 to {cu_seqlens_k[s + 1] - cu_seqlens_k[s]}, the rows of the sequence, got {used}")
    for s, (first, last) in enumerate(prefix or ()):
        if not 0 <= first <= last <= keys:
            raise ValueError(f"prefix[{s}] must be a range of the {keys} key rows, got {first} to {last}")


def varlen_attention_reference(
    q_THd: Tensor,
    k_KGd: Tensor,
    v_KGd: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    causal: bool = True,
    q_index: Tensor | None = None,
    seqused_k: Tensor | None = None,
    prefix: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Any:
    """One scaled_dot_product_attention a sequence. Reads the lengths on the host: on a GPU this waits for the device."""
    bounds_q, bounds_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    used = None if seqused_k is None else seqused_k.tolist()
    prefixes = None if prefix is None else prefix.tolist()
    _check_lengths(q_THd.shape[0], k_KGd.shape[0], bounds_q, bounds_k, used, prefixes)
    k_KGd, v_KGd = k_KGd.to(q_THd.dtype), v_KGd.to(q_THd.dtype)
    if scale is not None and scale < 0:  # torch's causal mask is an infinity of the wrong sign then
        q_THd, scale = -q_THd, -scale
    lengths_q = [b - a for a, b in zip(bounds_q, bounds_q[1:], strict=False)]
    # split and cat, not slices: the gradient of a slice is as large as the whole, once a sequence.
    if used is None:
        lengths_k = [b - a for a, b in zip(bounds_k, bounds_k[1:], strict=False)]
        keys, values = k_KGd.split(lengths_k), v_KGd.split(lengths_k)
    else:
        ranges = [slice(start, start + n) for start, n in zip(bounds_k, used, strict=False)]
        keys, values = tuple(k_KGd[r] for r in ranges), tuple(v_KGd[r] for r in ranges)
    places = [None] * len(lengths_q) if q_index is None else q_index.split(lengths_q)
    out: list[Tensor] = []
    lse: list[Tensor] = []
    for q, k, v, place, (first, last) in zip(
        q_THd.split(lengths_q), keys, values, places, prefixes or [(0, 0)] * len(lengths_q), strict=True
    ):
        n, shared, own = q.shape[0], last - first, k.shape[0]
        if n == 0:
            continue
        if shared:
            k, v = torch.cat([k_KGd[first:last], k]), torch.cat([v_KGd[first:last], v])
        if shared + own == 0:
            out.append(q.masked_fill(q.new_ones((), dtype=torch.bool), 0.0))
            lse.append(q.new_full(q.shape[:2], -torch.inf, dtype=torch.float32))
            continue
        whole = place is None and n == own and not shared
        mask, blind = None, None
        if causal and not whole and not (place is None and n == 1 and own):
            place = torch.arange(own - n, own, device=q.device) if place is None else place
            mask = torch.arange(shared + own, device=q.device) < shared + (place[:, None] + 1).clamp(min=0)
            blind = ~mask[:, :1]  # these rows see nothing: they get a key, so that no gradient is NaN, and are zeroed afterwards
        attended = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            k.transpose(0, 1)[None],
            v.transpose(0, 1)[None],
            attn_mask=mask if mask is None else mask | blind,
            is_causal=causal and whole and n > 1,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )[0].transpose(0, 1)
        out.append(attended if blind is None else attended.masked_fill(blind[:, :, None], 0.0))
        if return_lse:
            mask = torch.ones(n, own, dtype=torch.bool, device=q.device).tril() if causal and whole else mask
            lse.append(_lse(q, k, mask, scale))
    joined = torch.cat(out) if out else q_THd.clone()
    if not return_lse:
        return joined
    return joined, torch.cat(lse) if lse else q_THd.new_empty(q_THd.shape[:2], dtype=torch.float32)


@torch.no_grad()
def _lse(q_THd: Tensor, k_KGd: Tensor, mask_TK: Tensor | None, scale: float | None) -> Tensor:
    """fp32 [T, H], one head at a time."""
    wide = torch.promote_types(q_THd.dtype, torch.float32)
    group = q_THd.shape[1] // k_KGd.shape[1]
    columns = []
    for h in range(q_THd.shape[1]):
        scores = q_THd[:, h].to(wide) @ k_KGd[:, h // group].to(wide).T * (q_THd.shape[2] ** -0.5 if scale is None else scale)
        columns.append((scores if mask_TK is None else scores.masked_fill(~mask_TK, -torch.inf)).logsumexp(1).float())
    return torch.stack(columns, 1)


def _forward_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    causal: bool,
    q_index: Tensor | None,
    seqused_k: Tensor | None,
    prefix: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    out, lse = varlen_attention_reference(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        causal=causal,
        q_index=q_index,
        seqused_k=seqused_k,
        prefix=prefix,
        scale=scale,
        return_lse=True,
    )
    return out.contiguous(), lse


def _backward_reference(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    causal: bool,
    q_index: Tensor | None,
    seqused_k: Tensor | None,
    prefix: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The formula above, a sequence at a time: inside a custom op there is no autograd."""
    wide = torch.promote_types(q.dtype, torch.float32)
    (T, H, d), G = q.shape, k.shape[1]
    q_TGhd, grad_TGhd, out_TGhd = (x.to(wide).view(T, G, H // G, d) for x in (q, grad_out.contiguous(), out))
    grad_q, grad_k, grad_v = q_TGhd.new_zeros(q_TGhd.shape), k.new_zeros(k.shape, dtype=wide), v.new_zeros(v.shape, dtype=wide)
    bounds_q, bounds_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for s in range(len(bounds_q) - 1):
        rows = slice(bounds_q[s], bounds_q[s + 1])
        n, own = bounds_q[s + 1] - bounds_q[s], bounds_k[s + 1] - bounds_k[s] if seqused_k is None else int(seqused_k[s])
        first, last = (0, 0) if prefix is None else prefix[s].tolist()
        keys = torch.cat([torch.arange(first, last), torch.arange(bounds_k[s], bounds_k[s] + own)]).to(q.device)
        place = torch.arange(own - n, own, device=q.device) if q_index is None else q_index[rows]
        scores = torch.einsum("iGhd,jGd->Ghij", q_TGhd[rows], k[keys].to(wide)) * scale
        if causal:
            scores.masked_fill_(
                torch.arange(last - first + own, device=q.device) >= last - first + (place[:, None] + 1).clamp(min=0), -torch.inf
            )
        sums = scores.logsumexp(-1, keepdim=True)  # not lse: that is fp32
        P = (scores - sums.masked_fill(sums.isneginf(), torch.inf)).exp()
        delta = (grad_TGhd[rows] * out_TGhd[rows]).sum(-1).permute(1, 2, 0)[..., None]
        dS = P * (torch.einsum("iGhd,jGd->Ghij", grad_TGhd[rows], v[keys].to(wide)) - delta) * scale
        grad_q[rows] = torch.einsum("Ghij,jGd->iGhd", dS, k[keys].to(wide))
        grad_k.index_add_(0, keys, torch.einsum("Ghij,iGhd->jGd", dS, q_TGhd[rows]))
        grad_v.index_add_(0, keys, torch.einsum("Ghij,iGhd->jGd", P, grad_TGhd[rows]))
    return grad_q.view(T, H, d).to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)


def _rows(module: Any, x: Tensor) -> Any:
    return module.Rows(x.data_ptr(), element(x.dtype), x.stride(0), x.stride(1))


def _forward_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    causal: bool,
    q_index: Tensor | None,
    seqused_k: Tensor | None,
    prefix: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    _cpu = _native.cpu()
    (T, H, d), (K, G, _) = q.shape, k.shape
    out, lse = q.new_empty(T, H, d), q.new_empty(T, H, dtype=torch.float32)
    rows = [_rows(_cpu, x) for x in (q, k, v, out)]
    S, threads = cu_seqlens_q.shape[0] - 1, torch.get_num_threads()
    task = _cpu.AttentionTask(T, K, S, H, G, d, causal, scale, *rows, lse.data_ptr(), address(q_index), threads, registry.is_invariant())
    _cpu.attention_forward(task, cu_seqlens_q.data_ptr(), cu_seqlens_k.data_ptr(), address(seqused_k), address(prefix))
    return out, lse


def _backward_cpu(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    causal: bool,
    q_index: Tensor | None,
    seqused_k: Tensor | None,
    prefix: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    _cpu = _native.cpu()
    (T, H, d), (K, G, _) = q.shape, k.shape
    grads = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    rows = [_rows(_cpu, x) for x in (q, k, v, out)]
    S, threads = cu_seqlens_q.shape[0] - 1, torch.get_num_threads()
    task = _cpu.AttentionTask(T, K, S, H, G, d, causal, scale, *rows, lse.data_ptr(), address(q_index), threads, False)
    indices = (cu_seqlens_q.data_ptr(), cu_seqlens_k.data_ptr(), address(seqused_k), address(prefix))
    _cpu.attention_backward(task, *[_rows(_cpu, x) for x in (grad_out, *grads)], *indices)
    return grads


# Forward and backward of each implementation. The reference is here for torch.compile; elsewhere autograd sees through it.
_LAUNCHERS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "cpu": (_forward_cpu, _backward_cpu),
    "reference": (_forward_reference, _backward_reference),
    "triton": (_triton.forward, _triton.backward),
    **_others.LAUNCHERS,
}


@torch.library.custom_op("llava_fast::varlen_attention", mutates_args=())
def _varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    causal: bool,
    q_index: Tensor | None,
    seqused_k: Tensor | None,
    prefix: Tensor | None,
    scale: float,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    return _LAUNCHERS[implementation][0](q, k, v, cu_seqlens_q, cu_seqlens_k, causal, q_index, seqused_k, prefix, scale)


@_varlen_attention.register_fake
def _(q, k, v, cu_seqlens_q, cu_seqlens_k, causal, q_index, seqused_k, prefix, scale, implementation):
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)


@torch.library.custom_op("llava_fast::varlen_attention_backward", mutates_args=())
def _varlen_attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    causal: bool,
    q_index: Tensor | None,
    seqused_k: Tensor | None,
    prefix: Tensor | None,
    scale: float,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_out = grad_out if grad_out.stride(-1) == 1 else grad_out.contiguous()  # that of a sum is one number, expanded
    run = _LAUNCHERS[implementation][1]
    return run(grad_out, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, causal, q_index, seqused_k, prefix, scale)


@_varlen_attention_backward.register_fake
def _(grad_out, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, causal, q_index, seqused_k, prefix, scale, implementation):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens_q, cu_seqlens_k, causal, q_index, seqused_k, prefix, scale, implementation = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, *output, cu_seqlens_q, cu_seqlens_k, q_index, seqused_k, prefix)
    ctx.arguments = causal, scale, implementation


def _backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, q_index, seqused_k, prefix = ctx.saved_tensors
    causal, scale, implementation = ctx.arguments
    grads = _varlen_attention_backward(
        grad_out, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, causal, q_index, seqused_k, prefix, scale, implementation
    )
    return *grads, *(None,) * 8


_varlen_attention.register_autograd(_backward, setup_context=_setup_context)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
registry.register(
    "varlen_attention",
    {
        "cpu": Implementation(("cpu",), _DTYPES, lambda case: case[0] <= 256, ("llava_fast._cpu",), invariant=True),
        "reference": Implementation(),
        # Compiled, and never run on hardware: by name only until it is measured.
        "triton": Implementation(DEVICES, _DTYPES, modules=("triton",), default=False, invariant=True),
        **{
            name: Implementation(("cuda",), _others.HALVES, _others.SERVES[name], (module,), default=False)
            for name, module in _others.MODULES.items()
        },
    },
    shapes=((64, "causal grouped"), (72, "full"), (128, "causal")),
)


_WIDTHS = {torch.float64: 8, torch.float32: 4, torch.bfloat16: 2, torch.float16: 2}  # bytes of the dtypes of q, k and v


def _check(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, q_index: Tensor | None, seqused_k: Tensor | None, prefix: Tensor | None
) -> None:
    """What shapes, dtypes, strides and devices tell; the values of the lengths are checked where they are read on the host."""
    if q.dim() != 3 or k.dim() != 3 or k.shape != v.shape or q.shape[2] != k.shape[2]:
        raise ValueError(f"expected q [T, H, d], k and v [K, G, d], got {list(q.shape)}, {list(k.shape)} and {list(v.shape)}")
    H, G, d = q.shape[1], k.shape[1], q.shape[2]
    if d == 0 or G == 0 or H == 0 or H % G:
        raise ValueError(f"the {H} heads of q must be a multiple of the {G} of k and v, and d at least 1, got {d}")
    if k.dtype != v.dtype or q.dtype not in _WIDTHS or q.dtype != k.dtype and _WIDTHS.get(k.dtype, 8) >= _WIDTHS[q.dtype]:
        raise ValueError(f"k and v must have one dtype, q's or a narrower one of 16 bits or more; got {q.dtype}, {k.dtype} and {v.dtype}")
    if d > 1 and (q.stride(2) != 1 or k.stride(2) != 1 or v.stride(2) != 1):
        raise ValueError(f"the last dimension must be contiguous, got strides {q.stride()}, {k.stride()} and {v.stride()}")
    if cu_q.dtype != torch.int32 or cu_k.dtype != torch.int32 or cu_q.dim() != 1 or cu_q.shape != cu_k.shape or cu_q.shape[0] == 0:
        raise ValueError(
            f"cu_seqlens_q and cu_seqlens_k must be int32 [S + 1], got {cu_q.dtype} {list(cu_q.shape)} and {cu_k.dtype} {list(cu_k.shape)}"
        )
    S, T = cu_q.shape[0] - 1, q.shape[0]
    for name, tensor, dtype, shape in (
        ("q_index", q_index, torch.int64, (T,)),
        ("seqused_k", seqused_k, torch.int32, (S,)),
        ("prefix", prefix, torch.int32, (S, 2)),
    ):
        if tensor is not None and (tensor.dtype != dtype or tensor.shape != shape):
            raise ValueError(f"{name} must be {dtype} {list(shape)}, got {tensor.dtype} {list(tensor.shape)}")
    for tensor in (k, v, cu_q, cu_k, q_index, seqused_k, prefix):
        if tensor is not None and tensor.device != q.device:
            raise ValueError(f"all tensors must be on one device, got {q.device} and {tensor.device}")


def varlen_attention(
    q_THd: Tensor,
    k_KGd: Tensor,
    v_KGd: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    causal: bool = True,
    q_index: Tensor | None = None,
    seqused_k: Tensor | None = None,
    prefix: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Any:
    """Attention of packed rows: out [T, H, d] in q's dtype, and with return_lse also lse, fp32 [T, H] (natural logarithm).

    cu_seqlens_q, cu_seqlens_k: int32 [S+1]; sequence s has query rows cu_seqlens_q[s] : cu_seqlens_q[s+1] and own key rows
    cu_seqlens_k[s] : cu_seqlens_k[s+1], all of them or the first seqused_k[s] (int32 [S], for key rows reserved in a cache).
    q_index: int64 [T], the place of each query row among its sequence's own keys, for queries that are a subset of the rows;
    None: the queries are the last ones.  prefix: int32 [S, 2], key rows seen whole before the own keys (empty range: none).
    causal: a query sees own keys up to its place (none where that is below 0).  scale: 1 / sqrt(d) where None.
    q, k and v may be views with a contiguous last dimension: slices of one fused product.
    Scores (scale q . k) must lie within 1e30 of 0: a running maximum begins at -1e30, and what is below counts as not seen.
    A row that sees no key gives 0, and lse -inf. Differentiable in q, k and v; lse carries no gradient.
    Raises ValueError for shapes, dtypes, strides or devices that do not fit, on the CPU also for lengths that do not (a GPU does
    not wait to look at them), and for an implementation asked for by name that cannot take the call.
    """
    _check(q_THd, k_KGd, v_KGd, cu_seqlens_q, cu_seqlens_k, q_index, seqused_k, prefix)
    d = q_THd.shape[2]
    asked = "causal" if causal else "full"
    if q_THd.shape[1] != k_KGd.shape[1]:
        asked += " grouped"
    if q_THd.dtype != k_KGd.dtype:
        asked += f" {k_KGd.dtype}"
    for option, value in ((" q_index", q_index), (" seqused_k", seqused_k), (" prefix", prefix)):
        if value is not None:
            asked += option
    if return_lse:
        asked += " lse"
    name = registry.resolve_name("varlen_attention", q_THd.device.type, q_THd.dtype, (d, asked))
    if name == "reference" and not torch.compiler.is_compiling():
        options: dict[str, Any] = {"causal": causal, "q_index": q_index, "seqused_k": seqused_k, "prefix": prefix, "scale": scale}
        return varlen_attention_reference(q_THd, k_KGd, v_KGd, cu_seqlens_q, cu_seqlens_k, **options, return_lse=return_lse)
    tensors = (q_THd, k_KGd, v_KGd, cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous())
    indices = [None if tensor is None else tensor.contiguous() for tensor in (q_index, seqused_k, prefix)]
    scale = d**-0.5 if scale is None else float(scale)
    if registry.as_op(q_THd, k_KGd, v_KGd):
        out, lse = _varlen_attention(*tensors, causal, *indices, scale, name)
    else:
        out, lse = _LAUNCHERS[name][0](*tensors, causal, *indices, scale)
    return (out, lse) if return_lse else out
