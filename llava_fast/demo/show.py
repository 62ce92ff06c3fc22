"""The demo's pictures and its closing tables."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console
from rich.table import Table

from llava_fast.demo.scenes import HEDGE, SCENARIOS, SIDE, TASKS, Question

COLOURS = {"align": "#b8c4d0", "sft": "#7fa8d1", "interleave": "#3b82c4", "dpo": "#1f4e7a"}  # by stage


def draw_answers(asked: Sequence[Question], answers: Sequence[str], right: Sequence[bool], target: Path) -> None:
    """A sheet of held-out questions with their answers: two of each task, a wrong one among them where there is one."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(TASKS), 2, figsize=(11, 1.75 * len(TASKS)), layout="constrained")
    tasks = list(dict.fromkeys(question.task for question in asked))
    for row, task in zip(axes, tasks, strict=True):
        own = sorted((i for i, question in enumerate(asked) if question.task == task), key=lambda i: right[i])
        for axis, i in zip(row, (own[-1], own[0]), strict=True):
            question = asked[i]
            shown = question.pictures
            if len(shown) == 1:  # beside it, what the base view alone shows of it
                shown = (*shown, shown[0].resize((SIDE, SIDE), Image.Resampling.BICUBIC))
            axis.imshow(_strip(shown), interpolation="nearest")
            axis.axis("off")
            axis.set_title(f"{question.scenario}: {question.text}", fontsize=9, loc="left")
            verdict = answers[i] if right[i] else f"{answers[i]}   (should be: {question.answer})"
            colour = "#1a7f37" if right[i] else "#cf222e"
            axis.text(0, -0.06, textwrap.fill(verdict, 70), transform=axis.transAxes, va="top", fontsize=10, color=colour, weight="bold")
    figure.savefig(target, dpi=110, facecolor="white")
    pyplot.close(figure)


def _strip(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures beside each other, enlarged to one height."""
    height, gap = 4 * SIDE, 8
    shown = [picture.resize((height, height), Image.Resampling.NEAREST) for picture in pictures]
    strip = Image.new("RGB", (4 * height + 3 * gap, height), "white")
    for i, picture in enumerate(shown):
        strip.paste(picture, (i * (height + gap), 0))
    return strip


def draw_stages(stages: Mapping[str, Mapping[str, Any]], target: Path) -> None:
    """What each stage changed, on held-out data: captions, accuracy by scenario, the preference."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(13, 3.6), width_ratios=(2, 9, 4.5), layout="constrained")
    before, after = stages["interleave"], stages["dpo"]

    captions = [stages["decoder"]["captions"], stages["align"]["captions"]]
    _bars(axes[0], [0, 1], captions, 0.6, ["#d0d0d0", COLOURS["align"]])
    axes[0].set_xticks([0, 1], ["random\nprojector", "after\nalign"])
    axes[0].set_title("captions right", loc="left", fontsize=10)

    for number, (stage, colour) in enumerate(COLOURS.items()):
        places = [group + (number - 1.5) * 0.21 for group in range(len(SCENARIOS))]
        _bars(axes[1], places, [stages[stage]["scenarios"][scenario] for scenario in SCENARIOS], 0.19, [colour] * len(SCENARIOS), stage)
    axes[1].set_xticks(range(len(SCENARIOS)), SCENARIOS)
    axes[1].set_title("answers right, by scenario, after", loc="left", fontsize=10)
    axes[1].legend(ncols=4, frameon=False, fontsize=9, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2)

    shares = {"before dpo": [after["preferred_before"], before["hedged"]], "after dpo": [after["preferred"], after["hedged"]]}
    for (label, own), place, stage in zip(shares.items(), (-0.2, 0.2), ("interleave", "dpo"), strict=True):
        _bars(axes[2], [place, 1 + place], own, 0.36, [COLOURS[stage]] * 2, label)
    axes[2].set_xticks([0, 1], ["pairs with the better\nanswer likelier", f"answers that end\nwith “{HEDGE}”"])
    axes[2].set_title("preference", loc="left", fontsize=10)
    axes[2].legend(ncols=2, frameon=False, fontsize=9, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2)

    for axis in axes:
        axis.set_ylim(0, 1.12)
        axis.set_yticks([0, 0.5, 1], ["0", "50 %", "100 %"])
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(target, dpi=110, facecolor="white")
    pyplot.close(figure)


def _bars(axis: Any, places: Sequence[float], shares: Sequence[float], width: float, colours: Sequence[str], label: str = "") -> None:
    drawn = axis.bar(places, shares, width, color=colours, label=label)
    axis.bar_label(drawn, [f"{share:.0%}" for share in shares], fontsize=7.5, padding=1)


def show(console: Console, summary: dict[str, Any], out: Path) -> None:
    stages = summary["stages"]
    table = Table("after stage", "steps", "time", "captions", *SCENARIOS)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, figures in stages.items():
        shares = [figures.get("captions"), *(figures.get("scenarios", {}).get(scenario) for scenario in SCENARIOS)]
        cells = ["" if share is None else f"{share:.0%}" for share in shares]
        table.add_row(name, str(figures["steps"]), f"{figures['seconds']:.0f} s", *cells)
    console.print(table)
    before, after = stages["interleave"], stages["dpo"]
    console.print(
        f"dpo, on pairs it has not seen: the better answer is the likelier one in {after['preferred_before']:.0%} before, "
        f"{after['preferred']:.0%} after; answers that end with '{HEDGE}': {before['hedged']:.0%} before, {after['hedged']:.0%} after",
        markup=False,
        highlight=False,
    )
    table = Table("at the end", "questions", "accuracy", "chance", "by task")
    for row in summary["scenarios"]:
        tasks = ", ".join(f"{task} {share:.0%}" for task, share in row["tasks"].items())
        table.add_row(row["scenario"], str(row["questions"]), f"{row['accuracy']:.1%}", f"{row['chance']:.1%}", tasks)
    console.print(table)
    spent, speed = sum(summary["seconds"].values()), stages["interleave"]["tokens_per_second"]
    agreed = f"{summary['agree_with_transformers']} of {summary['compared_with_transformers']} un-pooled answers"
    for line in (
        f"{spent:.0f} s ({os.cpu_count()} cores), {speed:,} tokens/s in training, {summary['answers_per_second']:,} answers/s",
        f"the same checkpoint in transformers: {agreed} agree token for token",
        f"checkpoint: {summary['checkpoint']}   figures: {out / 'results.json'}",
        f"pictures: {out / 'answers.png'} (questions and answers), {out / 'stages.png'} (what each stage changed)",
    ):
        console.print(line, markup=False, soft_wrap=True)
