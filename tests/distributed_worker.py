"""What a process of several runs (test_distributed.py); it is forked from a server that has imported this module, which takes seconds."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint
import torch.distributed.fsdp

import llava_fast as lf
import llava_fast.training.loop
from llava_fast.models.vision import VisionTower
from llava_fast.training import dataset, distributed
from llava_fast.training.step import LabelLoss

COUNTS = ("losses", "steps", "tokens", "labels", "samples", "skipped", "validation")


def as_rank(rank: int, world: int, port: int, log: Path, work: Callable[..., None], *args: Any) -> None:
    """The target of a process: what it prints is in `log`."""
    written = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(written, 1)
    os.dup2(written, 2)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ.update(address)
    torch.set_num_threads(1)
    work(*args)


def run_jobs(folder: Path) -> None:
    """The jobs of a JSON file one after the other, in one group; what each came to goes to <name>.<rank>.json."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    try:
        for name, job in json.loads((folder / "jobs.json").read_text()).items():
            (folder / f"{name}.{dist.get_rank()}.json").write_text(json.dumps(run(job)))
        dist.barrier()
    finally:
        dist.destroy_process_group()


def run(job: dict) -> dict:
    stop_after, tower = job.get("stop_after"), views_seen()

    class Stopped(Exception):
        pass

    def on_step(metrics):
        if metrics.step == stop_after:
            raise Stopped

    began = time.monotonic()
    try:
        with tower as seen:
            result = lf.train(job["config"], on_step=on_step)
    except Stopped:
        return {}
    except ValueError as error:
        return {"error": str(error)}
    return {name: getattr(result, name) for name in COUNTS} | {"views_seen": sum(seen), "seconds": time.monotonic() - began}


@contextlib.contextmanager
def views_seen():
    """How many views each of the tower's passes had."""
    seen: list[int] = []
    plain = VisionTower.forward

    def counted(self, views, *args):
        seen.append(len(views))
        return plain(self, views, *args)

    VisionTower.forward = counted  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        VisionTower.forward = plain  # type: ignore[method-assign]


# --- runs in which one rank has trouble ---


def train(settings: dict, trouble: str | None = None, guilty: int = 1, step: int = 3) -> None:
    """A run whose rank `guilty` has its trouble after (or in) a step."""
    distributed.LEAVE_SECONDS = 2.0
    own = os.environ["RANK"] == str(guilty)
    on_step = TROUBLES[trouble](own, step) if trouble is not None else None
    lf.train(settings, on_step=on_step)


def _at(own: bool, step: int, action: Callable[[], Any]) -> Callable[[Any], None]:
    def on_step(metrics):
        if own and metrics.step == step:
            action()

    return on_step


def _raises(own, step):
    def action():
        raise KeyError("trouble")

    return _at(own, step, action)


def _raises_while_others_sleep(own, step):
    """As in a call of NCCL's that does not end."""
    raises = _raises(own, step)

    def on_step(metrics):
        raises(metrics)
        if metrics.step == step:
            time.sleep(1000)

    return on_step


def _hangs(own, step):
    return _at(own, step, lambda: time.sleep(1000))


def _is_killed(own, step):
    return _at(own, step, lambda: os.kill(os.getpid(), signal.SIGKILL))


def _is_terminated(own, step):
    return _at(own, step, lambda: os.kill(os.getpid(), signal.SIGTERM))


def _all_are_killed(own, step):
    return _is_killed(True, step)


def _loader_dies(own, step):
    plain, calls = dataset.prepare, []

    def dies(*args):
        calls.append(1)
        if own and len(calls) > step:
            raise MemoryError("no room for a picture")
        return plain(*args)

    dataset.prepare = dies


def _loss_of(value: float):
    def install(own, step):
        plain, calls = LabelLoss.__call__, []

        def poisoned(self, model, row):
            loss, others = plain(self, model, row)
            calls.append(1)
            if own and len(calls) > step and row.indices:
                print("guilty:", json.dumps(row.indices), flush=True)
                return loss * 0 + value * self.weight(row), others
            return loss, others

        LabelLoss.__call__ = poisoned

    return install


def _full_disk(own, step):
    """Its files end at a few KiB for two steps."""
    whole = resource.getrlimit(resource.RLIMIT_FSIZE)

    def on_step(metrics):
        if own and metrics.step == step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (16 * 1024, whole[1]))
        if own and metrics.step == step + 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, whole)

    return on_step


def _out_of_memory(own, step):
    plain, calls = LabelLoss.__call__, []

    def fails(self, model, row):
        calls.append(1)
        if own and len(calls) > step:
            raise torch.OutOfMemoryError("tried to allocate 20 GiB")
        return plain(self, model, row)

    LabelLoss.__call__ = fails


TROUBLES: dict[str | None, Callable[[bool, int], Any]] = {
    "raises": _raises,
    "raises while others sleep": _raises_while_others_sleep,
    "hangs": _hangs,
    "is killed": _is_killed,
    "is terminated": _is_terminated,
    "all are killed": _all_are_killed,
    "loader dies": _loader_dies,
    "loss is nan": _loss_of(float("nan")),
    "loss jumps": _loss_of(1e4),
    "disk is full": _full_disk,
    "out of memory": _out_of_memory,
}
