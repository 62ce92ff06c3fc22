"""The index of a run's data: every record's tokens, labels, sizes and media, in Arrow files that are mapped into memory.

  <index_dir>/<key>/records.arrow   a row a record, in batches of BATCH rows
                    sizes.arrow     the columns that packing reads, in one batch, so that each is one flat array
                    faults.jsonl    the records that were left out, and why
                    index.json      what it was made of

The key is a hash of the sources' sizes and times of change and of every setting that shapes tokens; no path is part of it, so data that
were moved are found again (their media are then looked for, once). A folder with its name is complete: it is renamed when it is on disk.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import threading
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
from llava_fast.training.examine import Fault, Finding, Job, examine_all, schema, stamp

VERSION = 1  # of the files and of what is written in them: a new one makes every index anew
BATCH = 1024
FLAT = ("tokens", "views", "labels", "scenario", "crc")  # columns of sizes.arrow


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
        with (self.folder / "faults.jsonl").open(encoding="utf-8") as file:
            return [Fault(**json.loads(line)) for line in file]

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
        index = _open(folder, sources)
        if index is None:
            return build_index(Job(tuple(sources), config, spec), folder, on_finding, progress=progress)
    on_finding(Finding(None, index.faults))
    return index


def index_folder(config: TrainConfig, spec: InputSpec, sources: Sequence[Source]) -> Path:
    parent = Path(config.index_dir) if config.index_dir is not None else Path(config.output_dir).absolute().parent / "index"
    return parent / index_key(config, spec, sources)


def index_key(config: TrainConfig, spec: InputSpec, sources: Sequence[Source]) -> str:
    backend = getattr(spec.tokenizer, "backend_tokenizer", None)
    tokenizer = backend.to_str() if backend is not None else repr(sorted(spec.tokenizer.get_vocab().items()))
    said = [
        VERSION,
        [source.stamp() for source in sources],
        [config.template, config.seed, config.front_share, config.too_long, config.tokens_per_row, config.views_per_row],
        dataclasses.asdict(config.inputs),
        repr(dataclasses.replace(spec, tokenizer=None)),
        [hashlib.sha256(tokenizer.encode()).hexdigest(), spec.tokenizer.special_tokens_map, spec.tokenizer.chat_template],
    ]
    return hashlib.sha256(json.dumps(said, default=str, sort_keys=True).encode()).hexdigest()[:20]


def build_index(job: Job, folder: Path, on_finding: Callable[[Finding], None], **options: Any) -> Index:
    """Write the index of a job to `folder`, in the place of one that is there. options: of `examine_all`."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a build that was killed: this one holds the lock
    partial.mkdir(parents=True)
    try:
        write = _Writer(partial)
        for finding in examine_all(job, **options):
            on_finding(finding)
            write.add(finding)
        write.close({"version": VERSION, "folders": _folders(job.sources), "cut": write.cut})
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
    except OSError as error:  # a full disk, say
        raise ValueError(f"the index could not be written to {folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Index(folder, job.sources)


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
        self.waiting: list[Any] = []
        self.cut = 0
        self.flat: dict[str, list[np.ndarray]] = {name: [] for name in FLAT}

    def add(self, finding: Finding) -> None:
        for fault in finding.faults:
            self.faults.write(json.dumps(dataclasses.asdict(fault)) + "\n")
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
        (self.folder / "index.json").write_text(json.dumps(facts))
        for opened in (self.file, self.faults):
            _to_disk(opened)
            opened.close()


def _to_disk(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _open(folder: Path, sources: Sequence[Source]) -> Index | None:
    """The index in a folder; None where there is none, or media have come, gone or changed since that would change it."""
    if not folder.is_dir():
        return None
    index = Index(folder, sources)
    moved = index.facts["folders"] != _folders(sources)
    if any(fault.path is not None and (moved or fault.stamp != stamp(fault.path)) for fault in index.faults):
        return None  # what was missing or unreadable may be there by now
    return None if moved and not _all_there(index) else index


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
