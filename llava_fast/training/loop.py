"""`train`: a run from configuration to checkpoint, on one device; stops and goes on bit for bit."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zlib import crc32

import torch

from llava_fast import checkpoint
from llava_fast.models.llava import Llava
from llava_fast.quantise import is_quantised
from llava_fast.training.batches import Dataset, Position, Step, ahead, make_steps, plan_epoch, total_steps
from llava_fast.training.checkpoint import list_states, load_state, save_state
from llava_fast.training.config import TrainConfig, as_config
from llava_fast.training.dataset import index_records
from llava_fast.training.report import Report, StepMetrics
from llava_fast.training.step import LabelLoss, Objective, Trained, count, lr_factor, make_optimizer, prepare_parameters, train_step

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
}


@dataclass(frozen=True)
class TrainResult:
    """What a run did. losses: mean loss of every step since step 1, those before a resume included; the other counts are of this call.

    output_dir: the HF directory, which `load` and transformers read.  skipped: why each left-out record was left out.
    data_wait: seconds of `seconds` in which the device waited for rows.  fill: used share of the rows of the first epoch.
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

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


def train(config: TrainConfig | Mapping[str, Any] | str | os.PathLike, on_step: Callable[[StepMetrics], None] | None = None) -> TrainResult:
    """Train a checkpoint as configured and write an HF directory to `output_dir`.

    config: a `TrainConfig`, a mapping of its fields, or a YAML or TOML file.  on_step: called after every `log_every` steps, once
    for each. Ctrl-C finishes the step, saves a checkpoint and raises KeyboardInterrupt; the same call goes on from there.
    Raises ValueError for a bad configuration, record or checkpoint before the first step, and FloatingPointError for a loss that is
    not finite.
    """
    config = as_config(config)
    device = checkpoint.as_device(config.device)
    if os.path.realpath(config.output_dir) == os.path.realpath(config.model):
        raise ValueError(
            f"output_dir must not be the model's own directory, got {config.output_dir} for both: a resumed run reads the model"
        )
    Path(config.output_dir).mkdir(parents=True, exist_ok=True)
    skipped = Skipped(Path(config.output_dir))
    model = checkpoint.load(Llava, config.model, device=device, dtype=torch.float32)
    data = index_records(config, model.input_spec, skipped if config.on_bad_record == "skip" else None)
    result = fit(model, data, config, device, on_step, skipped)
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
) -> TrainResult:
    """Train `model` (an fp32 nn.Module) on `data`, in place: `train` without reading and writing models.

    objective: what a row adds to the loss; None: the cross-entropy of its labels, by `model.loss(batch, reduction)`.
    """
    if is_quantised(model):
        raise ValueError("a quantised model cannot be trained: load it without quantise")
    device, folder = torch.device(device), Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    skipped = skipped or Skipped(folder)
    first_epoch = plan_epoch(data, config, 0)
    if not first_epoch.rows:
        raise ValueError(f"no record of {', '.join(config.data)} can be trained on ({len(skipped.messages)} left out)")
    total = total_steps(data, config)
    precision = config.precision if config.precision != "auto" else "bf16" if device.type == "cuda" else "fp32"
    trained = prepare_parameters(model, config, precision)
    run = Run(trained, make_optimizer(trained.masters, config), _settings(model, data, config, precision))
    found = list_states(folder)
    if found and not config.resume:
        raise ValueError(f"{folder} holds checkpoints of an earlier run ({found[-1].name}): set resume, or choose another output_dir")
    if found:
        run.restore(found[-1])
    trained.publish()
    model.train()

    began = time.perf_counter()
    fill = first_epoch.fill(data.tokens, config.tokens_per_row)
    with Report(folder, total, run.step, config.progress, config.log_every) as report, _stop_request() as stop:
        report.say(
            f"{len(data.tokens):,} samples, {len(first_epoch.rows):,} rows an epoch ({fill:.1%} full), {total:,} steps, "
            f"{count(trained.working.values()):,} parameters trained in {precision}" + (f", from step {run.step}" if run.step else "")
        )
        steps = ahead(make_steps(data, config, run.position, skipped if config.on_bad_record == "skip" else None))
        with contextlib.closing(steps):
            _run_steps(model, run, steps, total, config, device, report, stop, on_step, objective or LabelLoss())
        if config.save_every is not None or stop.is_set():
            run.save(folder, config.keep)
        if stop.is_set() and run.step < total:
            report.say(f"stopped after step {run.step} of {total}; the same call goes on from there")
            raise KeyboardInterrupt
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
    )


@dataclass
class Run:
    """The moving state of a run. A checkpoint holds all of it but the counts, which are of this call."""

    trained: Trained
    optimizer: torch.optim.Optimizer
    settings: dict[str, Any]
    step: int = 0
    position: Position = Position()
    losses: list[float] = field(default_factory=list)
    tokens: int = 0
    labels: int = 0
    samples: int = 0
    data_wait: float = 0.0

    def save(self, folder: Path, keep: int) -> None:
        state = {
            "settings": self.settings,
            "step": self.step,
            "position": dataclasses.asdict(self.position),
            "losses": self.losses,
            "parameters": {name: master.detach() for name, master in self.trained.masters.items()},
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
        }
        save_state(folder, self.step, state, keep)

    @torch.no_grad()
    def restore(self, path: Path) -> None:
        state = load_state(path, self.settings)
        for name, master in self.trained.masters.items():
            master.copy_(state["parameters"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        self.step, self.position, self.losses = state["step"], Position(**state["position"]), state["losses"]


def _run_steps(
    model: Any,
    run: Run,
    steps: Iterator[Step],
    total: int,
    config: TrainConfig,
    device: torch.device,
    report: Report,
    stop: threading.Event,
    on_step: Callable[[StepMetrics], None] | None,
    objective: Objective,
) -> None:
    """Steps until `total` or a stop request. Losses stay on the device until they are reported: reading one waits for the step."""
    pending: list[tuple[dict[str, Any], torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]] = []

    reported = time.perf_counter()
    labelled = run.position  # where the newest step with labels ended

    def flush() -> None:
        read = [
            (known, loss.item(), norm.item(), {name: value.item() for name, value in others.items()})
            for known, loss, norm, others in pending
        ]
        seconds = (time.perf_counter() - reported) / max(len(read), 1)
        finished = [StepMetrics(loss=loss, grad_norm=norm, seconds=seconds, others=others, **known) for known, loss, norm, others in read]
        pending.clear()
        run.losses += [metrics.loss for metrics in finished]
        report.add(finished)
        for metrics in finished:
            if not math.isfinite(metrics.loss):
                raise FloatingPointError(f"the loss of step {metrics.step} is {metrics.loss} (gradient norm {metrics.grad_norm})")
            if on_step is not None:
                on_step(metrics)

    while run.step < total and not stop.is_set():
        started = time.perf_counter()
        step = next(steps, None)
        if step is None:  # unreadable samples only: the last rows came to nothing
            break
        waited = time.perf_counter() - started
        factor = lr_factor(run.step, total, config.warmup_ratio, config.schedule)
        if not step.labels:
            if (step.after.epoch - 1, 0) >= (labelled.epoch, labelled.row):
                raise ValueError(
                    f"a whole epoch gave nothing to learn: none of its samples could be read; see {config.output_dir}/skipped.txt"
                )
            run.position = step.after
            continue
        labelled = step.after
        loss, norm, others = train_step(model, run.trained, run.optimizer, step.rows, factor, config.clip, device, objective)
        run.step += 1
        known = {
            "step": run.step,
            "epoch": run.position.epoch,
            "lr": _shown_lr(run.optimizer),
            "tokens": step.tokens,
            "labels": step.labels,
            "samples": step.samples,
            "data_wait": waited,
        }
        run.position = step.after
        run.tokens += step.tokens
        run.labels += step.labels
        run.samples += step.samples
        run.data_wait += waited
        pending.append((known, loss, norm, others))
        save = config.save_every is not None and run.step % config.save_every == 0
        if save or run.step % config.log_every == 0 or run.step == total or stop.is_set():
            flush()
            if save and run.step < total:
                run.save(Path(config.output_dir), config.keep)
            reported = time.perf_counter()
    flush()


def _shown_lr(optimizer: torch.optim.Optimizer) -> float:
    return max(optimizer.param_groups, key=lambda group: group["part"] == "decoder")["lr"]


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


@contextlib.contextmanager
def _stop_request() -> Iterator[threading.Event]:
    """Set by the first Ctrl-C; the second interrupts at once. Only the main thread can catch signals: elsewhere it is never set."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = signal.getsignal(signal.SIGINT)

    def handle(number: int, frame: Any) -> None:
        stop.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, handle)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
