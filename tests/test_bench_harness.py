"""The benchmark harness: limits, timing in turns, peak memory, and the result files."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import cold, memory, paired, results
from llava_fast import _cpu, limits

ROOT = Path(__file__).parent.parent
MIB = 1 << 20


@pytest.fixture
def small_probe(monkeypatch: pytest.MonkeyPatch) -> limits.Limits:
    monkeypatch.setattr(limits, "CPU_BYTES", 1 << 22)
    monkeypatch.setattr(limits, "CPU_GEMM", 128)
    return limits.probe()


def test_limits_are_in_the_units_they_claim(small_probe: limits.Limits) -> None:
    """Within what any machine of the last ten years can do: a factor of 1000 in a unit shows."""
    assert small_probe.device == "cpu" and small_probe.threads == torch.get_num_threads()
    assert 0.5 < small_probe.read_gbs < 20000 and 0.5 < small_probe.copy_gbs < 20000
    assert 0.5 < small_probe.gemm_fp32_gflops < 100000 and small_probe.gemm_bf16_gflops > 0.1
    assert small_probe.fma_fp32_gflops is not None and 1 < small_probe.fma_fp32_gflops < 100000
    assert (small_probe.tiles_bf16_gflops is not None) == ("amx" in _cpu.supported_isas())
    assert small_probe.tiles_bf16_gflops is None or small_probe.fma_fp32_gflops < small_probe.tiles_bf16_gflops < 1e6
    assert f"{small_probe.copy_gbs:.1f} GB/s" in limits.describe(small_probe)


@pytest.mark.parametrize(
    ("tiles", "rates"),
    [(None, (400, 400, 400, 400)), (1500.0, (400, 400, 500, 500)), (6000.0, (1000, 1200, 2000, 2000))],
)
def test_rate_of_products_with_and_without_tiles(tiles: float | None, rates: tuple[float, ...]) -> None:
    machine = limits.Limits("cpu", 2, 20.0, 20.0, 300.0, 1000.0, 400.0, tiles)
    dtypes = (torch.float32, torch.float16, torch.bfloat16, torch.int8)
    assert tuple(machine.products_gflops(dtype) for dtype in dtypes) == rates
    assert limits.Limits("cuda", 1, 4000.0, 4000.0, 50e3, 790e3, None).products_gflops(torch.float32) == 790e3


def test_ratio_is_taken_pair_by_pair() -> None:
    """A machine that halves its speed in the middle changes both times and no ratio."""
    pairs = paired.Paired(ours=(1e-3, 1e-3, 1e-3, 2e-3, 2e-3), baseline=(3e-3, 3e-3, 3e-3, 6e-3, 6e-3))
    assert pairs.ratios == pytest.approx([3] * 5)
    expected = {"ours_ms": 1, "baseline_ms": 3, "ratio": 3, "ratio_low": 3, "ratio_high": 3, "rounds": 5}
    assert pairs.summary() == pytest.approx(expected)
    spread = paired.Paired(ours=(1.0,) * 5, baseline=(1.0, 2.0, 3.0, 4.0, 5.0)).summary()
    assert (spread["ratio_low"], spread["ratio"], spread["ratio_high"]) == (2, 3, 4)


@pytest.mark.parametrize(("budget", "warm", "expected"), [(0.0, False, 5), (0.75, True, 7), (1e9, True, 100)])
def test_turns_fit_their_budget(budget: float, warm: bool, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two calls in 30 ms and four in 70: 0.1 s a round."""
    calls: list[str] = []

    def repeat(ours: Callable[[], None], setup: Callable[[], None], rounds: int) -> None:
        for _ in range(rounds):
            setup()
            ours()

    monkeypatch.setattr(paired, "seconds", lambda run, device: run() or {"a": 0.07, "b": 0.03}[calls[-1]])
    sides = {"b": lambda: calls.append("b"), "llava_fast": lambda: calls.append("a")}
    times = paired.in_turns(sides, repeat, budget=budget, least=5, calls={"b": 2, "llava_fast": 4}, warm=warm)
    assert calls == ["b", "a"] * (expected + (not warm))
    assert times == {"b": [0.03 / 2] * expected, "llava_fast": [0.07 / 4] * expected}


@pytest.mark.parametrize(("sides", "least"), [({"a": print}, 5), ({"llava_fast": print, "a": print}, 1)])
def test_turns_without_us_or_of_one_round_are_refused(sides: dict, least: int) -> None:
    with pytest.raises(ValueError, match="expected 'llava_fast' among the sides and 2 rounds at the least"):
        paired.in_turns(sides, print, budget=1.0, least=least)


def test_a_row_of_times_counts_those_that_answer_alike() -> None:
    times = {"narrow": [1.0, 1.0, 1.0], "exact": [4.0, 8.0, 6.0], "llava_fast": [2.0, 2.0, 1.0]}
    row = paired.row_of_times("step", times, ["exact"], layers=4)
    assert (row["baseline"], row["ratio"], row["ratio_low"], row["layers"]) == ("exact", 4, 3, 4) and "ratio_ms" not in row
    assert row["sides"] == {"narrow": {"ms": 1000}, "exact": {"ms": 6000}, "llava_fast": {"ms": 2000}}
    assert paired.row_of_times("step", times)["baseline"] == "narrow"


def test_shares_of_the_limits() -> None:
    machine = limits.Limits("cpu", 2, read_gbs=20.0, copy_gbs=30.0, gemm_fp32_gflops=1.0, gemm_bf16_gflops=1.0, fma_fp32_gflops=1.0)
    assert paired.of_limits(2.0, machine, bytes_moved=30e6) == pytest.approx({"gbs": 15, "of_limit": 0.5})
    assert paired.of_limits(2.0, machine, bytes_read=30e6) == pytest.approx({"gbs": 15, "of_limit": 0.75})
    both = paired.of_limits(2.0, machine, bytes_moved=30e6, bytes_read=24e6)
    assert both == pytest.approx({"gbs": 15, "of_limit": 0.6}), "24 MB at 20 GB/s take longer than 30 MB at 30"
    assert paired.of_limits(2.0, machine, operations=1e6, limit=1e9) == pytest.approx({"gflops": 0.5, "of_limit": 0.5})
    assert paired.of_limits(2.0, machine) == {}


def test_a_ring_hands_out_what_was_used_longest_ago() -> None:
    """All its functions go on where the last one stopped, and an output stays until its call is made again."""
    used: list[tuple[str, float]] = []
    sets = cold.copied([torch.zeros(1).requires_grad_(), "shared"], 3)
    assert len({x.data_ptr() for x, _ in sets}) == 3 and all(x.requires_grad and shared == "shared" for x, shared in sets)
    around = cold.ring([(torch.full((1,), float(i)),) for i in range(3)])

    def run(side: str) -> Callable[[torch.Tensor], object]:
        return lambda x: used.append((side, float(x))) or Output()

    class Output:
        alive = 0

        def __init__(self) -> None:
            Output.alive += 1

        def __del__(self) -> None:
            Output.alive -= 1

    one, two = around(run("one"), 2), around(run("two"))
    one()
    two()
    one()
    assert used == [("one", 0), ("one", 1), ("two", 2), ("two", 0), ("two", 1), ("one", 2), ("one", 0)]
    assert Output.alive == 5, "of the last two calls and three"
    assert cold.copies_for(cold.CPU_BYTES / 8 + 1) == 8 and cold.copies_for(4 * cold.CPU_BYTES) == 2


def test_gradients_of_a_ring() -> None:
    sets = cold.copied([torch.arange(3.0).requires_grad_(), torch.ones(3)], 2)
    backward = cold.gradients(lambda x, y: x * x * y, sets, [[torch.full((3,), 1.0)], [torch.full((3,), 2.0)]])
    for _ in range(2):
        assert [backward(i)[0].tolist() for i in range(2)] == [[0, 2, 4], [0, 4, 8]]


@pytest.mark.parametrize("size", [0, 1, 63, 64, 4095, 4096 * 5 + 64 * 3 + 7])
def test_copy_past_caches(size: int) -> None:
    source, target = torch.randint(256, (size + 64,), dtype=torch.uint8), torch.zeros(size + 64, dtype=torch.uint8)
    assert source.data_ptr() % 64 == target.data_ptr() % 64 == 0
    _cpu.copy_past_caches(target.data_ptr(), source.data_ptr(), size, 2)
    assert torch.equal(target[:size], source[:size]) and not target[size:].any()


def test_a_row_of_sides_is_against_the_strongest() -> None:
    sides = {
        "llava_fast": {"step_s": 2.0, "tokens_per_s": 100.0, "anon_bytes": 5},
        "padded": {"step_s": 9.0, "tokens_per_s": 20.0, "anon_bytes": 20},
        "by hand": {"step_s": 5.0, "tokens_per_s": 40.0},
    }
    row = paired.row_of_sides("training", sides, "step_s", axis="tokens", at=2407, layers=4)
    assert row["baseline"] == "by hand" and row["sides"] == sides
    assert row["ratio_step_s"] == 2.5 and row["ratio_tokens_per_s"] == 2.5, "above 1 is better in either direction"
    assert "ratio_anon_bytes" not in row, "the strongest did not measure it"
    assert (row["axis"], row["at"], row["layers"]) == ("tokens", 2407, 4)
    assert paired.strongest(sides, "tokens_per_s") == "by hand" and paired.strongest(sides, "anon_bytes") == "padded"


def test_a_row_without_a_rival_is_refused() -> None:
    with pytest.raises(ValueError, match="expected 'llava_fast' and a baseline with 'ms'"):
        paired.row_of_sides("alone", {"llava_fast": {"ms": 1.0}}, "ms")
    with pytest.raises(ValueError, match="a point of a curve has an axis"):
        paired.row_of_sides("half", {"llava_fast": {"ms": 1.0}, "b": {"ms": 2.0}}, "ms", axis="rows")


def test_paired_fixture_in_a_run(tmp_path: Path) -> None:
    """Turns, ratio, share of the limit, extra_info and the recorded file, from a real `pytest --benchmark-only`."""
    (tmp_path / "bench_order.py").write_text(
        """
import types
import pytest
import llava_fast.limits
def test_order(paired, limits, benchmark, monkeypatch):
    limits("cpu")
    now, calls = [0.0], []
    monkeypatch.setattr(llava_fast.limits, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))  # a clock that only spend() moves
    def spend(name, seconds):
        calls.append(name)
        now[0] += seconds
    pairs = paired(lambda: spend("a", 0.002), lambda: spend("b", 0.006), bytes_moved=2e6)
    assert len(pairs.ours) == len(pairs.baseline) == 5
    assert calls == ["a", "b"] + ["b", "a"] * 5  # warm-up, then turns, of which the first tells how many fit
    assert benchmark.extra_info["ratio"] == sorted(pairs.ratios)[2]
    assert benchmark.stats.stats.rounds == 4
    benchmark._mode = None  # a second measurement of one test
    sides = {"slow": lambda: spend("b", 0.02), "quick": lambda: spend("c", 0.01)}
    paired(lambda: spend("a", 0.002), sides, axis="rows", at=7, rounds=6)
    assert calls[12:] == ["a", "b", "c"] + ["b", "c", "a"] * 6
    benchmark._mode = None
    paired(lambda: spend("a", 0.002), sides, among=["slow"], names={"one": ("rows", 8), "two": None}, warm=True, budget=0.0)

@pytest.mark.long
def test_long(paired):
    raise AssertionError("it was not asked for")
"""
    )
    script = f"""
import sys, pytest, llava_fast.limits, bench.results, pathlib
llava_fast.limits.CPU_BYTES, llava_fast.limits.CPU_GEMM = 1 << 22, 128
bench.results.RESULTS = pathlib.Path({str(tmp_path)!r}) / "results"
arguments = ["--benchmark-only", "-p", "bench.conftest", "-p", "no:cacheprovider", "-p", "no:xdist", "-c", "/dev/null"]
sys.exit(pytest.main([*arguments, "--seconds", "0.01", "--record", "order", {str(tmp_path / "bench_order.py")!r}]))
"""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=clean, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "limits of this cpu" in run.stdout and "test_order" in run.stdout
    (file,) = (tmp_path / "results").rglob("*.json")
    result = results.load(file)
    row, several, one, two = result["measurements"]
    assert result["settings"] == {"seconds": 0.01, "long": False, "complete": True} and row["rounds"] == 5
    assert [row[key] for key in ("ours_ms", "baseline_ms", "ratio", "ratio_low", "ratio_high")] == pytest.approx([2, 6, 3, 3, 3])
    assert row["gbs"] == pytest.approx(1)
    assert row["of_limit"] == pytest.approx(row["gbs"] / result["limits"]["copy_gbs"])
    assert several["baseline"] == "quick" and several["ratio"] == pytest.approx(5) and (several["axis"], several["at"]) == ("rows", 7)
    assert {side: values["ms"] for side, values in several["sides"].items()} == pytest.approx({"llava_fast": 2, "slow": 20, "quick": 10})
    assert (one["name"], one["at"], two["name"], one["baseline"], one["rounds"]) == ("one", 8, "two", "slow", 5) and "at" not in two
    assert "sides" not in row and "1 deselected" in run.stdout


def test_result_file_round_trip(tmp_path: Path, small_probe: limits.Limits) -> None:
    measurements = [{"name": "a", "ours_ms": 1.0}, {"name": "b", "peak_bytes": 5}]
    path = results.write("first_token", measurements, {"views": 2}, small_probe, tmp_path)
    result = results.load(path)
    assert path.name == f"{result['date'][:10]}-{result['commit'] or 'nogit'}-first_token.json" and path.parent.parent == tmp_path
    assert result["measurements"] == measurements and result["settings"] == {"views": 2}
    assert result["device"]["kind"] == "cpu" and result["device"]["name"] == results.cpu_name()
    assert result["versions"]["torch"] == torch.__version__ and result["limits"]["read_gbs"] == small_probe.read_gbs
    with pytest.raises(ValueError, match="lower-case"):
        results.write("First token", measurements, {}, small_probe, tmp_path)


@pytest.mark.parametrize("change", [{"schema": 2}, {"extra": 1}, {"measurements": [{"ours_ms": 1}]}])
def test_files_of_another_schema_are_refused(change: dict, tmp_path: Path, small_probe: limits.Limits) -> None:
    path = results.write("x", [{"name": "a"}], {}, small_probe, tmp_path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=str(path.name)):
        results.load(path)


def test_committed_results_follow_the_schema() -> None:
    for path in results.RESULTS.rglob("*.json"):
        results.load(path)


def test_peak_in_process_sees_memory_that_was_given_back() -> None:
    before = memory.status()["RssAnon"]
    with memory.peak_in_process() as peak:
        # Pages of its own: malloc may hand out memory that the process has kept.
        with mmap.mmap(-1, 64 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as block:
            for _ in range(64):
                block.write(b"x" * MIB)
            time.sleep(40 * memory.INTERVAL)  # it samples in turns with whatever else the machine runs
    assert 60 * MIB < peak.anon - before < 96 * MIB and peak.rss >= peak.anon


def test_measured_process(tmp_path: Path) -> None:
    """200 MiB of anonymous memory and 100 MiB of a mapped file: RSS counts both, RssAnon the first."""
    (tmp_path / "mapped").write_bytes(bytes(100 * MIB))
    script = f"""
import json, mmap, time
with open({str(tmp_path / "mapped")!r}, "rb") as file:
    view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    total = sum(view[i] for i in range(0, len(view), 4096))
block = bytearray(b"1") * {200 * MIB}
time.sleep(0.4)
print("a line before")
print(json.dumps(dict(first_token_s=0.25, total=total)))
"""
    ballast = np.ones(400 * MIB, dtype=np.uint8)  # a large parent must not count as the child's
    measured = memory.run_measured(["-c", script])
    assert measured.report == {"first_token_s": 0.25, "total": 0} and measured.seconds > 0.1
    assert 200 * MIB < measured.anon < 230 * MIB
    assert measured.anon + 95 * MIB < measured.rss < 340 * MIB
    assert ballast[0] == 1


def test_failed_process_shows_its_error() -> None:
    with pytest.raises(RuntimeError, match="ended with 3"):
        memory.run_measured(["-c", "import sys; sys.exit(3)"])
    with pytest.raises(RuntimeError, match="ended with -9"):
        memory.run_measured(["-c", "while True: pass"], timeout=0.2)


def test_processes_run_in_turns(tmp_path: Path) -> None:
    log = tmp_path / "log"
    commands = {name: ["-c", f"open({str(log)!r}, 'a').write('{name}'); print('{{\"value\": {i}}}')"] for i, name in enumerate("ab")}
    runs = memory.run_in_turns(commands, rounds=3)
    assert log.read_text() == "abbaab"
    assert memory.median_of(runs["b"], "value") == 1 and memory.median_of(runs["a"], "seconds") > 0
