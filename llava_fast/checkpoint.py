"""Checkpoints in and out: transformers `llava` directories or hub ids, and original LLaVA / LLaVA-NeXT directories.

Every tensor of the files is used, carried (read, kept, saved back, never run) or named in an error; every parameter is set.
Tensors are read one at a time into their final place, so that loading needs little more memory than the weights.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import snapshot_download, split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig

from llava_fast import memory, original
from llava_fast.config import LlavaConfig, from_hf
from llava_fast.inputs.prepare import InputSpec
from llava_fast.models.layers import LowRank
from llava_fast.models.llava import Llava
from llava_fast.quantise import is_quantised

M = TypeVar("M", bound=Llava)

# File names of every generation of both formats -> our parameter names. The first match that applies ends each group.
RENAMES = (
    (r"^model\.vision_tower\.vision_tower\.", "vision_tower."),
    (r"^model\.mm_projector\.0\.", "multi_modal_projector.linear_1."),
    (r"^model\.mm_projector\.2\.", "multi_modal_projector.linear_2."),
    (r"^model\.mm_projector\.(weight|bias)$", r"multi_modal_projector.linear_1.\1"),
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^language_model\.model\.", "language_model."),
    (r"^model\.(vision_tower|multi_modal_projector|language_model|image_newline)", r"\1"),
    (r"^model\.(embed_tokens|layers|norm|faster_token)", r"language_model.\1"),
    (r"^vision_model\.", "vision_tower."),
)
# Buffers that older files hold and that follow from the config; the text half of a tower's own directory.
RECOMPUTED = re.compile(r"(rotary_emb\.inv_freq|embeddings\.position_ids)$")
OTHER_HALF = re.compile(r"^(text_model\.|text_projection|visual_projection|logit_scale|logit_bias)")
# Files of a checkpoint that say how its inputs are made; saved back as they were read.
SIDECAR = (
    "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json merges.txt vocab.txt tokenizer.model "
    "spiece.model chat_template.json chat_template.jinja preprocessor_config.json processor_config.json video_preprocessor_config.json"
).split()
HUB_PATTERNS = ["*.json", "*.jinja", "*.txt", "*.model", "*.safetensors", "*.bin"]


@dataclass(frozen=True)
class Stored:
    """A tensor in a file. `key` is its name there."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype


def canonical(key: str) -> str:
    """Our name for a tensor of either format."""
    for pattern, replacement in RENAMES:
        renamed = re.sub(pattern, replacement, key)
        if renamed != key:
            key = renamed
            break
    return key.replace("vision_tower.vision_model.", "vision_tower.", 1)


def resolve(path: str | os.PathLike) -> Path:
    """A local directory, or a hub id downloaded to the cache. Raises ValueError when it is neither."""
    directory = Path(path)
    if directory.is_dir():
        return directory
    if directory.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        raise ValueError(f"{str(path)!r} is neither a checkpoint directory nor a hub id (owner/name)")
    try:
        return Path(snapshot_download(str(path), allow_patterns=HUB_PATTERNS))
    except (OSError, ValueError) as error:
        raise ValueError(f"{str(path)!r} is no local directory and could not be fetched from the hub: {error}") from error


def read_config(directory: Path) -> dict[str, Any]:
    file = directory / "config.json"
    if not file.is_file():
        raise ValueError(f"{directory} has no config.json")
    return read_json(file)


def read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object, got a {type(content).__name__}")
    return content


def weight_files(directory: Path) -> list[Path]:
    """The files transformers would read: model.safetensors, or what its index names, or the same of pytorch_model.bin; where there
    are none of these, all *.safetensors, or else all *.bin. Raises ValueError for shards that are not there, and for no weights."""
    for single in (directory / "model.safetensors", directory / "pytorch_model.bin"):
        if single.is_file():
            return [single]
        index = single.with_name(f"{single.name}.index.json")
        if index.is_file():
            shards = sorted(set(read_json(index)["weight_map"].values()))
            absent = [name for name in shards if not (directory / name).is_file()]
            if absent:
                raise ValueError(f"{index.name} names shards that are not in {directory}: {absent}")
            return [directory / name for name in shards]
    files = sorted(directory.glob("*.safetensors")) or sorted(directory.glob("*.bin"))
    if not files:
        raise ValueError(f"{directory} has no *.safetensors and no *.bin weights")
    return files


def index_tensors(directory: Path) -> dict[str, Stored]:
    """Canonical name -> where the tensor is, of a directory's weights. Reads headers only."""
    files = weight_files(directory)
    stored: dict[str, Stored] = {}
    for file in files:
        for key, shape, dtype in _headers(file):
            if RECOMPUTED.search(key):
                continue
            name = canonical(key)
            if name in stored:
                raise ValueError(f"{name} is stored twice: {stored[name].key!r} in {stored[name].file.name}, {key!r} in {file.name}")
            stored[name] = Stored(file, key, shape, dtype)
    return stored


def _headers(file: Path) -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
    if file.suffix == ".bin":
        for key, tensor in _read_bin(file).items():
            yield key, tuple(tensor.shape), tensor.dtype
        return
    try:
        with safe_open(file, framework="pt") as handle:
            for key in handle.keys():
                view = handle.get_slice(key)
                yield key, tuple(view.get_shape()), SAFETENSORS_DTYPES.get(view.get_dtype(), torch.uint8)
    except SafetensorError as error:
        raise ValueError(f"{file} is not a safetensors file: {error}") from error


SAFETENSORS_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def _read_bin(file: Path) -> dict[str, Tensor]:
    """Mapped, not read; the format of torch before 1.6 cannot be mapped and is held whole while it is open."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        raise ValueError(f"{file} is not a file of plain tensors: {str(error).splitlines()[0]}") from error


def read_tensors(stored: dict[str, Stored]) -> Iterator[tuple[str, Tensor]]:
    """The tensors, file by file; each is a view of the mapped file, to be copied before the next is asked for."""
    by_file: dict[Path, list[str]] = {}
    for name, place in stored.items():
        by_file.setdefault(place.file, []).append(name)
    for file, names in by_file.items():
        if file.suffix == ".bin":
            tensors = _read_bin(file)
            for name in names:
                yield name, tensors[stored[name].key]
        else:
            with safe_open(file, framework="pt") as handle:
                for name in names:
                    yield name, handle.get_tensor(stored[name].key)


def is_carried(name: str, config: LlavaConfig) -> bool:
    """Whether a tensor belongs to the checkpoint although nothing here runs it."""
    if name == "language_model.faster_token" or (name == "image_newline" and not config.has_newline):
        return True
    layer = re.match(r"vision_tower\.encoder\.layers\.(\d+)\.", name)
    if layer:
        return config.executed_layers <= int(layer[1]) < config.vision.layers
    return name.startswith(("vision_tower.post_layernorm.", "vision_tower.head."))


def load_into(
    model: Llava,
    stored: dict[str, Stored],
    device: torch.device,
    dtype: torch.dtype,
    grown: dict[str, int],
) -> dict[str, Tensor]:
    """Fill a model built on the meta device from checked tensors; returns the carried ones. `grown`: see `check_tensors`."""
    parameters, derived = dict(model.named_parameters()), derived_tensors(model.config)
    carried: dict[str, Tensor] = {}
    for name, tensor in read_tensors({n: stored[n] for n in stored if n not in derived}):
        if name not in parameters:
            carried[name] = tensor.clone()
            continue
        shape = (max(tensor.shape[0], grown.get(name, 0)), *tensor.shape[1:])
        value = memory.empty(shape, dtype, device)
        value[: tensor.shape[0]].copy_(tensor)
        if shape[0] > tensor.shape[0]:  # new vocabulary rows: the mean row, which no logit prefers
            value[tensor.shape[0] :] = tensor.float().mean(0).to(dtype)
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(value))
    model.join()
    for name, tensor in read_tensors({n: stored[n] for n in derived if n in stored}):
        _check_derived(name, tensor, model)
    return carried


def derived_tensors(config: LlavaConfig) -> set[str]:
    """In a file, but equal to something else by construction: checked, not kept."""
    head = {"lm_head.weight"} if config.decoder.tied else set()
    linear = {"multi_modal_projector.linear_2.weight", "multi_modal_projector.linear_2.bias"} if config.projector == "linear" else set()
    return head | linear


def check_tensors(model: Llava, stored: dict[str, Stored], grown: dict[str, int]) -> None:
    """Raise ValueError naming every missing, unexpected and wrongly shaped tensor. `grown`: rows that vocabulary matrices may have
    fewer of in the file."""
    config, parameters, derived = model.config, dict(model.named_parameters()), derived_tensors(model.config)
    missing = sorted(name for name in parameters if name not in stored)
    unexpected = sorted(stored[n].key for n in stored if n not in parameters and n not in derived and not is_carried(n, config))
    wrong = []
    for name, parameter in parameters.items():
        if name in stored:
            expected = tuple(parameter.shape)
            if name in grown and stored[name].shape[0] < grown[name]:
                expected = (stored[name].shape[0], *expected[1:])
            if stored[name].shape != expected:
                wrong.append(f"{stored[name].key} is {list(stored[name].shape)}, expected {list(expected)}")
    quantised = sorted(place.key for name, place in stored.items() if name in parameters and not place.dtype.is_floating_point)
    faults = {"missing": missing, "unexpected": unexpected, "wrongly shaped": wrong, "not of a float dtype": quantised}
    if any(faults.values()):
        told = "; ".join(
            f"{len(names)} {what}: {', '.join(names[:8])}{', ...' * (len(names) > 8)}" for what, names in faults.items() if names
        )
        raise ValueError(f"the checkpoint does not fit its config: {told}")


def _check_derived(name: str, tensor: Tensor, model: Llava) -> None:
    if name == "lm_head.weight":
        ok, rule = (
            torch.equal(tensor.to(model.stored_dtype), model.language_model.embed_tokens.weight[: tensor.shape[0]].cpu()),
            "equal embed_tokens (the head is tied)",
        )
    elif name.endswith("weight"):
        ok, rule = torch.equal(tensor.float(), torch.eye(tensor.shape[0])), "be the identity (the projector is linear)"
    else:
        ok, rule = not tensor.any(), "be zero (the projector is linear)"
    if not ok:
        raise ValueError(f"{name} should {rule}, but is not")


@dataclass(frozen=True)
class Opened:
    """A checkpoint whose headers were read. inputs_dir: tokenizer and processor files.  grown: as load_into takes it."""

    directory: Path
    config: LlavaConfig
    stored: dict[str, Stored]
    inputs_dir: Path
    grown: dict[str, int]

    @property
    def dtype(self) -> torch.dtype:
        """That of the embedding table."""
        embed = self.stored.get("language_model.embed_tokens.weight")
        return embed.dtype if embed is not None and embed.dtype.is_floating_point else torch.float32


@contextmanager
def opened(path: str | os.PathLike, vision_tower: str | os.PathLike | None = None) -> Iterator[Opened]:
    """Read config and tensor headers of either format; `inputs_dir` may be gone after the block."""
    directory = resolve(path)
    raw = read_config(directory)
    stored = index_tensors(directory)
    if not original.is_original(raw):
        yield Opened(directory, from_hf(AutoConfig.from_pretrained(directory)), stored, directory, {})
        return
    with tempfile.TemporaryDirectory() as scratch:
        hf, stored = original.read(directory, raw, stored, vision_tower, Path(scratch))
        config = from_hf(hf)
        rows = config.decoder.vocab_size
        yield Opened(directory, config, stored, Path(scratch), {"language_model.embed_tokens.weight": rows, "lm_head.weight": rows})


def input_spec(path: str | os.PathLike) -> InputSpec:
    """What inputs need to know of a checkpoint, without its weights. Raises ValueError as `load` does."""
    with opened(path) as found:
        return _input_spec(found)


def _input_spec(found: Opened) -> InputSpec:
    config = found.config
    return InputSpec.from_dir(
        found.inputs_dir,
        image_token_id=config.image_token_id,
        grid=config.vision.grid,
        tile=config.vision.image_size,
        max_positions=config.decoder.max_positions,
        options=config.options,
        has_newline=config.has_newline,
        extra_rows=config.patches - config.vision.grid**2,
    )


def load(
    kind: type[M],
    path: str | os.PathLike,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    vision_tower: str | os.PathLike | None = None,
) -> M:
    """Read a checkpoint into a model of this kind (`llava_fast.load` makes a `LlavaFast`).

    path: a transformers `llava` directory or hub id, or an original LLaVA / LLaVA-NeXT directory.  device 'auto': the GPU where
    there is one.  dtype 'auto': as in the checkpoint.  vision_tower: where an original checkpoint's tower is, if not where its
    config says.  Raises ValueError for anything that does not fit, before weights are read (after it for a
    stored tensor that should equal another one).
    """
    place, stored_as = as_device(device), _dtype(dtype)
    if place.type == "cpu":
        memory.keep_freed_memory()
    with opened(path, vision_tower) as found:
        config, inputs_dir = found.config, found.inputs_dir
        with torch.device("meta"):
            model = kind(config)
        check_tensors(model, found.stored, found.grown)
        model.input_spec = _input_spec(found)
        processor = model.input_spec.image_processor
        model.image_mean, model.image_std, model.image_rescale = processor.image_mean, processor.image_std, processor.rescale
        model.generation_config = read_generation_config(inputs_dir, model.input_spec.tokenizer)
        model.sidecar = {name: (inputs_dir / name).read_bytes() for name in SIDECAR if (inputs_dir / name).is_file()}
        model.carried = load_into(model, found.stored, place, stored_as or found.dtype, found.grown)
    return model.eval()


def as_device(device: str | torch.device) -> torch.device:
    """'auto' is the GPU where there is one. Raises ValueError for a device that is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must be 'auto', 'cpu', 'cuda' or 'cuda:N', got {device!r}") from error
    if place.type not in ("cpu", "cuda") or (place.type == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"device {str(device)!r} is not there: expected 'cpu'" + (" or 'cuda'" if torch.cuda.is_available() else ""))
    return place


def _dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """None for 'auto'."""
    if dtype == "auto":
        return None
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype must be 'auto' or a float dtype such as 'bfloat16', got {dtype!r}")
    return found


def read_generation_config(directory: Path, tokenizer: Any) -> GenerationConfig:
    """The checkpoint's; a stop token that it lacks is the tokenizer's."""
    file = directory / "generation_config.json"
    config = GenerationConfig(**read_json(file)) if file.is_file() else GenerationConfig()
    if config.eos_token_id is None:
        config.eos_token_id = tokenizer.eos_token_id
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    return config


def hf_state_dict(model: Any) -> dict[str, Tensor]:
    """The names of released llava-hf checkpoints, which every version of transformers reads; carried tensors included."""
    tensors = {**{name: p.detach() for name, p in model.named_parameters()}, **model.carried}
    if model.config.projector == "linear":  # transformers always has two products: the second is the identity
        width, weight = model.config.decoder.width, tensors["multi_modal_projector.linear_1.weight"]
        tensors["multi_modal_projector.linear_2.weight"] = torch.eye(width, dtype=weight.dtype)
        if model.config.projector_bias:
            tensors["multi_modal_projector.linear_2.bias"] = torch.zeros(width, dtype=weight.dtype)
    renamed = {}
    for name, tensor in tensors.items():
        for prefix, replacement in (
            ("vision_tower.", "vision_tower.vision_model."),
            ("lm_head.", "language_model.lm_head."),
            ("language_model.", "language_model.model."),
        ):
            if name.startswith(prefix):
                name = replacement + name[len(prefix) :]
                break
        renamed[name] = tensor
    return renamed


def save_pretrained(model: Any, directory: str | os.PathLike, max_shard_size: str = "5GB") -> None:
    """Write a directory that transformers' LlavaForConditionalGeneration loads: weights, config, tokenizer and processor files.

    All is written beside its place first, so that an interruption or a full disk leaves what was there; then the files are moved in,
    weights first and config.json last, and weights of the model that was there are deleted. Other files stay.
    """
    target = Path(directory)
    if is_quantised(model):
        raise ValueError("a quantised model is not saved: save the one that was loaded, before it is quantised")
    if any(isinstance(module, LowRank) for module in model.modules()):
        raise ValueError("a model with adapters is not saved: merge them into it first (training.lora.merge)")
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file, not a directory to save to")
    target.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".saving-", dir=target))
    try:
        _save_shards(hf_state_dict(model), scratch, max_shard_size)
        raw = {
            **model.config.raw,
            "architectures": ["LlavaForConditionalGeneration"],
            "dtype": str(model.stored_dtype).removeprefix("torch."),
        }
        for name, content in model.sidecar.items():
            (scratch / name).write_bytes(content)
        (scratch / "generation_config.json").write_text(model.generation_config.to_json_string())
        (scratch / "config.json").write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n")
        before = _own_weights(target)
        new = sorted(scratch.iterdir(), key=lambda file: (file.name == "config.json", file.suffix != ".safetensors", file.name))
        for file in new:
            os.replace(file, target / file.name)
        for name in before - {file.name for file in new}:
            (target / name).unlink(missing_ok=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _save_shards(tensors: dict[str, Tensor], folder: Path, max_shard_size: str) -> None:
    """Weights that lie side by side in one storage are written one by one, at the cost of copies of one shard at a time."""
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=max_shard_size)
    for file, names in split.filename_to_tensors.items():
        save_file({name: tensors[name].to("cpu", copy=True) for name in names}, folder / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _own_weights(directory: Path) -> set[str]:
    """Names of the weight files of a transformers directory: single ones, indices, and the shards these name."""
    names = {"model.safetensors", "pytorch_model.bin"}
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (directory / index).is_file():
            names |= {index, *(Path(name).name for name in read_json(directory / index)["weight_map"].values())}
    return names
