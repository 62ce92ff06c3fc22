"""From a data set to steps of packed rows, in an order fixed by the seed, made ahead in the background."""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from llava_fast.batch import Features, PackedBatch, Sample, pack
from llava_fast.inputs.packing import Packing, pack_rows
from llava_fast.training.config import TrainConfig

if TYPE_CHECKING:
    from llava_fast.training.distributed import Share

T = TypeVar("T")


class Dataset(Protocol):
    """Samples whose sizes are known before they are made. tokens, views: int64 [samples].

    fingerprint: a number below 2**32 that changes with the samples' contents, by which a run that goes on knows its data again.
    It may have `name(index)`, what messages call a sample, and `scenario(index)`, the group its validation loss is counted in.
    """

    @property
    def tokens(self) -> np.ndarray: ...

    @property
    def views(self) -> np.ndarray: ...

    @property
    def fingerprint(self) -> int: ...

    def load(self, index: int) -> Example:
        """What it gives a row; ValueError where its media cannot be read."""
        ...


def name_of(data: Dataset, index: int) -> str:
    return str(data.name(index)) if hasattr(data, "name") else f"sample {index}"


def scenario_of(data: Dataset, index: int) -> str:
    if hasattr(data, "scenario"):
        return str(data.scenario(index))
    return ("text", "one view")[data.views[index]] if data.views[index] < 2 else "several views"


@dataclass(frozen=True)
class Example:
    """One sample made: a labelled sequence, or several of which later ones continue an earlier one.

    prefix_of: as in `batch.pack`, counted from the example's own first sequence.  views: uint8 [n, 3, S, S], of all its sequences, or
    of them those that `features` lacks.
    """

    sequences: tuple[Sample, ...]
    views: Tensor | None = None
    prefix_of: tuple[int | None, ...] = (None,)
    features: Features | None = None


class Kept:
    """Examples in memory, by the data set's index, as many as `room` bytes hold. The loader's threads share it."""

    def __init__(self, room: int):
        self.examples: dict[int, Example] = {}
        self.room = room
        self.lock = threading.Lock()

    def add(self, index: int, example: Example) -> Example:
        size = 0 if example.views is None else example.views.nbytes
        for sample in example.sequences:
            size += 2 * sample.token_ids.nbytes + sum(visual.source.nbytes for visual in sample.visuals)
        with self.lock:
            if size <= self.room:
                self.examples[index] = example
                self.room -= size
        return example


@dataclass(frozen=True)
class Row:
    """A packed row and the indices of the samples in it.

    sequences: of each sample, the first of its sequences in the batch; one more entry at the end.
    """

    batch: PackedBatch
    indices: tuple[int, ...]
    sequences: tuple[int, ...]

    def to(self, device: torch.device | str) -> Row:
        return Row(self.batch.to(device), self.indices, self.sequences)


@dataclass(frozen=True)
class Position:
    """Where in the data a run stands: the next row is row `row` of epoch `epoch`."""

    epoch: int = 0
    row: int = 0


@dataclass(frozen=True)
class Step:
    """One optimiser step's rows, and where the next step starts."""

    rows: list[Row]
    after: Position

    @property
    def real(self) -> list[Row]:
        """Without the rows that only stand in."""
        return [row for row in self.rows if row.indices]

    @property
    def samples(self) -> int:
        return sum(len(row.indices) for row in self.real)

    @property
    def tokens(self) -> int:
        return sum(row.batch.num_tokens for row in self.real)

    @property
    def views(self) -> int:
        """Shown, whether the tower has to run for them or not."""
        return sum(row.batch.num_views for row in self.real)

    @property
    def labels(self) -> int:
        return sum(row.batch.labels.shape[0] for row in self.real)


def plan_epoch(data: Dataset, config: TrainConfig, epoch: int) -> Packing:
    """The rows of one epoch; the same wherever it is computed."""
    return pack_rows(
        data.tokens,
        data.views,
        config.tokens_per_row,
        config.views_per_row,
        window=config.packing_window,
        seed=config.seed,
        epoch=epoch,
        too_long="skip",  # what a row cannot hold was reported or refused when the data set was indexed
    )


def total_steps(data: Dataset, config: TrainConfig) -> int:
    """Optimiser steps of the whole run; rows flow over the ends of epochs, so only the last step may have fewer rows."""
    if config.max_steps is not None:
        return config.max_steps
    rows = sum(len(plan_epoch(data, config, epoch).rows) for epoch in range(config.epochs))
    return -(-rows // config.rows_per_step)


def make_steps(
    data: Dataset, config: TrainConfig, start: Position, on_bad: Callable[[str], None] | None = None, share: Share | None = None
) -> Generator[Step, None, None]:
    """Steps from `start` to the last epoch (for ever where max_steps is given), media decoded by `config.workers` threads.

    on_bad: called with the message of each sample that cannot be loaded, which is then left out of its row; None: it raises.
    share: the part of every step that this rank runs; None: all of it.
    """
    with ThreadPoolExecutor(config.workers) as pool:
        rows = _rows(data, config, start)
        while taken := list(itertools.islice(rows, config.rows_per_step)):
            yield Step(make_rows(data, [indices for indices, _ in taken], pool, on_bad, share), taken[-1][1])


def make_rows(
    data: Dataset, rows: Sequence[list[int]], pool: ThreadPoolExecutor, on_bad: Callable[[str], None] | None, share: Share | None
) -> list[Row]:
    """Those that can be loaded; with a share one a round, standing in where this rank has none."""
    if share is None:
        made = [make_row(data, indices, pool, on_bad) for indices in rows]
        return [row for row in made if row is not None]
    own = []
    for taken in deal([share.cost(data.tokens[row], int(data.views[row].sum())) for row in rows], share.world):
        pictures = any(data.views[rows[row]].any() for row in taken if row is not None)
        mine = taken[share.rank]
        own.append(share.fit(None if mine is None else make_row(data, rows[mine], pool, on_bad), pictures))
    return own


def deal(costs: list[float], world: int) -> list[list[int | None]]:
    """Which row each rank runs in each round, None where there is none left.

    Ranks wait for each other in every block of every round, so that a round takes as long as its costliest row: rows of like cost share
    one. Every other round is dealt backwards, so that no rank has all of the larger ones.
    """
    order = sorted(range(len(costs)), key=lambda row: -costs[row])
    rounds: list[list[int | None]] = []
    for start in range(0, len(order), world):
        taken: list[int | None] = [*order[start : start + world]]
        taken += [None] * (world - len(taken))
        rounds.append(taken[::-1] if len(rounds) % 2 else taken)
    return rounds


def make_row(data: Dataset, indices: Sequence[int], pool: ThreadPoolExecutor, on_bad: Callable[[str], None] | None) -> Row | None:
    """The row of those samples that can be loaded; None where none can."""
    return _row(indices, list(pool.map(_loader(data, on_bad), indices)))


def _rows(data: Dataset, config: TrainConfig, start: Position) -> Iterator[tuple[list[int], Position]]:
    epoch, first = start.epoch, start.row
    while config.max_steps is not None or epoch < config.epochs:
        rows = plan_epoch(data, config, epoch).rows
        if not rows:
            return
        for number in range(first, len(rows)):
            last = number + 1 == len(rows)
            yield rows[number], Position(epoch + 1, 0) if last else Position(epoch, number + 1)
        epoch, first = epoch + 1, 0


def _loader(data: Dataset, on_bad: Callable[[str], None] | None) -> Callable[[int], Example | None]:
    def load(index: int) -> Example | None:
        try:
            return data.load(index)
        except ValueError as error:
            if on_bad is None:
                raise
            on_bad(str(error))
            return None

    return load


def _row(indices: Sequence[int], examples: Sequence[Example | None]) -> Row | None:
    """The row of those that could be loaded; None where none could."""
    sequences: list[Sample] = []
    prefix_of: list[int | None] = []
    first, kept = [0], []
    views, features = [], []
    for index, example in zip(indices, examples, strict=True):
        if example is None:
            continue
        prefix_of += [None if parent is None else parent + first[-1] for parent in example.prefix_of]
        sequences += example.sequences
        first.append(len(sequences))
        kept.append(index)
        if example.views is not None and example.views.shape[0]:
            views.append(example.views)
        if example.features is not None:
            features.append(example.features)
    if not kept:
        return None
    batch = pack(sequences, torch.cat(views) if views else None, prefix_of, "labels", _join(features) if features else None)
    return Row(batch, tuple(kept), tuple(first))


def _join(features: Sequence[Features]) -> Features:
    starts = itertools.accumulate((len(part.rows) for part in features[:-1]), initial=0)
    missing = torch.cat([part.missing + start for part, start in zip(features, starts, strict=True)])
    return Features(torch.cat([part.rows for part in features]), missing, tuple(key for part in features for key in part.keys))


@dataclass(frozen=True)
class _Failure:
    error: BaseException


def ahead(items: Generator[T, None, None], depth: int = 2) -> Generator[T, None, None]:
    """The same items in the same order, made in a background thread at most `depth` before they are asked for.

    An exception of the source is raised here, after the items before it. Closing the generator stops the thread.
    """
    ready: queue.Queue[T | _Failure | None] = queue.Queue(depth)
    stopped = threading.Event()

    def put(item: T | _Failure | None) -> bool:
        while not stopped.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        end: _Failure | None = None
        try:
            with contextlib.closing(items):
                for item in items:
                    if not put(item):
                        return
        except BaseException as error:  # raised again in the thread that asks
            end = _Failure(error)
        put(end)

    thread = threading.Thread(target=work, name="llava_fast-data", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, _Failure):
                raise item.error
            yield item
    finally:
        stopped.set()
        thread.join()
