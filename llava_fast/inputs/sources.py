"""Files that records come from: JSON, JSONL, YAML mixtures of them, WebDataset tar shards, and data sets of the `datasets` library.

A source is read in two passes: `Source.places` finds where each record lies, `read` gives some of them. So a sampling strategy knows
the total before anything is kept, several processes share the reading, and no file is ever in memory whole.

  .json      a list of records          .jsonl    one a line
  .yaml      {"datasets": [{"json_path", "sampling_strategy"}]}, whose paths are relative to it when not found from the working directory
  .tar       WebDataset: members "key.json" (the record), "key.jpg" or "key.0.jpg", "key.1.jpg", ... (its media, in the order of the
             shard, unless the record's own image or video names some of them). As there, names that start with a dot, that have none, or
             that are like __this__ are no part of a sample.
  .parquet, or a directory that `Dataset.save_to_disk` wrote: columns conversations or messages, image or images (pictures or paths), video
A path may have braces as upstream (`part{a,b}.json`), ranges (`shard-{0000..0031}.tar`) and wild cards (`*.parquet`); a sampling strategy
is then applied to each of its files.
"""

from __future__ import annotations

import codecs
import glob
import itertools
import json
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from llava_fast.checks import shown
from llava_fast.inputs.media import Packed, ParquetRows, SavedRows, open_rows, read_span
from llava_fast.inputs.records import BadRecord, sample_indices
from llava_fast.inputs.video import FRAME_SUFFIXES

BLOCK = 8 << 20  # bytes of a JSON list that are looked at together
VIDEO_SUFFIXES = {".mp4", ".webm", ".mkv", ".mov", ".avi", ".mpg", ".mpeg", ".m4v"}
NUMBER = ("", ".", "e", "E", "+", "-")
WHITE = re.compile(r"[ \t\n\r]*")
BRACES = re.compile(r"\{([^{}]*)\}")
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]|\xed[\xa0-\xbf]")  # half of a character, which may be one too many
META = re.compile(r"__[^/]*__($|/)")  # members that WebDataset passes over


@dataclass(frozen=True)
class Source:
    """path: of records.  folder: where their media paths start.  strategy: which records are taken (`records.sample_indices`)."""

    path: Path
    folder: Path
    strategy: str = "all"

    def places(self) -> Sequence[Any] | np.ndarray:
        """Where each record lies, for `read`. Raises ValueError for a file that is not what its name says."""
        if self.path.suffix == ".jsonl":
            return _lines(self.path)
        if self.path.suffix == ".json":
            return _elements(self.path)
        return _members(self.path) if self.path.suffix == ".tar" else range(len(open_rows(str(self.path))))

    def stamp(self) -> list[Any]:
        """What says that the source is as it was, wherever it lies: sizes, times of change, and the strategy."""
        files = sorted(self.path.iterdir()) if self.path.is_dir() else [self.path]
        return [self.strategy, *([file.suffix, status.st_size, status.st_mtime_ns] for file in files for status in [file.stat()])]


def find_sources(names: str | os.PathLike | Sequence[str | os.PathLike], media_folder: str | os.PathLike | None = None) -> list[Source]:
    """The sources that some paths, patterns and mixtures stand for, in order. Raises ValueError for one that is not there.

    media_folder: where media paths start; None: the folder of each source.
    """
    given = [names] if isinstance(names, (str, os.PathLike)) else names
    found = [entry for name in given for path in _paths(Path(name)) for entry in _mixture(path)]
    return [Source(path, Path(media_folder) if media_folder is not None else path.parent, strategy) for path, strategy in found]


def where(source: Source, index: int, entry: Any = None) -> str:
    """A record in messages: its file, number and id."""
    return place_name(source, index, record_id(entry))


def place_name(source: Source, index: int, name: str | None) -> str:
    return f"{source.path}, record {index}" + ("" if name is None else f" (id {name})")


def record_id(entry: Any) -> str | None:
    name = entry.get("id", entry.get("sample_id")) if isinstance(entry, dict) else None
    return None if name is None else shown(name)


def read(source: Source, places: Iterable[Any]) -> Iterator[Any]:
    """The records at some places, for `parse`; each is read when it is asked for."""
    if source.path.suffix in (".json", ".jsonl"):
        with source.path.open("rb") as file:
            for start, end in places:
                file.seek(int(start))
                yield file.read(int(end) - int(start))
    elif source.path.suffix == ".tar":
        for place in places:
            yield _Shard(source.path, *place)
    else:
        rows = open_rows(str(source.path))
        for row in places:
            yield _Row(source.path, rows, int(row))


def parse(raw: Any, where: str) -> Any:
    """What `read` gave as the JSON entry that it stands for. Raises BadRecord, its message starting with `where`."""
    try:
        return _loads(raw) if isinstance(raw, bytes) else raw.entry()
    except (ValueError, RecursionError) as error:  # of which broken JSON and UTF-8 are two
        kind = "missing file" if isinstance(error, _Absent) else "not a record"
        message = f"not valid JSON: {error}" if isinstance(error, (json.JSONDecodeError, UnicodeDecodeError)) else str(error)
        raise BadRecord(f"{where}: {message}", kind) from error  # type: ignore[arg-type]


def _loads(data: bytes) -> Any:
    entry = json.loads(data)
    if SURROGATE.search(data):  # which JSON lets pass, and no tokenizer, file or table takes
        try:
            json.dumps(entry, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"broken text: half of a character, {error.object[error.start]!r}, without the other") from None
    return entry


def _paths(path: Path) -> list[Path]:
    if path.exists() or not re.search(r"[{*?\[]", str(path)):
        return [path]
    paths = [Path(name) for name in _braces(str(path))]
    listed = [[Path(name) for name in sorted(glob.glob(str(path)))] if re.search(r"[*?\[]", str(path)) else [path] for path in paths]
    for pattern, names in zip(paths, listed, strict=True):
        if not names:
            raise ValueError(f"no data file {pattern}")
    return list(itertools.chain(*listed))


def _braces(pattern: str) -> list[str]:
    """Every `{a,b}` and `{000..031}` written out."""
    match = BRACES.search(pattern)
    if match is None:
        return [pattern]
    ends = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if ends:
        first, last = int(ends[1]), int(ends[2])
        step = 1 if first <= last else -1  # as a shell counts
        options = [str(number).zfill(len(ends[1])) for number in range(first, last + step, step)]
    else:
        options = [option.strip() for option in match[1].split(",")]
    return [name for option in options for name in _braces(pattern[: match.start()] + option + pattern[match.end() :])]


def _mixture(path: Path) -> Iterator[tuple[Path, str]]:
    if path.suffix not in (".yaml", ".yml"):
        yield _checked(path), "all"
        return
    try:
        mixture = yaml.safe_load(_checked(path).read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(mixture, dict) or not isinstance(mixture.get("datasets"), list):
        raise ValueError(f"{path}: a mixture is 'datasets:' followed by a list of json_path and sampling_strategy")
    for number, dataset in enumerate(mixture["datasets"]):
        if not isinstance(dataset, dict) or not isinstance(dataset.get("json_path"), str):
            raise ValueError(f"{path}: datasets[{number}] has no json_path: {shown(dataset)}")
        unknown = set(dataset) - {"json_path", "sampling_strategy"}
        if unknown:
            raise ValueError(
                f"{path}: datasets[{number}] has unknown keys {shown(sorted(map(str, unknown)))}; known are json_path and sampling_strategy"
            )
        strategy = str(dataset.get("sampling_strategy", "all"))
        try:
            sample_indices(0, strategy)
        except ValueError as error:
            raise ValueError(f"{path}: datasets[{number}]: {error}") from None
        for named in _paths(Path(dataset["json_path"])) if _exists(dataset["json_path"]) else _paths(path.parent / dataset["json_path"]):
            if not named.exists():
                raise ValueError(f"{path}: no data file {dataset['json_path']}")
            if named.suffix in (".yaml", ".yml"):
                raise ValueError(f"{path}: datasets[{number}] is a mixture itself, {named}: list its files here")
            yield _checked(named), strategy


def _exists(name: str) -> bool:
    try:
        return all(path.exists() for path in _paths(Path(name)))
    except ValueError:
        return False


def _checked(path: Path) -> Path:
    if not path.exists():
        raise ValueError(f"no data file {path}")
    known = (".json", ".jsonl", ".yaml", ".yml", ".tar", ".parquet")
    if path.suffix not in known and not (path.is_dir() and (path / "dataset_info.json").is_file()):
        raise ValueError(f"{path} is no source of records: expected {', '.join(known)}, or a directory that save_to_disk wrote")
    return path


# --- JSON ---


def _lines(path: Path) -> np.ndarray:
    """int64 [records, 2]: first byte and end of every line that is not blank."""
    spans, start = [], 0
    with path.open("rb") as file:
        for line in file:
            if line.strip():
                spans.append((start, start + len(line)))
            start += len(line)
    return np.array(spans, dtype=np.int64).reshape(-1, 2)


def _elements(path: Path) -> np.ndarray:
    """int64 [elements, 2]: first byte and end of every element of a JSON list, which is read in blocks.

    The bytes are looked at as Latin-1, one character a byte: JSON's own signs are ASCII, and what is inside strings does not matter here.
    """
    decoder = json.JSONDecoder()
    spans: list[tuple[int, int]] = []
    text, base, at, block = "", 0, 0, BLOCK

    with path.open("rb") as file:

        def more() -> bool:
            """Another block, without what is behind; False at the end of the file."""
            nonlocal text, base, at
            data = file.read(block)
            if data:
                text, base, at = text[at:] + data.decode("latin-1"), base + at, 0
            return bool(data)

        def sign() -> str:
            """The next character that is not white space, "" at the end."""
            nonlocal at
            while True:
                at = WHITE.match(text, at).end()  # type: ignore[union-attr]
                if at < len(text) or not more():
                    return text[at : at + 1]

        base = 3 if file.read(3) == codecs.BOM_UTF8 else 0
        file.seek(base)
        if sign() != "[":
            raise _not_a_list(path)
        at += 1
        while (opening := sign()) != "]" or spans:
            try:
                end = decoder.raw_decode(text, at)[1]
            except (json.JSONDecodeError, RecursionError) as error:
                block *= 2  # so that broken JSON is not tried again for every block of a large file
                if more():
                    continue
                raise ValueError(f"{path} is not valid JSON: {error} (in the record {len(spans)}, at byte {base + at})") from error
            if opening not in '{["' and text[end : end + 1] in NUMBER and more():  # a number that may go on
                continue
            spans.append((base + at, base + end))
            at, block = end, BLOCK
            following = sign()
            if following not in ("]", ","):
                raise ValueError(f"{path} is not valid JSON: expected a comma after record {len(spans) - 1}, at byte {base + at}")
            at += 1
            if following == "]":
                break
        else:
            at += 1
        if sign():
            raise ValueError(f"{path} is not valid JSON: more follows the list, at byte {base + at}")
    return np.array(spans, dtype=np.int64).reshape(-1, 2)


def _not_a_list(path: Path) -> ValueError:
    try:
        return ValueError(f"{path} must hold a list of records, got {type(json.loads(path.read_bytes())).__name__}")
    except ValueError as error:
        return ValueError(f"{path} is not valid JSON: {error}")


# --- tar shards ---

Span = tuple[str, int, int]  # a member: name, first byte (or one of those below), bytes
SPARSE, LINK = -1, -2  # members whose bytes do not lie there


class _Absent(ValueError):
    """A medium that a record names is not in its shard."""


def _members(path: Path) -> list[tuple[str, list[Span]]]:
    """Key and members of every sample: neighbours whose names are the same up to the first dot of the last part, as in WebDataset."""
    samples: list[tuple[str, list[Span]]] = []
    try:
        with tarfile.open(path, "r:") as shard:  # not a compressed one: its members have no offsets
            for info in shard:
                folder, slash, name = info.name.rpartition("/")
                stem, dot, _ = name.partition(".")
                if stem and dot and not META.match(info.name) and (info.isreg() or info.issym() or info.islnk()):
                    key = folder + slash + stem
                    if not samples or samples[-1][0] != key:
                        samples.append((key, []))
                    start = SPARSE if info.issparse() else info.offset_data if info.isreg() else LINK
                    samples[-1][1].append((info.name, start, info.size))
                shard.members = []  # type: ignore[attr-defined]  # or it keeps every header
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ValueError(f"{path} is not a tar file that can be read (compressed ones cannot): {error}") from error
    return samples


@dataclass(frozen=True)
class _Shard:
    path: Path
    key: str
    members: list[Span]

    def entry(self) -> Any:
        names = [name for name, _, _ in self.members]
        for name, start, _ in self.members:
            if start < 0:
                kind = "a link" if start == LINK else "sparse"
                raise ValueError(f"the member {name} is {kind}: its bytes do not lie in the shard as they are")
            if names.count(name) > 1:
                raise ValueError(f"the sample {shown(self.key)} has the member {name} {names.count(name)} times")
        records = [span for span in self.members if span[0].endswith(".json")]
        if len(records) != 1:
            raise ValueError(f"the sample {shown(self.key)} has {len(records)} members .json, expected one")
        _, start, size = records[0]
        entry = _loads(read_span(self.path, start, size))
        if not isinstance(entry, dict):
            return entry
        entry = {"id": self.key, **entry}
        if entry.get("image") is None and entry.get("video") is None:
            self._take_all(entry)
            return entry
        for field in ("image", "video"):
            named = entry.get(field)
            if isinstance(named, str):
                entry[field] = self._find(named)
            elif isinstance(named, list):
                entry[field] = [self._find(name) if isinstance(name, str) else name for name in named]
        return entry

    def _take_all(self, entry: dict[str, Any]) -> None:
        """The media of a record that names none."""
        pictures, videos = ([span for span in self.members if _suffix(span[0]) in known] for known in (FRAME_SUFFIXES, VIDEO_SUFFIXES))
        if len(videos) > 1 or (videos and pictures):
            names = ", ".join(name for name, _, _ in videos + pictures)
            raise ValueError(f"the sample {shown(self.key)} has {names}: its record must say which by image or video")
        if videos:
            entry["video"] = self._packed(videos[0])
        elif pictures:
            entry["image"] = [self._packed(span) for span in pictures]

    def _packed(self, span: Span) -> Packed:
        return Packed.at(self.path, span[1], span[2], span[0])

    def _find(self, name: str) -> Packed:
        """The member of this name, of this last part, or of this ending after the key."""
        for span in self.members:
            if name in (span[0], span[0].rpartition("/")[2], span[0].removeprefix(self.key + ".")):
                return self._packed(span)
        raise _Absent(f"no member {name} in the sample {shown(self.key)} of the shard")


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


# --- data sets ---


@dataclass(frozen=True)
class _Row:
    path: Path
    rows: ParquetRows | SavedRows
    number: int

    def entry(self) -> Any:
        known = self.rows.cells(self.number)
        entry = {name: cell.as_py() for name, cell in known.items() if name not in ("image", "images")}
        turns = entry.pop("messages", None)
        entry.setdefault("conversations", turns)
        if isinstance(entry["conversations"], dict):  # how older versions store a list of objects
            columns = entry["conversations"]
            entry["conversations"] = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        for name in ("image", "images"):
            if name in known and known[name].is_valid:
                entry["image"] = self._pictures(known[name], name)
        return entry

    def _pictures(self, cell: Any, column: str) -> Any:
        """Paths, and of pictures inside the data set where they lie; their bytes are not read."""
        if hasattr(cell, "keys") or not hasattr(cell, "values"):  # a struct of bytes and path, or a path
            return self._picture(cell, column, 0)
        return [self._picture(value, column, number) for number, value in enumerate(cell.values)]

    def _picture(self, value: Any, column: str, number: int) -> Any:
        if not hasattr(value, "keys") or not value.is_valid:  # a path, or nothing
            return value.as_py()
        inside = "bytes" not in value.keys() or value["bytes"].is_valid
        return Packed.at(self.path, self.number, number, column) if inside else value["path"].as_py()
