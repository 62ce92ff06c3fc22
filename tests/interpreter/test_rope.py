"""The Triton rotary embedding in the interpreter: values, gradients, writes into a cache."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llava_fast.kernels import registry
from llava_fast.kernels.rope import CACHE_DTYPES, rope, rope_into_cache, rope_qk


def run(implementation: str, fused: Tensor, cos: Tensor, sin: Tensor, H: int, G: int, d: int) -> list[Tensor]:
    fused = fused.clone().requires_grad_()
    q, k, _ = (part.unflatten(-1, (-1, d)) for part in fused.split((H * d, G * d, G * d), dim=-1))
    with registry.use(rope=implementation):
        outputs = (*rope_qk(q, k, cos, sin), rope(k, cos, sin))
    grads = [torch.randn(o.shape, generator=torch.Generator().manual_seed(i)).half().to(o.dtype) for i, o in enumerate(outputs)]
    return [*(o.detach() for o in outputs), *torch.autograd.grad(outputs, fused, grads)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("T", "H", "G", "d"), [(3, 14, 2, 64), (1, 20, 20, 128), (0, 2, 2, 8), (4, 3, 1, 10), (2, 2, 2, 72)])
def test_rotation(T: int, H: int, G: int, d: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(T + d)
    fused, angles = torch.randn(T, (H + 2 * G) * d, generator=generator).to(dtype), torch.rand(T, d // 2, generator=generator) * 6
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    ours, torchs = run("triton", fused, cos, sin, H, G, d), run("reference", fused, cos, sin, H, G, d)
    exact = run("reference", fused.double(), cos.double(), sin.double(), H, G, d)
    for our, theirs, truth in zip(ours, torchs, exact, strict=True):
        assert our.dtype == dtype and our.shape == truth.shape
        if T:
            floor = truth.abs().max() * torch.finfo(dtype).eps
            assert (our.double() - truth).abs().max() <= 2 * (theirs.double() - truth).abs().max() + floor


@pytest.mark.parametrize("cache_dtype", [dtype for dtype in CACHE_DTYPES if dtype != torch.bfloat16])
def test_into_cache_equals_cpp(cache_dtype: torch.dtype) -> None:
    T, H, G, d, R = 6, 18, 3, 72, 9
    generator = torch.Generator().manual_seed(0)
    fused, angles = torch.randn(T, (H + 2 * G) * d, generator=generator), torch.rand(T, d // 2, generator=generator) * 6
    q, k, v = (part.unflatten(-1, (-1, d)) for part in fused.split((H * d, G * d, G * d), dim=-1))
    slots = torch.tensor([3, 0, 8, -1, 7, 1])
    scales = (torch.tensor([0.01, 0.5, 1e-4]), torch.tensor([0.003, 2.0, 1e9])) if cache_dtype == torch.float8_e4m3fn else (None, None)
    results = []
    for implementation in ("triton", "cpu"):
        k_cache, v_cache = (torch.full((R, G, d), 5.0).to(cache_dtype) for _ in range(2))
        with registry.use(rope=implementation):
            out = rope_into_cache(q, k, v, angles.cos(), angles.sin(), k_cache, v_cache, slots, *scales)
        results.append((k_cache.float(), v_cache.float(), out))
    (k_ours, v_ours, q_ours), (k_theirs, v_theirs, q_theirs) = results
    assert torch.equal(v_ours, v_theirs)
    torch.testing.assert_close(q_ours, q_theirs, rtol=1e-5, atol=1e-6)
    # One rounding apart where the instruction set contracts a product and a sum.
    torch.testing.assert_close(k_ours, k_theirs, rtol=torch.finfo(cache_dtype).eps, atol=1e-6)
    assert (k_ours == k_theirs).float().mean() > (0.99 if cache_dtype != torch.float32 else 0)


def test_every_fp8_value_and_tie() -> None:
    finite = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    finite = finite[~finite.isnan()].sort().values.unique()
    between = torch.cat([(finite[1:] + finite[:-1]) / 2, torch.linspace(-500, 500, 401), torch.tensor([1e30, -1e30, torch.inf, torch.nan])])
    values = torch.cat([finite, between, between.nextafter(torch.tensor(1e9))])
    values = torch.cat([values, torch.zeros(-len(values) % 64)]).view(-1, 1, 64)
    T = values.shape[0]
    cache, tables = torch.zeros(T, 1, 64).to(torch.float8_e4m3fn), torch.zeros(T, 32)
    with registry.use(rope="triton"):
        rope_into_cache(values, values, values, tables, tables, cache.clone(), cache, torch.arange(T))
    assert torch.equal(cache.float().nan_to_num(1e9), values.clamp(-448, 448).to(torch.float8_e4m3fn).float().nan_to_num(1e9))
