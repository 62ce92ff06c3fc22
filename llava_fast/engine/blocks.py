"""Who holds which block of the key-value cache, and what the blocks hold: reference counts, and reuse by content.

A full block is known by the hash of everything that its keys and values come from: the chain of token ids and pictures from the first
row of the sequence to its last. Blocks that nobody holds stay findable until they are needed for something else, the longest idle first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable


class BlockPool:
    """`count` blocks, numbered from 0."""

    def __init__(self, count: int):
        self.count = count
        self._unused = list(range(count - 1, -1, -1))  # hold nothing; low numbers first, so that little memory is ever touched
        self._idle: OrderedDict[int, None] = OrderedDict()  # held by nobody, content known
        self._holders = [0] * count
        self._key_of: dict[int, bytes] = {}
        self._by_key: dict[bytes, int] = {}

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
        else:
            block, _ = self._idle.popitem(last=False)
            del self._by_key[self._key_of.pop(block)]
        self._holders[block] = 1
        return block

    def find(self, key: bytes) -> int | None:
        """The block with this content, held once more; None where there is none."""
        block = self._by_key.get(key)
        if block is not None:
            self._idle.pop(block, None)
            self._holders[block] += 1
        return block

    def publish(self, block: int, key: bytes) -> None:
        """Say what a block holds, once it does. A second block of the same content stays unknown."""
        if key not in self._by_key and block not in self._key_of:
            self._by_key[key], self._key_of[block] = block, key

    def release(self, blocks: Iterable[int]) -> None:
        """One holder less for each. Give a sequence's blocks last first: a chain is useless without its beginning."""
        for block in blocks:
            self._holders[block] -= 1
            assert self._holders[block] >= 0, block
            if self._holders[block] == 0:
                if block in self._key_of:
                    self._idle[block] = None
                else:
                    self._unused.append(block)
