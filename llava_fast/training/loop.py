"""`train`: a run from configuration to checkpoint, on one device or several; stops and goes on bit for bit."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zlib import crc32

import torch

from llava_fast import checkpoint
from llava_fast.memory import kept_memory
from llava_fast.models.llava import Llava
from llava_fast.quantise import is_quantised, quantised_tensors
from llava_fast.training.batches import Dataset, ahead, make_steps, plan_epoch, total_steps
from llava_fast.training.checkpoint import Run, list_states
from llava_fast.training.config import TrainConfig, as_config
from llava_fast.training.dataset import index_records
from llava_fast.training.distributed import Ranks, ThroughRoot, check_ranks, connected, gather_parameters, make_share, shard, trained_shards
from llava_fast.training.dpo import Logps, PreferenceLoss
from llava_fast.training.features import CachedData, CachedObjective, FeatureCache, weights_fingerprint
from llava_fast.training.footprint import check_fits
from llava_fast.training.lora import adapters, attach, load, save_adapter
from llava_fast.training.preferences import index_pairs
from llava_fast.training.report import Report, StepMetrics
from llava_fast.training.step import LabelLoss, Objective, count, make_optimizer, prepare_parameters
from llava_fast.training.steps import Loop, Watched, stop_request
from llava_fast.training.validation import plan_validation

SAMPLED = 1 << 14  # values of a frozen tensor that a run is recognised by

# Settings that may change between a checkpoint and the run that goes on from it: none of them changes a loss. Where model and data lie
# is free; what they hold is compared (`_settings`).
FREE = {
    "model",
    "data",
    "media_folder",
    "output_dir",
    "device",
    "save_every",
    "keep",
    "resume",
    "log_every",
    "progress",
    "workers",
    "cache_mb",
    "tensorboard",
    "wandb",
    "validation_data",
    "validate_every",
    "spike_factor",
    "spike_window",
    "checkpointing",
    "index_dir",
    "feature_cache",
    "feature_cache_gb",
    "collective_timeout",
    "sequence_parallel",
}


@dataclass(frozen=True)
class TrainResult:
    """What a run did. losses: mean loss of every step since step 1, those before a resume included; the other counts are of this call.

    output_dir: the HF directory, which `load` and transformers read.  skipped: why each left-out record was left out.
    data_wait: seconds of `seconds` in which the device waited for rows.  fill: used share of the rows of the first epoch.
    validation: the losses on validation_data after the last step, by scenario.
    """

    output_dir: str
    steps: int
    losses: list[float]
    tokens: int
    labels: int
    samples: int
    seconds: float
    data_wait: float
    fill: float
    skipped: list[str] = field(default_factory=list)
    validation: dict[str, float] = field(default_factory=dict)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


def train(config: TrainConfig | Mapping[str, Any] | str | os.PathLike, on_step: Callable[[StepMetrics], None] | None = None) -> TrainResult:
    """Train a checkpoint as configured and write an HF directory to `output_dir`.

    config: a `TrainConfig`, a mapping of its fields, or a YAML or TOML file.  on_step: called after every `log_every` steps, once
    for each. Ctrl-C finishes the step, saves a checkpoint and raises KeyboardInterrupt, SIGTERM likewise and SystemExit(143); the same
    call goes on from there.
    Raises ValueError for a bad configuration, record or checkpoint before the first step, FloatingPointError, naming samples, for a
    loss that is not finite or that jumped (`spike_factor`), and OSError where the last checkpoint could not be written.
    """
    config = as_config(config)
    device = checkpoint.as_device(config.device)
    if os.path.realpath(config.output_dir) == os.path.realpath(config.model):
        raise ValueError(
            f"output_dir must not be the model's own directory, got {config.output_dir} for both: a resumed run reads the model"
        )
    with connected(device, config.collective_timeout) as (ranks, device):
        config = dataclasses.replace(config, progress=config.progress and ranks.first)
        Path(config.output_dir).mkdir(parents=True, exist_ok=True)
        skipped = Skipped(Path(config.output_dir), ranks)
        check_ranks(config, ranks)
        alone = ranks.world == 1
        quantised = config.lora is not None and config.lora.base is not None  # whose weights are in no shard, and stay where they are made
        dtype = torch.float32 if alone else "auto"
        model = load(Llava, config.model, device=device if alone or quantised else "cpu", dtype=dtype)
        check_ranks(config, ranks, model.config.decoder)
        if device.type == "cuda":
            capacity = torch.cuda.get_device_properties(device).total_memory
            check_fits(model.config, config, precision_on(config, device), ranks.world, capacity)
        data, held_out = ranks.first_then_others(lambda: _index(config, model, skipped))
        objective = LabelLoss() if config.dpo is None else PreferenceLoss(config.dpo)
        if config.lora is not None:
            attach(model, config.lora, config.seed)
            torch.manual_seed(config.seed + ranks.rank)  # of their dropout; a checkpoint holds the generator's state
        result = fit(model, data, config, device, on_step, skipped, objective, held_out, ranks)
        ranks.first_then_others(lambda: _save(model, config) if ranks.first else None)
    return result


def _index(config: TrainConfig, model: Llava, skipped: Skipped) -> tuple[Dataset, Dataset | None]:
    """The records or pairs to train on, and those to validate on."""

    def index(settings: TrainConfig) -> Dataset:
        on_bad = skipped if config.on_bad_record == "skip" else None
        if config.dpo is None:
            return index_records(settings, model.input_spec, on_bad, skipped)
        return index_pairs(settings, model.input_spec, on_bad, skipped)

    return index(config), index(dataclasses.replace(config, data=config.validation_data)) if config.validation_data else None


def _save(model: Llava, config: TrainConfig) -> None:
    if config.lora is not None:
        save_adapter(model, config.output_dir, config.model)
    else:
        checkpoint.save_pretrained(model, config.output_dir)


class Skipped:
    """Collects the messages of left-out records, each once, in memory and in skipped.txt, which the first rank writes."""

    def __init__(self, folder: Path, ranks: Ranks | None = None):
        self.path, self.ranks = folder / "skipped.txt", ranks or Ranks()
        self.messages: dict[str, None] = {}
        self.lock = threading.Lock()
        if self.ranks.first:
            self.path.unlink(missing_ok=True)

    def __call__(self, message: str) -> None:
        with self.lock:
            if message not in self.messages:
                self.messages[message] = None
                if self.ranks.first:
                    with self.path.open("a") as file:
                        file.write(message + "\n")

    def all(self) -> list[str]:
        """Those of every rank."""
        for message in [message for messages in self.ranks.gather(list(self.messages)) for message in messages]:
            self(message)
        return list(self.messages)


def fit(
    model: Any,
    data: Dataset,
    config: TrainConfig,
    device: torch.device | str = "cpu",
    on_step: Callable[[StepMetrics], None] | None = None,
    skipped: Skipped | None = None,
    objective: Objective | None = None,
    held_out: Dataset | None = None,
    ranks: Ranks | None = None,
) -> TrainResult:
    """Train `model` (an fp32 nn.Module) on `data`, in place: `train` without reading and writing models.

    objective: what a row adds to the loss; None: the cross-entropy of its labels, by `model.loss(batch, reduction)`.
    held_out: samples whose loss is taken as `config.validate_every` says.
    ranks: all that train together, each with the whole model on its CPU; the first one's gets the trained weights, to be saved.
    """
    device, folder, ranks = torch.device(device), Path(config.output_dir), ranks or Ranks()
    if is_quantised(model) and not adapters(model):
        raise ValueError("a quantised model cannot be trained: load it without quantise, or train adapters on it")
    folder.mkdir(parents=True, exist_ok=True)
    skipped = skipped or Skipped(folder, ranks)
    on_bad = skipped if config.on_bad_record == "skip" else None
    first_epoch = plan_epoch(data, config, 0)
    if not first_epoch.rows:
        raise ValueError(f"no record of {', '.join(config.data)} can be trained on ({len(skipped.messages)} left out)")
    total = total_steps(data, config)
    precision = precision_on(config, device)
    objective = objective or LabelLoss()
    if config.sequence_parallel > 1 and not isinstance(objective, LabelLoss):
        raise ValueError(f"sequence_parallel must be 1 with an objective of your own, got {config.sequence_parallel}")
    check_ranks(config, ranks, None if ranks.world == 1 else model.config.decoder)
    share = None if ranks.world == 1 else make_share(model, ranks, config.sequence_parallel)
    # Weights in bf16 under fp32 masters are FSDP's own affair where there are several processes.
    trained = prepare_parameters(model, config, "fp32" if ranks.world > 1 and precision == "bf16" else precision)
    settings = _settings(model, data, config, precision)
    base = None
    if isinstance(objective, PreferenceLoss):
        base = weights_fingerprint(model.named_parameters(), stored_dtype(precision)) + weights_fingerprint(quantised_tensors(model))
    validation = None if held_out is None else plan_validation(held_out, config, on_bad, ranks, share)
    root = None
    if ranks.world > 1:
        root = shard(model, device, precision)
        trained = trained_shards(root)
    cache = None
    if config.feature_cache is not None:
        cache = FeatureCache(config.feature_cache, model, config.feature_cache_gb)
        data = CachedData(data, cache)
        if held_out is not None and validation is not None:
            held_out = CachedData(held_out, cache)
            validation = dataclasses.replace(validation, data=held_out)

    def around(inner: Objective) -> Objective:
        inner = inner if cache is None else CachedObjective(inner, cache)
        return inner if root is None else ThroughRoot(inner, root)

    if isinstance(objective, PreferenceLoss):
        given = dict(objective=around(Logps()), base=base, ranks=ranks, share=share)
        objective.prepare(model, data, config, device, **given)
        if held_out is not None and validation is not None:
            judge = PreferenceLoss(objective.options)
            judge.prepare(model, held_out, config, device, name="reference-validation.pt", **given)
            validation = dataclasses.replace(validation, objective=around(judge))
    reference = isinstance(objective, PreferenceLoss) and objective.reference is None
    objective = around(objective)
    run = Run(trained, make_optimizer(trained.masters, config), settings)
    found = ranks.gather(list_states(folder))[0]  # a shared disk may show the others less
    if found and not config.resume:
        raise ValueError(f"{folder} holds checkpoints of an earlier run ({found[-1].name}): set resume, or choose another output_dir")
    if found:
        run.restore(found[-1], ranks)
    trained.publish()
    model.train()

    began = time.perf_counter()
    fill = first_epoch.fill(data.tokens, config.tokens_per_row)
    with Report(config, total, run.step, silent=not ranks.first, identity=run.identity) as report, stop_request(ranks.world == 1) as stop:
        report.say(
            f"{len(data.tokens):,} samples, {len(first_epoch.rows):,} rows an epoch ({fill:.1%} full), {total:,} steps, "
            f"{count(trained.working.values()):,} parameters trained in {precision}" + (f", from step {run.step}" if run.step else "")
        )
        loop = Loop(model, data, run, total, config, device, ranks, share, report, stop, on_step, Watched(objective), validation, reference)
        steps = contextlib.closing(ahead(make_steps(data, config, run.position, on_bad, share)))
        with kept_memory() if device.type == "cpu" else contextlib.nullcontext(), steps as made:
            loop.go(made)
        loop.finish()
    if ranks.world > 1:
        gather_parameters(model, ranks, torch.bfloat16 if precision == "bf16" else None)
    model.eval()
    return TrainResult(
        output_dir=config.output_dir,
        steps=run.step,
        losses=run.losses,
        tokens=run.tokens,
        labels=run.labels,
        samples=run.samples,
        seconds=time.perf_counter() - began,
        data_wait=run.data_wait,
        fill=fill,
        skipped=skipped.all(),
        validation=loop.validated,
    )


def _settings(model: torch.nn.Module, data: Dataset, config: TrainConfig, precision: str) -> dict[str, Any]:
    """What must not change between a checkpoint and the run that goes on from it: plain values, so that they can be compared and named."""
    settings = {name: _plain(value) for name, value in dataclasses.asdict(config).items() if name not in FREE}
    settings["precision"] = precision
    settings["data set"] = f"{len(data.tokens)} samples, contents {data.fingerprint:08x}"
    settings["base model"] = _base_model(model, stored_dtype(precision))
    return settings


def precision_on(config: TrainConfig, device: torch.device) -> str:
    """What 'auto' comes to."""
    return config.precision if config.precision != "auto" else "bf16" if device.type == "cuda" else "fp32"


def stored_dtype(precision: str) -> torch.dtype:
    """Of the model's own weights."""
    return torch.float32 if precision == "fp32" else torch.bfloat16


def _base_model(model: torch.nn.Module, stored: torch.dtype) -> str:
    """What a checkpoint does not hold of a model: its configuration, its parameters' shapes, and the weights that are not trained,
    quantised ones among them.

    Of a frozen tensor SAMPLED values or a few more are read: 1 ms for 45 M of them, where all take 100.
    """
    shapes = crc32(repr([(name, list(p.shape)) for name, p in model.named_parameters()]).encode())
    config = crc32(repr(getattr(model, "config", None)).encode())
    frozen = 0
    kept = [(parameter.detach(), stored) for parameter in model.parameters() if not parameter.requires_grad]
    for tensor, dtype in [*kept, *((tensor, tensor.dtype) for _, tensor in quantised_tensors(model))]:
        flat = tensor.flatten()
        sample = flat[:: max(1, len(flat) // SAMPLED)].to("cpu", dtype).contiguous()
        frozen = crc32(sample.view(torch.uint8).numpy().tobytes(), frozen)
    return f"configuration {config:08x}, shapes {shapes:08x}, frozen weights {frozen:08x}"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
