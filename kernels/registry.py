"""Which implementation of an op runs: resolved once per op, device type, dtype and shape class, and logged.

An op's file registers its implementations in order of preference; the first default one that serves the call and whose modules
import is taken. Another is asked for by name with LLAVA_FAST_KERNELS="varlen_attention=triton,norm=reference", or, in tests,
`with use(norm="reference"):`. A request that cannot be met raises ValueError; nothing falls back in silence.
"""

from __future__ import annotations

import importlib
import logging
import os
import pkgutil
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NAMES = ("reference", "cpu", "triton", "cuda", "torch", "flash_attn", "xformers")
ENVIRONMENT = "LLAVA_FAST_KERNELS"
NOT_INVARIANT = "its results depend on how many rows a call has"

log = logging.getLogger("llava_fast.kernels")


@dataclass(frozen=True)
class Implementation:
    """What an implementation serves; the op's file knows its functions by its name.

    devices: device types, dtypes: dtypes (None: all).  serves: shape classes (None: all).  modules: what it imports, tried before it is
    chosen.  default: False for one that runs only when asked for by name.  invariant: whether it can do what `batch_invariant` asks.
    """

    devices: tuple[str, ...] | None = None
    dtypes: tuple[torch.dtype, ...] | None = None
    serves: Callable[[Any], bool] | None = None
    modules: tuple[str, ...] = ()
    default: bool = True
    invariant: bool = False

    def obstacle(self, device: str, dtype: torch.dtype, shape: Hashable) -> str | None:
        """Why it cannot take the call, or None."""
        if self.devices is not None and device not in self.devices:
            return f"it runs on {', '.join(self.devices)}, not on {device}"
        if self.dtypes is not None and dtype not in self.dtypes:
            return (
                f"it takes {', '.join(str(known).removeprefix('torch.') for known in self.dtypes)}, not {str(dtype).removeprefix('torch.')}"
            )
        if self.serves is not None and not self.serves(shape):
            return f"it does not serve shape class {shape!r}"
        for module in self.modules:
            try:
                importlib.import_module(module)
            except ImportError as error:
                return f"{module} does not import ({error})"
        return None


@dataclass(frozen=True)
class Choice:
    """What runs for one kind of call: name None where nothing can; others: why each other implementation does not run."""

    op: str
    device: str
    dtype: torch.dtype
    shape: Hashable
    name: str | None
    reason: str
    others: dict[str, str]


_ops: dict[str, Mapping[str, Implementation]] = {}
_shapes: dict[str, Sequence[Hashable]] = {}
_overrides: dict[str, str] = {}  # of the innermost use()
_resolved: dict[tuple[Any, ...], str] = {}
_of_thread = threading.local()  # .invariant, .visible


def register(op: str, implementations: Mapping[str, Implementation], shapes: Sequence[Hashable] = (None,)) -> None:
    """Make `op` known with its implementations, the preferred one first; 'reference' has to be among them.

    shapes: shape classes as the op resolves them, those that `explain` is to tell about.
    """
    assert "reference" in implementations and set(implementations) <= set(NAMES), list(implementations)
    _ops[op], _shapes[op] = implementations, shapes


# Under torch.compile the name is a constant of the graph, which dynamo need not look into. (It cannot take a function so.)
@torch.compiler.assume_constant_result
def resolve_name(op: str, device: str, dtype: torch.dtype, shape: Hashable = None) -> str:
    """The implementation that runs `op` for tensors of this device type, dtype and shape class (whatever the op's file makes of it).

    Raises ValueError where LLAVA_FAST_KERNELS or use() asks for what does not exist or cannot serve the call.
    """
    key = (op, device, dtype, shape, is_invariant())
    if key not in _resolved:
        name, reason = _choose(op, device, dtype, shape)
        log.info(
            "%s (%s, %s%s): %s, %s", op, device, str(dtype).removeprefix("torch."), "" if shape is None else f", {shape}", name, reason
        )
        _resolved[key] = name
    return _resolved[key]


def _choose(op: str, device: str, dtype: torch.dtype, shape: Hashable) -> tuple[str, str]:
    asked, invariant = {**_environment(), **_overrides}.get(op), is_invariant()
    if asked is not None:
        obstacle = _ops[op][asked].obstacle(device, dtype, shape)
        if invariant and not _ops[op][asked].invariant:
            obstacle = NOT_INVARIANT
        if obstacle is not None:
            raise ValueError(f"{op}={asked} was asked for but {obstacle}")
        return asked, "asked for"
    passed: list[str] = []
    for name, implementation in _ops[op].items():
        if implementation.invariant if invariant else implementation.default:
            obstacle = implementation.obstacle(device, dtype, shape)
            if obstacle is None:
                return name, "; ".join(["batch-invariant" if invariant else "default", *passed])
            passed.append(f"{name}: {obstacle}")
    raise ValueError(f"no {'batch-invariant ' if invariant else ''}implementation of {op} can take this call: {'; '.join(passed)}")


def is_invariant() -> bool:
    """Whether this thread is inside `batch_invariant`: launchers that choose a path by the number of rows take one for all then."""
    return getattr(_of_thread, "invariant", False)


@contextmanager
def batch_invariant() -> Iterator[None]:
    """Inside, in this thread, a row's result has the same bits whatever other rows its call has: every number of rows takes one path.

    This asks by name for implementations that can do so, be they a default or not; an op that has none for a dtype and device raises
    ValueError. On a CPU few rows are slower, on a GPU many too.
    """
    before, _of_thread.invariant = is_invariant(), True
    try:
        yield
    finally:
        _of_thread.invariant = before


def explain(device: str, dtypes: Sequence[torch.dtype]) -> list[Choice]:
    """What each op would run, and why, for every shape class it was registered with. Imports all ops."""
    for op in _files():
        importlib.import_module(f"{__package__}.{op}")
    calls = [(op, device, dtype, shape) for op in sorted(_ops) for dtype in dtypes for shape in _shapes[op]]
    return [_explain(*call) for call in calls]


def _explain(op: str, device: str, dtype: torch.dtype, shape: Hashable) -> Choice:
    try:
        chosen, reason = _choose(op, device, dtype, shape)
    except ValueError as error:
        chosen, reason = None, str(error)
    others = {}
    for name, implementation in _ops[op].items():
        if name != chosen:
            ahead = f"{chosen} was asked for" if reason == "asked for" else f"{chosen} comes first"
            idle = ahead if implementation.default else "not a default: it runs when it is asked for"
            others[name] = implementation.obstacle(device, dtype, shape) or idle
    return Choice(op, device, dtype, shape, chosen, reason.partition(";")[0], others)


def _environment() -> dict[str, str]:
    """LLAVA_FAST_KERNELS, checked."""
    asked = {}
    for part in os.environ.get(ENVIRONMENT, "").replace(" ", "").split(","):
        op, separator, name = part.partition("=")
        if part and not (op and separator and name):
            raise ValueError(f"{ENVIRONMENT} must look like 'norm=reference,varlen_attention=triton', got {part!r}")
        if part:
            _check(op, name)
            asked[op] = name
    return asked


def _files() -> set[str]:
    """One op a file: the names of the files are the names of the ops, loaded or not."""
    package = importlib.import_module(__package__)
    return {module.name for module in pkgutil.iter_modules(package.__path__) if not module.name.startswith("_")} - {"registry"}


def implementations(op: str) -> tuple[str, ...]:
    """The names of an op's implementations, the preferred one first. Raises ValueError for an op that does not exist."""
    known = _files()
    if op not in _ops and op in known:
        importlib.import_module(f"{__package__}.{op}")
    if op not in _ops and op not in known:
        raise ValueError(f"there is no op {op!r}: expected one of {', '.join(sorted(known | set(_ops)))}")
    return tuple(_ops.get(op, ("reference",)))


def _check(op: str, name: str) -> None:
    have = implementations(op)
    if name not in have:
        raise ValueError(f"{op} has no implementation {name!r}: expected one of {', '.join(have)}")


def in_graph(*tensors: Tensor | None) -> bool:
    """Whether a call must go through its custom op: autograd is to record it, or torch.compile traces it.

    Otherwise the public functions call their launchers directly: a custom op costs 6 us a call, and a token takes 200.
    """
    if torch.compiler.is_compiling():
        return True
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def as_op(*tensors: Tensor | None) -> bool:
    """`in_graph`, or inside `visible`: whether a call that could be direct goes through its custom op."""
    return in_graph(*tensors) or getattr(_of_thread, "visible", False)


@contextmanager
def visible() -> Iterator[None]:
    """Inside, in this thread, every op that has a custom op goes through it, so that dispatch modes (a profile) see it."""
    before, _of_thread.visible = getattr(_of_thread, "visible", False), True
    try:
        yield
    finally:
        _of_thread.visible = before


@contextmanager
def use(**implementations: str) -> Iterator[None]:
    """Ask for implementations by op name inside a `with` block, in all threads; over LLAVA_FAST_KERNELS. For tests.

    Everything is resolved anew inside. What torch.compile traced before keeps the implementations it was traced with.
    """
    global _overrides, _resolved
    for op, name in implementations.items():
        _check(op, name)
    before = _overrides, _resolved
    _overrides, _resolved = {**_overrides, **implementations}, {}
    try:
        yield
    finally:
        _overrides, _resolved = before
