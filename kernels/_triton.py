"""What every Triton kernel file shares: the import, where it may run, and the launch configuration of a shape class.

`from llava_fast.kernels._triton import tl, triton, jit`: without triton installed the kernels stay plain functions that nobody
calls, and the registry reports that the module does not import. Interpreted (TRITON_INTERPRET=1, read when a kernel is decorated)
they run on CPU tensors too; that mode is for tests, in fp32 and fp16 (bf16 is silently wrong there).
"""

from __future__ import annotations

import json
import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Triton warns that its default, contraction of a * b + c, is about to change: numbers and speed would with it.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ImportError:  # the reference and C++ paths need none of it
    triton = tl = None

    def jit(function: Any) -> Any:
        return function


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = ("cuda", "cpu") if INTERPRETED else ("cuda",)  # of every Triton Implementation
TUNED = Path(__file__).parent / "tuned.json"
TARGET = "sm_90"  # what a device stands for that is no GPU: the interpreter's, and that of the ahead-of-time compile, which sets it


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Launches go to the tensor's GPU. Interpreted ones and those of the ahead-of-time compile have none."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@cache
def _tuned() -> dict[str, dict[str, dict[str, Any]]]:
    return json.loads(TUNED.read_text()) if TUNED.exists() else {}


def device_class(device: torch.device) -> str:
    """'sm_90' for a Hopper GPU, TARGET for what is no GPU."""
    return _capability(device) if device.type == "cuda" else TARGET


@cache
def _capability(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def config(kernel: str, shape_class: str, default: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Launch parameters (block sizes, num_warps, num_stages) of a kernel: as tuned on this class of device, else `default`.

    The table is rewritten by `make tune`; nothing is tuned at run time.
    """
    return {**default, **_tuned().get(device_class(device), {}).get(kernel, {}).get(shape_class, {})}
