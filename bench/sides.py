"""Sides of a benchmark of the whole model, compared before they are timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from bench.full_size import relative_error
from bench.paired import OURS

SDPA = "transformers sdpa"
SAME = 1e-4  # relative, of fp32 sums in another order
Call = Callable[[], Tensor]


@dataclass
class Sides:
    """same: ours and transformers' that give its answer. others: other programs and narrower numbers, and what each may be off."""

    same: dict[str, Call]
    others: dict[str, tuple[Call, float]] = field(default_factory=dict)


def compare(sides: Sides, own_bound: float = SAME) -> tuple[dict[str, Call], dict[str, float], dict[str, float]]:
    """The sides that may be timed, each side's error against transformers' answer, and the bounds of those that are void. Warms all up."""
    truth = sides.same[SDPA]()
    calls, errors, void = dict(sides.same), {SDPA: 0.0}, {}
    for name, call in sides.same.items():
        if name != SDPA:
            errors[name] = relative_error(call(), truth)
            assert errors[name] < (own_bound if name == OURS else SAME), f"{name} is off by {errors[name]:.2g}"
    for name, (call, bound) in sides.others.items():
        errors[name] = relative_error(call(), truth)
        if errors[name] < bound:
            calls[name] = call
        else:
            void[name] = bound
    return calls, errors, void
