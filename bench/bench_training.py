"""A training step on M4-shaped samples: ours, transformers' padded one, and the best that a loop by hand gets out of transformers.

0.5b widths, a frozen tower of 4 layers, a decoder of 4 (or 12: four flatter the savings of the last layer), fp32, AdamW. Each side runs in
processes of its own, in turns, from the same checkpoint: seconds are the median of a process's steps after the first, memory is its peak of
RssAnon. Before anything counts, the losses of the sides must agree, step for step.

    pytest bench/bench_training.py --benchmark-only -k "padding_free and 4layers and 2407" --record training_2407

Parts of two to eight minutes on two cores: "padding_free and 4layers and 2407", the same with 5523 and with 12layers, "operations",
"preferences", and "test_padded", which wants 16 GB.
"""

from __future__ import annotations

import os
import statistics
from pathlib import Path
from typing import Any

import pytest

from bench.full_size import make_full_size
from bench.memory import Measured, median_of, run_in_turns, run_measured
from llava_fast.memory import available_bytes

ROUNDS, STEPS = 2, 2
PADDED_BYTES = 16 << 30  # what the padded step of 2,407 tokens takes: the one of 5,523 does not fit 24 GB
TOKENS = (1000, 2000, 4000, 8000, 16000)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[int, Path] = {}

    def of(layers: int) -> Path:
        if layers not in made:
            made[layers] = make_full_size(tmp_path_factory.mktemp("training") / str(layers), tower_layers=4, decoder_layers=layers)
        return made[layers]

    return of


def command(side: str, checkpoint: Path, row: str, steps: int = STEPS) -> list[str]:
    return ["-m", "bench.training_steps", side, str(checkpoint), row, str(steps)]


def check_losses(runs: dict[str, list[Measured]], reference: str) -> None:
    """Every process takes the same steps; weights of different orders of summation drift apart by less than this in four."""
    expected = runs[reference][0].report["losses"]
    for side, measured in runs.items():
        for run in measured:
            assert run.report["losses"] == pytest.approx(expected, rel=1e-4), (
                f"{side} trains something else: {run.report['losses']} {expected}"
            )


def compare(name: str, baseline: str, checkpoint: Path, row: str, rounds: int, steps: int, benchmark: Any, record_row: Any) -> None:
    commands = {side: command(side, checkpoint, row, steps) for side in (baseline, "llava_fast")}
    in_turns(name, commands, baseline, "llava_fast", rounds, benchmark, record_row)


def in_turns(name: str, commands: Any, baseline: str, side: str, rounds: int, benchmark: Any, record_row: Any) -> None:
    runs = benchmark.pedantic(lambda: run_in_turns(commands, rounds, env={"PYTHONPATH": os.getcwd()}), rounds=1)
    check_losses(runs, side)
    ours, theirs = runs[side], runs[baseline]
    measured = {"name": name, "device": "cpu", "rounds": rounds, "tokens": ours[0].report["tokens"]}
    for key, unit in (("step_s", "step_s"), ("anon", "anon_bytes")):
        measured[f"ours_{unit}"], measured[f"baseline_{unit}"] = median_of(ours, key), median_of(theirs, key)
        each = [median_of([b], key) / median_of([a], key) for a, b in zip(ours, theirs, strict=True)]
        measured[f"ratio_{unit}"], measured[f"ratios_{unit}"] = statistics.median(each), each
    measured["gflops"] = ours[0].report["operations"] / measured["ours_step_s"] / 1e9
    record_row(measured)
    benchmark.extra_info.update(measured)


def test_padded(checkpoint: Any, benchmark: Any, record_row: Any) -> None:
    import torch

    if available_bytes(torch.device("cpu")) < PADDED_BYTES:
        pytest.skip(f"transformers' padded step takes {PADDED_BYTES >> 30} GB, which are not free")
    compare("training_padded_2407_4layers", "padded", checkpoint(4), "2407", 1, STEPS, benchmark, record_row)


@pytest.mark.parametrize("row", ["2407", "5523"])
@pytest.mark.parametrize("layers", [4, 12], ids=["4layers", "12layers"])
def test_padding_free(layers: int, row: str, checkpoint: Any, benchmark: Any, record_row: Any) -> None:
    rounds = 1 if layers == 12 and row == "5523" else ROUNDS
    compare(f"training_padding_free_{row}_{layers}layers", "padding_free", checkpoint(layers), row, rounds, STEPS, benchmark, record_row)


def test_preferences(checkpoint: Any, benchmark: Any, record_row: Any) -> None:
    """A pair with 8 pictures: prompt and pictures once in the row, against both conversations whole."""
    commands = {side: ["-m", "bench.preference_steps", side, str(checkpoint(4)), str(STEPS)] for side in ("apart", "shared")}
    in_turns("preferences_8_pictures_4layers", commands, "apart", "shared", ROUNDS, benchmark, record_row)


def test_operations(checkpoint: Any, benchmark: Any, record_row: Any, limits: Any) -> None:
    """Step times are those of the operations' number at one rate, from 1,000 to 16,000 tokens: off_* is measured over modelled."""

    def measure() -> dict[int, Measured]:
        env = {"PYTHONPATH": os.getcwd()}
        return {
            tokens: run_measured(command("llava_fast", checkpoint(4), str(tokens), 3 if tokens < 8000 else 2), env) for tokens in TOKENS
        }

    runs = benchmark.pedantic(measure, rounds=1)
    rates = {tokens: run.report["operations"] / run.report["step_s"] for tokens, run in runs.items()}
    rate = statistics.median(rates.values())
    measured: dict[str, Any] = {"name": "training_operations_4layers", "device": "cpu", "rounds": 1, "gflops": rate / 1e9}
    for tokens, run in runs.items():
        measured |= {f"ours_{tokens}_s": run.report["step_s"], f"baseline_{tokens}_s": run.report["operations"] / rate}
        measured |= {f"ratio_{tokens}_s": rates[tokens] / rate, f"anon_bytes_{tokens}": run.anon}
    measured["of_limit"] = rate / (limits("cpu").gemm_fp32_gflops * 1e9)
    record_row(measured)
    benchmark.extra_info.update(measured)
