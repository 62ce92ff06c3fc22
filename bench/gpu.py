"""`make gpu`: everything that needs a GPU, in one offline command of at most nine minutes from a bare checkout: `python -m bench.gpu`

Stages, the most valuable first, each in a process of its own with a time limit, so that neither a crash nor a hang costs the others:

    build        pip install -e . without isolation and without dependencies; without it the kernels run from the checkout
    correctness  bench/correctness.py over bench/cases.py: the Triton kernels in bf16, fp16 and fp32 against fp64
    kernels      bench/cases.py timed, forward and backward, against torch, torch.compile, SDPA, FlexAttention, flash-attn, xformers, Liger
    model        the 0.5b architecture with random weights: tower, prefill, decode; ours, then transformers with each attention and compiled
    training     a step of it on one row of 16,000 tokens, against a padding-free loop by hand

Nothing is timed whose answer is another than our pure torch ops': such a row is `void`. What raises becomes a row that says so, and the
stage goes on; where a process dies, or its device answers no more (a kernel that read past its memory), another one takes the stage up
behind what killed it. After each measurement the stage's file under $OUT (else bench/results/<device>/) is written anew: what the clock
cuts off is lost, what was measured is not. Times are medians, of CUDA graphs of calls that rotate through copies of their inputs, so that
nothing is found in L2; of single calls between events where a graph cannot be captured. --dry-run does the same on the CPU at small
shapes, with the reference in the kernels' place and one repetition: it checks this script, and its figures mean nothing.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import results
from bench.cases import CASES, Case, work_of_backward
from bench.full_size import relative_error
from llava_fast import limits

ROOT = Path(__file__).parent.parent
STAGES = {"build": 150, "correctness": 120, "kernels": 145, "model": 65, "training": 45}  # seconds; with starting up, under nine minutes
BOUND = 2**-5  # relative error in norm of a baseline in bf16, past which it computes something else
COLD = 256 << 20  # bytes to rotate through: five times the L2 of an H200

RESTART = 15  # seconds below which a stage is not taken up again: a process needs ten to begin
LOST = 70  # exit code of a stage's process whose device answers no more

Row = dict[str, Any]
Part = tuple[str, Callable[[], Iterable[Row]]]  # of a stage: its name, and its rows


# --- timing ----------------------------------------------------------------------------------------------------------------------


def timed(call: Callable[[int], object], copies: int, device: str, budget: float = 0.25) -> tuple[float, str]:
    """Median milliseconds of one call, and how it was timed; call(i) works on the i-th copy of its inputs."""
    if device == "cpu":
        call(0)
        return min(limits.seconds(lambda: call(0)) for _ in range(2)) * 1e3, "clock"
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for i in range(copies):
            call(i)
    torch.cuda.synchronize()
    rounds = max(2, -(-10 // copies))
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for i in range(rounds * copies):
                call(i % copies)
        run, calls, how = graph.replay, rounds * copies, "graph"
    except Exception:  # any: what cannot be captured is timed call by call
        torch.cuda.synchronize()
        flush = torch.empty(COLD, dtype=torch.int8, device="cuda")
        run, calls, how = (lambda: call(0)), 1, "events"
    before = flush.zero_ if how == "events" else (lambda: None)

    def once() -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before()
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / calls

    first = once()
    return statistics.median(once() for _ in range(max(5, min(50, int(budget * 1e3 / (first * calls)))))), how


def copies_of(case: Case, device: str, dtype: torch.dtype, small: bool) -> list[dict[str, Any]]:
    """As many copies of the inputs as do not fit L2."""
    one = case.inputs(device, dtype, small)
    size = sum(value.numel() * value.element_size() for value in one.values() if isinstance(value, torch.Tensor))
    count = 1 if device == "cpu" else max(1, min(64, -(-COLD // size)))
    return [one, *(case.inputs(device, dtype, small, seed) for seed in range(1, count))]


def steps(case: Case, function: Callable[..., Any], inputs: list[dict[str, Any]], backward: bool) -> Callable[[int], object]:
    """call(i): the function, and with `backward` its gradients, on the i-th inputs."""
    if not backward:

        def forward(i: int) -> object:
            with torch.no_grad():
                return function(**inputs[i])

        return forward
    leaves = [{**named, **{name: named[name].detach().requires_grad_() for name in case.grads}} for named in inputs]
    weights: list[torch.Tensor] = []

    def both(i: int) -> object:
        out = function(**leaves[i])
        outs = [out] if isinstance(out, torch.Tensor) else list(out)
        if not weights:
            weights.extend(torch.ones_like(one) for one in outs)
        return torch.autograd.grad(outs, [leaves[i][name] for name in case.grads], weights)

    return both


def answers(out: Any, drawn: bool) -> list[torch.Tensor]:
    """The results that two implementations must agree on: tokens that were `drawn` where both draw by the same numbers."""
    return [one for one in ([out] if isinstance(out, torch.Tensor) else out) if drawn or one.is_floating_point()]


def off(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """The largest relative error in norm, or share of integers that differ; inf where a result is missing or has NaN."""

    def error(a: torch.Tensor, b: torch.Tensor) -> float:
        if a.shape != b.shape:
            return math.inf
        apart = relative_error(a.float(), b.float()) if a.is_floating_point() else (a != b).double().mean().item()
        return math.inf if math.isnan(apart) else apart

    return max(map(error, found, expected), default=0.0) if len(found) == len(expected) else math.inf


def told(error: BaseException, most: int = 500) -> str:
    return f"{type(error).__name__}: {error}"[:most]


def title(case: Case, backward: bool) -> str:
    return case.name + " forward and backward" * backward


def measure(case: Case, machine: limits.Limits, dry: bool, backward: bool) -> Row:
    """One case in bf16: each implementation and each baseline, or why it has no figure."""
    from llava_fast.kernels import registry

    device, dtype = machine.device, torch.bfloat16
    inputs = copies_of(case, device, dtype, dry)
    row: Row = {"name": title(case, backward), "op": case.op, "dtype": "bfloat16", "copies": len(inputs)}
    contenders: dict[str, Callable[..., Any]] = {}
    for name in registry._ops[case.op]:
        contenders[f"ours {name}"] = case.run
    contenders |= {
        name: run for name, run in case.baselines.items() if not (dry and name in ("torch.compile", "flex_attention"))
    }  # half a minute each
    times: dict[str, float] = {}
    with registry.use(**{case.op: "reference"}):
        expected = steps(case, case.run, inputs[:1], backward)(0)
    for name, function in contenders.items():
        ours = name.startswith("ours ")
        try:
            with registry.use(**{case.op: name.removeprefix("ours ")} if name.startswith("ours ") else {}):
                found, wanted = (answers(out, ours) for out in (steps(case, function, inputs[:1], backward)(0), expected))
                if (error := off(found, wanted if ours else wanted[: len(found)])) > BOUND:  # a baseline of a norm may give less
                    row[f"{name}_void"] = error
                    if ours:
                        row |= {"ok": False, "told": f"{name} is off by {error:.3g}"}
                    continue
                times[name], how = timed(steps(case, function, inputs, backward), len(inputs), device)
            row |= {f"{name}_ms": times[name], f"{name}_timed_by": how}
        except Exception as error:  # any: a baseline that is absent or refuses the shape, an implementation for another device
            row[f"{name}_absent"] = told(error, 200).splitlines()[0]
            if lost(device):
                row |= {"ok": False, "told": f"{name} took the device along: {told(error)}"}
                break
    operations, moved = case.work(**inputs[0])
    best = min((ms for name, ms in times.items() if name.startswith("ours ")), default=None)
    rivals = [ms for name, ms in times.items() if not name.startswith("ours ")]
    if best:
        row["ours_ms"] = best
        if operations > moved * 100:  # bound by arithmetic
            done = work_of_backward(operations, case.op) if backward else operations
            row |= {f"{name}_gflops": done / ms / 1e6 for name, ms in times.items()}
            row["gflops"] = done / best / 1e6
            row["of_limit"] = row["gflops"] / machine.gemm_bf16_gflops
        elif not backward:
            row["gbs"] = moved / best / 1e6
            row["of_limit"] = row["gbs"] / machine.copy_gbs
        if rivals:
            row["baseline_ms"], row["ratio"] = min(rivals), min(rivals) / best
    return row


# --- stages: each yields its parts ------------------------------------------------------------------------------------------------


def build(machine: limits.Limits, dry: bool) -> Iterator[Part]:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "--no-index", "-e", str(ROOT)]

    def install() -> Iterator[Row]:
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", "pass"] if dry else command, capture_output=True, text=True)
        yield {"name": "build", "seconds": time.perf_counter() - start, "ok": done.returncode == 0, "told": done.stderr[-2000:]}

    yield "build", install


def correctness(machine: limits.Limits, dry: bool) -> Iterator[Part]:
    from bench.correctness import check
    from llava_fast.kernels import registry

    implementation = "reference" if dry else "triton"

    def checked(case: Case, name: str, dtype: torch.dtype) -> Iterator[Row]:
        errors = check(case, machine.device, dtype, implementation, small=dry)
        yield {"name": name, "op": case.op, "ok": True, "error_of_bound": max(errors.values())}

    # bf16 of everything first.
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        for case in CASES:
            if dtype in case.dtypes and implementation in registry._ops.get(case.op, ()):
                name = f"{case.name} {str(dtype)[6:]}"
                yield name, functools.partial(checked, case, name, dtype)


def kernels(machine: limits.Limits, dry: bool) -> Iterator[Part]:
    from llava_fast.kernels import registry

    # Both directions of the first, worthiest cases before the forward pass of the last.
    for case in CASES:
        for backward in (False, True) if case.times and case.op in registry._ops else ():
            if case.grads or not backward:
                yield title(case, backward), lambda case=case, backward=backward: [measure(case, machine, dry, backward)]


def model(machine: limits.Limits, dry: bool) -> Iterator[Part]:
    """Every op's Triton kernels, then transformers, where what compiles comes last, then the reference ops: half a minute of decoding."""
    from bench import whole_model
    from llava_fast.kernels import registry

    def choice(name: str) -> dict[str, str]:
        return {op: name for op, known in registry._ops.items() if name in known}

    @functools.cache
    def setup() -> Any:
        return whole_model.setup(machine.device, dry)

    @functools.cache
    def truth() -> dict[str, torch.Tensor]:
        with registry.use(**choice("reference")):
            return whole_model.answers(setup())

    @functools.cache
    def theirs() -> Any:
        return whole_model.transformers_like(setup())

    def ours(name: str) -> Iterator[Row]:
        expected = truth()
        with registry.use(**choice(name)):
            yield from whole_model.measure_ours(setup(), f"{name} ops", expected)

    if not dry:
        yield "model, triton ops", functools.partial(ours, "triton")
    for kind in ("sdpa", "flash_attention_2", "eager"):
        yield f"transformers {kind}", lambda kind=kind: whole_model.measure_attention(setup(), theirs(), kind, truth())
    for compile in (False, True):
        name = "transformers static cache" + ", compiled" * compile
        yield name, lambda compile=compile: whole_model.measure_static(setup(), theirs(), compile, truth())
    yield "model, reference ops", functools.partial(ours, "reference")


def training(machine: limits.Limits, dry: bool) -> Iterator[Part]:
    from bench.gpu_training import measure_training

    def rows() -> Iterator[Row]:
        for row in measure_training(machine.device, dry):
            yield row | ({"of_limit": row["gflops"] / machine.gemm_bf16_gflops} if "gflops" in row else {})

    yield "training", rows


def lost(device: str) -> bool:
    """Whether an earlier fault has left this process without its device. Gives back what nobody holds."""
    if device == "cuda":
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError:
            return True
    return False


def resume(path: Path, code: int) -> tuple[int, list[Row]]:
    """The part that comes after the one a process died of, and the rows that it left, with one that says so."""
    result = results.load(path)
    place, part = result["settings"]["part"]
    died = {"name": part, "ok": False, "told": f"its process died with exit code {code}"}
    return place + 1, result["measurements"] + ([] if code == LOST else [died])


def run_stage(name: str, out: Path | None, dry: bool, machine: limits.Limits, first: int = 0, kept: Sequence[Row] = ()) -> int:
    """Its rows go to the stage's file one by one, behind those that are `kept`; parts before `first` are left out. Returns an exit code.

    Settings: part, the place and the name of what is under way; complete, whether all was done.
    """
    result = results.record(f"gpu_{name}", [], {"dry_run": dry, "stage": name}, machine)
    rows, settings = result["measurements"], result["settings"]
    rows += kept
    for place, (part, make) in enumerate(globals()[name](machine, dry)):
        if place < first:
            continue
        settings |= {"part": [place, part], "complete": False}
        results.save(result, out)
        begun = len(rows)
        try:
            for row in make():
                rows.append(row)
                results.save(result, out)
        except Exception as error:  # any: the next part may be fine
            rows.append({"name": part, "ok": False, "told": told(error)})
            results.save(result, out)
        if lost(machine.device):
            if all(row.get("ok", True) for row in rows[begun:]):
                rows.append({"name": part, "ok": False, "told": "the device answers no more"})
                results.save(result, out)
            return LOST
    settings["complete"] = True
    results.save(result, out)
    return 0


# --- the command ------------------------------------------------------------------------------------------------------------------


def table(files: Sequence[Path]) -> str:
    lines = []
    for path in files:
        result = results.load(path)
        measured = result["measurements"]
        checked = [row for row in measured if "ok" in row]
        head = f"{path.name}: {len(measured)} rows" + (f", {sum(row['ok'] for row in checked)} of {len(checked)} ok" if checked else "")
        cut = "" if result["settings"].get("complete", True) else f", cut off in {result['settings']['part'][1]}"
        lines.append(head + cut)
        for row in measured:
            if not row.get("ok", True):
                lines.append(f"  FAILED {row['name']}: {row.get('told', '')[-300:]}")
            elif "absent" in row:
                lines.append(f"  absent {row['name']}: {row['absent']}")
            elif "ok" not in row:
                cells = [f"{key} {value:.4g}" for key, value in row.items() if isinstance(value, float)]
                failed = [key for key in row if key.startswith("ours ") and key.endswith("_absent") and "but it runs on" not in row[key]]
                cells += [f"{key}: {row[key]}" for key in failed]  # those for another device are no news
                cells += [f"{key} {value:.4g}" for key, value in row.get("errors", {}).items() if "void" in row]
                lines.append(f"  {'VOID ' if 'void' in row else ''}{row['name']:46} {'  '.join(cells)}")
    return "\n".join(lines)


def run_to_end(stage: str, command: list[str], newest: Callable[[], Path | None]) -> str:
    """A stage in processes of its own, within its seconds: one that dies is followed by another behind the part that it died of. The
    verdict, of which the last words are the last one's."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), "TRITON_INTERPRET": "0"}
    limit = STAGES[stage] * (4 if "--dry-run" in command else 1)  # that a CPU is slow is no fault of the script
    end, resumed, reached = time.monotonic() + limit, list[str](), -1
    verdict: list[str] = []
    while (left := end - time.monotonic()) > (RESTART if resumed else 0):
        try:
            code = subprocess.run([*command, *resumed], cwd=ROOT, env=environment, timeout=left).returncode
        except subprocess.TimeoutExpired:
            return ", ".join([*verdict, f"cut off after {limit} s"])
        verdict.append(f"exit code {code}")
        path, before = newest(), reached
        reached = results.load(path)["settings"]["part"][0] if path else before
        if code == 0 or path is None or reached == before:
            break
        resumed = ["--resume", str(path), "--died", str(code)]
    return ", ".join(verdict)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description="build, check and measure on a GPU")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, small, to check the script")
    parser.add_argument("--out", type=Path, default=Path(os.environ["OUT"]) if "OUT" in os.environ else None, help="folder of the results")
    parser.add_argument("--stages", default=",".join(STAGES), help="some of " + ", ".join(STAGES))
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)  # a stage's own process
    parser.add_argument("--limits", help=argparse.SUPPRESS)
    parser.add_argument("--resume", type=Path, help=argparse.SUPPRESS)  # the file of a process that died, and its exit code
    parser.add_argument("--died", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    device = "cpu" if asked.dry_run else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        print("make gpu needs a GPU: torch.cuda is not available here (--dry-run checks the script without one)")
        return 2
    if unknown := set(asked.stages.split(",")) - set(STAGES):
        parser.error(f"no stage {', '.join(sorted(unknown))}: expected some of {', '.join(STAGES)}")
    if asked.in_process:
        machine = limits.Limits(**json.loads(asked.limits))
        return run_stage(asked.stages, asked.out, asked.dry_run, machine, *(resume(asked.resume, asked.died) if asked.resume else ()))
    started, failed = time.time(), []
    machine = limits.Limits(device, 1, *[1.0] * 4, None) if asked.dry_run else limits.probe("cuda")
    print(json.dumps(results.record("card", [], {}, machine)["device"]), limits.describe(machine), sep="\n", flush=True)

    def written(stage: str = "*") -> list[Path]:
        paths = sorted((asked.out or results.RESULTS).rglob(f"*-gpu_{stage}.json"), key=lambda path: path.stat().st_mtime)
        return [path for path in paths if path.stat().st_mtime >= started - 1]

    for stage in asked.stages.split(","):
        command = [sys.executable, "-m", "bench.gpu", "--in-process", "--stages", stage, "--limits", json.dumps(vars(machine))]
        command += ["--dry-run"] * asked.dry_run + (["--out", str(asked.out)] if asked.out else [])
        start = time.perf_counter()
        verdict = run_to_end(stage, command, lambda stage=stage: next(reversed(written(stage)), None))
        failed += [stage] if not verdict.endswith(("exit code 0", " s")) else []
        print(f"stage {stage}: {verdict}, {time.perf_counter() - start:.0f} s", flush=True)
    print(table(written()))
    wrong = [row for path in written() for row in results.load(path)["measurements"] if row.get("ok") is False]
    return int(bool(failed or wrong))


if __name__ == "__main__":
    sys.exit(main())
