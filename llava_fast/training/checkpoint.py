"""State of an unfinished run: one folder a checkpoint, complete or absent, from which a run goes on bit for bit.

checkpoint-00000500/
    state.json       settings, step, place in the data, losses, the run's identity
    *.distcp         tensors, as torch.distributed.checkpoint writes them: every rank its own, read by any number of ranks
    .metadata        where each piece of each tensor is
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import uuid
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from llava_fast.training.batches import Position
from llava_fast.training.distributed import Ranks
from llava_fast.training.step import Trained

PATTERN = "checkpoint-????????"


@dataclass
class Run:
    """The moving state of a run. A checkpoint holds all of it but the counts, which are of this call.

    identity: drawn once for a run, whatever its folder is called.
    """

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
    identity: str = field(default_factory=lambda: uuid.uuid4().hex[:12])

    def save(self, folder: Path, keep: int, ranks: Ranks) -> Path:
        """Write checkpoint-<step> and delete all but the newest `keep`. Raises OSError, and leaves those before it as they were."""
        plain = {
            "settings": self.settings,
            "step": self.step,
            "position": dataclasses.asdict(self.position),
            "losses": self.losses,
            "identity": self.identity,
            "optimizer": self._optimizer_state(Tensor, negate=True),
        }
        return save_state(folder, self.step, self._tensors(ranks.rank), plain, keep, ranks)

    @torch.no_grad()
    def restore(self, path: Path, ranks: Ranks) -> None:
        """Raises ValueError, naming what differs, when the checkpoint was made with other settings."""
        plain = json.loads((path / "state.json").read_text())
        _compare(path, plain["settings"], self.settings)
        self._make_optimizer_state()
        stored = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
        for name, master in self.trained.masters.items():
            if f"parameters.{name}" not in stored:
                raise ValueError(f"{path} holds no parameter {name}")
            state = self.optimizer.state[master]
            if not any(f"optimizer.{name}.{key}" in stored for key in state):  # it has had no gradient yet
                del self.optimizer.state[master]
            state.update(plain["optimizer"].get(name, {}))
        tensors = {name: tensor for name, tensor in self._tensors(ranks.rank).items() if name in stored}
        with _quiet():
            dcp.load(tensors, storage_reader=dcp.FileSystemReader(path), no_dist=ranks.world == 1)
        for name, tensor in tensors.items():
            if name.startswith("rng."):
                (torch.cuda if ".cuda." in name else torch).set_rng_state(tensor)
        self.step, self.position, self.losses = plain["step"], Position(**plain["position"]), plain["losses"]
        self.identity = plain.get("identity", self.identity)  # earlier checkpoints have none

    def _tensors(self, rank: int) -> dict[str, Tensor]:
        tensors = {f"parameters.{name}": master.detach() for name, master in self.trained.masters.items()}
        for name, state in self._optimizer_state(Tensor).items():
            tensors |= {f"optimizer.{name}.{key}": value for key, value in state.items()}
        tensors[f"rng.cpu.{rank}"] = torch.get_rng_state()
        if torch.cuda.is_available():
            tensors[f"rng.cuda.{rank}"] = torch.cuda.get_rng_state()
        return tensors

    def _optimizer_state(self, kind: type, negate: bool = False) -> dict[str, dict[str, Any]]:
        """Of each parameter that has any: the values of its optimiser state that are (not) of a kind."""
        return {
            name: {key: value for key, value in self.optimizer.state[master].items() if isinstance(value, kind) != negate}
            for name, master in self.trained.masters.items()
            if master in self.optimizer.state
        }

    def _make_optimizer_state(self) -> None:
        """A step at a learning rate of 0, as torch's own checkpoints do: every optimiser then has its tensors to be written into."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


def save_state(folder: Path, step: int, tensors: dict[str, Tensor], plain: dict[str, Any], keep: int, ranks: Ranks) -> Path:
    """Write checkpoint-<step> and delete all but the newest `keep`. A reader never sees half of one: it is renamed when on disk."""
    target = folder / f"checkpoint-{step:08d}"
    if target in list_states(folder):  # the one the run went on from
        return target
    partial = target.with_suffix(".partial")
    error: Exception | None = None
    try:
        if ranks.first:
            _clear(folder, target, partial)
    except OSError as failure:
        error = failure
    ranks.agree(error)
    try:
        writer = dcp.FileSystemWriter(partial, single_file_per_rank=True, sync_files=True)
        with _quiet():
            dcp.save(tensors, storage_writer=writer, no_dist=ranks.world == 1)
        if ranks.first:
            with (partial / "state.json").open("w") as file:
                file.write(json.dumps(plain))
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, target)
    except (OSError, CheckpointException) as failure:
        error = failure if isinstance(failure, OSError) else _first(failure)
    if error is not None and ranks.first:
        shutil.rmtree(partial, ignore_errors=True)
    ranks.agree(error)
    if ranks.first:
        for old in list_states(folder)[:-keep]:
            with contextlib.suppress(OSError):  # what is left of it goes the next time, by its name
                left = old.with_name(f"{old.name}.partial")
                os.replace(old, left)
                shutil.rmtree(left)
    return target


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """One process is what was meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def _clear(folder: Path, target: Path, partial: Path) -> None:
    """Remove what a killed process left of other checkpoints, written or deleted in part."""
    for left in [*folder.glob(f"{PATTERN}.partial"), *([target] if target.exists() else [])]:
        shutil.rmtree(left)
    partial.mkdir()


def _first(failure: CheckpointException) -> OSError:
    """The first rank's reason, as it is where a file could not be written."""
    rank, (reason, _) = min(failure.failures.items())
    return reason if isinstance(reason, OSError) else OSError(f"rank {rank}: {type(reason).__name__}: {reason}")


def list_states(folder: Path) -> list[Path]:
    """Checkpoints of a run, oldest first."""
    return sorted(path for path in folder.glob(PATTERN) if (path / "state.json").is_file())


def _compare(path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    changed = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
    if changed:
        differences = ", ".join(f"{name}: {before.get(name)!r} then, {now.get(name)!r} now" for name in changed)
        raise ValueError(f"{path} belongs to a run with other settings ({differences}); restore them or choose another output_dir")
