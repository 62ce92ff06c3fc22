"""Floating-point operations of a row, forward and backward, from the configuration and the true sizes: what MFU and balance count.

A multiply-add is two. Counted are the products that the model's definition needs: of padding, recomputation and the head on rows without
labels there is none, nor of a tower whose features are known already. Attention's backward pass is four products of the forward's two (a
kernel that makes the scores again does a fifth, which is its own affair). Norms, activations, the optimiser: nothing.

Shape letters: T rows, R needed rows, L labels, N views, P patches, V vocabulary; seen: keys that a set of rows attends to, summed.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from llava_fast.batch import PackedBatch
from llava_fast.config import LlavaConfig
from llava_fast.training.config import PARTS

LABEL_SHARE = 0.037  # of M4-shaped tokens; a guess for rows whose labels are not known


@dataclass(frozen=True)
class Work:
    """The sizes of a row. tokens T, views N: in the tower, shown: in the projector (more, where features are known), projected: view rows
    that meet its second product, needed R, labels L; seen: keys of all T rows together; needed_seen: of the needed ones."""

    tokens: int
    views: int
    shown: int
    projected: int
    needed: int
    labels: int
    seen: int
    needed_seen: int


def work_of(batch: PackedBatch, patches: int) -> Work:
    """The sizes of a packed row on the CPU. A row sees its sequence's prefix and its own sequence up to itself: positions + 1 keys."""
    shown, features = batch.num_views, batch.features
    # Of a picture that a row shows twice the missing features are made once.
    views = shown if features is None else len(set(features.keys))
    seen = batch.positions + 1
    pooled = batch.layout is not None and batch.layout.source is not None and all(mode != "max" for mode, _, _ in batch.layout.resamples)
    projected = batch.layout.rows.shape[0] if pooled and batch.layout is not None else shown * patches
    return Work(
        batch.num_tokens,
        views,
        shown,
        projected,
        batch.needed_rows.shape[0],
        batch.labels.shape[0],
        int(seen.sum()),
        int(seen[batch.needed_rows].sum()),
    )


def work_of_sizes(
    patches: int,
    lengths: Sequence[int] | np.ndarray,
    views: int = 0,
    labels: int | None = None,
    prefixes: Sequence[int] | np.ndarray | None = None,
) -> Work:
    """The sizes of a row before it is made. lengths: tokens of each sequence; prefixes: tokens before each that it shares with an earlier
    one; labels: None for a guess. Labels are taken to lie anywhere in their sequence."""
    own = np.asarray(lengths, dtype=np.int64)
    before = np.zeros_like(own) if prefixes is None else np.asarray(prefixes, dtype=np.int64)
    tokens, seen = int(own.sum()), int((own * (own + 1) // 2 + own * before).sum())
    labels = min(tokens, max(1, round(tokens * LABEL_SHARE))) if labels is None else labels
    return Work(tokens, views, views, views * patches, labels, labels, seen, round(seen * min(1.0, labels / max(tokens, 1))))


def row_flops(
    config: LlavaConfig,
    row: PackedBatch | Sequence[int] | np.ndarray,
    views: int = 0,
    labels: int | None = None,
    prefixes: Sequence[int] | np.ndarray | None = None,
    trained: Collection[str] = PARTS,
    adapted: Collection[str] = (),
    reference: bool = False,
) -> float:
    """Operations of a training step on one row: a packed one, or the lengths of its sequences and its views (see `work_of_sizes`).

    trained: parts whose weights have gradients.  adapted: parts with adapters: gradients flow through their weights, which have none.
    reference: whether the step runs the row once more without gradients, as preferences do whose reference is the model without its
    adapters; of a tower that does not learn both have the same features.
    Raises ValueError for a part that is none.
    """
    for part in (*trained, *adapted):
        if part not in PARTS:
            raise ValueError(f"parts are {', '.join(PARTS)}, got {part!r}")
    work = work_of(row, config.patches) if isinstance(row, PackedBatch) else work_of_sizes(config.patches, row, views, labels, prefixes)
    step = flops(config, work, trained, adapted)
    if not reference:
        return step
    again = work if "vision_tower" in (*trained, *adapted) else replace(work, views=0)
    return step + flops(config, again, trained=())


def flops(config: LlavaConfig, work: Work, trained: Collection[str] = PARTS, adapted: Collection[str] = ()) -> float:
    """Forward once; backward once more for each product's input that leads to something trained, and for each trained weight."""
    learning = {*trained, *adapted}
    tower_learns = "vision_tower" in learning and work.views > 0
    projector_learns = tower_learns or ("projector" in learning and work.shown > 0)
    decoder_learns = projector_learns or "decoder" in learning

    def cost(forward: float, part: str, learns: bool, inputs: bool = True) -> float:
        """Of products with weights of a part; inputs: whether the gradient of what they multiply is wanted."""
        return forward * (1 + (learns and inputs) + (learns and part in trained))

    tower, tower_attention = _tower(config, work)
    patch = 2.0 * work.views * config.vision.grid**2 * 3 * config.vision.patch_size**2 * config.vision.width
    first, second = _projector(config, work)
    decoder, decoder_attention, head = _decoder(config, work)
    return (
        cost(patch, "vision_tower", tower_learns, inputs=False)
        + cost(tower, "vision_tower", tower_learns)
        + tower_attention * (3 if tower_learns else 1)
        + cost(first, "projector", projector_learns, inputs=tower_learns)
        + cost(second, "projector", projector_learns)
        + cost(decoder + head, "decoder", decoder_learns)
        + decoder_attention * (3 if decoder_learns else 1)
    )


def _tower(config: LlavaConfig, work: Work) -> tuple[float, float]:
    """Products with weights, and attention; heads of 72 count 72."""
    vision = config.vision
    rows, layers = work.views * vision.positions, config.executed_layers
    products = 2.0 * rows * layers * (4 * vision.width**2 + 2 * vision.width * vision.mlp_width)
    return products, 4.0 * rows * layers * vision.positions * vision.width


def _projector(config: LlavaConfig, work: Work) -> tuple[float, float]:
    features, width = config.vision.width * len(config.feature_layers), config.decoder.width
    first = 2.0 * work.shown * config.patches * features * width
    return first, 2.0 * work.projected * width**2 if config.projector == "mlp2x_gelu" else 0.0


def _decoder(config: LlavaConfig, work: Work) -> tuple[float, float, float]:
    """Products of the layers, attention, the head. The last layer makes keys and values of all rows, and the rest of the needed ones."""
    c = config.decoder
    attended = c.heads * c.head_dim
    kv = 2 * c.width * c.kv_heads * c.head_dim
    rest = 2 * c.width * attended + 3 * c.width * c.mlp_width  # q, o and the MLP
    products = 2.0 * ((c.layers - 1) * work.tokens * (kv + rest) + work.tokens * kv + work.needed * rest)
    attention = 4.0 * attended * ((c.layers - 1) * work.seen + work.needed_seen)
    return products, attention, 2.0 * work.labels * c.width * c.vocab_size


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 operations a second of a GPU whose data sheet says, None for others: the denominator of MFU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAKS.items() if part in name), None)


_PEAKS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12}  # data sheets, without sparsity
