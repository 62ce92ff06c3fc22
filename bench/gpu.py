"""`make gpu`: everything that needs a GPU, in one offline command of at most nine minutes from a bare checkout: `python -m bench.gpu`

Stages, the most valuable first, each in a process of its own with a time limit, so that neither a crash nor a hang costs the others:

    build        pip install -e . without isolation and without dependencies; without it the kernels run from the checkout
    correctness  bench/correctness.py over bench/cases.py: the Triton kernels in bf16, fp16 and fp32 against fp64
    kernels      bench/cases.py timed, forward and backward, against torch, torch.compile, SDPA, FlexAttention, flash-attn, xformers, Liger
    model        the 0.5b architecture with random weights: tower, prefill, decode; ours, then transformers with each attention and compiled
    training     a step of it on one row of 16,000 tokens, against a padding-free loop by hand

After each measurement the stage's file under $OUT (else bench/results/<device>/) is written anew: what the clock cuts off is lost, what
was measured is not. Times are medians, of CUDA graphs of calls that rotate through copies of their inputs, so that nothing is found in
L2; of single calls between events where a graph cannot be captured. --dry-run does the same on the CPU at small shapes, with the
reference in the kernels' place and one repetition: it checks this script, and its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
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

Row = dict[str, Any]


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


def answers(out: Any) -> list[torch.Tensor]:
    """The results that two implementations must agree on: not tokens that were drawn."""
    return [one for one in ([out] if isinstance(out, torch.Tensor) else out) if one.is_floating_point()]


def off(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """The largest relative error in norm; of those that both have: a baseline of a norm may give less."""
    pairs = zip(found, expected, strict=False)
    return max((relative_error(a.float(), b.float()) if a.shape == b.shape else math.inf for a, b in pairs), default=0.0)


def measure(case: Case, machine: limits.Limits, dry: bool, backward: bool) -> Row:
    """One case in bf16: each implementation and each baseline, or why it has no figure."""
    from llava_fast.kernels import registry

    device, dtype = machine.device, torch.bfloat16
    inputs = copies_of(case, device, dtype, dry)
    row: Row = {
        "name": case.name + (" forward and backward" if backward else ""),
        "op": case.op,
        "dtype": "bfloat16",
        "copies": len(inputs),
    }
    contenders: dict[str, Callable[..., Any]] = {}
    for name in registry._ops[case.op]:
        contenders[f"ours {name}"] = case.run
    contenders |= {
        name: run for name, run in case.baselines.items() if not (dry and name in ("torch.compile", "flex_attention"))
    }  # half a minute each
    times: dict[str, float] = {}
    with registry.use(**{case.op: "reference"}):
        expected = answers(steps(case, case.run, inputs[:1], backward)(0))
    for name, function in contenders.items():
        try:
            if not name.startswith("ours ") and (error := off(answers(steps(case, function, inputs[:1], backward)(0)), expected)) > BOUND:
                row[f"{name}_void"] = error
                continue
            with registry.use(**{case.op: name.removeprefix("ours ")} if name.startswith("ours ") else {}):
                times[name], how = timed(steps(case, function, inputs, backward), len(inputs), device)
            row |= {f"{name}_ms": times[name], f"{name}_timed_by": how}
        except Exception as error:  # any: a baseline that is absent or refuses the shape, an implementation for another device
            row[f"{name}_absent"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
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


# --- stages: each yields rows -----------------------------------------------------------------------------------------------------


def build(machine: limits.Limits, dry: bool) -> Iterator[Row]:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "--no-index", "-e", str(ROOT)]
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", "pass"] if dry else command, capture_output=True, text=True)
    yield {"name": "build", "seconds": time.perf_counter() - start, "ok": done.returncode == 0, "told": done.stderr[-2000:]}


def correctness(machine: limits.Limits, dry: bool) -> Iterator[Row]:
    from bench.correctness import check
    from llava_fast.kernels import registry

    implementation = "reference" if dry else "triton"
    # bf16 of everything first.
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        for case in CASES:
            if dtype not in case.dtypes or implementation not in registry._ops.get(case.op, ()):
                continue
            row: Row = {"name": f"{case.name} {str(dtype)[6:]}", "op": case.op}
            try:
                errors = check(case, machine.device, dtype, implementation, small=dry)
                yield {**row, "ok": True, "error_of_bound": max(errors.values())}
            except Exception as error:  # any: the next case may be fine
                yield {**row, "ok": False, "told": f"{type(error).__name__}: {error}"[:500]}
            if machine.device == "cuda":
                torch.cuda.empty_cache()


def kernels(machine: limits.Limits, dry: bool) -> Iterator[Row]:
    from llava_fast.kernels import registry

    timed_cases = [case for case in CASES if case.times and case.op in registry._ops]
    # Both directions of the first, worthiest cases before the forward pass of the last.
    for case in timed_cases:
        yield measure(case, machine, dry, backward=False)
        if case.grads:
            yield measure(case, machine, dry, backward=True)


def model(machine: limits.Limits, dry: bool) -> Iterator[Row]:
    """The reference ops, then every op's Triton kernels, then transformers."""
    from bench.whole_model import measure_model, measure_transformers
    from llava_fast.kernels import registry

    for name in ("reference", "triton"):
        if name == "triton" and dry:
            continue
        chosen = {op: name for op, known in registry._ops.items() if name in known}
        try:
            with registry.use(**chosen):
                for row in measure_model(machine.device, dry):
                    yield {**row, "name": f"{row['name']}, {name} ops"}
        except Exception as error:  # any: the other set of ops may run
            yield {"name": f"model, {name} ops", "ok": False, "told": f"{type(error).__name__}: {error}"[:500]}
    try:
        yield from measure_transformers(machine.device, dry)
    except Exception as error:  # any: a version of transformers that this was not written for
        yield {"name": "model, transformers", "ok": False, "told": f"{type(error).__name__}: {error}"[:500]}


def training(machine: limits.Limits, dry: bool) -> Iterator[Row]:
    from bench.gpu_training import measure_training

    for row in measure_training(machine.device, dry):
        yield row | ({"of_limit": row["gflops"] / machine.gemm_bf16_gflops} if "gflops" in row else {})


def run_stage(name: str, device: str, out: Path | None, dry: bool, machine: limits.Limits) -> None:
    """Yielded rows go to the stage's file one by one."""
    rows: list[Row] = []
    for row in globals()[name](machine, dry):
        rows.append(row)
        results.write(f"gpu_{name}", rows, {"dry_run": dry, "stage": name}, machine, out)


# --- the command ------------------------------------------------------------------------------------------------------------------


def table(files: Sequence[Path]) -> str:
    lines = []
    for path in files:
        measured = results.load(path)["measurements"]
        checked = [row for row in measured if "ok" in row]
        lines.append(
            f"{path.name}: {len(measured)} rows" + (f", {sum(row['ok'] for row in checked)} of {len(checked)} ok" if checked else "")
        )
        lines += [f"  FAILED {row['name']}: {row.get('told', '')[-300:]}" for row in checked if not row["ok"]]
        for row in [row for row in measured if "ok" not in row]:
            cells = [f"{key} {value:.4g}" for key, value in row.items() if isinstance(value, float)]
            lines.append(f"  {row['name']:46} {'  '.join(cells)}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description="build, check and measure on a GPU")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, small, to check the script")
    parser.add_argument("--out", type=Path, default=Path(os.environ["OUT"]) if "OUT" in os.environ else None, help="folder of the results")
    parser.add_argument("--stages", default=",".join(STAGES), help="some of " + ", ".join(STAGES))
    parser.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)  # a stage's own process
    parser.add_argument("--limits", help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    device = "cpu" if asked.dry_run else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        print("make gpu needs a GPU: torch.cuda is not available here (--dry-run checks the script without one)")
        return 2
    if unknown := set(asked.stages.split(",")) - set(STAGES):
        parser.error(f"no stage {', '.join(sorted(unknown))}: expected some of {', '.join(STAGES)}")
    if asked.in_process:
        run_stage(asked.stages, device, asked.out, asked.dry_run, limits.Limits(**json.loads(asked.limits)))
        return 0
    started, failed = time.time(), []
    machine = limits.Limits(device, 1, *[1.0] * 4, None) if asked.dry_run else limits.probe("cuda")
    print(json.dumps(results.record("card", [], {}, machine)["device"]), limits.describe(machine), sep="\n", flush=True)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), "TRITON_INTERPRET": "0"}
    for stage in asked.stages.split(","):
        command = [sys.executable, "-m", "bench.gpu", "--in-process", "--stages", stage, "--limits", json.dumps(vars(machine))]
        command += ["--dry-run"] * asked.dry_run + (["--out", str(asked.out)] if asked.out else [])
        start = time.perf_counter()
        try:
            code = subprocess.run(command, cwd=ROOT, env=environment, timeout=STAGES[stage]).returncode
            verdict = f"exit code {code}"
            failed += [stage] if code else []
        except subprocess.TimeoutExpired:
            verdict = f"cut off after {STAGES[stage]} s"
        print(f"stage {stage}: {verdict}, {time.perf_counter() - start:.0f} s", flush=True)
    folder = asked.out or results.RESULTS
    written = [path for path in sorted(folder.rglob("*-gpu_*.json")) if path.stat().st_mtime >= started - 1]
    print(table(written))
    wrong = [row for path in written for row in results.load(path)["measurements"] if row.get("ok") is False]
    return int(bool(failed or wrong))


if __name__ == "__main__":
    sys.exit(main())
