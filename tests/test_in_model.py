"""The model gives the same results with each implementation of each op forced in turn, forward, backward and generate."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from in_model import OPS, compare, run

from llava_fast.kernels import registry


@cache
def exact(directory: Path) -> dict[str, torch.Tensor]:
    """In fp64, which runs on the references alone."""
    with registry.use(**dict.fromkeys(OPS, "reference")):
        return run(directory, torch.float64)


PAIRS = [(op, name) for op in OPS for name in registry.implementations(op) if name in ("reference", "cpu")]


@pytest.mark.parametrize(("op", "implementation"), PAIRS)
def test_one_op_forced(directory, op: str, implementation: str) -> None:
    with registry.use(**{op: implementation}):
        compare(run(directory), exact(directory), 1e-4)


@pytest.mark.parametrize("implementation", ["reference", "cpu"])
def test_all_forced(directory, implementation: str) -> None:
    asked = {op: implementation for op in OPS if implementation in registry.implementations(op)}
    with registry.use(**asked):
        compare(run(directory), exact(directory), 1e-4)
