"""What a checkpoint of the demo can do, on data that no stage has seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file

import llava_fast as lf
from llava_fast.demo.scenes import FRAMES, HEDGE, SCENARIOS, SIDE, Question
from llava_fast.training.config import as_config
from llava_fast.training.dpo import reference_logps
from llava_fast.training.preferences import index_pairs

MAX_NEW_TOKENS = 28


def answer(directory: Path, asked: Sequence[Question]) -> list[lf.Completion]:
    return lf.generate(lf.load(directory), [as_request(question) for question in asked], max_new_tokens=MAX_NEW_TOKENS)


def by_scenario(directory: Path, asked: Sequence[Question]) -> dict[str, Any]:
    """Accuracy in each scenario, and the share of hedged answers."""
    answers = [completion.text.strip() for completion in answer(directory, asked)]
    right = [is_right(question, given) for question, given in zip(asked, answers, strict=True)]
    accuracies = {scenario: score(asked, right, scenario)["accuracy"] for scenario in SCENARIOS}
    return {"scenarios": accuracies, "hedged": share([given.endswith(HEDGE) for given in answers])}


def as_request(question: Question) -> lf.Request:
    kind = "video" if question.is_video else "image"
    media = [list(question.pictures)] if question.is_video else question.pictures
    content: list[dict[str, Any]] = [{"type": kind, kind: medium} for medium in media]
    message = {"role": "user", "content": [*content, {"type": "text", "text": question.text}]}
    return lf.Request([message], inputs=lf.InputOptions(num_frames=FRAMES))


def is_right(question: Question, answer: str) -> bool:
    """Word for word; how sure one is does not count."""
    return answer.removesuffix(HEDGE) == question.answer


def score(asked: Sequence[Question], right: Sequence[bool], scenario: str) -> dict[str, Any]:
    own = [(question, ok) for question, ok in zip(asked, right, strict=True) if question.scenario == scenario]
    return {
        "scenario": scenario,
        "questions": len(own),
        "accuracy": sum(ok for _, ok in own) / len(own),
        "chance": sum(question.chance for question, _ in own) / len(own),
        "tasks": {task: share([ok for q, ok in own if q.task == task]) for task in dict.fromkeys(q.task for q, _ in own)},
    }


def share(values: Sequence[bool]) -> float:
    return sum(values) / len(values)


def caption_accuracy(directory: Path, asked: Sequence[Question]) -> float:
    """Share of pictures whose caption is made word for word after the picture alone, which is what template plain trains."""
    inputs, sampling = lf.InputOptions(anyres=False), lf.SamplingParams(max_new_tokens=MAX_NEW_TOKENS, stop=("\n",))
    requests = [lf.Request("<image>", images=list(question.pictures), inputs=inputs, sampling=sampling) for question in asked]
    completions = lf.generate(lf.load(directory), requests)
    return share([made.text.strip() == question.answer for made, question in zip(completions, asked, strict=True)])


def preferred(settings: Mapping[str, Any]) -> float:
    """Share of a configuration's pairs whose chosen answer its model gives the higher probability."""
    config = as_config(settings)
    model = lf.load(config.model)
    config = replace(config, output_dir=f"{config.output_dir}/{Path(config.model).name}")
    Path(config.output_dir).mkdir(parents=True, exist_ok=True)
    logps = reference_logps(model, index_pairs(config, model.input_spec), config, torch.device("cpu"))
    return (logps[:, 0] > logps[:, 1]).float().mean().item()


def untouched(before: Path, after: Path) -> bool:
    """Whether two checkpoints differ in the projector alone, to the bit."""
    own, other = (load_file(folder / "model.safetensors") for folder in (before, after))
    return all(torch.equal(own[name], other[name]) for name in own if "projector" not in name)


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
        ids = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        out += [row[: row.index(eos) + 1] if eos in row else row for row in ids.tolist()]
    return out


def quarters(picture: Image.Image) -> tuple[Image.Image, ...]:
    return tuple(picture.crop((x, y, x + SIDE, y + SIDE)) for y in (0, SIDE) for x in (0, SIDE))
