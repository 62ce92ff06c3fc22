"""Training steps of transformers on the same samples, the two ways that people write them.

padded: what Trainer does: one batch [B, T] padded to its longest sample, a mask, logits of every row.
padding_free: the best that a loop by hand gets out of it: one row [1, T], position_ids that restart, no cache (with one, samples would see
each other), and the loss of the label rows alone.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llava_fast.batch import IGNORE


def padded_batch(rows: list[tuple[Tensor, Tensor]], pixels: Tensor | None) -> dict[str, Any]:
    """From ids and labels [T] of each sample."""
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORE)
    for b, (own, wanted) in enumerate(rows):
        ids[b, : len(own)], mask[b, : len(own)], labels[b, : len(own)] = own, 1, wanted
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "pixel_values": pixels}


def padded_loss(model: Any, batch: dict[str, Any]) -> Tensor:
    return model(**batch, use_cache=False).loss


def padding_free_batch(rows: list[tuple[Tensor, Tensor]], pixels: Tensor | None) -> dict[str, Any]:
    """label_rows and labels are made beforehand: a first token has no row that predicts it."""
    ids = torch.cat([own for own, _ in rows])
    wanted = torch.cat([torch.cat([labels.new_full((1,), IGNORE), labels[1:]]) for _, labels in rows])
    at = (wanted != IGNORE).nonzero()[:, 0]
    positions = torch.cat([torch.arange(len(own)) for own, _ in rows])
    return {
        "model": {"input_ids": ids[None], "position_ids": positions[None], "pixel_values": pixels},
        "label_rows": at - 1,
        "labels": wanted[at],
    }


def padding_free_loss(model: Any, batch: dict[str, Any]) -> Tensor:
    hidden = model.model(**batch["model"], use_cache=False).last_hidden_state[0]
    return F.cross_entropy(model.lm_head(hidden[batch["label_rows"]]), batch["labels"])
