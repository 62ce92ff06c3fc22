"""`make tune`: times the candidates of every Triton kernel on this GPU and rewrites kernels/tuned.json: `python -m bench.tune [op ...]`

With --check nothing is timed and no GPU is needed: every candidate is compiled for sm_90 and held against the gate of bench.aot.

An op's file may define candidates() -> {(kernel, shape class): [launch parameters]}, in the words of its calls of `config`. The op's
shipped_calls are run with each candidate in the table's place; a candidate's time is the sum over the calls that ask for that kernel and
shape class. The fastest is kept where it beats the parameters in use by MARGIN. Only this class of device is rewritten.
"""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

from llava_fast.kernels import _triton

MARGIN = 0.02  # less is noise

Key = tuple[str, str]
Config = dict[str, Any]
Calls = Sequence[tuple[str, Callable[[], object]]]
Table = dict[str, dict[str, dict[str, Config]]]


@contextmanager
def tuned(device: str, key: Key | None = None, parameters: Config | None = None) -> Iterator[list[Key]]:
    """Inside, `config` gives these parameters for the key; yields the keys that were asked for."""
    asked: list[Key] = []
    before = _triton._tuned
    base = before()

    class Recorded(dict):  # of one kernel: shape class -> parameters
        def __init__(self, kernel: str, known: Mapping[str, Config]):
            super().__init__(known)
            self.kernel = kernel

        def get(self, shape: str, default: Any = None) -> Any:
            asked.append((self.kernel, shape))
            return parameters if parameters is not None and (self.kernel, shape) == key else super().get(shape, default)

    class Kernels(dict):
        def get(self, kernel: str, default: Any = None) -> Any:
            return Recorded(kernel, super().get(kernel, {}))

    _triton._tuned = lambda: {device: Kernels(base.get(device, {}))}  # type: ignore[assignment]
    try:
        yield asked
    finally:
        _triton._tuned = before


def calls_of(key: Key, calls: Calls, device: str) -> list[Callable[[], object]]:
    """The calls that ask for the key."""
    found = []
    for _, call in calls:
        with tuned(device, key, {}) as asked:
            call()
        if key in asked:
            found.append(call)
    return found


def select(times: Mapping[int | None, float]) -> int | None:
    """The candidate to keep: the fastest if it beats the one in use (None) by MARGIN, else None."""
    best = min((time, i) for i, time in times.items() if i is not None)[1] if len(times) > 1 else None
    if best is None or not times[best] < times[None] * (1 - MARGIN):
        return None
    return best


def tune(
    candidates: Mapping[Key, Sequence[Config]], calls: Calls, device: str, time: Callable[[Callable[[], object]], float]
) -> Iterator[tuple[Key, Config, float, float]]:
    """(key, parameters, milliseconds before, after) of each key that a candidate is better for."""
    for key, configs in candidates.items():
        users = calls_of(key, calls, device)
        if not users:
            raise ValueError(f"no shipped call asks for the launch parameters of {key}")
        in_use = _triton._tuned().get(device, {}).get(key[0], {}).get(key[1], {})
        times: dict[int | None, float] = {}
        for i, parameters in [(None, in_use), *enumerate(configs)]:
            with tuned(device, key, parameters):
                try:
                    times[i] = sum(time(call) for call in users)
                except Exception as error:  # any: too much shared memory, say; not for the parameters in use
                    if i is None:
                        raise
                    print(f"{key} {parameters}: {type(error).__name__}: {error}".splitlines()[0])
                    times[i] = math.inf
        best = select(times)
        if best is not None:
            yield key, dict(configs[best]), times[None], times[best]


def compile_key(op: str, key: Key) -> list[str]:
    """Faults of the candidates of a key, each compiled in the calls that ask for it."""
    from bench import aot

    module = importlib.import_module(f"llava_fast.kernels.{op}")
    with aot.recorded(90, lambda compiled, log: None):
        users = [("", call) for call in calls_of(key, list(module.shipped_calls("meta")), "sm_90")]
    told = []
    for parameters in module.candidates()[key]:
        with tuned("sm_90", key, parameters):
            compiled = aot.compile_calls(op, lambda device: iter(users), 90)
        faults = sorted({f"{kernel.row.kernel}: {fault}" for kernel in compiled for fault in kernel.faults})
        told += [f"{op} {key[0]} {key[1]} {parameters}: {fault}" for fault in faults]
    return told


def check(ops: Sequence[str]) -> int:
    """Faults are printed; 1 if there is one."""
    from bench import aot

    aot._environment()
    modules = {op: importlib.import_module(f"llava_fast.kernels.{op}") for op in ops or aot.ops()}
    keys = [(op, key) for op, module in modules.items() if hasattr(module, "candidates") for key in module.candidates()]
    found = 0
    with ProcessPoolExecutor(2) as pool:
        for told in pool.map(compile_key, *zip(*keys, strict=True)):
            found += len(told)
            print(*told, sep="\n", end="\n" if told else "", flush=True)
    print(f"tune: {len(keys)} kernels and shape classes, {found} faults of their candidates")
    return int(found > 0)


def merged(table: Table, device: str, chosen: Iterable[tuple[Key, Config]]) -> Table:
    """A copy of the table with the device's entries of those keys replaced."""
    new: Table = json.loads(json.dumps(table))
    for (kernel, shape), parameters in chosen:
        new.setdefault(device, {}).setdefault(kernel, {})[shape] = parameters
    return new


def main(ops: Sequence[str]) -> int:
    if "--check" in ops:
        return check([op for op in ops if op != "--check"])
    if not torch.cuda.is_available():
        print("make tune needs a GPU: torch.cuda is not available here")
        return 2
    from bench.aot import ops as shipped
    from bench.gpu import timed

    device = _triton.device_class(torch.device("cuda", torch.cuda.current_device()))
    for op in ops or shipped():
        module = importlib.import_module(f"llava_fast.kernels.{op}")
        if not hasattr(module, "candidates"):
            continue
        chosen = []
        calls = list(module.shipped_calls("cuda"))
        for key, parameters, before, after in tune(module.candidates(), calls, device, lambda call: timed(lambda i: call(), 1, "cuda")[0]):
            print(f"{op} {key[0]} {key[1]}: {before:.4f} -> {after:.4f} ms with {parameters}", flush=True)
            chosen.append((key, parameters))
        table = merged(_triton._tuned(), device, chosen)
        _triton.TUNED.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
        _triton._tuned.cache_clear()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
