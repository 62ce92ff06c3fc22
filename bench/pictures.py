"""The report's pictures: shares of the limit, ratios, and curves of several sides; readable on white and on black."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.paired import OURS

GREY = "#808080"  # text and axes
DOT, MEDIAN = "#3b82c4", "#d9822b"
SIDES = ("#7f8fa6", "#8c6bb1", "#2a9d8f", "#c94f6d", "#a58b3d", "#5b8c5a")  # the baselines' curves; ours is MEDIAN's colour, and thicker

Result = Mapping[str, Any]


@contextmanager
def figure_to(target: Path, width: float, height: float, columns: int = 1) -> Any:
    """Axes of a figure that is written to `target` at the end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(1, columns, figsize=(width, height), layout="constrained", squeeze=False)
    yield list(grid[0])
    for axis in grid[0]:
        axis.title.set_color(GREY)
        axis.tick_params(which="both", colors=GREY, labelsize=9)
        axis.xaxis.label.set_color(GREY)
        for spine in axis.spines.values():
            spine.set_color(GREY)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=110, transparent=True, metadata={"Software": None})
    pyplot.close(figure)


# --- dots -------------------------------------------------------------------------------------------------------------------------


def groups(known: Iterable[Result], key: str) -> dict[str, list[float]]:
    """Measurements that have `key`, by file and test: what is in brackets differs within a group."""
    found: dict[str, list[float]] = {}
    for result in known:
        for m in result["measurements"]:
            if key in m:
                test = re.sub(r"\[.*", "", m["name"]).removeprefix("test_")
                found.setdefault(f"{result['name']}: {test}".replace("_", " "), []).append(m[key])
    return found


def draw_dots(found: Mapping[str, list[float]], title: str, target: Path, share: bool) -> None:
    """A dot a measurement, a line a group, a bar at the median; sorted by it."""
    order = sorted(found, key=lambda name: statistics.median(found[name]))
    with figure_to(target, 9, 0.6 + 0.32 * len(order)) as (axis,):
        for y, name in enumerate(order):
            axis.scatter(found[name], [y] * len(found[name]), s=22, color=DOT, alpha=0.7, linewidths=0)
            axis.plot([statistics.median(found[name])], [y], "|", markersize=16, markeredgewidth=2, color=MEDIAN)
        axis.axvline(1.0, color=GREY, linewidth=1)
        axis.set_yticks(range(len(order)), order)
        axis.set_xscale("linear" if share else "log")
        if share:
            axis.set_xlim(0, None)
            axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        else:
            axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
        axis.set_title(title, fontsize=11, loc="left")


# --- curves -----------------------------------------------------------------------------------------------------------------------


@dataclass
class Curve:
    """A quantity over an axis, by side: {side: [(at, value), ...]}, sorted."""

    axis: str
    sides: dict[str, dict[str, list[tuple[float, float]]]] = field(default_factory=dict)  # quantity -> side -> points


def curve_name(m: Mapping[str, Any]) -> str:
    """The measurement's name without its place on the axis: 'test_decode[bf16-1500]' at 1500 is 'decode bf16'."""
    at = re.escape(f"{m['at']:.15g}")
    name = re.sub(rf"(?<![\d.]){at}(?![\d.])", "", m["name"].removeprefix("test_"))
    return re.sub(r"[\W_]+", " ", name).strip()


def curves(result: Result) -> dict[str, Curve]:
    """Of two points or more, by name; those of other axes under one name are told apart by theirs."""
    found: dict[str, Curve] = {}
    for m in sorted((m for m in result["measurements"] if m.get("axis")), key=lambda m: m["at"]):
        curve = found.setdefault(f"{curve_name(m)} over {m['axis'].replace('_', ' ')}", Curve(m["axis"]))
        for side, values in m["sides"].items():
            for quantity, value in values.items():
                curve.sides.setdefault(quantity, {}).setdefault(side, []).append((m["at"], value))
    return {name: curve for name, curve in found.items() if any(len(p) > 1 for own in curve.sides.values() for p in own.values())}


def draw_curve(curve: Curve, title: str, target: Path) -> None:
    """A panel a quantity, a line a side; logarithmic where the values span more than a factor of eight."""
    with figure_to(target, 4.6 * len(curve.sides), 3.4, len(curve.sides)) as axes:
        names = list(dict.fromkeys(side for own in curve.sides.values() for side in own if side != OURS))
        for axis, (quantity, own) in zip(axes, curve.sides.items(), strict=True):
            for side, points in own.items():
                style = {"color": MEDIAN, "linewidth": 2.5} if side == OURS else {"color": SIDES[names.index(side) % len(SIDES)]}
                axis.plot(*zip(*points, strict=True), marker="o", markersize=4, label=side, **style)
            places, values = ([p[i] for points in own.values() for p in points] for i in (0, 1))
            if max(places) > 8 * min(places) > 0:
                axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
            axis.set_xticks(sorted(set(places)), minor=False)
            if max(values) > 8 * min(values) > 0:
                axis.set_yscale("log")
            else:
                axis.set_ylim(0, None)
            axis.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
            axis.set_title(quantity.replace("_", " "), fontsize=10, loc="left")
            axis.set_xlabel(curve.axis.replace("_", " "))
        axes[0].legend(fontsize=8, frameon=False, labelcolor=GREY, title=title, title_fontproperties={"size": 8}).get_title().set_color(
            GREY
        )
