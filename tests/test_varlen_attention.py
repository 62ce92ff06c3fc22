"""varlen_attention: reference and C++ against fp64, all options, forward and gradients; isolation, determinism, compilation, bad calls."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llava_fast import _cpu
from llava_fast.kernels import registry
from llava_fast.kernels.varlen_attention import _varlen_attention, _varlen_attention_backward, varlen_attention, varlen_attention_reference

ISAS = _cpu.supported_isas()


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _cpu.isa()
    _cpu.set_isa(request.param)
    yield request.param
    _cpu.set_isa(before)


def bounds(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def make(lengths_q, lengths_k, H=4, G=2, d=64, dtype=torch.float32, stored=None, seed=0) -> tuple[Tensor, ...]:
    """q, k, v and the gradient of the output as slices of wider buffers, then both cu_seqlens."""
    generator = torch.Generator().manual_seed(seed)
    T, K = sum(lengths_q), sum(lengths_k)
    q, grad = torch.randn(T, 2 * H, d, generator=generator).to(dtype).split(H, 1)
    k, v = torch.randn(K, 2 * G + 1, d, generator=generator).to(stored or dtype)[:, 1:].split(G, 1)
    return q, k, v, grad, bounds(lengths_q), bounds(lengths_k)


def naive(q, k, v, cu_q, cu_k, *, causal=True, q_index=None, seqused_k=None, prefix=None, scale=None) -> tuple[Tensor, Tensor]:
    """The definition, a row and a head at a time."""
    out, lse = q.new_zeros(q.shape), q.new_full(q.shape[:2], -torch.inf)
    for s in range(len(cu_q) - 1):
        n, own = int(cu_q[s + 1] - cu_q[s]), int(cu_k[s + 1] - cu_k[s]) if seqused_k is None else int(seqused_k[s])
        before = [] if prefix is None else list(range(*prefix[s].tolist()))
        for i in range(n):
            row = int(cu_q[s]) + i
            place = own - n + i if q_index is None else int(q_index[row])
            seen = before + [int(cu_k[s]) + j for j in range(own) if not causal or j <= place]
            for h in range(q.shape[1] if seen else 0):
                g = h * k.shape[1] // q.shape[1]
                scores = k[seen, g].to(q.dtype) @ q[row, h] * (q.shape[2] ** -0.5 if scale is None else scale)
                out[row, h], lse[row, h] = scores.softmax(0) @ v[seen, g].to(q.dtype), scores.logsumexp(0)
    return out, lse


def with_grads(run, q, k, v, grad, *arguments, **options) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse = run(*leaves, *arguments, **options, return_lse=True)
    return out.detach(), lse.double(), *torch.autograd.grad(out, leaves, grad.to(out.dtype), allow_unused=True, materialize_grads=True)


def check(q, k, v, grad, cu_q, cu_k, **options) -> None:
    """Outputs and gradients: the error against fp64 is at most twice the reference's in the same dtypes, plus a rounding."""
    ours = with_grads(varlen_attention, q, k, v, grad, cu_q, cu_k, **options)
    torchs = with_grads(varlen_attention_reference, q, k, v, grad, cu_q, cu_k, **options)
    exact = with_grads(varlen_attention_reference, q.double(), k.double(), v.double(), grad, cu_q, cu_k, **options)
    for name, our, theirs, truth in zip(("out", "lse", "dq", "dk", "dv"), ours, torchs, exact, strict=True):
        assert our.shape == truth.shape and our.dtype == theirs.dtype
        blind = truth.isneginf()
        assert torch.equal(our.isneginf(), blind), name
        our, theirs, truth = (x.double().masked_fill(blind, 0) for x in (our, theirs, truth))
        if truth.numel():
            eps = torch.finfo(torch.float32 if name == "lse" else ours[0].dtype).eps
            # One rounding more, of the result itself. The largest of few errors is a matter of luck.
            for size, times in ((rms, 2), (largest, 4)):
                error, allowed = size(our - truth), times * size(theirs - truth) + eps * size(truth)
                assert error <= allowed, f"{name}, {size.__name__}: {error:.2e} > {allowed:.2e}"


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def largest(x: Tensor) -> float:
    return x.abs().max().item()


I32 = torch.int32
OPTIONS: dict[str, tuple[list[int], list[int], dict[str, Any]]] = {
    "causal": ([70, 0, 130, 1, 9], [70, 0, 130, 1, 9], {}),
    "full": ([70, 0, 130, 1, 9], [70, 0, 130, 1, 9], {"causal": False}),
    "last rows": ([5, 60, 1], [150, 60, 33], {}),
    "more queries than keys": ([40, 3], [30, 0], {}),
    "scale": ([100], [100], {"scale": 0.3}),
    "negative scale": ([100, 1], [100, 20], {"scale": -0.3}),
    "q_index": ([30, 1, 3], [100, 40, 3], {"q_index": torch.tensor([*range(7, 97, 3), 11, 0, 1, 2])}),
    "q_index in no order": ([50, 2], [100, 3], {"q_index": torch.tensor([*range(99, -1, -2), 5, -1])}),
    "seqused": ([3, 40, 1], [90, 70, 50], {"seqused_k": torch.tensor([70, 41, 0], dtype=I32)}),
    "prefix": ([30, 40, 1, 5], [130, 40, 1, 5], {"prefix": torch.tensor([[0, 0], [0, 130], [10, 60], [130, 171]], dtype=I32)}),
    "prefix alone": ([30, 2], [100, 0], {"prefix": torch.tensor([[0, 0], [3, 100]], dtype=I32)}),
    "all": (
        [30, 20, 2],
        [130, 40, 10],
        {
            "prefix": torch.tensor([[0, 0], [0, 100], [7, 40]], dtype=I32),
            "seqused_k": torch.tensor([100, 30, 2], dtype=I32),
            "q_index": torch.tensor([*range(0, 90, 3), *range(20), 1, 0]),
        },
    ),
}


@pytest.mark.parametrize("options", OPTIONS)
def test_reference_is_the_definition(options: str) -> None:
    lengths_q, lengths_k, extra = OPTIONS[options]
    q, k, v, _, *cu = make(lengths_q, lengths_k, d=8, dtype=torch.float64)
    out, lse = varlen_attention_reference(q, k, v, *cu, **extra, return_lse=True)
    expected, expected_lse = naive(q, k, v, *cu, **extra)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (7, 1)])
@pytest.mark.parametrize("options", OPTIONS)
def test_options(options: str, heads: tuple[int, int], isa: str) -> None:
    lengths_q, lengths_k, extra = OPTIONS[options]
    check(*make(lengths_q, lengths_k, *heads), **extra)


@pytest.mark.parametrize("d", [1, 7, 33, 64, 72, 80, 96, 128, 200, 256])
def test_head_dims(d: int, isa: str) -> None:
    check(*make([100, 1, 0, 67], [100, 70, 5, 67], 4, 2, d))


@pytest.mark.parametrize(
    "types", [("bfloat16", "bfloat16"), ("float16", "float16"), ("float32", "bfloat16"), ("float32", "float16")], ids="-".join
)
@pytest.mark.parametrize("d", [64, 72])
def test_dtypes(types: tuple[str, str], d: int, isa: str) -> None:
    check(*make([100, 1, 2, 67], [100, 70, 200, 67], 4, 2, d, *(getattr(torch, name) for name in types)))


def test_vision_shape(isa: str) -> None:
    check(*make([729], [729], 2, 2, 72), causal=False)


@pytest.mark.parametrize("n_q", [1, 3, 8])
def test_few_rows_against_many_keys(n_q: int, isa: str) -> None:
    used = torch.tensor([1500, n_q, 65], dtype=I32)
    for heads in ((16, 16), (14, 2)):
        check(*make([n_q] * 3, [1600, 100, 65], *heads), seqused_k=used)


def test_long_among_short(isa: str) -> None:
    lengths = [3, 1, 2, 1500, 7, 0, 1]
    check(*make(lengths, lengths, 2, 1, 64))


@st.composite
def packs(draw) -> tuple[list[int], list[int], dict[str, Any]]:
    count = draw(st.integers(1, 40))
    lengths = draw(st.lists(st.one_of(st.integers(0, 40), st.integers(0, 2000)), min_size=count, max_size=count))
    while sum(lengths) > 4000:
        lengths[lengths.index(max(lengths))] //= 4
    asked = [draw(st.integers(0, n)) if draw(st.booleans()) else n for n in lengths]
    extra: dict[str, Any] = {"causal": draw(st.booleans())}
    if draw(st.booleans()):
        starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
        ranges = []
        for s in range(count):
            first = draw(st.integers(0, starts[s]))
            ranges.append([first, draw(st.integers(first, min(starts[s], first + 300)))])
        extra["prefix"] = torch.tensor(ranges, dtype=I32)
    if draw(st.booleans()):
        generator = torch.Generator().manual_seed(draw(st.integers(0, 100)))
        extra["q_index"] = torch.cat(
            [torch.randperm(max(n, 1), generator=generator)[:a].sort()[0] for a, n in zip(asked, lengths, strict=True)]
        )
    return asked, lengths, extra


@settings(max_examples=25, deadline=None)
@given(pack=packs(), heads=st.sampled_from([(2, 2), (4, 1)]), seed=st.integers(0, 1000))
def test_random_packs(pack, heads, seed) -> None:
    asked, lengths, extra = pack
    check(*make(asked, lengths, *heads, 24, seed=seed), **extra)


@pytest.mark.parametrize("causal", [True, False])
def test_other_sequences_change_no_bit(causal: bool, isa: str) -> None:
    lengths = [50, 200, 1, 33]
    q, k, v, grad, *cu = make(lengths, lengths)
    before = with_grads(varlen_attention, q, k, v, grad, *cu, causal=causal)
    q, k, v, grad = (x.clone() for x in (q, k, v, grad))
    for x in (q, k, v, grad):
        x[50:250] = torch.randn(200, *x.shape[1:]) * 100
    after = with_grads(varlen_attention, q, k, v, grad, *cu, causal=causal)
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a[:50], b[:50]) and torch.equal(a[250:], b[250:]) and not torch.equal(a, b)


def test_rows_beyond_what_is_used_are_not_read(isa: str) -> None:
    q, k, v, grad, *cu = make([3, 20], [100, 50])
    used = torch.tensor([60, 30], dtype=I32)
    k, v = k.clone(), v.clone()
    before = with_grads(varlen_attention, q, k, v, grad, *cu, seqused_k=used)
    for x in (k, v):
        x[60:100] = x[130:] = torch.nan
    after = with_grads(varlen_attention, q, k, v, grad, *cu, seqused_k=used)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not after[3][60:100].any() and not after[4][130:].any()


@pytest.mark.parametrize("options", ["causal", "prefix", "last rows", "seqused"])
def test_same_bits_in_every_run_and_for_any_number_of_threads(options: str, isa: str) -> None:
    lengths_q, lengths_k, extra = OPTIONS[options]
    tensors = make(lengths_q * 4, lengths_k * 4, 8, 4)
    if "prefix" in extra or "seqused_k" in extra:
        extra = {name: value.repeat(4, *[1] * (value.dim() - 1)) for name, value in extra.items()}
    before = torch.get_num_threads()
    results = []
    for threads in (1, 1, 2, 5):
        torch.set_num_threads(threads)
        results.append(with_grads(varlen_attention, *tensors, **extra))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_nothing_to_do(isa: str) -> None:
    check(*make([0, 0], [0, 5]))
    check(*make([], []))


def test_reference_gradients() -> None:
    q, k, v, _, *cu = make([3, 2], [5, 3], 2, 1, 3, torch.float64)
    prefix = torch.tensor([[0, 0], [1, 4]], dtype=I32)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(lambda *x: varlen_attention(*x, *cu, prefix=prefix), leaves)


@pytest.mark.parametrize("name", ["cpu", "reference"])
@pytest.mark.parametrize("options", ["causal", "all", "more queries than keys"])
def test_custom_op(name: str, options: str) -> None:
    lengths_q, lengths_k, extra = OPTIONS[options]
    q, k, v, grad, *cu = make(lengths_q, lengths_k)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    indices = [extra.get(option) for option in ("q_index", "seqused_k", "prefix")]
    torch.library.opcheck(_varlen_attention, (*leaves, *cu, True, *indices, 0.125, name))
    out, lse = _varlen_attention(q, k, v, *cu, True, *indices, 0.125, name)
    torch.library.opcheck(_varlen_attention_backward, (grad, q, k, v, out, lse, *cu, True, *indices, 0.125, name))


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_compiles_whole(name: str) -> None:
    q, k, v, grad, *cu = make([30, 5], [30, 9])
    torch._dynamo.reset()
    with registry.use(varlen_attention=name):
        compiled = torch.compile(varlen_attention, fullgraph=True, backend="aot_eager")
        ours, eager = (with_grads(run, q, k, v, grad, *cu) for run in (compiled, varlen_attention))
        for a, b in zip(ours, eager, strict=True):
            torch.testing.assert_close(a, b)
        assert torch.equal(varlen_attention(q, k, v, *cu), eager[0])


def test_lse_carries_no_gradient() -> None:
    q, k, v, _, *cu = make([3], [3])
    for name in ("cpu", "reference"):
        with registry.use(varlen_attention=name):
            out, lse = varlen_attention(q.clone().requires_grad_(), k, v, *cu, return_lse=True)
            assert out.requires_grad and not lse.requires_grad


def test_which_implementation() -> None:
    assert registry.resolve_name("varlen_attention", "cpu", torch.float32, (72, "full")) == "cpu"
    assert registry.resolve_name("varlen_attention", "cpu", torch.float64, (72, "full")) == "reference"
    assert registry.resolve_name("varlen_attention", "cpu", torch.float32, (257, "full")) == "reference"
    q, k, v, _, *cu = make([3], [3], d=264)
    with registry.use(varlen_attention="cpu"), pytest.raises(ValueError, match="does not serve shape class .264"):
        varlen_attention(q, k, v, *cu)


GOOD = dict(
    q_THd=torch.zeros(5, 4, 8),
    k_KGd=torch.zeros(7, 2, 8),
    v_KGd=torch.zeros(7, 2, 8),
    cu_seqlens_q=torch.tensor([0, 2, 5], dtype=I32),
    cu_seqlens_k=torch.tensor([0, 3, 7], dtype=I32),
)


@pytest.mark.parametrize("name", ["cpu", "reference"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(q_THd=torch.zeros(5, 32)), r"expected q \[T, H, d\].*\[5, 32\]"),
        (dict(v_KGd=torch.zeros(6, 2, 8)), r"\[7, 2, 8\] and \[6, 2, 8\]"),
        (dict(q_THd=torch.zeros(5, 4, 7)), r"\[5, 4, 7\], \[7, 2, 8\]"),
        (dict(q_THd=torch.zeros(5, 3, 8)), "3 heads of q must be a multiple of the 2"),
        (dict(q_THd=torch.zeros(5, 4, 8, dtype=torch.bfloat16)), "bfloat16, torch.float32"),
        (dict(v_KGd=torch.zeros(7, 2, 8, dtype=torch.bfloat16)), "float32 and torch.bfloat16"),
        ({name: torch.zeros(7, 2, 8).to(torch.float8_e4m3fn) for name in ("k_KGd", "v_KGd")}, "got torch.float32, torch.float8_e4m3fn"),
        ({name: torch.zeros(7, 2, 8, dtype=torch.int8) for name in ("k_KGd", "v_KGd")}, "got torch.float32, torch.int8"),
        (dict(k_KGd=torch.zeros(7, 8, 2).transpose(1, 2)), r"must be contiguous, got strides .*\(16, 1, 2\)"),
        (dict(cu_seqlens_q=torch.tensor([0, 2, 5])), "int64"),
        (dict(cu_seqlens_q=torch.tensor([0, 5], dtype=I32)), r"\[2\].*\[3\]"),
        (dict(cu_seqlens_q=torch.tensor([0, 6, 5], dtype=I32)), "cu_seqlens_q must not decrease, got 6 before 5"),
        (dict(cu_seqlens_q=torch.tensor([0, 2, 4], dtype=I32)), "cu_seqlens_q must go from 0 to the number of rows, 5, got 0 to 4"),
        (dict(cu_seqlens_k=torch.tensor([0, 3, 9], dtype=I32)), "cu_seqlens_k must go .* 7, got 0 to 9"),
        (dict(cu_seqlens_k=torch.tensor([-1, 3, 7], dtype=I32)), "cu_seqlens_k must go .* got -1 to 7"),
        (dict(seqused_k=torch.tensor([3, 5], dtype=I32)), r"seqused_k\[1\] must be 0 to 4.*got 5"),
        (dict(seqused_k=torch.tensor([3], dtype=I32)), r"seqused_k must be torch.int32 \[2\].*\[1\]"),
        (dict(prefix=torch.tensor([[0, 0], [5, 8]], dtype=I32)), r"prefix\[1\] must be a range of the 7 key rows, got 5 to 8"),
        (dict(prefix=torch.tensor([[0, 0], [3, 2]], dtype=I32)), "got 3 to 2"),
        (dict(q_index=torch.zeros(4, dtype=torch.int64)), r"q_index must be torch.int64 \[5\].*\[4\]"),
        (dict(q_index=torch.zeros(5, dtype=I32)), "q_index must be torch.int64.*int32"),
        (dict(q_index=torch.zeros(5, dtype=torch.int64, device="meta")), "cpu and meta"),
    ],
)
def test_bad_calls(change: dict[str, Any], message: str, name: str) -> None:
    with registry.use(varlen_attention=name), pytest.raises(ValueError, match=message):
        varlen_attention(**{**GOOD, **change})
