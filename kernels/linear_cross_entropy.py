"""Cross-entropy of a linear head over label rows, with at most one chunk of logits alive.

    z = h_l W^T,  lse = logsumexp(z),  loss_l = lse - (1 - s) z[label_l] - s mean(z) + c lse^2
    d loss_l / d z_v = (1 + 2 c lse) exp(z_v - lse) - (1 - s) [v = label_l] - s / V

with s = label_smoothing (torch's) and c = z_loss (PaLM, arXiv 2204.02311, section 5). A chunk of rows is multiplied, and one pass
over its logits gives the losses and puts the gradients in the logits' place, for the two products of the backward pass.
Where the caller wants one number, the gradient of every row is the same factor: gradients are made in the forward pass, three
products in all. Losses row by row may come back with any gradient each: their backward pass multiplies again, four products.

Shape letters: L label rows, D width, V vocabulary. Products in the hidden rows' dtype, as are the logits; everything within a row
and the gradient of the weight is accumulated in fp32 (fp64 for fp64). Gradients of first order only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llava_fast import memory
from llava_fast.kernels import _native, linear_gradient, registry
from llava_fast.kernels._linear_cross_entropy_triton import candidates, rows_triton, shipped_calls  # noqa: F401 (two of them for bench/)
from llava_fast.kernels._native import address, element
from llava_fast.kernels._triton import DEVICES
from llava_fast.kernels.linear import linear
from llava_fast.kernels.registry import Implementation

# Bytes of logits alive. On a GPU 4,096 rows of 152,000 in bf16, so that the products run at full speed; on a CPU 440 rows in fp32.
CHUNK_BYTES = {"cuda": 1280 << 20, "cpu": 256 << 20}
BLOCK_BYTES = 64 << 20  # of a weight that is widened for the gradient of the hidden rows


# The pass over a chunk of logits [rows, V]: writes loss (None: not wanted, lse is known) and lse, and with `gradients` turns the
# logits into their gradients times grad (by row), or times scale where grad is None.
def _rows_cpu(
    logits: Tensor,
    labels: Tensor,
    loss: Tensor | None,
    lse: Tensor,
    grad: Tensor | None,
    scale: float,
    smoothing: float,
    z_loss: float,
    gradients: bool,
) -> None:
    pointers = [address(tensor) for tensor in (logits, labels, loss, lse, grad)]
    _native.cpu().cross_entropy(
        element(logits.dtype), *logits.shape, *pointers, scale, smoothing, z_loss, gradients, torch.get_num_threads()
    )


def _rows_torch(
    logits: Tensor,
    labels: Tensor,
    loss: Tensor | None,
    lse: Tensor,
    grad: Tensor | None,
    scale: float,
    smoothing: float,
    z_loss: float,
    gradients: bool,
) -> None:
    wide, chosen = logits.to(lse.dtype), labels[:, None]
    if loss is not None:
        torch.logsumexp(wide, -1, out=lse)
        target = (1 - smoothing) * wide.gather(1, chosen)[:, 0]
        if smoothing:
            target += smoothing * wide.mean(-1)
        loss.copy_(lse - target + z_loss * lse.square())
    if gradients:
        wide.sub_(lse[:, None]).exp_().mul_((1 + 2 * z_loss * lse)[:, None])
        if smoothing:
            wide.sub_(smoothing / wide.shape[1])
        wide.scatter_add_(1, chosen, wide.new_full((), smoothing - 1).expand_as(chosen))
        logits.copy_(wide.mul_(scale if grad is None else grad[:, None]))


_ROWS: dict[str, Callable[..., None]] = {"triton": rows_triton, "cpu": _rows_cpu, "torch": _rows_torch}


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _chunks(hidden_LD: Tensor, V: int) -> Iterator[slice]:
    """Even ones, of a multiple of 128 rows where there are several."""
    L = hidden_LD.shape[0]
    most = max(1, CHUNK_BYTES.get(hidden_LD.device.type, CHUNK_BYTES["cpu"]) // (V * hidden_LD.element_size()))
    rows = -(-L // max(1, -(-L // most)))
    rows = min(most, -(-rows // 128) * 128) if rows < L else L
    for start in range(0, L, max(1, rows)):
        yield slice(start, min(L, start + rows))


class _Gradients:
    """grad_hidden [L, D] and grad_weight [V, D], added up chunk by chunk; [0] for one that nobody wants."""

    def __init__(self, hidden_LD: Tensor, weight_VD: Tensor, need_hidden: bool, need_weight: bool, implementation: str):
        self.hidden_LD, self.weight_VD, self.implementation = hidden_LD, weight_VD, implementation
        self.grad_hidden = torch.empty_like(hidden_LD) if need_hidden else hidden_LD.new_empty(0)
        # In large pages: a table of 622 MB has 152,000 small ones, which are new with every step.
        shape, device = tuple(weight_VD.shape), weight_VD.device
        self.total = memory.empty(shape, _wide(hidden_LD.dtype), device) if need_weight else None
        if self.total is not None and hidden_LD.shape[0] == 0:
            self.total.zero_()

    def add(self, d_logits: Tensor, chunk: slice) -> None:
        hidden, weight, dtype = self.hidden_LD[chunk], self.weight_VD, d_logits.dtype
        if self.grad_hidden.dim() == 2 and linear_gradient.served(d_logits, weight, self.implementation):
            linear_gradient.product_into(self.grad_hidden[chunk], d_logits, weight, a_transposed=False)
        elif self.grad_hidden.dim() == 2 and weight.dtype == dtype:
            torch.mm(d_logits, weight, out=self.grad_hidden[chunk])
        elif self.grad_hidden.dim() == 2:
            out, rows = self.grad_hidden[chunk], max(1, BLOCK_BYTES // (weight.shape[1] * d_logits.element_size()))
            for start in range(0, weight.shape[0], rows):
                block = slice(start, start + rows)
                torch.addmm(out, d_logits[:, block], weight[block].to(dtype), beta=int(start > 0), out=out)
        if self.total is not None:
            beta = int(chunk.start > 0)  # the first chunk overwrites what the memory held
            if linear_gradient.served(d_logits, hidden, self.implementation):
                linear_gradient.product_into(self.total, d_logits, hidden, a_transposed=True, add=chunk.start > 0)
            elif dtype == self.total.dtype:
                torch.addmm(self.total, d_logits.T, hidden, beta=beta, out=self.total)
            elif d_logits.is_cuda:
                torch.addmm(self.total, d_logits.T, hidden, out_dtype=self.total.dtype, beta=beta, out=self.total)
            else:
                torch.addmm(self.total, d_logits.T.to(self.total.dtype), hidden.to(self.total.dtype), beta=beta, out=self.total)

    def weight(self) -> Tensor:
        return self.weight_VD.new_empty(0) if self.total is None else self.total.to(self.weight_VD.dtype)


def _run(
    hidden_LD: Tensor,
    weight_VD: Tensor,
    labels_L: Tensor,
    smoothing: float,
    z_loss: float,
    scale: float,
    need_hidden: bool,
    need_weight: bool,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses and lse by row, and the gradients of scale * (their sum)."""
    hidden_LD, weight_VD, labels_L = hidden_LD.contiguous(), weight_VD.contiguous(), labels_L.contiguous()
    loss_L = hidden_LD.new_empty(hidden_LD.shape[0], dtype=_wide(hidden_LD.dtype))
    lse_L, gradients = torch.empty_like(loss_L), _Gradients(hidden_LD, weight_VD, need_hidden, need_weight, implementation)
    rows, needed = _ROWS[implementation], need_hidden or need_weight
    for chunk in _chunks(hidden_LD, weight_VD.shape[0]):
        logits = linear(hidden_LD[chunk], weight_VD)
        rows(logits, labels_L[chunk], loss_L[chunk], lse_L[chunk], None, scale, smoothing, z_loss, needed)
        if needed:
            gradients.add(logits, chunk)
        del logits  # before the next chunk's are made
    return loss_L, lse_L, gradients.grad_hidden, gradients.weight()


@torch.library.custom_op("llava_fast::linear_cross_entropy", mutates_args=())
def _losses(
    hidden_LD: Tensor, weight_VD: Tensor, labels_L: Tensor, smoothing: float, z_loss: float, implementation: str
) -> tuple[Tensor, Tensor]:
    return _run(hidden_LD, weight_VD, labels_L, smoothing, z_loss, 1.0, False, False, implementation)[:2]


@_losses.register_fake
def _(
    hidden_LD: Tensor, weight_VD: Tensor, labels_L: Tensor, smoothing: float, z_loss: float, implementation: str
) -> tuple[Tensor, Tensor]:
    loss_L = hidden_LD.new_empty(hidden_LD.shape[0], dtype=_wide(hidden_LD.dtype))
    return loss_L, torch.empty_like(loss_L)


@torch.library.custom_op("llava_fast::linear_cross_entropy_backward", mutates_args=())
def _losses_backward(
    grad_L: Tensor,
    hidden_LD: Tensor,
    weight_VD: Tensor,
    labels_L: Tensor,
    lse_L: Tensor,
    smoothing: float,
    z_loss: float,
    need_hidden: bool,
    need_weight: bool,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    hidden_LD, weight_VD, labels_L, grad_L = hidden_LD.contiguous(), weight_VD.contiguous(), labels_L.contiguous(), grad_L.contiguous()
    gradients, rows = _Gradients(hidden_LD, weight_VD, need_hidden, need_weight, implementation), _ROWS[implementation]
    for chunk in _chunks(hidden_LD, weight_VD.shape[0]):
        logits = linear(hidden_LD[chunk], weight_VD)
        rows(logits, labels_L[chunk], None, lse_L[chunk], grad_L[chunk], 1.0, smoothing, z_loss, True)
        gradients.add(logits, chunk)
        del logits
    return gradients.grad_hidden, gradients.weight()


@_losses_backward.register_fake
def _(
    grad_L: Tensor,
    hidden_LD: Tensor,
    weight_VD: Tensor,
    labels_L: Tensor,
    lse_L: Tensor,
    smoothing: float,
    z_loss: float,
    need_hidden: bool,
    need_weight: bool,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    return _fake_gradients(hidden_LD, weight_VD, need_hidden, need_weight)


def _fake_gradients(hidden_LD: Tensor, weight_VD: Tensor, need_hidden: bool, need_weight: bool) -> tuple[Tensor, Tensor]:
    hidden = hidden_LD.new_empty(hidden_LD.shape if need_hidden else (0,))
    return hidden, weight_VD.new_empty(weight_VD.shape if need_weight else (0,))


def _losses_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    hidden_LD, weight_VD, labels_L, *ctx.arguments = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden_LD, weight_VD, labels_L, output[1])


def _losses_grad(ctx: Any, grad_L: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_L is None:
        return (None,) * 6
    smoothing, z_loss, implementation = ctx.arguments
    need = tuple(ctx.needs_input_grad[:2])
    grads = _losses_backward(grad_L, *ctx.saved_tensors, smoothing, z_loss, *need, implementation)
    return *(grad if needed else None for grad, needed in zip(grads, need, strict=True)), None, None, None, None


_losses.register_autograd(_losses_grad, setup_context=_losses_context)


@torch.library.custom_op("llava_fast::linear_cross_entropy_total", mutates_args=())
def _total(
    hidden_LD: Tensor,
    weight_VD: Tensor,
    labels_L: Tensor,
    smoothing: float,
    z_loss: float,
    scale: float,
    need_hidden: bool,
    need_weight: bool,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    loss_L, _, grad_hidden, grad_weight = _run(
        hidden_LD, weight_VD, labels_L, smoothing, z_loss, scale, need_hidden, need_weight, implementation
    )
    return loss_L.sum() * scale, grad_hidden, grad_weight


@_total.register_fake
def _(
    hidden_LD: Tensor,
    weight_VD: Tensor,
    labels_L: Tensor,
    smoothing: float,
    z_loss: float,
    scale: float,
    need_hidden: bool,
    need_weight: bool,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return hidden_LD.new_empty((), dtype=_wide(hidden_LD.dtype)), *_fake_gradients(hidden_LD, weight_VD, need_hidden, need_weight)


def _total_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # zeros for the gradients' gradients: 622 MB at V = 152000, D = 1024
    ctx.need = inputs[6:8]
    ctx.save_for_backward(*output[1:])


def _total_grad(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 9
    # In place where the graph dies with this pass (0.6 GB less at V = 152000, D = 1024); the traced tensors of torch.compile are no Tensor.
    last = type(grad) is Tensor and not torch._C._autograd._get_current_graph_task_keep_graph()
    as_made = last and grad.device.type == "cpu" and bool(grad == 1)  # a pass over the table takes 30 ms; a GPU would wait for the answer
    grads: list[Tensor | None] = []
    for saved, needed in zip(ctx.saved_tensors, ctx.need, strict=True):
        factor = grad.to(saved.dtype)
        grads.append((saved if as_made else saved.mul_(factor) if last else saved * factor) if needed else None)
    return *grads, None, None, None, None, None, None, None


_total.register_autograd(_total_grad, setup_context=_total_context)


def linear_cross_entropy_reference(
    hidden_LD: Tensor, weight_VD: Tensor, labels_L: Tensor, smoothing: float = 0.0, z_loss: float = 0.0, scale: float | None = None
) -> Tensor:
    """All logits at once: losses [L], or scale * (their sum)."""
    logits = linear(hidden_LD, weight_VD).to(_wide(hidden_LD.dtype))
    loss_L = F.cross_entropy(logits, labels_L, reduction="none", label_smoothing=smoothing)
    if z_loss:
        loss_L = loss_L + z_loss * logits.logsumexp(-1).square()
    return loss_L if scale is None else loss_L.sum() * scale


def _run_named(
    implementation: str, hidden_LD: Tensor, weight_VD: Tensor, labels_L: Tensor, smoothing: float, z_loss: float, scale: float | None
) -> Tensor:
    if implementation == "reference":
        return linear_cross_entropy_reference(hidden_LD, weight_VD, labels_L, smoothing, z_loss, scale)
    if scale is not None:
        need_hidden, need_weight = (torch.is_grad_enabled() and t.requires_grad for t in (hidden_LD, weight_VD))
        return _total(hidden_LD, weight_VD, labels_L, smoothing, z_loss, scale, need_hidden, need_weight, implementation)[0]
    return _losses(hidden_LD, weight_VD, labels_L, smoothing, z_loss, implementation)[0]


_NARROW = (torch.float32, torch.bfloat16, torch.float16)
registry.register(
    "linear_cross_entropy",
    {
        "cpu": Implementation(("cpu",), _NARROW, modules=("llava_fast._cpu",)),
        "torch": Implementation(),
        "reference": Implementation(),
        # Never run on hardware: by name only until it is measured.
        "triton": Implementation(DEVICES, _NARROW, modules=("triton",), default=False),
    },
)


def linear_cross_entropy(
    hidden_LD: Tensor,
    weight_VD: Tensor,
    labels_L: Tensor,
    *,
    reduction: str = "none",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    label_seq: Tensor | None = None,
    sequences: int | None = None,
) -> Tensor:
    """-log p(label) of each row, with its smoothing and z-loss; fp32 (fp64 for fp64).

    hidden [L, D] and weight [V, D] floating, of dtypes that may differ; labels int64 [L], 0 to V - 1. reduction 'none' -> [L];
    'sum' and 'mean' -> []; 'sequence' -> [sequences], the sum of log-probabilities (not losses) by sequence, label_seq int64 [L]
    saying whose each row is (on a GPU, which does not wait to look, a row of no sequence counts nowhere). Raises ValueError for what does
    not fit, on the CPU also for a label_seq outside 0 to sequences - 1; for a label outside the vocabulary too in the C++ kernel, where
    torch's ops raise their own error on the CPU and the Triton kernel makes that row's loss NaN.
    """
    if hidden_LD.dim() != 2 or weight_VD.dim() != 2 or hidden_LD.shape[1] != weight_VD.shape[1]:
        raise ValueError(f"expected hidden rows [L, D] and a weight [V, D], got {list(hidden_LD.shape)} and {list(weight_VD.shape)}")
    if labels_L.shape != hidden_LD.shape[:1] or labels_L.dtype != torch.int64:
        raise ValueError(f"expected int64 labels [{hidden_LD.shape[0]}], got {labels_L.dtype} {list(labels_L.shape)}")
    if weight_VD.device != hidden_LD.device or labels_L.device != hidden_LD.device:
        raise ValueError(f"all tensors must be on one device, got {hidden_LD.device}, {weight_VD.device} and {labels_L.device}")
    if reduction not in ("none", "sum", "mean", "sequence"):
        raise ValueError(f"reduction must be none, sum, mean or sequence, got {reduction!r}")
    if not 0 <= label_smoothing < 1 or z_loss < 0:
        raise ValueError(f"expected 0 <= label_smoothing < 1 and z_loss >= 0, got {label_smoothing} and {z_loss}")
    run = partial(_run_named, registry.resolve_name("linear_cross_entropy", hidden_LD.device.type, hidden_LD.dtype))
    if reduction == "sequence":
        if label_seq is None or sequences is None or label_seq.shape != labels_L.shape or label_smoothing or z_loss:
            shape = None if label_seq is None else list(label_seq.shape)
            raise ValueError(
                "log-probabilities by sequence need label_seq of the labels' shape and sequences, and neither smoothing nor z-loss; "
                f"got {shape} for {list(labels_L.shape)}, {sequences}, {label_smoothing}, {z_loss}"
            )
        if label_seq.dtype != torch.int64 or label_seq.device != labels_L.device:
            raise ValueError(f"expected int64 label_seq on {labels_L.device}, got {label_seq.dtype} on {label_seq.device}")
        if label_seq.device.type == "cpu" and label_seq.numel() and not torch.compiler.is_compiling():
            low, high = (int(n) for n in label_seq.aminmax())
            if low < 0 or high >= sequences:
                raise ValueError(f"label_seq must be 0 to {sequences - 1}, got {low} to {high}")
        loss_L = run(hidden_LD, weight_VD, labels_L, 0.0, 0.0, None)
        # A sum over a masked [sequences, L], at most a few MB: index_add uses atomics on a GPU, in no fixed order.
        own = label_seq == torch.arange(sequences, device=label_seq.device)[:, None]
        return -torch.where(own, loss_L, 0.0).sum(1)
    if label_seq is not None or sequences is not None:
        given = "label_seq" if label_seq is not None else "sequences"
        raise ValueError(f"only reduction 'sequence' takes label_seq and sequences, got {given} with {reduction!r}")
    L = hidden_LD.shape[0]
    scale = None if reduction == "none" else 1.0 if reduction == "sum" else 1.0 / L if L else float("nan")
    return run(hidden_LD, weight_VD, labels_L, label_smoothing, z_loss, scale)
