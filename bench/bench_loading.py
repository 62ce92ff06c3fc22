"""Loading the 0.5b architecture from its bf16 checkpoint: seconds, peak and lasting anonymous memory of fresh processes.

Against transformers in fp32, which gives the answers that ours gives; what it takes to map the file as bf16 is in the row beside.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from bench.loading import SIDES
from bench.memory import median_of, run_in_turns
from bench.paired import OURS

ROUNDS = 1  # a process of each: importing takes longer than loading
# What each of ours is held against; torch has nothing narrower than int8.
RIVALS = {
    "bf16": ("llava_fast", "transformers fp32"),
    "int8": ("llava_fast int8", "transformers int8"),
    "int4": ("llava_fast int4", "transformers int8"),
}


def test_loading(full_size: Path, benchmark: Any, record_sides: Any) -> None:
    commands = {side: ["-m", "bench.loading", side, str(full_size)] for side in SIDES}
    runs = benchmark.pedantic(lambda: run_in_turns(commands, ROUNDS, env={"PYTHONPATH": os.getcwd()}), rounds=1)
    keys = ("load_s", "peak_bytes", "kept_bytes")
    found = {side: {key: median_of(runs[side], key) for key in keys} for side in SIDES}
    for weights, (ours, theirs) in RIVALS.items():
        mapped = {"mapped_bf16": found["transformers bf16"]} if weights == "bf16" else {}
        record_sides(f"loading_{weights}", {OURS: found[ours], theirs: found[theirs]}, by="load_s", rounds=ROUNDS, **mapped)
