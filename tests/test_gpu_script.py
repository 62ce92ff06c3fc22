"""`make gpu` and tests/gpu where there is no GPU: the same code on the CPU, small, with the reference in the kernels' place."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench import gpu, results
from bench.cases import CASES, Case
from bench.correctness import check
from llava_fast import limits
from llava_fast.kernels import registry

ROOT = Path(__file__).parent.parent
MACHINE = limits.Limits("cpu", 1, *[1.0] * 4, None)


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=400
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_case_calls_its_op(case: Case) -> None:
    """A name of an argument that the op no longer has would otherwise show on a GPU, as a row without a figure."""
    with registry.use(**{case.op: "reference"}), torch.no_grad():
        case.run(**case.inputs("cpu", torch.float32, True, 0))


@pytest.mark.parametrize("backward", [False, True])
def test_a_wrong_answer_is_not_timed(backward: bool) -> None:
    """Sequences that see each other, as SDPA over the whole pack has them; and another shape."""
    case = next(case for case in CASES if case.name == "attention d64 causal 4x4096")

    def one_sequence(q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> Tensor:
        return case.baselines["sdpa"](q, k, v, cu[[0, -1]])

    baselines = {
        "sdpa": case.baselines["sdpa"],
        "one sequence": one_sequence,
        "half": lambda **inputs: case.baselines["sdpa"](**inputs)[1:],
    }
    row = gpu.measure(dataclasses.replace(case, baselines=baselines), MACHINE, True, backward)
    assert "sdpa_ms" in row and row["one sequence_void"] > gpu.BOUND and "one sequence_ms" not in row
    assert "half_ms" not in row and row["baseline_ms"] == row["sdpa_ms"]


@pytest.mark.slow
def test_dry_run(tmp_path: Path) -> None:
    done = run("-m", "bench.gpu", "--dry-run", "--out", str(tmp_path), "--stages", "build,kernels,model,training")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    written = {path.stem.rpartition("gpu_")[2]: results.load(path) for path in tmp_path.rglob("*.json")}
    assert set(written) == {"build", "kernels", "model", "training"}
    rows = {row["name"]: row for row in written["kernels"]["measurements"]}
    timed = [case for case in CASES if case.times]
    assert len(rows) == sum(1 + bool(case.grads) for case in timed)
    assert all("ours reference_ms" in row for row in rows.values()), [row for row in rows.values() if "ours reference_ms" not in row]
    assert {"sdpa_ms", "flash_attn_absent"} <= set(rows["attention d72 full 64x729"])
    assert any(row["name"].startswith("decode") and row["tokens_per_s"] > 0 for row in written["model"]["measurements"])
    ours, sdpa, flash = written["training"]["measurements"]
    assert ours["gflops"] > 0 and ours["loss"] == pytest.approx(sdpa["loss"], rel=1e-4) and "FlashAttention" in flash["absent"]


@pytest.mark.slow
def test_gpu_tests_on_the_cpu() -> None:
    done = run("-m", "pytest", "-q", "-p", "no:xdist", "tests/gpu", LLAVA_FAST_DRY_RUN="1")
    assert done.returncode == 0, done.stdout[-3000:]


def test_gpu_tests_are_skipped_with_a_reason() -> None:
    if not torch.cuda.is_available():
        done = run("-m", "pytest", "-q", "-rs", "-p", "no:xdist", "tests/gpu", "-k", "rope")
        assert done.returncode == 0 and "torch.cuda is not available" in done.stdout
        done = run("-m", "bench.gpu")
        assert done.returncode == 2 and "make gpu needs a GPU" in done.stdout


@pytest.mark.parametrize(
    ("kernel", "fault"),
    [
        (lambda x: x.exp(), None),
        (lambda x: x.exp() * 1.001, "output 0: off by"),
        (lambda x: x.detach().exp() + 0 * x, "gradient of x: off by"),
        (lambda x: x.exp() + torch.rand(1) * 1e-3, "other bits in a second call"),
        (lambda x: x.exp().double(), "expected"),
    ],
)
def test_a_wrong_kernel_is_found(kernel: Callable, fault: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_ops", dict(registry._ops))
    registry.register("toy", {"reference": registry.Implementation(), "cpu": registry.Implementation()})
    run = {"reference": torch.exp, "cpu": kernel}
    case = Case("toy", "toy", lambda m: {"x": m.normal(4, 5)}, lambda x: run[registry.resolve_name("toy", "cpu", x.dtype)](x), ("x",))
    if fault is None:
        assert set(check(case, "cpu", torch.float32, "cpu")) == {"output 0", "gradient of x"}
    else:
        with pytest.raises(AssertionError, match=fault):
            check(case, "cpu", torch.float32, "cpu")


def test_rows_that_were_measured_survive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stage(machine: limits.Limits, dry: bool) -> Iterator[gpu.Row]:
        yield {"name": "first", "ok": True}
        yield {"name": "second", "ok": False, "told": "AssertionError: off by 3"}
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu, "kernels", stage)
    with pytest.raises(KeyboardInterrupt):
        gpu.run_stage("kernels", "cpu", tmp_path, True, MACHINE)
    (path,) = tmp_path.rglob("*.json")
    assert [row["name"] for row in results.load(path)["measurements"]] == ["first", "second"]
    assert "1 of 2 ok" in gpu.table([path]) and "FAILED second: AssertionError: off by 3" in gpu.table([path])
