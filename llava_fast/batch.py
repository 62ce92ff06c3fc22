"""One step's input: S sequences packed into a flat row of T tokens, with no padding and no mask.

Shape letters: T rows, S sequences, N views, P patches a view, V visual rows, L label rows, R needed rows.

`Visual` and `Sample` describe one sequence on the CPU from sizes alone; `pack` joins samples into a `PackedBatch`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

IGNORE = -100  # a label that is not supervised, as in transformers and LLaVA
NEWLINE = -1  # in `Visual.source`: the learned newline row

PoolMode = Literal["average", "bilinear", "max"]


@dataclass(frozen=True)
class Resample:
    """Resize maps of view features: `source` int64 [K, H, W] names view rows (view * P + patch), `size` is (H', W')."""

    mode: PoolMode
    source: np.ndarray
    size: tuple[int, int]

    @property
    def tokens(self) -> int:
        return self.source.shape[0] * self.size[0] * self.size[1]


@dataclass(frozen=True)
class Visual:
    """How one picture, video or set of tiles becomes visual rows; made from sizes alone.

    views: views it feeds to the tower.  patches: P, feature rows a view.
    source: int64 [tokens], rows of its own table, which is its views' rows (view * P + patch) followed by the rows of each
    resample in order; NEWLINE stands for the learned newline row.
    """

    views: int
    patches: int
    source: np.ndarray
    resamples: tuple[Resample, ...] = ()

    @property
    def tokens(self) -> int:
        return len(self.source)


@dataclass(frozen=True)
class Sample:
    """One sequence before packing.

    token_ids: int64 [T], 0 at visual rows.  labels: int64 [T] or None; labels[t] is the id at t where it is supervised,
    IGNORE elsewhere (unshifted, as in transformers).  visuals with starts: the row where each one's rows begin.
    """

    token_ids: np.ndarray
    visuals: tuple[Visual, ...] = ()
    starts: tuple[int, ...] = ()
    labels: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def views(self) -> int:
        return sum(visual.views for visual in self.visuals)

    @property
    def visual_tokens(self) -> int:
        return sum(visual.tokens for visual in self.visuals)


def splice(
    ids: Sequence[int] | np.ndarray,
    visuals: Sequence[Visual],
    image_token_id: int,
    labels: Sequence[int] | np.ndarray | None = None,
) -> Sample:
    """Widen the k-th placeholder of `ids` to the rows of `visuals[k]`; labels of visual rows become IGNORE.

    Raises ValueError when the number of placeholders is not the number of visuals.
    """
    ids = np.asarray(ids, dtype=np.int64)
    marks = np.flatnonzero(ids == image_token_id)
    if len(marks) != len(visuals):
        raise ValueError(f"the prompt has {len(marks)} <image>/<video> marks but {len(visuals)} pictures or videos were given")
    widths = np.ones(len(ids), dtype=np.int64)
    widths[marks] = [visual.tokens for visual in visuals]
    token_ids = np.repeat(np.where(ids == image_token_id, 0, ids), widths)
    first_row = np.cumsum(widths) - widths
    wide_labels = None
    if labels is not None:
        wide_labels = np.repeat(np.where(ids == image_token_id, IGNORE, np.asarray(labels, dtype=np.int64)), widths)
    return Sample(token_ids, tuple(visuals), tuple(int(row) for row in first_row[marks]), wide_labels)


@dataclass(frozen=True)
class Layout:
    """Index map from visual features to rows of T, for a whole batch.

    The feature table is: N * P view rows, then the rows of each resample in order, then one newline row.
    rows: int64 [V], row of T that each visual token is written to.
    source: int64 [V], its row in the table; None where it is 0, 1, 2, ... over the view rows (nothing to gather).
    resamples: (mode, source int64 [K, H, W], (H', W')) for each group of maps of one shape.
    text_rows: int64 [T - V], the other rows, whose token ids are embedded.
    """

    rows: Tensor
    text_rows: Tensor
    source: Tensor | None
    resamples: tuple[tuple[PoolMode, Tensor, tuple[int, int]], ...]
    patches: int

    def to(self, device: torch.device | str) -> Layout:
        return Layout(
            self.rows.to(device),
            self.text_rows.to(device),
            None if self.source is None else self.source.to(device),
            tuple((mode, source.to(device), size) for mode, source, size in self.resamples),
            self.patches,
        )


@dataclass(frozen=True)
class Features:
    """Tower features that were computed before. rows [N, P, E] of all views; those of `missing`, int64 [M], are still to be filled.

    keys: names of the missing ones, by which who computes them may keep them.
    """

    rows: Tensor
    missing: Tensor
    keys: tuple[str, ...] = ()

    def to(self, device: torch.device | str) -> Features:
        return Features(self.rows.to(device), self.missing.to(device), self.keys)


@dataclass(frozen=True)
class PackedBatch:
    """S sequences in one row of T tokens.

    token_ids int64 [T]; positions int64 [T]; cu_seqlens int32 [S+1]; prefix int32 [S, 2]: rows of an earlier sequence that
    sequence s attends to besides its own (empty range for most).  views [N, 3, H, W] uint8 (normalised on the device) or
    float (already normalised), None without pictures; layout as above.  features: where given, `views` are those that it lacks.
    label_rows int64 [L]: rows whose next token is supervised (a row may appear twice), labels int64 [L]: those next tokens,
    label_seq int64 [L]: the sequence each belongs to.
    needed_rows int64 [R]: the sorted, distinct rows whose last hidden state is read (label rows in training, the last row of
    each sequence in prefill); label_index int64 [L] finds label_rows in it.
    split: a models.sequence.Split where this is one device's part of a row; cu_seqlens and prefix are then those of the whole.
    """

    token_ids: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    prefix: Tensor
    views: Tensor | None
    layout: Layout | None
    label_rows: Tensor
    labels: Tensor
    label_seq: Tensor
    needed_rows: Tensor
    label_index: Tensor
    features: Features | None = None
    split: Any = None

    @property
    def num_tokens(self) -> int:
        return self.token_ids.shape[0]

    @property
    def num_sequences(self) -> int:
        return self.cu_seqlens.shape[0] - 1

    @property
    def num_views(self) -> int:
        """Those whose features are known already among them."""
        if self.features is not None:
            return self.features.rows.shape[0]
        return 0 if self.views is None else self.views.shape[0]

    def to(self, device: torch.device | str) -> PackedBatch:
        moved: dict[str, Any] = {
            field.name: value.to(device) if hasattr(value := getattr(self, field.name), "to") else value
            for field in dataclasses.fields(self)
        }
        return PackedBatch(**moved)


Needed = Literal["labels", "last", "all"]


def pack(
    samples: Sequence[Sample],
    views: Tensor | None = None,
    prefix_of: Sequence[int | None] | None = None,
    needed: Needed = "labels",
    features: Features | None = None,
) -> PackedBatch:
    """Join samples into one row; all on the CPU.

    views: [N, 3, H, W], the samples' views in order, or of them only those that `features` lacks.  prefix_of[s]: an earlier sample
    whose rows s continues: positions go on from its length, and its last row predicts the first token of s.  needed: rows whose output
    is read: the label rows, the last row of every sequence, or all.  Raises ValueError when views do not match.
    """
    parents = list(prefix_of) if prefix_of is not None else [None] * len(samples)
    lengths = np.array([len(sample) for sample in samples], dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    expected = sum(sample.views for sample in samples)
    given = 0 if views is None else views.shape[0]
    if features is not None:
        if given != len(features.missing):
            raise ValueError(f"{len(features.missing)} features are missing but {given} views were given")
        given = features.rows.shape[0]
    if expected != given:
        raise ValueError(f"the samples take {expected} views but {given} were given")

    positions, prefix, label_rows, labels, label_seq = [], [], [], [], []
    for s, sample in enumerate(samples):
        parent = parents[s]
        if parent is not None and (parent >= s or parents[parent] is not None):
            raise ValueError(f"sequence {s} names sequence {parent} as its prefix: it must be earlier and have no prefix itself")
        offset = 0 if parent is None else int(lengths[parent])
        positions.append(np.arange(offset, offset + len(sample)))
        prefix.append((0, 0) if parent is None else (starts[parent], starts[parent + 1]))
        if sample.labels is not None:
            supervised = np.flatnonzero(sample.labels != IGNORE)
            rows = starts[s] + supervised - 1
            if parent is not None:
                rows[supervised == 0] = starts[parent + 1] - 1
            keep = np.full(len(rows), True) if parent is not None else supervised > 0
            label_rows.append(rows[keep])
            labels.append(sample.labels[supervised[keep]])
            label_seq.append(np.full(int(keep.sum()), s))

    rows = _concat(label_rows)
    if needed == "labels":
        needed_rows, label_index = np.unique(rows, return_inverse=True)
    else:
        needed_rows = np.arange(starts[-1]) if needed == "all" else starts[1:][lengths > 0] - 1
        label_index = np.searchsorted(needed_rows, rows)

    return PackedBatch(
        token_ids=_tensor(_concat([sample.token_ids for sample in samples])),
        positions=_tensor(_concat(positions)),
        cu_seqlens=torch.from_numpy(starts.astype(np.int32)),
        prefix=torch.from_numpy(np.array(prefix, dtype=np.int32).reshape(-1, 2)),
        views=views,
        layout=_layout(samples, starts) if expected else None,
        label_rows=_tensor(rows),
        labels=_tensor(_concat(labels)),
        label_seq=_tensor(_concat(label_seq)),
        needed_rows=_tensor(needed_rows),
        label_index=_tensor(label_index.reshape(-1)),
        features=features,
    )


def _layout(samples: Sequence[Sample], starts: np.ndarray) -> Layout:
    visuals = [
        (visual, starts[s] + row) for s, sample in enumerate(samples) for visual, row in zip(sample.visuals, sample.starts, strict=True)
    ]
    patches = {visual.patches for visual, _ in visuals}
    assert len(patches) == 1, patches
    (P,) = patches

    # Maps of one mode and shape are resampled in one call: table rows go group by group, then in order of appearance.
    groups: dict[tuple, list[tuple[int, int, np.ndarray]]] = {}
    view = 0
    for i, (visual, _) in enumerate(visuals):
        for j, resample in enumerate(visual.resamples):
            key = (resample.mode, resample.source.shape[1:], resample.size)
            groups.setdefault(key, []).append((i, j, resample.source + view * P))
        view += visual.views
    table = view * P
    base: dict[tuple[int, int], int] = {}
    merged = []
    for (mode, _, size), members in groups.items():
        for i, j, source in members:
            base[i, j] = table
            table += source.shape[0] * size[0] * size[1]
        merged.append((mode, _tensor(np.concatenate([source for _, _, source in members])), size))

    rows, sources, view = [], [], 0
    for i, (visual, row) in enumerate(visuals):
        own = np.concatenate(
            [np.arange(visual.views * P) + view * P]
            + [np.arange(resample.tokens) + base[i, j] for j, resample in enumerate(visual.resamples)]
            + [[table]]  # the newline, reached by index NEWLINE = -1
        )
        rows.append(np.arange(row, row + visual.tokens))
        sources.append(own[visual.source])
        view += visual.views
    source = _concat(sources)
    identity = not merged and len(source) == view * P and bool((source == np.arange(view * P)).all())
    row = _concat(rows)
    is_text = np.full(starts[-1], True)
    is_text[row] = False
    return Layout(_tensor(row), _tensor(np.flatnonzero(is_text)), None if identity else _tensor(source), tuple(merged), P)


def _concat(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64))
