"""AdamW whose weights and moments are bf16 and nothing else, with unbiased rounding.

A step of 1e-5 on a weight of 0.1 is far below bf16's resolution of 4e-4: to nearest, it would be lost every time. Rounded up with a
probability that is the remainder's share of the gap, it arrives on average (arXiv 2010.06192). So are the moments: v decays by 0.1 % a
step, less than half a gap.
The random bits follow from the seed, the parameter's place and its step alone, so that a resumed run draws the same ones.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

CHUNK = 1 << 24  # values in fp32 at a time


def round_(target: Tensor, value: Tensor, generator: torch.Generator) -> None:
    """Write fp32 values to a bf16 tensor, each to one of its two neighbours, itself as the mean. What is not finite stays."""
    noise = torch.randint(0, 1 << 16, value.shape, dtype=torch.int32, device=value.device, generator=generator)
    bits = (value.view(torch.int32) + noise).bitwise_and_(-(1 << 16))
    target.copy_(torch.where(value.isfinite(), bits.view(torch.float32), value))  # the noise would make a zero of some NaNs


class RoundedAdamW(torch.optim.Optimizer):
    """torch.optim.AdamW's update in fp32, chunk by chunk, over bf16 parameters, gradients and moments."""

    def __init__(self, params: Iterable[Any], betas: tuple[float, float], eps: float, seed: int):
        super().__init__(params, {"lr": 0.0, "weight_decay": 0.0, "betas": betas, "eps": eps})
        self.seed = seed

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        place = 0
        for group in self.param_groups:
            for parameter in group["params"]:
                place += 1
                if parameter.grad is not None:
                    self._update(parameter, group, place)

    def _update(self, parameter: Tensor, group: dict[str, Any], place: int) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        step = int(state["step"])
        (beta1, beta2), lr = group["betas"], group["lr"]
        tensors = [_own(tensor) for tensor in (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])]
        generator = torch.Generator(tensors[0].device)
        generator.manual_seed(
            crc32(struct.pack("<3q", self.seed, place, step)) << 31 | crc32(struct.pack("<3q", step, self.seed, place)) >> 1
        )
        for weight, grad, mean, square in zip(*(tensor.view(-1).split(CHUNK) for tensor in tensors), strict=True):
            g, m, v, w = grad.float(), mean.float(), square.float(), weight.float()
            m.lerp_(g, 1 - beta1)
            v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            denominator = (v / (1 - beta2**step)).sqrt_().add_(group["eps"])
            w.mul_(1 - lr * group["weight_decay"]).addcdiv_(m, denominator, value=-lr / (1 - beta1**step))
            for target, value in ((mean, m), (square, v), (weight, w)):
                round_(target, value, generator)


def _own(tensor: Any) -> Tensor:
    """The part of a sharded tensor that is here."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
