"""Processes of the serving benchmark: `python -m bench.serving SIDE CHECKPOINT` serves a point of a curve for each line of its input.

SIDE: llava_fast, or transformers-N: the static batching loop with batches of at most N.  A line is a JSON object with
    count, new, scenario, most_views   the requests (bench.workload.records, requests)
    arrivals_per_s or concurrency      a Poisson process, or so many clients who ask again as soon as they have an answer
    engine                             options of lf.Engine
Each point begins with an engine, and caches, of its own. Prints a line once it is ready, then one of JSON for each point: the figures, the
anonymous memory at its peak (what earlier points left with the process included) and the ids.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import IO, Any

from bench.memory import peak_in_process
from bench.paired import OURS
from bench.workload import Asked, Served, arrivals, figures, records, requests

AT_A_TIME = 8
WARM = {"count": 2, "most_views": 1, "new": 4}
Point = Mapping[str, Any]
Report = dict[str, Any]


def serve(
    model: Any,
    asked: Sequence[Asked],
    times: Sequence[float] | None,
    clients: int,
    request_of: Callable[[Asked], Any] | None = None,
    max_running: int = AT_A_TIME,
    **options: Any,
) -> tuple[Served, list[str], dict[str, Any]]:
    """With an engine of its own on a loaded model; also the texts, and the engine's stats with every request's prompt_tokens. times,
    clients: as in the baseline's."""
    import llava_fast as lf

    request_of = request_of or (lambda one: lf.Request(one.prompt, images=one.pictures))
    given = [request_of(one) for one in asked]

    free = threading.Semaphore(clients)
    ends: list[float] = []

    def over(_: Any) -> None:
        ends.append(time.perf_counter())
        free.release()

    with lf.Engine(model, max_running=max_running, **options) as engine:
        start, late, handles = time.perf_counter(), [], []
        for i, one in enumerate(asked):
            if times is None:
                free.acquire()
            else:
                time.sleep(max(start + times[i] - time.perf_counter(), 0))
            late.append(0.0 if times is None else time.perf_counter() - start - times[i])
            params = lf.SamplingParams(max_new_tokens=one.new)
            handles.append(engine.submit(given[i], params))
            handles[-1].future.add_done_callback(over)
        answers = [handle.result()[0] for handle in handles]
        stats = engine.stats()
    errors = [one.error for one in answers if one.error is not None]
    if errors:
        raise RuntimeError(f"{len(errors)} of {len(asked)} requests failed: {errors[0]}")
    first = [one.timings["first_token"] + lag for one, lag in zip(answers, late, strict=True)]
    ids = [one.token_ids for one in answers]
    served = Served(first, stats.inter_token, max(ends) - start, sum(map(len, ids)), ids)
    prompts = {"prompt_tokens": [one.prompt_tokens for one in answers]}
    return served, [one.text for one in answers], dataclasses.asdict(stats) | prompts


def server(side: str, checkpoint: str) -> Callable[[Point], Report]:
    """A side, loaded: a function of a point."""
    if side == OURS:
        import llava_fast as lf

        model = lf.load(checkpoint, device="cpu")
        model.generation_config.eos_token_id = []
    else:
        from bench.baselines import static_batching

        theirs, processor = static_batching.load(checkpoint)
        at_most = int(side.removeprefix("transformers-"))

    def run(point: Point) -> Report:
        asked = requests(records(point["count"], point.get("scenario"), point.get("most_views")), point["new"])
        times = arrivals(point["arrivals_per_s"], len(asked)) if "arrivals_per_s" in point else None
        clients, stats = point.get("concurrency", len(asked)), {}
        with peak_in_process() as peak:
            if side == OURS:
                served, _, stats = serve(model, asked, times, clients, **point.get("engine", {}))
            else:
                served = static_batching.serve(
                    lambda batch: static_batching.answer(theirs, processor, batch), asked, times, clients, at_most
                )
        return {"figures": {**figures(served), "anon_bytes": peak.anon}, "ids": served.answers, "stats": stats}

    return run


# -- the benchmark's own process


@contextmanager
def processes(commands: Mapping[str, Sequence[str]]) -> Iterator[dict[str, Callable[[Point], Report]]]:
    """A process of `python <arguments>` a side, as functions of a point, once all of them are ready."""
    with ExitStack() as stack:
        sides = {}
        for name, arguments in commands.items():
            errors = stack.enter_context(tempfile.TemporaryFile("w+"))
            pipes: dict[str, Any] = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True)
            process = subprocess.Popen([sys.executable, *arguments], **pipes, env={**os.environ, "PYTHONPATH": os.getcwd()})
            stack.callback(process.wait)
            stack.callback(process.kill)  # the last to be called is the first to be done
            sides[name] = (process, errors, " ".join(arguments))
        for side in sides.values():
            _line(*side)
        yield {name: lambda point, side=side: _ask(*side, point) for name, side in sides.items()}  # type: ignore[misc]


def _ask(process: subprocess.Popen[str], errors: IO[str], command: str, point: Point) -> Report:
    assert process.stdin is not None
    process.stdin.write(json.dumps(point) + "\n")
    process.stdin.flush()
    return json.loads(_line(process, errors, command))


def _line(process: subprocess.Popen[str], errors: IO[str], command: str) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        code = process.wait()
        errors.seek(0)
        raise RuntimeError(f"{command} ended with {code}:\n{errors.read()[-4000:]}")
    return line


def in_rounds(
    sides: Mapping[str, Callable[[Point], Report]], points: Mapping[str, Point], rounds: int, void: Callable[[str, str], bool]
) -> dict[str, dict[str, list[Report]]]:
    """point -> side -> a report a round, without those that are void(side, point). The sides follow one another at each point, in the
    other order every other time. Raises ValueError where answers to the same requests differ, in any round or side."""
    reports: dict[str, dict[str, list[Report]]] = {point: {} for point in points}
    for number in range(rounds):
        for i, (name, point) in enumerate(points.items()):
            for side in list(sides) if (number + i) % 2 == 0 else reversed(sides):
                if void(side, name):
                    continue
                report = sides[side](point)
                reports[name].setdefault(side, []).append(report)
                first = next(iter(reports[name].values()))[0]["ids"]
                if report["ids"] != first:
                    equal = sum(a == b for a, b in zip(report["ids"], first, strict=True))
                    raise ValueError(
                        f"{name}, round {number}: of {len(first)} answers of {side} {equal} are those of {next(iter(reports[name]))}"
                    )
    return reports


def medians(reports: Sequence[Report]) -> dict[str, float]:
    """Of a side's rounds; of memory the least: what earlier points left is still with the process."""
    every = [report["figures"] for report in reports]
    return {key: (min if key == "anon_bytes" else statistics.median)(figures[key] for figures in every) for key in every[0]}


def main(side: str, checkpoint: str) -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no report
    run = server(side, checkpoint)
    run(WARM)
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), file=out, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
