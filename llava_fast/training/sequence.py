"""Part of a packed row for one device of several: its tokens, the pictures that fall among them, and where it all lies in the whole."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from llava_fast.batch import Layout, PackedBatch
from llava_fast.models.sequence import Split


def split_row(batch: PackedBatch, part: int, parts: int, group: Any = None) -> PackedBatch:
    """Part `part` of `parts` of a row on the CPU, of as many tokens as the others or one fewer.

    cu_seqlens and prefix stay those of the whole row; a view whose rows fall into two parts is in both.
    """
    bounds = [batch.num_tokens * i // parts for i in range(parts + 1)]
    low, high = bounds[part], bounds[part + 1]
    needed = torch.searchsorted(batch.needed_rows, torch.tensor(bounds)).tolist()
    own = (batch.label_rows >= low) & (batch.label_rows < high)
    views, layout = batch.views, batch.layout
    if views is not None and layout is not None:
        kept, layout = cut_layout(layout, views.shape[0], low, high)
        views = views[kept]
    return dataclasses.replace(
        batch,
        token_ids=batch.token_ids[low:high],
        positions=batch.positions[low:high],
        views=views,
        layout=layout,
        label_rows=batch.label_rows[own] - low,
        labels=batch.labels[own],
        label_seq=batch.label_seq[own],
        needed_rows=batch.needed_rows[needed[part] : needed[part + 1]] - low,
        label_index=batch.label_index[own] - needed[part],
        split=Split(
            group,
            tuple(b - a for a, b in pairwise(bounds)),
            tuple(b - a for a, b in pairwise(needed)),
            batch.needed_rows,
        ),
    )


def cut_layout(layout: Layout, views: int, low: int, high: int) -> tuple[Tensor, Layout]:
    """The views that rows low : high of the row are made of, and the layout of those rows over these views alone."""
    own = (layout.rows >= low) & (layout.rows < high)
    P = layout.patches
    source = layout.rows.new_tensor(range(len(own)))[own] if layout.source is None else layout.source[own]
    used = torch.zeros(views, dtype=torch.bool)
    used[source[source < views * P] // P] = True
    start, maps = views * P, []
    for mode, cells, size in layout.resamples:
        each = size[0] * size[1]
        inside = (source >= start) & (source < start + cells.shape[0] * each)
        chosen = ((source[inside] - start) // each).unique()
        used[cells[chosen] // P] = True
        maps.append((mode, cells, size, chosen, start, each))
        start += cells.shape[0] * each
    kept = used.nonzero()[:, 0]
    number = torch.cumsum(used, 0) - 1  # of a view among the kept ones

    new = torch.full_like(source, -1)
    plain = source < views * P
    new[plain] = number[source[plain] // P] * P + source[plain] % P
    place, resamples = len(kept) * P, []
    for mode, cells, size, chosen, first, each in maps:
        if not len(chosen):
            continue
        among = torch.zeros(cells.shape[0], dtype=torch.int64)
        among[chosen] = torch.arange(len(chosen))
        inside = (source >= first) & (source < first + cells.shape[0] * each)
        new[inside] = place + among[(source[inside] - first) // each] * each + (source[inside] - first) % each
        resamples.append((mode, number[cells[chosen] // P] * P + cells[chosen] % P, size))
        place += len(chosen) * each
    new[source == start] = place  # the newline, after all others
    texts = layout.text_rows[(layout.text_rows >= low) & (layout.text_rows < high)]
    nothing = not len(new) and not len(kept)
    return kept, Layout(layout.rows[own] - low, texts - low, None if nothing else new, tuple(resamples), P)
