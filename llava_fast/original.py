"""Original LLaVA and LLaVA-NeXT directories (LlavaQwenForCausalLM, LlavaLlamaForCausalLM), read as their transformers equal.

Source: haotian-liu/LLaVA and LLaVA-VL/LLaVA-NeXT (llava/model/), and transformers' convert_llava_weights_to_hf.py for what
the converted config says. Differences are named where they are made.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import (
    AutoConfig,
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaProcessor,
    Qwen2Config,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)

from llava_fast.config import OPTIONS_KEY
from llava_fast.inputs.templates import INTERLEAVE_CHAT_TEMPLATE

if TYPE_CHECKING:
    from llava_fast.checkpoint import Stored

DECODERS = {"llava_qwen": Qwen2Config, "llava_llama": LlamaConfig, "llava": LlamaConfig}
# What mm_vision_tower names when only the name is at hand (the tower's weights being inside the checkpoint).
KNOWN_TOWERS = {
    "google/siglip-so400m-patch14-384": dict(
        kind="siglip", hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16, image_size=384, patch_size=14
    ),
    "openai/clip-vit-large-patch14-336": dict(
        kind="clip", hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336, patch_size=14
    ),
    "openai/clip-vit-large-patch14": dict(
        kind="clip", hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=224, patch_size=14
    ),
}
# Fields of the original config that transformers' has no place for; kept under one key of config.json.
KEPT = (
    "mm_projector_type",
    "mm_patch_merge_type",
    "image_aspect_ratio",
    "image_grid_pinpoints",
    "mm_spatial_pool_mode",
    "mm_spatial_pool_stride",
    "mm_newline_position",
    "tokenizer_model_max_length",
)


def is_original(raw: dict[str, Any]) -> bool:
    return "mm_vision_tower" in raw or raw.get("model_type") in ("llava_qwen", "llava_llama")


def read(
    directory: Path, raw: dict[str, Any], stored: dict[str, Stored], vision_tower: str | os.PathLike | None, scratch: Path
) -> tuple[LlavaConfig, dict[str, Stored]]:
    """-> (transformers LlavaConfig, tensors of checkpoint and tower). Writes tokenizer and processor files to `scratch`.

    Raises ValueError for a tower, projector or decoder that is not in the family, or a tower whose weights are not at hand.
    """
    from llava_fast.checkpoint import OTHER_HALF, index_tensors, resolve

    kind = raw.get("model_type")
    if kind not in DECODERS:
        raise ValueError(f"an original checkpoint's model_type must be one of {sorted(DECODERS)}, got {kind!r}")
    projector = raw.get("mm_projector_type", "linear")
    if projector not in ("linear", "mlp2x_gelu"):
        raise ValueError(f"mm_projector_type must be 'linear' or 'mlp2x_gelu', got {projector!r}")

    name = str(vision_tower or raw.get("mm_vision_tower") or raw.get("vision_tower"))
    tower = next((place for place in (Path(name), directory / name) if place.is_dir()), None)
    inside = any(key.startswith("vision_tower.") for key in stored)
    if tower is None and not (inside and name in KNOWN_TOWERS):
        tower = resolve(name)
    vision = _tower_config(name, tower)
    if not inside:
        assert tower is not None
        stored = {**stored, **{key: place for key, place in index_tensors(tower).items() if not OTHER_HALF.match(place.key)}}
    layers = {int(m[1]) for key in stored if (m := re.match(r"vision_tower\.encoder\.layers\.(\d+)\.", key))}
    siglip = isinstance(vision, SiglipVisionConfig)
    # SigLIP: the last layer of the tower's own count is deleted, whatever mm_vision_select_layer says.
    executed = vision.num_hidden_layers - 1
    if siglip:
        vision.num_hidden_layers = len(layers)
        feature_layer = executed - len(layers) - 1
    else:
        feature_layer = raw.get("mm_vision_select_layer", -2)
    feature = raw.get("mm_vision_select_feature", "patch")
    if feature not in ("patch", "cls_patch"):
        raise ValueError(f"mm_vision_select_feature must be 'patch' or 'cls_patch', got {feature!r}")
    vision.vision_use_head = any(key.startswith("vision_tower.head.") for key in stored)

    decoder_class = DECODERS[kind]
    text = decoder_class(
        **{key: value for key, value in raw.items() if not key.startswith("mm_") and key not in ("model_type", "architectures")}
    )
    if "rope_scaling" in raw and kind == "llava_qwen":  # the original class forces it to None
        text.rope_parameters = {"rope_type": "default", "rope_theta": raw.get("rope_theta", 10000.0)}
    tokenizer = AutoTokenizer.from_pretrained(directory, config=text)
    image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    if image_token_id is None or image_token_id == tokenizer.unk_token_id:
        tokenizer.add_tokens(["<image>"], special_tokens=True)
        image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    if image_token_id >= text.vocab_size:
        text.vocab_size = (image_token_id // 64 + 1) * 64

    tied = bool(raw.get("tie_word_embeddings", False)) or "lm_head.weight" not in stored
    text.tie_word_embeddings = tied
    hf = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=image_token_id,
        projector_hidden_act="gelu" if projector == "mlp2x_gelu" else "linear",
        vision_feature_layer=feature_layer,
        vision_feature_select_strategy="full" if siglip or feature == "cls_patch" else "default",
        tie_word_embeddings=tied,
    )
    setattr(hf, OPTIONS_KEY, {"mm_projector_type": projector, **{key: raw[key] for key in KEPT if raw.get(key) is not None}})
    _write_inputs(directory, scratch, hf, tokenizer, siglip, kind == "llava_qwen")
    return hf, stored


def _tower_config(name: str, tower: Path | None) -> SiglipVisionConfig | CLIPVisionConfig:
    if tower is not None:
        config = AutoConfig.from_pretrained(tower)
        config = getattr(config, "vision_config", config)
        if not isinstance(config, (SiglipVisionConfig, CLIPVisionConfig)):
            raise ValueError(f"the vision tower {name!r} must be SigLIP or CLIP, its config says {config.model_type!r}")
        return config
    fields = dict(KNOWN_TOWERS[name])
    return (SiglipVisionConfig if fields.pop("kind") == "siglip" else CLIPVisionConfig)(**fields)


def _write_inputs(directory: Path, scratch: Path, hf: Any, tokenizer: Any, siglip: bool, qwen: bool) -> None:
    size = hf.vision_config.image_size
    if siglip:
        image_processor = SiglipImageProcessorPil(
            size={"height": size, "width": size}, resample=3, image_mean=[0.5] * 3, image_std=[0.5] * 3
        )
    else:
        image_processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=hf.vision_config.patch_size,
        vision_feature_select_strategy=hf.vision_feature_select_strategy,
        num_additional_image_tokens=0 if siglip else 1,
        chat_template=INTERLEAVE_CHAT_TEMPLATE if qwen else None,
    ).save_pretrained(scratch)
    if (directory / "generation_config.json").is_file():  # as it is: Vicuna's sets a temperature without sampling
        shutil.copy(directory / "generation_config.json", scratch)
