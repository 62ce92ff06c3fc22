"""Who holds which block of the key-value cache, and what the blocks hold: reference counts, and reuse by content.

A full block is known by the hash of everything that its keys and values come from: the chain of token ids and pictures from the first
row of the sequence to its last. Where a sequence leaves the known chain inside a block, the rows up to there are copied from it. Blocks
that nobody holds stay findable until they are needed for something else, the longest idle first.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Hashable, Iterable
from typing import NamedTuple

CANDIDATES = 64  # blocks after a chain that are compared row by row, the latest first: 3 ms for 2,000 of them


class Content(NamedTuple):
    """Of a block: key, of the whole chain, None where the block is not full; the key of the block before; the rows in it."""

    key: bytes | None
    before: bytes
    rows: tuple[Hashable, ...]


class BlockPool:
    """`count` blocks, numbered from 0."""

    def __init__(self, count: int):
        self.count = count
        self.used = 0  # blocks 0 : used were taken at some time
        self._unused = list(range(count - 1, -1, -1))  # hold nothing; low numbers first, so that little memory is ever touched
        self._idle: OrderedDict[int, None] = OrderedDict()  # held by nobody, content known
        self._holders = [0] * count
        self._content: dict[int, Content] = {}
        self._by_key: dict[bytes, int] = {}
        self._after: dict[bytes, dict[int, None]] = {}  # the blocks that follow a chain, in the order of publication

    @property
    def available(self) -> int:
        return len(self._unused) + len(self._idle)

    @property
    def held(self) -> int:
        return self.count - self.available

    def take(self) -> int:
        """A block to write to. There has to be one available."""
        if self._unused:
            block = self._unused.pop()
            self.used = max(self.used, block + 1)
        else:
            block, _ = self._idle.popitem(last=False)
            self._forget(block)
        self._holders[block] = 1
        return block

    def find(self, key: bytes) -> int | None:
        """The full block with this content, held once more; None where there is none."""
        block = self._by_key.get(key)
        if block is not None:
            self._hold(block)
        return block

    def find_rows(self, before: bytes, rows: tuple[Hashable, ...]) -> tuple[int, int] | None:
        """The block that goes on like `rows` the longest after the chain `before`, held once more, and for how many; None for none."""
        best, length = -1, 0
        for block in itertools.islice(reversed(self._after.get(before, {})), CANDIDATES):
            common = 0
            for a, b in zip(self._content[block].rows, rows, strict=False):
                if a != b:
                    break
                common += 1
            if common > length:
                best, length = block, common
        if not length:
            return None
        self._hold(best)
        return best, length

    def publish(self, block: int, content: Content) -> None:
        """Say what a block holds, once it does; more than before, perhaps. A second full block of the same content stays unknown."""
        if content.key in self._by_key:
            return
        self._forget(block)
        self._content[block] = content
        self._after.setdefault(content.before, {})[block] = None
        if content.key is not None:
            self._by_key[content.key] = block

    def release(self, blocks: Iterable[int]) -> None:
        """One holder less for each. Give a sequence's blocks last first: a chain is useless without its beginning."""
        for block in blocks:
            self._holders[block] -= 1
            assert self._holders[block] >= 0, block
            if self._holders[block] == 0:
                if block in self._content:
                    self._idle[block] = None
                else:
                    self._unused.append(block)

    def _hold(self, block: int) -> None:
        self._idle.pop(block, None)
        self._holders[block] += 1

    def _forget(self, block: int) -> None:
        content = self._content.pop(block, None)
        if content is None:
            return
        if content.key is not None:
            del self._by_key[content.key]
        followers = self._after[content.before]
        del followers[block]
        if not followers:
            del self._after[content.before]
