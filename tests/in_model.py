"""One model run through everything an op takes part in, so that implementations of an op can be told apart by their results."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from padded import pixels
from torch import Tensor

import llava_fast as lf
from llava_fast.batch import IGNORE, Resample, Sample, Visual, pack, splice

OPS = (
    "activation",
    "linear",
    "linear_cross_entropy",
    "norm",
    "patchify",
    "projector",
    "rope",
    "spatial_pool",
    "varlen_attention",
)


def sample_of(model: lf.LlavaFast, tokens: list[int | str], rng: np.random.Generator) -> Sample:
    """'image': a view; 'pooled': a view pooled 2x2."""
    grid, P, mark = model.config.vision.grid, model.config.patches, model.config.image_token_id
    half, extra = grid // 2, P - grid * grid
    cells = extra + np.arange(grid * grid).reshape(1, grid, grid)
    image = Visual(1, P, np.arange(P))
    pooled = Visual(1, P, P + np.arange(half * half), (Resample("average", cells, (half, half)),))
    ids = np.array([mark if isinstance(token, str) else token for token in tokens])
    visuals = [image if token == "image" else pooled for token in tokens if isinstance(token, str)]
    labels = np.where(ids == mark, IGNORE, ids)
    labels[rng.random(len(ids)) < 0.3] = IGNORE
    return splice(ids, visuals, mark, labels)


def run(directory: Path, dtype: torch.dtype = torch.float32, new_tokens: int = 6) -> dict[str, Tensor]:
    """Losses, their sum's gradient in every parameter, all logits, and the ids of a greedy generation of three prompts."""
    model = lf.load(directory, device="cpu", dtype=dtype)
    rng = np.random.default_rng(0)
    prompts: list[list[int | str]] = [[8, "image", 9, 10, "pooled", 12], [7, 9], ["image", 11, 8, 8]]
    samples = [sample_of(model, prompt, rng) for prompt in prompts]
    views = pixels(3)
    batch = pack(samples, views)
    losses = model.label_losses(batch)
    losses.sum().backward()
    found = {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert set(found) == {f"gradient of {name}" for name, _ in model.named_parameters()}
    with torch.no_grad():
        found["losses"] = losses.detach()
        found["logits"] = model.logits(model.hidden(pack(samples, views, needed="all")))
    mark = model.config.image_token_id
    ids = torch.tensor([[8, mark, 9, 10]])
    model.generation_config.eos_token_id = []
    placed = torch.cat([ids[:, :1], torch.full((1, model.config.patches), mark), ids[:, 2:]], 1)
    found["tokens"] = model.generate(input_ids=placed, pixel_values=views[:1], max_new_tokens=new_tokens, do_sample=False)
    return found


def compare(ours: dict[str, Tensor], expected: dict[str, Tensor], relative: float) -> None:
    assert set(ours) == set(expected)
    for name, truth in expected.items():
        if name == "tokens":
            assert torch.equal(ours[name], truth)
            continue
        error, scale = (ours[name].double() - truth.double()).abs().max().item(), truth.double().abs().max().item()
        assert error <= relative * scale + 1e-6, f"{name}: off by {error:.3g} where the largest entry is {scale:.3g}"
