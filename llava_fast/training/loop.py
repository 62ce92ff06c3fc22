"""`train`: a run from configuration to checkpoint, on one device; stops and goes on bit for bit."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import signal
import statistics
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zlib import crc32

import torch

from llava_fast import checkpoint
from llava_fast.models.llava import Llava
from llava_fast.quantise import is_quantised
from llava_fast.training.batches import Dataset, Row, Step, ahead, make_steps, name_of, plan_epoch, total_steps
from llava_fast.training.checkpoint import Run, list_states
from llava_fast.training.config import TrainConfig, as_config
from llava_fast.training.dataset import index_records
from llava_fast.training.distributed import Ranks
from llava_fast.training.dpo import PreferenceLoss
from llava_fast.training.features import CachedData, CachedObjective, FeatureCache
from llava_fast.training.lora import adapters, attach, load, save_adapter
from llava_fast.training.preferences import index_pairs
from llava_fast.training.report import Report, StepMetrics, memory_held, peak_flops, step_flops
from llava_fast.training.step import LabelLoss, Objective, count, lr_factor, make_optimizer, prepare_parameters, train_step
from llava_fast.training.validation import Validation, plan_validation

SAMPLED = 1 << 14  # values of a frozen tensor that a run is recognised by
SPIKE_LEAST = 10  # losses that a median is taken of at least
NAMED = 100  # samples that a message names

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
    Path(config.output_dir).mkdir(parents=True, exist_ok=True)
    skipped = Skipped(Path(config.output_dir))
    on_bad = skipped if config.on_bad_record == "skip" else None
    model = load(Llava, config.model, device=device, dtype=torch.float32)
    if config.dpo is None:
        data: Dataset = index_records(config, model.input_spec, on_bad, skipped)
    else:
        data = index_pairs(config, model.input_spec, on_bad)
    objective = LabelLoss() if config.dpo is None else PreferenceLoss(config.dpo)
    held_out: Dataset | None = None
    if config.validation_data:
        settings = dataclasses.replace(config, data=config.validation_data)
        if config.dpo is None:
            held_out = index_records(settings, model.input_spec, on_bad, skipped)
        else:
            held_out = index_pairs(settings, model.input_spec, on_bad)
    if config.lora is not None:
        attach(model, config.lora, config.seed)
        torch.manual_seed(config.seed)  # of their dropout; a checkpoint holds the generator's state
    result = fit(model, data, config, device, on_step, skipped, objective, held_out)
    if config.lora is not None:
        save_adapter(model, config.output_dir, config.lora, config.model)
    else:
        checkpoint.save_pretrained(model, config.output_dir)
    return result


class Skipped:
    """Collects the messages of left-out records, each once, in memory and in skipped.txt."""

    def __init__(self, folder: Path):
        self.path = folder / "skipped.txt"
        self.messages: dict[str, None] = {}
        self.lock = threading.Lock()
        self.path.unlink(missing_ok=True)

    def __call__(self, message: str) -> None:
        with self.lock:
            if message not in self.messages:
                self.messages[message] = None
                with self.path.open("a") as file:
                    file.write(message + "\n")


def fit(
    model: Any,
    data: Dataset,
    config: TrainConfig,
    device: torch.device | str = "cpu",
    on_step: Callable[[StepMetrics], None] | None = None,
    skipped: Skipped | None = None,
    objective: Objective | None = None,
    held_out: Dataset | None = None,
) -> TrainResult:
    """Train `model` (an fp32 nn.Module) on `data`, in place: `train` without reading and writing models.

    objective: what a row adds to the loss; None: the cross-entropy of its labels, by `model.loss(batch, reduction)`.
    held_out: samples whose loss is taken as `config.validate_every` says.
    """
    if is_quantised(model) and not adapters(model):
        raise ValueError("a quantised model cannot be trained: load it without quantise, or train adapters on it")
    device, folder, ranks = torch.device(device), Path(config.output_dir), Ranks()
    folder.mkdir(parents=True, exist_ok=True)
    skipped = skipped or Skipped(folder)
    on_bad = skipped if config.on_bad_record == "skip" else None
    first_epoch = plan_epoch(data, config, 0)
    if not first_epoch.rows:
        raise ValueError(f"no record of {', '.join(config.data)} can be trained on ({len(skipped.messages)} left out)")
    validation = None if held_out is None else plan_validation(held_out, config, on_bad)
    total = total_steps(data, config)
    precision = config.precision if config.precision != "auto" else "bf16" if device.type == "cuda" else "fp32"
    trained = prepare_parameters(model, config, precision)
    run = Run(trained, make_optimizer(trained.masters, config), _settings(model, data, config, precision))
    objective, completed = objective or LabelLoss(), None
    preferences = objective if isinstance(objective, PreferenceLoss) else None
    if config.feature_cache is not None:
        cache = FeatureCache(config.feature_cache, model, config.feature_cache_gb)
        data, objective = CachedData(data, cache), (cached := CachedObjective(objective, cache))
        completed = cached.filled
    if preferences is not None:
        preferences.prepare(model, data, config, device, completed)
        if held_out is not None and validation is not None:
            judge = PreferenceLoss(preferences.options)
            judge.prepare(model, held_out, config, device, name="reference-validation.pt")
            validation = dataclasses.replace(validation, objective=judge)
    found = list_states(folder)
    if found and not config.resume:
        raise ValueError(f"{folder} holds checkpoints of an earlier run ({found[-1].name}): set resume, or choose another output_dir")
    if found:
        run.restore(found[-1], ranks)
    trained.publish()
    model.train()

    began = time.perf_counter()
    fill = first_epoch.fill(data.tokens, config.tokens_per_row)
    with Report(config, total, run.step, silent=not ranks.first) as report, _stop_request() as stop:
        report.say(
            f"{len(data.tokens):,} samples, {len(first_epoch.rows):,} rows an epoch ({fill:.1%} full), {total:,} steps, "
            f"{count(trained.working.values()):,} parameters trained in {precision}" + (f", from step {run.step}" if run.step else "")
        )
        loop = Loop(model, data, run, total, config, device, ranks, report, stop, on_step, Watched(objective), validation)
        with contextlib.closing(ahead(make_steps(data, config, run.position, on_bad))) as steps:
            loop.go(steps)
        loop.finish()
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
        skipped=list(skipped.messages),
        validation=loop.validated,
    )


class Watched:
    """An objective that remembers what each row came to, so that a bad step's samples can be named."""

    def __init__(self, inner: Objective):
        self.inner = inner
        self.weight = inner.weight
        self.rows: list[tuple[tuple[int, ...], torch.Tensor]] = []

    def __call__(self, model: Any, row: Row) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        row_sum, others = self.inner(model, row)
        self.rows.append((row.indices, row_sum.detach() / max(self.weight(row), 1)))
        return row_sum, others

    def taken(self) -> list[tuple[tuple[int, ...], torch.Tensor]]:
        """The samples and the mean of each row since the last call."""
        rows, self.rows = self.rows, []
        return rows


@dataclass
class Loop:
    """Steps until `total` or a stop request. Losses stay on the device until they are reported: reading one waits for the step."""

    model: Any
    data: Dataset
    run: Run
    total: int
    config: TrainConfig
    device: torch.device
    ranks: Ranks
    report: Report
    stop: Stop
    on_step: Callable[[StepMetrics], None] | None
    objective: Watched
    validation: Validation | None
    validated: dict[str, float] = field(default_factory=dict)
    pending: list[tuple[dict[str, Any], torch.Tensor, torch.Tensor, dict[str, torch.Tensor], list]] = field(default_factory=list)

    def go(self, steps: Iterator[Step]) -> None:
        run, config = self.run, self.config
        self.peak = peak_flops(self.device)
        self.reported = time.perf_counter()
        labelled = run.position  # where the newest step with labels ended
        while run.step < self.total and not self.stop.number:
            started = time.perf_counter()
            step = next(steps, None)
            if step is None:  # unreadable samples only: the last rows came to nothing
                break
            waited = time.perf_counter() - started
            if not step.labels:
                if (step.after.epoch - 1, 0) >= (labelled.epoch, labelled.row):
                    raise ValueError(
                        f"a whole epoch gave nothing to learn: none of its samples could be read; see {config.output_dir}/skipped.txt"
                    )
                run.position = step.after
                continue
            labelled = step.after
            self._one(step, waited)
            save = config.save_every is not None and run.step % config.save_every == 0
            validate = config.validate_every is not None and run.step % config.validate_every == 0
            if save or validate or run.step % config.log_every == 0 or run.step == self.total or self.stop.number:
                self._flush()
                if validate and run.step < self.total:
                    self._validate()
                if save and run.step < self.total:
                    self._save(last=False)
                self.reported = time.perf_counter()
        self._flush()

    def finish(self) -> None:
        """The last checkpoint, where any was asked for or the run is stopped early; then KeyboardInterrupt or SystemExit."""
        run, number = self.run, self.stop.number
        if self.config.save_every is not None or number:
            self._save(last=True)
        if number and run.step < self.total:
            self.report.say(f"stopped after step {run.step} of {self.total}; the same call goes on from there")
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        if self.validation is not None:
            self._validate()

    def _one(self, step: Step, waited: float) -> None:
        run, config = self.run, self.config
        factor = lr_factor(run.step, self.total, config.warmup_ratio, config.schedule)
        loss, norm, others = train_step(self.model, run.trained, run.optimizer, step.rows, factor, config.clip, self.device, self.objective)
        run.step += 1
        rates = {group["part"]: group["lr"] for group in run.optimizer.param_groups}
        known = {
            "step": run.step,
            "epoch": run.position.epoch,
            "lr": rates.get("decoder", next(iter(rates.values()))),
            "rates": rates,
            "tokens": step.tokens,
            "views": step.views,
            "labels": step.labels,
            "samples": step.samples,
            "flops": step_flops(getattr(self.model, "config", None), step.real, config.lr_vision_tower is not None),
            "data_wait": waited,
        }
        run.position = step.after
        run.tokens += step.tokens
        run.labels += step.labels
        run.samples += step.samples
        run.data_wait += waited
        self.pending.append((known, loss, norm, others, self.objective.taken()))

    def _flush(self) -> None:
        """Read what the steps since the last time came to, report it, and stop at what must not be saved."""
        read = [
            (known, loss.item(), norm.item(), {name: value.item() for name, value in others.items()}, rows)
            for known, loss, norm, others, rows in self.pending
        ]
        self.pending.clear()
        seconds = (time.perf_counter() - self.reported) / max(len(read), 1)
        memory = memory_held(self.device)
        finished = [
            StepMetrics(loss=loss, grad_norm=norm, seconds=seconds, others=others, memory=memory, **self._speed(known, seconds))
            for known, loss, norm, others, _ in read
        ]
        self.report.add(finished)
        for metrics, (*_, rows) in zip(finished, read, strict=True):
            self._check(metrics, rows)
            self.run.losses.append(metrics.loss)
            if self.on_step is not None:
                self.on_step(metrics)

    def _speed(self, known: dict[str, Any], seconds: float) -> dict[str, Any]:
        flops = known.pop("flops") / max(seconds, 1e-9)
        return {**known, "tflops": flops / 1e12, "mfu": flops / self.peak / self.ranks.world if flops and self.peak else None}

    def _check(self, metrics: StepMetrics, rows: list[tuple[tuple[int, ...], torch.Tensor]]) -> None:
        """FloatingPointError, naming the samples of the rows it came from, for a loss that is not finite or that jumped."""
        means = [(indices, mean.item()) for indices, mean in rows if indices]
        before, factor = self.run.losses[-self.config.spike_window :], self.config.spike_factor
        if not (math.isfinite(metrics.loss) and math.isfinite(metrics.grad_norm)):
            what = f"the loss of step {metrics.step} is {metrics.loss} (gradient norm {metrics.grad_norm})"
            guilty = [indices for indices, mean in means if not math.isfinite(mean)] or [indices for indices, _ in means]
        elif factor and len(before) >= SPIKE_LEAST and metrics.loss > factor * statistics.median(before):
            what = (
                f"the loss of step {metrics.step} is {metrics.loss:.4g}, more than spike_factor {factor} times the median "
                f"{statistics.median(before):.4g} of the {len(before)} before it"
            )
            guilty = [max(means, key=lambda row: row[1])[0]]
        else:
            return
        names = [name_of(self.data, index) for indices in guilty for index in indices]
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        kept = list_states(Path(self.config.output_dir))
        raise FloatingPointError(
            f"{what}; it came with {', '.join(names[:NAMED])}{more}. Nothing of it was saved: "
            + (f"the last checkpoint is {kept[-1]}" if kept else "there is no checkpoint yet")
        )

    def _validate(self) -> None:
        assert self.validation is not None
        self.validated = self.validation.losses(self.model, self.objective.inner, self.device)
        self.report.validated(self.run.step, self.validated)

    def _save(self, last: bool) -> None:
        """A checkpoint that cannot be written is said, and ends the run only where there is nothing more to do."""
        folder = Path(self.config.output_dir)
        try:
            self.run.save(folder, self.config.keep, self.ranks)
        except OSError as error:
            kept = list_states(folder)
            message = f"the checkpoint of step {self.run.step} could not be written ({error.strerror or error}); " + (
                f"{kept[-1]} is intact" if kept else "there is none before it"
            )
            if last:
                raise OSError(message) from error
            if self.ranks.first:
                warnings.warn(f"{message}; the run goes on", stacklevel=2)


def _settings(model: torch.nn.Module, data: Dataset, config: TrainConfig, precision: str) -> dict[str, Any]:
    """What must not change between a checkpoint and the run that goes on from it: plain values, so that they can be compared and named."""
    settings = {name: _plain(value) for name, value in dataclasses.asdict(config).items() if name not in FREE}
    settings["precision"] = precision
    settings["data set"] = f"{len(data.tokens)} samples, contents {data.fingerprint:08x}"
    settings["base model"] = _base_model(model)
    return settings


def _base_model(model: torch.nn.Module) -> str:
    """What a checkpoint does not hold of a model: its configuration, its parameters' shapes, and the weights that are not trained.

    Of a frozen tensor SAMPLED values or a few more are read: 1 ms for 45 M of them, where all take 100.
    """
    shapes = crc32(repr([(name, list(p.shape)) for name, p in model.named_parameters()]).encode())
    config = crc32(repr(getattr(model, "config", None)).encode())
    frozen = 0
    for _, parameter in model.named_parameters():
        if not parameter.requires_grad:
            flat = parameter.detach().flatten()
            sample = flat[:: max(1, len(flat) // SAMPLED)].cpu().contiguous()
            frozen = crc32(sample.view(torch.uint8).numpy().tobytes(), frozen)
    return f"configuration {config:08x}, shapes {shapes:08x}, frozen weights {frozen:08x}"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


@dataclass
class Stop:
    """number: of the signal that asked for an end; 0 without one."""

    number: int = 0


@contextlib.contextmanager
def _stop_request() -> Iterator[Stop]:
    """Set by the first Ctrl-C or SIGTERM; the second of a kind ends the process at once. Only the main thread can catch signals:
    elsewhere it is never set."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, frame: Any) -> None:
        stop.number = number
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
