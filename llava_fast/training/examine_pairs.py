"""Preference pairs looked at one by one, as `preferences.index_pairs` will read them: for `llava-fast data check`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llava_fast.batch import IGNORE
from llava_fast.inputs.prepare import InputSpec
from llava_fast.inputs.records import BadRecord, Kind, Record
from llava_fast.training.config import TrainConfig
from llava_fast.training.examine import media_layouts
from llava_fast.training.preferences import _sizes, check_pair, encode_pair


def measure_pair(entry: Any, where: str, folder: Path, config: TrainConfig, spec: InputSpec) -> tuple[Record, int, int, int]:
    """The conversation with the chosen answer, and the pair's tokens, views and supervised tokens. Raises BadRecord."""
    kind: Kind = "not a record"
    try:
        sides = check_pair(entry, where, folder, config.dpo is not None and config.dpo.upstream)
        if sides[0].turns[:-1] != sides[1].turns[:-1]:
            raise BadRecord(f"{where}: chosen and rejected must be one answer each, to the same conversation", "turns")
        visuals = media_layouts(sides[0], config.inputs, spec)
        kind = "template"
        pair = encode_pair(sides, len(visuals), config, spec)
        kind = "too long"
        tokens, views = _sizes(pair, visuals, where, config, spec)
    except BadRecord:
        raise
    except ValueError as error:
        message = str(error) if str(error).startswith(where) else f"{where}: {error}"
        if kind == "too long":
            kind = "nothing to learn" if "nothing to learn" in message else "too many views" if "views_per_row" in message else kind
        raise BadRecord(message, kind) from error
    labels = sum(label != IGNORE for side in (pair.prompt, pair.chosen, pair.rejected) for label in side.labels)
    return sides[0], tokens, views, labels
