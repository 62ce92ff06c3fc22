"""One optimiser step over packed rows: what is trained and how it is stored, parameter groups, learning rate, clipping, AdamW."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from llava_fast.training.batches import Row
from llava_fast.training.config import TrainConfig
from llava_fast.training.rounding import RoundedAdamW

BACKEND = "inductor"  # of torch.compile
PLAIN = (Tensor, nn.Parameter)  # not sharded


def part_of(name: str) -> str:
    """'vision_tower', 'projector' or 'decoder' for a parameter name; the decoder is everything else, as upstream."""
    if name.startswith("vision_tower."):
        return "vision_tower"
    return "projector" if name.startswith("multi_modal_projector.") else "decoder"


def is_adapter(name: str) -> bool:
    """Whether a parameter is LoRA's (`models.layers.LowRank`)."""
    return ".lora." in name


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
    """Freeze what has no learning rate, and of a decoder with adapters all but these; set how blocks run; with precision 'bf16' turn the
    model into bf16 over fp32 master weights.

    In bf16 each gradient is added to its master's in fp32 as soon as it is ready, and freed: sums over several rows keep their bits. In
    'bf16_pure' the model itself is the master.
    Raises ValueError when nothing is left to train, and for checkpointing or compile with a model that has no blocks.
    """
    adapted = any(is_adapter(name) and part_of(name) == "decoder" for name, _ in model.named_parameters())
    for name, parameter in model.named_parameters():
        frozen = adapted and part_of(name) == "decoder" and not is_adapter(name)
        parameter.requires_grad_(config.part_lr(part_of(name)) is not None and not frozen)
    working = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not working:
        raise ValueError("nothing to train: every parameter is frozen")
    prepare_blocks(model, config)
    if precision == "bf16_pure":
        model.to(torch.bfloat16)
    if precision in ("fp32", "bf16_pure"):
        return Trained(working, dict(working))
    masters = {name: parameter.detach() for name, parameter in working.items()}  # keeps the fp32 storage; no second copy is made
    model.to(torch.bfloat16)
    for name, parameter in working.items():
        parameter.register_post_accumulate_grad_hook(_add_to(masters[name]))
    return Trained(working, masters)


def prepare_blocks(model: nn.Module, config: TrainConfig) -> None:
    """Checkpointing and compilation of the decoder's and the tower's layers, as configured."""
    stacks = [module for module in model.modules() if hasattr(module, "checkpointing")]
    if not stacks and (config.checkpointing != "none" or config.compile):
        raise ValueError(f"checkpointing and compile are for models with blocks, got a {type(model).__name__}")
    for stack in stacks:
        stack.checkpointing = config.checkpointing  # type: ignore[assignment]
        if config.compile:
            layers = next(module for module in stack.modules() if isinstance(module, nn.ModuleList))
            for layer in layers:
                layer.compile(backend=BACKEND, dynamic=True)  # rows differ in length


def _add_to(master: Tensor) -> Any:
    def hook(parameter: Tensor) -> None:
        assert parameter.grad is not None
        if master.grad is None:
            master.grad = parameter.grad.float()
        else:
            master.grad.add_(parameter.grad)
        parameter.grad = None

    return hook


def make_optimizer(masters: dict[str, Tensor], config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW with one group for each part and each of decay / no decay; `peak_lr` of a group is what the schedule scales.

    Over bf16 masters with unbiased rounding; as configured with moments in 8 bits.
    """
    groups: dict[tuple[str, bool], list[Tensor]] = {}
    for name, master in masters.items():
        groups.setdefault((part_of(name), decays(name)), []).append(master)
    given = [
        {
            "params": members,
            "part": part,
            "peak_lr": config.part_lr(part),
            "lr": config.part_lr(part),
            "weight_decay": config.weight_decay if decay else 0.0,
        }
        for (part, decay), members in groups.items()
    ]
    if config.precision == "bf16_pure":
        return RoundedAdamW(given, config.betas, config.eps, config.seed)
    if config.optimizer == "adamw_8bit":
        return _eight_bit()(given, betas=config.betas, eps=config.eps)
    return torch.optim.AdamW(given, betas=config.betas, eps=config.eps, fused=True)  # one pass over each parameter, on the CPU too


def _eight_bit() -> Any:
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ValueError(f"optimizer adamw_8bit needs bitsandbytes ({error}): pip install llava_fast[train]") from error
    return AdamW8bit


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
    weight: float | None = None,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """One optimiser step; returns (loss, gradient norm before clipping, what else the objective reports), 0-d tensors on the device.

    loss = sum of the rows' losses / weight of the whole step (its labels), so that how the samples are spread over rows changes nothing.
    weight: of the rows of all ranks, whose gradients the backward pass sums; the loss is this rank's part of it. None: of these rows.
    Rows without samples only stand in: they run, and add nothing.
    """
    weight = sum(objective.weight(row) for row in rows) if weight is None else weight
    loss = torch.zeros((), device=device)
    others: dict[str, Tensor] = {}
    for row in rows:
        counts = 1.0 if row.indices else 0.0
        with _rows_apart(model, trained):
            row_sum, sums = objective(model, row.to(device))
            row_loss = row_sum / weight * counts
            if row_loss.requires_grad:  # not where the decoder is frozen and the row has no picture
                row_loss.backward()
        loss += row_loss.detach()
        for name, value in sums.items():
            others[name] = others.get(name, 0) + value.detach() / weight * counts
    with_gradient = [master for master in trained.masters.values() if master.grad is not None]
    norm = torch.nn.utils.get_total_norm([master.grad for master in with_gradient if master.grad is not None])
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    if clip is not None:
        torch.nn.utils.clip_grads_with_norm_(with_gradient, clip, norm)
    set_lr(optimizer, factor)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    trained.publish()
    return loss, norm, others


@contextmanager
def _rows_apart(model: Any, trained: Trained) -> Iterator[None]:
    """For one forward and backward pass on a CPU: the gradient of looked-up embeddings is added where that of the head lies.

    A head that is the embedding table has a gradient of the table's size. Autograd would make a second one of zeros for a few thousand
    rows, a third for the sum, and fault in their pages: 1.6 of 5.3 s a step of 2,407 tokens at 152,000 x 1024.
    """
    name = "language_model.embed_tokens.weight"
    if getattr(model, "lm_head", True) is not None or name not in trained.masters or type(trained.masters[name]) not in PLAIN:
        yield
        return
    master = trained.masters[name]
    model.looked_up = [] if master.device.type == "cpu" else None
    try:
        yield
        for ids, rows in model.looked_up or ():
            if rows.grad is not None:
                if master.grad is None:
                    master.grad = torch.zeros_like(master)
                master.grad.index_add_(0, ids, rows.grad.to(master.grad.dtype))
    finally:
        model.looked_up = None


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


def count(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)
