"""Requests in, answers out as they are made: one thread that turns the device, others that read pictures ahead of it.

    submit -> readers: open, resize, tokenise -> core: schedule, run, make text -> handle

The turning thread owns the core; what comes from other threads waits in queues until it takes it in. Nothing here is global.
"""

from __future__ import annotations

import heapq
import itertools
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from llava_fast.engine.core import Core, Options
from llava_fast.engine.handle import Delta, Handle
from llava_fast.engine.job import Job
from llava_fast.engine.sequence import Prompt
from llava_fast.engine.stats import Stats, cpu_limits, read
from llava_fast.inputs.prepare import prepare
from llava_fast.kernels._native import release_threads
from llava_fast.requests import InputOptions, Request, SamplingParams

PAGES = (16, 32, 64, 128, 256)
ANY_ROWS = 1 << 30  # max_mixed_rows without a bound
BYTES_AHEAD = 64 << 20  # of the cache, whose memory is made ready before it is written, on the CPU


class Engine:
    """Serves requests on a loaded model until it is closed. A context manager: it waits for what was submitted, an exception cancels it.

    kv_cache_bytes: of keys and values; a quarter of the free memory where None (three quarters of a GPU's), less where `max_running`
    sequences cannot fill it.  kv_dtype: theirs, that of the arithmetic where None; torch.float8_e4m3fn changes answers.
    page: rows of a block.  max_running: sequences at a time.  max_rows, max_views: of one step.
    max_mixed_rows: rows of prompts, with one view for the tower, in a step in which others decode, whose tokens wait for it; ANY_ROWS
    where only the last token counts. 768 on the CPU, max_rows on a GPU where None.
    prefix_cache: requests share what they begin with, by token ids and the contents of pictures.  feature_cache_bytes: of projected
    pictures, kept for requests that show them again.  readers: threads that open and resize pictures (half the cores where None).
    overlap: plan a step while the one before runs (None: on a GPU).  graphs: capture decode steps (on a GPU).
    speculate: tokens to guess a step, those that followed the latest ones before; for greedy requests without penalties, whose answers
    stay equal.  deterministic: a request's tokens and log-probabilities are the same, bit for bit, whatever runs beside it, however its
    prompt is cut and whatever of it is found in a cache; few rows take the kernels of many then, which makes decoding slower.

    Raises ValueError for options that do not fit, and for a cache that holds less than one block.
    """

    def __init__(
        self,
        model: Any,
        *,
        kv_cache_bytes: int | None = None,
        kv_dtype: torch.dtype | None = None,
        page: int = 64,
        max_running: int = 64,
        max_rows: int | None = None,
        max_views: int | None = None,
        max_mixed_rows: int | None = None,
        prefix_cache: bool = True,
        feature_cache_bytes: int = 256 << 20,
        readers: int | None = None,
        overlap: bool | None = None,
        graphs: bool = True,
        speculate: int = 0,
        deterministic: bool = False,
    ):
        on_gpu = model.device.type == "cuda"
        # 1,536: two pictures and a question in one step; 768 beside others' tokens: one picture, and less of a wait between tokens for more
        # of one until the first (docs/serving.md).
        max_rows = max_rows if max_rows is not None else (8192 if on_gpu else 1536)
        max_views = max_views if max_views is not None else (64 if on_gpu else 8)
        max_mixed_rows = max_mixed_rows if max_mixed_rows is not None else (max_rows if on_gpu else 768)
        readers = readers if readers is not None else max(2, min(16, (os.cpu_count() or 2) // 2))
        counts = dict(max_running=max_running, max_rows=max_rows, max_views=max_views, max_mixed_rows=max_mixed_rows, readers=readers)
        bounds = [(name, value, 1) for name, value in counts.items()] + [("speculate", speculate, 0)]
        for name, value, least in [*bounds, ("feature_cache_bytes", feature_cache_bytes, 0)]:
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
        if page not in PAGES:
            raise ValueError(f"page must be one of {', '.join(map(str, PAGES))} rows, got {page!r}")
        self.model, self.max_running = model, max_running
        self._core = Core(
            model,
            Options(
                kv_cache_bytes=kv_cache_bytes,
                kv_dtype=kv_dtype,
                page=page,
                max_running=max_running,
                max_rows=max_rows,
                max_views=max_views,
                max_mixed_rows=max_mixed_rows,
                prefix_cache=prefix_cache,
                feature_cache_bytes=feature_cache_bytes,
                overlap=on_gpu if overlap is None else overlap,
                graphs=graphs,
                speculate=speculate,
                deterministic=deterministic,
            ),
        )
        self._numbers = itertools.count()
        self._readers = ThreadPoolExecutor(readers, "llava_fast reader")
        self._ahead = 2 * readers  # requests that are read, or being read, before it is their turn: bounds the memory of their views
        self._wake = threading.Condition()
        self._jobs: dict[Handle, Job] = {}  # what is not over
        self._unread: list[Job] = []  # a heap
        self._deadlines: list[tuple[float, int, Job]] = []  # a heap
        self._reading = 0
        self._arrived: list[Job] = []
        self._cancels: list[Handle] = []
        self._closing = False
        self._fatal: BaseException | None = None
        self._worked = 0.0
        self._populated = 0  # blocks
        self._limits: tuple[float, float] | None = None
        release_threads()
        self._thread = threading.Thread(target=self._run, args=(torch.get_num_threads(),), name="llava_fast engine", daemon=True)
        self._thread.start()

    # -- from any thread

    def submit(
        self,
        request: Any,
        sampling: SamplingParams | None = None,
        inputs: InputOptions | None = None,
        *,
        on_delta: Callable[[Handle, Delta], None] | None = None,
    ) -> Handle:
        """Take a request on: a string with marks, chat messages or a `Request`. Returns at once; what is wrong with it, its result tells.

        sampling, inputs: where the request has none of its own.  on_delta: called with every delta by the engine's thread, in place of
        iterating the handle; it has to be quick.  Raises ValueError for what is no request, RuntimeError after `close`.
        """
        request = request if isinstance(request, Request) else Request(request)
        for name, value, kind in (("sampling", sampling, SamplingParams), ("inputs", inputs, InputOptions)):
            if value is not None and not isinstance(value, kind):
                raise ValueError(f"{name} must be {kind.__name__} or None, got {type(value).__name__}")
        params = request.sampling or sampling or SamplingParams()
        own = dict(request=request, priority=request.priority, deadline=request.deadline)
        return self._submit(on_delta, params=params, inputs=inputs or InputOptions(), eos_ids=self.model.eos_ids, **own)

    def submit_prompt(self, prompt: Prompt, params: SamplingParams, eos_ids: tuple[int, ...]) -> Handle:
        """Take on a prompt that is read already."""
        return self._submit(None, request=None, params=params, inputs=InputOptions(), eos_ids=eos_ids, prompt=prompt)

    def _submit(self, on_delta: Callable[[Handle, Delta], None] | None, **fields: Any) -> Handle:
        with self._wake:
            if self._fatal is not None:
                raise RuntimeError(f"the engine has stopped: {type(self._fatal).__name__}: {self._fatal}")
            if self._closing:
                raise RuntimeError("the engine is closed")
            number = next(self._numbers)
            handle = Handle(number, self._cancel, self._forget, on_delta)
            job = Job(number=number, handle=handle, submitted=time.perf_counter(), **fields)
            self._jobs[handle] = job
            self._core.counters.submitted += 1
            if job.deadline is not None:
                heapq.heappush(self._deadlines, (job.submitted + job.deadline, number, job))
            if job.prompt is None:
                heapq.heappush(self._unread, job)
            else:
                self._arrived.append(job)
            self._wake.notify()
        return handle

    def _forget(self, handle: Handle) -> None:
        with self._wake:
            self._jobs.pop(handle, None)
            if len(self._deadlines) > 2 * len(self._jobs) + 16:  # those that are over would keep their pictures until then
                self._deadlines = [entry for entry in self._deadlines if not entry[2].over]
                heapq.heapify(self._deadlines)

    def _cancel(self, handle: Handle) -> None:
        with self._wake:
            self._cancels.append(handle)
            self._wake.notify()

    def close(self, cancel: bool = True) -> None:
        """Take nothing more on; what is not over is cancelled, or waited for. Called again, it does nothing."""
        with self._wake:
            self._closing = True
            if cancel:
                self._cancels += self._jobs
            self._wake.notify()
        self._thread.join()
        self._readers.shutdown(cancel_futures=True)  # of what nobody waits for
        self._core.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self.close(cancel=kind is not None)

    @property
    def fault(self) -> BaseException | None:
        """What stopped the engine itself; its requests all ended as errors then."""
        return self._fatal

    def stats(self, limits: bool = False) -> Stats:
        """Counts, latencies and rates since the engine was made.

        limits: also as shares of what the CPU can do, which takes 0.3 s the first time, and raises ValueError while requests run then:
        what they leave of the machine is not its limit.
        """
        if limits and self._limits is None and self.model.device.type == "cpu":
            if not self._core.idle:
                raise ValueError("limits are measured while nothing runs: ask for them before or after the requests")
            self._limits = cpu_limits()
            release_threads()
        best = self._limits if limits else None
        with self._wake:
            running = {sequence.owner for sequence in list(self._core.scheduler.running)}
            waiting = sum(job not in running for job in self._jobs.values())
        return read(self._core, waiting, self._worked, best)

    # -- readers

    def _read(self, job: Job) -> None:
        begun = time.perf_counter()
        try:
            if not job.over:
                assert job.request is not None
                prepared = prepare(job.request, job.inputs, self.model.input_spec)
                job.prompt = Prompt.of(prepared.sample, prepared.views, prepared.prompt_ids)
        except ValueError as error:
            job.error = error
        except BaseException as error:  # whatever a decoder or a tokenizer throws (panics are no Exceptions): it is this request's
            job.error = RuntimeError(f"reading it failed: {type(error).__name__}: {error}")
        job.timings["preprocess"] = time.perf_counter() - begun
        release_threads()
        with self._wake:
            self._reading -= 1
            self._arrived.append(job)
            self._wake.notify()

    # -- the engine's thread

    @torch.inference_mode()
    def _run(self, threads: int) -> None:
        torch.set_num_threads(threads)  # each thread has a number of its own
        if self.model.device.type == "cuda":
            torch.cuda.set_device(self.model.device)  # and a device
        try:
            while self._take_in():
                begun = time.perf_counter()
                self._core.turn()
                self._worked += time.perf_counter() - begun
                self._populate()
        except BaseException as error:  # the engine's own fault: nobody may wait for what will not come
            with self._wake:
                self._fatal = error
            for job in list(self._jobs.values()):
                if not job.over:
                    job.handle.error = error
                    job.stop("error", f"the engine stopped: {type(error).__name__}: {error}")

    def _take_in(self) -> bool:
        """Take what came in, waiting for it where there is nothing to do; False once nothing more can come."""
        core = self._core
        with self._wake:
            while True:
                self._read_ahead()
                next_end = self._deadlines[0][0] if self._deadlines else float("inf")
                if self._cancels or self._arrived or not core.idle or next_end <= time.perf_counter():
                    break
                if self._closing and not self._jobs:
                    return False
                release_threads()  # the cores are others' while there is nothing to do
                # At most an hour: a wait of centuries overflows.
                self._wake.wait(None if next_end == float("inf") else min(max(next_end - time.perf_counter(), 0.0), 3600.0))
            arrived, self._arrived = self._arrived, []
            cancelled, self._cancels = [self._jobs[handle] for handle in self._cancels if handle in self._jobs], []
            late = []
            while self._deadlines and self._deadlines[0][0] <= time.perf_counter():
                late.append(heapq.heappop(self._deadlines)[2])
        for job in cancelled:
            if not job.over:
                core.stop(job, "cancelled")
        for job in late:
            if not job.over:
                core.stop(job, "error", f"its deadline of {job.deadline} s passed" + ("" if job.sequences else " before it was begun"))
        for job in arrived:
            if not job.over:
                core.begin(job)
        return True

    def _populate(self) -> None:
        """Have a reader make the memory ready of blocks that come next: a step that touches new pages waits for them."""
        ahead = max(BYTES_AHEAD // self._core.block_bytes, 1)
        last = min(self._core.pool.used + ahead, self._core.pool.count)
        if self.model.device.type == "cpu" and last - self._populated >= (ahead + 1) // 2:
            self._readers.submit(self._core.runner.populate, max(self._populated, self._core.pool.used), last)
            self._populated = last

    def _read_ahead(self) -> None:
        """Hand unread requests to the readers, as many as may wait for their turn."""
        queued = sum(sequence.index == 0 and not sequence.tokens for sequence in self._core.scheduler.waiting)
        while self._unread and self._reading + len(self._arrived) + queued < self._ahead:
            job = heapq.heappop(self._unread)
            if not job.over:
                self._reading += 1
                self._readers.submit(self._read, job)
