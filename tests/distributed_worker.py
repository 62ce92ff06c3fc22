"""One process of several: runs the jobs of a JSON file one after the other and writes what each came to (test_distributed.py)."""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

import llava_fast as lf


def run(job: dict) -> dict:
    settings, stop_after = job["config"], job.get("stop_after")

    class Stopped(Exception):
        pass

    def on_step(metrics):
        if metrics.step == stop_after:
            raise Stopped

    try:
        result = lf.train(settings, on_step=on_step)
    except Stopped:
        return {}
    except ValueError as error:
        return {"error": str(error)}
    names = ("losses", "steps", "tokens", "labels", "samples", "skipped", "validation")
    return {name: getattr(result, name) for name in names}


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    try:
        for name, job in json.loads((folder / "jobs.json").read_text()).items():
            result = run(job)
            (folder / f"{name}.{dist.get_rank()}.json").write_text(json.dumps(result))
        dist.barrier()
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
