"""The C++ extension as launchers see it, looked up once: an import statement and a getattr by name cost 1 us a call."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

_of_thread = threading.local()  # .recorder, where the thread records


class Recorder:
    """Stands in for the module while `recording`: runs each launch, and keeps it with its arguments, which are addresses and sizes."""

    def __init__(self) -> None:
        self.launches: list[tuple[Callable[..., object], tuple[Any, ...]]] = []

    def __getattr__(self, name: str) -> Any:
        found = getattr(_module(), name)
        if isinstance(found, type):  # DType and the like
            return found

        def launch(*arguments: Any) -> object:
            self.launches.append((found, arguments))
            return found(*arguments)

        return launch


@contextmanager
def recording() -> Iterator[Recorder]:
    """Records the launches that this thread makes in a `with` block. Raises RuntimeError inside another such block."""
    if getattr(_of_thread, "recorder", None) is not None:
        raise RuntimeError("this thread is recording launches already")
    _of_thread.recorder = Recorder()
    try:
        yield _of_thread.recorder
    finally:
        _of_thread.recorder = None


@cache
def _module() -> Any:
    from llava_fast import _cpu

    return _cpu


def cpu() -> Any:
    """The module llava_fast._cpu; the only way in which ops may reach it, so that a recording sees every launch."""
    return getattr(_of_thread, "recorder", None) or _module()


@cache
def element(dtype: torch.dtype) -> Any:
    """The extension's name of a dtype."""
    return getattr(_module().DType, str(dtype).removeprefix("torch."))


def address(tensor: Tensor | None) -> int:
    """Of the data; 0 where there is none."""
    return 0 if tensor is None else tensor.data_ptr()


def release_threads() -> None:
    """End the OpenMP threads that wait for work of the calling thread, so that another's can have the cores to themselves.

    A decode step of the 0.5b architecture takes 72 ms in a second thread while the first one's team is there, 55 without.
    """
    try:
        _module().release_threads()
    except ImportError:  # a build without the extension
        pass
