"""Original LLaVA-NeXT / LLaVA directories made from a tiny transformers one: other names, other config, the same function."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def original_name(key: str) -> str:
    """A key of a file that transformers wrote -> the key LLaVA's own classes write."""
    if key.startswith("vision_tower."):
        return "model.vision_tower.vision_tower.vision_model." + key.removeprefix("vision_tower.").removeprefix("vision_model.")
    if key.startswith("multi_modal_projector."):
        part, leaf = key.split(".")[1:]
        return f"model.mm_projector.{dict(linear_1=0, linear_2=2)[part]}.{leaf}"
    return key.replace("language_model.lm_head", "lm_head").replace("language_model.model.", "model.")


def make_original(source: Path, target: Path, tower: str = "inside", **overrides) -> Path:
    """tower: 'inside' the checkpoint (its config in its own directory), or 'own' directory with weights.

    The SigLIP tower of the source is what LLaVA keeps of a tower of one layer more; that layer is written to the own directory.
    """
    target.mkdir(parents=True)
    raw = json.loads((source / "config.json").read_text())
    tensors = load_file(source / "model.safetensors")
    siglip = raw["vision_config"]["model_type"] == "siglip_vision_model"
    tower_dir = target.parent / ("tower-siglip" if siglip else "tower-clip")
    tower_dir.mkdir()
    vision = dict(raw["vision_config"])
    own = {key.replace("vision_tower.", "vision_model.", 1): value for key, value in tensors.items() if key.startswith("vision_tower.")}
    if siglip:
        vision["num_hidden_layers"] += 1
        last = f"vision_model.encoder.layers.{vision['num_hidden_layers'] - 2}."
        own |= {
            k.replace(last, f"vision_model.encoder.layers.{vision['num_hidden_layers'] - 1}."): v + 1 for k, v in own.items() if last in k
        }
    (tower_dir / "config.json").write_text(json.dumps({**vision, "architectures": ["SiglipVisionModel" if siglip else "CLIPVisionModel"]}))
    if tower == "own":
        save_file(own | {"logit_scale": torch.ones(())}, tower_dir / "model.safetensors", metadata={"format": "pt"})

    text = raw["text_config"]
    config = {
        **{k: v for k, v in text.items() if k not in ("model_type", "rope_parameters")},
        "model_type": "llava_qwen" if siglip else "llava_llama",
        "architectures": ["LlavaQwenForCausalLM" if siglip else "LlavaLlamaForCausalLM"],
        "rope_theta": text["rope_parameters"]["rope_theta"],
        "tie_word_embeddings": raw.get("tie_word_embeddings", False),
        "mm_vision_tower": str(tower_dir),
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_patch_merge_type": "flat",
        "image_aspect_ratio": "pad",
        "mm_hidden_size": vision["hidden_size"],
        **overrides,
    }
    (target / "config.json").write_text(json.dumps(config))
    kept = {original_name(k): v for k, v in tensors.items() if tower == "inside" or not k.startswith("vision_tower.")}
    kept["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    if "unpad" in config["mm_patch_merge_type"]:
        kept["model.image_newline"] = torch.arange(text["hidden_size"], dtype=torch.float32)
    save_file(kept, target / "model.safetensors", metadata={"format": "pt"})
    for name in TOKENIZER_FILES:
        shutil.copy(source / name, target / name)
    return target
