"""Files with a JSON object a line: requests to read, and answers that are written as they come, so that a run that was killed goes on.

A line of answers that ends with a newline is a request that is over; what stands behind the last newline was cut by a kill and is run
again. Killing the process loses nothing; the system's own death may lose the latest lines, which are not forced to the disk.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image

from llava_fast.checks import closest, is_int, require, shown
from llava_fast.inputs.fetch import is_url
from llava_fast.inputs.images import DECODE_ERRORS
from llava_fast.kernels.linear import Quantised
from llava_fast.requests import Completion, InputOptions, Request, SamplingParams, ask

try:
    import fcntl
except ImportError:  # Windows: nobody guards against two runs that write the same file
    fcntl = None  # type: ignore[assignment]

KEYS = ("prompt", "messages", "images", "videos", "id", "sampling", "priority", "deadline")
MEDIA = ("image", "video", "url", "path")  # keys of a message's item whose strings are paths or addresses
BEGIN = b'{"request": '  # of every line of answers
PARTS = ("model", "prompt or its pictures", "settings")  # what a fingerprint is made of, in order


# -- requests


class BadLine(ValueError):
    """What stands in place of a request that could not be read. id: its own, where that could be."""

    def __init__(self, message: str, id: str | int | None = None):
        super().__init__(message)
        self.id = id


class RequestFile:
    """The requests of a JSONL file, read as they are iterated; a line that is none gives the BadLine that says why, with its number.

    A line: {"prompt": str with marks, or "messages": [...], "images": [...], "videos": [...], "id": str | int, "sampling": {fields of
    SamplingParams}, "priority": int, "deadline": seconds}. A prompt is a user's message (`raw`: the whole text as the model is to see it).
    Paths are relative to the file's folder; data URLs and http(s) addresses stay. sampling: settings of fields that a line does not
    name. Empty lines are passed over.
    Raises ValueError where the file cannot be read, or where no line is a JSON object.
    """

    def __init__(self, path: str | os.PathLike[str], sampling: SamplingParams, raw: bool = False):
        self.path, self.sampling, self.raw = Path(path), sampling, raw
        self._count, valid = 0, False
        for _, line in self._lines():
            self._count += 1
            if not valid:
                with contextlib.suppress(ValueError, RecursionError):
                    valid = isinstance(json.loads(line), dict)
        if not valid:
            raise ValueError(f"{self.path} holds no request: none of its {self._count} lines is a JSON object")

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Request | BadLine]:
        lines_of: dict[str | int, int] = {}
        for number, line in self._lines():
            id = None
            try:
                entry = _object(line)
                id = entry.get("id")
                if id is not None and not isinstance(id, str) and not is_int(id):
                    raw, id = id, None
                    raise ValueError(f"id must be a string or an integer, got {shown(raw)}")
                if id is not None and lines_of.setdefault(id, number) != number:
                    raise ValueError(f"its id {shown(id)} is that of line {lines_of[id]}")
                yield self._request(entry)
            except ValueError as error:
                yield BadLine(f"line {number}: {error}", id)

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        try:
            with self.path.open("rb") as file:
                yield from ((number, line) for number, line in enumerate(file, 1) if line.strip())
        except OSError as error:
            raise ValueError(f"{self.path} could not be read: {error.strerror}") from None

    def _request(self, entry: dict[str, Any]) -> Request:
        for key in entry:
            if key not in KEYS:
                raise ValueError(f"unknown key {shown(key)}{closest(key, KEYS)}")
        if ("prompt" in entry) == ("messages" in entry):
            raise ValueError("a request has either a prompt or messages")
        folder, media = self.path.parent, {}
        for kind in ("images", "videos"):
            sources = entry.get(kind, [])
            ok = isinstance(sources, list) and all(isinstance(source, str) and source for source in sources)
            require(ok, kind, sources, "a list of paths or addresses")
            media[kind] = _in_folder(sources, folder, True)
        fields = entry.get("sampling", {})
        require(isinstance(fields, dict), "sampling", fields, "an object with fields of SamplingParams")
        known = [field.name for field in dataclasses.fields(SamplingParams)]
        for name in fields:
            if name not in known:
                raise ValueError(f"sampling has no field {shown(name)}{closest(name, known)}")
        sampling = dataclasses.replace(self.sampling, **fields)
        own = dict(sampling=sampling, priority=entry.get("priority", 0), deadline=entry.get("deadline"), id=entry.get("id"))
        if "messages" in entry:
            require(isinstance(entry["messages"], list), "messages", entry["messages"], "a list of chat messages")
            return Request(_in_folder(entry["messages"], folder), media["images"], media["videos"], **own)
        require(isinstance(entry["prompt"], str), "prompt", entry["prompt"], "a string")
        return dataclasses.replace(ask(entry["prompt"], media["images"], media["videos"], self.raw), **own)


def _object(line: bytes) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON: {error}") from None
    require(isinstance(entry, dict), "a request", entry, "a JSON object")
    return entry


def _in_folder(value: Any, folder: Path, media: bool = False) -> Any:
    """The paths of messages or of a list of media, relative ones put into a folder."""
    if isinstance(value, dict):
        return {key: _in_folder(item, folder, key in MEDIA) for key, item in value.items()}
    if isinstance(value, list):
        return [_in_folder(item, folder, media) for item in value]
    return str(folder / value) if media and _is_path(value) else value


def _is_path(value: Any) -> bool:
    return isinstance(value, os.PathLike) or isinstance(value, str) and not is_url(value) and value[:5].lower() != "data:"


# -- fingerprints


def fingerprint(item: Request | ValueError, sampling: SamplingParams, inputs: InputOptions, folder: Path) -> str:
    """16 hex digits of a request's prompt and media, "-", 16 of its settings (those that are no defaults).

    sampling, inputs: where the request has none of its own.  A file is known by its path relative to `folder`, so that a moved tree
    stays the same; its contents are not read. What decides when a request runs (priority, deadline) and its id are left out.
    """
    if not isinstance(item, Request):
        return f"{_digest(str(item))}-{_digest('')}"
    settings = [
        {field.name: value for field in dataclasses.fields(part) if (value := getattr(part, field.name)) != field.default}
        for part in (item.sampling or sampling, item.inputs or inputs)
    ]
    content = [_plain(item.prompt, folder), _plain([item.images, item.videos], folder, media=True)]
    return f"{_digest(content)}-{_digest(settings)}"


def model_fingerprint(model: Any) -> str:
    """16 hex digits of its configuration and of 16 entries of each tensor: checkpoints of one architecture differ in some of them."""
    quantised = [value.scale for module in model.modules() for value in vars(module).values() if isinstance(value, Quantised)]
    tensors = [*model.parameters(), *quantised]
    entries = [tensor.detach().flatten()[:: max(tensor.numel() // 16, 1)][:16].float() for tensor in tensors]
    return _digest([repr(model.config), torch.cat(entries).cpu().numpy().tobytes().hex()])


def _digest(value: Any) -> str:
    data = value if isinstance(value, bytes) else json.dumps(value, sort_keys=True).encode()
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def _plain(value: Any, folder: Path, media: bool = False) -> Any:
    """What JSON can hold, equal where the content is. media: strings are paths or addresses."""
    if isinstance(value, dict):
        return {str(key): _plain(item, folder, key in MEDIA) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, folder, media) for item in value]
    if isinstance(value, Image.Image):
        if name := getattr(value, "filename", ""):  # opened, and not read yet: thousands of them would not fit into memory
            return _plain(name, folder, media=True)
        try:
            return [value.mode, value.size, _digest(value.tobytes())]
        except DECODE_ERRORS:
            return "a damaged picture"
    if isinstance(value, np.ndarray):
        return [str(value.dtype), value.shape, _digest(value.tobytes())]
    if isinstance(value, (bytes, bytearray, memoryview)):
        return _digest(bytes(value))
    if _is_path(value) and (media or not isinstance(value, str)):
        return os.path.relpath(os.path.abspath(os.fspath(value)), folder)
    return value if value is None or isinstance(value, (str, int, float)) else type(value).__name__


# -- answers


@dataclass(frozen=True)
class Tally:
    """What `generate` returns of an iterator. requests: whose answers the file holds.  errors: of them, those that ended as an error.
    found: of them, those that were in the file before."""

    requests: int
    errors: int
    found: int


@dataclass(frozen=True)
class _Found:
    """A line of answers. offset: of its first byte.  failed: one of its completions is an error."""

    fingerprint: str
    offset: int
    failed: bool


class Answers:
    """The file that `generate(out=...)` writes: made where there is none, gone on with where there is one. A context manager.

    A line: {"request": place in the call, "id" where the request has one, "fingerprint", "completions": [{fields of Completion without
    request; logprobs where asked for}]}, ASCII.
    retry_errors: lines of requests that ended as an error are dropped, so that they are run again.
    sampling, inputs: of requests that have none of their own.
    Raises ValueError where the file holds something else (before anything is changed), and where another process writes it.
    """

    def __init__(
        self, path: str | os.PathLike[str], model: Any, sampling: SamplingParams, inputs: InputOptions, retry_errors: bool = False
    ):
        self.path, self.shown = Path(os.path.abspath(path)), os.fspath(path)
        self.model, self.sampling, self.inputs = model_fingerprint(model), sampling, inputs
        self.found: dict[int, _Found] = {}
        self.errors = self.written = 0
        self._begun: dict[int, dict[str, Any]] = {}  # requests that were handed out, and what their lines begin with
        self._compared = False
        try:
            self._file = self._open(self.path)
        except OSError as error:
            raise ValueError(f"{self.shown} could not be opened: {error.strerror}") from None
        try:
            self._scan()
            if retry_errors and any(line.failed for line in self.found.values()):
                self._drop_errors()
        except BaseException:
            self._file.close()
            raise
        self.errors = sum(line.failed for line in self.found.values())

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()

    def compare(self, requests: Iterable[Request | ValueError]) -> None:
        """Raises ValueError, before anything is run, where the file's answers are not to these; it names the first that differs."""
        last = -1
        for last, request in enumerate(requests):
            self._is_found(last, request)
        self._check_end(last)
        self._compared = True

    def missing(self, requests: Iterable[Request | ValueError]) -> Iterator[tuple[int, Request | ValueError]]:
        """(place, request) of those that have no line yet. Raises ValueError, as `compare` does, when it comes to one that differs."""
        last = -1
        for last, request in enumerate(requests):
            if last in self.found if self._compared else self._is_found(last, request):
                continue
            id = getattr(request, "id", None)
            self._begun[last] = {"request": last, **({} if id is None else {"id": id}), "fingerprint": self._fingerprint(request)}
            yield last, request
        self._check_end(last)

    def append(self, index: int, completions: list[Completion]) -> None:
        """The line of a request that is over; one that was cancelled has none, and is left for another run."""
        line = self._begun.pop(index)
        if any(completion.finish_reason == "cancelled" for completion in completions):
            return
        line["completions"] = [_fields(completion) for completion in completions]
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()
        self.written += 1
        self.errors += _failed(completions)

    def read(self, index: int) -> list[Completion]:
        """The completions of a line that was found."""
        self._file.seek(self.found[index].offset)
        return _parse(self._file.readline())[2]

    @property
    def tally(self) -> Tally:
        return Tally(len(self.found) + self.written, self.errors, len(self.found))

    def _fingerprint(self, request: Request | ValueError) -> str:
        return f"{self.model}-{fingerprint(request, self.sampling, self.inputs, self.path.parent)}"

    def _is_found(self, index: int, request: Request | ValueError) -> bool:
        if index not in self.found:
            return False
        line = self.found[index]
        pairs = zip(PARTS, line.fingerprint.split("-"), self._fingerprint(request).split("-"), strict=True)
        if differ := [part for part, old, new in pairs if old != new]:
            id = getattr(request, "id", None)
            name = f"request {index}" + ("" if id is None else f" (id {shown(id)})")
            advice = "; as its answer is an error, retry_errors would run it anew" if line.failed else ""
            raise ValueError(f"{self.shown} answers another {name} than the one given: its {' and its '.join(differ)} differ{advice}")
        return True

    def _check_end(self, last: int) -> None:
        beyond = max(self.found, default=-1)
        if beyond > last:
            raise ValueError(f"{self.shown} answers request {beyond}, but {last + 1} requests were given")

    def _open(self, path: Path) -> BinaryIO:
        file = path.open("a+b")
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise ValueError(f"{self.shown} is being written by another run") from None
        except OSError:  # a file system without locks
            pass
        return file

    def _scan(self) -> None:
        offset = 0
        self._file.seek(0)
        for number, line in enumerate(self._file, 1):
            where = f"{self.shown}, line {number}"
            if not line.endswith(b"\n"):
                if not (line.startswith(BEGIN) or BEGIN.startswith(line)):  # not ours to cut
                    raise ValueError(f"{where} is no line of answers: it begins with {shown(line[:40].decode(errors='replace'))}")
                self._file.truncate(offset)
                return
            try:
                index, mark, completions = _parse(line)
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{where} is no line of answers: {type(error).__name__}: {error}") from None
            if index in self.found:
                raise ValueError(f"{where} is a second answer to request {index}")
            self.found[index] = _Found(mark, offset, _failed(completions))
            offset += len(line)

    def _drop_errors(self) -> None:
        """A copy without them takes the file's place at once: a kill leaves one or the other."""
        copy = self.path.resolve().with_name(self.path.name + ".part")
        file = self._open(copy)
        file.truncate(0)
        kept, offset = {index: line for index, line in self.found.items() if not line.failed}, 0
        for index, line in kept.items():
            self._file.seek(line.offset)
            kept[index] = dataclasses.replace(line, offset=offset)
            offset += file.write(self._file.readline())
        self.found = kept
        file.flush()
        os.replace(copy, self.path.resolve())
        self._file.close()
        self._file = file


def _fields(completion: Completion) -> dict[str, Any]:
    fields = dataclasses.asdict(completion)
    del fields["request"]
    if fields["logprobs"] is None:
        del fields["logprobs"]
    return fields


def _parse(line: bytes) -> tuple[int, str, list[Completion]]:
    """-> (request, fingerprint, completions) of a line; ValueError, KeyError or TypeError where it is none."""
    entry = json.loads(line)
    index, mark, completions = entry["request"], entry["fingerprint"], entry["completions"]
    require(is_int(index) and index >= 0, "request", index, "an integer of at least 0")
    require(isinstance(mark, str) and mark.count("-") == len(PARTS) - 1, "fingerprint", mark, f"of {len(PARTS)} parts")
    return index, mark, [Completion(request=index, **fields) for fields in completions]


def _failed(completions: list[Completion]) -> bool:
    return any(completion.finish_reason == "error" for completion in completions)
