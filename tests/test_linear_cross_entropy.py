"""Chunked cross-entropy against all logits at once: values, gradients, reductions, memory, compilation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llava_fast import _cpu
from llava_fast.kernels import linear_cross_entropy as module
from llava_fast.kernels import registry
from llava_fast.kernels.linear_cross_entropy import (
    _losses,
    _losses_backward,
    _total,
    linear_cross_entropy,
    linear_cross_entropy_reference,
)
from llava_fast.profile import Clock

CHUNKED = ["cpu", "torch"]
SHAPES = [(7, 16, 50), (1, 8, 3), (300, 24, 1003), (5, 123, 4099)]  # L, D, V


def make(L: int, D: int, V: int, hidden: torch.dtype, weight: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Values that bf16 holds, logits of a few units."""
    generator = torch.Generator().manual_seed(L * 1000 + V)
    h = torch.randn(L, D, generator=generator).bfloat16().to(hidden)
    w = (torch.randn(V, D, generator=generator) / D**0.5 * 2).bfloat16().to(weight)
    return h.requires_grad_(), w.requires_grad_(), torch.randint(0, V, (L,), generator=generator)


def with_grad(run: Callable[..., Tensor], h: Tensor, w: Tensor, labels: Tensor, grad: Tensor | None = None) -> list[Tensor]:
    loss = run(h, w, labels)
    return [loss.detach(), *torch.autograd.grad(loss, (h, w), grad if grad is None else grad.to(loss.dtype))]


def assert_as_exact_as_torch(ours: list[Tensor], torchs: list[Tensor], exact: list[Tensor]) -> None:
    """At most twice torch's error in the same dtypes, plus a rounding of the largest value."""
    for our, theirs, truth in zip(ours, torchs, exact, strict=True):
        assert our.dtype == theirs.dtype and our.shape == truth.shape
        floor = truth.abs().max() * torch.finfo(our.dtype).eps * 2
        assert (our.double() - truth).abs().max() <= 2 * (theirs.double() - truth).abs().max() + floor


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", {"cpu": 150 * 1003 * 4})


@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.0, 0.0), (0.1, 0.0), (0.0, 1e-2), (0.2, 1e-3)])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("float32", "bfloat16"), ("bfloat16", "bfloat16"), ("float16", "float16")])
@pytest.mark.parametrize("implementation", CHUNKED)
def test_values_and_gradients(implementation: str, dtypes: tuple[str, str], reduction: str, smoothing: float, z_loss: float, small_chunks):
    for L, D, V in SHAPES:
        h, w, labels = make(L, D, V, *(getattr(torch, name) for name in dtypes))
        grad = torch.randn(L, generator=torch.Generator().manual_seed(1)) if reduction == "none" else torch.tensor(0.3)

        def run(h: Tensor, w: Tensor, labels: Tensor) -> Tensor:
            return linear_cross_entropy(h, w, labels, reduction=reduction, label_smoothing=smoothing, z_loss=z_loss)

        with registry.use(linear_cross_entropy=implementation):
            ours = with_grad(run, h, w, labels, grad)
        with registry.use(linear_cross_entropy="reference"):
            torchs = with_grad(run, h, w, labels, grad)
            exact = with_grad(run, h.detach().double().requires_grad_(), w.detach().double().requires_grad_(), labels, grad)
        assert_as_exact_as_torch(ours, torchs, exact)


@pytest.mark.parametrize("isa", _cpu.supported_isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_pass_over_logits_in_every_instruction_set(isa: str, dtype: torch.dtype) -> None:
    before = _cpu.isa()
    _cpu.set_isa(isa)
    for V in (1, 7, 1024, 1025, 5003):
        logits = (torch.randn(3, V, generator=torch.Generator().manual_seed(V)) * 8).to(dtype)
        logits[2, : V // 2] = -torch.inf
        labels = torch.tensor([0, V // 2, V - 1])
        truth = logits.double().requires_grad_()
        expected = F.cross_entropy(truth, labels, reduction="none")
        (grad,) = torch.autograd.grad(expected.sum() * 0.5, truth)
        loss, lse = torch.empty(3), torch.empty(3)
        module._rows_cpu(logits, labels, loss, lse, None, 0.5, 0.0, 0.0, True)
        torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-6, atol=2e-6)
        torch.testing.assert_close(logits.double(), grad, rtol=2 * torch.finfo(dtype).eps + 1e-5, atol=2e-7)
    _cpu.set_isa(before)


@pytest.mark.parametrize("isa", _cpu.supported_isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_nan_among_the_logits_is_a_nan_loss(isa: str, dtype: torch.dtype) -> None:
    before, block = _cpu.isa(), 1024
    _cpu.set_isa(isa)
    for V in (40, block + 40):
        at_column = torch.randn(V, V, generator=torch.Generator().manual_seed(0)).fill_diagonal_(torch.nan)
        blocks = torch.full((2 + 2 * V, V), -torch.inf)  # a NaN among -infinities, blocks of NaN
        blocks[:V].fill_diagonal_(torch.nan)
        blocks[V : 2 * V] = torch.randn(V, generator=torch.Generator().manual_seed(1))
        blocks[V : 2 * V, : V // 2] = -torch.inf
        blocks[V : 2 * V].fill_diagonal_(torch.nan)
        blocks[-2], blocks[-1], blocks[-1, : min(V - 1, block)] = torch.nan, 1.0, torch.nan
        for logits in (at_column, blocks):
            rows, loss, lse = logits.to(dtype), torch.empty(len(logits)), torch.empty(len(logits))
            labels = (torch.arange(len(logits)) + 1) % V  # another column than the NaN's
            module._rows_cpu(rows, labels, loss, lse, None, 1.0, 0.0, 0.0, True)
            assert loss.isnan().all() and lse.isnan().all() and rows.isnan().all()
    _cpu.set_isa(before)


@pytest.mark.parametrize("implementation", CHUNKED)
def test_sequences(implementation: str) -> None:
    h, w, labels = make(40, 16, 97, torch.float32, torch.float32)
    owner = torch.randint(0, 5, (40,), generator=torch.Generator().manual_seed(3))  # in no order; the last of six has none
    grad = torch.randn(6)
    with registry.use(linear_cross_entropy=implementation):
        ours = with_grad(lambda *args: linear_cross_entropy(*args, reduction="sequence", label_seq=owner, sequences=6), h, w, labels, grad)

    def plain(h: Tensor, w: Tensor, labels: Tensor) -> Tensor:
        return torch.zeros(6).index_add(0, owner, (h @ w.T).log_softmax(-1).gather(1, labels[:, None])[:, 0])

    for our, expected in zip(ours, with_grad(plain, h, w, labels, grad), strict=True):
        torch.testing.assert_close(our, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", CHUNKED)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_no_rows(implementation: str, reduction: str) -> None:
    h, w, labels = make(0, 8, 20, torch.float32, torch.float32)
    with registry.use(linear_cross_entropy=implementation):
        loss = linear_cross_entropy(h, w, labels, reduction=reduction)
        loss.sum().backward()
    assert (loss.numel() == 0) if reduction == "none" else torch.equal(loss.isnan(), torch.tensor(reduction == "mean"))
    assert h.grad.shape == h.shape and (reduction == "mean" or not w.grad.any())


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_gradients_only_for_what_needs_them(reduction: str) -> None:
    for frozen in (0, 1):
        h, w, labels = make(9, 8, 33, torch.float32, torch.bfloat16)
        both = torch.autograd.grad(linear_cross_entropy(h, w, labels, reduction=reduction).sum(), (h, w))
        (h, w)[frozen].requires_grad_(False)
        loss = linear_cross_entropy(h, w, labels, reduction=reduction).sum()
        (one,) = torch.autograd.grad(loss, (h, w)[1 - frozen])
        assert torch.equal(one, both[1 - frozen])
    with torch.no_grad():
        assert not linear_cross_entropy(*make(9, 8, 33, torch.float32, torch.float32), reduction=reduction).requires_grad


def test_the_graph_may_be_kept() -> None:
    h, w, labels = make(9, 8, 33, torch.float32, torch.float32)
    loss = linear_cross_entropy(h, w, labels, reduction="mean")
    first = torch.autograd.grad(loss, (h, w), torch.tensor(2.0), retain_graph=True)
    second = torch.autograd.grad(loss, (h, w), torch.tensor(4.0))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(2 * a, b)


@pytest.mark.parametrize(("factor", "passes"), [(1.0, 0), (2.0, 2)])
def test_a_gradient_of_one_is_passed_on_as_it_is(factor: float, passes: int) -> None:
    """Twice the loss costs a pass over both gradients, once the loss none."""
    h, w, labels = make(5, 8, 12, torch.float32, torch.float32)
    h.requires_grad_(), w.requires_grad_()
    expected = torch.autograd.grad(factor * F.cross_entropy(h @ w.t(), labels, reduction="sum"), (h, w))
    loss = linear_cross_entropy(h, w, labels, reduction="sum")
    with Clock(torch.device("cpu")) as clock:
        loss.backward(torch.tensor(factor))
    assert len(clock.calls.get("mul_", [])) == passes
    torch.testing.assert_close([h.grad, w.grad], list(expected))


def test_a_kept_graph_keeps_its_own_gradients() -> None:
    """A gradient of one is passed on as it is, but not while another backward pass may want it."""
    h, w, labels = make(9, 8, 33, torch.float32, torch.float32)
    loss = linear_cross_entropy(h, w, labels, reduction="mean")
    first = torch.autograd.grad(loss, (h, w), retain_graph=True)
    expected = [a.clone() for a in first]
    for a in first:
        a.zero_()
    for a, b in zip(torch.autograd.grad(loss, (h, w)), expected, strict=True):
        assert torch.equal(a, b) and b.any()


def test_same_bits_whatever_the_threads_and_the_run(small_chunks: None) -> None:
    logits, labels = torch.randn(20, 5000), torch.randint(0, 5000, (20,))
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        loss, lse, out = torch.empty(20), torch.empty(20), logits.clone()
        module._rows_cpu(out, labels, loss, lse, None, 1.0, 0.1, 1e-3, True)
        results.append((loss, lse, out))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_gradcheck() -> None:
    h, w, labels = make(5, 4, 7, torch.float64, torch.float64)
    for arguments in ({"reduction": "mean", "z_loss": 0.01, "label_smoothing": 0.1}, {"z_loss": 0.01, "label_smoothing": 0.1}):
        assert torch.autograd.gradcheck(lambda h, w, a=arguments: linear_cross_entropy(h, w, labels, **a), (h, w))


def test_reference_is_torchs() -> None:
    h, w, labels = make(6, 8, 21, torch.float32, torch.float32)
    assert torch.equal(linear_cross_entropy_reference(h, w, labels, scale=1.0), F.cross_entropy(h @ w.T, labels, reduction="none").sum())


@pytest.mark.parametrize("implementation", CHUNKED)
def test_opcheck(implementation: str) -> None:
    h, w, labels = make(6, 8, 21, torch.float32, torch.float32)
    torch.library.opcheck(_losses, (h, w, labels, 0.1, 0.01, implementation))
    torch.library.opcheck(_total, (h, w, labels, 0.1, 0.01, 0.5, True, True, implementation))
    torch.library.opcheck(_total, (h, w.detach(), labels, 0.1, 0.01, 0.5, True, False, implementation))
    plain = h.detach(), w.detach(), labels, torch.randn(6)
    torch.library.opcheck(_losses_backward, (torch.randn(6), *plain, 0.1, 0.01, True, False, implementation))


@pytest.mark.parametrize("reduction", ["none", "sum", "sequence"])
@pytest.mark.parametrize("implementation", [*CHUNKED, "reference"])
def test_compiles_without_graph_breaks(implementation: str, reduction: str) -> None:
    h, w, labels = make(12, 8, 33, torch.float32, torch.float32)
    extra = {"label_seq": torch.arange(12) // 5, "sequences": 3} if reduction == "sequence" else {}

    def step(h: Tensor, w: Tensor) -> Tensor:
        return linear_cross_entropy(h * 2, w, labels, reduction=reduction, **extra).square().sum()

    torch.compiler.reset()
    with registry.use(linear_cross_entropy=implementation):
        expected = torch.autograd.grad(step(h, w), (h, w))
        compiled = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(h, w), (h, w))
    for a, b in zip(compiled, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_strides() -> None:
    h, w, labels = make(12, 8, 33, torch.float32, torch.float32)
    expected = with_grad(linear_cross_entropy, h, w, labels, torch.ones(12))
    wide = torch.stack([h.detach(), -h.detach()], 2)[:, :, 0].requires_grad_()
    across = w.detach().T.contiguous().T.requires_grad_()
    for a, b in zip(with_grad(linear_cross_entropy, wide, across, labels, torch.ones(()).expand(12)), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_a_row_does_not_depend_on_its_neighbours(small_chunks: None) -> None:
    """The pass over logits; the products are the BLAS's, whose blocking may depend on the number of rows."""
    logits, labels = torch.randn(4, 3001), torch.tensor([0, 5, 3000, 7])
    loss, lse = torch.empty(4), torch.empty(4)
    module._rows_cpu(logits.clone(), labels, loss, lse, None, 1.0, 0.0, 0.0, False)
    alone, lse_alone = torch.empty(1), torch.empty(1)
    module._rows_cpu(logits[2:3].clone(), labels[2:3], alone, lse_alone, None, 1.0, 0.0, 0.0, False)
    assert torch.equal(alone, loss[2:3]) and torch.equal(lse_alone, lse[2:3])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_VD": torch.zeros(9, 5)}, r"got \[3, 4\] and \[9, 5\]"),
        ({"labels_L": torch.zeros(4, dtype=torch.int64)}, r"expected int64 labels \[3\], got torch.int64 \[4\]"),
        ({"labels_L": torch.zeros(3)}, "got torch.float32"),
        ({"labels_L": torch.tensor([0, 9, 1])}, r"labels\[1\] is 9, expected a row of the weight, 0 to 8"),
        ({"labels_L": torch.tensor([0, -100, 1]), "reduction": "sum"}, r"labels\[1\] is -100"),
        ({"reduction": "max"}, "got 'max'"),
        ({"label_smoothing": 1.5}, "got 1.5"),
        ({"labels_L": torch.zeros(3, dtype=torch.int64, device="meta")}, "one device, got cpu, cpu and meta"),
        ({"weight_VD": torch.zeros(9, 4, device="meta")}, "one device, got cpu, meta and cpu"),
        ({"reduction": "sequence", "sequences": 2, "label_seq": torch.zeros(3)}, "int64 label_seq on cpu, got torch.float32 on cpu"),
        ({"reduction": "sequence", "sequences": 2, "label_seq": torch.tensor([0, 2, 1])}, "label_seq must be 0 to 1, got 0 to 2"),
        ({"reduction": "sequence", "sequences": 2, "label_seq": torch.tensor([0, -1, 1])}, "label_seq must be 0 to 1, got -1 to 1"),
        ({"reduction": "sum", "label_seq": torch.zeros(3, dtype=torch.int64)}, "got label_seq with 'sum'"),
        ({"sequences": 2}, "got sequences with 'none'"),
        ({"z_loss": -1.0}, "-1.0"),
        ({"reduction": "sequence", "sequences": 2}, r"got None for \[3\], 2"),
        ({"reduction": "sequence", "sequences": 2, "label_seq": torch.zeros(3, dtype=torch.int64), "z_loss": 0.1}, "0.1"),
    ],
)
def test_bad_arguments(change: dict, message: str) -> None:
    arguments = {"hidden_LD": torch.zeros(3, 4), "weight_VD": torch.zeros(9, 4), "labels_L": torch.zeros(3, dtype=torch.int64)}
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**{**arguments, **change})
