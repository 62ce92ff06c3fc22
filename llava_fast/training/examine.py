"""Records looked at one by one before a run: checked, tokenised, counted; by several processes where there are many."""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
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
    sample_indices,
)
from llava_fast.inputs.sources import Source, parse, read, record_id, where
from llava_fast.inputs.video import count_frames
from llava_fast.requests import InputOptions
from llava_fast.training.config import TrainConfig

CHUNK = 512  # records that a process takes at a time
ALONE = 20_000  # records up to which no other process is started: each takes seconds to import what it needs


@dataclass(frozen=True)
class Job:
    """spec: None where no model is given: then nothing is tokenised.  headers: open every picture and video, not only those whose size
    decides how many tokens they take."""

    sources: tuple[Source, ...]
    config: TrainConfig
    spec: InputSpec | None
    headers: bool = False


@dataclass(frozen=True)
class Fault:
    """Why a record is left out. source, record: its numbers.  path: the medium that is missing or cannot be read, with its `stamp`
    (bytes and time of change, None where it is missing): when that changes, the record is looked at again."""

    file: str
    source: int
    record: int
    id: str | None
    dataset: str
    scenario: Scenario
    kind: Kind
    message: str
    path: str | None = None
    stamp: list[int] | None = None


@dataclass(frozen=True)
class Finding:
    """What was found of some records. rows: an Arrow record batch of `schema`."""

    rows: Any
    faults: list[Fault]


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


def examine_all(job: Job, processes: int | None = None, progress: Any = None) -> Iterator[Finding]:
    """What is found of every record that the sources' strategies take, in order.

    processes: None: as many as there are cores, or only this one for up to ALONE records.
    progress: called with the records seen so far and their number.
    """
    chunks = _chunks(job)
    total = sum(len(numbers) for _, numbers, _ in chunks)
    count = processes or (1 if total <= ALONE else _cores())
    seen = 0
    with _processes(job, min(count, len(chunks))) as examine_chunk:
        for (_, numbers, _), finding in zip(chunks, examine_chunk(chunks), strict=True):
            yield finding
            seen += len(numbers)
            if progress is not None:
                progress(seen, total)


Chunk = tuple[int, Sequence[int], Sequence[Any] | np.ndarray]  # source, numbers and places of some of its records


def _chunks(job: Job) -> list[Chunk]:
    chunks: list[Chunk] = []
    for number, source in enumerate(job.sources):
        places = source.places()
        taken = sample_indices(len(places), source.strategy, seed=[job.config.seed, number])
        for start in range(0, len(taken), CHUNK):
            numbers = taken[start : start + CHUNK]
            wanted = places[numbers] if isinstance(places, np.ndarray) else [places[i] for i in numbers]
            chunks.append((number, numbers, wanted))
    return chunks


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def examine(job: Job, chunk: Chunk) -> Finding:
    number, numbers, places = chunk
    source = job.sources[number]
    rows: list[dict[str, Any]] = []
    faults: list[Fault] = []
    for index, raw in zip(numbers, read(source, places), strict=True):
        entry = None
        try:
            entry = parse(raw, where(source, index))
            row = _row(job, number, index, entry)
        except BadRecord as error:
            name = (dataset_name(entry) if isinstance(entry, dict) else "") or source.path.stem
            named = (str(source.path), number, index, record_id(entry), name, _guess(entry, name))
            faults.append(Fault(*named, error.kind, str(error), error.path, stamp(error.path) if error.path else None))
            continue
        except Exception as error:  # a fault of ours, not of the record: it stops the run, and says where
            error.add_note(where(source, index, entry))
            raise
        rows.append(row)
    return Finding(_to_arrow(rows), faults)


def _row(job: Job, number: int, index: int, entry: Any) -> dict[str, Any]:
    """One record as a row of `schema`. Raises BadRecord."""
    source, config, spec = job.sources[number], job.config, job.spec
    record = check_record(entry, where(source, index, entry), source.folder)
    if len(record.images) > 1 and _draw(config.seed, number, index) < config.front_share:
        record = replace(record, turns=pictures_in_front(record.turns))
    if job.headers:
        _look_at(record)
    turns = len(record.turns)
    if spec is None:
        ids = labels = np.empty(0, dtype=np.int64)
        length, views = 0, record.media
    else:
        record, ids, labels, length, views = _encode(record, config, spec)
    supervised = labels != IGNORE
    assert (ids[supervised] == labels[supervised]).all()  # so that spans say it all
    spans = np.flatnonzero(np.diff(supervised, prepend=False, append=False))
    return {
        "source": number,
        "record": index,
        "id": record_id(entry),
        "dataset": record.dataset or source.path.stem,
        "scenario": SCENARIOS.index(record.scenario),
        "video": record.video is not None,
        "dropped": turns - len(record.turns),
        "media": _names(entry, source)[: record.media],
        "ids": ids,
        "spans": spans,
        "tokens": length,
        "views": views,
        "labels": int(supervised[1:].sum()),
        "crc": crc32(repr(record.names).encode() + ids.tobytes() + labels.tobytes()),
    }


def _encode(record: Record, config: TrainConfig, spec: InputSpec) -> tuple[Record, np.ndarray, np.ndarray, int, int]:
    """The record as it is trained on, its ids, labels, tokens and views. With too_long='cut', whole questions and answers are taken off
    its end, with their pictures, until it fits."""
    limit = min(config.tokens_per_row, spec.max_positions)
    while True:
        visuals = media_layouts(record, config.inputs, spec)
        counts = [len(visuals)] if record.video is not None else [1] * len(record.images)
        try:
            labelled = encode_turns(
                record.turns, config.template, spec.tokenizer, spec.image_token_id, counts, spec.chat_template, config.inputs.keep_order
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
    anyres = (spec.anyres if options.anyres is None else options.anyres) and len(record.images) == 1
    frames, size = 0, (spec.tile, spec.tile)
    for path in _media_of(record)[:1] if anyres or record.video is not None else ():
        try:
            if anyres:
                size = image_size(read_media(path))
            else:
                frames = count_frames(_video(path, options), *video_sampling(options))
        except ValueError as error:
            raise BadRecord(f"{record.where}: {error}", "unreadable file", path) from error
    try:
        if record.video is not None:
            return video_layout(frames, spec, options.pool)
        return [picture_layout(size, spec, anyres)] * len(record.images)
    except ValueError as error:
        raise BadRecord(f"{record.where}: {error}", "layout") from error


def _look_at(record: Record) -> None:
    """Read the headers of a record's media. BadRecord for one that is not a picture or video."""
    for path in _media_of(record):
        try:
            if record.video is not None:
                count_frames(read_media(path), look=True)
            else:
                image_size(read_media(path))
        except ValueError as error:
            raise BadRecord(f"{record.where}: {error}", "unreadable file", path) from error


def _media_of(record: Record) -> tuple[str, ...]:
    return record.images if record.video is None else (record.video,)


def _video(path: str, options: InputOptions) -> str | bytes:
    """A packed video is read only where its frames must be counted."""
    counted = options.num_frames is None and (options.fps is not None or options.frames_upbound)
    return read_media(path) if counted or "\0" not in path else b""


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


def stamp(path: str) -> list[int] | None:
    """Bytes and time of change of a file (of a packed medium: of what it is in); None where it is missing."""
    try:
        status = os.stat(path.partition("\0")[0])
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns]


def _to_arrow(rows: list[dict[str, Any]]) -> Any:
    import pyarrow as pa

    columns = []
    for field in schema():
        values = [row[field.name] for row in rows]
        if field.name in ("ids", "spans"):
            offsets = np.cumsum([0, *map(len, values)], dtype=np.int32)
            flat = np.concatenate([np.empty(0, dtype=np.int64), *values]).astype(np.int32)
            columns.append(pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat)))
        else:
            columns.append(pa.array(values, type=field.type))
    return pa.record_batch(columns, schema=schema())


# --- several processes ---
#
# Each is a fresh interpreter that talks over its pipes. Not `multiprocessing`: a fork may come while another thread holds a lock, and
# spawned processes run the caller's script again unless it is guarded.

WORKER = "from llava_fast.training.examine import serve; serve()"


@contextlib.contextmanager
def _processes(job: Job, count: int) -> Iterator[Any]:
    """A function from chunks to their findings, in order, that keeps `count` processes busy."""
    if count < 2:
        yield lambda chunks: (examine(job, chunk) for chunk in chunks)
        return
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "TOKENIZERS_PARALLELISM": "false"}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True)
    workers = [subprocess.Popen([sys.executable, "-c", WORKER], **pipes) for _ in range(count)]  # type: ignore[call-overload]
    free: queue.Queue[subprocess.Popen] = queue.Queue()
    message = pickle.dumps(job)

    def begin(worker: subprocess.Popen) -> None:
        with contextlib.suppress(OSError):  # it has died: the first chunk finds out
            worker.stdin.write(message)  # type: ignore[union-attr]
        free.put(worker)

    def ask(chunk: Chunk) -> Finding:
        worker = free.get()
        try:
            pickle.dump(chunk, worker.stdin)  # type: ignore[arg-type]
            worker.stdin.flush()  # type: ignore[union-attr]
            answer = pickle.load(worker.stdout)  # type: ignore[arg-type]
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            records = f"records {chunk[1][0]} to {chunk[1][-1]} of {job.sources[chunk[0]].path}"
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.wait(10)  # its pipe is closed a moment before it has an exit code
            raise RuntimeError(f"a process that looked at {records} has died (exit code {worker.poll()})") from error
        finally:
            free.put(worker)
        if isinstance(answer, str):
            raise RuntimeError(answer)
        return answer

    for worker in workers:
        begin(worker)
    pool = ThreadPoolExecutor(count)
    try:
        yield lambda chunks: pool.map(ask, chunks)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.kill()
        pool.shutdown(wait=True)
        for worker in workers:
            worker.communicate()


def serve() -> None:
    """The other end: a job from stdin, then chunks, whose findings (or what went wrong) go to stdout."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # so that what a library prints is no answer
    job = pickle.load(sys.stdin.buffer)
    while True:
        try:
            chunk = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer: Finding | str = examine(job, chunk)
        except Exception:  # whatever it is, it belongs to the process that asked
            answer = traceback.format_exc()
        pickle.dump(answer, answers)
        answers.flush()
