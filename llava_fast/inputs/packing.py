"""Which samples share a row: first fit over a seeded window, on true token counts, under two budgets (tokens and views).

`pack_rows` is deterministic in (counts, seed, epoch), so every rank and every resumed run sees the same rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from llava_fast.checks import shown

Order = Literal["first_fit", "first_fit_decreasing"]


@dataclass(frozen=True)
class Packing:
    """rows: sample indices of each row, in reading order.  too_long: samples that no row can hold, in index order."""

    rows: list[list[int]]
    too_long: list[int]

    def fill(self, tokens: Sequence[int] | np.ndarray, tokens_per_row: int) -> float:
        """Used share of the rows' token budget, in [0, 1]; 0 when there are no rows."""
        used = sum(int(tokens[i]) for row in self.rows for i in row)
        return used / (len(self.rows) * tokens_per_row) if self.rows else 0.0


def pack_rows(
    tokens: Sequence[int] | np.ndarray,
    views: Sequence[int] | np.ndarray,
    tokens_per_row: int,
    views_per_row: int | None = None,
    *,
    window: int = 256,
    seed: int = 0,
    epoch: int = 0,
    order: Order = "first_fit_decreasing",
    too_long: Literal["error", "skip"] = "error",
) -> Packing:
    """Put every sample into exactly one row of at most `tokens_per_row` tokens and `views_per_row` views (None: no limit).

    Samples are shuffled by (seed, epoch) and taken `window` at a time; within a window they are placed largest first
    (`first_fit_decreasing`) or as they come (`first_fit`) into the first row with room. The samples of a window's emptiest eighth
    of rows join the next window: over 20,000 M4-shaped samples in 16k rows the fill is 99.1 %, against 98.5 % when only the emptiest row
    stays open. Rows leave a window in shuffled order: placed largest first, they would otherwise come sorted by sample length.

    Raises ValueError for a sample past either budget, unless too_long="skip", which lists it in `Packing.too_long`.
    """
    token_counts, view_counts = np.asarray(tokens, dtype=np.int64), np.asarray(views, dtype=np.int64)
    _check(token_counts, view_counts, tokens_per_row, views_per_row, window, order)
    view_budget = int(view_counts.sum()) if views_per_row is None else views_per_row
    over = np.flatnonzero((token_counts > tokens_per_row) | (view_counts > view_budget))
    if len(over) and too_long == "error":
        i = int(over[0])
        raise ValueError(
            f"sample {i} has {token_counts[i]} tokens and {view_counts[i]} views, past the row budget of {tokens_per_row} tokens and "
            f"{view_budget} views ({len(over)} such samples)"
        )
    rng = np.random.default_rng([seed, epoch])
    shuffled = rng.permutation(len(token_counts))
    shuffled = shuffled[~np.isin(shuffled, over)]

    rows: list[list[int]] = []
    returned: list[int] = []
    for start in range(0, len(shuffled), window):
        members = np.concatenate([np.array(returned, dtype=np.int64), shuffled[start : start + window]])
        if order == "first_fit_decreasing":
            members = members[np.argsort(-token_counts[members], kind="stable")]
        filled = _first_fit(members, token_counts, view_counts, tokens_per_row, view_budget)
        returned = []
        if start + window < len(shuffled):
            filled.sort(key=lambda row: row.tokens_left)
            keep = len(filled) - max(1, len(filled) // 8)
            filled, emptiest = filled[:keep], filled[keep:]
            returned = [i for row in emptiest for i in row.members]
        rows += [filled[i].members for i in rng.permutation(len(filled))]
    return Packing(rows, over.tolist())


@dataclass
class _Row:
    members: list[int]
    tokens_left: int
    views_left: int


def _first_fit(members: np.ndarray, tokens: np.ndarray, views: np.ndarray, token_budget: int, view_budget: int) -> list[_Row]:
    rows: list[_Row] = []
    for i in members.tolist():
        need_tokens, need_views = int(tokens[i]), int(views[i])
        for row in rows:
            if need_tokens <= row.tokens_left and need_views <= row.views_left:
                break
        else:
            row = _Row([], token_budget, view_budget)
            rows.append(row)
        row.members.append(i)
        row.tokens_left -= need_tokens
        row.views_left -= need_views
    return rows


def _check(tokens: np.ndarray, views: np.ndarray, tokens_per_row: int, views_per_row: int | None, window: int, order: str) -> None:
    if tokens.shape != views.shape or tokens.ndim != 1:
        raise ValueError(f"tokens and views must be two lists of one length, got shapes {tokens.shape} and {views.shape}")
    if len(tokens) and (tokens.min() < 1 or views.min() < 0):
        raise ValueError(f"a sample has at least 1 token and 0 views, got {tokens.min()} tokens and {views.min()} views")
    for name, value in (("tokens_per_row", tokens_per_row), ("views_per_row", views_per_row), ("window", window)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if order not in ("first_fit", "first_fit_decreasing"):
        raise ValueError(f"order must be first_fit or first_fit_decreasing, got {shown(order)}")
