"""linear: the C++ kernels against torch in every weight type and instruction set; scatter, gradients, quantisation, compilation."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from llava_fast import _cpu
from llava_fast.kernels import linear as linear_op
from llava_fast.kernels import registry
from llava_fast.kernels.linear import ACTIVATIONS, Quantised, _linear, _linear_into, linear, quantise

ISAS = _cpu.supported_isas()
KINDS = ["float32", "bfloat16", "float16", "int8", "int4"]
# M, I, O: odd ends everywhere, the first row count that is packed (17), depths and columns of more than one block
SHAPES = [(1, 1, 1), (2, 7, 5), (3, 588, 33), (5, 592, 130), (8, 33, 7), (9, 64, 257), (16, 100, 64), (17, 7, 3), (29, 588, 70)]
SHAPES += [(18, 1300, 200), (40, 2500, 97)]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _cpu.isa()
    _cpu.set_isa(request.param)
    yield request.param
    _cpu.set_isa(before)


def make(M: int, I: int, O: int, kind: str, group: int | None = None) -> tuple[Tensor, Tensor | Quantised, Tensor, Tensor, Tensor]:
    """x, weight, the fp64 matrix it stands for, bias, residual."""
    generator = torch.Generator().manual_seed(M * 10000 + I * 100 + O)
    x, weight = torch.randn(M, I, generator=generator), torch.randn(O, I, generator=generator) / I**0.5
    bias, residual = torch.randn(O, generator=generator), torch.randn(M, O, generator=generator)
    if kind in ("int8", "int4"):
        quantised = quantise(weight, kind, group)
        return x, quantised, quantised.dequantise(torch.float64), bias, residual
    stored = weight.to(getattr(torch, kind))
    return x, stored, stored.double(), bias, residual


def exact(x: Tensor, matrix: Tensor, bias: Tensor | None, act: str | None, residual: Tensor | None) -> Tensor:
    y = x.double() @ matrix.double().t() + (0 if bias is None else bias.double())
    y = y if act is None else ACTIVATIONS[act](y)
    return y if residual is None else y + residual.double()


def close(ours: Tensor, theirs: Tensor, truth: Tensor) -> None:
    """At most twice torch's error in the same dtype, plus four roundings of the largest value."""
    assert ours.dtype == theirs.dtype and ours.shape == truth.shape
    floor = truth.abs().max() * torch.finfo(ours.dtype).eps * 4
    assert (ours.double() - truth).abs().max() <= 2 * (theirs.double() - truth).abs().max() + floor


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("M", "I", "O"), SHAPES)
def test_values(M: int, I: int, O: int, kind: str, isa: str) -> None:
    if kind == "int4" and I % 2:
        pytest.skip("int4 has an even number of columns")
    for group in [None, 32, 64, 128] if kind in ("int8", "int4") else [None]:
        x, weight, matrix, bias, residual = make(M, I, O, kind, group)
        theirs = exact(x, matrix.float(), bias, None, residual).float()
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            narrow_x, narrow_residual = x.to(dtype), residual.to(dtype)
            truth = exact(narrow_x, matrix, bias, None, narrow_residual)
            theirs = linear_op.linear_reference(narrow_x.float(), matrix.float(), bias, None, narrow_residual.float()).to(dtype)
            close(linear(narrow_x, weight, bias, residual=narrow_residual), theirs, truth)
            close(linear(narrow_x, weight), (narrow_x.float() @ matrix.float().t()).to(dtype), exact(narrow_x, matrix, None, None, None))


@pytest.mark.parametrize("rows", [*range(1, 18), 31])
def test_every_number_of_rows(rows: int, isa: str) -> None:
    x, weight, matrix, bias, _ = make(rows, 100, 150, "bfloat16")
    close(linear(x, weight, bias), torch.nn.functional.linear(x, matrix.float(), bias), exact(x, matrix, bias, None, None))


@pytest.mark.parametrize(("M", "I", "O"), [(729, 1152, 96), (300, 4304, 64), (1, 1024, 3072)])
def test_model_shapes(M: int, I: int, O: int, isa: str) -> None:
    x, weight, matrix, bias, _ = make(M, I, O, "bfloat16")
    close(linear(x, weight, bias), torch.nn.functional.linear(x, matrix.float(), bias), exact(x, matrix, bias, None, None))


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("I", [1152, 4304, 11008])
def test_rounds_no_more_than_torch(I: int, kind: str, isa: str) -> None:
    """The mean error, which is steadier than the largest one; a chain of I sums in one register would be over."""
    x, weight, matrix, _, _ = make(48, I, 96, kind)
    truth = exact(x, matrix, None, None, None)
    ours, theirs = (linear(x, weight).double() - truth).square().mean(), (x @ matrix.float().t()).double().sub(truth).square().mean()
    assert ours <= theirs * 1.1


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@pytest.mark.parametrize("across", ["rows", "columns"])
def test_magnitudes(across: str, kind: str, isa: str) -> None:
    """1e-20 to 1e20: every row keeps the relative accuracy of torch's, against the sum of its terms' magnitudes."""
    x, weight, matrix, _, _ = make(41, 700, 40, kind)
    powers = torch.linspace(-20, 20, 41)[:, None] if across == "rows" else torch.linspace(-20, 20, 700)[torch.arange(700) * 143 % 700]
    x = x * 10.0**powers
    truth, size = exact(x, matrix, None, None, None), x.double().abs() @ matrix.abs().t()
    ours, theirs = (((y.double() - truth).abs() / size).max() for y in (linear(x, weight), x @ matrix.float().t()))
    assert ours <= 2 * theirs + 4 * torch.finfo(torch.float32).eps
    assert torch.equal(linear(torch.zeros(20, 700), weight), torch.zeros(20, 40))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_not_finite(kind: str, dtype: torch.dtype, isa: str) -> None:
    """An infinity or NaN in x shows in its row and nowhere else."""
    x, weight, matrix, _, _ = make(33, 100, 40, kind)
    x = x.to(dtype)
    finite = linear(x, weight)
    x[3, 50], x[30, 7], x[31, 99], x[32, 0] = torch.inf, -torch.inf, torch.nan, torch.finfo(dtype).max
    y = linear(x, weight)
    assert not y[[3, 30, 31]].isfinite().any() and y[31].isnan().all()
    assert torch.equal(y[:3], finite[:3]) and torch.equal(y[4:30], finite[4:30])
    signs = matrix[:, 50] != 0
    if kind == "bfloat16":  # of W in more than one part, the parts that are zero make a NaN
        assert torch.equal(y[3, signs], (matrix[signs, 50].sign() * torch.inf).to(dtype))
    if dtype != torch.float16 and kind != "int8":  # the largest number is not rounded up to an infinity; int8 is scaled at the end
        assert y[32, matrix[:, 0].abs() < 0.5].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_does_not_depend_on_its_neighbours(kind: str, isa: str) -> None:
    x, weight, _, bias, _ = make(300, 1300, 100, kind, 64)
    whole = linear(x, weight, bias, act="gelu")
    for first, last in [(0, 17), (100, 133), (283, 300)]:
        assert torch.equal(linear(x[first:last], weight, bias, act="gelu"), whole[first:last])


@pytest.mark.parametrize("act", list(ACTIVATIONS))
def test_activations(act: str, isa: str) -> None:
    """Over all magnitudes; near zero and in the tails the error is relative."""
    values = torch.cat([torch.linspace(-20, 20, 4001), torch.logspace(-30, 4, 500), -torch.logspace(-30, 4, 500), torch.zeros(1)])
    y = linear(values[:, None], torch.ones(1, 1), act=act)[:, 0]
    truth, torchs = ACTIVATIONS[act](values.double()), ACTIVATIONS[act](values)
    error, theirs = (y.double() - truth).abs(), (torchs.double() - truth).abs()
    assert (error <= 2 * theirs + 3e-7 * truth.abs() + 1e-7).all()
    near = values.abs() < 3
    assert (error[near] <= 2e-6 * truth[near].abs() + 1e-37).all()
    infinite = linear(torch.tensor([[torch.inf], [torch.nan]]), torch.ones(1, 1), act=act)
    assert infinite[0] == torch.inf and infinite[1].isnan()


@pytest.mark.parametrize("act", [None, *ACTIVATIONS])
@pytest.mark.parametrize("M", [3, 40])
def test_epilogue(M: int, act: str | None, isa: str) -> None:
    x, weight, matrix, bias, residual = make(M, 70, 50, "bfloat16")
    for b in (bias, bias.bfloat16(), bias.half(), bias.double(), None):
        for r in (residual, torch.cat([residual, residual], 1)[:, 50:], None):  # a view with a row stride, too
            truth = exact(x, matrix, b, act, r)
            theirs = linear_op.linear_reference(x, weight, b, act, r)
            close(linear(x, weight, b, act=act, residual=r), theirs, truth)


@pytest.mark.parametrize("implementation", ["cpu", "reference"])
@pytest.mark.parametrize("M", [4, 25])
def test_rows_scatter(M: int, implementation: str) -> None:
    x, weight, _, bias, residual = make(M, 64, 40, "bfloat16")
    rows = torch.randperm(60, generator=torch.Generator().manual_seed(0))[:M]
    buffer = torch.full((60, 100), 7.0)
    with registry.use(linear=implementation):
        expected = linear(x, weight, bias, act="gelu", residual=residual)
        out = buffer[:, 30:70]
        assert linear(x, weight, bias, act="gelu", residual=residual, out=out, rows=rows) is out
        assert torch.equal(out[rows], expected)
        others = torch.ones(60, dtype=torch.bool)
        others[rows] = False
        assert (buffer[others] == 7).all() and (buffer[:, :30] == 7).all() and (buffer[:, 70:] == 7).all()
        whole = torch.empty(M, 40)
        linear(x, weight, bias, act="gelu", residual=residual, out=whole)
        assert torch.equal(whole, expected)
        for bad in (60, -1):
            rows[M // 2] = bad
            with pytest.raises(ValueError, match=str(bad)):
                linear(x, weight, bias, out=out, rows=rows)


@pytest.mark.parametrize("M", [4, 25])
def test_rows_that_would_be_written_twice(M: int) -> None:
    """Two threads would each write a part."""
    x, weight, *_ = make(M, 64, 40, "float32")
    rows = torch.arange(M)
    rows[-1] = 1
    with registry.use(linear="cpu"), pytest.raises(ValueError, match="rows must differ, got 1 twice"):
        linear(x, weight, out=torch.empty(60, 40), rows=rows)


def test_residual_may_be_the_output() -> None:
    for M in (2, 40):
        x, weight, _, _, residual = make(M, 64, 64, "float32")
        expected = linear(x, weight, residual=residual)
        assert torch.equal(linear(x, weight, residual=residual, out=residual), expected)


def test_empty_and_layouts() -> None:
    weight, bias = torch.randn(6, 8), torch.randn(6)
    assert linear(torch.zeros(0, 8), weight, bias).shape == (0, 6)
    assert linear(torch.zeros(2, 3, 8), weight, bias).shape == (2, 3, 6)
    assert torch.equal(linear(torch.zeros(20, 0), torch.zeros(6, 0), bias), bias.expand(20, 6))
    x = torch.randn(8, 20)
    torch.testing.assert_close(linear(x.t(), weight.t().contiguous().t(), bias), torch.nn.functional.linear(x.t(), weight, bias))
    wide = torch.randn(20, 30)
    torch.testing.assert_close(linear(wide[:, 5:13], weight), wide[:, 5:13] @ weight.t())
    torch.testing.assert_close(linear(x[:, 0], weight, bias), torch.nn.functional.linear(x[:, 0], weight, bias))


@pytest.mark.parametrize("isa_name", ISAS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("M", "I", "O"), [(1, 512, 1030), (7, 512, 1030), (60, 1300, 300), (700, 512, 64)])
def test_same_bits_in_every_run_and_thread_count(M: int, I: int, O: int, kind: str, isa_name: str) -> None:
    x, weight, _, bias, _ = make(M, I, O, kind, 32)
    before = torch.get_num_threads(), _cpu.isa()
    _cpu.set_isa(isa_name)
    results = []
    for threads in (1, 2, 3, 4, 2):
        torch.set_num_threads(threads)
        results.append(linear(x, weight, bias, act="silu"))
    torch.set_num_threads(before[0])
    _cpu.set_isa(before[1])
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("act", [None, *ACTIVATIONS])
def test_gradients(act: str | None, kind: str) -> None:
    x, weight, matrix, bias, residual = make(20, 64, 30, kind, 32)
    plain = isinstance(weight, Tensor)
    leaves = [x, *([weight] if plain else []), bias, residual]
    grad = torch.randn(20, 30, generator=torch.Generator().manual_seed(1))

    def gradients(run, tensors: list[Tensor], grad: Tensor) -> list[Tensor]:
        tensors = [tensor.clone().requires_grad_() for tensor in tensors]
        w = tensors[1] if plain else weight
        out = run(tensors[0], w, tensors[-2], tensors[-1])
        return list(torch.autograd.grad(out, tensors, grad))

    ours = gradients(lambda x, w, b, r: linear(x, w, b, act=act, residual=r), leaves, grad)
    theirs = gradients(lambda x, w, b, r: linear_op.linear_reference(x, w, b, act, r), leaves, grad)
    wide = lambda x, w, b, r: exact(x, w if plain else matrix, b, act, r)  # noqa: E731
    truths = gradients(wide, [leaf.double() for leaf in leaves], grad.double())
    for our, their, truth in zip(ours, theirs, truths, strict=True):
        close(our, their, truth)


def test_gradcheck() -> None:
    tensors = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in [(2, 3), (4, 3), (4,), (2, 4)]]
    for act in (None, *ACTIVATIONS):
        assert torch.autograd.gradcheck(lambda x, w, b, r: linear(x, w, b, act=act, residual=r), tensors)  # noqa: B023


@pytest.mark.parametrize(("kind", "group"), [("int8", None), ("int8", 32), ("int4", 64), ("int4", 128), ("int4", None), ("fp8", 64)])
def test_quantise_and_dequantise(kind: str, group: int | None) -> None:
    weight = torch.randn(40, 300, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    quantised = quantise(weight.bfloat16(), kind, group)
    assert quantised.shape == (40, 300) and quantised.scale.shape == (40, -(-300 // (group or 300)))
    error = (quantised.dequantise() - weight.bfloat16().float()).abs()
    scale = quantised.scale.repeat_interleave(quantised.group, 1)[:, :300]
    half_step = torch.maximum(weight.abs() / 16, scale / 512) if kind == "fp8" else scale / 2
    assert (error <= half_step * 1.01).all()
    again = quantise(quantised.dequantise(), kind, group)
    assert torch.equal(again.weight.view(torch.uint8), quantised.weight.view(torch.uint8))
    numbers = torch.zeros(1, 4)
    numbers[0] = torch.tensor([7.0, -7.0, 3.0, 0.0])
    if kind == "int4":  # the low four bits are the even column, 8 is added
        assert quantise(numbers, "int4").weight.tolist() == [[15 | 1 << 4, 11 | 8 << 4]]
    with registry.use(linear="reference"):
        x = torch.randn(3, 300)
        torch.testing.assert_close(linear(x, quantised), x @ quantised.dequantise().t())


def test_fp8_goes_to_the_reference() -> None:
    assert registry.resolve_name("linear", "cpu", torch.float32, "fp8") == "reference"
    assert registry.resolve_name("linear", "cpu", torch.float64, "bfloat16") == "reference"
    assert registry.resolve_name("linear", "cpu", torch.float32, "int4") == "cpu"


def test_the_reference_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BLOCK_BYTES", "BLOCK_BYTES_FEW_ROWS"):
        monkeypatch.setattr(linear_op, name, 7 * 64 * 4)
    for kind in ("bfloat16", "int4"):
        x, weight, matrix, bias, _ = make(20, 64, 30, kind, 32)
        with registry.use(linear="reference"):
            torch.testing.assert_close(linear(x, weight, bias), exact(x, matrix, bias, None, None).float())


def test_opcheck() -> None:
    x, weight, _, bias, residual = make(5, 16, 6, "float32")
    for tensor in (x, weight, bias, residual):
        tensor.requires_grad_()
    torch.library.opcheck(_linear, (x, weight, None, bias, residual, "float32", 0, "gelu", True, "cpu"))
    torch.library.opcheck(_linear, (x, weight, None, None, None, "float32", 0, "", False, "cpu"))
    rows = torch.tensor([3, 1, 0, 2, 6])
    plain = [tensor.detach() for tensor in (x, weight, bias, residual)]
    arguments = (torch.zeros(7, 6), plain[0], plain[1], None, plain[2], plain[3], "float32", 0, "silu", rows, "cpu")
    torch.library.opcheck(_linear_into, arguments)


@pytest.mark.parametrize("implementation", ["cpu", "reference"])
def test_compiles_without_graph_breaks(implementation: str) -> None:
    x, weight, _, bias, residual = make(5, 16, 6, "bfloat16")
    x.requires_grad_()

    def step(x: Tensor) -> Tensor:
        return linear(x * 2, weight, bias, act="gelu", residual=residual).sin().sum()

    def scatter(x: Tensor) -> Tensor:
        return linear(x * 2, weight, bias, out=torch.zeros(9, 6), rows=torch.arange(5)) + 1

    torch.compiler.reset()
    with registry.use(linear=implementation):
        (expected,) = torch.autograd.grad(step(x), x)
        (compiled,) = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(x), x)
        torch.testing.assert_close(compiled, expected)
        if implementation == "cpu":  # the reference looks at the values of `rows`
            with torch.no_grad():
                torch.testing.assert_close(torch.compile(scatter, fullgraph=True, backend="aot_eager")(x), scatter(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 9)}, r"expected x \[..., 8\] for a weight \[6, 8\] on cpu, got torch.float32 \[3, 9\]"),
        ({"x": torch.zeros(3, 8, dtype=torch.int64)}, "got x torch.int64"),
        ({"bias": torch.zeros(5)}, r"expected a bias \[6\] on cpu, got \[5\]"),
        ({"act": "relu"}, "act must be one of gelu, .*, got 'relu'"),
        ({"residual": torch.zeros(3, 5)}, r"expected a residual torch.float32 \[3, 6\].*got torch.float32 \[3, 5\]"),
        ({"residual": torch.zeros(3, 6).half()}, "got torch.float16"),
        ({"rows": torch.zeros(3, dtype=torch.int64)}, "none was given"),
        ({"out": torch.zeros(4, 6)}, r"expected `out` torch.float32 \[3, 6\].*got torch.float32 \[4, 6\]"),
        ({"out": torch.zeros(6, 3).t()}, "contiguous columns"),
        ({"out": torch.zeros(3, 6), "rows": torch.zeros(2, dtype=torch.int64)}, r"rows torch.int64 \[2\] for 3 rows"),
        ({"out": torch.zeros(3, 6), "rows": torch.zeros(3, dtype=torch.int32)}, "rows torch.int32"),
        ({"out": torch.zeros(3, 6), "x": torch.zeros(3, 8, requires_grad=True)}, "inference"),
        ({"out": torch.zeros(6).expand(3, 6)}, r"rows do not overlap, got strides \(0, 1\)"),
        ({"out": torch.zeros(2, 3, 9)[..., :6].transpose(0, 1), "x": torch.zeros(3, 2, 8)}, "must be a view of a matrix"),
        ({"bias": torch.zeros(6).to(torch.float8_e4m3fn)}, "x torch.float32, bias torch.float8_e4m3fn"),
        ({"bias": torch.zeros(6, dtype=torch.int64)}, "x torch.float32, bias torch.int64"),
        ({"weight": torch.zeros(6, 8, dtype=torch.int64)}, "weight torch.int64"),
        ({"weight": torch.zeros(6, 8, device="meta")}, "on meta, got torch.float32 .* on cpu"),
        ({"bias": torch.zeros(6, device="meta")}, "on cpu, got .* on meta"),
        ({"residual": torch.zeros(3, 6, device="meta")}, "on cpu, got .* on meta"),
    ],
)
def test_bad_arguments(change: dict, message: str) -> None:
    arguments = {"x": torch.zeros(3, 8), "weight": torch.zeros(6, 8), **change}
    with pytest.raises(ValueError, match=message):
        linear(arguments.pop("x"), arguments.pop("weight"), arguments.pop("bias", None), **arguments)


@pytest.mark.parametrize(
    ("kind", "group", "columns", "message"),
    [("int3", None, 8, "got 'int3'"), ("int8", 48, 96, "got 48"), ("int4", None, 7, "even, got 7"), ("int8", 0, 8, "got 0")],
)
def test_bad_quantisation(kind: str, group: int | None, columns: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantise(torch.zeros(2, columns), kind, group)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "int3"}, "got 'int3'"),
        ({"kind": "int4"}, "int4 weights are a matrix of torch.uint8, got torch.int8"),
        ({"group": 0}, "got 0"),
        ({"group": 48}, "got 48"),
        ({"scale": torch.ones(6, 2).half()}, "torch.float32 .* got torch.float16"),
        ({"scale": torch.ones(6, 1)}, r"\[6, 2\] on cpu, got torch.float32 \[6, 1\]"),
        ({"scale": torch.ones(2, 6).t()}, r"contiguous .* strides \(1, 6\)"),
        ({"scale": torch.ones(6, 2, device="meta")}, "on cpu, got .* on meta"),
    ],
)
def test_bad_quantised(change: dict, message: str) -> None:
    good = {"weight": torch.zeros(6, 64, dtype=torch.int8), "scale": torch.ones(6, 2), "kind": "int8", "group": 32}
    Quantised(**good)
    with pytest.raises(ValueError, match=message):
        Quantised(**{**good, **change})


def test_quantise_a_transposed_weight() -> None:
    weight = torch.randn(64, 6).t()
    assert torch.equal(quantise(weight, "int4", 32).dequantise(), quantise(weight.contiguous(), "int4", 32).dequantise())


@pytest.mark.parametrize("implementation", ["cpu", "reference"])
def test_rows_with_a_stride(implementation: str) -> None:
    x, weight, out = torch.randn(4, 8), torch.randn(6, 8), torch.zeros(8, 6)
    with registry.use(linear=implementation):
        linear(x, weight, out=out, rows=torch.arange(8)[::2])
        assert torch.equal(out[::2], linear(x, weight)) and (out[1::2] == 0).all()


def test_out_shares_no_memory_with_what_is_read() -> None:
    buffer, weight = torch.randn(9, 8), torch.randn(8, 8)
    with pytest.raises(ValueError, match="share memory with x, got addresses"):
        linear(buffer, weight, out=buffer)
    with pytest.raises(ValueError, match="share memory with x"):
        linear(buffer[:5], weight, out=buffer[4:])
    with pytest.raises(ValueError, match="share memory with the residual"):
        linear(torch.randn(8, 8), weight, residual=buffer[:8], out=buffer[1:])
    expected = linear(buffer[:4], weight)
    assert torch.equal(linear(buffer[:4], weight, out=buffer[4:8]), expected)


@pytest.mark.parametrize(("bias_type", "group", "message"), [("float32", 0, "got 0"), ("e4m3", 32, "bias must be")])
def test_what_the_extension_refuses(bias_type: str, group: int, message: str) -> None:
    x, weight, scale, bias, out = torch.zeros(2, 32), torch.zeros(6, 32, dtype=torch.int8), torch.ones(6), torch.zeros(6), torch.zeros(2, 6)
    dtype = next(value for name, value in _cpu.DType.__members__.items() if bias_type in name)
    operands = (x.data_ptr(), 32, weight.data_ptr(), scale.data_ptr(), group, bias.data_ptr(), dtype, 0, 0)
    with pytest.raises(ValueError, match=message):
        _cpu.linear(_cpu.DType.float32, _cpu.WeightType.int8, _cpu.Act.none, 2, 32, 6, *operands, out.data_ptr(), 6, 2, 0, 0, 1, False)
