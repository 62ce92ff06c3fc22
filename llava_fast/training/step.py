"""One optimiser step over packed rows: parameter groups, learning rate, gradients in fp32, clipping, AdamW."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from llava_fast.training.batches import Row
from llava_fast.training.config import TrainConfig


def part_of(name: str) -> str:
    """'vision_tower', 'projector' or 'decoder' for a parameter name; the decoder is everything else, as upstream."""
    if name.startswith("vision_tower."):
        return "vision_tower"
    return "projector" if name.startswith("multi_modal_projector.") else "decoder"


def decays(name: str) -> bool:
    """Weight decay is for everything but biases and norms (CLIP's first norm is called pre_layrnorm)."""
    return not name.endswith("bias") and "norm" not in ".".join(name.split(".")[-2:])


def lr_factor(step: int, total: int, warmup_ratio: float, schedule: str) -> float:
    """Share of the peak learning rate at `step` (from 0), equal to transformers' get_scheduler with ceil(total * warmup_ratio) steps of
    warm-up; its first warm-up step has a rate of 0."""
    warmup = math.ceil(total * warmup_ratio)
    if step < warmup:
        return step / warmup
    done = (step - warmup) / max(1, total - warmup)
    if schedule == "cosine":
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * done)))
    return max(0.0, 1.0 - done) if schedule == "linear" else 1.0


@dataclass
class Trained:
    """The trained parameters of a model, and what the optimiser works on.

    working: name -> the model's own parameter.  masters: name -> the fp32 tensor that is optimised; the parameter itself in fp32 runs.
    """

    working: dict[str, nn.Parameter]
    masters: dict[str, Tensor]

    @torch.no_grad()
    def publish(self) -> None:
        """Write the masters into the model."""
        for name, parameter in self.working.items():
            if self.masters[name] is not parameter:
                parameter.copy_(self.masters[name])


def prepare_parameters(model: nn.Module, config: TrainConfig, precision: str) -> Trained:
    """Freeze what has no learning rate; with precision 'bf16' turn the model into bf16 over fp32 master weights.

    In bf16 each gradient is added to its master's in fp32 as soon as it is ready, and freed: sums over several rows keep their bits.
    Raises ValueError when nothing is left to train.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(config.part_lr(part_of(name)) is not None)
    working = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not working:
        raise ValueError("nothing to train: every parameter is frozen")
    if precision == "fp32":
        return Trained(working, dict(working))
    masters = {name: parameter.detach() for name, parameter in working.items()}  # keeps the fp32 storage; no second copy is made
    model.to(torch.bfloat16)
    for name, parameter in working.items():
        parameter.register_post_accumulate_grad_hook(_add_to(masters[name]))
    return Trained(working, masters)


def _add_to(master: Tensor) -> Any:
    def hook(parameter: Tensor) -> None:
        assert parameter.grad is not None
        if master.grad is None:
            master.grad = parameter.grad.float()
        else:
            master.grad.add_(parameter.grad)
        parameter.grad = None

    return hook


def make_optimizer(masters: dict[str, Tensor], config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with one group for each part and each of decay / no decay; `peak_lr` of a group is what the schedule scales."""
    groups: dict[tuple[str, bool], list[Tensor]] = {}
    for name, master in masters.items():
        groups.setdefault((part_of(name), decays(name)), []).append(master)
    return torch.optim.AdamW(
        [
            {
                "params": members,
                "part": part,
                "peak_lr": config.part_lr(part),
                "lr": config.part_lr(part),
                "weight_decay": config.weight_decay if decay else 0.0,
            }
            for (part, decay), members in groups.items()
        ],
        betas=config.betas,
        eps=config.eps,
        fused=True,  # one pass over each parameter, on the CPU too
    )


class Objective(Protocol):
    """What is minimised: the sum over a step's rows of what each adds, over the sum of their weights."""

    def weight(self, row: Row) -> int:
        """How much the row counts: labels, or pairs."""
        ...

    def __call__(self, model: Any, row: Row) -> tuple[Tensor, dict[str, Tensor]]:
        """The row's sum, and sums of what else is to be reported (weighted alike), for a row on the model's device."""
        ...


class LabelLoss:
    """Cross-entropy of the labels."""

    def weight(self, row: Row) -> int:
        return row.batch.labels.shape[0]

    def __call__(self, model: Any, row: Row) -> tuple[Tensor, dict[str, Tensor]]:
        return model.loss(row.batch, reduction="sum"), {}


def train_step(
    model: Any,
    trained: Trained,
    optimizer: torch.optim.Optimizer,
    rows: Sequence[Row],
    factor: float,
    clip: float | None,
    device: torch.device | str,
    objective: Objective,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """One optimiser step; returns (loss, gradient norm before clipping, what else the objective reports), 0-d tensors on the device.

    loss = sum of the rows' losses / weight of the whole step (its labels), so that how the samples are spread over rows changes nothing.
    """
    weight = sum(objective.weight(row) for row in rows)
    loss = torch.zeros((), device=device)
    others: dict[str, Tensor] = {}
    for row in rows:
        row_sum, sums = objective(model, row.to(device))
        row_loss = row_sum / weight
        if row_loss.requires_grad:  # not where the decoder is frozen and the row has no picture
            row_loss.backward()
        loss += row_loss.detach()
        for name, value in sums.items():
            others[name] = others.get(name, 0) + value.detach() / weight
    with_gradient = [master for master in trained.masters.values() if master.grad is not None]
    norm = torch.nn.utils.get_total_norm([master.grad for master in with_gradient if master.grad is not None])
    if clip is not None:
        torch.nn.utils.clip_grads_with_norm_(with_gradient, clip, norm)
    set_lr(optimizer, factor)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    trained.publish()
    return loss, norm, others


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


def count(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)
