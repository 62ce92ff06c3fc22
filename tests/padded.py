"""Batches in transformers' padded form, for parity tests."""

from __future__ import annotations

import torch
from torch import Tensor


def random_text(count: int, generator: torch.Generator) -> list[int]:
    """Ids of ordinary tokens of the tiny vocabulary."""
    return torch.randint(10, 370, (count,), generator=generator).tolist()


def rows_of(shapes: list[list[int | str]], patches: int, image_token_id: int, seed: int = 0) -> tuple[list[list[int]], int]:
    """Sequences from shapes such as [3, 'image', 5]: text of that length, or a picture's placeholders. -> (rows, pictures)."""
    generator = torch.Generator().manual_seed(seed)
    rows = [
        [token for part in shape for token in ([image_token_id] * patches if part == "image" else random_text(int(part), generator))]
        for shape in shapes
    ]
    return rows, sum(part == "image" for shape in shapes for part in shape)


def pad(rows: list[list[int]], side: str, value: int = 0) -> tuple[Tensor, Tensor]:
    """-> ids and attention mask, int64 [B, T]."""
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), value)
    mask = torch.zeros_like(ids)
    for b, row in enumerate(rows):
        where = slice(longest - len(row), longest) if side == "left" else slice(0, len(row))
        ids[b, where], mask[b, where] = torch.tensor(row), 1
    return ids, mask


def pixels(count: int, size: int = 42, seed: int = 0) -> Tensor | None:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed)) if count else None
