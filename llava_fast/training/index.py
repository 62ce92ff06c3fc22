"""The index of a run's data: every record's tokens, labels, sizes and media, in Arrow files that are mapped into memory.

  <index_dir>/<key>/records.arrow   a row a record, in batches of BATCH rows
                    sizes.arrow     the columns that packing reads, in one batch, so that each is one flat array
                    faults.jsonl    the records that were left out, and why
                    unreadable.jsonl  those that were not, but have media that a check of all headers found broken
                    index.json      what it was made of
                    stale           where a run found media that have changed

The key is a hash of the sources' sizes and times of change and of every setting that shapes tokens; no path is part of it, so data that
were moved are found again (their media are then looked for, once). A folder with its name is complete: it is renamed when it is on disk.
Media that decide lengths (pictures cut into tiles, videos sampled by rate) are known by size and time of change, STAMPS of them at most:
they are looked at whenever the index is opened, and the rest when their rows come.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from filelock import FileLock

from llava_fast.batch import IGNORE
from llava_fast.inputs.media import Packed
from llava_fast.inputs.prepare import InputSpec
from llava_fast.inputs.records import SCENARIOS, Scenario
from llava_fast.inputs.sources import Source, find_sources, place_name
from llava_fast.training.config import TrainConfig
from llava_fast.training.examine import Fault, Finding, Job, Stamp, schema, stamp
from llava_fast.training.workers import examine_all

log = logging.getLogger(__name__)
VERSION = 2  # of the files and of what is written in them: a new one makes every index anew
BATCH = 1024
FLAT = ("tokens", "views", "labels", "scenario", "crc")  # columns of sizes.arrow
STAMPS = 4096  # media looked at when an index is opened: 20 ms
ABANDONED = 3600  # seconds without a change after which a partial index is taken to be of a build that was killed


@dataclass(frozen=True)
class Entry:
    """A record of an index. images, video: as in `Record`.  dropped: turns that were cut off its end."""

    where: str
    dataset: str
    scenario: Scenario
    images: tuple[str, ...]
    video: str | None
    dropped: int


class Index(Sequence[Entry]):
    """An index on disk. Nothing of it is in memory but what is being read, and pages that the system can take back.

    tokens, views, labels: int64 [records], what each adds to a row, and how many of its tokens are supervised.
    scenarios: int8 [records], numbers of SCENARIOS.  faults: what was left out.
    """

    def __init__(self, folder: Path, sources: Sequence[Source]):
        import pyarrow as pa

        self.folder = folder
        self.sources = sources
        sizes = pa.ipc.open_file(pa.memory_map(str(folder / "sizes.arrow"))).get_batch(0)
        self.tokens, self.views, self.labels, self.scenarios, crc = (sizes[name].to_numpy() for name in FLAT)
        # Tokens and views too: a picture cut into more tiles changes no id, but where everything lies in an epoch's rows.
        self.fingerprint = crc32(self.views.tobytes(), crc32(self.tokens.tobytes(), crc32(crc.tobytes())))
        self._records = pa.ipc.open_file(pa.memory_map(str(folder / "records.arrow")))
        batches = -(-len(self.tokens) // BATCH)
        if self._records.num_record_batches != batches:
            raise ValueError(f"{folder / 'records.arrow'} has {self._records.num_record_batches} batches, expected {batches}")
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        row = self._row(index % len(self), "source", "record", "id", "dataset", "scenario", "media", "video", "dropped")
        source = self.sources[row["source"]]
        media = tuple(_resolve(name, source) for name in row["media"])
        images, video = ((), media[0]) if row["video"] else (media, None)
        named = place_name(source, row["record"], row["id"])
        return Entry(named, row["dataset"], SCENARIOS[row["scenario"]], images, video, row["dropped"])

    def ids_and_labels(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """int64 token ids with one placeholder a picture (or frame, or block of frames), and the labels of the same length."""
        batch, row = self._batch(index), index % BATCH
        ids = batch["ids"][row].values.to_numpy().astype(np.int64)
        labels = np.full(len(ids), IGNORE, dtype=np.int64)
        for start, end in batch["spans"][row].values.to_numpy().reshape(-1, 2):
            labels[start:end] = ids[start:end]
        return ids, labels

    @cached_property
    def facts(self) -> dict[str, Any]:
        return json.loads((self.folder / "index.json").read_text())

    @property
    def faults(self) -> list[Fault]:
        return self._faults("faults.jsonl")

    @property
    def unreadable(self) -> list[Fault]:
        """Of records that are in the index; those whose media have changed since are not among them."""
        return [fault for fault in self._faults("unreadable.jsonl") if fault.path is None or fault.stamp == stamp(fault.path)]

    def _faults(self, name: str) -> list[Fault]:
        """With the sources' names as they are now."""
        faults = []
        with (self.folder / name).open(encoding="utf-8") as file:
            for fault in (Fault(**json.loads(line)) for line in file):
                now = str(self.sources[fault.source].path)
                faults.append(dataclasses.replace(fault, file=now, message=now + fault.message.removeprefix(fault.file)))
        return faults

    def mark_stale(self) -> None:
        """The next run that stops at bad records makes it anew."""
        with contextlib.suppress(OSError):  # whoever calls is about to say what is wrong with the media
            (self.folder / "stale").touch()

    def _batch(self, index: int) -> Any:
        with self._lock:  # of loader threads, which share the file's reader
            return self._records.get_batch(index // BATCH)

    def _row(self, index: int, *names: str) -> dict[str, Any]:
        batch = self._batch(index)
        return {name: batch[name][index % BATCH].as_py() for name in names}


def open_index(
    config: TrainConfig, spec: InputSpec, on_finding: Callable[[Finding], None], progress: Callable[[int, int], None] | None = None
) -> Index:
    """The index of a configuration's data: one that is on disk already and still true, or a new one.

    on_finding: sees what is found as it is found (of an old index, its faults); it may raise to stop.  progress: of `examine_all`.
    Raises ValueError for sources that cannot be read.
    """
    sources = find_sources(config.data, config.media_folder)
    folder = index_folder(config, spec, sources)
    with lock(folder):
        index = _open(folder, sources, config)
        if index is None:
            return build_index(Job(tuple(sources), config, spec), folder, on_finding, progress=progress)
    on_finding(Finding(None, index.faults))
    if config.on_bad_record == "error":  # or the run would stop at its row
        on_finding(Finding(None, index.unreadable))
    return index


def index_folder(config: TrainConfig, spec: InputSpec, sources: Sequence[Source]) -> Path:
    parent = Path(config.index_dir) if config.index_dir is not None else Path(config.output_dir).absolute().parent / "index"
    return parent / index_key(config, spec, sources)


def index_key(config: TrainConfig, spec: InputSpec, sources: Sequence[Source]) -> str:
    drawn = 0 < config.front_share < 1 or any(source.strategy.startswith("random") for source in sources)
    inputs = dataclasses.replace(config.inputs, image_aspect="squash", allowed_media_hosts=())
    said = [
        VERSION,
        [source.stamp() for source in sources],
        [config.template, config.seed if drawn else None, config.front_share, config.too_long == "cut"],
        [config.tokens_per_row, config.views_per_row],
        dataclasses.asdict(inputs),
        repr(dataclasses.replace(spec, tokenizer=None, image_processor=None)),  # type: ignore[arg-type]
        [_vocabulary(spec.tokenizer), spec.tokenizer.special_tokens_map, spec.tokenizer.chat_template],
    ]
    return hashlib.sha256(json.dumps(said, default=str, sort_keys=True).encode()).hexdigest()[:20]


def _vocabulary(tokenizer: Any) -> str:
    """A hash of how a tokenizer cuts text, without whether it truncates or pads: neither is done here."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        said: Any = sorted(tokenizer.get_vocab().items())
    else:
        said = {name: part for name, part in json.loads(backend.to_str()).items() if name not in ("truncation", "padding")}
    split = getattr(tokenizer, "split_special_tokens", False)
    return hashlib.sha256(json.dumps([said, split]).encode()).hexdigest()


def build_index(job: Job, folder: Path, on_finding: Callable[[Finding], None], **options: Any) -> Index:
    """Write the index of a job to `folder`, in the place of one that is there. options: of `examine_all`."""
    partial = folder.with_name(f"{folder.name}.partial-{socket.gethostname()}-{os.getpid()}")  # a lock may not reach over a network
    shutil.rmtree(partial, ignore_errors=True)  # of a process that had this number before
    try:
        partial.mkdir(parents=True)
        write = _Writer(partial)
        for finding in examine_all(job, **options):
            on_finding(finding)
            write.add(finding)
        write.close({"folders": _folders(job.sources), "cut": write.cut, "stamps": write.stamps, "faults": write.counts})
        old = _old(folder)
        shutil.rmtree(old, ignore_errors=True)
        if folder.is_dir():
            os.replace(folder, old)
        os.replace(partial, folder)
        _folder_to_disk(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:  # a full disk, say
        raise ValueError(f"the index could not be written to {folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Index(folder, job.sources)


def _old(folder: Path) -> Path:
    """Where an index is while the one that replaces it takes its name."""
    return folder.with_name(folder.name + ".old")


class _Writer:
    """Rows come in batches of any length and leave in batches of BATCH."""

    def __init__(self, folder: Path):
        import pyarrow as pa

        self.folder = folder
        self.schema = schema()
        self.kept = pa.schema([field for field in self.schema if field.name not in FLAT or field.name == "scenario"])
        self.file = (folder / "records.arrow").open("wb")
        self.records = pa.ipc.new_file(self.file, self.kept)
        self.faults = (folder / "faults.jsonl").open("w", encoding="utf-8")
        self.unreadable = (folder / "unreadable.jsonl").open("w", encoding="utf-8")
        self.waiting: list[Any] = []
        self.cut, self.counts = 0, [0, 0]  # faults left out, and unreadable
        self.flat: dict[str, list[np.ndarray]] = {name: [] for name in FLAT}
        self.stamps: list[tuple[int, str, Stamp | None]] = []
        self.every, self.seen = 1, 0

    def add(self, finding: Finding) -> None:
        for number, (file, faults) in enumerate(((self.faults, finding.faults), (self.unreadable, finding.unreadable))):
            self.counts[number] += len(faults)
            for fault in faults:
                file.write(json.dumps(dataclasses.asdict(fault)) + "\n")
        for stamped in finding.stamps:  # all of few, and of many every n-th
            if self.seen % self.every == 0:
                self.stamps.append(stamped)
            self.seen += 1
            if len(self.stamps) > STAMPS:
                self.stamps, self.every = self.stamps[::2], 2 * self.every
        if finding.rows is None or not finding.rows.num_rows:
            return
        for name in FLAT:
            self.flat[name].append(finding.rows[name].to_numpy())
        self.cut += int(np.count_nonzero(finding.rows["dropped"].to_numpy()))
        self.waiting.append(finding.rows.select(self.kept.names))
        if sum(rows.num_rows for rows in self.waiting) >= BATCH:
            self._flush(last=False)

    def _flush(self, last: bool) -> None:
        import pyarrow as pa

        table = pa.Table.from_batches(self.waiting, self.kept).combine_chunks()
        self.waiting = []
        for rows in table.to_batches(max_chunksize=BATCH):
            if rows.num_rows == BATCH or last:
                self.records.write_batch(rows)
            else:
                self.waiting = [rows]

    def close(self, facts: dict[str, Any]) -> None:
        import pyarrow as pa

        self._flush(last=True)
        self.records.close()
        types = [self.schema.field(name) for name in FLAT]
        flat = [np.concatenate([np.empty(0, dtype=field.type.to_pandas_dtype()), *self.flat[field.name]]) for field in types]
        with (self.folder / "sizes.arrow").open("wb") as file:
            with pa.ipc.new_file(file, pa.schema(types)) as sizes:
                sizes.write_batch(pa.record_batch([pa.array(column) for column in flat], schema=pa.schema(types)))
            _to_disk(file)
        for opened in (self.file, self.faults, self.unreadable):
            _to_disk(opened)
            opened.close()
        _write_facts(self.folder, facts)


def _to_disk(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _folder_to_disk(folder: Path) -> None:
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _write_facts(folder: Path, facts: dict[str, Any]) -> None:
    """In one go, so that whoever reads them finds the old or the new ones."""
    with (folder / "index.json.new").open("w", encoding="utf-8") as file:
        json.dump(facts, file)
        _to_disk(file)
    os.replace(folder / "index.json.new", folder / "index.json")
    _folder_to_disk(folder)


def _open(folder: Path, sources: Sequence[Source], config: TrainConfig) -> Index | None:
    """The index in a folder; None where there is none, or it cannot be read or would not be the same today."""
    _clean_up(folder)
    if not folder.is_dir():
        return None
    try:
        index = Index(folder, sources)
        why = _changed(index, config)
    except (OSError, ValueError, KeyError, TypeError) as error:  # files that are cut short, or not ours
        why = f"it cannot be read ({type(error).__name__}: {error})"
    if why is not None:
        log.warning("the index %s is made anew: %s", folder, why)
        return None
    folders = _folders(sources)
    if index.facts["folders"] != folders:
        _write_facts(folder, {**index.facts, "folders": folders})
    return index


def _clean_up(folder: Path) -> None:
    """What a process left that was killed while it wrote an index: the one before it gets its name back, and a partial one goes."""
    if not folder.is_dir() and _old(folder).is_dir():
        os.replace(_old(folder), folder)
    for partial in folder.parent.glob(folder.name + ".partial-*"):
        with contextlib.suppress(OSError):  # gone by now
            changed = max(path.stat().st_mtime for path in (partial, *partial.iterdir()))
            if time.time() - changed > ABANDONED:
                shutil.rmtree(partial, ignore_errors=True)


def _changed(index: Index, config: TrainConfig) -> str | None:
    """Why an index would not be the same if it were made today. Raises as its files do where they cannot be read."""
    lines = [(index.folder / name).read_bytes().count(b"\n") for name in ("faults.jsonl", "unreadable.jsonl")]
    if lines != index.facts["faults"]:
        raise ValueError(f"{lines} faults, expected {index.facts['faults']}")
    if (index.folder / "stale").exists() and config.on_bad_record == "error":
        return "a run found media that have changed"
    for source, name, old in index.facts["stamps"]:
        path = _resolve(name, index.sources[source])
        if (None if old is None else list(old)) != stamp(path):
            return f"{path} has changed"
    moved = index.facts["folders"] != _folders(index.sources)
    if any(fault.path is not None and (moved or fault.stamp != stamp(fault.path)) for fault in index.faults):
        return "media that were missing or unreadable may be there by now"
    return "not all of its media are where its sources are now" if moved and not _all_there(index) else None


def _all_there(index: Index) -> bool:
    return all(
        isinstance(medium, Packed) or os.path.exists(medium)
        for entry in index
        for medium in (entry.images if entry.video is None else (entry.video,))
    )


def _folders(sources: Sequence[Source]) -> list[str]:
    return [os.path.realpath(source.folder) for source in sources]


def _resolve(name: str, source: Source) -> str:
    return Packed(f"{source.path}{name}") if name.startswith("\0") else os.path.join(source.folder, name)


def lock(folder: Path) -> FileLock:
    """Processes that want the same index: one makes it, the others wait and find it."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"index_dir {folder.parent} cannot be made: {error.strerror}") from None
    return FileLock(folder.with_name(folder.name + ".lock"))
