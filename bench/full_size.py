"""A checkpoint of the true llava-interleave-qwen-0.5b architecture with random weights, 1.7 GB in bf16.

Architecture as in the released config.json: SigLIP so400m (26 layers, 27 x 27 patches of 384 px), mlp2x_gelu, Qwen1.5-0.5B (tied).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

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

from llava_fast.demo.tokenizer import train_tokenizer
from llava_fast.inputs.templates import INTERLEAVE_CHAT_TEMPLATE

TEXTS = ["What is in the two pictures, and what do they have in common? Answer in a sentence."]


def config_05b(image_token_id: int, tower_layers: int = 26, decoder_layers: int = 24) -> LlavaConfig:
    vision = SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=tower_layers,
        num_attention_heads=16,
        image_size=384,
        patch_size=14,
        vision_use_head=False,
    )
    text = Qwen2Config(
        vocab_size=152_000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=decoder_layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        max_position_embeddings=32_768,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=image_token_id,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    )


@torch.no_grad()
def fill_random(model: torch.nn.Module, seed: int = 0) -> None:
    """Matrices are N(0, 1 / inputs), so that activations keep their size through the depth; norms about 1, biases about 0. Drawn where the
    model is: billions of numbers take a CPU half a minute."""
    generators: dict[torch.device, torch.Generator] = {}
    for name, p in model.named_parameters():
        draw = generators.setdefault(p.device, torch.Generator(p.device).manual_seed(seed))
        made = torch.empty(p.shape, device=p.device).normal_(std=0.02 if p.ndim == 1 else p[0].numel() ** -0.5, generator=draw)
        p.copy_(made + 1 if p.ndim == 1 and "norm" in name and name.endswith("weight") else made)


def make_full_size(directory: Path, seed: int = 0, tower_layers: int = 26, decoder_layers: int = 24) -> Path:
    """Write the checkpoint in bf16, or one of fewer layers of the same widths."""
    tokenizer = train_tokenizer(TEXTS)
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config_05b(tokenizer.convert_tokens_to_ids("<image>"), tower_layers, decoder_layers))
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    fill_random(model, seed)
    model.tie_weights()
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(directory)
    save_processor(directory, tokenizer)
    return directory


def save_processor(directory: Path | str, tokenizer: Any) -> None:
    LlavaProcessor(
        image_processor=SiglipImageProcessorPil(size={"height": 384, "width": 384}, resample=3, image_mean=[0.5] * 3, image_std=[0.5] * 3),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="full",
        chat_template=INTERLEAVE_CHAT_TEMPLATE,
    ).save_pretrained(directory)


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())
