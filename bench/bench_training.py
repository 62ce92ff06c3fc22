"""A training step on M4-shaped samples: ours, and transformers' from the padded one that Trainer does to the best that a loop by hand gets.

0.5b widths, a frozen tower of 4 layers, a decoder of 4 (or 12: four flatter the savings of the last layer), fp32, AdamW. Each side runs in
processes of its own, in turns, from the same checkpoint; memory is the peak of a process's RssAnon. Before anything counts, the losses of
the sides must agree, step for step. The row of 2,407 tokens pads 47 % of a batch of three, as the workload does in batches of four (49 %).

By default what fits five minutes on two cores; --long: rows of 1,000, 8,000 and 16,000 tokens, decoders of 12 layers, preferences, a batch
of the workload, every way to take the step of 2,407 tokens, and step times against their operations.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.baselines.training import COMPILED, LABEL_ROWS, LIGER, PADDED, PADDING_FREE, why_absent
from bench.full_size import make_full_size
from bench.memory import Measured, median_of, run_in_turns
from bench.paired import OURS
from bench.training_rows import check_losses, facts, of_sides, rates
from bench.training_steps import length, padding_waste, workload
from llava_fast.memory import available_bytes

PADDED_BYTES = 16 << 30  # what the padded step of 2,407 tokens takes: the one of 5,523 does not fit 24 GB
ENV = {"PYTHONPATH": os.getcwd()}


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[tuple[int, int], Path] = {}

    def of(decoder: int, tower: int = 4) -> Path:
        if (decoder, tower) not in made:
            folder = tmp_path_factory.mktemp("training") / f"{tower}-{decoder}"
            made[decoder, tower] = make_full_size(folder, tower_layers=tower, decoder_layers=decoder)
        return made[decoder, tower]

    return of


def commands(sides: Mapping[str, int], checkpoint: Path, row: str) -> dict[str, list[str]]:
    """sides: timed steps of each."""
    return {side: ["-m", "bench.training_steps", side, str(checkpoint), row, str(steps)] for side, steps in sides.items()}


def measured(benchmark: Any, sides: Mapping[str, list[str]], rounds: int = 1) -> dict[str, list[Measured]]:
    runs = benchmark.pedantic(lambda: run_in_turns(sides, rounds, env=ENV), rounds=1)
    check_losses(runs)
    return runs


def test_padded(checkpoint: Any, benchmark: Any, record_sides: Any, limits: Any) -> None:
    """The step of 2,407 tokens as Trainer takes it, and as the loop by hand does; a row against Trainer's alone too: people have it."""
    row, sides, absent = facts("2407", 4), {OURS: 2, PADDING_FREE: 2, PADDED: 1}, {}
    if available_bytes(torch.device("cpu")) < PADDED_BYTES:
        absent[PADDED] = f"it takes {PADDED_BYTES >> 30} GB, which are not free"
        del sides[PADDED]
    runs = measured(benchmark, commands(sides, checkpoint(4), "2407"))
    values = of_sides(runs, row["tokens"])
    row |= {**rates(runs, limits), "absent": absent}
    if PADDED in values:
        record_sides("training_padded_2407_4layers", {side: values[side] for side in (OURS, PADDED)}, "step_s", **row)
    record_sides("training_padding_free_2407_4layers", values, "step_s", axis="tokens", at=row["tokens"], **row)


@pytest.mark.long
def test_every_way(checkpoint: Any, benchmark: Any, record_sides: Any, limits: Any) -> None:
    """Between the two: padding with the loss of label rows alone, and the loop by hand with its layers compiled."""
    row, sides = facts("2407", 4), {OURS: 2, PADDING_FREE: 2, COMPILED: 2, LABEL_ROWS: 2}
    row["absent"] = {LIGER: why} if (why := why_absent(LIGER, "cpu")) else {}
    runs = measured(benchmark, commands(sides, checkpoint(4), "2407"))
    compiling = runs[COMPILED][0].report["warm_up_s"] - runs[PADDING_FREE][0].report["warm_up_s"]
    values = of_sides(runs, row["tokens"])
    record_sides("training_every_way_2407_4layers", values, "step_s", compile_s=compiling, **row, **rates(runs, limits))


def compare(row: str, layers: int, checkpoint: Any, benchmark: Any, record_sides: Any, limits: Any) -> None:
    known = facts(row, layers)
    runs = measured(benchmark, commands({OURS: 1, PADDING_FREE: 1}, checkpoint(layers), row))
    axis: dict[str, Any] = {"axis": "tokens", "at": known["tokens"]}
    record_sides(
        f"training_padding_free_{row}_{layers}layers", of_sides(runs, known["tokens"]), "step_s", **axis, **known, **rates(runs, limits)
    )


@pytest.mark.parametrize("row", ["5523", *(pytest.param(row, marks=pytest.mark.long) for row in ("1000", "8000", "16000"))])
def test_tokens(row: str, checkpoint: Any, benchmark: Any, record_sides: Any, limits: Any) -> None:
    compare(row, 4, checkpoint, benchmark, record_sides, limits)


@pytest.mark.long
@pytest.mark.parametrize("row", ["2407", "5523"])
def test_12_layers(row: str, checkpoint: Any, benchmark: Any, record_sides: Any, limits: Any) -> None:
    compare(row, 12, checkpoint, benchmark, record_sides, limits)


@pytest.mark.parametrize("size", [2, 4, 8, 16])
def test_padding_of_the_workload(size: int, benchmark: Any, record_row: Any) -> None:
    """Counted, not timed: what batches of the workload pad, in order and grouped by length."""
    lengths = [length(shape) for shape in workload()]
    in_order, grouped = benchmark.pedantic(lambda: [padding_waste(lengths, size, grouped) for grouped in (False, True)], rounds=1)
    record_row({"name": f"padding_of_batches_of_{size}", "device": "cpu", "padding_waste": in_order, "padding_waste_grouped": grouped})


@pytest.mark.long
def test_workload_batch(checkpoint: Any, benchmark: Any, record_sides: Any, limits: Any) -> None:
    """Two samples of the workload that pad as its batches of two do: seconds and bytes for 1,000 real tokens."""
    row, sides = facts("batch2", 4), {OURS: 1, PADDING_FREE: 1, LABEL_ROWS: 1}
    runs = measured(benchmark, commands(sides, checkpoint(4), "batch2"))
    values = of_sides(runs, row["tokens"])
    for of in values.values():
        of |= {f"per_1000_tokens_{unit}": of[key] * 1000 / row["tokens"] for unit, key in (("s", "step_s"), ("bytes", "anon_bytes"))}
    record_sides("training_workload_batch_4layers", values, "step_s", **row, **rates(runs, limits))


@pytest.mark.long
def test_preferences(checkpoint: Any, benchmark: Any, record_sides: Any, limits: Any) -> None:
    """A pair with 8 pictures: prompt and pictures once in the row, against both conversations whole, by the same trainer."""
    sides = {OURS: "shared", "both conversations whole": "apart"}
    runs = measured(benchmark, {name: ["-m", "bench.preference_steps", side, str(checkpoint(2, 2)), "1"] for name, side in sides.items()})
    values = {name: {"step_s": median_of(run, "step_s"), "anon_bytes": median_of(run, "anon")} for name, run in runs.items()}
    record_sides("preferences_8_pictures_2layers", values, "step_s", layers=2, **rates(runs, limits))


@pytest.mark.long
def test_operations(checkpoint: Any, benchmark: Any, record_row: Any, limits: Any) -> None:
    """Step times are those of the operations' number at one rate, from 1,000 to 16,000 tokens: ratio_* is a step's rate over the median."""
    sizes = ("1000", "2000", "4000", "8000", "16000")
    sides = {row: ["-m", "bench.training_steps", OURS, str(checkpoint(4)), row, "2"] for row in sizes}
    runs = benchmark.pedantic(lambda: run_in_turns(sides, 1, env=ENV), rounds=1)
    reports = {row: run.report for row, (run,) in runs.items()}
    each = {row: report["operations"] / report["step_s"] for row, report in reports.items()}
    rate = statistics.median(each.values())
    found: dict[str, Any] = {"name": "training_operations_4layers", "device": "cpu", "gflops": rate / 1e9}
    found["of_limit"] = rate / (limits("cpu").fma_fp32_gflops * 1e9)
    for row, report in reports.items():
        found |= {f"ours_{row}_s": report["step_s"], f"baseline_{row}_s": report["operations"] / rate, f"ratio_{row}_s": each[row] / rate}
    record_row(found)
    benchmark.extra_info.update(found)
