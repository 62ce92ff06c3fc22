"""Timing of functions in turns: B C A B C A ..., so that a drift of the machine meets all; ratios are taken round by round."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from llava_fast.limits import seconds

OURS = "llava_fast"


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


def rounds_for(ours: Callable[[], object], *baselines: Callable[[], object], budget: float, device: str, least: int = 5) -> int:
    """Rounds that fit `budget` seconds, `least` to 100; warms all functions up."""
    each = [ours, *baselines]
    for run in each:
        run()
    return max(least, min(100, int(budget / sum(seconds(run, device) for run in each))))


def strongest(sides: Mapping[str, Mapping[str, float]], by: str) -> str:
    """The baseline that is best at `by` ('..._per_s': the greatest, else the least). ValueError where there is none."""
    rivals = {name: values[by] for name, values in sides.items() if name != OURS and by in values}
    if not rivals or by not in sides.get(OURS, {}):
        raise ValueError(f"expected {OURS!r} and a baseline with {by!r}, got { ({name: list(values) for name, values in sides.items()}) }")
    return (max if by.endswith("_per_s") else min)(rivals, key=lambda name: rivals[name])


def row_of_sides(
    name: str,
    sides: Mapping[str, Mapping[str, float]],
    by: str,
    *,
    device: str = "cpu",
    axis: str | None = None,
    at: float | None = None,
    **facts: Any,
) -> dict[str, Any]:
    """A measurement of several sides: {'llava_fast': {'step_s': 1.0, 'anon_bytes': 2e9}, 'transformers padded': {...}, ...}.

    ours_, baseline_ and ratio_ are against the strongest baseline at `by`, for each quantity that both have; a ratio is above 1 where
    ours is better, in whichever direction better lies. axis and at make it a point of a curve over `axis`, a curve a side.
    """
    if (axis is None) != (at is None):
        raise ValueError(f"a point of a curve has an axis and a place on it, got axis={axis!r}, at={at!r}")
    rival = strongest(sides, by)
    row: dict[str, Any] = {"name": name, "device": device, "baseline": rival, "sides": {side: dict(sides[side]) for side in sides}}
    row |= {"axis": axis, "at": at} if axis is not None else {}
    for key in sides[OURS].keys() & sides[rival].keys():
        ours, theirs = sides[OURS][key], sides[rival][key]
        row |= {f"ours_{key}": ours, f"baseline_{key}": theirs, f"ratio_{key}": ours / theirs if key.endswith("_per_s") else theirs / ours}
    return row | facts
