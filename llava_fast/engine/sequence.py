"""What the engine works on: a prompt with its pictures, and the sequences that continue it.

Shape letters: T rows of a prompt, D width.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from llava_fast.batch import Sample, Visual
from llava_fast.requests import SamplingParams

FinishReason = Literal["stop", "length", "error", "cancelled"]


@dataclass(eq=False)
class Picture:
    """A picture, a video or a set of tiles: rows first : first + tokens of its prompt are its.

    key: equal for equal pixels that are cut and pooled alike, 32 bytes.  rows: [tokens, D], projected, while they are needed.
    """

    first: int
    tokens: int
    key: bytes
    visual: Visual | None = None
    views: Tensor | None = None
    rows: Tensor | None = None

    @property
    def cost(self) -> int:
        """Views that the tower has to look at."""
        return 0 if self.visual is None else self.visual.views


@dataclass(frozen=True, eq=False)
class Prompt:
    """token_ids: int64 [T], 0 at visual rows.  text_ids: the ids with one placeholder a visual, those that a repetition penalty sees."""

    token_ids: np.ndarray
    pictures: tuple[Picture, ...]
    text_ids: list[int]

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def visual_tokens(self) -> int:
        return sum(picture.tokens for picture in self.pictures)

    @staticmethod
    def of(sample: Sample, views: Tensor | None, text_ids: list[int]) -> Prompt:
        parts = views.split([visual.views for visual in sample.visuals]) if views is not None else ()
        pictures = [
            Picture(first, visual.tokens, content_key(visual, own), visual, own)
            for visual, first, own in zip(sample.visuals, sample.starts, parts, strict=True)
        ]
        return Prompt(sample.token_ids, tuple(pictures), text_ids)

    @staticmethod
    def of_embeddings(embeds_TD: Tensor, text_ids: list[int], name: bytes) -> Prompt:
        """A prompt whose rows are given. name: of its content, in place of a hash."""
        rows = embeds_TD.shape[0]
        return Prompt(np.zeros(rows, dtype=np.int64), (Picture(0, rows, name, rows=embeds_TD),), text_ids)


def content_key(visual: Visual, views: Tensor) -> bytes:
    """BLAKE2b over the pixels that the tower sees and how its features become rows."""
    digest = hashlib.blake2b(repr((tuple(views.shape), views.dtype, visual.patches)).encode(), digest_size=32)
    digest.update(visual.source.tobytes())
    for resample in visual.resamples:
        digest.update(repr((resample.mode, resample.size, resample.source.shape)).encode())
        digest.update(resample.source.tobytes())
    digest.update(views.contiguous().view(torch.uint8).numpy().data)
    return digest.digest()


@dataclass(eq=False)
class Sequence:
    """One continuation of a prompt, and where it stands.

    owner, index: whose it is, and which of the n.  order: sorts sequences, the one to serve first first.
    salt: what may share blocks with it begins with the same.
    tokens: the new ids that the host knows; `pending` more are being computed.  computed: rows in the cache (or on their way into it);
    the first `published` of its blocks can be found by their content.  slot: its place among the running ones.
    """

    owner: Any
    index: int
    prompt: Prompt
    params: SamplingParams
    max_new: int
    seed: int
    eos_ids: tuple[int, ...]
    order: tuple[int, int, int]
    salt: bytes = b""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    pending: int = 0
    computed: int = 0
    published: int = 0
    blocks: list[int] = field(default_factory=list)
    slot: int = -1
    finish_reason: FinishReason | None = None
    told: float = 0.0  # when its latest token came
    seen: Tensor | None = None  # int32 [V], how often each token occurred; where a penalty asks
    _keys: list[bytes] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Rows once everything under way has arrived."""
        return len(self.prompt) + len(self.tokens) + self.pending

    @property
    def produced(self) -> int:
        return len(self.tokens) + self.pending

    @property
    def decoding(self) -> bool:
        """Whether all rows but the last token's are in the cache."""
        return self.produced > 0 and self.length - self.computed == 1

    def ids(self, first: int, last: int) -> np.ndarray:
        """Token ids of rows first : last, int64; 0 at visual rows, -1 where the device alone knows yet."""
        prompt, known = len(self.prompt), len(self.prompt) + len(self.tokens)
        parts = [self.prompt.token_ids[first:last]]
        if last > prompt:
            parts.append(np.array(self.tokens[max(first - prompt, 0) : last - prompt], dtype=np.int64))
        if last > known:
            parts.append(np.full(last - max(first, known), -1))
        return np.concatenate(parts) if len(parts) > 1 else parts[0]

    def rows(self, first: int, last: int) -> tuple[Hashable, ...]:
        """What rows first : last are made of: token ids, or a picture's key and the row in it."""
        rows: list[Hashable] = self.ids(first, last).tolist()
        for picture in self.prompt.pictures:
            for row in range(max(picture.first, first), min(picture.first + picture.tokens, last)):
                rows[row - first] = (picture.key, row - picture.first)
        return tuple(rows)

    def key(self, block: int, page: int) -> bytes:
        """A hash of all rows up to the end of block number `block`, which have to be known; the salt for -1."""
        if block < 0:
            return self.salt
        while len(self._keys) <= block:
            first = len(self._keys) * page
            digest = hashlib.blake2b(self._keys[-1] if self._keys else self.salt, digest_size=32)
            digest.update(self.ids(first, first + page).tobytes())
            for picture in self.prompt.pictures:
                if picture.first < first + page and picture.first + picture.tokens > first:
                    digest.update(picture.key + struct.pack("<q", picture.first - first))
            self._keys.append(digest.digest())
        return self._keys[block]
