"""docs/performance.md: the goals, then everything that was measured, a section a result file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bench import goals
from bench.paired import OURS
from bench.pictures import curve_name, curves
from llava_fast.limits import Limits, describe

Result = Mapping[str, Any]


def with_unit(value: float, unit: str) -> str:
    """Two or three digits in a unit a reader knows; value in ms, s, bytes or mb, as it is in any other."""
    if unit == "mb":
        return with_unit(value * 1e6, "bytes")
    if unit == "bytes":
        return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.0f} MB"
    if unit not in ("ms", "s"):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    seconds = value / 1e3 if unit == "ms" else value
    if seconds >= 1:
        return f"{seconds:,.0f} s" if seconds >= 20 else f"{seconds:.1f} s"
    return f"{seconds * 1e3:.0f} ms" if seconds >= 0.02 else f"{seconds * 1e3:.2g} ms"


def unit_of(quantity: str) -> str:
    """'step_s' is in s, 'tokens_per_s' in none that `with_unit` knows."""
    return "per_s" if quantity.endswith("_per_s") else quantity.rpartition("_")[2]


def words(name: str) -> str:
    return name.removeprefix("test_").replace("_", " ")


def page(known: Mapping[str, Mapping[str, Result]]) -> str:
    parts = [
        "# What was measured",
        "Rendered by `make report` from the files in [bench/results/](../bench/results/), the newest of each name. Ratios are against the "
        "strongest baseline of the row that gives the same answer, above 1 where llava_fast is better, medians of runs in turns; the share "
        "is of the limit that the same run measured first. Sides that give another answer (bf16, where the rest is fp32) are listed beside "
        "the others and do not count for a ratio; neither does OpenVINO, where it is installed. vLLM and SGLang: "
        "`python -m bench.baselines.servers` sends a running server the requests of the serving suite at the same times, and writes the "
        "same rows.",
        *goals.section(known),
    ]
    for kind in ("cpu", "cuda"):
        parts.append(f"## {'CPU' if kind == 'cpu' else 'GPU'}")
        if kind not in known:
            parts.append("Not measured.")
            continue
        if kind == "cpu":
            parts += ["![Share of the limit by op](limits.png)", "![Times faster than the baseline, by benchmark](ratios.png)"]
            parts += ["![Where the time goes](profile.png)"] if "profile" in known[kind] else []
        parts += [part for name in sorted(known[kind]) for part in section(known[kind][name])]
    return "\n\n".join(parts) + "\n"


def picture_of(result: Result, curve: str) -> str:
    """Its file under docs/."""
    return f"curves/{result['device']['kind']}-{result['name']}-{curve.replace(' ', '-')}.png"


def section(result: Result) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version)
    commit = f"commit {result['commit']}{' with changes' if result['dirty'] else ''}"
    where = f"{result['device']['name']}, {result['date'][:10]}, {commit}; {versions}."
    limits = describe(Limits(**result["limits"]))
    parts = [f"### {words(result['name'])}", f"{where} {limits[0].upper()}{limits[1:]}."]
    parts += [f"![{words(result['name'])}: {name}]({picture_of(result, name)})" for name in curves(result)]
    timed = [m for m in result["measurements"] if "ours_ms" in m and "ratio" in m]
    if timed:
        rows = ["| | ours | baseline | ratio | quartiles | rate | of the limit |", "|---|---|---|---|---|---|---|"]
        parts.append("\n".join(rows + [_timed(m) for m in timed]))
    others = [m for m in result["measurements"] if m not in timed]
    points = [m for m in others if m.get("axis")]
    for name in dict.fromkeys((curve_name(m), m["axis"]) for m in points):
        parts.append(_sides(name[0], [m for m in points if (curve_name(m), m["axis"]) == name]))
    for m in others:
        if m in points:
            continue
        pairs = [(key.removeprefix("ratio_"), value) for key, value in m.items() if key.startswith("ratio_")]
        if "ops" in m:
            parts.append(_profile(m))
        elif "sides" in m:
            parts.append(_sides(words(m["name"]), [m]))
        elif pairs:
            rows = [f"| {words(m['name'])} | ours | baseline | ratio |", "|---|---|---|---|"]
            for key, ratio in pairs:
                ours, theirs = (with_unit(m[f"{side}_{key}"], unit_of(key)) for side in ("ours", "baseline"))
                rows.append(f"| {words(key)} | {ours} | {theirs} | {ratio:.2f} |")
            parts.append("\n".join(rows))
        else:
            shown = [f"{words(key)} {with_unit(value, '')}" for key, value in m.items() if isinstance(value, (int, float))]
            parts.append(f"{words(m['name'])}: {', '.join(shown)}.")
    return parts


def _sides(name: str, measurements: Sequence[Mapping[str, Any]]) -> str:
    """A column a side, a line a quantity and place; the ratio is against the strongest."""
    sides = list(dict.fromkeys(side for m in measurements for side in m["sides"]))
    order: Iterable[str] = [OURS, *[side for side in sides if side != OURS]]
    rows = [f"| {name} | {' | '.join(order)} | ratio |", "|---" * (len(sides) + 2) + "|"]
    for m in measurements:
        place = f"{m['at']:,g} {words(m['axis'])}: " if m.get("axis") else ""
        for quantity in dict.fromkeys(key for side in m["sides"].values() for key in side):
            cells = [with_unit(m["sides"][s][quantity], unit_of(quantity)) if quantity in m["sides"].get(s, {}) else "" for s in order]
            ratio = f"{m['ratio_' + quantity]:.2f}" if f"ratio_{quantity}" in m else ""
            rows.append(f"| {place}{words(quantity)} | {' | '.join(cells)} | {ratio} |")
    return "\n".join(rows)


def _profile(m: Mapping[str, Any]) -> str:
    """The ops of a phase that take two hundredths of it or more."""
    rows = [f"| {m['name']}: {m['seconds'] * 1e3:,.0f} ms | calls | ms | share | of its limit | bound by |", "|---" * 6 + "|"]
    for op in m["ops"]:
        if op["seconds"] >= 0.02 * m["seconds"]:
            of_limit = f"{op['limit'] / op['seconds']:.0%}" if op["limit"] else ""
            share = f"{op['seconds'] / m['seconds']:.0%}"
            rows.append(f"| {op['name']} | {op['calls']} | {op['seconds'] * 1e3:,.1f} | {share} | {of_limit} | {op['bound']} |")
    return "\n".join(rows)


def _timed(m: Mapping[str, Any]) -> str:
    rate = f"{m['gbs']:.1f} GB/s" if "gbs" in m else f"{m['gflops']:,.0f} GFLOP/s" if "gflops" in m else ""
    share = f"{m['of_limit']:.0%}" if "of_limit" in m else ""
    spread = f"{m['ratio_low']:.2f} to {m['ratio_high']:.2f}" if "ratio_low" in m else ""
    others = [f"{side} {values['ms']:.3g}" for side, values in m.get("sides", {}).items() if side not in (OURS, m["baseline"])]
    rival = f" {m['baseline']}" if "baseline" in m else ""
    beside = f" ({', '.join(others)})" if others else ""
    cells = [
        words(m["name"]),
        f"{m['ours_ms']:.3g} ms",
        f"{m['baseline_ms']:.3g} ms{rival}{beside}",
        f"{m['ratio']:.2f}",
        spread,
        rate,
        share,
    ]
    return f"| {' | '.join(cells)} |"
