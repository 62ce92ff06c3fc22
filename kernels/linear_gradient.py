"""out = A B for the backward pass of linear, in the accuracy of fp32: the gradient of x is dy W, that of W is dy^T x.

On AMX both go through tiles of bf16, each number in up to three parts, as the forward product does (kernels/linear.py), at more than
the rate of fp32 multiply-adds. An infinity on either side may come out as NaN, and of a number below 1e-33 the last parts are lost. On
every other machine torch's BLAS is as fast as ours would be.
Gradients of first order only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llava_fast.kernels import _native
from llava_fast.kernels._native import element

LEAST = 1 << 24  # multiply-adds; packing operands of fewer takes longer than torch does


def served(a: Tensor, b: Tensor, implementation: str) -> bool:
    """Whether `product` is the way to multiply matrices of these two kinds, where `implementation` was chosen for the op."""
    if implementation != "cpu" or a.device.type != "cpu" or a.dtype != torch.float32 or b.dtype not in (torch.float32, torch.bfloat16):
        return False
    return a.numel() * b.shape[1] >= LEAST and _native.cpu().isa() == "amx"


def _rows(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 and matrix.stride(0) >= matrix.shape[1] else matrix.contiguous()


def product_into(out: Tensor, a: Tensor, b_KN: Tensor, a_transposed: bool, add: bool = False) -> None:
    """out [M, N] (+)= A B for a = A [M, K], or its transpose; fp32, b_KN fp32 or bf16; out's columns are contiguous. AMX alone."""
    a, b_KN = _rows(a), _rows(b_KN)
    _native.cpu().product(
        *out.shape,
        b_KN.shape[0],
        a.data_ptr(),
        a.stride(0),
        a_transposed,
        element(b_KN.dtype),
        b_KN.data_ptr(),
        b_KN.stride(0),
        out.data_ptr(),
        out.stride(0),
        add,
        torch.get_num_threads(),
    )


@torch.library.custom_op("llava_fast::linear_gradient", mutates_args=())
def product(a: Tensor, b_KN: Tensor, a_transposed: bool) -> Tensor:
    """A B as a tensor of its own."""
    out = a.new_empty(a.shape[1 if a_transposed else 0], b_KN.shape[1])
    product_into(out, a, b_KN, a_transposed)
    return out


@product.register_fake
def _(a: Tensor, b_KN: Tensor, a_transposed: bool) -> Tensor:
    return a.new_empty(a.shape[1 if a_transposed else 0], b_KN.shape[1])


def multiply(a: Tensor, b_KN: Tensor, a_transposed: bool, implementation: str) -> Tensor:
    """A B in a's dtype: ours where `served`, else torch's."""
    if served(a, b_KN, implementation):
        return product(a, b_KN, a_transposed)
    return (a.t() if a_transposed else a) @ b_KN.to(a.dtype)
