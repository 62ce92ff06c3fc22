"""Steps until the end or a stop request: what is read of them, reported, checked and saved on the way."""

from __future__ import annotations

import contextlib
import math
import signal
import statistics
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from llava_fast.config import LlavaConfig
from llava_fast.training.batches import Dataset, Row, Step, name_of
from llava_fast.training.checkpoint import Run, list_states
from llava_fast.training.config import TrainConfig
from llava_fast.training.distributed import Ranks, Share
from llava_fast.training.flops import peak_flops, row_flops
from llava_fast.training.report import Report, StepMetrics, memory_held
from llava_fast.training.step import Objective, is_adapter, lr_factor, part_of, train_step
from llava_fast.training.validation import Validation

SPIKE_LEAST = 10  # losses that a median is taken of at least
NAMED = 100  # samples that a message names


@dataclass
class Stop:
    """number: of the signal that asked for an end; 0 without one."""

    number: int = 0


@contextlib.contextmanager
def stop_request(alone: bool = True) -> Iterator[Stop]:
    """Set by the first Ctrl-C or SIGTERM; the second of a kind ends the process at once, if it is alone: torchrun passes on what a
    terminal sends to all, and kills those that take longer than half a minute. Only the main thread can catch signals: elsewhere it is
    never set."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, frame: Any) -> None:
        stop.number = number
        if alone:
            signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Watched:
    """An objective that remembers what each row came to, so that a bad step's samples can be named."""

    def __init__(self, inner: Objective):
        self.inner = inner
        self.weight = inner.weight
        self.rows: list[tuple[tuple[int, ...], torch.Tensor]] = []

    def __call__(self, model: Any, row: Row) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        row_sum, others = self.inner(model, row)
        self.rows.append((row.indices, row_sum.detach() / max(self.weight(row), 1)))
        return row_sum, others

    def taken(self) -> list[tuple[tuple[int, ...], torch.Tensor]]:
        """The samples and the mean of each row since the last call."""
        rows, self.rows = self.rows, []
        return rows


@dataclass
class Loop:
    """Steps until `total` or a stop request. Losses stay on the device until they are reported: reading one waits for the step."""

    model: Any
    data: Dataset
    run: Run
    total: int
    config: TrainConfig
    device: torch.device
    ranks: Ranks
    share: Share | None
    report: Report
    stop: Stop
    on_step: Callable[[StepMetrics], None] | None
    objective: Watched
    validation: Validation | None
    reference: bool = False  # whether a step runs the reference of its preferences too
    validated: dict[str, float] = field(default_factory=dict)
    agreed: int = 0
    pending: list[tuple[dict[str, Any], torch.Tensor, torch.Tensor, dict[str, torch.Tensor], list]] = field(default_factory=list)

    def go(self, steps: Iterator[Step]) -> None:
        run, config = self.run, self.config
        self.peak = peak_flops(self.device)
        self.reported = time.perf_counter()
        labelled = run.position  # where the newest step with labels ended
        while run.step < self.total and not self.ending:
            started = time.perf_counter()
            step, sums = self._fetch(steps)
            if step is None or self.ending:  # or unreadable samples only: the last rows came to nothing
                break
            waited = time.perf_counter() - started
            if not sums["weight"]:
                if (step.after.epoch - 1, 0) >= (labelled.epoch, labelled.row):
                    raise ValueError(
                        f"a whole epoch gave nothing to learn: none of its samples could be read; see {config.output_dir}/skipped.txt"
                    )
                run.position = step.after
                continue
            labelled = step.after
            self._one(step, sums, waited)
            save = config.save_every is not None and run.step % config.save_every == 0
            validate = config.validate_every is not None and run.step % config.validate_every == 0
            if save or validate or run.step % config.log_every == 0 or run.step == self.total or self.ending:
                self._flush()
                if validate and run.step < self.total:
                    self._validate()
                if save and run.step < self.total:
                    self._save(last=False)
                self.reported = time.perf_counter()
        self._flush()

    def _fetch(self, steps: Iterator[Step]) -> tuple[Step | None, dict[str, float]]:
        """The next step's rows of this rank, and what all ranks' come to. A signal or bad sample of one is every rank's."""
        step, error = None, None
        try:
            step = next(steps, None)
        except Exception as bad:  # of whatever kind: the others would wait for this rank
            error = bad
        own = {"errors": float(error is not None), "signals": float(self.stop.number == signal.SIGINT), "terms": 0.0}
        own["terms"] = float(self.stop.number == signal.SIGTERM)
        real = [] if step is None else step.real
        own["weight"] = sum(self.objective.weight(row) for row in real)
        for name in ("tokens", "views", "labels", "samples"):
            own[name] = 0 if step is None else getattr(step, name)
        if self.share is not None and self.share.part:
            own["samples"] = 0  # the group's first part counts them
        shape = getattr(self.model, "config", None)
        names = self.run.trained.working
        trained, adapted = ({part_of(name) for name in names if is_adapter(name) == whether} for whether in (False, True))
        own["flops"] = 0.0
        if isinstance(shape, LlavaConfig):
            own["flops"] = sum(row_flops(shape, row.batch, trained=trained, adapted=adapted, reference=self.reference) for row in real)
        sums = dict(zip(own, self.ranks.total(*own.values()), strict=True))
        if sums["errors"]:
            self.ranks.agree(error)
        if sums["signals"] or sums["terms"]:
            self.agreed = signal.SIGTERM if sums["terms"] else signal.SIGINT
        return step, sums

    @property
    def ending(self) -> int:
        """The signal that ends the run: of several ranks what they have agreed on, since a signal may come to one, and at any moment."""
        return self.stop.number if self.ranks.world == 1 else self.agreed

    def finish(self) -> None:
        """The last checkpoint, where any was asked for or the run is stopped early; then KeyboardInterrupt or SystemExit."""
        run, number = self.run, self.ending
        if self.config.save_every is not None or number:
            self._save(last=True)
        if number and run.step < self.total:
            self.report.say(f"stopped after step {run.step} of {self.total}; the same call goes on from there")
            end = KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)
            end.agreed = True  # type: ignore[union-attr]
            raise end
        if self.validation is not None:
            self._validate()

    def _one(self, step: Step, sums: dict[str, float], waited: float) -> None:
        run, config = self.run, self.config
        factor = lr_factor(run.step, self.total, config.warmup_ratio, config.schedule)
        loss, norm, others = train_step(
            self.model, run.trained, run.optimizer, step.rows, factor, config.clip, self.device, self.objective, sums["weight"]
        )
        run.step += 1
        rates = {group["part"]: group["lr"] for group in run.optimizer.param_groups}
        counts = {name: int(sums[name]) for name in ("tokens", "views", "labels", "samples")}
        known = {
            "step": run.step,
            "epoch": run.position.epoch,
            "lr": rates.get("decoder", next(iter(rates.values()))),
            "rates": rates,
            **counts,
            "flops": sums["flops"],
            "data_wait": waited,
        }
        run.position = step.after
        run.tokens += counts["tokens"]
        run.labels += counts["labels"]
        run.samples += counts["samples"]
        run.data_wait += waited
        self.pending.append((known, loss, norm, others, self.objective.taken()))

    def _flush(self) -> None:
        """Read what the steps since the last time came to, report it, and stop at what must not be saved."""
        read = []
        for known, loss, norm, others, rows in self.pending:
            mean, *rest = self.ranks.add(torch.stack([loss, *others.values()]).double()).tolist()
            read.append((known, mean, norm.item(), dict(zip(others, rest, strict=True)), rows))
        self.pending.clear()
        shared = {**self._speed([known for known, *_ in read]), "memory": memory_held(self.device)}
        finished = [StepMetrics(loss=loss, grad_norm=norm, others=others, **known, **shared) for known, loss, norm, others, _ in read]
        self.report.add(finished)
        for metrics, (*_, rows) in zip(finished, read, strict=True):
            self._check(metrics, rows)
            self.run.losses.append(metrics.loss)
            if self.on_step is not None:
                self.on_step(metrics)

    def _speed(self, steps: list[dict[str, Any]]) -> dict[str, Any]:
        """What steps that are reported together have in common: their sums over the time since the report before."""
        seconds = max(time.perf_counter() - self.reported, 1e-9)
        flops = sum(known.pop("flops") for known in steps) / seconds
        return {
            "seconds": seconds / max(len(steps), 1),
            "tokens_per_second": sum(known["tokens"] for known in steps) / seconds,
            "views_per_second": sum(known["views"] for known in steps) / seconds,
            "waiting": sum(known["data_wait"] for known in steps) / seconds,
            "tflops": flops / 1e12,
            "mfu": flops / self.peak / self.ranks.world if flops and self.peak else None,
        }

    def _check(self, metrics: StepMetrics, rows: list[tuple[tuple[int, ...], torch.Tensor]]) -> None:
        """FloatingPointError, naming the samples of the rows it came from, for a loss that is not finite or that jumped."""
        mine = [(indices, mean.item()) for indices, mean in rows if indices]
        before, factor = self.run.losses[-self.config.spike_window :], self.config.spike_factor
        if not (math.isfinite(metrics.loss) and math.isfinite(metrics.grad_norm)):
            what = f"the loss of step {metrics.step} is {metrics.loss} (gradient norm {metrics.grad_norm})"
            means = self._of_all_ranks(mine)
            guilty = [indices for indices, mean in means if not math.isfinite(mean)] or [indices for indices, _ in means]
        elif factor and len(before) >= SPIKE_LEAST and metrics.loss > factor * statistics.median(before):
            what = (
                f"the loss of step {metrics.step} is {metrics.loss:.4g}, more than spike_factor {factor} times the median "
                f"{statistics.median(before):.4g} of the {len(before)} before it"
            )
            guilty = [max(self._of_all_ranks(mine), key=lambda row: row[1])[0]]
        else:
            return
        names = [name_of(self.data, index) for indices in guilty for index in indices]
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        kept = list_states(Path(self.config.output_dir))
        raise FloatingPointError(
            f"{what}; it came with {', '.join(names[:NAMED])}{more}. Nothing of it was saved: "
            + (f"the last checkpoint is {kept[-1]}" if kept else "there is no checkpoint yet")
        )

    def _of_all_ranks(self, rows: list) -> list:
        return [row for rows in self.ranks.gather(rows) for row in rows]

    def _validate(self) -> None:
        assert self.validation is not None
        self.validated = self.validation.losses(self.model, self.objective.inner, self.device)
        self.report.validated(self.run.step, self.validated)

    def _save(self, last: bool) -> None:
        """A checkpoint that cannot be written is said, and ends the run only where there is nothing more to do."""
        folder = Path(self.config.output_dir)
        try:
            self.run.save(folder, self.config.keep, self.ranks)
        except OSError as error:
            kept = list_states(folder)
            message = f"the checkpoint of step {self.run.step} could not be written ({error.strerror or error}); " + (
                f"{kept[-1]} is intact" if kept else "there is none before it"
            )
            if last:
                raise OSError(message) from error
            if self.ranks.first:
                warnings.warn(f"{message}; the run goes on", stacklevel=2)
