"""Training steps of transformers on the same samples, from what most people run to the best that a loop by hand gets out of it.

padded: what Trainer does: one batch [B, T] padded to its longest sample, a mask, logits of every row.
padded, label rows: the same with the head on the rows that have a label alone, in chunks that are computed again in the backward pass:
    TRL's `chunked_nll`.
padded, Liger: what Trainer does with use_liger_kernel; its kernels are Triton's, so on a CPU there is no such side.
padding-free: one row [1, T], position_ids that restart, no cache (with one, samples would see each other), and the loss of the label rows.
padding-free, compiled: the same with the decoder's layers under torch.compile.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.baselines import kernels
from llava_fast.batch import IGNORE

Samples = list[tuple[Tensor, Tensor]]  # ids and labels [T] of each
CHUNK = 256  # label rows whose logits exist at a time, as TRL has it
PADDED, LABEL_ROWS, LIGER = "transformers padded", "transformers padded, label rows", "transformers padded, Liger"
PADDING_FREE, COMPILED = "transformers padding-free", "transformers padding-free, compiled"


@dataclass(frozen=True)
class Side:
    """batch: a step's inputs from samples and normalised views.  loss: of the model and that.  prepare: done once to the model."""

    batch: Callable[[Samples, Tensor | None], dict[str, Any]]
    loss: Callable[[Any, dict[str, Any]], Tensor]
    prepare: Callable[[Any], object] = lambda model: None


def padded_batch(rows: Samples, pixels: Tensor | None) -> dict[str, Any]:
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORE)
    for b, (own, wanted) in enumerate(rows):
        ids[b, : len(own)], mask[b, : len(own)], labels[b, : len(own)] = own, 1, wanted
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "pixel_values": pixels}


def padded_loss(model: Any, batch: dict[str, Any]) -> Tensor:
    return model(**batch, use_cache=False).loss


def label_rows_batch(rows: Samples, pixels: Tensor | None) -> dict[str, Any]:
    """label_rows: of the flattened batch, the rows before those with a label."""
    made = padded_batch(rows, pixels)
    labels = made.pop("labels")
    labels[:, 0] = IGNORE  # no row predicts it
    at = (labels.flatten() != IGNORE).nonzero()[:, 0]
    return {"model": made, "label_rows": at - 1, "labels": labels.flatten()[at]}


def label_rows_loss(model: Any, batch: dict[str, Any]) -> Tensor:
    hidden = model.model(**batch["model"], use_cache=False).last_hidden_state.flatten(0, 1)[batch["label_rows"]]
    return kernels.chunked_loss(hidden, model.lm_head.weight, batch["labels"], CHUNK)


def padding_free_batch(rows: Samples, pixels: Tensor | None) -> dict[str, Any]:
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
    return kernels.label_rows_loss(hidden[batch["label_rows"]], model.lm_head.weight, batch["labels"])


def compile_layers(model: Any) -> None:
    """For rows of any length, as packing makes them: one graph, not one a length."""
    for layer in model.model.language_model.layers:
        layer.compile(dynamic=True)


def use_liger(model: Any) -> None:
    """What Trainer calls for use_liger_kernel=True."""
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    _apply_liger_kernel_to_instance(model=model)


SIDES = {
    PADDED: Side(padded_batch, padded_loss),
    LABEL_ROWS: Side(label_rows_batch, label_rows_loss),
    LIGER: Side(padded_batch, padded_loss, use_liger),
    PADDING_FREE: Side(padding_free_batch, padding_free_loss),
    COMPILED: Side(padding_free_batch, padding_free_loss, compile_layers),
}


def why_absent(side: str, device: str) -> str | None:
    """Why a side cannot run on this device, None where it can."""
    if side != LIGER:
        return None
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger_kernel is not installed"
    return "its kernels are Triton's and need a GPU" if device == "cpu" else None
