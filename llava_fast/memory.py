"""Memory on the CPU: an allocator that keeps what is freed, and large pages for what is read again with every token.

Page faults are a fifth of the time to the first token, and the misses of the address cache a third of a token's.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import sys
import weakref
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # malloc.h
MAPS = 65536  # glibc's own M_MMAP_MAX
KEPT = 1 << 30  # bytes of freed memory that stay with the process
LARGE_PAGE = 2 << 20
MADV_POPULATE_WRITE = 23  # linux/mman.h, since 5.14
LARGEST_ON_HEAP = 32 << 20  # the most that glibc takes
# Maps of `empty` whose tensors are gone, the last freed at the end; None outside `kept_memory`. Two: the gradient of a table that is made
# anew with every row of a step, and the sum that they are added to.
_spares: deque[mmap.mmap] | None = None


def keep_freed_memory() -> bool:
    """For the whole process, up to 1 GiB; returns whether it was done: not where the C library is not glibc, and not where the
    environment sets it (mallopt(3)).

    By default glibc hands freed memory back above a threshold of twice the largest block it has seen, and the activations of the
    next layer fault their pages in again: 12.4 and 13.1 s to the first token of the 0.5b architecture, 10.5 and 10.1 s without.
    """
    return _mallopt({M_TRIM_THRESHOLD: KEPT, M_MMAP_THRESHOLD: LARGEST_ON_HEAP})


@contextmanager
def kept_memory() -> Iterator[bool]:
    """Inside, the process keeps all that is freed, blocks past 32 MB too, which are maps of their own otherwise; then as
    `keep_freed_memory` has it. Gives whether it was done.

    A training step makes and frees gigabytes of such: one of 2,407 tokens of the 0.5b architecture took 27 s inside and 31 outside, an
    activation of 54 MB 6 ms and 33 (2026-11, two cores), in the same memory.
    What `empty` maps is kept too, the last two that were given back: up to two gradients of a table of 152k rows, 1.2 GB, that nobody uses.
    """
    global _spares
    done = _mallopt({M_TRIM_THRESHOLD: -1, M_MMAP_MAX: 0})
    try:
        _spares = deque(maxlen=2) if done else None
        yield done
    finally:
        _spares = None
        _mallopt({M_TRIM_THRESHOLD: KEPT, M_MMAP_THRESHOLD: LARGEST_ON_HEAP, M_MMAP_MAX: MAPS})


def _mallopt(wanted: Mapping[int, int]) -> bool:
    if any(name in os.environ for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_")):
        return False
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and min(mallopt(option, value) for option, value in wanted.items()) == 1


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """torch.empty, in pages of 2 MiB where it fills some and the system gives them to who asks (Linux, "madvise").

    A matrix-vector product over 311 MB of bf16 reads 20.5 GB/s from large pages and 17.2 from small ones, a sum over fp32 26.2 and 17.7
    (2026-11, two cores). Inside `kept_memory` it is the memory of a tensor of that many bytes that is gone, where there was one: new pages
    of 622 MB take 80 to 1,600 ms, the most on a virtual machine that has given them back to its host.
    """
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < 2 * LARGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device=device)
    pages = _spare(size) or _map(size)
    lent = (ctypes.c_char * size).from_buffer(pages)  # lives as long as the tensor's storage: mmap itself says nothing when it is let go
    weakref.finalize(lent, _let_go, pages).atexit = False
    return torch.frombuffer(lent, dtype=torch.uint8).view(dtype).view(shape)


def _map(size: int) -> mmap.mmap:
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        pages.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # a kernel without them
        pass
    return pages


def _spare(size: int) -> mmap.mmap | None:
    spares = _spares
    if spares is None:
        return None
    for _ in range(len(spares)):
        try:
            pages = spares.popleft()
        except IndexError:  # taken by another thread
            return None
        if len(pages) == size:
            return pages
        spares.append(pages)
    return None


def _let_go(pages: mmap.mmap) -> None:
    """Wherever the last reference goes, inside `_spare` too: hence single operations on the queue, and no lock."""
    spares = _spares
    if spares is not None:
        spares.append(pages)


def populate(part: Tensor) -> bool:
    """Have the pages of a contiguous part of a CPU tensor in memory before they are written to; what they hold stays.

    Returns whether the system could (Linux 5.14); else they come when they are touched. 96 MB of large pages take 77 ms.
    """
    assert part.is_contiguous()
    if sys.platform != "linux":
        return False
    begin = part.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    size = part.data_ptr() + part.nbytes - begin
    return ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), MADV_POPULATE_WRITE) == 0


def available_bytes(device: torch.device) -> int:
    """Free memory of a GPU; of the machine what can be had without swapping (Linux; elsewhere half of what there is)."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # freed, and not given back
        return torch.cuda.mem_get_info(device)[0] + kept
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("MemAvailable:")) * 1024
    except OSError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
