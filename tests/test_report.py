"""Tables from result files, and ratios that fell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench import check, goals, page, pictures, report, results
from bench.paired import OURS, row_of_sides

ROOT = Path(__file__).parent.parent
MARKS = f"{report.BEGIN}\nold\n{report.END}\n{report.DEMO_BEGIN}\nold\n{report.DEMO_END}"
LIMITS = dict(device="cpu", threads=2, read_gbs=20, copy_gbs=18, gemm_fp32_gflops=300, gemm_bf16_gflops=30, fma_fp32_gflops=400)


def write(folder: Path, name: str, measurements: list[dict[str, Any]], date: str = "2026-01-01T00:00:00+00:00") -> None:
    device = {"kind": "cpu", "name": "A machine", "driver": None, "threads": 2, "isa": "avx2"}
    facts = {"schema": 1, "name": name, "date": date, "commit": "abc", "dirty": False, "device": device, "versions": {"torch": "2"}}
    folder.mkdir(parents=True, exist_ok=True)
    whole = {**facts, "settings": {}, "limits": LIMITS, "measurements": measurements}
    (folder / f"{date[:10]}-{name}.json").write_text(json.dumps(whole))


def timed(name: str, ratio: float, spread: float = 0.01) -> dict[str, Any]:
    times = {"ours_ms": 10.0, "baseline_ms": 10.0 * ratio, "ratio": ratio, "ratio_low": ratio - spread, "ratio_high": ratio + spread}
    return {"name": name, "device": "cpu", **times, "rounds": 5, "gbs": 9.0, "of_limit": 0.5}


def test_what_is_committed_is_what_the_results_say() -> None:
    known = report.newest(results.RESULTS)
    readme = (ROOT / "README.md").read_text()
    assert report.rendered(readme, known["cpu"]) == readme, "run `make report`"
    assert page.page(known) == (ROOT / "docs" / "performance.md").read_text(), "run `make report`"


def test_a_line_without_a_measurement_says_so(tmp_path) -> None:
    write(tmp_path, "model", [timed("test_prefill", 1.98)])
    write(tmp_path, "model", [timed("test_prefill", 2.5)], date="2026-02-01T00:00:00+00:00")
    made = report.table(report.newest(tmp_path)["cpu"])
    assert "| prompt of 1,500 tokens | 10 ms | 25 ms | 2.5x |" in made
    assert made.count(goals.NOT_MEASURED) == len(report.LINES) - 1


def test_a_goal_takes_its_worst_shape(tmp_path) -> None:
    write(tmp_path, "model", [timed("test_vision_tower[1]", 1.29), timed("test_vision_tower[4]", 2.0), timed("test_decode[bf16]", 3.0)])
    memory = {"name": "linear_cross_entropy_memory", "ours_mb": 51.4, "baseline_mb": 895, "ratio_mb": 17.4}
    write(tmp_path, "linear_cross_entropy", [memory])
    steps = {"name": "operations", "ratio_1000_s": 1.1, "ratio_16000_s": 0.7, "ratio_anon_bytes": 0.1}
    write(tmp_path, "training_operations", [steps])
    made = "\n".join(goals.section(report.newest(tmp_path)))
    assert "| vision tower, against transformers | at least 1.3x | 1.29x | **not met** |" in made
    assert "results equal to fp32, against transformers | at least 3x | 3x | met |" in made
    assert "| its memory, of theirs | at most 10% | 6% | met |" in made
    assert "from 1,000 to 16,000 tokens, of their median | at least 75% | 70% | **not met** |" in made
    assert "| prompt of 1,500 tokens, against transformers | at least 1.12x | not measured |  |" in made
    every, measured = sum(map(len, goals.CPU.values())), 5  # decode's share of the limit, at 50 %, is not met
    assert f"On the CPU 2 of {every} are met, {every - measured} not measured." in made
    assert f"On a GPU 0 of {sum(map(len, goals.GPU.values()))} are met" in made


def test_a_goal_names_what_is_measured() -> None:
    """A pattern that matches nothing would say 'not measured' for ever."""
    known = report.newest(results.RESULTS)["cpu"]
    assert [goal for own in goals.CPU.values() for goal in own if goal.value(known) is None] == []


@pytest.mark.parametrize(
    "value, unit, shown",
    [
        (0.2507, "s", "251 ms"),
        (53.7, "ms", "54 ms"),
        (22.6, "s", "23 s"),
        (4.6, "s", "4.6 s"),
        (1.25, "ms", "1.2 ms"),
        (51.4, "mb", "51 MB"),
    ],
)
def test_units(value, unit, shown) -> None:
    assert page.with_unit(value, unit) == shown


def test_main_writes_all_of_it(tmp_path) -> None:
    write(tmp_path / "bench" / "results" / "a-machine", "model", [timed("test_prefill", 2.0), timed("test_decode[bf16]", 3.0)])
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(f"Before.\n{MARKS}\nAfter.\n")
    report.main(tmp_path)
    readme = (tmp_path / "README.md").read_text()
    assert readme.startswith("Before.\n") and readme.endswith("\nAfter.\n") and "old" not in readme and "3.0x" in readme
    written = (tmp_path / "docs" / "performance.md").read_text()
    assert "| prefill | 10 ms | 20 ms | 2.00 | 1.99 to 2.01 | 9.0 GB/s | 50% |" in written and "Not measured." in written
    assert all((tmp_path / "docs" / name).stat().st_size > 5000 for name in ("limits.png", "ratios.png"))
    with pytest.raises(ValueError, match="expected a part between"):
        report.put("no marks", "x")


def point(name: str, axis: str, at: float, **sides: dict[str, float]) -> dict[str, Any]:
    return row_of_sides(name, {side.replace("_", " ") if side != OURS else side: own for side, own in sides.items()}, "s", axis=axis, at=at)


def test_points_make_curves(tmp_path) -> None:
    """One picture a name and axis, a table with a column a side, and a picture of before goes."""
    rows = [
        point(
            f"serving_at_{rate:g}",
            "arrivals_per_s",
            rate,
            llava_fast={"s": 1.0, "anon_bytes": 2e9},
            as_used={"s": 8.0},
            by_hand={"s": 2 * rate},
        )
        for rate in (2.0, 0.5)
    ]
    rows += [point(f"test_decode[bf16-{n}]", "context", n, llava_fast={"s": 1.0}, sdpa={"s": 3.0}) for n in (256, 1500)]
    rows += [point("test_decode[bf16-8]", "batch", 8, llava_fast={"s": 1.0}, sdpa={"s": 3.0})]
    write(tmp_path / "bench" / "results" / "a-machine", "serving", rows)
    (result,) = report.newest(tmp_path)["cpu"].values()
    made = pictures.curves(result)
    assert list(made) == ["serving at over arrivals per s", "decode bf16 over context"], "one point is no curve"
    assert made["serving at over arrivals per s"].sides["s"]["by hand"] == [(0.5, 1.0), (2.0, 4.0)]
    (tmp_path / "docs" / "curves").mkdir(parents=True)
    (tmp_path / "docs" / "curves" / "old.png").write_bytes(b"")
    (tmp_path / "README.md").write_text(MARKS)
    report.main(tmp_path)
    written = (tmp_path / "docs" / "performance.md").read_text()
    drawn = sorted(path.name for path in (tmp_path / "docs" / "curves").iterdir())
    assert drawn == ["cpu-serving-decode-bf16-over-context.png", "cpu-serving-serving-at-over-arrivals-per-s.png"]
    assert all(f"](curves/{name})" in written for name in drawn)
    assert "| serving at | llava_fast | as used | by hand | ratio |" in written
    assert "| 2 arrivals per s: s | 1.0 s | 8.0 s | 4.0 s | 4.00 |" in written
    assert "| 0.5 arrivals per s: anon bytes | 2.00 GB |  |  |  |" in written
    assert "| 8 batch: s | 1.0 s | 3.0 s | 3.00 |" in written, "a point without a curve is in a table all the same"


def test_where_the_time_goes_is_a_table_and_a_picture(tmp_path) -> None:
    op = dict(name="linear", calls=3, seconds=0.6, moved=1e9, operations=1e9, limit=0.3, bound="operations")
    small = dict(name="copy", calls=1, seconds=0.01, moved=1e6, operations=0.0, limit=0.0, bound="")
    phase = {"name": "profile, prefill", "device": "cpu", "seconds": 1.0, "ops": [op, small]}
    write(tmp_path / "bench" / "results" / "a-machine", "profile", [phase])
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(MARKS)
    report.main(tmp_path)
    written = (tmp_path / "docs" / "performance.md").read_text()
    assert "| profile, prefill: 1,000 ms |" in written and "| linear | 3 | 600.0 | 60% | 50% | operations |" in written
    assert "| copy |" not in written and "](profile.png)" in written
    assert (tmp_path / "docs" / "profile.png").stat().st_size > 2000


def test_the_demo_is_told_by_its_seeds(tmp_path) -> None:
    keys = ("captions_random_projector", "captions_aligned", "accuracy_after_align", "accuracy_after_sft", "accuracy_after_interleave")
    keys += ("preferred_before_dpo", "preferred_after_dpo", "hedged_before_dpo", "hedged_after_dpo")
    keys += ("accuracy_multi-image", "accuracy_video", "accuracy_3D_views", "accuracy_one_picture")
    seed = dict.fromkeys(keys, 1.0) | {"name": "demo_seed_0", "total_s": 300.0}
    seed |= {"agree_with_transformers": 500, "compared_with_transformers": 500}
    worse = seed | {"name": "demo_seed_1", "captions_aligned": 0.9, "agree_with_transformers": 499, "total_s": 320.0}
    write(tmp_path, "demo", [seed, worse])
    made = report.demo_table(report.newest(tmp_path)["cpu"]["demo"])
    assert "mean of 2 seeds" in made and "| 95% (90%) |" in made and "| 999 of 1,000 |" in made and "| 310 |" in made
    assert "not measured" in report.demo_table(None)


def test_a_timed_row_names_its_strongest_rival(tmp_path) -> None:
    sides = {OURS: {"ms": 10.0}, "torch": {"ms": 30.0}, "torch.compile": {"ms": 20.0}}
    write(tmp_path, "rowwise", [{**timed("test_norm", 2.0), "sides": sides, "baseline": "torch.compile"}])
    assert "| norm | 10 ms | 20 ms torch.compile (torch 30) | 2.00 |" in page.page(report.newest(tmp_path))


def test_ratios_that_fell(tmp_path, capsys) -> None:
    before = [
        timed("a", 2.0),
        timed("b", 2.0),
        timed("c", 2.0, spread=0.3),
        timed("gone", 1.0),
        {"name": "once", "ours_s": 1, "ratio_s": 3.0},
        {"name": "thrice", "ours_s": 1, "ratio_s": 3.0, "ratios_s": [2.6, 3.0, 3.1]},
        {**timed("rivals", 4.0), "baseline": "torch"},
    ]
    write(tmp_path / "before", "model", before)
    now = [timed("a", 1.9), timed("b", 1.8), timed("c", 1.8), {"name": "once", "ours_s": 1, "ratio_s": 2.0}]
    now.append({**timed("rivals", 2.0), "baseline": "torch.compile"})  # of a machine where it can be had
    write(tmp_path / "now", "model", [*now, {"name": "thrice", "ours_s": 1, "ratio_s": 2.5, "ratios_s": [2.4, 2.5, 2.7]}])
    assert check.main(tmp_path / "now", tmp_path / "before") == 1
    said = capsys.readouterr().out
    assert "b, ms: 2.00x before, 1.80x now (-10%) on A machine" in said and "once, s: 3.00x before, 2.00x now (-33%)" in said
    assert "5 ratios compared, 2 fell by more than 7%" in said
    assert "gone of model was not measured" in said
    assert check.main(tmp_path / "before", tmp_path / "before") == 0
    write(tmp_path / "fewer", "model", before[1:])
    assert check.main(tmp_path / "fewer", tmp_path / "before") == 1, "a row that is void is no pass"
    assert capsys.readouterr().out.splitlines()[-2:] == ["a of model was not measured", "6 ratios compared, 0 fell by more than 7%"]
    write(tmp_path / "other", "model", [timed("nobody", 1.0)])
    assert check.main(tmp_path / "other", tmp_path / "before") == 2
