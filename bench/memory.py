"""Peak memory and wall time of processes, run in turns; peak device memory of a call.

RSS counts the pages of mapped files (a checkpoint read through mmap), RssAnon does not: what a process needs is RssAnon.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

INTERVAL = 0.005  # seconds between samples


def status(pid: int | str = "self") -> dict[str, int]:
    """Bytes by name from /proc/<pid>/status (VmHWM, VmRSS, RssAnon, ...); empty once the process is gone."""
    try:
        with open(f"/proc/{pid}/status") as file:
            fields = [line.split() for line in file]
    except (FileNotFoundError, ProcessLookupError):
        return {}
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in fields if words[-1] == "kB"}


@dataclass
class Peak:
    """Bytes. The peak of anonymous memory is sampled: a spike shorter than INTERVAL can be missed."""

    rss: int = 0
    anon: int = 0

    def sample(self, pid: int | str) -> None:
        now = status(pid)
        # VmHWM, not ru_maxrss of wait4: that one starts from the parent's size at the fork.
        self.rss = max(self.rss, now.get("VmHWM", 0))
        self.anon = max(self.anon, now.get("RssAnon", 0))


@contextmanager
def peak_in_process() -> Iterator[Peak]:
    """Peak of this process inside a `with` block, its size before included; RSS is reset first."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    peak, stop = Peak(), threading.Event()

    def watch() -> None:
        while not stop.wait(INTERVAL):
            peak.sample("self")

    peak.sample("self")
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peak
    finally:
        stop.set()
        watcher.join()
        peak.sample("self")


def peak_cuda(run: Callable[[], object]) -> int:
    """Bytes that torch's allocator holds at the peak of one call, what was there before included."""
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


@dataclass(frozen=True)
class Measured:
    """One process: wall seconds from start to exit, peak bytes, and the JSON object on its last line of output (if it is one)."""

    seconds: float
    rss: int
    anon: int
    report: dict[str, Any] = field(default_factory=dict)


def run_measured(arguments: Sequence[str], env: Mapping[str, str] | None = None, timeout: float = 1800) -> Measured:
    """Run `python <arguments>` and watch its memory. Raises RuntimeError with its output where it fails or takes past `timeout` s."""
    command = [sys.executable, *arguments]
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        peak, start = Peak(), time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=errors, env={**os.environ, **(env or {})})
        while process.poll() is None:
            peak.sample(process.pid)
            if time.perf_counter() - start > timeout:
                process.kill()
            try:
                process.wait(INTERVAL)
            except subprocess.TimeoutExpired:
                pass
        wall = time.perf_counter() - start
        output.seek(0)
        errors.seek(0)
        lines = output.read().strip().splitlines()
        if process.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} ended with {process.returncode} after {wall:.1f} s:\n{errors.read()[-4000:]}")
    report = json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {}
    return Measured(wall, peak.rss, peak.anon, report)


def run_in_turns(commands: Mapping[str, Sequence[str]], rounds: int = 3, env: Mapping[str, str] | None = None) -> dict[str, list[Measured]]:
    """Each command once a round, in turns (A B B A ...), so that a change of the machine's speed meets all of them."""
    runs: dict[str, list[Measured]] = {name: [] for name in commands}
    for number in range(rounds):
        for name in reversed(list(commands)) if number % 2 else commands:
            runs[name].append(run_measured(commands[name], env))
    return runs


def median_of(runs: Sequence[Measured], key: str) -> float:
    """Median of 'seconds', 'rss', 'anon', or of a number in the report."""
    return statistics.median(getattr(run, key) if hasattr(run, key) else run.report[key] for run in runs)
