"""The engine's core driven turn by turn, and requests to drive it with."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import llava_fast as lf
from llava_fast.batch import splice
from llava_fast.engine.core import Core, Options
from llava_fast.engine.handle import Handle
from llava_fast.engine.job import Job
from llava_fast.engine.sequence import Prompt
from llava_fast.inputs.layouts import view_layout

GREEDY = lf.SamplingParams(max_new_tokens=8)


def views_of(seed: int, count: int = 1, size: int = 42) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 255, (count, 3, size, size), dtype=np.uint8))


def prompt_of(model: lf.LlavaFast, parts: list[Any]) -> Prompt:
    """parts: token ids, and for pictures their views, in order."""
    mark, ids, visuals, views = model.config.image_token_id, [], [], []
    for part in parts:
        ids += [mark] * len(part) if isinstance(part, torch.Tensor) else part
        if isinstance(part, torch.Tensor):
            visuals += [view_layout(model.config.vision.grid)] * len(part)
            views.append(part)
    return Prompt.of(splice(ids, visuals, mark), torch.cat(views) if views else None, ids)


@dataclass
class Ask:
    parts: list[Any]
    params: lf.SamplingParams
    priority: int = 0


def new_core(model: lf.LlavaFast, **options: Any) -> Core:
    defaults = dict(kv_cache_bytes=1 << 24, page=16, max_running=8, max_rows=512, feature_cache_bytes=1 << 20)
    return Core(model, Options(**{**defaults, **options}))


def new_job(model: lf.LlavaFast, ask: Ask, number: int) -> Job:
    handle = Handle(number)
    return Job(
        number,
        None,
        ask.params,
        lf.InputOptions(),
        model.eos_ids,
        handle,
        time.perf_counter(),
        ask.priority,
        prompt=prompt_of(model, ask.parts),
    )


def drive(core: Core, jobs: list[Job], arrivals: list[int], cancels: dict[int, int] | None = None) -> int:
    """Begin job i before turn arrivals[i], cancel it before turn cancels[i]; returns the turns until all are over."""
    cancels, turn = cancels or {}, 0
    with torch.inference_mode():
        while not all(job.over for job in jobs):
            for i, job in enumerate(jobs):
                if arrivals[i] == turn:
                    core.begin(job)
                if cancels.get(i) == turn and not job.over:
                    core.stop(job, "cancelled")
            core.turn()
            held = {block for sequence in core.scheduler.running for block in sequence.blocks}
            assert len(held) == core.pool.held <= core.pool.count
            assert core.features.bytes <= core.features.max_bytes
            turn += 1
            assert turn < 100_000, "no end"
        while not core.idle:  # what a step that overlaps still brings
            core.turn()
    return turn


def answers(jobs: list[Job]) -> list[list[list[int]]]:
    return [[completion.token_ids for completion in job.handle.result(0)] for job in jobs]


def solo(model: lf.LlavaFast, ask: Ask) -> list[list[int]]:
    core, job = new_core(model, feature_cache_bytes=0, prefix_cache=False), new_job(model, ask, 0)
    drive(core, [job], [0])
    return answers([job])[0]


def assert_clean(core: Core) -> None:
    assert core.pool.held == 0 and core.pool.available == core.pool.count
    assert not core.scheduler.running and not core.scheduler.waiting and core.under_way is None
    assert sorted(core.scheduler._slots) == list(range(core.scheduler.max_running))


def some_asks() -> list[Ask]:
    """Requests that share beginnings and pictures, greedy, sampled and penalised, with stops and minima, short and long."""
    rng = np.random.default_rng(0)
    system = rng.integers(10, 300, 20).tolist()
    made = []
    for i in range(20):
        parts: list[Any] = [system] if i % 2 else []
        for _ in range(int(rng.integers(0, 4))):
            parts += [views_of(int(rng.integers(0, 6)), int(rng.integers(1, 4))), rng.integers(10, 300, rng.integers(1, 20)).tolist()]
        parts += [rng.integers(10, 300, rng.integers(1, 60)).tolist()]
        if i % 5 == 0:
            parts += [views_of(7)]  # a prompt that ends with a picture
        params = lf.SamplingParams(
            max_new_tokens=int(rng.integers(1, 40)),
            temperature=[0.0, 1.0, 0.0, 1.3][i % 4],
            top_k=[0, 30][i % 2],
            top_p=[1.0, 0.9, 1.0][i % 3],
            min_new_tokens=0,
            repetition_penalty=[1.0, 1.0, 1.2][i % 3],
            seed=i,
            n=3 if i % 7 == 3 else 1,
            logprobs=i % 3 == 0,
        )
        made.append(Ask(parts, params))
    return made
