"""Recipes: what a stage of training is set to, as `TrainConfig` fields, each with where the value is from.

`recipe: interleave` in a configuration file, with `model`, `data`, `output_dir` and whatever is to differ; or `interleave(model=..., ...)`.
A value that upstream publishes carries its script; one of ours carries the reason. Fields not named keep TrainConfig's defaults.
Sources: haotian-liu/LLaVA and LLaVA-VL/LLaVA-NeXT (df17966), arXiv 2407.07895 (LLaVA-NeXT-Interleave).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llava_fast.checks import closest, shown

Fields = dict[str, tuple[Any, str]]  # name -> (value, where it is from)

V1_PRETRAIN, V1_FINETUNE, V1_SQA = "v1 pretrain.sh", "v1 finetune.sh", "v1 finetune_sqa.sh"
V15_PRETRAIN, V15_FINETUNE, V15_LORA = "v1_5/pretrain.sh", "v1_5/finetune.sh", "v1_5/finetune_lora.sh"
NEXT_PRETRAIN, NEXT_DIRECT, NEXT_DPO = "pretrain_siglip.sh", "direct_finetune_siglip_a4.sh", "dpo_ov7b.sh"
PAPER = "arXiv 2407.07895"
ROWS = "ours: a step of about upstream's global batch, in packed rows"
UNSTATED = "ours: upstream's global batch is not stated; LLaVA-1.5's in packed rows"
ASSUMED = "ours: not published; the row of direct_finetune_siglip_a4.sh"


@dataclass(frozen=True)
class Recipe:
    """what: one line.  fields: what it sets.  lora: what it sets besides, or otherwise, where `lora` is given."""

    what: str
    fields: Fields
    lora: Fields = field(default_factory=dict)


def _projector_only(source: str) -> Fields:
    return {"lr_vision_tower": ("frozen", source), "lr_decoder": ("frozen", source)}


# Adapters in place of the decoder's own weights. The projector's rate beside them is LLaVA-1.5's; LLaVA-NeXT trains adapters alone.
ADAPTERS: Fields = {
    "lr": (2e-4, V15_LORA),
    "lr_projector": (2e-5, V15_LORA),
    "lr_vision_tower": ("frozen", "train.py trains no tower beside adapters"),
}

RECIPES: dict[str, Recipe] = {
    "align": Recipe(
        "stage 1: captions, the projector alone",
        {
            "template": ("plain", NEXT_PRETRAIN),
            "lr": (1e-3, NEXT_PRETRAIN),
            **_projector_only(NEXT_PRETRAIN),
            "inputs": ({"anyres": False}, NEXT_PRETRAIN),
            "rows_per_step": (12, UNSTATED),
        },
    ),
    "sft": Recipe(
        "stage 2: single-image instructions, all parts",
        {
            "template": ("qwen_1_5", NEXT_DIRECT),
            "lr": (1e-5, NEXT_DIRECT),
            "lr_vision_tower": (2e-6, NEXT_DIRECT),
            "inputs": ({"anyres": True}, NEXT_DIRECT),
            "rows_per_step": (24, UNSTATED),
        },
        ADAPTERS,
    ),
    "interleave": Recipe(
        "stage 3: M4-style mixture on a single-image model; videos as 10 frames, each a picture",
        {
            "template": ("qwen_1_5", ASSUMED),
            "lr": (1e-5, ASSUMED),
            "lr_vision_tower": (2e-6, ASSUMED),
            "front_share": (0.5, f"ours: {PAPER} mixes the two formats, by a share that it does not state"),
            "inputs": ({"anyres": True, "num_frames": 10}, f"{PAPER}, table 13: tiles for single pictures alone; 10 frames in training"),
            "rows_per_step": (64, "ours: OneVision's comment says 256 samples; 4,600 tokens each in this mixture"),
        },
        ADAPTERS,
    ),
    "interleave_pooled": Recipe(
        "interleave with 40 frames a video, pooled to a quarter: as many tokens as 10 that are not",
        {
            "template": ("qwen_1_5", ASSUMED),
            "lr": (1e-5, ASSUMED),
            "lr_vision_tower": (2e-6, ASSUMED),
            "front_share": (0.5, f"ours: {PAPER} mixes the two formats, by a share that it does not state"),
            "inputs": ({"anyres": True, "num_frames": 40, "pool": "average"}, f"{PAPER}, table 13"),
            "rows_per_step": (64, "ours: OneVision's comment says 256 samples; 4,600 tokens each in this mixture"),
        },
        ADAPTERS,
    ),
    "dpo": Recipe(
        "preferences, all parts",
        {
            "dpo": ({"loss": "sigmoid", "beta": 0.1, "alpha": 1.0, "gamma": 0.0}, NEXT_DPO),
            "template": ("qwen_1_5", NEXT_DPO),
            "lr": (5e-7, NEXT_DPO),
            "lr_vision_tower": (5e-7, f"{NEXT_DPO}: no rate of its own"),
            "warmup_ratio": (0.1, NEXT_DPO),
            "rows_per_step": (4, "ours: 8 GPUs with a pair each are 8 pairs; two of 8,000 tokens a row"),
        },
        {
            "lr": (5e-6, "ours: upstream has no LoRA here; ten times the full rate, as 2e-4 is to 2e-5 in LLaVA-1.5"),
            "lr_projector": ("frozen", "ours: then the reference is the model without its adapters, and no second pass is stored"),
            "lr_vision_tower": ("frozen", "train.py trains no tower beside adapters"),
        },
    ),
    "v1_pretrain": Recipe(
        "LLaVA v1, stage 1: CC3M-595K captions, a linear projector",
        {
            "template": ("plain", V1_PRETRAIN),
            "lr": (2e-3, V1_PRETRAIN),
            **_projector_only(V1_PRETRAIN),
            "rows_per_step": (2, ROWS),
        },
    ),
    "v1_finetune": Recipe(
        "LLaVA v1, stage 2: LLaVA-Instruct",
        {
            "template": ("v1", V1_FINETUNE),
            "lr": (2e-5, V1_FINETUNE),
            "lr_vision_tower": ("frozen", V1_FINETUNE),
            "rows_per_step": (6, ROWS),
        },
        ADAPTERS,
    ),
    "v1_scienceqa": Recipe(
        "LLaVA v1 on ScienceQA, question to lecture, explanation and answer",
        {
            "template": ("v1", V1_SQA),
            "lr": (2e-5, V1_SQA),
            "lr_vision_tower": ("frozen", V1_SQA),
            "epochs": (12, V1_SQA),
            "rows_per_step": (4, ROWS),
        },
        ADAPTERS,
    ),
    "v1_5_pretrain": Recipe(
        "LLaVA-1.5, stage 1: LCS-558K captions, a projector of two layers",
        {
            "template": ("plain", V15_PRETRAIN),
            "lr": (1e-3, V15_PRETRAIN),
            **_projector_only(V15_PRETRAIN),
            "rows_per_step": (10, ROWS),
        },
    ),
    "v1_5_finetune": Recipe(
        "LLaVA-1.5, stage 2: mix665k; with lora, finetune_lora.sh",
        {
            "template": ("v1", V15_FINETUNE),
            "lr": (2e-5, V15_FINETUNE),
            "lr_vision_tower": ("frozen", V15_FINETUNE),
            "inputs": ({"image_aspect": "pad"}, V15_FINETUNE),
            "rows_per_step": (8, ROWS),
        },
        {**ADAPTERS, "lora": ({"r": 128, "alpha": 256}, V15_LORA)},
    ),
    "next_pretrain": Recipe(
        "LLaVA-NeXT, stage 1: blip558k captions",
        {
            "template": ("plain", NEXT_PRETRAIN),
            "lr": (1e-3, NEXT_PRETRAIN),
            **_projector_only(NEXT_PRETRAIN),
            "rows_per_step": (12, UNSTATED),
        },
    ),
    "next_finetune": Recipe(
        "LLaVA-NeXT, direct fine-tuning: llava_1_6 (790K), all parts, tiles",
        {
            "template": ("qwen_1_5", NEXT_DIRECT),
            "lr": (1e-5, NEXT_DIRECT),
            "lr_vision_tower": (2e-6, NEXT_DIRECT),
            "inputs": ({"anyres": True}, NEXT_DIRECT),
            "rows_per_step": (24, UNSTATED),
        },
        ADAPTERS,
    ),
}


def resolve(fields: Mapping[str, Any], where: str = "the training configuration") -> dict[str, Any]:
    """The fields of a configuration without its `recipe`, and the recipe's where it has none of its own; mappings are joined likewise.

    Raises ValueError for a recipe that does not exist.
    """
    own = {name: value for name, value in fields.items() if name != "recipe"}
    if "recipe" not in fields:
        return own
    name = fields["recipe"]
    if not isinstance(name, str) or name not in RECIPES:
        raise ValueError(f"{where} has no recipe {shown(name)}{closest(name, RECIPES)}")
    recipe = RECIPES[name]
    given = {**recipe.fields, **(recipe.lora if own.get("lora") else {})}
    for field_name, (value, _) in given.items():
        mine = own.get(field_name)
        if isinstance(value, Mapping) and (isinstance(mine, Mapping) or mine is True):
            own[field_name] = {**value, **(mine if isinstance(mine, Mapping) else {})}
        elif field_name not in own:
            own[field_name] = value
    return own


def make(name: str, **fields: Any) -> Any:
    """The `TrainConfig` of a recipe; fields: model, data, output_dir and what is to differ."""
    from llava_fast.training.config import as_config

    return as_config({"recipe": name, **fields})


def align(**fields: Any) -> Any:
    """Stage 1: captions, the projector alone."""
    return make("align", **fields)


def sft(**fields: Any) -> Any:
    """Stage 2: single-image instructions."""
    return make("sft", **fields)


def interleave(**fields: Any) -> Any:
    """Stage 3: several pictures, videos and views, from a single-image model."""
    return make("interleave", **fields)


def dpo(**fields: Any) -> Any:
    """Preference pairs."""
    return make("dpo", **fields)


def table() -> str:
    """The recipes as a Markdown table, as docs/training.md has it."""
    lines = ["| recipe | sets | with `lora` besides | from |", "|---|---|---|---|"]
    for name, recipe in RECIPES.items():
        sets, besides = (", ".join(f"{key} {_written(value)}" for key, (value, _) in part.items()) for part in (recipe.fields, recipe.lora))
        sources = dict.fromkeys(source for part in (recipe.fields, recipe.lora) for _, source in part.values())
        lines.append(f"| `{name}`: {recipe.what} | {sets} | {besides or '-'} | {'; '.join(sources)} |")
    return "\n".join(lines)


def _written(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_written(item)}" for key, item in value.items()) + "}"
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
