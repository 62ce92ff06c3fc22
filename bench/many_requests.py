"""One process of the throughput benchmark: `python -m bench.many_requests SIDE KIND CHECKPOINT`.

SIDE: llava_fast, or transformers-N, in batches of N.
KIND: m4, 32 requests shaped like the first of bench/workloads/m4_mix.jsonl, 64 new tokens each; long, 8 of one view, 256 new tokens;
m4_small, 8 of at most two views, 32 new tokens; long_small, 8 of one view, 64 new tokens.
At most 8 at a time: transformers takes them in padded batches, sorted by length, which is the order that pads least.
Prints JSON: seconds and peak included by who watches, requests a second, milliseconds a decode step, and every request's ids.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import time
from typing import Any

import numpy as np

from bench.workload import WORDS, Asked, photograph, records, requests

AT_A_TIME = 8


def questions(kind: str) -> list[Asked]:
    if kind in ("long", "long_small"):
        rng = np.random.default_rng(0)
        new = 256 if kind == "long" else 64
        return [Asked([photograph(i, (640, 480))], " ".join(rng.choice(WORDS, 20)), new) for i in range(8)]
    found, new = {"m4": (records(32), 64), "m4_small": (records(8, most_views=2), 32)}[kind]
    return requests(found, new, exactly=True)


def with_llava_fast(kind: str, checkpoint: str) -> dict[str, Any]:
    import llava_fast as lf
    from llava_fast.engine.engine import ANY_ROWS

    model = lf.load(checkpoint, device="cpu")
    model.generation_config.eos_token_id = []
    asked = questions(kind)
    start = time.perf_counter()
    with lf.Engine(model, max_running=AT_A_TIME, max_mixed_rows=ANY_ROWS) as engine:
        params = lf.SamplingParams(max_new_tokens=asked[0].new)
        handles = [engine.submit(lf.Request(one.prompt, images=one.pictures), params) for one in asked]
        answers = [handle.result()[0] for handle in handles]
        total, stats = time.perf_counter() - start, engine.stats()
    assert all(answer.error is None for answer in answers), [answer.error for answer in answers]
    return {
        "total_s": total,
        "requests_per_s": len(asked) / total,
        "decode_ms": stats.inter_token["p50"] * 1e3,
        "ids": [answer.token_ids for answer in answers],
        "stats": dataclasses.asdict(stats),
    }


def with_transformers(kind: str, checkpoint: str, at_most: int) -> dict[str, Any]:
    from bench.baselines import static_batching

    model, processor = static_batching.load(checkpoint)
    asked = questions(kind)
    ids: dict[int, list[int]] = {}
    steps: list[float] = []

    start = time.perf_counter()
    order = sorted(range(len(asked)), key=lambda i: (len(asked[i].pictures), len(asked[i].text)))
    for first in range(0, len(order), at_most):
        batch = order[first : first + at_most]
        answers, times = static_batching.answer(model, processor, [asked[i] for i in batch])
        steps += [b - a for a, b in zip(times, times[1:], strict=False)]
        ids |= dict(zip(batch, answers, strict=True))
    total = time.perf_counter() - start
    return {
        "total_s": total,
        "requests_per_s": len(asked) / total,
        "decode_ms": statistics.median(steps) * 1e3,
        "ids": [ids[i] for i in range(len(asked))],
    }


if __name__ == "__main__":
    side, kind, checkpoint = sys.argv[1:]
    batches = side.removeprefix("transformers-")
    print(json.dumps(with_llava_fast(kind, checkpoint) if batches == side else with_transformers(kind, checkpoint, int(batches))))
