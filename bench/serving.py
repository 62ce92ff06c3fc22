"""One process of the serving benchmark: `python -m bench.serving SIDE CHECKPOINT POINTS`, points of a curve one after the other.

SIDE: llava_fast, or transformers-N: the static batching loop with batches of at most N.  POINTS: JSON, a list of objects with
    count, new, scenario, most_views   the requests (bench.workload.records, requests)
    arrivals_per_s or concurrency      a Poisson process, or so many clients who ask again as soon as they have an answer
Each point begins with an engine, and caches, of its own. Prints JSON: of each point the figures, the anonymous memory at its peak (what
earlier points left with the process included: let the load rise) and the ids.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from bench.memory import peak_in_process
from bench.workload import Asked, Served, arrivals, figures, records, requests

AT_A_TIME = 8
WARM = {"count": 2, "most_views": 1, "new": 4}


def serve(
    model: Any,
    asked: Sequence[Asked],
    times: Sequence[float] | None,
    clients: int,
    request_of: Callable[[Asked], Any] | None = None,
    max_running: int = AT_A_TIME,
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

    with lf.Engine(model, max_running=max_running) as engine:
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


def main(side: str, checkpoint: str, points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    if side == "llava_fast":
        import llava_fast as lf

        model = lf.load(checkpoint, device="cpu")
        model.generation_config.eos_token_id = []
    else:
        from bench.baselines import static_batching

        theirs, processor = static_batching.load(checkpoint)
        at_most = int(side.removeprefix("transformers-"))
    reports: list[dict[str, Any]] = []
    for point in [WARM, *points]:
        asked = requests(records(point["count"], point.get("scenario"), point.get("most_views")), point["new"])
        times = arrivals(point["arrivals_per_s"], len(asked)) if "arrivals_per_s" in point else None
        clients = point.get("concurrency", len(asked))
        with peak_in_process() as peak:
            if side == "llava_fast":
                served, _, stats = serve(model, asked, times, clients)
            else:
                stats = {}
                served = static_batching.serve(
                    lambda batch: static_batching.answer(theirs, processor, batch), asked, times, clients, at_most
                )
        reports.append({"figures": {**figures(served), "anon_bytes": peak.anon}, "ids": served.answers, "stats": stats})
    return reports[1:]


if __name__ == "__main__":
    print(json.dumps({"points": main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))}))
