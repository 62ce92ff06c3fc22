"""A function of fixed tensors run again without Python: on the CPU, its native launches are recorded once and called again.

What a CUDA graph is to a GPU. A token of the 0.5b decoder takes 217 launches, and the Python around them 13 ms of 76.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llava_fast.kernels import _native

# What torch may do inside a recorded function: it gives memory and names parts of it, and reads or writes none.
IDLE = {
    "alias", "as_strided", "detach", "empty", "empty_like", "empty_strided", "expand", "new_empty", "permute", "reshape", "select",
    "slice", "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view", "_reshape_alias", "_unsafe_view",
}  # fmt: skip


class _Watch(TorchDispatchMode):
    """Keeps every tensor that torch makes, so that their memory stays theirs, and the names of operations that do more than that."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Any] = []
        self.busy: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.kept.append(out)
        name = func.overloadpacket.__name__
        if name not in IDLE:
            self.busy.add(name)
        return out


class Replay:
    """`function()` runs when this is made; calling it does the same work again on the same memory and returns the same tensors.

    Whoever calls writes new inputs into the tensors that the function reads, and keeps alive those that it does not make.
    exact: whether the launches were all that it did. Where they were not, calling runs the function itself.
    """

    def __init__(self, function: Callable[[], Tensor]):
        self.function, self.threads = function, torch.get_num_threads()
        watch = _Watch()
        with _native.recording() as recorder, watch:
            self.result = function()
        self.launches, self.kept, self.exact = recorder.launches, watch.kept, not watch.busy

    def __call__(self) -> Tensor:
        if not self.exact or torch.get_num_threads() != self.threads:
            return self.function()
        for launch, arguments in self.launches:
            launch(*arguments)
        return self.result
