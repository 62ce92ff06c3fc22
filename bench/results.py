"""Results are data in the repository: bench/results/<device>/<date>-<commit>-<name>.json, written and read here.

A file is one object:
    schema        1
    name          of the benchmark
    date          UTC, ISO 8601
    commit        of the tree that was measured; dirty: whether it had uncommitted changes
    device        kind 'cpu' or 'cuda', name, driver (cuda), threads, isa (cpu)
    versions      python, torch, transformers, triton, llava_fast (null: not installed), cuda (null: torch without it)
    settings      of the run, whatever is needed to repeat it
    limits        llava_fast.limits.Limits of the machine, from the same run
    measurements  list of objects with `name` and numbers; units are in the keys (_ms, _s, _gbs, _bytes), ratios are baseline / ours
"""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from llava_fast.limits import Limits

ROOT = Path(__file__).parent
RESULTS = ROOT / "results"
KEYS = {"schema", "name", "date", "commit", "dirty", "device", "versions", "settings", "limits", "measurements"}


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.*)$", info.read_text(), re.MULTILINE) if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def device_facts(kind: str) -> dict[str, Any]:
    if kind == "cuda":
        driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        return {"kind": "cuda", "name": torch.cuda.get_device_name(), "driver": driver, "threads": torch.get_num_threads()}
    from llava_fast import _cpu

    return {"kind": "cpu", "name": cpu_name(), "driver": None, "threads": torch.get_num_threads(), "isa": _cpu.isa()}


def tree() -> dict[str, Any]:
    """commit, and dirty: whether tracked files differ from it."""
    commit = _output("git", "rev-parse", "--short=10", "HEAD")
    return {"commit": commit, "dirty": bool(_output("git", "status", "--porcelain", "--untracked-files=no"))}


def record(name: str, measurements: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], limits: Limits) -> dict[str, Any]:
    """The object that `write` writes."""
    return {
        "schema": 1,
        "name": name,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **tree(),
        "device": device_facts(limits.device),
        "versions": {
            "python": platform.python_version(),
            **{package: _version(package) for package in ("torch", "transformers", "triton", "llava_fast")},
            "cuda": torch.version.cuda,
        },
        "settings": dict(settings),
        "limits": asdict(limits),
        "measurements": [dict(measurement) for measurement in measurements],
    }


def write(
    name: str, measurements: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], limits: Limits, folder: Path | None = None
) -> Path:
    """Write one result file under `folder` (default RESULTS) and return its path."""
    return save(record(name, measurements, settings, limits), folder)


def save(result: Mapping[str, Any], folder: Path | None = None) -> Path:
    """A `record` to its file, whole or not at all: whoever writes again and again may be killed at any time."""
    name = result["name"]
    if not re.fullmatch(r"[a-z0-9_]+", name):
        raise ValueError(f"a result's name is lower-case letters, digits and underscores, got {name!r}")
    device = re.sub(r"[^a-z0-9]+", "-", result["device"]["name"].lower()).strip("-")
    path = (folder or RESULTS) / device / f"{result['date'][:10]}-{result['commit'] or 'nogit'}-{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    partial.replace(path)
    return path


def load(path: Path) -> dict[str, Any]:
    """Read a result file; ValueError where it does not follow the schema."""
    result = json.loads(path.read_text())
    if not isinstance(result, dict) or result.get("schema") != 1 or set(result) != KEYS:
        raise ValueError(f"{path} is not a result of schema 1: expected the keys {sorted(KEYS)}")
    nameless = [m for m in result["measurements"] if not isinstance(m, dict) or "name" not in m]
    if nameless:
        raise ValueError(f"{path} has a measurement without a name: {nameless[0]!r}")
    return result


if __name__ == "__main__":
    for file in sys.argv[1:] or sorted(str(path) for path in RESULTS.rglob("*.json")):
        found = load(Path(file))
        print(f"{file}: {found['name']} on {found['device']['name']}, {found['date']}, {len(found['measurements'])} measurements")
