"""Where the time goes (llava_fast/profile.py), kept as data: tower, prefill and decode at 0.5b, a training step of 4 layers.

No baseline: the share of each op in its phase, and how near it is to its own limit.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

import llava_fast as lf
from bench.full_size import make_full_size
from llava_fast.profile import profile

TOKENS, TRAINING_TOKENS = 1500, 2407


def test_profile(full_size: Path, tmp_path: Path, benchmark: Any, record_row: Any, limits: Any) -> None:
    def measure() -> list[Any]:
        whole = profile(lf.load(full_size, device="cpu"), limits("cpu"), TOKENS)
        few = lf.load(make_full_size(tmp_path / "4", tower_layers=4, decoder_layers=4), device="cpu", dtype=torch.float32)
        return [*whole, profile(few, limits("cpu"), TOKENS, TRAINING_TOKENS)[-1]]

    for phase in benchmark.pedantic(measure, rounds=1):
        kept = [dataclasses.asdict(op) for op in phase.ops if op.seconds >= 0.005 * phase.seconds]
        record_row({"name": f"profile, {phase.name}", "device": "cpu", "seconds": phase.seconds, "ops": kept})
