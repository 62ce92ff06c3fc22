"""Serving, with requests shaped like M4-Instruct's: rising rates, rising numbers of clients, and what a thousand of each scenario cost.

`pytest bench/bench_serving.py --benchmark-only --record serving` writes the results. Two layers of tower and decoder in the widths of the
0.5b model, random weights, fp32 arithmetic on both sides; a process a side runs all its points. Both sides make as many tokens as an answer
of the workload has, 16 at the most; equal_requests counts the answers that are the same (a near tie among logits makes a request differ
from there on). transformers serves in padded batches of at most 8, and one at a time, which on a CPU is often the faster of the two.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import pytest

from bench.full_size import make_full_size
from bench.memory import run_measured

LAYERS = 2
OURS, BATCHES, SINGLY = "llava_fast", "transformers, batches of 8", "transformers, one at a time"
COMMANDS = {OURS: "llava_fast", BATCHES: "transformers-8", SINGLY: "transformers-1"}
MIX = {"count": 8, "most_views": 2, "new": 16}
CLIENTS = (1, 4, 8)
RATES = (0.8, 1.6, 3.2)  # a second; two cores keep up with 0.8 one at a time, with 0.6 in batches of 8
COSTS = {"text": 8, "single-image": 4, "multi-image": 2, "3d": 1, "video": 1}  # requests of each scenario
POINTS: dict[str, dict[str, Any]] = {f"rate_{rate:g}": {**MIX, "arrivals_per_s": rate} for rate in RATES}
POINTS |= {f"clients_{n}": {**MIX, "concurrency": n} for n in CLIENTS}
POINTS |= {f"cost_{kind}": {"scenario": kind, "count": count, "new": 16} for kind, count in COSTS.items()}
# Batches of one are served one at a time, and how many wait changes nothing for who serves one at a time: what holds for both.
SAME = {BATCHES: ("cost_3d", "cost_video", "clients_1"), SINGLY: tuple(f"clients_{n}" for n in CLIENTS[1:])}
HOLDS = ("requests_per_s", "tokens_per_s")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Side -> point -> its report."""
    checkpoint = make_full_size(tmp_path_factory.mktemp("serving") / "model", tower_layers=LAYERS, decoder_layers=LAYERS)
    reports = {}
    for side, command in COMMANDS.items():
        names = [name for name in POINTS if name not in SAME.get(side, ())]
        arguments = ["-m", "bench.serving", command, str(checkpoint), json.dumps([POINTS[name] for name in names])]
        run = run_measured(arguments, env={"PYTHONPATH": os.getcwd()})
        reports[side] = dict(zip(names, run.report["points"], strict=True))
    for name in SAME[SINGLY]:
        figures = {key: reports[SINGLY]["clients_1"]["figures"][key] for key in HOLDS}
        reports[SINGLY][name] = {**reports[SINGLY]["clients_1"], "figures": figures}
    return reports


def row_of(measured: dict[str, dict[str, Any]], point: str, by: str, record_sides: Callable[..., Any], **facts: Any) -> dict[str, Any]:
    """Record a point; void where too few answers are the same."""
    sides = {side: reports[point] for side, reports in measured.items() if point in reports}
    ids, stats = {side: report["ids"] for side, report in sides.items()}, sides[OURS]["stats"]
    equal = {side: sum(a == b for a, b in zip(ids[OURS], ids[side], strict=True)) for side in ids if side != OURS}
    count = len(ids[OURS])
    assert min(equal.values()) >= 0.8 * count, f"{point}: of {count} answers as many are those of ours: {equal}"
    figures = {side: dict(report["figures"]) for side, report in sides.items()}
    if "arrivals_per_s" not in POINTS[point]:  # what points before it left is still with the process
        figures = {side: {key: value for key, value in f.items() if key != "anon_bytes"} for side, f in figures.items()}
    if "scenario" in POINTS[point]:
        figures = {side: {"per_1000_samples_s": 1000 / f["requests_per_s"]} for side, f in figures.items()}
    facts |= {"layers": LAYERS, "new_tokens": POINTS[point]["new"], "requests": count, "equal_requests": min(equal.values()), "rounds": 1}
    facts |= {key: stats[key] for key in ("host_ms_per_step", "views_per_s", "steps")}
    return record_sides(f"serving_{point}", figures, by, **facts)


@pytest.mark.parametrize("rate", RATES)
def test_rate(rate: float, measured: Any, record_sides: Any, benchmark: Any) -> None:
    """Requests arrive by a Poisson process, at the same times on every side; by the median time to the first token."""
    point = (measured, f"rate_{rate:g}", "first_token_p50_s", record_sides)
    benchmark.pedantic(row_of, args=point, kwargs={"axis": "arrivals_per_s", "at": rate}, rounds=1)


@pytest.mark.parametrize("clients", CLIENTS)
def test_clients(clients: int, measured: Any, record_sides: Any, benchmark: Any) -> None:
    """Each client asks again as soon as it has its answer."""
    point = (measured, f"clients_{clients}", "requests_per_s", record_sides)
    benchmark.pedantic(row_of, args=point, kwargs={"axis": "concurrency", "at": clients}, rounds=1)


@pytest.mark.parametrize("scenario", COSTS)
def test_cost(scenario: str, measured: Any, record_sides: Any, benchmark: Any) -> None:
    """Seconds for 1,000 samples, from pictures in memory to the last token, where all of them wait from the beginning."""
    benchmark.pedantic(row_of, args=(measured, f"cost_{scenario}", "per_1000_samples_s", record_sides), rounds=1)
