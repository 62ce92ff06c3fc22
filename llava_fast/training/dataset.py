"""Records as a data set: every record's tokens and views are counted when the run starts, its media are opened when its row comes."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from zlib import crc32

import numpy as np
from torch import Tensor

from llava_fast.batch import IGNORE, Visual, splice
from llava_fast.inputs.images import image_size
from llava_fast.inputs.labels import Labelled, encode_turns
from llava_fast.inputs.prepare import InputSpec, picture_layout, prepare, video_layout, video_sampling
from llava_fast.inputs.records import Record, load_records
from llava_fast.inputs.video import count_frames
from llava_fast.requests import InputOptions, Request
from llava_fast.training.batches import Example
from llava_fast.training.config import TrainConfig


@dataclass
class RecordData:
    """Checked records of known size: a `batches.Dataset`. tokens, views: int64 [records], what each adds to a row.

    fingerprint: CRC-32 of every record's ids, labels and names of media. Moving the files changes none of these.
    kept: samples in memory for later epochs, as many as config.cache_mb has room for.
    """

    records: Sequence[Record]
    tokens: np.ndarray
    views: np.ndarray
    config: TrainConfig
    spec: InputSpec
    fingerprint: int
    kept: dict[int, Example] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._room = self.config.cache_mb * 2**20
        self._lock = threading.Lock()

    def load(self, index: int) -> Example:
        """The labelled sample and its uint8 views; ValueError naming the record where its media cannot be read."""
        if index in self.kept:
            return self.kept[index]
        example = self._make(index)
        (sample,), views = example.sequences, example.views
        size = 2 * sample.token_ids.nbytes + sum(visual.source.nbytes for visual in sample.visuals) + (0 if views is None else views.nbytes)
        with self._lock:
            if size <= self._room:
                self.kept[index] = example
                self._room -= size
        return example

    def _make(self, index: int) -> Example:
        record, options = self.records[index], dataclasses.replace(self.config.inputs, tokenisation="hf")
        views: Tensor | None = None
        visuals: tuple[Visual, ...] = ()
        if record.media:
            # A bare string of marks: `prepare` opens, resizes and lays out the media as it does for `generate`.
            marks = "<video>" if record.video is not None else "<image>" * len(record.images)
            videos = [record.video] if record.video is not None else []
            try:
                prepared = prepare(Request(marks, images=list(record.images), videos=videos), options, self.spec)
            except ValueError as error:
                raise ValueError(f"{record.where}: {error}") from error
            views, visuals = prepared.views, prepared.sample.visuals
        labelled = _encode(record, _counts(record, len(visuals)), self.config, self.spec)
        sample = splice(labelled.ids, visuals, self.spec.image_token_id, labelled.labels)
        if (len(sample), sample.views) != (self.tokens[index], self.views[index]):
            raise ValueError(
                f"{record.where}: {len(sample)} tokens and {sample.views} views, but {self.tokens[index]} and {self.views[index]} when the "
                "run started: its media have changed"
            )
        return Example((sample,), views)


def index_records(config: TrainConfig, spec: InputSpec, on_bad: Callable[[str], None] | None = None) -> RecordData:
    """Read and check the records of a configuration, and count each one's tokens and views from sizes alone.

    on_bad: called with the message of each record that is broken or longer than a row or than the model's context, which is then
    left out; None: it raises ValueError.
    """
    records, tokens, views = [], [], []
    fingerprint = 0
    token_limit = min(config.tokens_per_row, spec.max_positions)
    for record in load_records(config.data, config.media_folder, config.seed, on_bad):
        try:
            visuals = media_layouts(record, config.inputs, spec)
            labelled = _encode(record, _counts(record, len(visuals)), config, spec)
            length = len(labelled.ids) - len(visuals) + sum(visual.tokens for visual in visuals)
            count = sum(visual.views for visual in visuals)
            _check(record, labelled, length, count, token_limit, config)
        except ValueError as error:
            message = str(error) if str(error).startswith(record.where) else f"{record.where}: {error}"
            if on_bad is None:
                raise ValueError(message) from error
            on_bad(message)
            continue
        records.append(record)
        tokens.append(length)
        views.append(count)
        fingerprint = crc32(repr(record.names).encode() + np.array([labelled.ids, labelled.labels]).tobytes(), fingerprint)
    return RecordData(records, np.array(tokens, dtype=np.int64), np.array(views, dtype=np.int64), config, spec, fingerprint)


def media_layouts(record: Record, options: InputOptions, spec: InputSpec) -> list[Visual]:
    """The layouts that `prepare` will give the record's media, from file headers alone. Tiles are for single pictures."""
    if record.video is not None:
        return video_layout(count_frames(record.video, *video_sampling(options)), spec, options.pool)
    anyres = (spec.anyres if options.anyres is None else options.anyres) and len(record.images) == 1
    if anyres:
        return [picture_layout(image_size(record.images[0]), spec, True)]
    return [picture_layout((spec.tile, spec.tile), spec, False)] * len(record.images)


def _counts(record: Record, visuals: int) -> list[int]:
    """Placeholders that each mark of the record stands for: one a picture, one a frame of a video that is not pooled."""
    return [visuals] if record.video is not None else [1] * len(record.images)


def _encode(record: Record, counts: Sequence[int], config: TrainConfig, spec: InputSpec) -> Labelled:
    return encode_turns(
        record.turns, config.template, spec.tokenizer, spec.image_token_id, counts, spec.chat_template, config.inputs.keep_order
    )


def _check(record: Record, labelled: Labelled, tokens: int, views: int, token_limit: int, config: TrainConfig) -> None:
    if tokens > token_limit:
        raise ValueError(f"{record.where}: {tokens} tokens, more than the {token_limit} that a row (tokens_per_row) or the context holds")
    if config.views_per_row is not None and views > config.views_per_row:
        raise ValueError(f"{record.where}: {views} views, more than views_per_row {config.views_per_row}")
    if all(label == IGNORE for label in labelled.labels[1:]):
        raise ValueError(f"{record.where}: nothing to learn, no token of it is supervised by template {config.template}")
