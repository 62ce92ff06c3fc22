"""`pytest bench --benchmark-only`: every benchmark in turns with its baseline, the machine's limits first, ratios last.

--seconds S     time a benchmark may take, five rounds in any case (default 0.7)
--checkpoint D  a checkpoint of bench.full_size to use again
--long          the benchmarks marked `long` alone, which the rest leave out: minutes each, some wanting 16 GB
--record NAME   write the results to bench/results/<device>/<date>-<commit>-NAME.json
--results DIR   in place of bench/results
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from bench import results
from bench.full_size import make_full_size
from bench.paired import OURS, Paired, in_turns, of_limits, row_of_sides, row_of_times
from llava_fast import memory
from llava_fast.limits import Limits, describe, probe

_rows = pytest.StashKey[list[dict[str, Any]]]()
_limits = pytest.StashKey[dict[str, Limits]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("llava_fast benchmarks")
    group.addoption("--seconds", type=float, default=0.7, help="time a benchmark may take")
    group.addoption("--checkpoint", type=Path, help="a directory that bench.full_size made before, instead of a new one")
    group.addoption("--results", type=Path, default=results.RESULTS, help="where --record writes")
    group.addoption("--long", action="store_true", help="the long benchmarks, and only those")
    group.addoption("--record", metavar="NAME", help="write the results under bench/results/")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_rows] = []
    config.stash[_limits] = {}
    config.addinivalue_line("markers", "long: minutes; runs with --long alone")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = config.getoption("--long")
    left_out = [item for item in items if (item.get_closest_marker("long") is not None) != wanted]
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)


@pytest.fixture(scope="session")
def full_size(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the 0.5b architecture with random weights."""
    return request.config.getoption("--checkpoint") or make_full_size(tmp_path_factory.mktemp("full") / "model")


@pytest.fixture
def kept_memory() -> Iterator[None]:
    """Freed memory stays with the process, blocks past 32 MB too, which glibc maps and hands back one by one otherwise.

    A copy of 33 MB takes 13.7 ms into a new mapping and 3.5 ms into memory that is there.
    """
    with memory.kept_memory():  # elsewhere than in glibc there is nothing to change, for either side
        yield


@pytest.fixture
def limits(request: pytest.FixtureRequest) -> Callable[[str], Limits]:
    """limits('cpu') or limits('cuda'), probed once a session."""
    known = request.config.stash[_limits]

    def of(device: str) -> Limits:
        if device not in known:
            known[device] = probe(device)
        return known[device]

    return of


@pytest.fixture
def paired(benchmark: Any, limits: Callable[[str], Limits], request: pytest.FixtureRequest) -> Callable[..., Paired]:
    """paired(ours, baseline, device='cpu', bytes_moved=... | bytes_read=... | operations=..., limit=...) times both in turns.

    baseline is a function, or several by name: then the ratio is against the fastest (of those `among`), and the row has `sides`.
    pytest-benchmark times `ours`; each round is preceded by one of each baseline, five rounds or `rounds` at the least, `budget` seconds
    or --seconds; calls and warm: bench.paired.in_turns. Bytes and operations of one call of ours give its rate and the share of the limit:
    bench.paired.of_limits. axis='rows', at=4096: a point of a curve; names={'other': ('rows', 4096), 'third': None}: recorded under each of
    these names in place of the test's own. Further keywords are facts that go into the row.
    """

    def run(
        ours: Callable[[], object],
        baseline: Callable[[], object] | Mapping[str, Callable[[], object]],
        *,
        device: str = "cpu",
        bytes_moved: float | None = None,
        bytes_read: float | None = None,
        operations: float | None = None,
        limit: float | None = None,
        rounds: int = 5,
        budget: float | None = None,
        calls: int | Mapping[str, int] = 1,
        warm: bool = False,
        names: Mapping[str, tuple[str, float] | None] | None = None,
        **named: Any,
    ) -> Paired:
        machine = limits(device)
        several = isinstance(baseline, Mapping)
        sides = {OURS: ours, **(baseline if isinstance(baseline, Mapping) else {"baseline": baseline})}
        budget = request.config.getoption("--seconds") if budget is None else budget
        times = in_turns(sides, benchmark.pedantic, budget=budget, least=rounds, device=device, calls=calls, warm=warm)
        row = row_of_times(request.node.name, times, device=device, **named)
        pairs = Paired(tuple(times[OURS]), tuple(times[row["baseline"]]))
        if not several:
            del row["sides"], row["baseline"]
        work = {"bytes_moved": bytes_moved, "bytes_read": bytes_read, "operations": operations, "limit": limit}
        row |= of_limits(row["ours_ms"], machine, **work)
        benchmark.extra_info.update(row)
        for name, place in (names or {row["name"]: None}).items():
            request.config.stash[_rows].append({**row, "name": name} | (dict(zip(("axis", "at"), place, strict=True)) if place else {}))
        return pairs

    return run


@pytest.fixture
def record_sides(benchmark: Any, record_row: Callable[[dict[str, Any]], None]) -> Callable[..., dict[str, Any]]:
    """record_sides(name, sides, by, axis=..., at=..., **facts): bench.paired.row_of_sides, kept; returns the row."""

    def keep(*arguments: Any, **named: Any) -> dict[str, Any]:
        row = row_of_sides(*arguments, **named)
        record_row(row)
        benchmark.extra_info.update(row)
        return row

    return keep


@pytest.fixture
def record_row(limits: Callable[[str], Limits], request: pytest.FixtureRequest) -> Callable[[dict[str, Any]], None]:
    """record_row(row) keeps a measurement that was not timed by `paired`: it has a name, a device, and ours_/baseline_/ratio_ keys."""

    def keep(row: dict[str, Any]) -> None:
        limits(row["device"])
        request.config.stash[_rows].append(row)

    return keep


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int, config: pytest.Config) -> None:
    rows, known = config.stash[_rows], config.stash[_limits]
    if not rows:
        return
    terminalreporter.section("in turns with the baseline")
    for limits in known.values():
        terminalreporter.write_line(describe(limits))
    for row in [row for row in rows if "ours_ms" not in row]:
        rounds = f", {row['rounds']} rounds" if "rounds" in row else ""
        against = f", against {row['baseline']}" if "baseline" in row else ""
        terminalreporter.write_line(f"{row['name']}{rounds}{against}")
        for key in [key.removeprefix("ratio_") for key in row if key.startswith("ratio_")]:
            ours, theirs = row["ours_" + key], row["baseline_" + key]
            terminalreporter.write_line(f"  {key:14} ours {ours:>16,.2f}  baseline {theirs:>16,.2f}  ratio {row['ratio_' + key]:.2f}")
    timed = [row for row in rows if "ours_ms" in row]
    width = max((len(row["name"]) for row in timed), default=0)
    if timed:
        terminalreporter.write_line(f"{'':{width}} {'ours ms':>9} {'rate':>13} {'of limit':>9} {'baseline ms':>12}  ratio [quartiles]")
    for row in timed:
        rate = f"{row['gbs']:.1f} GB/s" if "gbs" in row else f"{row['gflops']:,.0f} GFLOP/s" if "gflops" in row else ""
        share = f"{row['of_limit']:.0%}" if "of_limit" in row else ""
        spread = f"{row['ratio']:.2f} [{row['ratio_low']:.2f}, {row['ratio_high']:.2f}] of {row['rounds']} {row.get('baseline', '')}"
        terminalreporter.write_line(
            f"{row['name']:{width}} {row['ours_ms']:9.3f} {rate:>13} {share:>9} {row['baseline_ms']:12.3f}  {spread}"
        )
    if (name := config.getoption("--record")) and exitstatus != pytest.ExitCode.INTERRUPTED:
        settings = {option: config.getoption("--" + option) for option in ("seconds", "long")}
        settings["complete"] = exitstatus == pytest.ExitCode.OK
        for device, limits in known.items():
            measured = [row for row in rows if row["device"] == device]
            path = results.write(name, measured, settings, limits, config.getoption("--results"))
            terminalreporter.write_line(f"written: {path}")
