"""LLaVA training records: JSON, JSONL and YAML mixtures, checked before any work.

A record is {"id", "image": str | [str] or "video": str or neither, "conversations": [{"from": "human" | "gpt", "value"}, ...]};
`sample_id`, `role` / `content` and the roles user / assistant / system are accepted too. Format and rules as in LLaVA-NeXT's
llava/train/train.py, except that what it passes over in silence (reversed turns, wrong numbers of marks) is a ValueError here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from llava_fast.checks import shown
from llava_fast.inputs.templates import IMAGE_MARK as MARK

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
NOISE = "QA_GT_caption_based_noisy"  # left in VideoInstruct-100k's answers; upstream deletes it too

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Turn:
    role: Role
    text: str


@dataclass(frozen=True)
class Record:
    """One checked record: user and assistant turns alternate (after an optional system turn) and every <image> mark has its medium.

    images: paths, in the order of the marks.  video: path of a video or a folder of its frames, which has one mark.
    names: of its media, as the file writes them (of an absolute path only the last part): what stays when files are moved.
    where: file and id, for messages.
    """

    where: str
    turns: tuple[Turn, ...]
    images: tuple[str, ...] = ()
    video: str | None = None
    names: tuple[str, ...] = ()

    @property
    def media(self) -> int:
        return len(self.images) + (self.video is not None)


def load_records(
    sources: str | Path | Sequence[str | Path],
    media_folder: str | Path | None = None,
    seed: int = 0,
    on_bad: Callable[[str], None] | None = None,
) -> list[Record]:
    """Read and check every record of the given files.

    sources: .json (a list), .jsonl, or .yaml: {"datasets": [{"json_path", "sampling_strategy"}]}, whose paths are relative to the YAML
    file when they are not found from the working directory. Media paths are relative to `media_folder` (default: the file's own).
    on_bad: called with the message of each bad record, which is then left out; None: a bad record raises.
    Raises ValueError naming file, id and fault.
    """
    files = [entry for source in ([sources] if isinstance(sources, (str, Path)) else sources) for entry in _expand(Path(source))]
    records = []
    for number, (path, strategy) in enumerate(files):
        entries = _read(path)
        folder = Path(media_folder) if media_folder is not None else path.parent
        for index in sample_indices(len(entries), strategy, seed=[seed, number]):
            try:
                records.append(check_record(entries[index], _where(path, index, entries[index]), folder))
            except ValueError as error:
                if on_bad is None:
                    raise
                on_bad(str(error))
    return records


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
    """A `Record` from one JSON entry; ValueError starting with `where` for anything that is wrong with it."""
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: a record is an object, got {type(entry).__name__}")
    names, is_video = _media(entry, where, folder)
    paths = tuple(str(folder / name) for name in names)
    turns = _place_marks(_turns(entry, where), len(names), where)
    lasting = tuple(Path(name).name if Path(name).is_absolute() else name for name in names)
    return Record(where, turns, () if is_video else paths, paths[0] if is_video else None, lasting)


def _expand(path: Path) -> Iterator[tuple[Path, str]]:
    if not path.is_file():
        raise ValueError(f"no data file {path}")
    if path.suffix not in (".yaml", ".yml"):
        yield path, "all"
        return
    mixture = yaml.safe_load(path.read_text())
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
        named = Path(dataset["json_path"])
        found = next((p for p in (named, path.parent / named) if p.is_file()), None)
        if found is None:
            raise ValueError(f"{path}: no data file {named}")
        yield found, str(dataset.get("sampling_strategy", "all"))


def _read(path: Path) -> list[Any]:
    try:
        with path.open(encoding="utf-8") as file:
            if path.suffix == ".jsonl":
                return [json.loads(line) for line in file if line.strip()]
            entries = json.load(file)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(entries, list):
        raise ValueError(f"{path} must hold a list of records, got {type(entries).__name__}")
    return entries


def _where(path: Path, index: int, entry: Any) -> str:
    name = entry.get("id", entry.get("sample_id")) if isinstance(entry, dict) else None
    return f"{path}, record {index}" + ("" if name is None else f" (id {shown(name)})")


def _media(entry: dict, where: str, folder: Path) -> tuple[list[str], bool]:
    """The names of a record's files, all of which exist, and whether they are a video."""
    image, video = entry.get("image"), entry.get("video")
    if image is not None and video is not None:
        raise ValueError(f"{where}: has both 'image' and 'video'; a record has one or neither")
    names = [] if image is None else [image] if isinstance(image, str) else image
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"{where}: 'image' must be a path or a list of paths, got {shown(image)}")
    if video is not None and not (isinstance(video, str) and video):
        raise ValueError(f"{where}: 'video' must be a path, got {shown(video)}")
    names = [video] if video is not None else names
    for path in (folder / name for name in names):
        if not (path.is_file() or (video is not None and path.is_dir())):
            raise ValueError(f"{where}: no file {path}")
    return names, video is not None


def _turns(entry: dict, where: str) -> list[Turn]:
    conversation = entry.get("conversations")
    if not isinstance(conversation, list) or not conversation:
        raise ValueError(f"{where}: 'conversations' must be a list of turns, got {shown(conversation)}")
    turns = []
    for number, turn in enumerate(conversation):
        if not isinstance(turn, dict):
            raise ValueError(f"{where}: turn {number} must be an object with 'from' and 'value', got {shown(turn)}")
        role, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
        if not isinstance(role, str) or role not in ROLES:
            raise ValueError(f"{where}: turn {number} has the role {shown(role)}; known are {', '.join(ROLES)}")
        if not isinstance(text, str):
            raise ValueError(f"{where}: turn {number} must have a text, got {shown(text)}")
        turns.append(Turn(ROLES[role], text))  # type: ignore[arg-type]
    dialogue = turns[1:] if turns[0].role == "system" else turns
    expected: tuple[Role, Role] = ("user", "assistant")
    for number, dialogue_turn in enumerate(dialogue):
        if dialogue_turn.role != expected[number % 2]:
            names = [turn.role for turn in turns]
            raise ValueError(f"{where}: turns must be human, gpt, human, gpt, ..., got {names} (reversed or repeated turns)")
    if len(dialogue) < 2 or len(dialogue) % 2:
        raise ValueError(f"{where}: the last of {len(dialogue)} turns must be an answer, got {[turn.role for turn in turns]}")
    return turns


def _place_marks(turns: Sequence[Turn], media: int, where: str) -> tuple[Turn, ...]:
    """Marks where the model will see them, and exactly one a medium.

    As upstream: the only mark of a turn goes to its start, on a line of its own; two or more stay where they are. <video> is
    read as <image>. Unlike upstream, which trains such a record without its pictures: where no turn has a mark, all marks go in
    front of the first question.
    """
    texts = [turn.text.replace("<video>", MARK).replace(NOISE, "") for turn in turns]
    for number, (turn, text) in enumerate(zip(turns, texts, strict=True)):
        if turn.role != "user" and MARK in text:
            raise ValueError(f"{where}: turn {number} ({turn.role}) has an {MARK} mark; only questions hold pictures")
    marks = sum(text.count(MARK) for text in texts)
    if media and not marks:
        first = next(i for i, turn in enumerate(turns) if turn.role == "user")
        texts[first] = MARK * media + "\n" + texts[first]
    elif marks != media:
        raise ValueError(f"{where}: {marks} {MARK} marks but {media} pictures or videos")
    for i, text in enumerate(texts):
        if text.count(MARK) == 1 and not text.startswith(MARK):
            texts[i] = f"{MARK}\n{text.replace(MARK, '').strip()}".strip()
    return tuple(Turn(turn.role, text) for turn, text in zip(turns, texts, strict=True))
