"""What weights, gradients and moments take on a device, known before any of them is there. Activations come on top.

Bytes a weight: its own, and where it is trained those of its master, its gradient and AdamW's two moments:

    precision                 own   master   gradient   moments
    fp32                      4     -        4          8 (adamw_8bit: 2)
    bf16                      2     4        4          8 (adamw_8bit: 2)
    bf16_pure                 2     -        2          4
    bf16, several processes   4     -        4          8            all over the number of processes; frozen: 2
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import torch

from llava_fast.config import LlavaConfig
from llava_fast.models.llava import Llava
from llava_fast.quantise import GROUPS
from llava_fast.training.config import TrainConfig
from llava_fast.training.lora import decoder_linears
from llava_fast.training.options import LoraOptions
from llava_fast.training.step import part_of

GIB = 2**30


@dataclass(frozen=True)
class Footprint:
    """Bytes a device. gathered: of a sharded model's blocks the whole weights, for as long as they run, and the whole gradients of one."""

    weights: int
    masters: int
    gradients: int
    moments: int
    gathered: int = 0

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


def footprint(model: LlavaConfig, config: TrainConfig, precision: str = "bf16", world: int = 1) -> Footprint:
    """precision: what config's 'auto' comes to.  world: processes with a device each."""
    with torch.device("meta"):
        bare = Llava(model)
    trained, frozen, tower, quantised = _counts(bare, config)
    own = 4 if precision == "fp32" else 2
    if world == 1:
        masters, gradients = (4, 4) if precision == "bf16" else (0, own)
        moments = 2 if config.optimizer == "adamw_8bit" else 2 * gradients
        return Footprint(own * (trained + frozen + tower) + quantised, masters * trained, gradients * trained, moments * trained)
    stored = 2 if precision == "bf16_pure" else 4
    parts = [stored * trained + own * frozen, stored * trained, 2 * stored * trained]
    weights, gradients, moments = (-(-part // world) for part in parts)
    blocks = sorted((sum(p.numel() for p in layer.parameters()) for layer in bare.language_model.layers), reverse=True)
    root = sum(p.numel() for p in bare.parameters()) - sum(p.numel() for p in bare.vision_tower.parameters()) - sum(blocks)
    learns = config.lora is None and config.part_lr("decoder") is not None
    gathered = own * (root + sum(blocks[:2])) + (own + 4) * learns * root
    return Footprint(weights + own * tower + quantised, 0, gradients, moments, gathered)


def _counts(model: Llava, config: TrainConfig) -> tuple[int, int, int, int]:
    """Weights that are trained, that are frozen (of the tower apart: it is never in parts), and bytes of quantised ones."""
    counts = {True: 0, False: 0}
    tower = quantised = 0
    lora = config.lora
    for name, parameter in model.named_parameters():
        part = part_of(name)
        learns = config.part_lr(part) is not None and not (lora is not None and part == "decoder")
        if part == "vision_tower" and not learns:
            tower += parameter.numel()
        else:
            counts[learns] += parameter.numel()
    for name, linear in decoder_linears(model) if lora is not None else ():
        assert lora is not None
        if name.rpartition(".")[2] in lora.targets:
            counts[True] += lora.r * (linear.in_features + linear.out_features)
        if lora.base is not None:
            counts[False] -= linear.weight.numel()
            groups = -(-linear.in_features // (GROUPS[lora.base] or linear.in_features))
            quantised += linear.weight.numel() // (2 if lora.base == "int4" else 1) + 4 * linear.out_features * groups
    return counts[True], counts[False], tower, quantised


def check_fits(model: LlavaConfig, config: TrainConfig, precision: str, world: int, capacity: int) -> None:
    """ValueError where what a step needs besides its activations is more than `capacity` bytes; it names what would take less."""
    needed = footprint(model, config, precision, world).total
    if needed <= capacity:
        return
    other = {
        "optimizer adamw_8bit": (replace(config, precision="auto", optimizer="adamw_8bit"), "bf16", 1),
        "precision bf16_pure": (replace(config, optimizer="adamw"), "bf16_pure", world),
        f"{8 * world} processes": (replace(config, optimizer="adamw"), precision, 8 * world),
    }
    if world > 1 or precision == "bf16_pure":
        del other["optimizer adamw_8bit"]
    if config.lora is None:
        other["lora"] = (replace(config, optimizer="adamw", lora=LoraOptions(), lr_vision_tower="frozen"), precision, world)
    else:
        other["lora.base int4"] = (replace(config, lora=replace(config.lora, base="int4")), precision, world)
    less = {name: footprint(model, *rest).total for name, rest in other.items()}
    fitting = [f"{name} {size / GIB:.1f} GiB" for name, size in less.items() if size <= capacity]
    raise ValueError(
        f"weights, gradients and moments take {needed / GIB:.1f} GiB of a device's {capacity / GIB:.1f}, and activations come on top; "
        + (f"what fits: {', '.join(fitting)}" if fitting else f"nor does it fit with {', '.join(less)}")
    )
