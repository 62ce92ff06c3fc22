"""What a checkpoint is and needs, from its config and tensor headers alone."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from typing import Any

import torch

from llava_fast.checkpoint import check_tensors, derived_tensors, is_carried, opened
from llava_fast.inputs.prepare import InputSpec, picture_layout
from llava_fast.models.llava import Llava

PARTS = {
    "vision_tower": "vision tower",
    "multi_modal_projector": "projector",
    "language_model": "decoder",
    "lm_head": "head",
    "image_newline": "newline",
}
SIZES = ((640, 480), (1000, 1000), (1920, 1080))  # of pictures that stand for the others where the number of tiles depends on it
BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


def describe(path: str | os.PathLike, vision_tower: str | os.PathLike | None = None) -> dict[str, Any]:
    """Architecture, parameters by part, tokens a picture, KV bytes a token, bytes to run. Raises ValueError as `load` does.

    tokens_with_tiles: of single pictures by size, where the checkpoint cuts them into tiles.  memory: bytes for the weights, for the
    keys and values of a full context, and for both, in the stored dtype (a GPU) and, for the CPU, with keys and values in fp32;
    activations come on top.
    """
    with opened(path, vision_tower) as found:
        config, stored, dtype = found.config, found.stored, str(found.dtype).removeprefix("torch.")
        with torch.device("meta"):
            check_tensors(Llava(config), stored, found.grown)
    vision, decoder = config.vision, config.decoder
    parameters = dict.fromkeys(PARTS.values(), 0)
    carried = 0
    for name, place in stored.items():
        count = math.prod(place.shape)
        if is_carried(name, config):
            carried += count
        elif name not in derived_tensors(config):
            parameters[PARTS[name.split(".")[0]]] += count
    spec = InputSpec(None, None, config.image_token_id, vision.grid, vision.image_size, decoder.max_positions)  # type: ignore[arg-type]
    spec = replace(spec, has_newline=config.has_newline, extra_rows=config.patches - vision.grid**2).with_options(config.options)
    a_picture = picture_layout((vision.image_size, vision.image_size), spec, anyres=False).tokens
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
        "tokens_per_image": a_picture,
        "tokens_with_tiles": {f"{w}x{h}": picture_layout((w, h), spec, anyres=True).tokens for w, h in SIZES} if spec.anyres else {},
        "context": decoder.max_positions,
        "images_per_context": decoder.max_positions // a_picture,
        "kv_bytes_per_token": stored_kv,
        "kv_bytes_per_image": stored_kv * a_picture,
        "memory": {
            "weights": weights,
            "kv_full_context": stored_kv * decoder.max_positions,
            "total": weights + stored_kv * decoder.max_positions,
            "total_on_cpu": weights + cpu_kv * decoder.max_positions,
        },
    }
