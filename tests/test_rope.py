"""Rotary embedding: the C++ kernels against torch; fused views, writes into a cache in every dtype, gradients, compilation."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from llava_fast import _cpu
from llava_fast.kernels import registry
from llava_fast.kernels.rope import CACHE_DTYPES, _rope, rope, rope_into_cache, rope_qk, rope_tables

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# T, H, G, d
SHAPES = [(5, 14, 2, 64), (1, 32, 32, 128), (0, 4, 4, 64), (7, 3, 1, 10), (300, 2, 2, 72), (3, 1, 1, 2)]


@pytest.fixture(params=_cpu.supported_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _cpu.isa()
    _cpu.set_isa(request.param)
    yield request.param
    _cpu.set_isa(before)


def make(T: int, H: int, G: int, d: int, dtype: torch.dtype, table_dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The fused product [T, (H + 2 G) d], cos, sin."""
    generator = torch.Generator().manual_seed(T + H + G + d)
    inv_freq = 10000 ** (-torch.arange(0, d, 2) / d)
    cos, sin = rope_tables(torch.randint(0, 500, (T,), generator=generator), inv_freq, 1.0, table_dtype or dtype)
    return torch.randn(T, (H + 2 * G) * d, generator=generator).to(dtype), cos, sin


def split(fused: Tensor, H: int, G: int, d: int) -> list[Tensor]:
    return [part.unflatten(-1, (-1, d)) for part in fused.split((H * d, G * d, G * d), dim=-1)]


def with_grads(fused: Tensor, cos: Tensor, sin: Tensor, H: int, G: int, d: int) -> list[Tensor]:
    fused = fused.clone().requires_grad_()
    q, k, _ = split(fused, H, G, d)
    outputs = (*rope_qk(q, k, cos, sin), rope(q, cos, sin))
    grads = [torch.randn(o.shape, generator=torch.Generator().manual_seed(i)).bfloat16().to(o.dtype) for i, o in enumerate(outputs)]
    torch.autograd.backward(outputs, grads)
    assert fused.grad is not None
    return [*(o.detach() for o in outputs), fused.grad]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("T", "H", "G", "d"), SHAPES)
def test_values_and_gradients(T: int, H: int, G: int, d: int, dtype: torch.dtype, isa: str) -> None:
    """The error against fp64 is at most twice that of torch in the same dtype, plus a rounding of the largest value."""
    fused, cos, sin = make(T, H, G, d, dtype)
    ours = with_grads(fused, cos, sin, H, G, d)
    with registry.use(rope="reference"):
        torchs = with_grads(fused, cos, sin, H, G, d)
        exact = with_grads(fused.double(), cos.double(), sin.double(), H, G, d)
    for our, theirs, truth in zip(ours, torchs, exact, strict=True):
        assert our.dtype == dtype and our.shape == truth.shape
        if T:
            floor = truth.abs().max() * torch.finfo(dtype).eps
            assert (our.double() - truth).abs().max() <= 2 * (theirs.double() - truth).abs().max() + floor


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_wide_tables(dtype: torch.dtype, isa: str) -> None:
    fused, cos, sin = make(9, 4, 2, 64, dtype, torch.float32)
    q, k, _ = split(fused, 4, 2, 64)
    with registry.use(rope="reference"):
        expected = rope_qk(q.double(), k.double(), cos.double(), sin.double())
    for our, truth in zip(rope_qk(q, k, cos, sin), expected, strict=True):
        assert our.dtype == dtype
        torch.testing.assert_close(our.double(), truth, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("paged", [False, True])
def test_into_cache(dtype: torch.dtype, cache_dtype: torch.dtype, paged: bool, isa: str) -> None:
    """Equal to the rotation, then the conversion; rows of no slot are written nowhere."""
    T, H, G, d, R = 9, 4, 2, 72, 24
    fused, cos, sin = make(T, H, G, d, dtype)
    q, k, v = split(fused, H, G, d)
    slots = torch.tensor([3, 0, 23, -1, 7, 8, -1, 1, 2])
    scales = (torch.tensor([0.01, 0.5]), torch.tensor([0.003, 2.0])) if cache_dtype == torch.float8_e4m3fn else (None, None)
    caches = []
    for implementation in ("cpu", "reference"):
        shape = (R // 4, 4, G, d) if paged else (R, G, d)
        k_cache, v_cache = (torch.full(shape, 5.0).to(cache_dtype) for _ in range(2))
        with torch.no_grad(), registry.use(rope=implementation):
            out = rope_into_cache(q, k, v, cos, sin, k_cache, v_cache, slots, *scales)
        caches.append((k_cache.float(), v_cache.float(), out.float()))
    (k_ours, v_ours, q_ours), (k_theirs, v_theirs, q_theirs) = caches
    assert torch.equal(v_ours, v_theirs)
    assert torch.equal(q_ours, rope(q, cos, sin).float())
    # The reference rounds to dtype after every operation: the keys may differ by a step or two of either type.
    step = max(torch.finfo(dtype).eps * 4, torch.finfo(cache_dtype).eps)
    torch.testing.assert_close(k_ours, k_theirs, rtol=step, atol=float(step * k_theirs.abs().max()) / 4)
    untouched = torch.ones(R, dtype=torch.bool)
    untouched[slots[slots >= 0]] = False
    assert (k_ours.view(R, G, d)[untouched] == 5).all() and (v_ours.view(R, G, d)[untouched] == 5).all()


def test_every_fp8_value_and_tie(isa: str) -> None:
    """v goes through unrotated: rounding is torch's, but for the saturation."""
    finite = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    finite = finite[~finite.isnan()].sort().values.unique()
    between = torch.cat([(finite[1:] + finite[:-1]) / 2, torch.linspace(-500, 500, 4001), torch.randn(2000) * 0.01])
    values = torch.cat([finite, between, between.nextafter(torch.tensor(1e9)), torch.tensor([1e30, -1e30, torch.inf, torch.nan])])
    values = torch.cat([values, torch.zeros(-len(values) % 64)]).view(-1, 1, 64)
    T = values.shape[0]
    cache, tables = torch.zeros(T, 1, 64).to(torch.float8_e4m3fn), torch.zeros(T, 32)
    rope_into_cache(values, values, values, tables, tables, cache.clone(), cache, torch.arange(T))
    expected = values.clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(cache.float().nan_to_num(1e9), expected.float().nan_to_num(1e9))


def test_same_bits_in_every_run_and_thread_count() -> None:
    fused, cos, sin = make(200, 14, 2, 64, torch.float32)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        results.append(with_grads(fused, cos, sin, 14, 2, 64))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("d", [64, 224])
def test_many_rows_as_few(d: int, dtype: torch.dtype, isa: str) -> None:
    """Outputs of 8 MB are written around the caches."""
    H, G = 14, 2
    T = -(-(8 << 20) // (H * d * dtype.itemsize))
    fused, cos, sin = make(T, H, G, d, dtype)
    q, k, v = split(fused, H, G, d)

    def both(rows: slice) -> list[Tensor]:
        cache = torch.zeros(2, len(k[rows]), G, d, dtype=dtype)
        slots = torch.arange(len(k[rows])).flip(0)
        q_too = rope_into_cache(q[rows], k[rows], v[rows], cos[rows], sin[rows], cache[0], cache[1], slots)
        return [*rope_qk(q[rows], k[rows], cos[rows], sin[rows]), q_too, cache[0].flip(0), cache[1].flip(0)]

    whole, halves = both(slice(None)), [both(slice(None, T // 2)), both(slice(T // 2, None))]
    for i, one in enumerate(whole):
        assert torch.equal(one, torch.cat([half[i] for half in halves]))
    assert torch.equal(whole[4], v)


def test_backward_is_the_inverse() -> None:
    fused, cos, sin = make(20, 4, 4, 64, torch.float32)
    q = split(fused, 4, 4, 64)[0].detach().clone().requires_grad_()
    out = rope(q, cos, sin)
    (grad,) = torch.autograd.grad(out, q, out.detach())
    torch.testing.assert_close(grad, q.detach(), rtol=1e-5, atol=1e-5)


def test_opcheck_and_compile() -> None:
    fused, cos, sin = make(5, 4, 2, 10, torch.float32)
    q, k, _ = (part.detach().clone().requires_grad_() for part in split(fused, 4, 2, 10))
    torch.library.opcheck(_rope, (q, k, cos, sin, False, "cpu"))
    torch.library.opcheck(_rope, (q, None, cos, sin, True, "cpu"))

    def step(q: Tensor, k: Tensor) -> Tensor:
        a, b = rope_qk(q, k, cos, sin)
        return a.sin().sum() + (b * b.cos()).sum()

    torch.compiler.reset()
    expected = torch.autograd.grad(step(q, k), (q, k))
    compiled = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(q, k), (q, k))
    for ours, theirs in zip(compiled, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_gradcheck_in_fp64() -> None:
    fused, cos, sin = make(3, 2, 1, 4, torch.float32)
    q, k, _ = (part.detach().double().requires_grad_() for part in split(fused, 2, 1, 4))
    assert torch.autograd.gradcheck(lambda q, k: rope_qk(q, k, cos.double(), sin.double()), (q, k))


def test_bad_arguments() -> None:
    q, cos = torch.zeros(3, 2, 8), torch.zeros(3, 4)
    with pytest.raises(ValueError, match=r"even d up to 512, got torch.float32 \[3, 2, 7\]"):
        rope(q[..., :7], cos, cos)
    with pytest.raises(ValueError, match=r"\[3, 2, 8\] and torch.float32 \[2, 2, 8\]"):
        rope_qk(q, q[:2], cos, cos)
    with pytest.raises(ValueError, match=r"must be \[3, 4\] in torch.float32 or float32, got torch.float32 \[2, 4\]"):
        rope(q, cos[:2], cos)
    with pytest.raises(ValueError, match="got torch.float16"):
        rope(q, cos.half(), cos.half())
    cache, slots = torch.zeros(5, 2, 8), torch.arange(3)
    with pytest.raises(ValueError, match=r"slots\[1\] is 5, expected a row of the cache, 0 to 4"):
        rope_into_cache(q, q, q, cos, cos, cache, cache, torch.tensor([0, 5, 1]))
    with pytest.raises(ValueError, match=r"slots\[2\] is -2"):
        rope_into_cache(q, q, q, cos, cos, cache, cache, torch.tensor([0, -1, -2]))
    assert (cache == 0).all()
    with pytest.raises(ValueError, match=r"slots must be int64 \[3\], got torch.int32 \[3\]"):
        rope_into_cache(q, q, q, cos, cos, cache, cache, slots.int())
    with pytest.raises(ValueError, match=r"v must be like k, torch.float32 \[3, 2, 8\], got torch.float32 \[3, 1, 8\]"):
        rope_into_cache(q, q, q[:, :1], cos, cos, cache, cache, slots)
    with pytest.raises(ValueError, match=r"\[rows, 2, 8\].*got torch.float32 \[5, 2, 8\] and torch.float32 \[4, 2, 8\]"):
        rope_into_cache(q, q, q, cos, cos, cache, cache[:4], slots)
    with pytest.raises(ValueError, match=r"both be fp32 \[2\] or None"):
        rope_into_cache(q, q, q, cos, cos, cache, cache, slots, torch.ones(2), None)
    with pytest.raises(ValueError, match="no gradient"):
        rope_into_cache(q.clone().requires_grad_(), q, q, cos, cos, cache, cache, slots)
    with pytest.raises(ValueError, match="one device, got cpu and meta"):
        rope_qk(q, q, cos, cos.to("meta"))
    for change in ({"cos": cos.to("meta")}, {"k_cache": cache.to("meta")}, {"slots_T": slots.to("meta")}):
        with pytest.raises(ValueError, match="one device, got cpu and meta"):
            call = {"q_THd": q, "k_TGd": q, "v_TGd": q, "cos": cos, "sin": cos, "k_cache": cache, "v_cache": cache, "slots_T": slots}
            rope_into_cache(**{**call, **change})


def test_the_extension_refuses_dtypes_its_kernels_do_not_know() -> None:
    fp32, fp64, e4m3 = _cpu.DType.float32, _cpu.DType.float64, _cpu.DType.float8_e4m3fn
    rows, into = (0, 8, 8, 1, 0), (0, 8, 8)
    for q, table in ((fp64, fp32), (fp32, fp64), (fp32, e4m3)):
        with pytest.raises(ValueError, match="must be fp32, bf16 or fp16, got"):
            _cpu.rope(q, table, 0, 8, 0, 0, False, *rows, *rows, 1)
    with pytest.raises(ValueError, match="cache must be fp32, bf16, fp16 or e4m3, got fp64"):
        _cpu.rope_into_cache(fp32, fp32, 0, 8, 0, 0, *rows, *rows[:4], *into, fp64, 1, 64, 64, 0, 0, 0, 1)
    for x, weight in ((fp64, fp32), (fp32, fp64), (e4m3, fp32)):
        with pytest.raises(ValueError, match="must be fp32, bf16 or fp16, got"):
            _cpu.norm_forward(x, weight, 0, 8, 1e-6, 0, 0, 0, 0, 0, 0, 0, 1)
        with pytest.raises(ValueError, match="must be fp32, bf16 or fp16, got"):
            _cpu.norm_backward(x, weight, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0, 1)
    for call in (
        lambda: _cpu.activation_forward(fp64, _cpu.Activation.silu, 0, 0, 0, 1),
        lambda: _cpu.activation_backward(e4m3, _cpu.Activation.silu, 0, 0, 0, 0, 1),
        lambda: _cpu.swiglu_forward(fp64, 0, 8, 0, 0, 1),
        lambda: _cpu.swiglu_backward(e4m3, 0, 8, 0, 0, 0, 1),
    ):
        with pytest.raises(ValueError, match="must be fp32, bf16 or fp16, got"):
            call()
