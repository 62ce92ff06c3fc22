"""Records as a data set: their tokens and sizes come from an index on disk, their media are opened when their row comes."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from torch import Tensor

from llava_fast.batch import Visual, splice
from llava_fast.inputs.media import read_media
from llava_fast.inputs.prepare import InputSpec, prepare
from llava_fast.inputs.records import SCENARIOS
from llava_fast.requests import Request
from llava_fast.training.batches import Example, Kept
from llava_fast.training.config import TrainConfig
from llava_fast.training.examine import Finding
from llava_fast.training.index import Index, open_index


@dataclass
class RecordData:
    """Checked records of known size: a `batches.Dataset`.

    kept: samples for later epochs, as many as config.cache_mb has room for.
    """

    records: Index
    config: TrainConfig
    spec: InputSpec

    def __post_init__(self) -> None:
        self.kept = Kept(self.config.cache_mb * 2**20)

    @property
    def tokens(self) -> np.ndarray:
        """int64 [records], what each adds to a row."""
        return self.records.tokens

    @property
    def views(self) -> np.ndarray:
        return self.records.views

    @property
    def fingerprint(self) -> int:
        """CRC-32 of every record's ids, labels and names of media. Moving the files changes none of these."""
        return self.records.fingerprint

    def name(self, index: int) -> str:
        return self.records[index].where

    def scenario(self, index: int) -> str:
        return SCENARIOS[self.records.scenarios[index]]

    def load(self, index: int) -> Example:
        """The labelled sample and its uint8 views; ValueError naming the record where its media cannot be read, RuntimeError where
        anything else goes wrong."""
        if index in self.kept.examples:
            return self.kept.examples[index]
        try:
            example = self._make(index)
        except ValueError:
            raise
        except BaseException as error:  # a loader thread's SystemExit would end the run without a word, and name no record
            raise RuntimeError(f"{self.records[index].where}: its loader died of {type(error).__name__}: {error}") from error
        return self.kept.add(index, example)

    def _make(self, index: int) -> Example:
        record, options = self.records[index], dataclasses.replace(self.config.inputs, tokenisation="hf")
        views: Tensor | None = None
        visuals: tuple[Visual, ...] = ()
        if record.images or record.video is not None:
            # A bare string of marks: `prepare` opens, resizes and lays out the media as it does for `generate`.
            marks = "<video>" if record.video is not None else "<image>" * len(record.images)
            try:
                images = [read_media(image) for image in record.images]
                videos = [read_media(record.video)] if record.video is not None else []
                prepared = prepare(Request(marks, images=images, videos=videos), options, self.spec)
            except ValueError as error:
                raise ValueError(f"{record.where}: {error}") from error
            views, visuals = prepared.views, prepared.sample.visuals
        ids, labels = self.records.ids_and_labels(index)
        marks_left = int((ids == self.spec.image_token_id).sum()) - len(visuals)
        tokens = len(ids) - len(visuals) + sum(visual.tokens for visual in visuals) - marks_left
        count = sum(visual.views for visual in visuals)
        if marks_left or (tokens, count) != (self.tokens[index], self.views[index]):
            # A run that leaves bad records out goes on with the rows that it has, after an interruption too.
            if self.config.on_bad_record == "error":
                self.records.mark_stale()
            raise ValueError(
                f"{record.where}: {tokens} tokens and {count} views, but {self.tokens[index]} and {self.views[index]} when it was indexed: "
                "its media have changed; the next run counts them anew, unless on_bad_record is 'skip', which leaves such records out"
            )
        return Example((splice(ids, visuals, self.spec.image_token_id, labels),), views)


def index_records(
    config: TrainConfig, spec: InputSpec, on_bad: Callable[[str], None] | None = None, note: Callable[[str], None] | None = None
) -> RecordData:
    """The data set of a configuration, over its index: one that is there already, or a new one, for which every record is checked and
    its tokens and views are counted, from sizes alone.

    on_bad: called with the message of each record that is broken or longer than a row or than the model's context, which is then
    left out; None: it raises ValueError.  note: called with the message of each record that too_long='skip' leaves out.
    """
    counts: Counter[str] = Counter()

    def take(finding: Finding) -> None:
        for fault in finding.faults:
            counts[fault.kind] += 1
            wanted = config.too_long == "skip" and fault.kind in ("too long", "too many views")
            said = on_bad or (note or _ignore if wanted else None)
            if said is None:
                raise ValueError(fault.message)
            said(fault.message)

    began = time.perf_counter()
    console = Console()
    with Progress(console=console, transient=True, disable=not (config.progress and console.is_terminal)) as bar:
        task = bar.add_task("indexing", total=None)
        index = open_index(config, spec, take, lambda seen, total: bar.update(task, completed=seen, total=total))
    if config.progress:
        cut = index.facts["cut"]
        left_out = ", ".join(f"{count:,} {kind}" for kind, count in counts.most_common())
        console.print(
            f"{len(index):,} records in {time.perf_counter() - began:.1f} s, index in {escape(str(index.folder))}"
            + (f", {cut:,} cut at a turn's end" if cut else "")
            + (f", left out: {left_out}" if left_out else ""),
            highlight=False,
            soft_wrap=True,
        )
    return RecordData(index, config, spec)


def _ignore(message: str) -> None:
    pass
