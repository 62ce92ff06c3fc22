"""What the machine at hand can do at best: the figures that every benchmark is held against. `python -m llava_fast.limits`

read, copy: bytes a second from and to main or device memory, out of cache (a copy counts both ways; on a CPU written around the caches,
or as torch copies where that is faster). gemm: square products through torch, in operations a second (two a multiply-add). fma: fp32
multiply-adds in registers; tiles: products of bf16 tiles from L1 (AMX); both on the CPU only.
Each is the best of several runs: a limit is what was reached once.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache

import torch

from llava_fast import memory

# Well past the last-level cache, whatever a virtual machine says of it: of 480 MB by its word, reading the same array over and over does
# 130 GB/s up to 2 MB, 56 from 8 to 64 MB, 24 at 128 and 256 MB, and 22 from 512 MB to 2 GB; copying within it likewise (2026-11, two
# cores).
CPU_BYTES, CUDA_BYTES = 1 << 29, 1 << 32
CPU_GEMM, CUDA_GEMM = 1024, 8192


@dataclass(frozen=True)
class Limits:
    """In units of 1e9: bytes a second, operations a second. None: not measured on this device."""

    device: str
    threads: int
    read_gbs: float
    copy_gbs: float
    gemm_fp32_gflops: float
    gemm_bf16_gflops: float
    fma_fp32_gflops: float | None
    tiles_bf16_gflops: float | None = None

    def products_gflops(self, weight: torch.dtype) -> float:
        """The best rate of products of fp32 rows with weights of this dtype, to fp32's accuracy: of multiply-adds, or, where a CPU has
        tiles, of as many products of bf16 parts as that takes: an fp32 is three of them, an fp16 two, what has 8 bits or fewer one, and
        the products that are left out are those below 2^-24. On a GPU, of its bf16 products."""
        if self.fma_fp32_gflops is None:
            return self.gemm_bf16_gflops
        return max(self.fma_fp32_gflops, (self.tiles_bf16_gflops or 0.0) / {torch.float32: 6, torch.float16: 5}.get(weight, 3))


@cache
def _little(threads: int) -> torch.Tensor:
    with torch.inference_mode(False):  # kept for calls outside of it too
        return torch.zeros(threads << 17)


def seconds(run: Callable[[], object], device: str = "cpu") -> float:
    """Wall seconds of one call, the device's work included.

    On the CPU the other threads are awake. They fall asleep while a function of one thread runs, and whatever is timed after it would be
    charged with waking them: a copy of 32 MB then does 13 GB/s instead of 16.
    """
    if device == "cuda":
        torch.cuda.synchronize()
    else:
        _little(torch.get_num_threads()).add_(1)
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def best(run: Callable[[], object], device: str, runs: int = 5) -> float:
    run()
    return min(seconds(run, device) for _ in range(runs))


def _bandwidths(device: str) -> tuple[float, float]:
    size = CPU_BYTES if device == "cpu" else CUDA_BYTES
    # On the CPU in large pages, as the weights and caches are: small ones cost reading a third of its speed.
    whole = memory.empty((size // 4,), torch.float32, torch.device(device))
    whole.fill_(1)
    target, source = whole.chunk(2)
    copies: list[Callable[[], object]] = [lambda: target.copy_(source)]
    if device == "cpu":
        from llava_fast import _cpu

        # torch's own reads each line before it writes to it, and moves three bytes for two: 19 GB/s where our kernels did 31.
        copies.append(lambda: _cpu.copy_past_caches(target.data_ptr(), source.data_ptr(), source.nbytes, torch.get_num_threads()))
    return size / best(lambda: torch.sum(whole), device, 15), max(size / best(copy, device, 15) for copy in copies)


def _gemm(dtype: torch.dtype, device: str) -> float:
    n = CPU_GEMM if device == "cpu" else CUDA_GEMM
    a, b = torch.randn(n, n, device=device).to(dtype), torch.randn(n, n, device=device).to(dtype)
    return 2 * n**3 / best(lambda: a @ b, device)


def probe(device: str = "cpu") -> Limits:
    """Measure the limits of 'cpu' (on torch's threads) or 'cuda'; about three seconds."""
    read, copy = _bandwidths(device)
    fp32, bf16 = _gemm(torch.float32, device), _gemm(torch.bfloat16, device)
    fma = tiles = None
    threads = torch.get_num_threads()
    if device == "cpu":
        from llava_fast import _cpu

        fma = max(_cpu.fma_rate(threads) for _ in range(3)) / 1e9
        tiles = max(_cpu.tile_rate(threads) for _ in range(3)) / 1e9 or None
    return Limits(device, threads, read / 1e9, copy / 1e9, fp32 / 1e9, bf16 / 1e9, fma, tiles)


def describe(limits: Limits) -> str:
    """One line, for the head of a benchmark's output."""
    fma = "" if limits.fma_fp32_gflops is None else f", fp32 FMA {limits.fma_fp32_gflops:,.0f} GFLOP/s"
    fma += "" if limits.tiles_bf16_gflops is None else f", bf16 tiles {limits.tiles_bf16_gflops:,.0f} GFLOP/s"
    return (
        f"limits of this {limits.device} ({limits.threads} threads): read {limits.read_gbs:.1f} GB/s, copy {limits.copy_gbs:.1f} GB/s, "
        f"products fp32 {limits.gemm_fp32_gflops:,.0f} and bf16 {limits.gemm_bf16_gflops:,.0f} GFLOP/s{fma}"
    )


if __name__ == "__main__":
    for name in ["cpu"] + ["cuda"] * torch.cuda.is_available():
        found = probe(name)
        print(describe(found))
        print(json.dumps(asdict(found)))
