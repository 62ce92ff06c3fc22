"""LoRA: adapters beside the decoder's linears, trained while these stay as they are; files in PEFT's format.

`attach` puts fresh ones on a model, `save_adapter` and `load_adapter` write and read adapter_config.json and adapter_model.safetensors,
which peft loads onto transformers' LlavaForConditionalGeneration, and `merge` adds them to the weights they stand beside.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from llava_fast import checkpoint
from llava_fast.checks import shown
from llava_fast.kernels.linear import Quantised
from llava_fast.models.layers import Linear, LowRank
from llava_fast.models.llava import Llava
from llava_fast.quantise import quantise_model
from llava_fast.training.options import LoraOptions

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PROJECTOR = "multi_modal_projector"
M = TypeVar("M", bound=Llava)


def attach(model: Llava, options: LoraOptions, seed: int = 0) -> None:
    """Put an adapter on every decoder linear that `options` names, in place; the model answers as before, since B is 0.

    A is drawn as peft draws it, uniform in +-1 / sqrt(inputs), from `seed`.  Weights below are quantised first where options.base says so.
    """
    if options.base is not None:
        quantise_model(model, options.base, head=False)
    generator = torch.Generator().manual_seed(seed)
    for name, linear in decoder_linears(model):
        if name.rpartition(".")[2] in options.targets:
            linear.lora = _adapter(linear, options.r, options.alpha / options.r, options.dropout, model.device)
            bound = 1 / math.sqrt(linear.in_features)
            with torch.no_grad():
                linear.lora.A.copy_(torch.empty(linear.lora.A.shape).uniform_(-bound, bound, generator=generator))


def decoder_linears(model: Llava) -> list[tuple[str, Linear]]:
    return [(f"language_model.{name}", module) for name, module in model.language_model.named_modules() if isinstance(module, Linear)]


def adapters(model: nn.Module) -> list[LowRank]:
    return [module for module in model.modules() if isinstance(module, LowRank)]


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Inside the block the model answers as it did before its adapters were trained."""
    attached = adapters(model)
    for adapter in attached:
        adapter.enabled = False
    try:
        yield
    finally:
        for adapter in attached:
            adapter.enabled = True


@torch.no_grad()
def merge(model: Llava) -> None:
    """W + scale B A in place of W, in fp32 and rounded to W's dtype, and no adapters any more. Raises ValueError over quantised weights."""
    for name, linear in model.named_modules():  # peft's may be on the tower too
        if isinstance(linear, Linear) and linear.lora is not None:
            _merge(name, linear)


def _merge(name: str, linear: Linear) -> None:
    lora = linear.lora
    assert lora is not None
    if isinstance(linear.weight, Quantised):
        raise ValueError(f"{name} is quantised: load the base model anew, without that, and merge the saved adapter into it")
    linear.weight.copy_(linear.weight.float() + lora.B.float() @ lora.A.float() * lora.scale)
    linear.lora = None


def save_adapter(model: Llava, directory: str | os.PathLike, base: str) -> None:
    """Write the adapters, and the projector where it is trained, as peft does; base: the checkpoint they belong to.

    Weights are written first, then the configuration, each whole or not at all. Raises ValueError for a model without adapters.
    """
    adapted = {name: linear.lora for name, linear in decoder_linears(model) if linear.lora is not None}
    if not adapted:
        raise ValueError("the model has no adapters to save")
    tensors: dict[str, Tensor] = {}
    for name, lora in adapted.items():
        for letter, matrix in (("A", lora.A), ("B", lora.B)):
            tensors[f"base_model.model.model.{name}.lora_{letter}.weight"] = matrix
    whole = [PROJECTOR] if any(parameter.requires_grad for parameter in model.multi_modal_projector.parameters()) else []
    if whole:
        named = checkpoint.hf_state_dict(model)
        tensors |= {f"base_model.model.model.{name}": named[name] for name in named if name.startswith(PROJECTOR)}
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": str(Path(base).resolve()) if Path(base).is_dir() else base,
        **_shapes(model, adapted),
        "modules_to_save": whole or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{WEIGHTS}.partial"
    save_file({name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}, partial, {"format": "pt"})
    os.replace(partial, folder / WEIGHTS)
    partial = folder / f".{CONFIG}.partial"
    partial.write_text(json.dumps(config, indent=2) + "\n")
    os.replace(partial, folder / CONFIG)


def _shapes(model: Llava, adapted: dict[str, LowRank]) -> dict[str, Any]:
    """What peft makes the same adapters of: the most common rank and alpha, and patterns for the others."""
    ranks = {name: lora.A.shape[0] for name, lora in adapted.items()}
    alphas = {name: float(f"{lora.scale * ranks[name]:.12g}") for name, lora in adapted.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    kinds = dict.fromkeys(name.rpartition(".")[2] for name in adapted)
    of_kinds = [name for name, _ in decoder_linears(model) if name.rpartition(".")[2] in kinds]
    whole = len(of_kinds) == len(adapted)
    return {
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": next(iter(adapted.values())).dropout,
        "rank_pattern": {re.escape(name): own for name, own in ranks.items() if own != rank},
        "alpha_pattern": {re.escape(name): own for name, own in alphas.items() if own != alpha},
        "target_modules": rf".*language_model.*\.({'|'.join(kinds)})" if whole else rf".*\.({'|'.join(map(re.escape, adapted))})",
    }


def is_adapter(path: str | os.PathLike) -> bool:
    return (Path(path) / CONFIG).is_file()


def load(kind: type[M], path: str | os.PathLike, *args: Any, **kw: Any) -> M:
    """`checkpoint.load`; of an adapter's directory, its base model with the adapter merged into it."""
    if not is_adapter(path):
        return checkpoint.load(kind, path, *args, **kw)
    base = read_adapter_config(Path(path)).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError(f"{Path(path) / CONFIG} does not name the base model (base_model_name_or_path)")
    model = load(kind, base, *args, **kw)
    load_adapter(model, path)
    merge(model)
    return model


def read_adapter_config(directory: Path) -> dict[str, Any]:
    """PEFT's configuration; ValueError for a kind of adapter that is not plain LoRA."""
    config = checkpoint.read_json(directory / CONFIG)
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{directory} holds a {shown(config.get('peft_type'))} adapter, expected LORA")
    if config.get("bias", "none") != "none":
        raise ValueError(f"{directory}: bias must be 'none', got {shown(config['bias'])}")
    for name in ("use_dora", "use_rslora", "fan_in_fan_out", "lora_bias"):
        if config.get(name):
            raise ValueError(f"{directory}: {name} is not implemented, got {shown(config[name])}")
    if not isinstance(config.get("lora_alpha"), (int, float)):
        raise ValueError(f"{directory}: lora_alpha must be a number, got {shown(config.get('lora_alpha'))}")
    return config


@torch.no_grad()
def load_adapter(model: Llava, directory: str | os.PathLike) -> None:
    """Put a saved adapter (ours or peft's) on its base model, and whole tensors that were saved with it in place of the model's.

    Raises ValueError for a tensor that does not fit, before anything is changed.
    """
    folder = Path(directory)
    config = read_adapter_config(folder)
    tensors = _read(folder / WEIGHTS)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, Linear)}
    parameters = dict(model.named_parameters())
    pairs: dict[str, dict[str, Tensor]] = {}
    called: dict[str, str] = {}  # an adapter's name -> the name that the file has for it, which patterns may match
    whole: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(r"(.*)\.lora_([AB])\.weight", key)
        name = checkpoint.canonical((match[1] if match else key).removeprefix("base_model.model."))
        if match and name in linears:
            pairs.setdefault(name, {})[match[2]] = tensor
            called[name] = match[1].removeprefix("base_model.model.")
        elif not match and name in parameters and parameters[name].shape == tensor.shape:
            whole[name] = tensor
        elif name not in checkpoint.derived_tensors(model.config):
            raise ValueError(f"{folder / WEIGHTS}: {key} {list(tensor.shape)} fits nothing in the model")
    for name, pair in pairs.items():
        linear = linears[name]
        if {*pair} != {"A", "B"} or pair["A"].shape[1] != linear.in_features or pair["B"].shape != (linear.out_features, len(pair["A"])):
            shapes = {letter: list(matrix.shape) for letter, matrix in pair.items()}
            raise ValueError(f"{folder / WEIGHTS}: adapter of {name} [{linear.out_features}, {linear.in_features}] has {shapes}")
    patterns = config.get("alpha_pattern") or {}
    matched = {key: {name for name in pairs if any(re.fullmatch(rf"(.*\.)?({key})", n) for n in (called[name], name))} for key in patterns}
    if unknown := [key for key, names in matched.items() if not names]:
        raise ValueError(f"{folder}: alpha_pattern {unknown[0]!r} matches no adapter")
    for name, tensor in whole.items():
        parameters[name].copy_(tensor)
    for name, pair in pairs.items():
        rank = len(pair["A"])
        alpha = next((own for key, own in patterns.items() if name in matched[key]), config["lora_alpha"])
        adapter = _adapter(linears[name], rank, alpha / rank, config.get("lora_dropout", 0.0), model.device)
        adapter.A.copy_(pair["A"])
        adapter.B.copy_(pair["B"])
        linears[name].lora = adapter
        if name.startswith(PROJECTOR):  # whose op takes its matrices, and would not see an adapter
            _merge(name, linears[name])


def _read(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as handle:
            return {key: handle.get_tensor(key) for key in handle.keys()}
    except (SafetensorError, FileNotFoundError) as error:
        raise ValueError(f"{file} is not a safetensors file: {error}") from error


def _adapter(linear: Linear, rank: int, scale: float, dropout: float, device: torch.device) -> LowRank:
    return LowRank(linear.in_features, linear.out_features, rank, scale, dropout).to(device)
