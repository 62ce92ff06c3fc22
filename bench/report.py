"""Tables and pictures from the result files: `python -m bench.report` rewrites docs/performance.md with its pictures, and README's table.

Nothing in them is typed by hand but the labels here. The newest file of a name counts; a line without a measurement says so.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import goals, results
from llava_fast.limits import Limits, describe

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- made by `make report` -->", "<!-- end -->"
GREY = "#808080"  # text and axes: readable on white and on black

Result = dict[str, Any]


@dataclass(frozen=True)
class Line:
    """A line of README's table: a quantity of a measurement of a result file, ours against the baseline's.

    quantity: what follows ours_, baseline_ and ratio_ in the file; its unit is its last part.
    """

    label: str
    result: str
    measurement: str
    quantity: str = "ms"


LINES = (
    Line("two photographs and a question, to the first token", "first_token", "first_token_05b_two_photographs", "first_token_s"),
    Line("the whole process: peak memory (anonymous)", "first_token", "first_token_05b_two_photographs", "anon_bytes"),
    Line("load a bf16 checkpoint", "first_token", "first_token_05b_two_photographs", "load_s"),
    Line("a token at 1,500 tokens of context, the same answer", "model", "test_decode[bf16]"),
    Line("a token with int8 weights and a bf16 cache", "model", "test_decode[int8]"),
    Line("a token with int4 weights and a bf16 cache", "model", "test_decode[int4]"),
    Line("vision tower, four pictures", "model", "test_vision_tower[4]"),
    Line("prompt of 1,500 tokens", "model", "test_prefill"),
    Line(
        "a second question on the same four photographs, to the first token",
        "second_question",
        "second_question_four_photographs_as_used",
        "s",
    ),
    Line("the same, against a cache kept and cropped by hand", "second_question", "second_question_four_photographs_by_hand", "s"),
    Line("32 requests shaped like M4-Instruct, 64 new tokens each \\*", "engine", "many_requests_m4", "total_s"),
    Line("their peak memory (anonymous) \\*", "engine", "many_requests_m4", "anon_bytes"),
    Line("8 requests of one picture, 256 new tokens each \\*\\*", "engine", "many_requests_long", "total_s"),
    Line("loss of 8,192 rows at 4 % labels, with its gradients", "linear_cross_entropy", "test_linear_cross_entropy_at_4_percent_labels"),
    Line("its memory beyond the weight's gradient", "linear_cross_entropy", "linear_cross_entropy_memory", "mb"),
    Line("attention of a training batch of 8, and its gradient", "varlen_attention", "test_pack_forward_and_backward[16]"),
    Line("a training step of 2,407 tokens, against the padded one \\*\\*\\*", "training_padded", "training_padded_2407_4layers", "step_s"),
    Line("its peak memory (anonymous) \\*\\*\\*", "training_padded", "training_padded_2407_4layers", "anon_bytes"),
    Line("the same, against a loop by hand \\*\\*\\*", "training_2407", "training_padding_free_2407_4layers", "step_s"),
    Line("its peak memory (anonymous) \\*\\*\\*", "training_2407", "training_padding_free_2407_4layers", "anon_bytes"),
    Line("a step of 5,523 tokens, likewise \\*\\*\\*", "training_5523", "training_padding_free_5523_4layers", "step_s"),
    Line("the same with a decoder of 12 layers", "training_5523_12layers", "training_padding_free_5523_12layers", "step_s"),
)


def newest(folder: Path) -> dict[str, dict[str, Result]]:
    """device kind -> name -> the newest result of that name."""
    found: dict[str, dict[str, Result]] = {}
    for result in sorted((results.load(path) for path in folder.rglob("*.json")), key=lambda result: result["date"]):
        found.setdefault(result["device"]["kind"], {})[result["name"]] = result
    return found


def table(known: Mapping[str, Result]) -> str:
    """README's: what, ours, transformers', how many times better."""
    rows = ["| 0.5b architecture on a CPU | llava_fast | transformers | |", "|---|---|---|---|"]
    return "\n".join(rows + [_row(line, _find(known, line)) for line in LINES])


def _find(known: Mapping[str, Result], line: Line) -> Mapping[str, Any] | None:
    measurements = known.get(line.result, {"measurements": []})["measurements"]
    return next((m for m in measurements if m["name"] == line.measurement and f"ours_{line.quantity}" in m), None)


def _row(line: Line, m: Mapping[str, Any] | None) -> str:
    if m is None:
        return f"| {line.label} | {goals.NOT_MEASURED} | | |"
    ratio = m.get(f"ratio_{line.quantity}", m.get("ratio"))
    assert ratio is not None, line
    unit = line.quantity.rpartition("_")[2]
    ours, theirs = (with_unit(m[f"{side}_{line.quantity}"], unit) for side in ("ours", "baseline"))
    return f"| {line.label} | {ours} | {theirs} | {times(ratio)} |"


def with_unit(value: float, unit: str) -> str:
    """Two or three digits in a unit a reader knows; value in ms, s, bytes or mb."""
    if unit == "mb":
        return with_unit(value * 1e6, "bytes")
    if unit == "bytes":
        return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.0f} MB"
    seconds = value / 1e3 if unit == "ms" else value
    if seconds >= 1:
        return f"{seconds:.0f} s" if seconds >= 20 else f"{seconds:.1f} s"
    return f"{seconds * 1e3:.0f} ms" if seconds >= 0.02 else f"{seconds * 1e3:.2g} ms"


def times(ratio: float) -> str:
    return f"{ratio:.0f}x" if ratio >= 10 else f"{ratio:.1f}x"


# --- docs/performance.md ----------------------------------------------------------------------------------------------------------


def page(known: Mapping[str, Mapping[str, Result]]) -> str:
    """The goals, then everything that was measured, a section a file."""
    parts = [
        "# What was measured",
        "Rendered by `make report` from the files in [bench/results/](../bench/results/). Ratios are baseline over ours, medians of runs "
        "in turns; the share is of the limit that the same run measured first.",
        *goals.section(known.get("cpu", {})),
    ]
    for kind in ("cpu", "cuda"):
        parts.append(f"## {'CPU' if kind == 'cpu' else 'GPU'}")
        if kind not in known:
            parts.append("Not measured.")
            continue
        if kind == "cpu":
            parts += ["![Share of the limit by op](limits.png)", "![Times faster than the baseline, by benchmark](ratios.png)"]
        parts += [part for name in sorted(known[kind]) for part in section(known[kind][name])]
    return "\n\n".join(parts) + "\n"


def section(result: Result) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version)
    commit = f"commit {result['commit']}{' with changes' if result['dirty'] else ''}"
    where = f"{result['device']['name']}, {result['date'][:10]}, {commit}; {versions}."
    limits = describe(Limits(**result["limits"]))
    timed = [m for m in result["measurements"] if "ours_ms" in m and "ratio" in m]
    others = [m for m in result["measurements"] if m not in timed]
    parts = [f"### {result['name'].replace('_', ' ')}", f"{where} {limits[0].upper()}{limits[1:]}."]
    if timed:
        rows = ["| | ours | baseline | ratio | quartiles | rate | of the limit |", "|---|---|---|---|---|---|---|"]
        parts.append("\n".join(rows + [_timed(m) for m in timed]))
    for m in others:
        pairs = [(key.removeprefix("ratio_"), value) for key, value in m.items() if key.startswith("ratio_")]
        rows = ["| " + m["name"].replace("_", " ") + " | ours | baseline | ratio |", "|---|---|---|---|"]
        rows += [
            f"| {key.replace('_', ' ')} | {_plain(m['ours_' + key])} | {_plain(m['baseline_' + key])} | {value:.2f} |"
            for key, value in pairs
        ]
        if pairs:
            parts.append("\n".join(rows))
        else:
            shown = ", ".join(f"{key.replace('_', ' ')} {_plain(value)}" for key, value in m.items() if isinstance(value, (int, float)))
            parts.append(f"{m['name'].replace('_', ' ')}: {shown}.")
    return parts


def _timed(m: Mapping[str, Any]) -> str:
    rate = f"{m['gbs']:.1f} GB/s" if "gbs" in m else f"{m['gflops']:,.0f} GFLOP/s" if "gflops" in m else ""
    share = f"{m['of_limit']:.0%}" if "of_limit" in m else ""
    spread = f"{m['ratio_low']:.2f} to {m['ratio_high']:.2f}" if "ratio_low" in m else ""
    name = m["name"].removeprefix("test_").replace("_", " ")
    return f"| {name} | {m['ours_ms']:.3g} ms | {m['baseline_ms']:.3g} ms | {m['ratio']:.2f} | {spread} | {rate} | {share} |"


def _plain(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


# --- pictures ---------------------------------------------------------------------------------------------------------------------


def groups(known: Iterable[Result], key: str) -> dict[str, list[float]]:
    """Measurements that have `key`, by file and test: what is in brackets differs within a group."""
    found: dict[str, list[float]] = {}
    for result in known:
        for m in result["measurements"]:
            if key in m:
                test = re.sub(r"\[.*", "", m["name"]).removeprefix("test_")
                found.setdefault(f"{result['name']}: {test}".replace("_", " "), []).append(m[key])
    return found


def draw(found: Mapping[str, list[float]], title: str, target: Path, share: bool) -> None:
    """A dot a measurement, a line a group, a bar at the median; sorted by it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    order = sorted(found, key=lambda name: statistics.median(found[name]))
    figure, axis = pyplot.subplots(figsize=(9, 0.6 + 0.32 * len(order)), layout="constrained")
    for y, name in enumerate(order):
        axis.scatter(found[name], [y] * len(found[name]), s=22, color="#3b82c4", alpha=0.7, linewidths=0)
        axis.plot([statistics.median(found[name])], [y], "|", markersize=16, markeredgewidth=2, color="#d9822b")
    axis.axvline(1.0, color=GREY, linewidth=1)
    axis.set_yticks(range(len(order)), order)
    axis.set_xscale("linear" if share else "log")
    if share:
        axis.set_xlim(0, None)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    else:
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axis.set_title(title, color=GREY, fontsize=11, loc="left")
    axis.tick_params(colors=GREY, labelsize=9)
    for spine in axis.spines.values():
        spine.set_color(GREY)
    figure.savefig(target, dpi=110, transparent=True, metadata={"Software": None})
    pyplot.close(figure)


def put(text: str, made: str) -> str:
    """`text` with what is between the marks replaced. Raises ValueError where there are none."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"expected a part between {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{made}\n{END}{after}"


def main(root: Path = ROOT) -> None:
    known = newest(root / "bench" / "results")
    readme = root / "README.md"
    readme.write_text(put(readme.read_text(), table(known.get("cpu", {}))))
    (root / "docs" / "performance.md").write_text(page(known))
    if "cpu" in known:
        cpu = [known["cpu"][name] for name in sorted(known["cpu"])]
        draw(
            groups(cpu, "of_limit"),
            "share of the limit (bandwidth or fp32 FMA); a dot a shape",
            root / "docs" / "limits.png",
            True,
        )
        draw(groups(cpu, "ratio"), "times as fast as the baseline; a dot a shape", root / "docs" / "ratios.png", False)


if __name__ == "__main__":
    main()
