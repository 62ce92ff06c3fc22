"""Timing of functions in turns: B C A B C A ..., so that a drift of the machine meets all; ratios are taken round by round."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llava_fast.limits import Limits, seconds

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


def in_turns(
    sides: Mapping[str, Callable[[], object]],
    repeat: Callable[..., object],
    *,
    budget: float,
    least: int,
    device: str = "cpu",
    calls: int | Mapping[str, int] = 1,
    warm: bool = False,
) -> dict[str, list[float]]:
    """Seconds of each side's rounds, ours last in each: `least` (2 or more) to 100, as many as fit `budget` seconds.

    A side is a function that makes `calls` calls, or as many as `calls` has of it: the seconds are of one. warm: all ran before. The first
    round tells how many fit; repeat(ours, setup=rivals, rounds=n) runs the others (pytest-benchmark's `pedantic`).
    """
    if OURS not in sides or least < 2:
        raise ValueError(f"expected {OURS!r} among the sides and 2 rounds at the least, got {list(sides)} and {least}")
    times: dict[str, list[float]] = {name: [] for name in sides}
    each = {name: calls if isinstance(calls, int) else calls[name] for name in sides}

    def ours() -> None:
        times[OURS].append(seconds(sides[OURS], device) / each[OURS])

    def rivals() -> None:
        for name, rival in sides.items():
            if name != OURS:
                times[name].append(seconds(rival, device) / each[name])

    for run in () if warm else sides.values():
        run()
    rivals()
    ours()
    fit = int(budget / sum(each[name] * took for name, (took,) in times.items()))
    repeat(ours, setup=rivals, rounds=max(least, min(100, fit)) - 1)
    return times


def row_of_times(name: str, times: Mapping[str, Sequence[float]], among: Sequence[str] = (), **named: Any) -> dict[str, Any]:
    """A measurement of what `in_turns` timed: `row_of_sides` at 'ms', with the ratio and its quartiles taken round by round.

    among: the baselines that count for the ratio, all if there are none.
    """
    medians = {side: {"ms": statistics.median(each) * 1e3} for side, each in times.items()}
    row = row_of_sides(name, {side: medians[side] for side in (OURS, *(among or [side for side in times if side != OURS]))}, "ms", **named)
    del row["ratio_ms"]  # of the medians
    return {**row, "sides": medians, **Paired(tuple(times[OURS]), tuple(times[row["baseline"]])).summary()}


def of_limits(
    ms: float,
    machine: Limits,
    *,
    bytes_moved: float | None = None,
    bytes_read: float | None = None,
    operations: float | None = None,
    limit: float | None = None,
) -> dict[str, float]:
    """The rate of a call of `ms`, and its share of the machine's limit: how much of its time is the least that it could take.

    bytes_moved: at the bandwidth of a copy.  bytes_read: at that of reading; with bytes_moved those of them that are read, and the slower
    of the two counts.  operations: at `limit` operations a second.
    """
    found: dict[str, float] = {}
    if (moved := bytes_moved or bytes_read) is not None:
        least = max((bytes_moved or 0.0) / machine.copy_gbs, (bytes_read or 0.0) / machine.read_gbs) / 1e6
        found |= {"gbs": moved / ms / 1e6, "of_limit": least / ms}
    if operations is not None and limit is not None:
        found["gflops"] = operations / ms / 1e6
        found["of_limit"] = found["gflops"] * 1e9 / limit
    return found


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
