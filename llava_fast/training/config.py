"""`TrainConfig`: everything a training run depends on, as plain data.

Defaults are those of LLaVA-NeXT's full fine-tuning (scripts/train/direct_finetune_siglip_a4.sh: lr 1e-5, tower 2e-6, cosine, 3 % warm-up,
no weight decay, clip 1, one epoch), with transformers' AdamW; those marked "ours" have no counterpart there.
"""

from __future__ import annotations

import dataclasses
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from llava_fast.checks import closest, is_int, is_number, require, shown
from llava_fast.inputs.labels import Template
from llava_fast.requests import InputOptions
from llava_fast.training.options import DpoOptions, LoraOptions
from llava_fast.training.recipes import resolve

PARTS = ("vision_tower", "projector", "decoder")
PartLr = float | Literal["lr", "frozen"] | None


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-5 as a string (it wants 1.0e-5); everybody who writes a learning rate means the number."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789"))


@dataclass(frozen=True)
class TrainConfig:
    """One run. Raises ValueError for a value out of range.

    model: checkpoint directory or hub id.  data: files and folders of records (see inputs/sources.py).
    media_folder: where media paths start; None: beside each data file.  output_dir: checkpoints, metrics.jsonl and, at the end, an
    HF directory.  template, inputs: how a record becomes tokens and views (inputs/labels.py, requests.InputOptions).
    on_bad_record: 'error', or 'skip' to leave out records that are broken or longer than a row; each is listed in skipped.txt.
    epochs: passes over the data; max_steps, where given, decides instead.
    tokens_per_row, views_per_row: what one packed row holds at most; rows_per_step: rows whose gradients are summed before an
    optimiser step (the loss is the mean over all their labels, so 2 x 8k tokens is 1 x 16k).
    lr_*: learning rate of each part; "lr": the same as `lr`; None or "frozen": not trained. The decoder is everything that is
    neither tower nor projector, embeddings, head and newline row included.  clip: largest gradient norm, None: no clipping.
    precision: 'fp32'; 'bf16': weights in bf16 (and activations, on a GPU: the CPU widens to fp32), master weights, gradient sums and
    moments in fp32; 'auto': bf16 on a GPU, fp32 on the CPU; 'bf16_pure': weights, gradients and moments in bf16 and nothing besides, 8
    bytes a parameter instead of 18, each rounded up or down at random so that small steps count on average; it changes results.
    save_every: steps between checkpoints, None: only when interrupted; the newest `keep` stay.  resume: go on from the newest one.
    workers: threads that decode media ahead of the step.  cache_mb: memory for decoded samples, which later epochs then need not
    read again.

    tensorboard: write events to output_dir/tensorboard; wandb: log to Weights & Biases (installed and logged in by you).
    validation_data: mixture files like `data` whose loss, by scenario, is taken every `validate_every` steps and after the last one
    (None: only then); it changes nothing of the training.
    spike_factor: the run stops where a step's loss is above this many times the median of the last `spike_window` ones; None: never.

    index_dir: where indexes of data are kept and found again; None: `index` beside output_dir.  too_long: a record longer than a row or
    the context: 'refuse': as any bad record; 'skip': left out and counted; 'cut': its last questions and answers are left out until it
    fits, and counted.  front_share: share of the records with several pictures that have them all before the first question, with
    "(image 2)" where the second stood; drawn once a record, by the seed.

    lora: adapters on the decoder, whose own weights then stay as they are (training/lora.py); lr_decoder is theirs.  output_dir is then an
    adapter's directory, in PEFT's format.
    dpo: the data are preference pairs (training/preferences.py), and the loss is DPO's.
    feature_cache: a folder for a frozen tower's features (training/features.py), which later epochs and runs read; feature_cache_gb: how
    much it may hold.
    """

    model: str
    data: tuple[str, ...]
    output_dir: str
    media_folder: str | None = None
    template: Template = "hf"  # ours
    inputs: InputOptions = field(default_factory=InputOptions)
    on_bad_record: Literal["error", "skip"] = "error"  # ours
    epochs: int = 1
    max_steps: int | None = None
    tokens_per_row: int = 16384  # ours: upstream pads samples of up to 32768
    views_per_row: int | None = None  # ours
    rows_per_step: int = 1  # ours
    packing_window: int = 256  # ours
    lr: float = 1e-5
    lr_vision_tower: PartLr = 2e-6
    lr_projector: PartLr = "lr"
    lr_decoder: PartLr = "lr"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup_ratio: float = 0.03
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    clip: float | None = 1.0
    precision: Literal["auto", "fp32", "bf16", "bf16_pure"] = "auto"  # upstream: bf16
    seed: int = 42  # transformers' default
    device: str = "auto"  # ours
    save_every: int | None = 500
    keep: int = 2  # ours
    resume: bool = True
    log_every: int = 10  # ours
    progress: bool = True  # ours
    workers: int = 4  # ours
    cache_mb: int = 1024  # ours
    # How a step is computed. checkpointing: activations that the backward pass makes again instead of keeping them: 'none', 'full' (each
    # block from its input) or 'selective' (all but attention); gradients stay the same.  optimizer: 'adamw', or 'adamw_8bit' with moments
    # in 8 bits (bitsandbytes).  compile: torch.compile for the blocks; off, since the kernels here are fused already.
    checkpointing: Literal["none", "full", "selective"] = "none"  # upstream: full
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    compile: bool = False  # upstream: true

    # While it runs (docs/training.md, section 7); all ours.
    tensorboard: bool = False
    wandb: bool = False
    validation_data: tuple[str, ...] = ()
    validate_every: int | None = None
    spike_factor: float | None = None  # a small step's loss may jump for honest reasons: 0.05 to 0.6 where one sample is hard
    spike_window: int = 100

    # data, see inputs/sources.py and training/index.py
    index_dir: str | None = None  # ours
    too_long: Literal["refuse", "skip", "cut"] = "refuse"  # ours: upstream cuts ids, through pictures too
    front_share: float = 0.0  # the paper mixes both formats, by a share that it does not give

    lora: LoraOptions | None = None
    dpo: DpoOptions | None = None
    feature_cache: str | None = None  # ours
    feature_cache_gb: float | None = None  # ours

    # Several processes (docs/training.md, section 6); all ours.
    sequence_parallel: int = 1  # processes that share each row
    collective_timeout: int = 1800  # seconds after which a process gives up on another

    def __post_init__(self) -> None:
        data = (self.data,) if isinstance(self.data, (str, os.PathLike)) else self.data
        paths = isinstance(data, (list, tuple)) and all(isinstance(path, (str, os.PathLike)) for path in data)
        require(paths and len(data) > 0, "data", data, "at least one file")
        object.__setattr__(self, "data", tuple(os.fspath(path) for path in data))
        held_out = (self.validation_data,) if isinstance(self.validation_data, (str, os.PathLike)) else self.validation_data
        paths = isinstance(held_out, (list, tuple)) and all(isinstance(path, (str, os.PathLike)) for path in held_out)
        require(paths, "validation_data", held_out, "files")
        object.__setattr__(self, "validation_data", tuple(os.fspath(path) for path in held_out))
        for name in ("model", "output_dir", "media_folder", "index_dir", "feature_cache"):
            value = getattr(self, name)
            if isinstance(value, os.PathLike):
                object.__setattr__(self, name, os.fspath(value))
        for part in PARTS:
            if getattr(self, f"lr_{part}") == "frozen":  # TOML has no null
                object.__setattr__(self, f"lr_{part}", None)
        require(isinstance(self.betas, (list, tuple)), "betas", self.betas, "two numbers in [0, 1)")
        object.__setattr__(self, "betas", tuple(self.betas))
        if isinstance(self.inputs, Mapping):
            object.__setattr__(self, "inputs", _build(InputOptions, self.inputs, "inputs"))
        for name, kind in (("lora", LoraOptions), ("dpo", DpoOptions)):
            value = getattr(self, name)
            if isinstance(value, (bool, Mapping)):  # `lora: true` is all defaults
                made = (kind() if value else None) if isinstance(value, bool) else _build(kind, value, name)
                object.__setattr__(self, name, made)
        self._check()
        self._check_adapters()

    def _check(self) -> None:
        for name, expected in (
            ("model", "a checkpoint directory or hub id"),
            ("output_dir", "a directory"),
            ("device", "'auto' or a device"),
        ):
            value = getattr(self, name)
            require(isinstance(value, str) and bool(value), name, value, expected)
        require(self.media_folder is None or isinstance(self.media_folder, str), "media_folder", self.media_folder, "a directory or None")
        for name in ("resume", "progress", "tensorboard", "wandb"):
            require(isinstance(getattr(self, name), bool), name, getattr(self, name), "true or false")
        require(isinstance(self.inputs, InputOptions), "inputs", self.inputs, "InputOptions or a mapping of their fields")
        for name in (
            "epochs",
            "tokens_per_row",
            "rows_per_step",
            "packing_window",
            "keep",
            "log_every",
            "workers",
        ):
            require(_whole(getattr(self, name), 1), name, getattr(self, name), "an integer >= 1")
        for name in ("spike_window", "sequence_parallel", "collective_timeout"):
            require(_whole(getattr(self, name), 1), name, getattr(self, name), "an integer >= 1")
        for name in ("max_steps", "views_per_row", "save_every", "validate_every"):
            require(getattr(self, name) is None or _whole(getattr(self, name), 1), name, getattr(self, name), "an integer >= 1 or None")
        for name in ("seed", "cache_mb"):
            require(_whole(getattr(self, name), 0), name, getattr(self, name), "an integer >= 0")
        require(is_number(self.lr) and self.lr > 0, "lr", self.lr, "a number > 0")
        for part in PARTS:
            value = getattr(self, f"lr_{part}")
            require(value in (None, "lr") or (is_number(value) and value > 0), f"lr_{part}", value, "a number > 0, 'lr', or 'frozen'")
        require(any(self.part_lr(part) is not None for part in PARTS), "lr_vision_tower, lr_projector, lr_decoder", None, "not all frozen")
        require(len(self.betas) == 2 and all(is_number(b) and 0 <= b < 1 for b in self.betas), "betas", self.betas, "two numbers in [0, 1)")
        require(is_number(self.eps) and self.eps > 0, "eps", self.eps, "a number > 0")
        require(is_number(self.weight_decay) and self.weight_decay >= 0, "weight_decay", self.weight_decay, "a number >= 0")
        require(is_number(self.warmup_ratio) and 0 <= self.warmup_ratio <= 1, "warmup_ratio", self.warmup_ratio, "in [0, 1]")
        require(self.clip is None or (is_number(self.clip) and self.clip > 0), "clip", self.clip, "a number > 0 or None")
        spike = self.spike_factor
        require(spike is None or (is_number(spike) and spike > 1), "spike_factor", spike, "a number > 1 or None")
        require(
            self.validate_every is None or bool(self.validation_data), "validate_every", self.validate_every, "None without validation_data"
        )
        require(
            self.inputs.tokenisation == "hf", "inputs.tokenisation", self.inputs.tokenisation, "left alone: `template` decides in training"
        )
        require(self.index_dir is None or isinstance(self.index_dir, str), "index_dir", self.index_dir, "a directory or None")
        require(is_number(self.front_share) and 0 <= self.front_share <= 1, "front_share", self.front_share, "in [0, 1]")
        _one_of("too_long", self.too_long, ("refuse", "skip", "cut"))
        _one_of("template", self.template, get_args(Template))
        _one_of("on_bad_record", self.on_bad_record, ("error", "skip"))
        _one_of("schedule", self.schedule, ("cosine", "linear", "constant"))
        _one_of("precision", self.precision, ("auto", "fp32", "bf16", "bf16_pure"))
        self._check_step()

    def _check_step(self) -> None:
        _one_of("checkpointing", self.checkpointing, ("none", "full", "selective"))
        _one_of("optimizer", self.optimizer, ("adamw", "adamw_8bit"))
        require(isinstance(self.compile, bool), "compile", self.compile, "true or false")
        if self.precision == "bf16_pure" and self.optimizer != "adamw":
            raise ValueError(f"precision bf16_pure rounds in an optimiser of its own: it takes optimizer adamw, got {self.optimizer}")

    def _check_adapters(self) -> None:
        require(isinstance(self.lora, LoraOptions | None), "lora", self.lora, "a mapping of LoraOptions, true or None")
        require(isinstance(self.dpo, DpoOptions | None), "dpo", self.dpo, "a mapping of DpoOptions, true or None")
        if self.lora is not None:
            require(self.lr_decoder is not None, "lr_decoder", self.lr_decoder, "a learning rate where there is lora: the adapters'")
            require(self.lr_vision_tower is None, "lr_vision_tower", self.lr_vision_tower, "'frozen' where there is lora")
        if self.dpo is not None:  # settings of records that pairs have no use for
            require(self.too_long != "cut", "too_long", self.too_long, "'refuse' or 'skip' where there is dpo: answers are not cut")
            require(self.front_share == 0, "front_share", self.front_share, "0 where there is dpo: marks stay where they are")
            require(self.index_dir is None, "index_dir", self.index_dir, "None where there is dpo: pairs have no index")
        require(self.feature_cache is None or isinstance(self.feature_cache, str), "feature_cache", self.feature_cache, "a folder or None")
        limit = self.feature_cache_gb
        require(limit is None or (is_number(limit) and limit > 0), "feature_cache_gb", limit, "a number > 0 or None")
        require(limit is None or self.feature_cache is not None, "feature_cache_gb", limit, "None without feature_cache")
        if self.feature_cache is not None:
            require(self.lr_vision_tower is None, "lr_vision_tower", self.lr_vision_tower, "'frozen' where there is a feature_cache")
        for name in ("dpo", "feature_cache"):  # a row's part has no preference of its own, and of a picture perhaps a half
            if getattr(self, name) is not None:
                require(self.sequence_parallel == 1, "sequence_parallel", self.sequence_parallel, f"1 with {name}")

    def part_lr(self, part: str) -> float | None:
        """Peak learning rate of 'vision_tower', 'projector' or 'decoder'; None where it is frozen."""
        value = getattr(self, f"lr_{part}")
        return self.lr if value == "lr" else value


def as_config(config: TrainConfig | Mapping[str, Any] | str | os.PathLike) -> TrainConfig:
    """A `TrainConfig` from one, a mapping of its fields, or the path of a .yaml, .yml or .toml file that holds them; `recipe` among them
    names a recipe (training/recipes.py) that gives the others.

    Raises ValueError for an unknown field (naming the closest), a missing one, or a file that is not readable as such.
    """
    if isinstance(config, TrainConfig):
        return config
    if isinstance(config, Mapping):
        return _build(TrainConfig, resolve(config), "the training configuration")
    return _build(TrainConfig, resolve(read_fields(config), str(config)), str(config))


def read_fields(config: str | os.PathLike) -> dict[str, Any]:
    """What a .yaml, .yml or .toml file holds. Raises ValueError."""
    path = Path(config)
    if path.suffix not in (".yaml", ".yml", ".toml") or not path.is_file():
        raise ValueError(f"a training configuration is a .yaml or .toml file, got {path}" + ("" if path.is_file() else " (no such file)"))
    try:
        fields = tomllib.loads(path.read_text()) if path.suffix == ".toml" else yaml.load(path.read_text(), _Loader)
    except (tomllib.TOMLDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} must hold the fields of a TrainConfig, got {type(fields).__name__}")
    return fields


def change_fields(fields: Mapping[str, Any], changes: Sequence[str]) -> dict[str, Any]:
    """Fields with changes like "lr=1e-4" or "lora.r=128", values as in YAML. Raises ValueError for what is not of that form."""
    changed = dict(fields)
    for change in changes:
        name, equals, text = change.partition("=")
        outer, _, inner = name.partition(".")
        if not equals or not outer or name.endswith("."):
            raise ValueError(f"a change is written like lr=1e-4 or lora.r=128, got {shown(change)}")
        try:
            value = yaml.load(text, _Loader)
        except yaml.YAMLError as error:
            raise ValueError(f"{name} cannot be read: {error}") from error
        before = changed.get(outer)
        changed[outer] = {**(before if isinstance(before, Mapping) else {}), inner: value} if inner else value
    return changed


def _build(kind: type, fields: Mapping[str, Any], where: str) -> Any:
    known = {f.name: f for f in dataclasses.fields(kind)}
    for name in fields:
        if name not in known:
            raise ValueError(f"{where} has no field {shown(name)}{closest(name, known)}")
    required = [f.name for f in known.values() if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING]
    missing = [name for name in required if name not in fields]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}")
    return kind(**fields)


def _whole(value: object, least: int) -> bool:
    return isinstance(value, int) and is_int(value) and value >= least


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    require(value in allowed, name, value, " or ".join(allowed))
