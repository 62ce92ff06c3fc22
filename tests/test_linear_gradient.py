"""Products of the backward pass against fp64 and torch: both layouts, both weights, ragged shapes; who multiplies what."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from llava_fast import _cpu
from llava_fast.kernels import linear_gradient
from llava_fast.kernels.linear import linear, quantise
from llava_fast.kernels.linear_cross_entropy import linear_cross_entropy
from llava_fast.kernels.linear_gradient import multiply, product, product_into, served

AMX = "amx" in _cpu.supported_isas()
needs_amx = pytest.mark.skipif(not AMX, reason="the machine has no AMX")
# M, N, K: single numbers, odd ends everywhere, several depths, several blocks of columns, results written around the caches (and not)
SHAPES = [(1, 1, 1), (33, 17, 5), (32, 32, 32), (70, 100, 1030), (100, 65, 31), (64, 900, 513), (7, 64, 0)]
SHAPES += [(4100, 1024, 40), (4100, 1024, 390), (4200, 1001, 9)]


@pytest.fixture(autouse=True)
def everything_is_served(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(linear_gradient, "LEAST", 1)
    before = _cpu.isa()
    yield
    _cpu.set_isa(before)


def make(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def close(ours: Tensor, theirs: Tensor, truth: Tensor) -> None:
    """At most twice torch's error, plus four roundings of the largest value."""
    assert ours.dtype == theirs.dtype and ours.shape == truth.shape
    if truth.numel():
        floor = truth.abs().max() * torch.finfo(ours.dtype).eps * 4
        assert (ours.double() - truth).abs().max() <= 2 * (theirs.double() - truth).abs().max() + floor


@needs_amx
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("a_transposed", [False, True])
@pytest.mark.parametrize(("M", "N", "K"), SHAPES)
def test_values(M: int, N: int, K: int, a_transposed: bool, dtype: torch.dtype) -> None:
    A, b = make(M, K), make(K, N, seed=1).to(dtype)
    a = A.t().contiguous() if a_transposed else A
    truth, theirs = A.double() @ b.double(), A @ b.float()
    ours = product(a, b, a_transposed)
    close(ours, theirs, truth)
    total = torch.ones(M, N + 16)[:, :N]  # rows with a stride
    product_into(total, a, b, a_transposed, add=True)
    close(total, theirs + 1, truth + 1)


@needs_amx
@pytest.mark.parametrize("a_transposed", [False, True])
def test_magnitudes(a_transposed: bool) -> None:
    """Numbers of sixty binary orders in a sum, of which each must keep its own 24 bits."""
    rows, columns = (torch.randint(-30, 30, shape, generator=torch.Generator().manual_seed(2)) for shape in ((40, 1), (1, 50)))
    A, b = make(40, 200) * 2.0**rows, make(200, 50) * 2.0**columns
    ours, theirs, truth = product(A.t() if a_transposed else A, b, a_transposed), A @ b, A.double() @ b.double()
    scale = A.double().abs() @ b.double().abs()
    assert ((ours - truth).abs() / scale).max() <= 2 * ((theirs - truth).abs() / scale).max() + 2**-22


@needs_amx
@pytest.mark.parametrize(("M", "N", "K"), [(70, 300, 1030), (500, 40, 100)])
def test_same_bits_in_every_run_and_thread_count(M: int, N: int, K: int) -> None:
    a, b, threads = make(K, M), make(K, N), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 4, 2):
            torch.set_num_threads(count)
            results.append(product(a, b, True))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


@needs_amx
def test_layouts() -> None:
    a, b = make(60, 40), make(80, 60)
    assert torch.equal(product(a.t(), b.t(), False), product(a, b.t().contiguous(), True))
    wide = make(60, 100)
    assert torch.equal(product(a, wide[:, 3:50], True), product(a, wide[:, 3:50].contiguous(), True))


FROZEN = [("int8", True, False)]  # quantised weights have no gradient
TRAINED = [(kind, *wanted) for kind in ("float32", "bfloat16") for wanted in ((True, True), (True, False), (False, True))]


@pytest.mark.parametrize(("kind", "x_wanted", "weight_wanted"), FROZEN + TRAINED)
def test_gradients_of_linear(kind: str, x_wanted: bool, weight_wanted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each within twice torch's error, in a product of its own, and none for what is frozen."""
    calls = []
    launch = linear_gradient.product_into
    monkeypatch.setattr(linear_gradient, "product_into", lambda *args: (calls.append(args[3]), launch(*args)))
    x, weight, grad = make(3, 30, 64), make(50, 64), make(3, 30, 50)
    stored = quantise(weight, "int8") if kind == "int8" else weight.to(getattr(torch, kind))
    matrix = stored.dequantise() if kind == "int8" else stored.float()
    x.requires_grad_(x_wanted)
    if weight_wanted:
        stored.requires_grad_()
    linear(x, stored).backward(grad)
    assert calls == ([False] * x_wanted + [True] * weight_wanted if AMX else [])
    if x_wanted:
        close(x.grad, grad @ matrix, grad.double() @ matrix.double())
    if weight_wanted:
        theirs, truth = (grad.to(t).flatten(0, 1).t() @ x.detach().to(t).flatten(0, 1) for t in (torch.float32, torch.float64))
        close(stored.grad, theirs.to(stored.dtype), truth)


@needs_amx
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_the_loss(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """In two chunks, whose gradients of the weight are added up; against the same op with torch's products."""
    monkeypatch.setattr("llava_fast.kernels.linear_cross_entropy.CHUNK_BYTES", {"cpu": 200 * 128 * 4})
    hidden, weight, labels = make(220, 48), make(200, 48).to(dtype), torch.arange(220) % 200

    def gradients() -> tuple[Tensor, ...]:
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        return torch.autograd.grad(linear_cross_entropy(*leaves, labels, reduction="mean"), leaves)

    ours = gradients()
    _cpu.set_isa("avx512")
    theirs = gradients()
    for our, their in zip(ours, theirs, strict=True):
        assert our.dtype == their.dtype
        torch.testing.assert_close(our, their, rtol=1e-2 if our.dtype == torch.bfloat16 else 2e-5, atol=1e-7)


def test_who_multiplies() -> None:
    a, b = make(8, 8), make(8, 8)
    assert served(a, b, "cpu") == AMX and served(a, b.bfloat16(), "cpu") == AMX
    assert not served(a, b, "reference") and not served(a.double(), b.double(), "cpu") and not served(a, b.half(), "cpu")
    assert not served(a.bfloat16(), b.bfloat16(), "cpu")
    _cpu.set_isa("portable")
    assert not served(a, b, "cpu")
    assert torch.equal(multiply(a, b, True, "cpu"), a.t() @ b)


def test_other_instruction_sets_are_refused() -> None:
    _cpu.set_isa("portable")
    with pytest.raises(ValueError, match="products of gradients are for amx, got portable"):
        product(make(2, 2), make(2, 2), False)


@needs_amx
def test_another_type_is_refused() -> None:
    with pytest.raises(ValueError, match="b must be fp32 or bf16"):
        product(make(2, 2), make(2, 2).half(), False)


@needs_amx
def test_opcheck_and_compile() -> None:
    torch.library.opcheck(product, (make(20, 30), make(20, 40), True))
    x, weight = make(20, 30).requires_grad_(), make(40, 30).requires_grad_()
    run = torch.compile(lambda x, w: linear(x, w).square().sum(), fullgraph=True, backend="aot_eager")
    ours = torch.autograd.grad(run(x, weight), (x, weight))
    theirs = torch.autograd.grad((x @ weight.t()).square().sum(), (x, weight))
    for our, their in zip(ours, theirs, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-4, atol=1e-4)


@needs_amx
def test_small_products_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """LEAST counts multiply-adds: 3 x 4 x 5 of them are 60."""
    a, b = make(3, 4), make(4, 5)
    for least, ours in ((60, True), (61, False)):
        monkeypatch.setattr(linear_gradient, "LEAST", least)
        assert served(a, b, "cpu") is ours
