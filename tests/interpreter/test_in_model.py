"""The whole model on Triton kernels alone, interpreted: forward, backward and generate, against the references in fp64."""

from __future__ import annotations

import pytest
import tiny
import torch
from in_model import OPS, compare, run

from llava_fast.kernels import registry


@pytest.mark.parametrize("kind", ["qwen", "llama"])
def test_every_op_on_triton(kind: str, tmp_path) -> None:
    directory = tiny.make_checkpoint(tmp_path / "model", kind)
    with registry.use(**dict.fromkeys(OPS, "reference")):
        expected = run(directory, torch.float64, new_tokens=3)
    asked = {op: "triton" for op in OPS if "triton" in registry.implementations(op)}
    assert len(asked) >= 8, asked
    with registry.use(**asked):
        compare(run(directory, torch.float32, new_tokens=3), expected, 1e-4)
