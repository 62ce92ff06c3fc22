"""All records of a job looked at, by several processes where there are many.

Each process is a fresh interpreter that talks over its pipes. Not `multiprocessing`: a fork may come while another thread holds a lock,
and spawned processes run the caller's script again unless it is guarded.
"""

from __future__ import annotations

import contextlib
import math
import os
import pickle
import queue
import signal
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from llava_fast.inputs.records import sample_indices
from llava_fast.training.examine import Chunk, Finding, Job, examine

CHUNK = 512  # records that a process takes at a time
ALONE = 20_000  # records up to which no other process is started: each takes seconds to import what it needs
WORKER = "from llava_fast.training.workers import serve; serve()"


def examine_all(job: Job, processes: int | None = None, progress: Any = None) -> Iterator[Finding]:
    """What is found of every record that the sources' strategies take, in order.

    processes: None: as many as there are cores, or only this one for up to ALONE records.
    progress: called with the records seen so far and their number.
    """
    chunks = _chunks(job)
    total = sum(len(numbers) for _, numbers, _ in chunks)
    count = processes or (1 if total <= ALONE else cores())
    seen = 0
    with _processes(job, min(count, len(chunks))) as examine_chunks:
        for (_, numbers, _), finding in zip(chunks, examine_chunks(chunks), strict=True):
            yield finding
            seen += len(numbers)
            if progress is not None:
                progress(seen, total)


def _chunks(job: Job) -> list[Chunk]:
    chunks: list[Chunk] = []
    for number, source in enumerate(job.sources):
        places = source.places()
        taken = sample_indices(len(places), source.strategy, seed=[job.config.seed, number])
        for start in range(0, len(taken), CHUNK):
            numbers = taken[start : start + CHUNK]
            wanted = places[numbers] if isinstance(places, np.ndarray) else [places[i] for i in numbers]
            chunks.append((number, numbers, wanted))
    return chunks


def cores(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """Cores that this process may keep busy: those it is bound to, and no more than a container's quota pays for.

    root, own: where Linux says so, for both versions of its control groups.
    """
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quotas = []
    with contextlib.suppress(OSError):  # not Linux, or not shown
        for line in own.read_text().splitlines():
            _, controllers, place = line.split(":", 2)
            if controllers and "cpu" not in controllers.split(","):
                continue
            base = root / "cpu" if controllers else root
            group = base / place.lstrip("/")
            for folder in [group, *group.parents][: len(group.parts) - len(base.parts) + 1]:  # a group has no more than those above it
                quotas += _quota(folder)
    return max(1, min([bound, *quotas]))


def _quota(folder: Path) -> list[int]:
    with contextlib.suppress(OSError, ValueError):  # no such group from in here, or "max": no quota
        if (folder / "cpu.max").is_file():
            quota, period = map(int, (folder / "cpu.max").read_text().split())
        else:
            quota, period = (int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
        if quota > 0:
            return [math.ceil(quota / period)]
    return []


@contextlib.contextmanager
def _processes(job: Job, count: int) -> Iterator[Callable[[Iterable[Chunk]], Iterator[Finding]]]:
    """A function from chunks to their findings, in order, that keeps `count` processes busy."""
    if count < 2:
        yield lambda chunks: (examine(job, chunk) for chunk in chunks)
        return
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "TOKENIZERS_PARALLELISM": "false"}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    pipes: dict[str, Any] = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True)
    workers: list[subprocess.Popen] = []
    free: queue.Queue[subprocess.Popen] = queue.Queue()
    message = pickle.dumps(job)

    def begin(worker: subprocess.Popen) -> None:
        with contextlib.suppress(OSError):  # it has died: the first chunk finds out
            worker.stdin.write(message)  # type: ignore[union-attr]
        free.put(worker)

    def ask(chunk: Chunk) -> Finding:
        worker = free.get()
        try:
            pickle.dump(chunk, worker.stdin)  # type: ignore[arg-type]
            worker.stdin.flush()  # type: ignore[union-attr]
            answer = pickle.load(worker.stdout)  # type: ignore[arg-type]
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            records = f"records {chunk[1][0]} to {chunk[1][-1]} of {job.sources[chunk[0]].path}"
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.wait(10)  # its pipe is closed a moment before it has an exit code
            raise RuntimeError(f"a process that looked at {records} has died (exit code {worker.poll()})") from error
        finally:
            free.put(worker)
        if isinstance(answer, str):
            raise RuntimeError(answer)
        return answer

    def in_order(chunks: Iterable[Chunk]) -> Iterator[Finding]:
        waiting: deque[Future[Finding]] = deque()
        for chunk in chunks:
            waiting.append(pool.submit(ask, chunk))
            if len(waiting) > 2 * count:  # findings wait for whoever takes them, so that no more than these are in memory
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    pool = ThreadPoolExecutor(count)
    try:
        for _ in range(count):
            workers.append(subprocess.Popen([sys.executable, "-c", WORKER], **pipes))
            pool.submit(begin, workers[-1])  # in a thread: a pipe holds less than a job, and its reader takes seconds to start
        yield in_order
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.kill()
        pool.shutdown(wait=True)
        for worker in workers:
            worker.communicate()


def serve() -> None:
    """The other end: a job from stdin, then chunks, whose findings (or what went wrong) go to stdout."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # so that what a library prints is no answer
    job = pickle.load(sys.stdin.buffer)
    while True:
        try:
            chunk = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer: Finding | str = examine(job, chunk)
        except Exception:  # whatever it is, it belongs to the process that asked
            answer = traceback.format_exc()
        pickle.dump(answer, answers)
        answers.flush()
