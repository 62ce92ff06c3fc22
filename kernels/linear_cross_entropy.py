"""Cross-entropy of a linear head over label rows, with at most one chunk of logits alive.

    loss_l = logsumexp_v(h_l . w_v) - h_l . w_{label_l}

Shape letters: L label rows, D width, V vocabulary. Products in the hidden rows' dtype; logits, sums and the accumulated gradient
of the weight in fp32 (fp64 for fp64 inputs). The backward multiplies again instead of keeping logits: at V = 152000 a row of them
is 0.6 MB.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llava_fast.kernels.linear import linear

CHUNK_LOGITS = 1 << 26  # logits alive at a time: 256 MiB in fp32


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_LD: Tensor, weight_VD: Tensor, labels_L: Tensor) -> Tensor:
        wide = _wide(hidden_LD.dtype)
        rows = max(1, CHUNK_LOGITS // weight_VD.shape[0])
        lse_L = hidden_LD.new_empty(hidden_LD.shape[0], dtype=wide)
        loss_L = torch.empty_like(lse_L)
        for start in range(0, hidden_LD.shape[0], rows):
            chunk = slice(start, start + rows)
            logits = linear(hidden_LD[chunk], weight_VD).to(wide)
            lse_L[chunk] = logits.logsumexp(-1)
            loss_L[chunk] = lse_L[chunk] - logits.gather(1, labels_L[chunk, None])[:, 0]
        ctx.save_for_backward(hidden_LD, weight_VD, labels_L, lse_L)
        ctx.rows = rows
        return loss_L

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (grad_L,) = grads
        hidden_LD, weight_VD, labels_L, lse_L = ctx.saved_tensors
        wide = lse_L.dtype
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden_LD) if need_hidden else None
        grad_weight = torch.zeros_like(weight_VD, dtype=wide) if need_weight else None
        for start in range(0, hidden_LD.shape[0], ctx.rows):
            chunk = slice(start, start + ctx.rows)
            d_logits = (linear(hidden_LD[chunk], weight_VD).to(wide) - lse_L[chunk, None]).exp_()
            d_logits.scatter_add_(1, labels_L[chunk, None], -torch.ones_like(lse_L[chunk, None]))
            d_logits *= grad_L[chunk, None]
            if grad_hidden is not None:
                grad_hidden[chunk] = d_logits.to(hidden_LD.dtype) @ weight_VD.to(hidden_LD.dtype)
            if grad_weight is not None:
                grad_weight.addmm_(d_logits.T, hidden_LD[chunk].to(wide))
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight_VD.dtype), None


def linear_cross_entropy_reference(hidden_LD: Tensor, weight_VD: Tensor, labels_L: Tensor) -> Tensor:
    """All logits at once."""
    logits = linear(hidden_LD, weight_VD).to(_wide(hidden_LD.dtype))
    return torch.nn.functional.cross_entropy(logits, labels_L, reduction="none")


def linear_cross_entropy(hidden_LD: Tensor, weight_VD: Tensor, labels_L: Tensor) -> Tensor:
    """-log p(label) for each row: hidden [L, D], weight [V, D], labels int64 [L] -> fp32 [L] (fp64 for fp64)."""
    return _LinearCrossEntropy.apply(hidden_LD, weight_VD, labels_L)
