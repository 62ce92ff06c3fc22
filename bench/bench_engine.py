"""The engine against transformers in fp32: many requests at once, whole processes in turns.

`pytest bench/bench_engine.py --benchmark-only --record engine` writes the results, with --long those of 32 requests of the whole mixture
and of 256 new tokens. Random weights; equal_requests counts the requests whose ids are equal on both sides (one near tie among thousands of
tokens makes a request differ from there on).
"""

from __future__ import annotations

import os
from typing import Any

import pytest

from bench.full_size import make_full_size
from bench.memory import median_of, run_in_turns

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


LONG = pytest.mark.long
KINDS = [("long_small", 2, 1), *(pytest.param(*kind, marks=LONG) for kind in (("m4_small", 2, 1), ("m4", 2, 1), ("long", 6, 2)))]


@pytest.mark.parametrize("kind, layers, rounds", KINDS)
def test_many_requests(
    kind: str, layers: int, rounds: int, tmp_path_factory: pytest.TempPathFactory, benchmark: Any, record_row: Any, limits: Any
) -> None:
    checkpoint = tmp_path_factory.getbasetemp() / f"model_{layers}_layers"
    if not checkpoint.exists():
        make_full_size(checkpoint, tower_layers=layers, decoder_layers=layers)
    sides = ("llava_fast", "transformers")
    commands = {side: ["-m", "bench.many_requests", side, kind, str(checkpoint)] for side in sides}
    runs = benchmark.pedantic(lambda: run_in_turns(commands, rounds, env={"PYTHONPATH": os.getcwd()}), rounds=1)
    ours, theirs = runs["llava_fast"], runs["transformers"]
    row = {"name": f"many_requests_{kind}", "device": "cpu", "layers": layers, "rounds": rounds}
    for key in ("total_s", "requests_per_s", "decode_ms", "anon"):
        name = {"anon": "anon_bytes"}.get(key, key)
        row[f"ours_{name}"], row[f"baseline_{name}"] = median_of(ours, key), median_of(theirs, key)
        gain = row[f"baseline_{name}"] / row[f"ours_{name}"]
        row[f"ratio_{name}"] = 1 / gain if key == "requests_per_s" else gain  # above 1: ours is better
    stats, machine = ours[0].report["stats"], limits("cpu")
    row["stats"] = {name: stats[name] for name in SHOWN}
    row["decode_of_limit"] = stats["decode_gbs"] / machine.read_gbs
    row["prefill_of_limit"] = stats["prefill_gflops"] / machine.fma_fp32_gflops
    row["requests"] = len(ours[0].report["ids"])
    row["equal_requests"] = sum(a == b for a, b in zip(ours[0].report["ids"], theirs[0].report["ids"], strict=True))
    assert row["equal_requests"] >= 0.8 * row["requests"], row
    record_row(row)
    benchmark.extra_info.update(row)
