"""One line on stderr while requests are answered."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from llava_fast.engine.engine import Engine


class Rates(ProgressColumn):
    """What the engine has done since it was made."""

    def __init__(self, engine: Engine):
        super().__init__(Column(no_wrap=True))
        self.engine = engine

    def render(self, task: Task) -> Text:
        stats = self.engine.stats()
        reused = f"reused {stats.prefix_reused:.0%} of rows, {stats.pictures_reused:.0%} of pictures"
        return Text(f"{stats.tokens_per_s:,.0f} tokens/s, {reused}")


class ProgressLine:
    """Requests done, rates, time left. show: None where stderr is a terminal and there is more than one request (total None: unknown).
    done: requests that were answered before."""

    def __init__(self, engine: Engine, total: int | None, done: int, show: bool | None):
        console = Console(stderr=True, force_terminal=show or None)
        self.progress: Progress | None = None
        if console.is_terminal and total != 1 if show is None else show:
            columns = (TextColumn("requests"), MofNCompleteColumn(), BarColumn(None), Rates(engine), TimeRemainingColumn())
            # Twice a second: a reading of the engine's statistics sorts its latencies, which takes some ms.
            self.progress = Progress(*columns, console=console, refresh_per_second=2)
            self.task = self.progress.add_task("requests", total=total, completed=done)

    def __enter__(self) -> ProgressLine:
        if self.progress is not None:
            self.progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.progress is not None:
            self.progress.stop()

    def advance(self) -> None:
        if self.progress is not None:
            self.progress.advance(self.task)
