"""Attention of other libraries behind the launchers of varlen_attention: flash_attn, xformers, and torch's own copy of FlashAttention-2.

All three take bf16 and fp16 on CUDA, d a multiple of 8 up to 256, and align the causal mask as we do: the queries are the last rows.
They do not know q_index or a prefix, nor seqused_k with a gradient, nor k and v narrower than q: `serves` refuses such calls.

Versions: flash_attn 2.7 and later (lse [H, T]; 2.1 is where the causal mask moved to the bottom right), torch 2.11 and later,
xformers 0.0.28 and later (lse [1, H, T] for packed rows).

The length of the longest sequence is a number on the host there, and only an upper bound is needed: we pass the number of rows, and
the device is not waited for. The bound sets the grid (rows / 64 or / 128 programs a head and sequence, of which those past a
sequence's end return at once); buffers depend on the number of rows alone. 64 views of 729 rows are 370,000 programs instead of
6,100. xformers wants lists of lengths instead, so it does wait, and refuses a causal sequence of fewer keys than queries.

Gradients are the same in every run with flash_attn (deterministic=True), with torch where torch.use_deterministic_algorithms is on.
In their lse a row that sees no key has +infinity, so that its weights come out 0 in the backward pass; ours is -infinity.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

HALVES = (torch.bfloat16, torch.float16)


def serves(case: tuple[int, str]) -> bool:
    """Whether flash_attn and torch take a shape class."""
    d, asked = case
    return d % 8 == 0 and d <= 256 and not set(asked.split()) - {"causal", "full", "grouped", "lse"}


def serves_xformers(case: tuple[int, str]) -> bool:
    """Grouped heads have no backward pass there."""
    return serves(case) and "grouped" not in case[1].split()


def _flash_attn() -> Any:
    return importlib.import_module("flash_attn.flash_attn_interface")


def _forward_flash_attn(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    options = dict(dropout_p=0.0, softmax_scale=scale, causal=causal)
    out, lse, *_ = _flash_attn()._flash_attn_varlen_forward(q, k, v, cu_q, cu_k, q.shape[0], k.shape[0], **options)
    return out, lse


def _backward_flash_attn(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_q: Tensor, cu_k: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    grads = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    options: dict[str, Any] = dict(dropout_p=0.0, softmax_scale=scale, causal=causal, window_size_left=-1, window_size_right=-1)
    options |= dict(softcap=0.0, alibi_slopes=None, deterministic=True)
    lengths = cu_q, cu_k, q.shape[0], k.shape[0]
    _flash_attn()._flash_attn_varlen_backward(grad_out, q, k, v, out, lse, *grads, *lengths, **options)
    return grads


# What torch.nn.attention.varlen.varlen_attn calls in 2.11 and in 2.13; its own signature differs between the two.
def _forward_torch(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    lengths = cu_q, cu_k, q.shape[0], k.shape[0]
    out, lse, *_ = torch.ops.aten._flash_attention_forward(q, k, v, *lengths, 0.0, causal, False, scale=scale)
    return out, lse


def _backward_torch(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_q: Tensor, cu_k: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    lengths, no_dropout = (cu_q, cu_k, q.shape[0], k.shape[0]), torch.zeros(2, dtype=torch.uint64, device=q.device)
    call = grad_out, q, k, v, out, lse, *lengths, 0.0, causal, no_dropout, q.new_empty(0)
    return torch.ops.aten._flash_attention_backward(*call, scale=scale)


def _xformers(cu_q: Tensor, cu_k: Tensor, causal: bool) -> tuple[Any, Any]:
    fmha = importlib.import_module("xformers.ops.fmha")
    masks = importlib.import_module("xformers.ops.fmha.attn_bias")
    mask = masks.BlockDiagonalCausalFromBottomRightMask if causal else masks.BlockDiagonalMask
    return fmha, mask.from_seqlens(cu_q.diff().tolist(), cu_k.diff().tolist())


# The operator is named, because xformers' other operators may pad lse to the longest sequence.
def _forward_xformers(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    fmha, mask = _xformers(cu_q, cu_k, causal)
    call = dict(attn_bias=mask, scale=scale, op=fmha.flash.FwOp)
    out, lse = fmha.memory_efficient_attention_forward_requires_grad(q[None], k[None], v[None], **call)
    return out[0], lse[0]


def _backward_xformers(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_q: Tensor, cu_k: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    fmha, mask = _xformers(cu_q, cu_k, causal)
    tensors = (x[None] for x in (grad_out, out, lse, q, k, v))
    dq, dk, dv = fmha.memory_efficient_attention_backward(*tensors, attn_bias=mask, scale=scale, op=fmha.flash.BwOp)
    return dq[0], dk[0], dv[0]


def _launchers(forward: Callable[..., Any], backward: Callable[..., Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The pair with the interface of varlen_attention's _LAUNCHERS; q_index, seqused_k and prefix are None."""

    def run(q, k, v, cu_q, cu_k, causal, q_index, seqused_k, prefix, scale):
        if scale < 0:
            raise ValueError(f"scale must not be negative in other libraries' attention, got {scale}")
        if q.shape[0] == 0 or k.shape[0] == 0:
            return q.new_zeros(q.shape), q.new_full(q.shape[:2], -torch.inf, dtype=torch.float32)
        out, lse_HT = forward(q, k, v, cu_q, cu_k, causal, scale)
        return out.contiguous(), lse_HT.masked_fill(lse_HT == torch.inf, -torch.inf).T.contiguous()

    def run_backward(grad_out, q, k, v, out, lse_TH, cu_q, cu_k, causal, q_index, seqused_k, prefix, scale):
        if q.shape[0] == 0 or k.shape[0] == 0:
            return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
        lse_HT = lse_TH.masked_fill(lse_TH == -torch.inf, torch.inf).T.contiguous()
        grads = backward(grad_out.contiguous(), q, k, v, out, lse_HT, cu_q, cu_k, causal, scale)
        return tuple(grad.contiguous() for grad in grads)

    return run, run_backward


LAUNCHERS = {
    "flash_attn": _launchers(_forward_flash_attn, _backward_flash_attn),
    "torch": _launchers(_forward_torch, _backward_torch),
    "xformers": _launchers(_forward_xformers, _backward_xformers),
}
MODULES = {"flash_attn": "flash_attn", "torch": "torch.nn.attention.varlen", "xformers": "xformers.ops.fmha"}
SERVES = {"flash_attn": serves, "torch": serves, "xformers": serves_xformers}
