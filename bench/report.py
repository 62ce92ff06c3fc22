"""Tables and pictures from the result files: `python -m bench.report` rewrites docs/performance.md with its pictures, and README's table.

Nothing in them is typed by hand but the labels here. The newest file of a name counts; a line without a measurement says so.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import goals, page, pictures, results
from bench.page import unit_of, with_unit
from llava_fast.profile import OpTime, Phase
from llava_fast.profile import draw as draw_profile

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- made by `make report` -->", "<!-- end -->"
DEMO_BEGIN, DEMO_END = "<!-- the demo, made by `make report` -->", "<!-- end of the demo -->"

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
    Line("load a bf16 checkpoint", "loading", "loading_bf16", "load_s"),
    Line("a token at 1,500 tokens of context, the same answer", "model", "test_decode[bf16]"),
    Line("a token with int8 weights and a bf16 cache", "model", "test_decode[int8]"),
    Line("a token with int4 weights and a bf16 cache", "model", "test_decode[int4]"),
    Line("vision tower, four pictures", "model", "test_vision_tower[4]"),
    Line("prompt of 1,500 tokens", "model", "test_prefill"),
    Line("a photograph of 12 megapixels, from JPEG to pixel values", "inputs", "test_picture[4000x3000-JPEG]"),
    Line("loss of 8,192 rows at 4 % labels, with its gradients", "linear_cross_entropy", "test_linear_cross_entropy_at_4_percent_labels"),
    Line("its memory beyond the weight's gradient", "linear_cross_entropy", "linear_cross_entropy_memory", "mb"),
    Line("attention of a training batch of 8, and its gradient", "varlen_attention", "test_pack_forward_and_backward[16]"),
    Line("a second question on the same four photographs \\*", "reuse", "second_question_4_layers_as_used", "s"),
    Line("the same, against a cache kept and cropped by hand \\*", "reuse", "second_question_4_layers_by_hand", "s"),
    Line("eight samples of one answer \\*", "reuse", "reuse_8_samples", "s"),
    Line("requests shaped like M4-Instruct from 8 clients, a second \\*", "serving", "serving_clients_8", "requests_per_s"),
    Line("1.6 such requests arriving a second: median to the first token \\*", "serving", "serving_rate_1.6", "first_token_p50_s"),
    Line("the same: 95th percentile between tokens \\*", "serving", "serving_rate_1.6", "inter_token_p95_ms"),
    Line("1,000 samples of several pictures \\*", "serving", "serving_cost_multi-image", "per_1000_samples_s"),
    Line("a training step of 2,407 tokens, against the padded one \\*", "training", "training_padded_2407_4layers", "step_s"),
    Line("its peak memory (anonymous) \\*", "training", "training_padded_2407_4layers", "anon_bytes"),
    Line("the same, against the best loop by hand \\*", "training", "training_padding_free_2407_4layers", "step_s"),
    Line("its peak memory (anonymous) \\*", "training", "training_padding_free_2407_4layers", "anon_bytes"),
    Line("a step of 5,523 tokens, likewise \\*", "training", "training_padding_free_5523_4layers", "step_s"),
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
    ours, theirs = (with_unit(m[f"{side}_{line.quantity}"], unit_of(line.quantity)) for side in ("ours", "baseline"))
    return f"| {line.label} | {ours} | {theirs}{rival(m)} | {times(ratio)} |"


def rival(m: Mapping[str, Any]) -> str:
    """Which baseline, where a measurement has several."""
    return f", {m['baseline'].removeprefix('transformers').strip(' ,')}" if len(m.get("sides", ())) > 2 else ""


def times(ratio: float) -> str:
    return f"{ratio:.0f}x" if ratio >= 10 else f"{ratio:.1f}x"


# What is measured, and keys of a seed's measurement before and after.
DEMO: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("`align`: captions word for word; the projector alone learns", ("captions_random_projector",), ("captions_aligned",)),
    ("`sft`, then `interleave`: all questions", ("accuracy_after_align",), ("accuracy_after_sft", "accuracy_after_interleave")),
    ("`dpo`: held-out pairs whose better answer is the likelier", ("preferred_before_dpo",), ("preferred_after_dpo",)),
    ('`dpo`: answers that end with ", I think"', ("hedged_before_dpo",), ("hedged_after_dpo",)),
    (
        "in the end: several pictures, video, 3D views, one picture",
        (),
        ("accuracy_multi-image", "accuracy_video", "accuracy_3D_views", "accuracy_one_picture"),
    ),
)


def demo_table(result: Result | None) -> str:
    """What the stages of `make demo` do on held-out data: means over the seeds, with the least seed's in brackets where it shows."""
    if result is None:
        return f"`make demo`: {goals.NOT_MEASURED}"
    rows = result["measurements"]

    def share(key: str) -> str:
        mean, least = (f"{value:.0%}" for value in (statistics.mean(row[key] for row in rows), min(row[key] for row in rows)))
        return mean if mean == least else f"{mean} ({least})"

    agree, compared = (sum(row[f"{key}_with_transformers"] for row in rows) for key in ("agree", "compared"))
    where = f"{result['device']['threads']} cores of the same machine, mean of {len(rows)} seed{'s' * (len(rows) > 1)} (the least)"
    lines = [f"| `make demo` on {where} | before | after |", "|---|---|---|"]
    lines += [f"| {what} | {', '.join(map(share, before))} | {', '.join(map(share, after))} |" for what, before, after in DEMO]
    lines += [f"| un-pooled answers that agree with transformers token for token | | {agree:,} of {compared:,} |"]
    return "\n".join([*lines, f"| seconds, data and measurements included | | {statistics.median(row['total_s'] for row in rows):.0f} |"])


def put(text: str, made: str, begin: str = BEGIN, end: str = END) -> str:
    """`text` with what is between the marks replaced. Raises ValueError where there are none."""
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"expected a part between {begin} and {end}")
    return f"{before}{begin}\n{made}\n{end}{after}"


def rendered(readme: str, cpu: Mapping[str, Result]) -> str:
    """README with its two tables."""
    return put(put(readme, table(cpu)), demo_table(cpu.get("demo")), DEMO_BEGIN, DEMO_END)


def main(root: Path = ROOT) -> None:
    known, docs = newest(root / "bench" / "results"), root / "docs"
    readme = root / "README.md"
    readme.write_text(rendered(readme.read_text(), known.get("cpu", {})))
    (docs / "performance.md").write_text(page.page(known))
    for old in (docs / "curves").glob("*.png"):
        old.unlink()
    every = [known[kind][name] for kind in known for name in sorted(known[kind])]
    for result in every:
        for name, curve in pictures.curves(result).items():
            pictures.draw_curve(curve, result["name"].replace("_", " "), docs / page.picture_of(result, name))
    if cpu := [result for result in every if result["device"]["kind"] == "cpu"]:
        limits = "share of the limit (bandwidth or fp32 FMA); a dot a shape"
        pictures.draw_dots(pictures.groups(cpu, "of_limit"), limits, docs / "limits.png", True)
        ratios = "times as fast as the baseline; a dot a shape"
        pictures.draw_dots(pictures.groups(cpu, "ratio"), ratios, docs / "ratios.png", False)
    if found := known.get("cpu", {}).get("profile"):
        phases = [Phase(m["name"], m["seconds"], tuple(OpTime(**op) for op in m["ops"])) for m in found["measurements"]]
        draw_profile(phases, docs / "profile.png")


if __name__ == "__main__":
    main()
