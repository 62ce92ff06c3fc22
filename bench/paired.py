"""Timing of two functions in turns: B A B A ..., so that a drift of the machine meets both; the ratio is taken pair by pair."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llava_fast.limits import seconds


@dataclass(frozen=True)
class Paired:
    """Seconds of each round; ratio is baseline / ours (above 1: ours is faster), low and high its quartiles."""

    ours: tuple[float, ...]
    baseline: tuple[float, ...]

    @property
    def ratios(self) -> list[float]:
        return [b / a for a, b in zip(self.ours, self.baseline, strict=True)]

    def summary(self) -> dict[str, Any]:
        ratios = self.ratios
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
        return {
            "ours_ms": statistics.median(self.ours) * 1e3,
            "baseline_ms": statistics.median(self.baseline) * 1e3,
            "ratio": statistics.median(ratios),
            "ratio_low": low,
            "ratio_high": high,
            "rounds": len(ratios),
        }


def rounds_for(ours: Callable[[], object], baseline: Callable[[], object], budget: float, device: str) -> int:
    """Rounds that fit `budget` seconds, 5 to 100; warms both functions up."""
    ours(), baseline()
    pair = seconds(ours, device) + seconds(baseline, device)
    return max(5, min(100, int(budget / pair)))
