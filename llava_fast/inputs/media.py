"""Where a record's media lie: a path, or bytes inside a tar shard or a saved data set, which are read by offset when their row comes.

A packed medium is written "<file>\\0<start>+<count>\\0<name>"; no path has a NUL. In a tar shard start and count are the member's bytes,
in a saved data set the row and the number in a list of pictures, and the name is the column's.
"""

from __future__ import annotations

import functools
import os
import re
import threading
from pathlib import Path
from typing import Any

import numpy as np


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


class ParquetRows:
    """Rows of a parquet file, read a row group at a time. `datasets` would write an Arrow copy of the whole file into its cache.

    A picture takes the reading of its row group, so that groups should be small: `datasets` writes 100 rows with pictures.
    """

    def __init__(self, path: str):
        import pyarrow.parquet

        self.file = pyarrow.parquet.ParquetFile(path, memory_map=True)
        self.lock = threading.Lock()  # loader threads share the reader
        groups = self.file.metadata.num_row_groups
        self.ends = np.cumsum([self.file.metadata.row_group(number).num_rows for number in range(groups)], dtype=np.int64)

    def __len__(self) -> int:
        return int(self.file.metadata.num_rows)

    def cells(self, row: int) -> dict[str, Any]:
        """Arrow scalars by column. A picture whose bytes lie in the file may be without them."""
        group, at = self._place(row)
        table = _cells(self, group)
        return {name: table[name][at] for name in table.column_names}

    def cell(self, row: int, column: str) -> Any:
        group, at = self._place(row)
        return _group(self, group, column)[column][at]

    def _place(self, row: int) -> tuple[int, int]:
        group = int(np.searchsorted(self.ends, row, side="right"))
        return group, row - (int(self.ends[group - 1]) if group else 0)


@functools.lru_cache(maxsize=1)  # pictures of a row group are tens of megabytes
def _group(rows: ParquetRows, number: int, column: str) -> Any:
    with rows.lock:
        return rows.file.read_row_group(number, columns=[column])


@functools.lru_cache(maxsize=1)
def _cells(rows: ParquetRows, number: int) -> Any:
    """A row group's columns, without the bytes of pictures where its statistics say that every picture has some."""
    leaves = [rows.file.metadata.schema.column(i).path for i in range(rows.file.metadata.num_columns)]
    pictures = {leaf.partition(".")[0]: i for i, leaf in enumerate(leaves) if re.fullmatch(r"images?\.(.+\.)?bytes", leaf)}
    with rows.lock:
        table = rows.file.read_row_group(number, columns=[leaf for i, leaf in enumerate(leaves) if i not in pictures.values()])
        for name, i in pictures.items():
            chunk = rows.file.metadata.row_group(number).column(i)
            with_bytes = None
            if chunk.statistics is not None and chunk.statistics.has_null_count:
                with_bytes = chunk.num_values - chunk.statistics.null_count
            if name not in table.column_names or with_bytes != _count(table[name]):
                whole = rows.file.read_row_group(number, columns=[name])
                table = (table.drop_columns([name]) if name in table.column_names else table).append_column(name, whole[name])
    return table


def _count(column: Any) -> int:
    """Pictures in a column of them or of lists of them."""
    return sum(len(part) - part.null_count for part in (chunk.flatten() if hasattr(chunk, "offsets") else chunk for chunk in column.chunks))


class SavedRows:
    """Rows of a directory that `Dataset.save_to_disk` wrote, which is mapped into memory."""

    def __init__(self, path: str):
        try:
            import datasets
        except ImportError as error:
            raise ValueError(f"{path} needs the datasets library: pip install 'llava_fast[train]'") from error
        try:
            opened = datasets.load_from_disk(path)
        except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
            raise ValueError(f"{path} is not a data set that can be read: {error}") from error
        if isinstance(opened, datasets.DatasetDict):
            raise ValueError(f"{path} holds the splits {', '.join(opened)}: name the folder of one, like {Path(path) / next(iter(opened))}")
        self.rows = opened.with_format("arrow")

    def __len__(self) -> int:
        return len(self.rows)

    def cells(self, row: int) -> dict[str, Any]:
        """Arrow scalars by column; nothing is read before a value is asked for."""
        table = self.rows[row : row + 1]
        return {name: table[name][0] for name in table.column_names}

    def cell(self, row: int, column: str) -> Any:
        return self.cells(row)[column]


@functools.lru_cache(maxsize=8)  # an open one is its metadata, and pages that the system can take back
def open_rows(path: str) -> ParquetRows | SavedRows:
    """Raises ValueError where it cannot be read, or the library for it is missing."""
    if Path(path).is_dir():
        return SavedRows(path)
    try:
        return ParquetRows(path)
    except ImportError as error:
        raise ValueError(f"{path} needs the pyarrow library: pip install 'llava_fast[train]'") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not a data set that can be read: {error}") from error


def _picture(file: str, row: int, number: int, column: str) -> bytes:
    cell = open_rows(file).cell(row, column)
    data = (cell if hasattr(cell, "keys") else cell.values[number])["bytes"].as_py()
    if data is None:
        raise ValueError(f"{file}, row {row}: column {column} holds no bytes")
    return data
