"""The demo's stages: what each is trained on, by which recipe, and what it changes on held-out data."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

import llava_fast as lf
from llava_fast.demo.measure import by_scenario, caption_accuracy, preferred, untouched
from llava_fast.demo.model import make_checkpoint, write_pairs, write_records
from llava_fast.demo.scenes import FRAMES, HEDGE, Question, in_words, questions, weave, where
from llava_fast.demo.tower import train_tower

HEDGED = 2 / 3  # of the mixture's answers end with HEDGE; the preference is for those that do not
TOLD = 3
HELD_OUT, CAPTIONS, PAIRS = 700, 300, 280  # that each stage is measured on

# Recipes are for models of billions of parameters and steps of a million tokens. At a million parameters learning rates are hundreds of
# times higher; four small rows from windows of 64 samples let every step meet every kind of question.
TINY: dict[str, Any] = {
    "lr": 2e-3,
    "betas": (0.9, 0.98),
    "warmup_ratio": 0.1,
    "tokens_per_row": 1152,
    "rows_per_step": 4,
    "packing_window": 64,
    "precision": "fp32",
    "save_every": 100,
    "keep": 1,
}
# The tower learns as fast as the rest, and the model is asked through its own chat template, as `llava-fast generate` and transformers do.
ASKED: dict[str, Any] = {"template": "hf", "lr_vision_tower": "lr", "inputs": {"num_frames": FRAMES}}


@dataclass(frozen=True)
class Stage:
    """recipe: of training/recipes.py; None: what comes before them.  count: records at full size.  fields: besides TINY."""

    name: str
    what: str
    count: int
    epochs: int = 1
    recipe: str | None = None
    fields: dict[str, Any] = field(default_factory=dict)


ALONE = {"rows_per_step": 2, "template": "hf", "lr_vision_tower": "frozen", "lr_projector": "frozen"}
STAGES = (
    Stage("tower", "a vision tower by itself: pictures against captions", 3000),
    Stage("decoder", "a decoder by itself: captions of pictures that are told in words", 10500, fields=ALONE),
    Stage(
        "align",
        "captions: the projector alone, between a tower and a decoder that know nothing of each other",
        3000,
        5,
        "align",
        {"rows_per_step": 2},
    ),
    Stage("sft", "questions on single pictures, cut into tiles", 2000, 2, "sft", ASKED),
    Stage("interleave", "questions on several pictures, videos, 3D views and single pictures", 7000, 2, "interleave", ASKED),
    # At 1e-4 the answers lose 0 to 3 %, at 3e-4 half of them (video 100 to 42 %).
    Stage("dpo", f"pairs: an answer is better without its '{HEDGE}'", 840, 1, "dpo", {**ASKED, "lr": 6e-5, "rows_per_step": 2}),
)


def run_stage(number: int, folder: Path, seed: int, scale: float = 1.0) -> dict[str, Any]:
    """Draw the data of a stage, train it on the one before and measure it; what was interrupted goes on. -> its figures."""
    start, stage, out = time.perf_counter(), STAGES[number], folder / STAGES[number].name
    if stage.name == "tower":
        return {**begin(stage, folder, seed, scale), "seconds": round(time.perf_counter() - start, 1)}
    before = folder / STAGES[number - 1].name
    lf.train(settings(stage, before, draw(stage, folder / "data", seed, scale), out, seed))
    figures = {**trained(out), **measured(stage, before, out, folder / "data", seed, scale)}
    return {**figures, "seconds": round(time.perf_counter() - start, 1)}


def begin(stage: Stage, folder: Path, seed: int, scale: float) -> dict[str, Any]:
    """A fresh checkpoint, and its tower trained. Stopped, it begins anew: it takes seconds."""
    captioned = questions(scaled(stage.count, scale), seed, "pictures", (where,))
    texts = [part for question in questions(350, seed, "train") for part in (question.text, question.answer + HEDGE)]
    texts += [part for question in captioned[:100] for part in (in_words(question.pictures[0]), "user\n", "assistant\n")]
    model = lf.load(make_checkpoint(folder / "fresh", texts, seed))
    steps = scaled(160, scale)
    found = train_tower(model, [q.pictures[0] for q in captioned], [q.answer for q in captioned], seed, steps)
    model.save_pretrained(folder / stage.name)
    return {"steps": steps, "found": found}


def draw(stage: Stage, folder: Path, seed: int, scale: float) -> Path:
    """The stage's records, unless they are there; -> their file."""
    target, count = folder / f"{stage.name}.json", scaled(stage.count, scale)
    if target.is_file():
        return target
    if stage.name == "decoder":
        return write_records(told(questions(count, seed, "texts", (where,))), folder, stage.name)
    if stage.name == "align":  # its template, plain, leaves the questions out
        return write_records([caption(question) for question in questions(count, seed, "captions", (where,))], folder, stage.name)
    if stage.name == "sft":
        return write_records(questions(count, seed, "single pictures", (weave, where)), folder, stage.name)
    if stage.name == "interleave":
        return write_records(hedged(questions(count, seed, "train"), seed), folder, stage.name)
    return write_pairs(questions(count, seed, "preferences"), folder, stage.name, HEDGE)


def scaled(count: int, scale: float) -> int:
    return max(56, round(count * scale))


def told(asked: Sequence[Question]) -> list[Question]:
    """Texts without pictures: what each patch of a picture shows, then its caption, TOLD pictures in a text.

    Under template plain a picture and its caption are the same, but for what comes before: a text's second picture follows anything.
    """
    lines = [f"{in_words(question.pictures[0])}{caption(question).answer}" for question in asked]
    texts = ["\n".join(lines[start : start + TOLD]) for start in range(0, len(lines), TOLD)]
    return [replace(asked[0], text="What is there to see?", answer=text, pictures=()) for text in texts]


def caption(question: Question) -> Question:
    """Its first word is one inside a text, not one that begins it."""
    return replace(question, answer=f" {question.answer}")


def hedged(asked: Sequence[Question], seed: int) -> list[Question]:
    chosen = np.random.default_rng([seed, 99]).random(len(asked)) < HEDGED
    return [replace(question, answer=question.answer + HEDGE) if hedge else question for question, hedge in zip(asked, chosen, strict=True)]


def settings(stage: Stage, model: Path, data: Path, out: Path, seed: int) -> dict[str, Any]:
    """What `lf.train` takes: the recipe, and what differs."""
    recipe = {} if stage.recipe is None else {"recipe": stage.recipe}
    return {**recipe, **TINY, **stage.fields, "epochs": stage.epochs, "seed": seed, "model": model, "data": data, "output_dir": out}


def trained(out: Path) -> dict[str, Any]:
    """Steps, seconds and tokens a second of a run, from its first step on."""
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    seconds, tokens = (sum(step[name] for step in steps) for name in ("seconds", "tokens"))
    return {"steps": len(steps), "training_seconds": round(seconds, 1), "tokens_per_second": round(tokens / seconds)}


def measured(stage: Stage, before: Path, out: Path, folder: Path, seed: int, scale: float) -> dict[str, Any]:
    pictured = questions(scaled(CAPTIONS, scale), seed, "held-out captions", (where,))
    if stage.name == "decoder":
        return {"captions": caption_accuracy(out, pictured)}
    figures = by_scenario(out, questions(scaled(HELD_OUT, scale), seed, "held out"))
    if stage.name == "align":
        return {**figures, "captions": caption_accuracy(out, pictured), "untouched": untouched(before, out)}
    if stage.name == "dpo":
        pairs = write_pairs(questions(scaled(PAIRS, scale), seed, "held-out preferences"), folder, "held-out", HEDGE)
        shares = [preferred(settings(stage, model, pairs, folder / "held-out", seed)) for model in (before, out)]
        return {**figures, "preferred_before": shares[0], "preferred": shares[1]}
    return figures
