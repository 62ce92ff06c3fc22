"""`llava-fast demo`: generate data, train from nothing, answer held-out questions, compare with transformers, show the result."""

from __future__ import annotations

import json
import os
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

import llava_fast as lf
from llava_fast.demo.model import make_checkpoint, write_records
from llava_fast.demo.scenes import FRAMES, SCENARIOS, SIDE, TASKS, Question, questions

TRAIN, EPOCHS, HELD_OUT = 6000, 5, 600
NEEDED = 0.9  # accuracy in every scenario


def run(out: Path, seed: int = 0, train_count: int = TRAIN, epochs: int = EPOCHS) -> int:
    """Run the demo in `out`; 0 where every scenario reaches 90 % and transformers agrees, else 1. Started again after Ctrl-C, it goes
    on where it was.

    Writes checkpoint-<seed>/ (a transformers directory), answers.png and results.json.
    """
    console = Console()
    data, fresh, trained = out / f"data-{seed}", out / f"fresh-{seed}", out / f"checkpoint-{seed}"
    held_out = questions(HELD_OUT, seed, "held out")
    seconds: dict[str, float] = {}

    start = time.perf_counter()
    if not (data / "train.json").is_file():
        console.print(f"drawing {train_count:,} questions in {len(SCENARIOS)} scenarios to {data}", markup=False)
        asked = questions(train_count, seed, "train")
        make_checkpoint(
            fresh, [part for question in asked[:300] for part in ("user\n", "assistant\n", question.text, question.answer)], seed
        )
        write_records(asked, data, "train")  # train.json comes last: where it is, all of this is done
    seconds["data"] = time.perf_counter() - start

    console.print("training a SigLIP + MLP + Qwen2 model from random weights")
    start = time.perf_counter()
    result = lf.train(
        {
            "model": fresh,
            "data": str(data / "train.json"),
            "output_dir": trained,
            "epochs": epochs,
            "inputs": {"num_frames": FRAMES},
            # Four rows a step from windows of 64 samples: every step meets every scenario.
            "tokens_per_row": 1152,
            "rows_per_step": 4,
            "packing_window": 64,
            "lr": 2e-3,
            "lr_vision_tower": "lr",
            "betas": (0.9, 0.98),
            "weight_decay": 0.01,
            "warmup_ratio": 0.1,
            "precision": "fp32",
            "seed": seed,
            "save_every": 100,
            "keep": 1,
        }
    )
    seconds["training"] = time.perf_counter() - start

    console.print(f"answering {len(held_out)} held-out questions")
    start = time.perf_counter()
    model = lf.load(trained)
    completions = lf.generate(model, [as_request(question) for question in held_out], max_new_tokens=24)
    seconds["answering"] = time.perf_counter() - start
    answers = [completion.text.strip() for completion in completions]
    right = [is_right(question, answer) for question, answer in zip(held_out, answers, strict=True)]

    start = time.perf_counter()
    compared = [i for i, question in enumerate(held_out) if not question.is_video]
    theirs = transformers_answers(trained, [held_out[i] for i in compared])
    differing = [i for i, ids in zip(compared, theirs, strict=True) if ids != completions[i].token_ids]
    seconds["comparing"] = time.perf_counter() - start

    rows = [score(held_out, right, scenario) for scenario in SCENARIOS]
    draw_answers(held_out, answers, right, out / "answers.png")
    summary = {
        "seed": seed,
        "scenarios": rows,
        "steps": result.steps,
        "training_tokens_per_second": round(result.tokens_per_second) if result.tokens else None,
        "answers_per_second": round(len(held_out) / seconds["answering"], 1),
        "agree_with_transformers": len(compared) - len(differing),
        "compared_with_transformers": len(compared),
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "checkpoint": str(trained),
    }
    (out / "results.json").write_text(json.dumps(summary, indent=1) + "\n")
    show(console, summary, out)
    faults = [f"{row['scenario']}: {row['accuracy']:.1%}, {NEEDED:.0%} are needed" for row in rows if row["accuracy"] < NEEDED]
    if differing:
        faults.append(f"transformers answers {len(differing)} questions otherwise, the first of them number {differing[0]}")
    for fault in faults:
        console.print(fault, style="red", markup=False)
    return 1 if faults else 0


def as_request(question: Question) -> lf.Request:
    kind = "video" if question.is_video else "image"
    media = [list(question.pictures)] if question.is_video else question.pictures
    content: list[dict[str, Any]] = [{"type": kind, kind: medium} for medium in media]
    message = {"role": "user", "content": [*content, {"type": "text", "text": question.text}]}
    return lf.Request([message], inputs=lf.InputOptions(num_frames=FRAMES))


def is_right(question: Question, answer: str) -> bool:
    """What comes after the colon, where there is one, is the answer; the rest says why."""
    return answer.rsplit(": ", 1)[-1] == question.answer.rsplit(": ", 1)[-1]


def score(asked: Sequence[Question], right: Sequence[bool], scenario: str) -> dict[str, Any]:
    own = [(question, ok) for question, ok in zip(asked, right, strict=True) if question.scenario == scenario]
    return {
        "scenario": scenario,
        "questions": len(own),
        "accuracy": sum(ok for _, ok in own) / len(own),
        "chance": sum(question.chance for question, _ in own) / len(own),
        "tasks": {task: _share([ok for q, ok in own if q.task == task]) for task in dict.fromkeys(q.task for q, _ in own)},
    }


def _share(values: Sequence[bool]) -> float:
    return sum(values) / len(values)


@torch.inference_mode()
def transformers_answers(directory: Path, asked: Sequence[Question], batch: int = 50) -> list[list[int]]:
    """New token ids of transformers' generate, greedy, for questions without a video.

    It knows no tiles: a picture that we cut is handed over as its whole and its quarters, which is what the flat layout is.
    """
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(directory).eval()
    processor = AutoProcessor.from_pretrained(directory)
    processor.tokenizer.padding_side = "left"
    eos = processor.tokenizer.eos_token_id
    out = []
    for start in range(0, len(asked), batch):
        texts: list[str] = []
        pictures: list[Image.Image] = []
        for question in asked[start : start + batch]:
            own = question.pictures if len(question.pictures) > 1 else (question.pictures[0], *quarters(question.pictures[0]))
            content = [{"type": "image"}] * len(own) + [{"type": "text", "text": question.text}]
            texts.append(processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True))
            pictures += own
        inputs = processor(images=pictures, text=texts, padding=True, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=24, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        out += [row[: row.index(eos) + 1] if eos in row else row for row in ids.tolist()]
    return out


def quarters(picture: Image.Image) -> tuple[Image.Image, ...]:
    return tuple(picture.crop((x, y, x + SIDE, y + SIDE)) for y in (0, SIDE) for x in (0, SIDE))


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


def show(console: Console, summary: dict[str, Any], out: Path) -> None:
    table = Table("scenario", "held-out questions", "accuracy", "chance", "by task")
    for row in summary["scenarios"]:
        tasks = ", ".join(f"{task} {share:.0%}" for task, share in row["tasks"].items())
        table.add_row(row["scenario"], str(row["questions"]), f"{row['accuracy']:.1%}", f"{row['chance']:.1%}", tasks)
    console.print(table)
    spent = ", ".join(f"{name} {value:.0f} s" for name, value in summary["seconds"].items())
    speed = f"{summary['training_tokens_per_second']:,} tokens/s in training, " if summary["training_tokens_per_second"] else ""
    agreed = f"{summary['agree_with_transformers']} of {summary['compared_with_transformers']} un-pooled answers"
    for line in (
        f"{spent} ({os.cpu_count()} cores)",
        f"{speed}{summary['answers_per_second']:,} answers/s",
        f"the same checkpoint in transformers: {agreed} agree token for token",
        f"checkpoint: {summary['checkpoint']}   pictures with answers: {out / 'answers.png'}   figures: {out / 'results.json'}",
    ):
        console.print(line, markup=False, soft_wrap=True)
