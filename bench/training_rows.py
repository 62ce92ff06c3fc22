"""Rows of the training benchmark from what its processes measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from pytest import approx

from bench.memory import Measured, median_of
from bench.paired import OURS
from bench.training_steps import length, padding_waste, shapes
from llava_fast.limits import Limits


def check_losses(runs: Mapping[str, list[Measured]]) -> None:
    """Every process takes the same steps, some sides fewer; weights of different orders of summation drift apart by less than this."""
    expected = max((run.report["losses"] for measured in runs.values() for run in measured), key=len)
    for side, measured in runs.items():
        for run in measured:
            losses = run.report["losses"]
            assert losses == approx(expected[: len(losses)], rel=1e-4), f"{side} trains something else: {losses} {expected}"


def of_sides(runs: Mapping[str, list[Measured]], tokens: int) -> dict[str, dict[str, float]]:
    """What each side's processes measured, for `record_sides`; tokens: real ones of a step."""
    sides = {}
    for side, measured in runs.items():
        seconds, anon = median_of(measured, "step_s"), median_of(measured, "anon")
        sides[side] = {"step_s": seconds, "tokens_per_s": tokens / seconds, "anon_bytes": anon}
    return sides


def rates(runs: Mapping[str, list[Measured]], limits: Callable[[str], Limits]) -> dict[str, float]:
    """Operations that the model's definition needs, a second, and their share of the limit: MFU."""
    rate = runs[OURS][0].report["operations"] / median_of(runs[OURS], "step_s")
    return {"gflops": rate / 1e9, "of_limit": rate / ((limits("cpu").fma_fp32_gflops or math.nan) * 1e9)}


def facts(row: str, layers: int) -> dict[str, Any]:
    lengths = [length(shape) for shape in shapes(row)]
    return {"layers": layers, "tokens": sum(lengths), "samples": len(lengths), "padding_waste": padding_waste(lengths, len(lengths))}
