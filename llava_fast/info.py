"""What a checkpoint is and needs, from its config and tensor headers alone."""

from __future__ import annotations

import math
import os
from typing import Any

from llava_fast.checkpoint import is_carried, opened

PARTS = {
    "vision_tower": "vision tower",
    "multi_modal_projector": "projector",
    "language_model": "decoder",
    "lm_head": "head",
    "image_newline": "newline",
}
BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


def describe(path: str | os.PathLike, vision_tower: str | os.PathLike | None = None) -> dict[str, Any]:
    """Architecture, parameters by part, tokens a picture, KV bytes a token, bytes to run. Raises ValueError as `load` does.

    memory: bytes for the weights, for the keys and values of a full context, and for both, in the stored dtype (a GPU) and, for
    the CPU, with keys and values in fp32.
    """
    with opened(path, vision_tower) as found:
        config, stored, dtype = found.config, found.stored, str(found.dtype).removeprefix("torch.")
    vision, decoder = config.vision, config.decoder
    parameters = dict.fromkeys(PARTS.values(), 0)
    carried = 0
    for name, place in stored.items():
        count = math.prod(place.shape)
        if is_carried(name, config):
            carried += count
        elif not (decoder.tied and name == "lm_head.weight"):
            parameters[PARTS[name.split(".")[0]]] += count
    kv_values = 2 * decoder.layers * decoder.kv_heads * decoder.head_dim
    weights = sum(parameters.values()) * BYTES[dtype]
    stored_kv, cpu_kv = kv_values * BYTES[dtype], kv_values * max(4, BYTES[dtype])
    return {
        "path": str(found.directory),
        "vision": f"{vision.kind}, {config.executed_layers} of {vision.layers} layers, width {vision.width}, {vision.heads} heads of "
        f"{vision.width // vision.heads}, {vision.image_size} px in patches of {vision.patch_size}",
        "projector": f"{config.projector}, {vision.width * len(config.feature_layers)} -> {decoder.width}",
        "decoder": f"{decoder.kind}, {decoder.layers} layers, width {decoder.width}, {decoder.heads} heads of {decoder.head_dim}, "
        f"{decoder.kv_heads} key-value heads, vocabulary {decoder.vocab_size}{', tied head' if decoder.tied else ''}",
        "dtype": dtype,
        "parameters": {part: count for part, count in parameters.items() if count}
        | {"total": sum(parameters.values()), "carried": carried},
        "tokens_per_image": config.patches,
        "context": decoder.max_positions,
        "images_per_context": decoder.max_positions // config.patches,
        "kv_bytes_per_token": stored_kv,
        "kv_bytes_per_image": stored_kv * config.patches,
        "memory": {
            "weights": weights,
            "kv_full_context": stored_kv * decoder.max_positions,
            "total": weights + stored_kv * decoder.max_positions,
            "total_on_cpu": weights + cpu_kv * decoder.max_positions,
        },
    }
