"""Guesses for the next tokens, looked up: what followed the last time that the latest tokens came by (prompt lookup decoding)."""

from __future__ import annotations

LONGEST, SHORTEST = 3, 2  # latest tokens that must have come by


def guess(prompt: list[int], tokens: list[int], most: int) -> list[int]:
    """Up to `most` token ids; none where nothing matches."""
    ids = prompt + tokens
    for length in range(LONGEST, SHORTEST - 1, -1):
        if most < 1 or len(ids) <= length:
            continue
        tail = ids[-length:]
        for start in range(len(ids) - length - 1, -1, -1):
            if ids[start : start + length] == tail:
                return ids[start + length : start + length + most]
    return []
