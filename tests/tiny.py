"""Tiny random checkpoints of the true architecture, made by transformers itself, so that both sides load the same files."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Qwen2Config,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)

from llava_fast.demo.tokenizer import train_tokenizer
from llava_fast.inputs.templates import INTERLEAVE_CHAT_TEMPLATE

TEXTS = [
    "What are these? Describe the picture in detail. Which picture is the odd one out?",
    "The image shows two cats, one on the left and one on the right.",
    "system\nYou are a helpful assistant. user\n assistant\n USER: ASSISTANT: yes no red green blue 0 1 2 3",
]
KINDS = ("qwen", "qwen_untied", "llama")


def text_config(kind: str, vocab_size: int, **overrides) -> Qwen2Config | LlamaConfig:
    common = dict(vocab_size=vocab_size, hidden_size=64, intermediate_size=112, num_hidden_layers=3, num_attention_heads=4)
    common |= {"max_position_embeddings": 2048, **overrides}
    heads = common["num_attention_heads"]
    if kind == "llama":  # grouped-query attention
        common |= dict(num_key_value_heads=heads // 2, rms_norm_eps=1e-5, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2)
        return LlamaConfig(**common)
    return Qwen2Config(**common, num_key_value_heads=heads, tie_word_embeddings=kind == "qwen", bos_token_id=0, eos_token_id=2)


def vision_config(kind: str, image_size: int = 42, layers: int = 3) -> SiglipVisionConfig | CLIPVisionConfig:
    if kind == "llama":
        return CLIPVisionConfig(
            hidden_size=64, intermediate_size=96, num_hidden_layers=layers, num_attention_heads=2, image_size=image_size, patch_size=14
        )
    return SiglipVisionConfig(  # heads of 72, as in so400m
        hidden_size=144,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=2,
        image_size=image_size,
        patch_size=14,
        vision_use_head=False,
    )


def make_checkpoint(directory: Path | str, kind: str = "qwen", seed: int = 0, dtype: torch.dtype = torch.float32, **overrides) -> Path:
    """Write a llava directory (weights, config, tokenizer, processor) and return its path.

    kind: 'qwen' (SigLIP + tied Qwen2), 'qwen_untied', or 'llama' (CLIP + Llama with GQA, layer -2, class row dropped).
    overrides: fields of LlavaConfig, image_size, text (fields of the decoder's config) or max_shard_size.
    """
    directory = Path(directory)
    llama = kind == "llama"
    max_shard_size = overrides.pop("max_shard_size", "5GB")
    tokenizer = train_tokenizer(TEXTS, family="llama" if llama else "qwen", vocab_size=400)
    vision = vision_config(kind, overrides.pop("image_size", 42))
    config = LlavaConfig(
        vision_config=vision,
        text_config=text_config(kind, **{"vocab_size": (len(tokenizer) + 63) // 64 * 64, **overrides.pop("text", {})}),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        **{
            "vision_feature_layer": -2 if llama else -1,
            "vision_feature_select_strategy": "default" if llama else "full",
            "tie_word_embeddings": kind == "qwen",
            **overrides,
        },
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config).to(dtype)
    with torch.no_grad():  # the default init leaves biases zero and logits nearly flat: make every parameter count
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.05)
            elif "embed" not in name:
                parameter.mul_(1.5)
        model.lm_head.weight.mul_(1.0 if kind == "qwen" else 10.0)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(directory, max_shard_size=max_shard_size)

    size = vision.image_size
    image_processor = (
        CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
        if llama
        else SiglipImageProcessorPil(size={"height": size, "width": size}, resample=3, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    )
    LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        chat_template=None if llama else INTERLEAVE_CHAT_TEMPLATE,
        num_additional_image_tokens=1 if llama else 0,
    ).save_pretrained(directory)
    return directory
