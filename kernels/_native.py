"""The C++ extension as launchers see it, looked up once: an import statement and a getattr by name cost 1 us a call."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor


@cache
def cpu() -> Any:
    """The module llava_fast._cpu."""
    from llava_fast import _cpu

    return _cpu


@cache
def element(dtype: torch.dtype) -> Any:
    """The extension's name of a dtype."""
    return getattr(cpu().DType, str(dtype).removeprefix("torch."))


def address(tensor: Tensor | None) -> int:
    """Of the data; 0 where there is none."""
    return 0 if tensor is None else tensor.data_ptr()
