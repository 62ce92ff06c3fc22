"""The engine without its threads: requests that are read come in, a turn is one step of the device, tokens and ends go out.

    begin(job) ... turn() turn() turn() -> job.handle

Shape letters as in runner.py.
"""

from __future__ import annotations

import logging
import secrets
import time
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from llava_fast.engine.blocks import BlockPool
from llava_fast.engine.features import FeatureCache
from llava_fast.engine.job import Job
from llava_fast.engine.runner import Result, Runner
from llava_fast.engine.sampling import needs_history, stream_seed
from llava_fast.engine.scheduler import Plan, Scheduler, Work
from llava_fast.engine.sequence import FinishReason, Prompt, Sequence
from llava_fast.engine.speculate import guess
from llava_fast.engine.stats import Counters, weight_bytes
from llava_fast.engine.text import TextStream
from llava_fast.memory import available_bytes
from llava_fast.requests import SamplingParams

log = logging.getLogger(__name__)


def _without_frames(error: Exception) -> Exception:
    """An error whose traceback, logged before, keeps no activations alive."""
    link: BaseException | None = error
    while link is not None:
        link.__traceback__ = None
        link = link.__cause__ or link.__context__
    return error


@dataclass(frozen=True)
class Options:
    """As in `Engine`, which fills in what depends on the device."""

    kv_cache_bytes: int | None = None
    kv_dtype: torch.dtype | None = None
    page: int = 64
    max_running: int = 64
    max_rows: int = 2048
    max_views: int = 8
    max_mixed_rows: int = 2048
    prefix_cache: bool = True
    feature_cache_bytes: int = 256 << 20
    overlap: bool = False
    graphs: bool = False
    speculate: int = 0
    deterministic: bool = False


class Core:
    """Not for several threads."""

    def __init__(self, model: Any, options: Options):
        c, device, page, kv_cache_bytes = model.config.decoder, model.device, options.page, options.kv_cache_bytes
        kv_dtype = model.compute_dtype if options.kv_dtype is None else options.kv_dtype
        max_running = min(options.max_running, options.max_rows)
        dtypes = dict.fromkeys((torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, model.compute_dtype))
        if kv_dtype not in dtypes:
            raise ValueError(f"kv_dtype must be one of {', '.join(map(str, dtypes))}, got {kv_dtype}")
        self.block_bytes = 2 * c.layers * page * c.kv_heads * c.head_dim * kv_dtype.itemsize
        largest = max_running * -(-c.max_positions // page)
        if kv_cache_bytes is None:
            kv_cache_bytes = available_bytes(device) // 4 * (3 if device.type == "cuda" else 1)
        blocks = min(kv_cache_bytes // self.block_bytes, largest)
        if blocks < 1:
            raise ValueError(f"kv_cache_bytes={kv_cache_bytes} holds no block: {page} rows take {self.block_bytes} bytes")
        self.model, self.page, self.prefix_cache, self.speculate = model, page, options.prefix_cache, options.speculate
        self.overlap = options.overlap and not options.speculate  # guesses are made from tokens that the host knows
        self.features = FeatureCache(options.feature_cache_bytes)
        self.pool = BlockPool(blocks)
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            self.runner = Runner(model, blocks, page, kv_dtype, max_running, options.max_views, options.graphs, options.deterministic)
        budgets = options.max_rows, options.max_views, options.max_mixed_rows, max_running
        self.scheduler = Scheduler(self.pool, self.features, page, *budgets, self.runner.copy_rows)
        self.counters = Counters()
        self.weight_bytes = weight_bytes(model)
        self.under_way: Result | None = None

    def close(self) -> None:
        """Give the memory back; it is not for use any more."""
        self.runner.close()

    @property
    def idle(self) -> bool:
        return not (self.scheduler.running or self.scheduler.waiting or self.under_way)

    # -- requests

    def begin(self, job: Job) -> None:
        """A request that was read goes into the queue, or fails."""
        try:
            if job.error is not None:
                raise job.error
            self._begin(job)
        except (ValueError, RuntimeError) as error:
            self.fail(job, error)
        except Exception as error:
            self.fail(job, RuntimeError(f"beginning it failed: {type(error).__name__}: {error}"))

    def _begin(self, job: Job) -> None:
        assert job.prompt is not None
        if (misfit := self.misfit(job.prompt, job.params)) is not None:
            raise misfit
        seed = secrets.randbits(62) if job.params.seed is None else job.params.seed
        for n in range(job.params.n):
            sequence = Sequence(
                owner=job,
                index=n,
                prompt=job.prompt,
                params=job.params,
                max_new=min(job.params.max_new_tokens, self.model.config.decoder.max_positions - len(job.prompt)),
                seed=stream_seed(seed, n),
                eos_ids=job.eos_ids,
                order=(-job.priority, job.number, n),
                salt=b"" if self.prefix_cache else job.number.to_bytes(8, "little"),
            )
            job.sequences.append(sequence)
            job.texts.append(TextStream(None if job.request is None else self.model.tokenizer, job.params.stop))
        self.scheduler.add(job.sequences[0])  # the others wait for the blocks of its prompt

    def misfit(self, prompt: Prompt, params: SamplingParams) -> ValueError | None:
        """What makes a prompt impossible to serve, whatever else there is."""
        limit, length = self.model.config.decoder.max_positions, len(prompt)
        if length >= limit:
            return ValueError(f"the prompt takes {length} tokens, which leaves none of the context's {limit} for an answer")
        new, capacity = min(params.max_new_tokens, limit - length), self.pool.count * self.page
        if length + new - 1 > capacity:  # the last token is never fed back
            least = -(-(length + new - 1) // self.page) * self.block_bytes
            return ValueError(
                f"the prompt's {length} tokens and up to {new} new ones do not fit into the cache's {capacity} rows: "
                f"ask for fewer tokens, or give the engine kv_cache_bytes of at least {least}"
            )
        return None

    def stop(self, job: Job, reason: FinishReason, message: str | None = None) -> None:
        """End a request at any moment."""
        for sequence in job.sequences:
            self.scheduler.drop(sequence)
        if reason == "cancelled":
            self.counters.cancelled += 1
        else:
            self.counters.failed += 1
        job.stop(reason, message)

    def fail(self, job: Job, error: Exception) -> None:
        job.error = job.handle.error = error
        self.stop(job, "error", str(error))

    # -- a step

    def turn(self) -> None:
        """Plan and launch a step; take the tokens of the one before it where steps overlap, else its own."""
        begun = time.perf_counter()
        if self.under_way is not None and any(needs_history(sequence) for sequence in self.scheduler.running):
            self._collect()
        plan = self.scheduler.plan(self._guess if self.speculate else None)
        self.counters.host_seconds += time.perf_counter() - begun
        launched = self._launch(plan) if plan.works else None
        if self.under_way is not None:
            self._collect()
        self.under_way = launched
        if launched is not None and not self.overlap:
            self._collect()

    def _guess(self, sequence: Sequence, most: int) -> list[int]:
        params = sequence.params
        plain = params.temperature == 0 and params.repetition_penalty == 1 and len(sequence.tokens) >= params.min_new_tokens
        return guess(sequence.prompt.text_ids, sequence.tokens, min(most, self.speculate)) if plain else []

    def _launch(self, plan: Plan) -> Result | None:
        """Carry a plan out. Where that fails each of its works is tried by itself: who fails alone is to blame, the others go on."""
        begun = time.perf_counter()
        failed: Exception | None = None
        try:
            self.runner.encode(plan.pictures, plan.encode, self.features)
            seen = time.perf_counter()
            result = self.runner.run(plan)
        except Exception as error:
            log.warning("a step of %d sequences failed", len(plan.works), exc_info=True)
            failed = _without_frames(error)
        if failed is None:
            self.counters.step(plan, seen - begun, time.perf_counter() - seen)
            return result
        self.scheduler.undo(plan)
        if len(plan.works) == 1:
            self.fail(plan.works[0].sequence.owner, failed)
            return None
        launched = []
        for work in plan.works:
            if not work.sequence.owner.over:
                self.scheduler.redo(work)
                launched.append(self._launch(self._alone(plan, work)))
        return Result.join([result for result in launched if result is not None])

    def _alone(self, plan: Plan, work: Work) -> Plan:
        mine = set(work.sequence.prompt.pictures)
        pictures = [picture for picture in plan.pictures if picture in mine]
        return Plan([work], pictures, list({picture.key: picture for picture in pictures if picture.rows is None}.values()))

    def _collect(self) -> None:
        """Take the tokens of the step under way: text, ends, and blocks that others may share."""
        result, self.under_way = self.under_way, None
        assert result is not None
        tokens, logprobs = result.wait()
        begun, row = time.perf_counter(), 0
        for work in result.works:
            sequence, rows = work.sequence, 1 + len(work.draft) if work.samples else 0
            sequence.pending -= work.samples
            if sequence.finish_reason is None:
                try:
                    self._advance(work, tokens[row : row + rows], logprobs[row : row + rows], begun)
                except BaseException as error:  # a tokenizer's panic is no Exception
                    self.fail(sequence.owner, RuntimeError(f"making text of its tokens failed: {type(error).__name__}: {error}"))
            row += rows
        self.counters.host_seconds += time.perf_counter() - begun

    def _advance(self, work: Work, tokens: list[int], logprobs: list[float], now: float) -> None:
        sequence, job = work.sequence, work.sequence.owner
        first = bool(tokens) and not sequence.tokens
        for i, (token, logprob) in enumerate(zip(tokens, logprobs, strict=True)):
            if i:  # the guess before was right: its row is in the cache
                sequence.computed += 1
            if sequence.seen is not None:
                sequence.seen[token] += 1
            job.append(sequence, token, logprob)
            self.counters.token(sequence, job, now)
            if sequence.finish_reason is not None or i == len(work.draft) or work.draft[i] != token:
                self.counters.accepted += i
                break
        if sequence.blocks:
            self.scheduler.publish(sequence)
        if first and sequence.index == 0 and len(job.sequences) > 1:
            if sequence.blocks:
                self.scheduler.publish(sequence, tail=True)
            for sibling in job.sequences[1:]:
                self.scheduler.add(sibling)
        if first and all(other.tokens for other in job.sequences):
            for picture in sequence.prompt.pictures:
                if picture.visual is not None:
                    picture.rows = None  # keys and values know them; who is preempted looks again
        if sequence.finish_reason is not None:
            self.scheduler.drop(sequence)
            if all(other.finish_reason is not None for other in job.sequences):
                self.counters.finished += 1
                job.close()
