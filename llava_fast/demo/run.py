"""`llava-fast demo`: generate data, train from nothing by every stage, measure each on held-out questions, compare with transformers."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from llava_fast.demo.measure import answer, is_right, score, transformers_answers
from llava_fast.demo.scenes import SCENARIOS, questions
from llava_fast.demo.show import draw_answers, draw_stages, show
from llava_fast.demo.stages import HELD_OUT, STAGES, run_stage, scaled

NEEDED = 0.9  # accuracy in every scenario, held-out preferences, and answers without a hedge
ALIGNED = 0.75  # captions; with a random projector none is right


def run(out: Path, seed: int = 0, scale: float = 1.0) -> int:
    """Run the demo in `out`; 0 where every stage did what it is for and transformers agrees, else 1. Started again after Ctrl-C, it goes
    on where it was.

    Writes seed-<seed>/<stage>/ (transformers directories), answers.png, stages.png and results.json.  scale: of the data.
    """
    console = Console()
    folder = out / f"seed-{seed}"
    known = folder / "stages.json"
    figures: dict[str, dict[str, Any]] = {}
    if known.is_file():
        kept = json.loads(known.read_text())
        if kept.get("made by") == made_by(scale):
            figures = kept["stages"]
        else:  # other data, or other code of the demo's: its stages are not this one's
            console.print(f"{folder} holds another version's stages: they are made anew", markup=False, highlight=False, soft_wrap=True)
            for name in ("data", "fresh", *(stage.name for stage in STAGES)):
                shutil.rmtree(folder / name, ignore_errors=True)
    held_out = questions(scaled(HELD_OUT, scale), seed, "held out")
    for number, stage in enumerate(STAGES):
        title = f"stage {number + 1} of {len(STAGES)}, {stage.name}: {stage.what}"
        if stage.name in figures:
            console.print(f"{title}: done before", markup=False, highlight=False, soft_wrap=True)
            continue
        console.print(title, style="bold", markup=False, highlight=False, soft_wrap=True)
        folder.mkdir(parents=True, exist_ok=True)
        keep(known, figures, scale)
        figures[stage.name] = run_stage(number, folder, seed, scale)
        keep(known, figures, scale)

    console.print(f"answering {len(held_out)} held-out questions", highlight=False)
    trained = folder / STAGES[-1].name
    start = time.perf_counter()
    completions = answer(trained, held_out)
    answering = time.perf_counter() - start
    answers = [completion.text.strip() for completion in completions]
    right = [is_right(question, given) for question, given in zip(held_out, answers, strict=True)]

    start = time.perf_counter()
    compared = [i for i, question in enumerate(held_out) if not question.is_video]
    theirs = transformers_answers(trained, [held_out[i] for i in compared])
    differing = [i for i, ids in zip(compared, theirs, strict=True) if ids != completions[i].token_ids]
    comparing = time.perf_counter() - start

    draw_answers(held_out, answers, right, out / "answers.png")
    draw_stages(figures, out / "stages.png")
    summary = {
        "seed": seed,
        "scenarios": [score(held_out, right, scenario) for scenario in SCENARIOS],
        "stages": figures,
        "answers_per_second": round(len(held_out) / answering, 1),
        "agree_with_transformers": len(compared) - len(differing),
        "compared_with_transformers": len(compared),
        "seconds": {name: figures[name]["seconds"] for name in figures}
        | {"answering": round(answering, 1), "comparing": round(comparing, 1)},
        "checkpoint": str(trained),
    }
    (out / "results.json").write_text(json.dumps(summary, indent=1) + "\n")
    show(console, summary, out)
    found = faults(summary)
    if differing:
        found.append(f"transformers answers {len(differing)} questions otherwise, the first of them number {differing[0]}")
    for fault in found:
        console.print(fault, style="red", markup=False)
    return 1 if found else 0


def made_by(scale: float) -> str:
    """What a stage's weights depend on besides the seed: the demo's sources and the scale."""
    sources = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    return f"{hashlib.sha256(sources).hexdigest()[:16]} at {scale:g}"


def keep(file: Path, figures: dict[str, dict[str, Any]], scale: float) -> None:
    file.with_suffix(".partial").write_text(json.dumps({"made by": made_by(scale), "stages": figures}, indent=1))
    os.replace(file.with_suffix(".partial"), file)


def faults(summary: dict[str, Any]) -> list[str]:
    stages = summary["stages"]
    checked = {row["scenario"]: row["accuracy"] for row in summary["scenarios"]}
    checked |= {"held-out preferences after dpo": stages["dpo"]["preferred"], "answers without a hedge": 1 - stages["dpo"]["hedged"]}
    found = [f"{name}: {share:.1%}, {NEEDED:.0%} are needed" for name, share in checked.items() if share < NEEDED]
    aligned = stages["align"]
    found += [f"captions after align: {aligned['captions']:.1%}, {ALIGNED:.0%} are needed"] if aligned["captions"] < ALIGNED else []
    return found + ([] if aligned["untouched"] else ["align has changed tower or decoder"])
