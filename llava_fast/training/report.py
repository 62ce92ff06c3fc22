"""What a run says while it runs: a progress line (a line now and then where there is no terminal) and metrics.jsonl."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@dataclass(frozen=True)
class StepMetrics:
    """loss: mean over the step's labels.  grad_norm: before clipping.  lr: of the decoder, or of the first part that is trained.
    seconds: wall time, the mean over the steps that were reported together (a device works behind the program); data_wait: of the
    step, waiting for rows; others: what the objective reports besides, means like the loss."""

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

    def line(self) -> str:
        share, speed = self.labels / max(self.tokens, 1), self.tokens / max(self.seconds, 1e-9)
        return f"loss {self.loss:.4f}  {speed:,.0f} tokens/s  labels {share:.1%}  data wait {self.data_wait / max(self.seconds, 1e-9):.0%}"


class Report:
    """Context manager around a run; `add` takes the metrics of finished steps."""

    def __init__(self, folder: Path, total: int, done: int, progress: bool, every: int):
        self.path = folder / "metrics.jsonl"
        self.every = every
        self.total = total
        _forget_steps_after(self.path, done)
        console = Console()
        self.console = console if progress else None
        self.bar: Progress | None = None
        if progress and console.is_terminal:
            columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(None), TextColumn("{task.fields[line]}"), TimeRemainingColumn())
            self.bar = Progress(*columns, console=console)
            self.task = self.bar.add_task("train", total=total, completed=done, line="")
        self.said = time.monotonic()

    def __enter__(self) -> Report:
        if self.bar is not None:
            self.bar.start()
        self.file = self.path.open("a")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.stop()
        self.file.close()

    def add(self, finished: Iterable[StepMetrics]) -> None:
        last: StepMetrics | None = None
        for last in finished:
            self.file.write(json.dumps(asdict(last)) + "\n")
        if last is None:
            return
        self.file.flush()
        if self.bar is not None:
            self.bar.update(self.task, completed=last.step, line=last.line())
        elif self.console is not None and (time.monotonic() - self.said > 10 or last.step in (self.every, self.total)):
            self.console.print(f"step {last.step}/{self.total}  {last.line()}", highlight=False, soft_wrap=True)
            self.said = time.monotonic()

    def say(self, message: str) -> None:
        if self.console is not None:
            (self.bar.console if self.bar is not None else self.console).print(message, highlight=False, soft_wrap=True)


def _forget_steps_after(path: Path, done: int) -> None:
    """A run that goes on from step `done` writes the later ones again."""
    if path.exists():
        lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n") and json.loads(line)["step"] <= done]
        path.write_text("".join(lines))
