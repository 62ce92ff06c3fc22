"""The ways through the projector, shared by its tests and those of its interpreted kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llava_fast.kernels import registry
from llava_fast.kernels.projector import project

NAMES = ("features", "w1", "b1", "w2", "b2", "newline", "embedding")
# kind, act, two products, biases: no source | average with a newline | bilinear and average | a maximum among them | LLaVA v1
CASES = {
    "plain": ((), False, "gelu", True),
    "average": (("average",), True, "gelu", True),
    "mixed": (("bilinear", "average"), True, "gelu_pytorch_tanh", True),
    "max": (("max", "average"), True, "quick_gelu", True),
    "gathered": ((), True, "silu", True),
    "linear": ((), False, None, False),
    "linear pooled": (("average", "max"), True, None, False),
    "no newline": (("average",), False, "gelu", True),
}
SIZES = {"average": (2, 2), "bilinear": (3, 2), "max": (2, 2)}


def make(case: str, dtype: torch.dtype, weights: torch.dtype | None = None, E: int = 24, D: int = 40) -> dict[str, Any]:
    """Three views of 5 x 5; some table rows are used twice, some never; text around the pictures, token ids repeat."""
    modes, has_newline, act, two = CASES[case]
    generator = torch.Generator().manual_seed(len(case))
    weights = weights or dtype

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).bfloat16()

    M = 75
    resamples = tuple((mode, torch.randint(0, M, (2, 5, 5), generator=generator), SIZES[mode]) for mode in modes)
    table = M + sum(2 * h * w for _, _, (h, w) in resamples)
    source = None
    if modes or has_newline:
        source = torch.randint(0, table, (60,), generator=generator)
        if has_newline:
            source[::7] = table
    V, texts = M if source is None else 60, 31
    places = torch.randperm(V + texts, generator=generator)
    rows, text_rows = places[:V].sort().values, places[V:].sort().values
    token_ids = torch.zeros(V + texts, dtype=torch.int64)
    token_ids[text_rows] = torch.randint(0, 9, (texts,), generator=generator)
    return dict(
        features=random(M, E).to(dtype),
        w1=(random(D, E) / E**0.5).to(weights),
        b1=None if case == "gathered" else random(D).to(weights),
        w2=(random(D, D) / D**0.5).to(weights) if two else None,
        b2=random(D).to(weights) if two and case != "gathered" else None,
        newline=random(D).to(weights) if has_newline else None,
        embedding=random(11, D).to(weights),
        act=act,
        source=source,
        rows=rows,
        text_rows=text_rows,
        token_ids=token_ids,
        resamples=resamples,
    )


def run(arguments: dict[str, Any], name: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The buffer and the gradients of all that is differentiable."""
    leaves = {
        key: arguments[key].detach().clone().to(dtype or arguments[key].dtype).requires_grad_()
        for key in NAMES
        if arguments[key] is not None
    }
    with registry.use(projector=name):
        out = project(**{**arguments, **leaves})
        with torch.no_grad():
            assert torch.equal(project(**{**arguments, **leaves}), out)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(out.dtype)
    return {"out": out.detach(), **dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), grad), strict=True))}


def check(case: str, dtype: torch.dtype, weights: torch.dtype, name: str) -> None:
    arguments = make(case, dtype, weights)
    ours, torchs, exact = run(arguments, name), run(arguments, "reference"), run(arguments, "reference", torch.float64)
    for key, truth in exact.items():
        our = ours[key]
        assert our.dtype == torchs[key].dtype and our.shape == truth.shape, key
        floor = truth.abs().max() * torch.finfo(our.dtype).eps * 4
        assert (our.double() - truth).abs().max() <= 2 * (torchs[key].double() - truth).abs().max() + floor, key
