"""Every op's Triton implementation against fp64: values, gradients, determinism, no synchronisation; then a whole model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

import llava_fast as lf
from bench.cases import CASES, HALVES, Case
from bench.correctness import check, results, wider
from llava_fast.kernels import registry

PAIRS = [pytest.param(case, dtype, id=f"{case.name}-{str(dtype)[6:]}") for case in CASES for dtype in case.dtypes]


@pytest.mark.parametrize(("case", "dtype"), PAIRS)
def test_against_fp64(case: Case, dtype: torch.dtype, machine: tuple[str, str]) -> None:
    device, implementation = machine
    if implementation not in registry._ops.get(case.op, ()):
        pytest.skip(f"{case.op} has no {implementation} implementation")
    check(case, device, dtype, implementation, small=device == "cpu")


@pytest.mark.parametrize("name", ["flash_attn", "xformers", "torch"])
@pytest.mark.parametrize(
    ("case", "dtype"), [pair for pair in PAIRS if pair.values[0].op == "varlen_attention" and pair.values[1] in HALVES]
)
def test_attention_of_other_libraries(case: Case, dtype: torch.dtype, name: str, machine: tuple[str, str]) -> None:
    """Where they are installed. Their bits may differ between runs, and xformers waits for the device."""
    inputs = case.inputs(machine[0], dtype, machine[0] == "cpu")
    try:
        ours = results(case, inputs, name)
    except ValueError as error:
        pytest.skip(str(error))
    truth = results(case, {key: wider(value) for key, value in inputs.items()}, "reference")
    for our, plain, exact in zip(ours, results(case, inputs, "reference"), truth, strict=True):
        bound = 2 * (plain - exact).abs().max() + 2 * torch.finfo(dtype).eps * exact.abs().max()
        assert (our - exact).abs().max() <= bound


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_model_with_every_kernel(kind: str, machine: tuple[str, str], tmp_path: Path) -> None:
    """Logits in bf16, every op forced, against fp64 on the CPU: no further off than the reference ops in bf16 on the same device."""
    device, implementation = machine
    path = tiny.make_checkpoint(tmp_path / kind, kind)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 40, 3), dtype=np.uint8))

    def logits(device: str, dtype: torch.dtype) -> torch.Tensor:
        model = lf.load(path, device=device, dtype=dtype)
        size = model.config.vision.image_size
        pixels = torch.from_numpy(np.asarray(picture.resize((size, size)), dtype=np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
        patches = model.config.patches
        before, after = [[id for id in range(*ends) if id != model.config.image_token_id] for ends in ((20, 23), (30, 35))]
        ids = torch.tensor([[*before, *[model.config.image_token_id] * patches, *after]])
        with torch.no_grad():
            return model(input_ids=ids.to(device), pixel_values=pixels.to(device, dtype)).logits.double().cpu()

    everywhere = {op: implementation for op, known in registry._ops.items() if implementation in known}
    with registry.use(**dict.fromkeys(registry._ops, "reference")):
        truth, plain = logits("cpu", torch.float64), logits(device, torch.bfloat16)
    with registry.use(**everywhere):
        ours = logits(device, torch.bfloat16)
    assert (ours - truth).abs().max() <= 2 * (plain - truth).abs().max() + 0.02 * truth.abs().max()
