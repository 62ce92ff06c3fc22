"""Small Triton kernels for the tests of bench/aot.py: one that is fine, and one for each fault."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from llava_fast.kernels._triton import config, jit, tl, triton


@jit
def _softmax_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * n + columns, mask=columns < n, other=-float("inf")).to(tl.float32)
    e = tl.exp(x - tl.max(x, 0))
    tl.store(out_ptr + row * n + columns, (e / tl.sum(e, 0)).to(out_ptr.dtype.element_ty), mask=columns < n)


@jit
def _product_kernel(a_ptr, b_ptr, out_ptr, K, N, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, WIDE: tl.constexpr):
    rows, columns, k = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN), tl.arange(0, BK)
    total = tl.zeros((BM, BN), dtype=tl.float32)
    for start in range(0, K, BK):
        a = tl.load(a_ptr + rows[:, None] * K + start + k[None, :])
        b = tl.load(b_ptr + (start + k)[:, None] * N + columns[None, :])
        if WIDE:
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision="ieee")
    tl.store(out_ptr + rows[:, None] * N + columns[None, :], total.to(out_ptr.dtype.element_ty))


def softmax(x: torch.Tensor, **options: int) -> None:
    _softmax_kernel[(x.shape[0],)](x, torch.empty_like(x), x.shape[1], BLOCK=triton.next_power_of_2(x.shape[1]), **options)


def product(a: torch.Tensor, b: torch.Tensor, BM: int = 64, BN: int = 64, WIDE: bool = False, **options: int) -> None:
    out, grid = a.new_empty(a.shape[0], b.shape[1]), (a.shape[0] // BM, b.shape[1] // BN)
    options = config("_product_kernel", "any", {"num_warps": 4, **options}, a.device)
    _product_kernel[grid](a, b, out, *b.shape, BM=BM, BN=BN, BK=64, WIDE=WIDE, **options)


def shipped_calls(device: str) -> Iterator[tuple[str, Callable[[], object]]]:
    x = torch.empty(4, 1024, device=device, dtype=torch.bfloat16)
    yield "softmax", lambda: softmax(x)
    a = torch.empty(128, 256, device=device, dtype=torch.bfloat16)
    yield "product", lambda: product(a, a.T.contiguous())


def faulty_calls(device: str) -> Iterator[tuple[str, Callable[[], object]]]:
    long = torch.empty(4, 16384, device=device)
    yield "spills", lambda: softmax(long, num_warps=1)
    odd = torch.empty(4, 729, device=device, dtype=torch.bfloat16)
    yield "narrow", lambda: softmax(odd)
    moved = torch.empty(4 * 1024 + 1, device=device, dtype=torch.bfloat16)[1:].view(4, 1024)
    yield "unaligned", lambda: softmax(moved)
    a = torch.empty(256, 256, device=device, dtype=torch.bfloat16)
    yield "serialised", lambda: product(a, a, 128, 256)
    yield "shared", lambda: product(a, a, 128, 128, num_stages=8, num_warps=8)
    yield "scalar", lambda: product(a, a, 32, 32, WIDE=True)
    yield "raises", lambda: product(a, a.to(torch.float32))
    yield "nothing", lambda: None
