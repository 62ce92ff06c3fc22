"""What an engine has done so far, in numbers."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from llava_fast import memory
from llava_fast.kernels.linear import Quantised
from llava_fast.limits import best
from llava_fast.models.llava import Llava

if TYPE_CHECKING:
    from llava_fast.engine.core import Core
    from llava_fast.engine.job import Job
    from llava_fast.engine.scheduler import Plan
    from llava_fast.engine.sequence import Sequence

KEPT = 10_000  # latest latencies that percentiles are made of


def percentile(values: Iterable[float], q: float) -> float:
    """The q-th percentile (nearest rank) of some values; 0 of none."""
    ranked = sorted(values)
    return ranked[min(int(len(ranked) * q / 100), len(ranked) - 1)] if ranked else 0.0


@dataclass
class Counters:
    """Sums since the engine was made; seconds are of the wall clock."""

    submitted: int = 0
    finished: int = 0
    failed: int = 0
    cancelled: int = 0
    steps: int = 0
    prompt_rows: int = 0
    decode_steps: int = 0
    decode_rows: int = 0
    decode_keys: int = 0
    new_tokens: int = 0
    views: int = 0
    pictures: int = 0
    pictures_reused: int = 0
    drafted: int = 0
    accepted: int = 0
    vision_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    host_seconds: float = 0.0
    first_token: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT))
    between_tokens: deque[float] = field(default_factory=lambda: deque(maxlen=KEPT))

    def step(self, plan: Plan, vision: float, decoder: float) -> None:
        """A step was launched, in so many seconds; where nothing waits for the device they are those of launching alone."""
        self.steps += 1
        self.views += sum(picture.cost for picture in plan.encode)
        self.pictures += len(plan.pictures)
        self.pictures_reused += len(plan.pictures) - len(plan.encode)
        self.drafted += sum(len(work.draft) for work in plan.works)
        if plan.encode:
            self.vision_seconds += vision
        decoding = sum(work.repeats for work in plan.works)
        self.decode_rows += decoding
        self.prompt_rows += plan.rows - decoding  # guesses of decoding sequences among them
        if decoding == len(plan.works):
            self.decode_steps += 1
            self.decode_keys += sum(work.last for work in plan.works)
            self.decode_seconds += decoder
        else:
            self.prefill_seconds += decoder

    def token(self, sequence: Sequence, job: Job, now: float) -> None:
        """A token came, the latest of the sequence."""
        self.new_tokens += 1
        if "first_token" not in job.timings:
            job.timings["first_token"] = now - job.submitted
            self.first_token.append(now - job.submitted)
        if len(sequence.tokens) > 1:
            self.between_tokens.append(now - sequence.told)
        sequence.told = now


@dataclass(frozen=True)
class Stats:
    """A reading. Latencies in seconds, of the latest 10,000.

    time_to_first_token: from submission.  inter_token: between two tokens of a sequence.  tokens_per_s: new tokens over the time that the
    engine was at work, views_per_s: views over that of the tower.  prefix_reused: of the prompts' rows, the share found in the cache.
    pictures_reused: of the pictures that were needed, the share not shown to the tower.  host_ms_per_step: planning, and making text of
    tokens.  decode_gbs: bytes of weights, keys and values that decode steps read over their time, prefill_gflops: operations of the
    layers' products over the time of the other steps; both and views_per_s are 0 on a GPU, whose work is not waited for.
    decode_of_limit, prefill_of_torch: decode_gbs of what the machine can read, and prefill_gflops of the speed of torch's own fp32 products
    (which is no limit: those of bf16 weights on AMX are faster); None on a GPU, where `stats(limits=True)` did not ask, and of no step.
    """

    waiting: int  # requests of which nothing runs
    running: int  # sequences
    submitted: int
    finished: int
    failed: int
    cancelled: int
    steps: int
    preemptions: int
    time_to_first_token: dict[str, float]
    inter_token: dict[str, float]
    tokens_per_s: float
    views_per_s: float
    prefix_reused: float
    pictures_reused: float
    blocks: int
    blocks_held: int
    kv_bytes: int
    feature_bytes: int
    host_ms_per_step: float
    decode_gbs: float
    prefill_gflops: float
    decode_of_limit: float | None
    prefill_of_torch: float | None
    drafted: int
    accepted: int


def cpu_limits() -> tuple[float, float]:
    """GB/s of reading memory, and GFLOP/s of torch's fp32 products, on torch's threads: the best of five runs, 0.3 s."""
    source = memory.empty((1 << 26,), torch.float32, torch.device("cpu")).fill_(1)
    square = torch.ones(1024, 1024)

    return source.nbytes / best(source.sum, "cpu") / 1e9, 2 * 1024**3 / best(lambda: square @ square, "cpu") / 1e9


def latencies(values: Iterable[float]) -> dict[str, float]:
    values = list(values)
    return {f"p{q}": percentile(values, q) for q in (50, 95, 99)}


def weight_bytes(model: Llava) -> int:
    """What a token reads: the parameters of the decoder, quantised copies in their place, the embedding table as the head only."""
    head = model.head_weight
    read = sum(p.nbytes for name, p in model.language_model.named_parameters() if name != "embed_tokens.weight")
    read += 0 if isinstance(head, Quantised) else head.nbytes
    copies = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Quantised)]
    return read + sum(copy.weight.nbytes + copy.scale.nbytes for copy in copies)


def read(core: Core, waiting: int, worked: float, limits: tuple[float, float] | None) -> Stats:
    """worked: seconds that the engine was at work.  limits: GB/s and GFLOP/s."""
    c, scheduler, decoder = core.counters, core.scheduler, core.model.config.decoder
    attention = 2 * (decoder.heads + decoder.kv_heads) * decoder.head_dim * decoder.width
    per_row = 2 * decoder.layers * (attention + 3 * decoder.mlp_width * decoder.width)
    timed = core.model.device.type == "cpu"
    decode_bytes = core.weight_bytes * c.decode_steps + c.decode_keys * core.block_bytes // core.page
    decode_gbs = decode_bytes / c.decode_seconds / 1e9 if timed and c.decode_seconds else 0.0
    prefill_gflops = per_row * c.prompt_rows / c.prefill_seconds / 1e9 if timed and c.prefill_seconds else 0.0
    return Stats(
        waiting=waiting,
        running=len(scheduler.running),
        submitted=c.submitted,
        finished=c.finished,
        failed=c.failed,
        cancelled=c.cancelled,
        steps=c.steps,
        preemptions=scheduler.preemptions,
        time_to_first_token=latencies(c.first_token),
        inter_token=latencies(c.between_tokens),
        tokens_per_s=c.new_tokens / worked if worked else 0.0,
        views_per_s=c.views / c.vision_seconds if timed and c.vision_seconds else 0.0,
        prefix_reused=scheduler.reused_rows / max(scheduler.looked_up_rows, 1),
        pictures_reused=c.pictures_reused / max(c.pictures, 1),
        blocks=core.pool.count,
        blocks_held=core.pool.held,
        kv_bytes=core.pool.count * core.block_bytes,
        feature_bytes=core.features.bytes,
        host_ms_per_step=c.host_seconds / max(c.steps, 1) * 1e3,
        decode_gbs=decode_gbs,
        prefill_gflops=prefill_gflops,
        decode_of_limit=decode_gbs / limits[0] if limits is not None and decode_gbs else None,
        prefill_of_torch=prefill_gflops / limits[1] if limits is not None and prefill_gflops else None,
        drafted=c.drafted,
        accepted=c.accepted,
    )
