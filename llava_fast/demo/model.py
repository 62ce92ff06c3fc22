"""The demo's files: records in LLaVA's format, and a fresh checkpoint of the real architecture in small widths."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import (
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Qwen2Config,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)

from llava_fast.config import OPTIONS_KEY
from llava_fast.demo.scenes import SIDE, Question
from llava_fast.demo.tokenizer import train_tokenizer
from llava_fast.inputs.templates import INTERLEAVE_CHAT_TEMPLATE

PATCH = 8


def write_records(asked: Sequence[Question], folder: Path, name: str) -> Path:
    """<name>.json in LLaVA's format and its media; a video is a folder of frames."""
    records = []
    for number, question in enumerate(asked):
        media, prompt = _write_media(question, folder, f"{name}/{number:05d}")
        turns = [{"from": "human", "value": prompt}, {"from": "gpt", "value": question.answer}]
        records.append({"id": number, **media, "conversations": turns})
    return _write(records, folder / f"{name}.json")


def write_pairs(asked: Sequence[Question], folder: Path, name: str, worse: str) -> Path:
    """<name>.json of preference pairs, and their media: an answer is rejected where `worse` ends it."""
    records = []
    for number, question in enumerate(asked):
        media, prompt = _write_media(question, folder, f"{name}/{number:05d}")
        records.append({"id": number, **media, "prompt": prompt, "chosen": question.answer, "rejected": question.answer + worse})
    return _write(records, folder / f"{name}.json")


def _write_media(question: Question, folder: Path, place: str) -> tuple[dict[str, str | list[str]], str]:
    """The fields that name a question's pictures, and its text with their marks."""
    if not question.pictures:
        return {}, question.text
    media: dict[str, str | list[str]]
    if question.is_video:
        media, paths, marks = {"video": place}, [f"{place}/{i}.png" for i in range(len(question.pictures))], "<video>"
    else:
        paths = [f"{place}-{i}.png" for i in range(len(question.pictures))]
        media, marks = {"image": paths if len(paths) > 1 else paths[0]}, "<image>" * len(paths)
    for path, picture in zip(paths, question.pictures, strict=True):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        picture.save(folder / path, compress_level=1)
    return media, f"{marks}\n{question.text}"


def _write(records: list[dict], target: Path) -> Path:
    """Where it is, all that it names is."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".partial")
    partial.write_text(json.dumps(records))
    os.replace(partial, target)
    return target


def make_checkpoint(directory: Path, texts: Sequence[str], seed: int) -> Path:
    """A llava directory with random weights: SigLIP (2 layers of 64), mlp2x_gelu, Qwen2 (3 layers of 128, tied head).

    Its options: videos pooled by average, a single picture cut into tiles (flat: base view, then tiles).
    """
    tokenizer = train_tokenizer(texts, vocab_size=400)
    vision = SiglipVisionConfig(
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=PATCH,
        vision_use_head=False,
    )
    text = Qwen2Config(
        vocab_size=(len(tokenizer) + 63) // 64 * 64,
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    )
    options = {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "flat", "image_grid_pinpoints": [[2 * SIDE, 2 * SIDE]]}
    setattr(config, OPTIONS_KEY, {**options, "mm_spatial_pool_mode": "average"})
    model = LlavaForConditionalGeneration(config)
    initialise(model, seed)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(directory)
    LlavaProcessor(
        image_processor=SiglipImageProcessorPil(
            size={"height": SIDE, "width": SIDE}, resample=3, image_mean=[0.5] * 3, image_std=[0.5] * 3
        ),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="full",
        chat_template=INTERLEAVE_CHAT_TEMPLATE,
    ).save_pretrained(directory)
    return directory


@torch.no_grad()
def initialise(model: torch.nn.Module, seed: int) -> None:
    """Weights N(0, 1 / inputs), halved where they end a residual branch. With the 0.02 of large models, nothing is seen of the
    pictures in the first hundreds of steps at these widths."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
            continue
        std = 1 / math.sqrt(parameter[0].numel())
        if "embed_tokens" in name or "position_embedding" in name:
            std = 0.1 if "embed_tokens" in name else 0.3
        elif any(end in name for end in ("o_proj", "down_proj", "out_proj", "fc2")):
            std /= 2
        parameter.normal_(std=std, generator=generator)
