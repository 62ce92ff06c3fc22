"""Preference pairs as a data set: the prompt and its pictures once, the chosen and the rejected answer as its continuations.

A record is {"id", "image" (or "images"): str | [str] or "video": str or neither, "prompt", "chosen", "rejected"}, the last three texts
or, as TRL has them, lists of messages {"role", "content"} with a text or a list of {"type": "text", "text"} and {"type": "image"} in them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from rich.console import Console
from torch import Tensor

from llava_fast.batch import IGNORE, Sample, Visual, splice
from llava_fast.checks import shown
from llava_fast.inputs.labels import Labelled, encode_turns
from llava_fast.inputs.prepare import InputSpec, prepare
from llava_fast.inputs.records import BadRecord, Kind, Record, Turn, check_record
from llava_fast.inputs.templates import IMAGE_MARK
from llava_fast.requests import Request
from llava_fast.training.batches import Example, Kept
from llava_fast.training.config import TrainConfig
from llava_fast.training.examine import media_layouts


@dataclass(frozen=True)
class Pair:
    """Ids with one placeholder a picture. prompt: what both answers share from the start (of the answers, too, where they begin alike)."""

    prompt: Labelled
    chosen: Labelled
    rejected: Labelled


@dataclass
class PreferenceData:
    """Checked pairs of known size: a `batches.Dataset` whose examples are (prompt, chosen, rejected), of which the last two continue the
    first. tokens, views: int64 [pairs], what each adds to a row."""

    records: Sequence[tuple[Record, Record]]
    tokens: np.ndarray
    views: np.ndarray
    config: TrainConfig
    spec: InputSpec
    fingerprint: int

    def __post_init__(self) -> None:
        self.kept = Kept(self.config.cache_mb * 2**20)

    def name(self, index: int) -> str:
        return self.records[index][0].where

    def scenario(self, index: int) -> str:
        return self.records[index][0].scenario

    def load(self, index: int) -> Example:
        """ValueError naming the record where its media cannot be read."""
        if index in self.kept.examples:
            return self.kept.examples[index]
        return self.kept.add(index, self._make(index))

    def _make(self, index: int) -> Example:
        record, _ = self.records[index]
        views: Tensor | None = None
        visuals: tuple[Visual, ...] = ()
        if record.media:
            marks = "<video>" if record.video is not None else "<image>" * len(record.images)
            videos = [record.video] if record.video is not None else []
            options = replace(self.config.inputs, tokenisation="hf")
            try:
                prepared = prepare(Request(marks, images=list(record.images), videos=videos), options, self.spec)
            except ValueError as error:
                raise ValueError(f"{record.where}: {error}") from error
            views, visuals = prepared.views, prepared.sample.visuals
        pair = encode_pair(self.records[index], len(visuals), self.config, self.spec)
        image = self.spec.image_token_id
        prompt = splice(pair.prompt.ids, visuals, image, pair.prompt.labels)
        answers = [Sample(np.array(side.ids), labels=np.array(side.labels)) for side in (pair.chosen, pair.rejected)]
        tokens = len(prompt) + sum(map(len, answers))
        if (tokens, prompt.views) != (self.tokens[index], self.views[index]):
            raise ValueError(
                f"{record.where}: {tokens} tokens and {prompt.views} views, but {self.tokens[index]} and {self.views[index]} when the run "
                "started: its media have changed"
            )
        return Example((prompt, *answers), views, (None, 0, 0))


def index_pairs(
    config: TrainConfig, spec: InputSpec, on_bad: Callable[[str], None] | None = None, note: Callable[[str], None] | None = None
) -> PreferenceData:
    """Read and check the pairs of a configuration, and count each one's tokens and views from sizes alone.

    on_bad: called with the message of each pair that is broken or longer than a row or than the model's context, which is then left out;
    None: it raises ValueError.  note: called with the message of each pair that too_long='skip' leaves out.
    """
    records, tokens, views, fingerprint = [], [], [], 0
    counts: Counter[str] = Counter()
    for path in map(Path, config.data):
        folder = Path(config.media_folder) if config.media_folder is not None else path.parent
        for number, entry in enumerate(_read(path)):
            name = entry.get("id") if isinstance(entry, dict) else None
            where = f"{path}, record {number}" + ("" if name is None else f" (id {shown(name)})")
            try:
                sides, pair, own_tokens, own_views = measure_pair(entry, where, folder, config, spec)
            except BadRecord as error:
                wanted = config.too_long == "skip" and error.kind in ("too long", "too many views")
                said = on_bad or (note or (lambda message: None) if wanted else None)
                if said is None:
                    raise
                said(str(error))
                counts[error.kind] += 1
                continue
            records.append(sides)
            tokens.append(own_tokens)
            views.append(own_views)
            for part in (pair.prompt, pair.chosen, pair.rejected):
                fingerprint = crc32(np.array([part.ids, part.labels]).tobytes(), fingerprint)
            fingerprint = crc32(repr(sides[0].names).encode(), fingerprint)
    if config.progress:
        left_out = ", ".join(f"{count:,} {kind}" for kind, count in counts.most_common())
        Console().print(f"{len(records):,} pairs" + (f", left out: {left_out}" if left_out else ""), highlight=False, soft_wrap=True)
    return PreferenceData(records, np.array(tokens, dtype=np.int64), np.array(views, dtype=np.int64), config, spec, fingerprint)


def measure_pair(
    entry: Any, where: str, folder: Path, config: TrainConfig, spec: InputSpec
) -> tuple[tuple[Record, Record], Pair, int, int]:
    """The conversations of a pair, its ids and labels, its tokens and views. Raises BadRecord, starting with `where`."""
    kind: Kind = "not a record"
    try:
        sides = check_pair(entry, where, folder, config.dpo is not None and config.dpo.upstream)
        if sides[0].turns[:-1] != sides[1].turns[:-1]:
            raise BadRecord(f"{where}: chosen and rejected must be one answer each, to the same conversation", "turns")
        visuals = media_layouts(sides[0], config.inputs, spec)
        kind = "template"
        pair = encode_pair(sides, len(visuals), config, spec)
        return sides, pair, *_sizes(pair, visuals, where, config, spec)
    except BadRecord:
        raise
    except ValueError as error:
        raise BadRecord(str(error) if str(error).startswith(where) else f"{where}: {error}", kind) from error


def check_pair(entry: Any, where: str, folder: Path, upstream: bool = False) -> tuple[Record, Record]:
    """The two conversations of a pair, checked as training records are; ValueError starting with `where`.

    upstream: as train_dpo.py, marks are taken out of the prompt and one is put in front of it, so that more than one picture is refused.
    """
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: a record is an object, got {type(entry).__name__}")
    absent = [name for name in ("prompt", "chosen", "rejected") if name not in entry]
    if absent:
        raise ValueError(f"{where}: a pair has prompt, chosen and rejected, this one lacks {', '.join(absent)}")
    media = {name: entry[name] for name in ("image", "video") if name in entry}
    if "images" in entry:
        if "image" in entry:
            raise ValueError(f"{where}: has both 'image' and 'images'")
        media["image"] = entry["images"]
    prompt = _messages(entry["prompt"], "user", where, "prompt")
    if upstream:
        count = len(media["image"]) if isinstance(media.get("image"), list) else len(media)
        if count > 1:
            raise ValueError(f"{where}: {count} pictures, but train_dpo.py has one mark before the prompt: set dpo.upstream to false")
        prompt = [{**turn, "value": turn["value"].replace(IMAGE_MARK, "").strip()} for turn in prompt]
        if count:
            prompt[0]["value"] = f"{IMAGE_MARK}\n{prompt[0]['value']}"
    chosen, rejected = (
        check_record({**media, "conversations": prompt + _messages(entry[side], "assistant", where, side)}, where, folder)
        for side in ("chosen", "rejected")
    )
    return chosen, rejected


def _messages(value: Any, role: str, where: str, name: str) -> list[dict[str, str]]:
    """Turns of a text, or of messages as TRL has them."""
    if isinstance(value, str):
        return [{"from": role, "value": value}]
    if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
        raise ValueError(f"{where}: {name} must be a text or a list of messages, got {shown(value)}")
    turns = []
    for message in value:
        content = message.get("content")
        if isinstance(content, list):
            kinds = {"text": lambda item: item.get("text"), "image": lambda item: IMAGE_MARK, "video": lambda item: IMAGE_MARK}
            parts = [kinds.get(str(item.get("type")), lambda item: None)(item) if isinstance(item, dict) else None for item in content]
            content = None if any(not isinstance(part, str) for part in parts) else "".join(parts)  # type: ignore[arg-type]
        if not isinstance(content, str) or not isinstance(message.get("role"), str):
            raise ValueError(f"{where}: a message of {name} has a role and a content of texts and pictures, got {shown(message)}")
        turns.append({"from": message["role"], "value": content})
    return turns


def encode_pair(sides: tuple[Record, Record], visuals: int, config: TrainConfig, spec: InputSpec) -> Pair:
    """Ids and labels, cut where the two conversations part; each answer keeps at least its last token.

    What the template supervises before the last answer is kept in `upstream` mode alone, and counts for both answers.
    """
    counts = [visuals] if sides[0].video is not None else [1] * len(sides[0].images)

    def encode(turns: Sequence[Turn]) -> Labelled:
        image, options = spec.image_token_id, config.inputs
        return encode_turns(turns, config.template, spec.tokenizer, image, counts, spec.chat_template, options.keep_order)

    whole = [encode(side.turns) for side in sides]
    if config.dpo is None or not config.dpo.upstream:
        # Where the answer starts: up to there, an answer of which no other begins the same has the same ids.
        other = encode([*sides[0].turns[:-1], Turn("assistant", "\N{END OF TEXT}")]).ids
        starts = [_alike(side.ids, other) for side in whole]
        whole = [Labelled(side.ids, [IGNORE] * start + side.labels[start:]) for side, start in zip(whole, starts, strict=True)]
    ids_and_labels = [list(zip(side.ids, side.labels, strict=True)) for side in whole]
    cut = min(_alike(*ids_and_labels), len(whole[0].ids) - 1, len(whole[1].ids) - 1)
    return Pair(Labelled(whole[0].ids[:cut], whole[0].labels[:cut]), *(Labelled(side.ids[cut:], side.labels[cut:]) for side in whole))


def _alike(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many elements two sequences share from the start."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _sizes(pair: Pair, visuals: Sequence[Visual], where: str, config: TrainConfig, spec: InputSpec) -> tuple[int, int]:
    """Tokens and views of a pair; BadRecord where they are too many, or nothing of an answer is supervised."""
    prompt = len(pair.prompt.ids) - len(visuals) + sum(visual.tokens for visual in visuals)
    chosen, rejected = len(pair.chosen.ids), len(pair.rejected.ids)
    tokens, views = prompt + chosen + rejected, sum(visual.views for visual in visuals)
    if tokens > config.tokens_per_row:
        message = f"{where}: {tokens} tokens, prompt once and both answers, more than tokens_per_row {config.tokens_per_row}"
        raise BadRecord(message, "too long")
    if prompt + max(chosen, rejected) > spec.max_positions:
        raise BadRecord(f"{where}: {prompt + max(chosen, rejected)} tokens, more than the context's {spec.max_positions}", "too long")
    if config.views_per_row is not None and views > config.views_per_row:
        raise BadRecord(f"{where}: {views} views, more than views_per_row {config.views_per_row}", "too many views")
    for side in (pair.chosen, pair.rejected):
        if all(label == IGNORE for label in pair.prompt.labels[1:] + side.labels):
            message = f"{where}: nothing to learn, no token of an answer is supervised by template {config.template}"
            raise BadRecord(message, "nothing to learn")
    return tokens, views


def _read(path: Path) -> list[Any]:
    if path.suffix not in (".json", ".jsonl") or not path.is_file():
        raise ValueError(f"preferences are a .json or .jsonl file, got {path}" + ("" if path.is_file() else " (no such file)"))
    try:
        text = path.read_text(encoding="utf-8")
        entries = [json.loads(line) for line in text.splitlines() if line.strip()] if path.suffix == ".jsonl" else json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(entries, list):
        raise ValueError(f"{path} must hold a list of records, got {type(entries).__name__}")
    return entries
