"""Modules that hold parameters and call the ops; the stored dtype is the parameters', the arithmetic is the input's."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from llava_fast import memory
from llava_fast.kernels.activation import activation
from llava_fast.kernels.linear import Quantised, linear
from llava_fast.kernels.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm

ALIGNED = 64  # bytes: a cache line

# What is made again in the backward pass: nothing; all of a block, of which its input alone is kept; or all but its attention.
Checkpointing = Literal["none", "full", "selective"]


def run_block(block: nn.Module, checkpointing: Checkpointing, *args: Any) -> Any:
    """block(*args), its activations made again in the backward pass where they are not kept. Gradients are the same to the bit."""
    if checkpointing == "none" or not torch.is_grad_enabled():
        return block(*args)
    if checkpointing == "full":
        return checkpoint(block, *args, use_reentrant=False)
    return checkpoint(block, *args, use_reentrant=False, context_fn=partial(create_selective_checkpoint_contexts, _keep_attention))


def _keep_attention(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = "attention" in op.name() and "backward" not in op.name()  # ours, and torch's of the reference
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


class LowRank(nn.Module):
    """A linear's adapter, LoRA (arXiv 2106.09685): scale * B A dropout(x), added to the product. A [r, I], B [O, r]; B starts at 0.

    enabled: False while the model is to answer as it did without its adapters.
    """

    def __init__(self, inputs: int, outputs: int, rank: int, scale: float, dropout: float = 0.0):
        super().__init__()
        self.scale, self.dropout, self.enabled = scale, dropout, True
        self.A = nn.Parameter(torch.empty(rank, inputs))
        self.B = nn.Parameter(torch.zeros(outputs, rank))

    def forward(self, x: Tensor) -> Tensor:
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        return linear(linear(x, self.A) * self.scale, self.B)


class Linear(nn.Linear):
    """nn.Linear (so that tools that look for it, adapters among them, find it) whose weight may be narrower than its input.

    lora: an adapter of our own, None for most; see training/lora.py.
    """

    lora: LowRank | None

    def __init__(self, *args: Any, **kw: Any):
        super().__init__(*args, **kw)
        self.register_module("lora", None)

    @property
    def adapter(self) -> LowRank | None:
        """The adapter, where there is one and it counts."""
        return self.lora if self.lora is not None and self.lora.enabled else None

    def forward(self, x: Tensor, act: str | None = None) -> Tensor:
        if self.adapter is None:
            return linear(x, self.weight, self.bias, act=act)
        y = linear(x, self.weight, self.bias, residual=self.adapter(x))
        return y if act is None else activation(act)(y)


def call_linear(part: nn.Module, x: Tensor, act: str | None = None) -> Tensor:
    """act(part(x)): in one op where `part` is a linear, of ours or torch's; in two where an adapter stands in for one."""
    if isinstance(part, Linear):
        return part(x, act)
    if type(part) is nn.Linear:
        return linear(x, part.weight, part.bias, act=act)
    y = _foreign(part, x)
    return y if act is None else activation(act)(y)


def _foreign(part: nn.Module, x: Tensor) -> Tensor:
    """A module of another library, which takes its weights' dtype alone: in x's where that is the narrower one, as autocast would; else x
    (in fp32 over bf16 weights on a CPU) is narrowed for it."""
    stored = next((p.dtype for p in part.parameters() if p.is_floating_point()), x.dtype)
    if stored == x.dtype:
        return part(x)
    if x.dtype in (torch.bfloat16, torch.float16):
        with torch.autocast(x.device.type, dtype=x.dtype):
            return part(x)
    return part(x.to(stored)).to(x.dtype)


class LayerNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm of the sum, the sum)"""
        return add_layer_norm(x, residual, self.weight, self.bias, self.eps)


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """(norm of the sum, the sum)"""
        return add_rms_norm(x, residual, self.weight, self.eps)


def join(groups: Sequence[Sequence[nn.Linear]]) -> None:
    """Move the weights of one layer into one buffer; the linears of a group share their input and lie side by side.

    `joined_linear` then multiplies a group at once, and on a CPU the buffer has large pages. They stay the parameters they were, under
    their names. Nothing is done where it was done before.
    """
    weights = [[part.weight for part in group] for group in groups]
    flat = [weight for group in weights for weight in group]
    if any(isinstance(weight, Quantised) or weight.is_meta for weight in flat):
        return
    if any(_adjacent(group) is None for group in weights) or len({weight.untyped_storage().data_ptr() for weight in flat}) > 1:
        sizes = [-(-sum(weight.numel() * weight.element_size() for weight in group) // ALIGNED) * ALIGNED for group in weights]
        buffer = memory.empty((sum(sizes),), torch.uint8, flat[0].device)
        for place, parts in zip(buffer.split(sizes), weights, strict=True):
            for weight in parts:
                piece, place = place.tensor_split([weight.numel() * weight.element_size()])
                weight.data = piece.view(weight.dtype).view(weight.shape).copy_(weight.data)
    for group in groups:
        biases = [part.bias for part in group]
        if len(biases) > 1 and all(bias is not None for bias in biases) and _adjacent(biases) is None:
            for bias, piece in zip(biases, torch.cat([b.data for b in biases]).split([b.shape[0] for b in biases]), strict=True):
                bias.data = piece


def joined_linear(x: Tensor, parts: Sequence[nn.Linear]) -> Tensor:
    """[..., sum of O]: the outputs of linears that share their input, side by side; one product where `join` put them together."""
    if all(type(part) in (Linear, nn.Linear) for part in parts):  # not where another library's adapter stands in
        biased = parts[0].bias is not None
        weight, bias = _adjacent([part.weight for part in parts]), _adjacent([part.bias for part in parts]) if biased else None
        if weight is not None and (bias is not None or not biased):
            return linear(x, weight, bias, residual=_low_rank(x, parts))
    return torch.cat([call_linear(part, x) for part in parts], dim=-1)


def _low_rank(x: Tensor, parts: Sequence[nn.Linear]) -> Tensor | None:
    """What the parts' adapters add to their outputs, side by side; None where there is no adapter."""
    adapters = [getattr(part, "adapter", None) for part in parts]
    if all(adapter is None for adapter in adapters):
        return None
    outputs = [x.new_zeros(*x.shape[:-1], part.out_features) if a is None else a(x) for part, a in zip(parts, adapters, strict=True)]
    return torch.cat(outputs, dim=-1)


def _adjacent(tensors: Sequence[Any]) -> Any:
    """One tensor over contiguous ones that lie one after the other in one storage; None where they do not."""
    first = tensors[0]
    if torch.compiler.is_compiling():
        return None
    if isinstance(first, Quantised):
        weight, scale = _adjacent([part.weight for part in tensors]), _adjacent([part.scale for part in tensors])
        return None if weight is None or scale is None else Quantised(weight, scale, first.kind, first.group)
    place, rows = first.data_ptr(), 0
    for tensor in tensors:
        if not tensor.is_contiguous() or tensor.data_ptr() != place or tensor.dtype != first.dtype:
            return None
        place, rows = place + tensor.numel() * tensor.element_size(), rows + tensor.shape[0]
    if first.untyped_storage().data_ptr() != tensors[-1].untyped_storage().data_ptr():
        return None
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return _Adjacent.apply(rows, *tensors)
    return _over(first, rows)


def _over(first: Tensor, rows: int) -> Tensor:
    return first.detach().as_strided((rows, *first.shape[1:]), first.stride())


class _Adjacent(torch.autograd.Function):
    """The view over all parts; its gradient is cut where the parts begin."""

    @staticmethod
    def forward(ctx: Any, rows: int, *tensors: Tensor) -> Tensor:
        ctx.rows = [tensor.shape[0] for tensor in tensors]
        # The product keeps the view, which does not count writes to the parts: backward asks for these only to have autograd raise.
        ctx.save_for_backward(*tensors)
        return _over(tensors[0], rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        _ = ctx.saved_tensors
        (grad,) = grads
        return None, *grad.split(ctx.rows)
