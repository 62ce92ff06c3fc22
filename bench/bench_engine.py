"""The engine against transformers in fp32: many requests at once, whole processes in turns.

`python -m bench engine --long` writes the results. transformers answers in padded batches of 8, and one request at a time, which on a CPU
is often the faster. Random weights; equal_requests counts the requests whose ids are equal on all sides, and too few of them void the row
(one near tie among thousands of tokens makes a request differ from there on).
"""

from __future__ import annotations

import os
from typing import Any

import pytest

from bench.full_size import make_full_size
from bench.memory import median_of, run_in_turns
from bench.paired import OURS

SIDES = {OURS: "llava_fast", "transformers, batches of 8": "transformers-8", "transformers, one at a time": "transformers-1"}
SHOWN = (
    "time_to_first_token",
    "inter_token",
    "tokens_per_s",
    "views_per_s",
    "prefix_reused",
    "pictures_reused",
    "host_ms_per_step",
    "decode_gbs",
    "prefill_gflops",
)


KINDS = [("long_small", 2, 1), ("m4_small", 2, 2), ("m4", 2, 1), ("long", 6, 2)]


@pytest.mark.long
@pytest.mark.parametrize("kind, layers, rounds", KINDS)
def test_many_requests(
    kind: str, layers: int, rounds: int, tmp_path_factory: pytest.TempPathFactory, benchmark: Any, record_sides: Any, limits: Any
) -> None:
    checkpoint = tmp_path_factory.getbasetemp() / f"model_{layers}_layers"
    if not checkpoint.exists():
        make_full_size(checkpoint, tower_layers=layers, decoder_layers=layers)
    commands = {side: ["-m", "bench.many_requests", command, kind, str(checkpoint)] for side, command in SIDES.items()}
    runs = benchmark.pedantic(lambda: run_in_turns(commands, rounds, env={"PYTHONPATH": os.getcwd()}), rounds=1)
    answers = runs[OURS][0].report["ids"]
    each = [[a == b for a, b in zip(answers, run.report["ids"], strict=True)] for side in SIDES for run in runs[side]]
    equal = min(map(sum, each))
    assert equal >= 0.8 * len(answers), f"{kind}: {equal} of {len(answers)} answers of a side are ours"
    units = {"total_s": "total_s", "requests_per_s": "requests_per_s", "decode_ms": "decode_ms", "anon": "anon_bytes"}
    figures = {side: {name: median_of(runs[side], key) for key, name in units.items()} for side in SIDES}
    stats, machine = runs[OURS][0].report["stats"], limits("cpu")
    facts = {"layers": layers, "rounds": rounds, "requests": len(answers), "equal_requests": equal, "stats": {n: stats[n] for n in SHOWN}}
    facts |= {
        "decode_of_limit": stats["decode_gbs"] / machine.read_gbs,
        "prefill_of_limit": stats["prefill_gflops"] / machine.fma_fp32_gflops,
    }
    record_sides(f"many_requests_{kind}", figures, "requests_per_s", **facts)
