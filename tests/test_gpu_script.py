"""`make gpu` and tests/gpu where there is no GPU: the same code on the CPU, small, with the reference in the kernels' place."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import gpu, gpu_training, results, whole_model
from bench.baselines import inference
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


def test_what_is_no_number_is_not_timed_and_what_raises_costs_nobody_else_anything() -> None:
    case = next(case for case in CASES if case.name == "swiglu 8192x11008")

    def no_memory(x: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 90 GiB\n(and more)")

    baselines = {"nothing": lambda x: case.baselines["torch"](x) * torch.nan, "large": no_memory, "torch": case.baselines["torch"]}
    row = gpu.measure(dataclasses.replace(case, baselines=baselines), MACHINE, True, True)
    assert row["nothing_void"] == float("inf") and "nothing_ms" not in row
    assert row["large_absent"] == "OutOfMemoryError: CUDA out of memory. Tried to allocate 90 GiB" and "ok" not in row
    assert row["torch_ms"] == row["baseline_ms"] and row["ours reference_ms"] > 0


def test_a_wrong_kernel_of_ours_is_not_timed() -> None:
    """One that leaves out the last rows: the row fails."""
    case = next(case for case in CASES if case.name == "swiglu 8192x11008")

    def run(x: Tensor) -> Tensor:
        out = case.run(x)
        return out if registry.resolve_name("activation", "cpu", x.dtype) == "reference" else out.index_fill(0, torch.tensor([47]), 0.0)

    row = gpu.measure(dataclasses.replace(case, run=run, baselines={}), MACHINE, True, False)
    assert row["ok"] is False and row["told"].startswith("ours cpu is off by 0.1") and row["ours cpu_void"] > gpu.BOUND
    assert "ours cpu_ms" not in row and row["ours_ms"] == row["ours reference_ms"]


# --- the whole model


@pytest.fixture(scope="module")
def model() -> tuple[whole_model.Setup, dict[str, Tensor], Any]:
    made = whole_model.setup("cpu", small=True)
    return made, whole_model.answers(made), whole_model.transformers_like(made)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_sides_of_the_whole_model_give_our_answers(attention: str, model: Any) -> None:
    setup, truth, theirs = model
    rows = list(whole_model.measure_attention(setup, theirs, attention, truth))
    rows += list(whole_model.measure_static(setup, theirs, False, truth)) if attention == "sdpa" else []
    assert len(rows) == (7 if attention == "sdpa" else 5) and all(row["error"] < 1e-5 and row["ms"] > 0 for row in rows)


@torch.inference_mode()
@pytest.mark.parametrize("fault", ["mirrored", "token lost", "key lost", "values moved", "other rows", "nothing", "shape"])
def test_a_side_of_the_whole_model_that_is_off_is_not_timed(fault: str, model: Any) -> None:
    """By more than what bf16 is allowed on a GPU."""
    setup, truth, theirs = model
    tower, _, _, prefill, decode = whole_model.works(setup)
    keys, values = whole_model.past_of(setup, 2)
    token, ids = setup.ids[:2, 0], setup.ids[:2]
    mirrored = dataclasses.replace(setup, views=setup.views.flip(3))

    def lost() -> Tensor:
        less = [value.clone() for value in values]
        for value in less:
            value[:, :, 4] = 0
        return inference.decoding(theirs, keys, less, token)()

    def moved() -> Tensor:
        return inference.decoding(theirs, keys, [v.roll(1, 2) for v in values], token)()

    work, call = {
        "mirrored": (tower, whole_model.their_call(mirrored, theirs, tower)),
        "token lost": (prefill, lambda: theirs(input_ids=ids[:, 1:], logits_to_keep=1).logits[:, -1]),
        "key lost": (decode, lost),
        "values moved": (decode, moved),
        "other rows": (decode, lambda: truth[decode.title].flip(0)),
        "nothing": (decode, lambda: truth[decode.title] * torch.nan),
        "shape": (decode, lambda: truth[decode.title][:1]),
    }[fault]
    row = whole_model.row_of(work, "theirs", call, truth, setup)
    assert row.pop("name") == f"{work.title}, theirs" and set(row) == {"void", "error"}
    assert not row["error"] <= whole_model.BOUNDS[torch.bfloat16]


def test_ops_of_ours_that_are_off_are_not_timed(model: Any) -> None:
    setup, truth, _ = model
    other = {title: answer + answer.abs().mean() for title, answer in truth.items()}
    rows = list(whole_model.measure_ours(setup, "triton ops", other))
    assert len(rows) == 5 and all(row["void"] and not any(key.endswith(("ms", "_s", "step")) for key in row) for row in rows)


# --- a training step


Trained = tuple[str, Any, Any, dict[str, Tensor]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A checkpoint, samples, and what our first step comes to."""
    folder = str(tmp_path_factory.mktemp("gpu"))
    rows, pixels = gpu_training.samples(gpu_training.SMALL, gpu_training.save_random(folder, "cpu", True), 2000)
    return folder, rows, pixels, gpu_training.first_step(gpu_training.our_side(folder, "cpu", rows, pixels)[0])


def compared(trained: Trained, small: bool) -> dict[str, Any]:
    folder, rows, pixels, expected = trained
    side = gpu_training.their_side(folder, "cpu", torch.float32, rows, pixels, "sdpa")
    return gpu_training.compared("theirs", side, expected, 100, "cpu", small)


def test_the_training_baseline_is_the_same_step(trained: Trained) -> None:
    row = compared(trained, True)
    assert row["ms"] > 0 and max(row["errors"].values()) < 2**-8 and set(row["errors"]) == {"loss", "norm", *gpu_training.COMPARED}


@pytest.mark.parametrize("fault", ["see each other", "other denominator", "frozen projector", "other labels", "twice"])
def test_a_training_baseline_of_other_work_is_not_timed(fault: str, trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    """Past what bf16 is allowed on a GPU."""
    batch, loss = gpu_training.baselines.padding_free_batch, gpu_training.baselines.padding_free_loss

    def other_batch(*given: Any) -> dict[str, Any]:
        made = batch(*given)
        if fault == "see each other":
            made["model"]["position_ids"] = torch.arange(made["model"]["input_ids"].shape[1])[None]
        if fault == "other labels":
            made["label_rows"] = made["label_rows"] + 1
        return made

    def other_loss(model: Any, batch: dict[str, Any]) -> Tensor:
        if fault == "frozen projector":
            model.model.multi_modal_projector.requires_grad_(False)
        found = loss(model, batch)
        if fault == "other denominator":
            return found * len(batch["labels"]) / batch["model"]["input_ids"].shape[1]
        return found + loss(model, batch).detach() * 0 + (found - found.detach() if fault == "twice" else 0)

    monkeypatch.setattr(gpu_training.baselines, "padding_free_batch", other_batch)
    monkeypatch.setattr(gpu_training.baselines, "padding_free_loss", other_loss)
    row = compared(trained, False)
    assert row["void"] and "ms" not in row and any(error > gpu_training.bound(name, False) for name, error in row["errors"].items())


# --- the command


def test_what_is_missing_or_drawn_otherwise_is_off() -> None:
    a, tokens = torch.randn(3, 4), torch.arange(64)
    assert gpu.off([a], [a, a]) == gpu.off([a[1:]], [a]) == gpu.off([a * torch.nan], [a]) == float("inf")
    assert gpu.off([a, tokens], [a, tokens]) == 0 and gpu.off([], []) == 0
    assert gpu.off([tokens * 0], [tokens]) == 63 / 64 > gpu.BOUND
    assert len(gpu.answers((a, tokens), drawn=True)) == 2 and len(gpu.answers((a, tokens), drawn=False)) == 1


@pytest.mark.slow
def test_dry_run(tmp_path: Path) -> None:
    done = run("-m", "bench.gpu", "--dry-run", "--out", str(tmp_path), "--stages", "build,kernels,model,training")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    written = {path.stem.rpartition("gpu_")[2]: results.load(path) for path in tmp_path.rglob("*.json")}
    assert set(written) == {"build", "kernels", "model", "training"}
    assert all(result["settings"]["complete"] for result in written.values()), done.stdout
    rows = {row["name"]: row for row in written["kernels"]["measurements"]}
    timed = [case for case in CASES if case.times]
    assert len(rows) == sum(1 + bool(case.grads) for case in timed)
    assert all("ours reference_ms" in row for row in rows.values()), [row for row in rows.values() if "ours reference_ms" not in row]
    assert {"sdpa_ms", "flash_attn_absent"} <= set(rows["attention d72 full 64x729"])
    names = [row["name"] for row in written["model"]["measurements"] if row.get("tokens_per_s", 0) > 0]
    for side in ("reference ops", "transformers sdpa", "transformers eager", "transformers static cache, compiled"):
        assert sum(name.startswith("decode") and name.endswith(f", {side}") for name in names) == 2
    ours, sdpa, flash = written["training"]["measurements"]
    assert ours["gflops"] > 0 and sdpa["tokens_per_s"] > 0 and "FlashAttention" in flash["absent"]


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


def parts(machine: limits.Limits, dry: bool) -> Iterator[gpu.Part]:
    def half() -> Iterator[gpu.Row]:
        yield {"name": "half", "ms": 1.0}
        raise torch.OutOfMemoryError("CUDA out of memory")

    yield "first", lambda: [{"name": "first", "ok": True}]
    yield "broken", half
    yield "last", lambda: [{"name": "last", "void": True, "errors": {"loss": 0.5}}, {"name": "gone", "absent": "ImportError: no xformers"}]


def rows_of(folder: Path) -> list[tuple[str, Any]]:
    (path,) = folder.rglob("*.json")
    return [(row["name"], row.get("ok")) for row in results.load(path)["measurements"]]


def test_what_raises_is_a_row_and_the_stage_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "kernels", parts)
    assert gpu.run_stage("kernels", tmp_path, True, MACHINE) == 0
    assert rows_of(tmp_path) == [("first", True), ("half", None), ("broken", False), ("last", None), ("gone", None)]
    told = gpu.table(list(tmp_path.rglob("*.json")))
    assert "1 of 2 ok" in told and "cut off" not in told and "FAILED broken: OutOfMemoryError: CUDA out of memory" in told
    assert "VOID last" in told and "loss 0.5" in told and "absent gone: ImportError: no xformers" in told


def test_a_device_that_is_lost_ends_the_process_and_another_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "kernels", parts)
    left = iter([False, True])
    monkeypatch.setattr(gpu, "lost", lambda device: next(left))
    assert gpu.run_stage("kernels", tmp_path, True, MACHINE) == gpu.LOST
    (path,) = tmp_path.rglob("*.json")
    assert "cut off in broken" in gpu.table([path])
    monkeypatch.setattr(gpu, "lost", lambda device: False)
    first, rows = gpu.resume(path, gpu.LOST)
    assert first == 2 and gpu.run_stage("kernels", tmp_path, True, MACHINE, first, rows) == 0
    assert rows_of(tmp_path) == [("first", True), ("half", None), ("broken", False), ("last", None), ("gone", None)]


def test_a_device_that_goes_after_a_good_row_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "kernels", parts)
    monkeypatch.setattr(gpu, "lost", lambda device: True)
    assert gpu.run_stage("kernels", tmp_path, True, MACHINE) == gpu.LOST
    assert rows_of(tmp_path) == [("first", True), ("first", False)]


DYING = """
import os, sys
from bench import gpu

def parts(machine, dry):
    yield "first", lambda: [{"name": "first", "ok": True}]
    yield "killed", lambda: os.kill(os.getpid(), 9)
    yield "last", lambda: [{"name": "last", "ok": True}]
    os._exit(3)

gpu.kernels = parts
sys.exit(gpu.main(sys.argv[1:]))
"""


def test_a_process_that_dies_is_followed_by_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for what can be left out; not again and again for what kills every one."""
    monkeypatch.setitem(gpu.STAGES, "kernels", 900)
    (tmp_path / "dying.py").write_text(DYING)
    command = [sys.executable, str(tmp_path / "dying.py"), "--in-process", "--stages", "kernels", "--dry-run"]
    command += ["--out", str(tmp_path), "--limits", json.dumps(vars(MACHINE))]
    verdict = gpu.run_to_end("kernels", command, lambda: next(tmp_path.rglob("*.json"), None))
    assert verdict == "exit code -9, exit code 3, exit code 3"
    assert rows_of(tmp_path)[:3] == [("first", True), ("killed", False), ("last", True)]
    assert "FAILED killed: its process died with exit code -9" in gpu.table(list(tmp_path.rglob("*.json")))


def test_a_write_that_is_cut_off_leaves_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = results.record("toy", [{"name": "first"}], {}, MACHINE)
    path = results.save(result, tmp_path)
    whole, write = path.read_text(), Path.write_text

    def cut(self: Path, text: str) -> int:
        write(self, text[:20])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", cut)
    with pytest.raises(KeyboardInterrupt):
        results.save(result, tmp_path)
    assert path.read_text() == whole and list(tmp_path.rglob("*.json")) == [path]
