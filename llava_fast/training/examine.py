"""Records looked at one by one before a run: checked, tokenised, counted."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from zlib import crc32

import numpy as np

from llava_fast.batch import IGNORE, Visual
from llava_fast.inputs.images import image_size
from llava_fast.inputs.labels import encode_turns
from llava_fast.inputs.media import Packed, read_media
from llava_fast.inputs.prepare import InputSpec, picture_layout, video_layout, video_sampling
from llava_fast.inputs.records import (
    MARK,
    SCENARIOS,
    BadRecord,
    Kind,
    Record,
    Scenario,
    check_record,
    dataset_name,
    pictures_in_front,
)
from llava_fast.inputs.sources import Source, parse, read, record_id, where
from llava_fast.inputs.video import check_video, count_frames
from llava_fast.requests import InputOptions
from llava_fast.training.config import TrainConfig

Stamp = list[int]  # of a file: bytes and time of change
Chunk = tuple[int, Sequence[int], Sequence[Any] | np.ndarray]  # source, numbers and places of some of its records


@dataclass(frozen=True)
class Job:
    """spec: None where no model is given: then nothing is tokenised.  headers: open every picture and video, not only those whose size
    decides how many tokens they take.

    The records are preference pairs where the configuration has `dpo`."""

    sources: tuple[Source, ...]
    config: TrainConfig
    spec: InputSpec | None
    headers: bool = False


@dataclass(frozen=True)
class Fault:
    """What is wrong with a record. source, record: its numbers.  path: the medium that is missing or cannot be read, with its `stamp`
    (None where it is missing): when that changes, the record is looked at again."""

    file: str
    source: int
    record: int
    id: str | None
    dataset: str
    scenario: Scenario
    kind: Kind
    message: str
    path: str | None = None
    stamp: Stamp | None = None


@dataclass(frozen=True)
class Finding:
    """What was found of some records. rows: an Arrow record batch of `schema`.  faults: of records that are left out.

    unreadable: faults of records that are among the rows, since only `Job.headers` finds them: what is in an index does not depend on
    who looked.  stamps: source, name and stamp of the media that decide how many tokens their record takes.
    """

    rows: Any
    faults: list[Fault]
    unreadable: list[Fault] = field(default_factory=list)
    stamps: list[tuple[int, str, Stamp | None]] = field(default_factory=list)


def schema() -> Any:
    import pyarrow as pa

    return pa.schema(
        [
            ("source", pa.int32()),
            ("record", pa.int64()),
            ("id", pa.string()),
            ("dataset", pa.string()),
            ("scenario", pa.int8()),
            ("video", pa.bool_()),
            ("dropped", pa.int32()),
            ("media", pa.list_(pa.string())),
            ("ids", pa.list_(pa.int32())),
            ("spans", pa.list_(pa.int32())),  # start, end, start, end, ... of the supervised ids
            ("tokens", pa.int64()),
            ("views", pa.int64()),
            ("labels", pa.int64()),
            ("crc", pa.uint32()),  # of ids, labels and names of media
        ]
    )


def examine(job: Job, chunk: Chunk) -> Finding:
    number, numbers, places = chunk
    source = job.sources[number]
    rows: list[dict[str, Any]] = []
    found = Finding(None, [])
    for index, raw in zip(numbers, read(source, places), strict=True):
        entry = None
        try:
            entry = parse(raw, where(source, index))
            record, row = _pair_row(job, number, index, entry) if job.config.dpo is not None else _row(job, number, index, entry)
        except BadRecord as error:
            found.faults.append(_fault(source, number, index, entry, error))
            continue
        except Exception as error:  # a fault of ours, not of the record: it stops the run, and says where
            error.add_note(where(source, index, entry))
            raise
        rows.append(row)
        if job.headers:
            try:
                _look_at(record, job.config.inputs)
            except BadRecord as error:
                found.unreadable.append(_fault(source, number, index, entry, error))
        # Pairs have no index that could outlive their pictures.
        path = None if job.spec is None or job.config.dpo is not None else _deciding(record, job.config.inputs, job.spec)
        if path is not None and not isinstance(path, Packed):  # what is packed changes with its file
            found.stamps.append((number, row["media"][0], stamp(path)))
    return replace(found, rows=_to_arrow(rows))


def _fault(source: Source, number: int, index: int, entry: Any, error: BadRecord) -> Fault:
    name = (dataset_name(entry) if isinstance(entry, dict) else "") or source.path.stem
    named = (str(source.path), number, index, record_id(entry), name, _guess(entry, name))
    return Fault(*named, error.kind, str(error), error.path, stamp(error.path) if error.path else None)


def _row(job: Job, number: int, index: int, entry: Any) -> tuple[Record, dict[str, Any]]:
    """A record, and as a row of `schema`. Raises BadRecord."""
    source, config, spec = job.sources[number], job.config, job.spec
    record = check_record(entry, where(source, index, entry), source.folder)
    kept = record
    if spec is None:
        ids = labels = np.empty(0, dtype=np.int64)
        length, views = 0, len(record.images) + (0 if record.video is None else _frames(record, config.inputs))
    else:
        in_front = _draw(config.seed, number, index) < config.front_share
        kept, ids, labels, length, views = _encode(record, config, spec, in_front)
    supervised = labels != IGNORE
    assert (ids[supervised] == labels[supervised]).all()  # so that spans say it all
    return record, {
        "source": number,
        "record": index,
        "id": record_id(entry),
        "dataset": record.dataset or source.path.stem,
        "scenario": SCENARIOS.index(kept.scenario),
        "video": kept.video is not None,
        "dropped": len(record.turns) - len(kept.turns),
        "media": _names(entry, source)[: kept.media],
        "ids": ids,
        "spans": np.flatnonzero(np.diff(supervised, prepend=False, append=False)),
        "tokens": length,
        "views": views,
        "labels": int(supervised[1:].sum()),
        "crc": crc32(repr(kept.names).encode() + ids.tobytes() + labels.tobytes()),
    }


def _pair_row(job: Job, number: int, index: int, entry: Any) -> tuple[Record, dict[str, Any]]:
    """The prompt of a preference pair, and the pair as a row of `schema` that has sizes only. Raises BadRecord."""
    from llava_fast.training.preferences import measure_pair  # which imports this

    source = job.sources[number]
    assert job.spec is not None
    (record, _), pair, tokens, views = measure_pair(entry, where(source, index, entry), source.folder, job.config, job.spec)
    labels = sum(label != IGNORE for side in (pair.prompt, pair.chosen, pair.rejected) for label in side.labels)
    empty = np.empty(0, dtype=np.int64)
    named = {"source": number, "record": index, "id": record_id(entry), "dataset": record.dataset or source.path.stem}
    sizes = {"tokens": tokens, "views": views, "labels": labels, "dropped": 0, "crc": 0, "ids": empty, "spans": empty}
    media = {"scenario": SCENARIOS.index(record.scenario), "video": record.video is not None, "media": []}
    return record, {**named, **sizes, **media}


def _encode(record: Record, config: TrainConfig, spec: InputSpec, in_front: bool) -> tuple[Record, np.ndarray, np.ndarray, int, int]:
    """The record as it is trained on, its ids, labels, tokens and views. With too_long='cut', whole questions and answers are taken off
    its end, with their pictures, until it fits; only then do the pictures that are left go to the front."""
    limit = min(config.tokens_per_row, spec.max_positions)
    while True:
        visuals = media_layouts(record, config.inputs, spec)
        counts = [len(visuals)] if record.video is not None else [1] * len(record.images)
        turns = pictures_in_front(record.turns) if in_front and len(record.images) > 1 else record.turns
        try:
            labelled = encode_turns(
                turns, config.template, spec.tokenizer, spec.image_token_id, counts, spec.chat_template, config.inputs.keep_order
            )
        except ValueError as error:
            raise BadRecord(f"{record.where}: {error}", "template") from error
        ids, labels = np.array(labelled.ids, dtype=np.int64), np.array(labelled.labels, dtype=np.int64)
        tokens = len(ids) - len(visuals) + sum(visual.tokens for visual in visuals)
        views = sum(visual.views for visual in visuals)
        fits = tokens <= limit and (config.views_per_row is None or views <= config.views_per_row)
        if fits or config.too_long != "cut" or sum(turn.role == "assistant" for turn in record.turns) == 1:
            break
        record = _without_last(record)
    if tokens > limit:
        raise BadRecord(
            f"{record.where}: {tokens} tokens, more than the {limit} that a row (tokens_per_row) or the context holds", "too long"
        )
    if config.views_per_row is not None and views > config.views_per_row:
        raise BadRecord(f"{record.where}: {views} views, more than views_per_row {config.views_per_row}", "too many views")
    if (labels[1:] == IGNORE).all():
        raise BadRecord(f"{record.where}: nothing to learn, no token of it is supervised by template {config.template}", "nothing to learn")
    return record, ids, labels, tokens, views


def _without_last(record: Record) -> Record:
    turns = record.turns[:-2]
    media = sum(turn.text.count(MARK) for turn in turns)
    return replace(record, turns=turns, images=record.images[:media], names=record.names[:media], video=record.video if media else None)


def media_layouts(record: Record, options: InputOptions, spec: InputSpec) -> list[Visual]:
    """The layouts that `prepare` will give the record's media, from file headers alone. Tiles are for single pictures."""
    path = _deciding(record, options, spec)
    if record.video is not None:
        frames = _frames(record, options)
    try:
        size = (spec.tile, spec.tile) if path is None or record.video is not None else image_size(read_media(path))
    except ValueError as error:
        raise BadRecord(f"{record.where}: {error}", "unreadable file", path) from error
    try:
        if record.video is not None:
            return video_layout(frames, spec, options.pool)
        return [picture_layout(size, spec, anyres=path is not None)] * len(record.images)
    except ValueError as error:
        raise BadRecord(f"{record.where}: {error}", "layout") from error


def _deciding(record: Record, options: InputOptions, spec: InputSpec) -> str | None:
    """The medium whose size decides how many tokens the record takes: a picture that is cut into tiles, a video whose frames count."""
    if record.video is not None:
        return record.video if _counted(options) else None
    anyres = spec.anyres if options.anyres is None else options.anyres
    return record.images[0] if anyres and len(record.images) == 1 else None


def _counted(options: InputOptions) -> bool:
    """Whether a video's length decides how many frames are taken of it."""
    return options.num_frames is None and (options.fps is not None or options.frames_upbound is not None)


def _frames(record: Record, options: InputOptions) -> int:
    """Frames that are taken of a record's video, which is opened only where its length decides."""
    assert record.video is not None
    try:
        needed = _counted(options) or not isinstance(record.video, Packed)
        return count_frames(read_media(record.video) if needed else b"", *video_sampling(options))
    except ValueError as error:
        raise BadRecord(f"{record.where}: {error}", "unreadable file", record.video) from error


def _look_at(record: Record, options: InputOptions) -> None:
    """Read the headers of a record's media. BadRecord for one that is not a picture or video."""
    for path in record.images if record.video is None else (record.video,):
        try:
            if record.video is not None:
                check_video(read_media(path), *video_sampling(options))
            else:
                image_size(read_media(path))
        except ValueError as error:
            raise BadRecord(f"{record.where}: {error}", "unreadable file", path) from error


def _draw(*numbers: int) -> float:
    """In [0, 1), the same for the same numbers everywhere."""
    return crc32(repr(numbers).encode()) / 2**32


def _names(entry: dict, source: Source) -> list[str]:
    """A record's media as it writes them; packed ones without the file that they are in."""
    named = entry.get("video") or entry.get("image") or []
    names = [named] if isinstance(named, str) else named
    return [name[len(str(source.path)) :] if isinstance(name, Packed) else name for name in names]


def _guess(entry: Any, dataset: str) -> Scenario:
    """The scenario of a record that may be wrong in any way."""
    fields = entry if isinstance(entry, dict) else {}
    image, video = fields.get("image"), fields.get("video")
    images = tuple(map(str, image)) if isinstance(image, list) else (str(image),) if image else ()
    return Record("", (), () if video else images, str(video) if video else None, images, dataset).scenario


def stamp(path: str) -> Stamp | None:
    """Bytes and time of change of a file (of a packed medium: of what it is in); None where it is missing."""
    try:
        status = os.stat(path.partition("\0")[0])
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns]


def _to_arrow(rows: list[dict[str, Any]]) -> Any:
    import pyarrow as pa

    columns = []
    for column in schema():
        values = [row[column.name] for row in rows]
        if column.name in ("ids", "spans"):
            offsets = np.cumsum([0, *map(len, values)], dtype=np.int32)
            flat = np.concatenate([np.empty(0, dtype=np.int64), *values]).astype(np.int32)
            columns.append(pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat)))
        else:
            columns.append(pa.array(values, type=column.type))
    return pa.record_batch(columns, schema=schema())
