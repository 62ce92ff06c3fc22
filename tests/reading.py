"""Sources read and checked into memory."""

from __future__ import annotations

from collections.abc import Callable

from llava_fast.inputs.records import BadRecord, Record, check_record, sample_indices
from llava_fast.inputs.sources import find_sources, parse, read, where


def load_records(sources, media_folder=None, seed: int = 0, on_bad: Callable[[str], object] | None = None) -> list[Record]:
    """on_bad: called with the message of each bad record, which is then left out; None: a bad record raises."""
    records = []
    for number, source in enumerate(find_sources(sources, media_folder)):
        places = source.places()
        taken = sample_indices(len(places), source.strategy, seed=[seed, number])
        for index, raw in zip(taken, read(source, [places[index] for index in taken]), strict=True):
            try:
                entry = parse(raw, where(source, index))
                records.append(check_record(entry, where(source, index, entry), source.folder))
            except BadRecord as error:
                if on_bad is None:
                    raise
                on_bad(str(error))
    return records
