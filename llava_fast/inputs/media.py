"""Where a record's media lie: a path, or bytes inside a tar shard or a saved data set, which are read by offset when their row comes.

A packed medium is written "<file>\\0<start>+<count>\\0<name>"; no path has a NUL. In a tar shard start and count are the member's bytes,
in a saved data set the row and the number in a list of pictures, and the name is the column's.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any


class Packed(str):
    """A medium inside another file. A type of its own, so that no path in a record can be taken for one."""

    @staticmethod
    def at(file: str | os.PathLike[str], start: int, count: int, name: str) -> Packed:
        return Packed(f"{os.fspath(file)}\0{start}+{count}\0{name}")


def member(reference: str) -> str:
    """A packed medium without the file that it is in: what stays when the file is moved."""
    return reference.partition("\0")[2]


def read_media(reference: str) -> str | bytes:
    """A path as it is, a packed medium as its bytes. Raises ValueError where it cannot be read."""
    if "\0" not in reference:
        return reference
    file, place, name = reference.split("\0", 2)
    start, count = map(int, place.split("+"))
    try:
        return read_span(file, start, count) if file.endswith(".tar") else _picture(file, start, count, name)
    except OSError as error:
        raise ValueError(f"{name} of {file} could not be read: {error.strerror or error}") from None


def read_span(file: str | os.PathLike[str], start: int, count: int) -> bytes:
    """Bytes of a file; ValueError where it ends before."""
    with open(file, "rb", buffering=0) as opened:
        data = os.pread(opened.fileno(), count, start)
    if len(data) != count:
        raise ValueError(f"{os.fspath(file)} ends at byte {start + len(data)}, before the {count} bytes at {start}: it has changed")
    return data


@functools.lru_cache(maxsize=32)
def open_rows(path: str) -> Any:
    """A data set of the `datasets` library, memory-mapped: a directory that save_to_disk wrote, or a parquet file.

    Raises ValueError where the library is missing or does not read it.
    """
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"{path} needs the datasets library: pip install 'llava_fast[train]'") from error
    try:
        opened = datasets.load_from_disk(path) if Path(path).is_dir() else datasets.Dataset.from_parquet(path)
    except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        raise ValueError(f"{path} is not a data set that can be read: {error}") from error
    if isinstance(opened, datasets.DatasetDict):
        raise ValueError(f"{path} holds the splits {', '.join(opened)}: name the folder of one, like {Path(path) / next(iter(opened))}")
    return opened.with_format("arrow")


def _picture(file: str, row: int, number: int, column: str) -> bytes:
    cell = open_rows(file).select_columns([column])[row : row + 1][column][0]
    data = (cell if hasattr(cell, "keys") else cell.values[number])["bytes"].as_py()
    if data is None:
        raise ValueError(f"{file}, row {row}: column {column} holds no bytes")
    return data
