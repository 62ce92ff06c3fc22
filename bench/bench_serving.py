"""Serving, with requests shaped like M4-Instruct's: rising rates, rising numbers of clients, and what a thousand of each scenario cost.

`pytest bench/bench_serving.py --benchmark-only --record serving` writes the results; with --long more points, more rounds, and what a bound
on others' prompts in a step does to tokens. Two layers of tower and decoder in the widths of the 0.5b model, random weights, fp32
arithmetic on both sides. A process a side, which take turns at each point. Both sides make as many tokens as an answer of the workload has,
16 at the most, and the same ones: a single answer that differs voids the run. transformers serves in padded batches of at most 8, and one
at a time, which on a CPU is often the faster of the two.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from bench.full_size import make_full_size
from bench.paired import OURS
from bench.serving import Report, in_rounds, medians, processes

LAYERS = 2
BATCHES, SINGLY = "transformers, batches of 8", "transformers, one at a time"
COMMANDS = {OURS: "llava_fast", BATCHES: "transformers-8", SINGLY: "transformers-1"}
MIX = {"count": 8, "most_views": 2, "new": 16}
RATES = (0.8, 1.6, 3.2)  # a second; two cores keep up with 0.8 one at a time, with 0.6 in batches of 8
CLIENTS = (1, 4, 8)
COSTS = {"text": 8, "single-image": 4, "multi-image": 2, "3d": 1, "video": 1}  # requests of each scenario
POINTS: dict[str, dict[str, Any]] = {f"rate_{rate:g}": {**MIX, "arrivals_per_s": rate} for rate in RATES}
POINTS |= {f"clients_{n}": {**MIX, "concurrency": n} for n in CLIENTS}
POINTS |= {f"cost_{kind}": {"scenario": kind, "count": count, "new": 16} for kind, count in COSTS.items()}
SOON, ROUNDS, LONG_ROUNDS = ("rate_1.6", "clients_8", "cost_multi-image"), 2, 3
OF_ONE = ("cost_3d", "cost_video", "clients_1")  # batches of one are served one at a time
# Enough requests for a 95th percentile, arriving at three quarters of what the engine can do, or from clients that keep it busy.
MIXED_ROWS, MORE = (128, 256, 512, 768, 1536), {**MIX, "count": 24}
LOADS = {"1.8_a_second": {"arrivals_per_s": 1.8}, "8_clients": {"concurrency": 8}}
BOUNDS = {f"{load}_{n}": {**MORE, **how, "engine": {"max_mixed_rows": n}} for load, how in LOADS.items() for n in MIXED_ROWS}


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    checkpoint = make_full_size(tmp_path_factory.mktemp("serving") / "model", tower_layers=LAYERS, decoder_layers=LAYERS)
    return {side: ["-m", "bench.serving", command, str(checkpoint)] for side, command in COMMANDS.items()}


@pytest.fixture(scope="module")
def measured(commands: dict[str, list[str]], request: pytest.FixtureRequest) -> dict[str, dict[str, list[Report]]]:
    """Point -> side -> its rounds."""
    long = request.config.getoption("--long")
    points = {name: point for name, point in POINTS.items() if long or name in SOON}
    with processes(commands) as sides:
        return in_rounds(sides, points, LONG_ROUNDS if long else ROUNDS, lambda side, name: side == BATCHES and name in OF_ONE)


@pytest.fixture(scope="module")
def bounded(commands: dict[str, list[str]]) -> Iterator[dict[str, dict[str, list[Report]]]]:
    with processes({OURS: commands[OURS]}) as sides:
        yield in_rounds(sides, BOUNDS, ROUNDS, lambda side, name: False)


def row_of(rounds: dict[str, list[Report]], point: str, record_sides: Callable[..., Any]) -> dict[str, Any]:
    """Record a point; `ratios_` are those of the rounds."""
    asked, facts = POINTS[point], dict[str, Any]()
    by = "per_1000_samples_s" if "scenario" in asked else "first_token_p50_s" if "arrivals_per_s" in asked else "requests_per_s"
    for reports in rounds.values():
        for figures in [report["figures"] for report in reports]:
            if "scenario" in asked:
                rate = figures["requests_per_s"]
                figures.clear()
                figures["per_1000_samples_s"] = 1000 / rate
            elif "arrivals_per_s" not in asked:  # what points before it left is still with the process
                del figures["anon_bytes"]
    for axis in ("arrivals_per_s", "concurrency"):
        facts |= {"axis": axis, "at": asked[axis]} if axis in asked else {}
    stats = rounds[OURS][0]["stats"]
    facts |= {"layers": LAYERS, "new_tokens": asked["new"], "requests": asked["count"], "rounds": len(rounds[OURS])}
    facts |= {key: stats[key] for key in ("host_ms_per_step", "views_per_s", "steps")}
    row = record_sides(f"serving_{point}", {side: medians(reports) for side, reports in rounds.items()}, by, **facts)
    for key in [key.removeprefix("ratio_") for key in row if key.startswith("ratio_")]:
        pairs = [(a["figures"][key], b["figures"][key]) for a, b in zip(rounds[OURS], rounds[row["baseline"]], strict=True)]
        row[f"ratios_{key}"] = [ours / theirs if key.endswith("_per_s") else theirs / ours for ours, theirs in pairs]
    return row


@pytest.mark.parametrize("point", [*SOON, *(pytest.param(name, marks=pytest.mark.long, id=f"long-{name}") for name in POINTS)])
def test_serving(point: str, measured: Any, record_sides: Any, benchmark: Any) -> None:
    """rate_R: requests arrive by a Poisson process, at the same times on every side; by the median time to the first token.
    clients_N: each client asks again as soon as it has its answer.  cost_S: seconds for 1,000 samples, from pictures in memory to the last
    token, where all of them wait from the beginning."""
    benchmark.pedantic(row_of, args=(measured[point], point, record_sides), rounds=1)


@pytest.mark.long
@pytest.mark.parametrize("rows", MIXED_ROWS)
@pytest.mark.parametrize("load", LOADS)
def test_bound(load: str, rows: int, bounded: Any, record_row: Any, benchmark: Any) -> None:
    """What `max_mixed_rows` does to the time between tokens, to the first one, and to throughput."""
    reports = bounded[f"{load}_{rows}"][OURS]
    kept = ("inter_token_p95_ms", "first_token_p50_s", "requests_per_s")
    each = {key: [report["figures"][key] for report in reports] for key in kept}
    row = {"name": f"serving_bound_{load}", "device": "cpu", "axis": "max_mixed_rows", "at": rows, "rounds": len(reports), "layers": LAYERS}
    row |= {"sides": {OURS: {key: statistics.median(values) for key, values in each.items()}}, "each": each, "requests": MORE["count"]}
    benchmark.pedantic(record_row, args=(row,), rounds=1)
