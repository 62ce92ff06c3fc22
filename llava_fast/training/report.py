"""What a run says while it runs: a progress line (a line now and then where there is no terminal), metrics.jsonl, TensorBoard, wandb."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from llava_fast.training.config import TrainConfig

JUDGED = ("all/rewards/accuracies", "all/rewards/margins")


@dataclass(frozen=True)
class StepMetrics:
    """loss: mean over the step's labels.  grad_norm: before clipping.  lr: of the decoder, or of the first part that is trained;
    rates: of all parts.  tokens, views, labels, samples: of the step, all ranks together.
    data_wait: seconds of the step, waiting for rows.  memory: bytes, the most the device held; on the CPU, what the process holds.
    others: what the objective reports besides, means like the loss.
    Of the steps that were reported together, since a device works behind the program: seconds: wall time of one in the mean;
    tokens_per_second, views_per_second; waiting: the share of the time in which there were no rows; tflops: model arithmetic done a
    second, in 1e12, by all ranks; mfu: its share of what their devices could do in bf16, None where that is not known."""

    step: int
    epoch: int
    loss: float
    grad_norm: float
    lr: float
    tokens: int
    labels: int
    samples: int
    seconds: float
    data_wait: float
    others: dict[str, float] = field(default_factory=dict)
    views: int = 0
    rates: dict[str, float] = field(default_factory=dict)
    tokens_per_second: float = 0.0
    views_per_second: float = 0.0
    waiting: float = 0.0
    tflops: float = 0.0
    mfu: float | None = None
    memory: int = 0

    def line(self) -> str:
        parts = [f"loss {self.loss:.4f}", f"lr {self.lr:.2e}", f"{self.tokens_per_second:,.0f} tokens/s"]
        parts += [f"{self.views_per_second:,.1f} views/s"] if self.views_per_second else []
        parts += [f"MFU {self.mfu:.1%}" if self.mfu is not None else f"{self.tflops:.3g} TFLOP/s"] if self.tflops else []
        parts += [f"labels {self.labels / max(self.tokens, 1):.1%}", f"data wait {self.waiting:.0%}"]
        return "  ".join([*parts, f"{self.memory / 2**30:.2f} GiB"])

    def scalars(self) -> dict[str, float]:
        """What TensorBoard and wandb show, by name."""
        values = {
            "loss": self.loss,
            "grad_norm": self.grad_norm,
            "speed/tokens_per_second": self.tokens_per_second,
            "speed/views_per_second": self.views_per_second,
            "speed/tflops": self.tflops,
            "speed/data_wait": self.waiting,
            "memory_gib": self.memory / 2**30,
            **{f"lr/{part}": rate for part, rate in self.rates.items()},
            **self.others,
        }
        return values if self.mfu is None else {**values, "speed/mfu": self.mfu}


def memory_held(device: torch.device) -> int:
    """Bytes: the most that was allocated on a GPU; of a CPU run the process's own memory now, without files that are mapped (Linux)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("RssAnon:")) * 1024
    except OSError:
        return 0


class Report:
    """Context manager around a run; `add` takes the metrics of finished steps. With `silent`, of a rank that is not the first, nothing."""

    def __init__(self, config: TrainConfig, total: int, done: int, silent: bool = False, identity: str = ""):
        """identity: of the run, by which wandb knows one that goes on."""
        folder = Path(config.output_dir)
        self.every, self.total, self.silent = config.log_every, total, silent
        self.name = folder.resolve().name
        self.console = Console() if config.progress and not silent else None
        self.bar: Progress | None = None
        self.boards: list[Any] = []
        if silent:
            return
        self.path, self.held_out = folder / "metrics.jsonl", folder / "validation.jsonl"
        for path in (self.path, self.held_out):
            _forget_steps_after(path, done)
        if self.console is not None and self.console.is_terminal:
            columns = (
                TextColumn("{task.description} step"),
                MofNCompleteColumn(),
                BarColumn(None),
                TextColumn("{task.fields[line]}"),
                TimeRemainingColumn(),
            )
            self.bar = Progress(*columns, console=self.console)
            self.task = self.bar.add_task(self.name, total=total, completed=done, line="")
        self.boards = [*([_TensorBoard(folder, done)] if config.tensorboard else []), *([_Wandb(config, identity)] if config.wandb else [])]
        self.said = time.monotonic()

    def __enter__(self) -> Report:
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.stop()
        for board in self.boards:
            board.close()

    def add(self, finished: Iterable[StepMetrics]) -> None:
        finished = list(finished)
        if self.silent or not finished:
            return
        last = finished[-1]
        with self.path.open("a") as file:
            file.writelines(json.dumps(asdict(metrics)) + "\n" for metrics in finished)
        for board in self.boards:
            for metrics in finished:
                board.add(metrics.step, metrics.scalars())
        if self.bar is not None:
            self.bar.update(self.task, completed=last.step, line=last.line())
        elif self.console is not None and (time.monotonic() - self.said > 10 or last.step in (self.every, self.total)):
            self.say(f"{self.name} step {last.step}/{self.total}  {last.line()}")
            self.said = time.monotonic()

    def validated(self, step: int, losses: Mapping[str, float]) -> None:
        if self.silent:
            return
        with self.held_out.open("a") as file:
            file.write(json.dumps({"step": step, **losses}) + "\n")
        for board in self.boards:
            board.add(step, {f"validation/{name}": loss for name, loss in losses.items()})
        # Of what is reported besides losses, the line has what preferences are judged by.
        shown = {name: value for name, value in losses.items() if "/" not in name or name in JUDGED}
        self.say(f"{self.name} step {step}/{self.total}  validation: " + "  ".join(f"{name} {value:.4f}" for name, value in shown.items()))

    def say(self, message: str) -> None:
        if self.console is not None:
            (self.bar.console if self.bar is not None else self.console).print(message, highlight=False, soft_wrap=True)


class _TensorBoard:
    def __init__(self, folder: Path, done: int):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError("tensorboard: true needs the package tensorboard: pip install llava_fast[train]") from error
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1)

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class _Wandb:
    def __init__(self, config: TrainConfig, identity: str):
        try:
            import wandb
        except ImportError as error:
            raise ValueError("wandb: true needs the package wandb: pip install wandb") from error
        name = Path(config.output_dir).resolve().name
        settings = {"name": name, "id": identity, "resume": "allow", "dir": config.output_dir, "config": asdict(config)}
        self.run = wandb.init(project="llava_fast", **settings)

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        self.run.log(dict(scalars), step=step)

    def close(self) -> None:
        self.run.finish()


def _forget_steps_after(path: Path, done: int) -> None:
    """A run that goes on from step `done` writes the later ones again."""
    if path.exists():
        lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n") and json.loads(line)["step"] <= done]
        path.write_text("".join(lines))
