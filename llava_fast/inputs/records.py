"""LLaVA training records: what one holds, and every check of it before any work.

A record is {"id", "image": str | [str] or "video": str or neither, "conversations": [{"from": "human" | "gpt", "value"}, ...]};
`sample_id`, `role` / `content` and the roles user / assistant / system are accepted too. Format and rules as in LLaVA-NeXT's
llava/train/train.py, except that what it passes over in silence (reversed turns, wrong numbers of marks) is a `BadRecord` here.
What M4-Instruct has besides (choice_list, metadata) is not trained on; `metadata.dataset` says which data set a record is of.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from llava_fast.checks import shown
from llava_fast.inputs.media import Packed, member
from llava_fast.inputs.templates import IMAGE_MARK as MARK

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
NOISE = "QA_GT_caption_based_noisy"  # left in VideoInstruct-100k's answers; upstream deletes it too

Role = Literal["system", "user", "assistant"]
Kind = Literal[
    "not a record",
    "missing file",
    "unreadable file",
    "reversed turns",
    "turns",
    "empty answer",
    "marks and pictures",
    "layout",
    "template",
    "too long",
    "too many views",
    "nothing to learn",
]
Scenario = Literal["single-image", "multi-image", "multi-view", "video", "text"]
SCENARIOS: tuple[Scenario, ...] = ("single-image", "multi-image", "multi-view", "video", "text")
# Data sets of M4-Instruct whose lists of pictures are views of one scene, or frames, by a piece of their name.
MULTI_VIEW = ("nuscenes", "scannet", "scanqa", "3d-llm", "3d_llm", "3dllm", "alfred")
FRAMES = ("nextqa", "next-qa", "next_qa", "sharegptvideo")


class BadRecord(ValueError):
    """A record that cannot be trained on. The message starts with file and record; kind: the fault, as it is counted.
    path: the medium that is missing or cannot be read."""

    def __init__(self, message: str, kind: Kind, path: str | None = None):
        super().__init__(message)
        self.kind = kind
        self.path = path


@dataclass(frozen=True)
class Turn:
    role: Role
    text: str


@dataclass(frozen=True)
class Record:
    """One checked record: user and assistant turns alternate (after an optional system turn) and every <image> mark has its medium.

    images: paths (or what media.py reads), in the order of the marks.  video: a video or a folder of its frames, which has one mark.
    names: of its media, as the file writes them (of an absolute path only the last part): what stays when files are moved.
    where: file and id, for messages.  dataset: the data set it says it is of, "" where it says none.
    """

    where: str
    turns: tuple[Turn, ...]
    images: tuple[str, ...] = ()
    video: str | None = None
    names: tuple[str, ...] = ()
    dataset: str = ""

    @property
    def media(self) -> int:
        return len(self.images) + (self.video is not None)

    @property
    def scenario(self) -> Scenario:
        if not self.media:
            return "text"
        if self.video is not None:
            return "video"
        if len(self.images) == 1:
            return "single-image"
        name = (self.dataset or self.names[0].partition("/")[0]).lower()
        if any(piece in name for piece in MULTI_VIEW):
            return "multi-view"
        return "video" if name == "star" or any(piece in name for piece in FRAMES) else "multi-image"


def sample_indices(total: int, strategy: str = "all", seed: int | Sequence[int] = 0) -> list[int]:
    """Indices that a sampling strategy keeps: 'all', 'first:N', 'end:N', 'random:N', N a count or 'P%' (rounded up).

    'random' is seeded (upstream draws from the global generator, so its ranks disagree). N past the total keeps all.
    """
    if strategy == "all":
        return list(range(total))
    kind, _, amount = strategy.partition(":")
    digits = amount.removesuffix("%")
    if kind not in ("first", "end", "random") or not digits.isdecimal():
        raise ValueError(f"sampling_strategy must be all, first:N, end:N or random:N with N a count or P%, got {shown(strategy)}")
    count = min(total, math.ceil(int(digits) * total / 100) if amount.endswith("%") else int(digits))
    if kind == "first":
        return list(range(count))
    if kind == "end":
        return list(range(total - count, total))
    return sorted(np.random.default_rng(seed).permutation(total)[:count].tolist())


def check_record(entry: Any, where: str, folder: Path) -> Record:
    """A `Record` from one JSON entry; `BadRecord` whose message starts with `where` for anything that is wrong with it."""
    if not isinstance(entry, dict):
        raise BadRecord(f"{where}: a record is an object, got {type(entry).__name__}", "not a record")
    names, is_video = _media(entry, where)
    paths = tuple(_path(name, folder) for name in names)
    for path in paths:
        if not (isinstance(path, Packed) or os.path.isfile(path) or (is_video and os.path.isdir(path))):
            raise BadRecord(f"{where}: no file {path}", "missing file", path)
    turns = _place_marks(_turns(entry, where), len(names), is_video, where)
    lasting = tuple(_lasting(name) for name in names)
    return Record(where, turns, () if is_video else paths, paths[0] if is_video else None, lasting, dataset_name(entry))


def dataset_name(entry: dict) -> str:
    """What a record says of its origin: metadata.dataset (M4-Instruct) or data_source (LLaVA-OneVision); "" where it says nothing."""
    metadata = entry.get("metadata")
    named = metadata.get("dataset") if isinstance(metadata, dict) else entry.get("data_source")
    return named if isinstance(named, str) else ""


def pictures_in_front(turns: Sequence[Turn]) -> tuple[Turn, ...]:
    """The paper's in-the-front format: all pictures before the first question, placeholders where they stood.

    Marks that lead the first question stay without one: nothing is between them and the front. The paper keeps the literal <image> as
    placeholder, which to the released tokenizers is a picture; "(image 2)" is ours, and says which one is meant.
    """
    total = sum(turn.text.count(MARK) for turn in turns)
    first = next(number for number, turn in enumerate(turns) if turn.role == "user")
    seen = 0
    placed = []
    for number, turn in enumerate(turns):
        text = turn.text
        while number == first and text.startswith(MARK):
            text, seen = text[len(MARK) :], seen + 1
        head, *rest = text.split(MARK)
        for piece in rest:
            seen += 1
            head += f"(image {seen}){piece}"
        if number == first:
            head = MARK * total + (head if head.startswith("\n") else f"\n{head}")
        placed.append(Turn(turn.role, head))
    return tuple(placed)


def _path(name: str, folder: Path) -> str:
    return name if isinstance(name, Packed) else os.path.join(folder, name)


def _lasting(name: str) -> str:
    if isinstance(name, Packed):
        return member(name)
    return os.path.basename(name) if os.path.isabs(name) else name


def _media(entry: dict, where: str) -> tuple[list[str], bool]:
    """The names of a record's files, and whether they are a video."""
    image, video = entry.get("image"), entry.get("video")
    if image is not None and video is not None:
        raise BadRecord(f"{where}: has both 'image' and 'video'; a record has one or neither", "not a record")
    names = [] if image is None else [image] if isinstance(image, str) else image
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise BadRecord(f"{where}: 'image' must be a path or a list of paths, got {shown(image)}", "not a record")
    if video is not None and not (isinstance(video, str) and video):
        raise BadRecord(f"{where}: 'video' must be a path, got {shown(video)}", "not a record")
    return [video] if video is not None else names, video is not None


def _turns(entry: dict, where: str) -> list[Turn]:
    conversation = entry.get("conversations")
    if not isinstance(conversation, list) or not conversation:
        raise BadRecord(f"{where}: 'conversations' must be a list of turns, got {shown(conversation)}", "turns")
    turns = []
    for number, turn in enumerate(conversation):
        if not isinstance(turn, dict):
            raise BadRecord(f"{where}: turn {number} must be an object with 'from' and 'value', got {shown(turn)}", "turns")
        role, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        if not isinstance(role, str) or role not in ROLES:
            raise BadRecord(f"{where}: turn {number} has the role {shown(role)}; known are {', '.join(ROLES)}", "turns")
        if not isinstance(text, str):
            raise BadRecord(f"{where}: turn {number} must have a text, got {shown(text)}", "turns")
        turns.append(Turn(ROLES[role], text))  # type: ignore[arg-type]
    dialogue = turns[1:] if turns[0].role == "system" else turns
    expected: tuple[Role, Role] = ("user", "assistant")
    for number, dialogue_turn in enumerate(dialogue):
        if dialogue_turn.role != expected[number % 2]:
            names = [turn.role for turn in turns]
            kind: Kind = "reversed turns" if number == 0 else "turns"
            raise BadRecord(f"{where}: turns must be human, gpt, human, gpt, ..., got {names} (reversed or repeated turns)", kind)
    if len(dialogue) < 2 or len(dialogue) % 2:
        raise BadRecord(f"{where}: the last of {len(dialogue)} turns must be an answer, got {[turn.role for turn in turns]}", "turns")
    return turns


def _place_marks(turns: Sequence[Turn], media: int, is_video: bool, where: str) -> tuple[Turn, ...]:
    """Marks where the model will see them, and exactly one a medium.

    As upstream: the only mark of a turn goes to its start, on a line of its own; two or more stay where they are. <video> is
    read as <image> in the questions of a record with a video, and is text elsewhere (it is a tag of HTML). Unlike upstream, which trains
    such a record without its pictures: where no turn has a mark, all marks go in front of the first question.
    """
    texts = [turn.text.replace("<video>", MARK) if is_video and turn.role == "user" else turn.text for turn in turns]
    texts = [text.replace(NOISE, "") for text in texts]
    for number, (turn, text) in enumerate(zip(turns, texts, strict=True)):
        if turn.role != "user" and MARK in text:
            raise BadRecord(f"{where}: turn {number} ({turn.role}) has an {MARK} mark; only questions hold pictures", "marks and pictures")
        if turn.role == "assistant" and not text.strip():
            raise BadRecord(f"{where}: turn {number} (assistant) is empty", "empty answer")
    marks = sum(text.count(MARK) for text in texts)
    if media and not marks:
        first = next(i for i, turn in enumerate(turns) if turn.role == "user")
        texts[first] = MARK * media + "\n" + texts[first]
    elif marks != media:
        raise BadRecord(f"{where}: {marks} {MARK} marks but {media} pictures or videos", "marks and pictures")
    for i, text in enumerate(texts):
        if text.count(MARK) == 1 and not text.startswith(MARK):
            texts[i] = f"{MARK}\n{text.replace(MARK, '').strip()}".strip()
    return tuple(Turn(turn.role, text) for turn, text in zip(turns, texts, strict=True))
