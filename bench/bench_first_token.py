"""Time to the first token and peak memory on the 0.5b architecture: ours and transformers, whole processes in turns.

Both load the same bf16 checkpoint of random weights, compute at fp32's accuracy (transformers with dtype=float32), read two photographs
from disk and answer one question greedily; the row is void if the ids differ.
`pytest bench/bench_first_token.py --benchmark-only --record first_token` writes the result.
"""

from __future__ import annotations

import os
import statistics
from pathlib import Path

from bench.memory import median_of, run_in_turns

NEW_TOKENS = 16
ROUNDS = 2


def test_first_token(full_size: Path, benchmark, record_row) -> None:
    sides = ("llava_fast", "transformers")
    commands = {side: ["-m", "bench.first_token", side, str(full_size), str(NEW_TOKENS)] for side in sides}
    runs = benchmark.pedantic(lambda: run_in_turns(commands, ROUNDS, env={"PYTHONPATH": os.getcwd()}), rounds=1)
    ids = {tuple(run.report["ids"]) for side in sides for run in runs[side]}
    assert len(ids) == 1, f"the two sides answer differently: {ids}"

    ours, theirs = runs["llava_fast"], runs["transformers"]
    row = {"name": "first_token_05b_two_photographs", "device": "cpu", "rounds": ROUNDS, "new_tokens": NEW_TOKENS}
    for key in ("load_s", "first_token_s", "token_ms", "rss", "anon"):
        name = {"rss": "rss_bytes", "anon": "anon_bytes"}.get(key, key)
        row[f"ours_{name}"], row[f"baseline_{name}"] = median_of(ours, key), median_of(theirs, key)
        each = [median_of([b], key) / median_of([a], key) for a, b in zip(ours, theirs, strict=True)]
        row[f"ratio_{name}"], row[f"ratios_{name}"] = statistics.median(each), each
    record_row(row)
    benchmark.extra_info.update(row)
