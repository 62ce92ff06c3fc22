"""State of an unfinished run: one file a checkpoint, complete or absent, from which a run goes on bit for bit."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

PATTERN = "checkpoint-*.pt"


def save_state(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write checkpoint-<step>.pt and delete all but the newest `keep`. A reader never sees half a file: it is renamed when on disk."""
    target = folder / f"checkpoint-{step:08d}.pt"
    partial = target.with_suffix(".partial")
    with partial.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, target)
    for old in list_states(folder)[:-keep]:
        old.unlink()
    return target


def list_states(folder: Path) -> list[Path]:
    """Checkpoints of a run, oldest first."""
    return sorted(folder.glob(PATTERN))


def load_state(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Read a checkpoint; ValueError, naming what differs, when it was made with other settings."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    before = state["settings"]
    changed = [name for name in sorted({*before, *settings}) if before.get(name) != settings.get(name)]
    if changed:
        differences = ", ".join(f"{name}: {before.get(name)!r} then, {settings.get(name)!r} now" for name in changed)
        raise ValueError(f"{path} belongs to a run with other settings ({differences}); restore them or choose another output_dir")
    return state
