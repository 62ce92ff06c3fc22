"""Pictures paid for once: projected rows by content, the least recently used dropped past a number of bytes."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor


class FeatureCache:
    def __init__(self, max_bytes: int):
        self.max_bytes, self.bytes = max_bytes, 0
        self._rows: OrderedDict[bytes, Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, key: bytes) -> Tensor | None:
        """rows [tokens, D] of the picture with this key."""
        if key in self._rows:
            self._rows.move_to_end(key)
        return self._rows.get(key)

    def put(self, key: bytes, rows: Tensor) -> None:
        """Rows that own their storage: a view would keep the whole of it alive. What is larger than the cache is not kept."""
        if key in self._rows or rows.nbytes > self.max_bytes:
            return
        self._rows[key] = rows
        self.bytes += rows.nbytes
        while self.bytes > self.max_bytes:
            _, dropped = self._rows.popitem(last=False)
            self.bytes -= dropped.nbytes
