"""Spatial pooling: the C++ kernels against torch, in every dtype and instruction set; gradients, determinism, compilation."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llava_fast import _cpu
from llava_fast.kernels import registry
from llava_fast.kernels.spatial_pool import _spatial_pool, _spatial_pool_backward, spatial_pool, spatial_pool_reference

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
ISAS = _cpu.supported_isas()
# mode, K, H, W, size, D
CASES = [
    ("average", 2, 27, 27, (13, 13), 64),
    ("max", 2, 27, 27, (13, 13), 64),
    ("bilinear", 2, 27, 27, (14, 14), 64),
    ("average", 1, 24, 24, (12, 12), 300),
    ("max", 3, 7, 5, (7, 1), 513),
    ("average", 3, 7, 5, (1, 5), 1),
    ("bilinear", 1, 54, 81, (31, 47), 17),  # anyres_max: a 2 x 3 grid of tiles cut down
    ("bilinear", 2, 1, 5, (3, 9), 257),
    ("bilinear", 1, 4, 4, (4, 4), 3),
    ("average", 0, 27, 27, (13, 13), 8),
    ("max", 1, 1, 1, (1, 1), 1),
]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _cpu.isa()
    _cpu.set_isa(request.param)
    yield request.param
    _cpu.set_isa(before)


def make(K: int, H: int, W: int, D: int, dtype: torch.dtype, spare: int = 5) -> tuple[Tensor, Tensor]:
    """A table and sources in which some rows repeat and some are read by nobody; 16-bit values, so equal maxima occur."""
    generator = torch.Generator().manual_seed(K * 10000 + H * 1000 + W * 100 + D)
    rows = K * H * W + spare
    table = torch.randn(rows, D, generator=generator, dtype=torch.float64).bfloat16().to(dtype)
    return table, torch.randint(0, rows, (K, H, W), generator=generator)


def with_grad(run, table: Tensor, source: Tensor, size, mode, grad: Tensor) -> tuple[Tensor, Tensor]:
    table = table.clone().requires_grad_()
    out = run(table, source, size, mode)
    out.backward(grad.to(out.dtype))
    return out.detach(), table.grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("mode", "K", "H", "W", "size", "D"), CASES)
def test_values_and_gradients(mode: str, K: int, H: int, W: int, size, D: int, dtype: torch.dtype, isa: str) -> None:
    """The error against fp64 is at most twice that of torch in the same dtype, plus a rounding of the largest value."""
    table, source = make(K, H, W, D, dtype)
    grad = torch.randn(K * size[0] * size[1], D, generator=torch.Generator().manual_seed(1)).bfloat16()
    ours = with_grad(spatial_pool, table, source, size, mode, grad)
    torchs = with_grad(spatial_pool_reference, table, source, size, mode, grad)
    exact = with_grad(spatial_pool_reference, table.double(), source, size, mode, grad)
    for our, theirs, truth in zip(ours, torchs, exact, strict=True):
        assert our.dtype == dtype and our.shape == truth.shape
        if truth.numel() == 0:
            continue
        # In fp64 torch's result is the truth, so what is left is both roundings.
        floor = truth.abs().max() * torch.finfo(dtype).eps * (8 if dtype == torch.float64 else 1)
        assert (our.double() - truth).abs().max() <= 2 * (theirs.double() - truth).abs().max() + floor
        if mode == "max" and our is ours[0]:
            assert torch.equal(our, theirs)


@pytest.mark.parametrize(("mode", "size", "dtype"), [("average", 9, "float32"), ("max", 13, "bfloat16"), ("bilinear", 14, "bfloat16")])
def test_many_maps_as_one_by_one(mode: str, size: int, dtype: str, isa: str) -> None:
    """Outputs of 8 MB are written around the caches."""
    D, kind = 2080, getattr(torch, dtype)
    K = -(-(8 << 20) // (size * size * D * kind.itemsize))
    table, source = torch.randn(K, 27 * 27, D).to(kind), torch.arange(27 * 27).view(1, 27, 27)
    grad = torch.randn(K, size * size, D).to(kind)
    together = torch.arange(K * 27 * 27).view(K, 27, 27)
    out, grad_table = with_grad(spatial_pool, table.view(-1, D), together, (size, size), mode, grad.view(-1, D))
    for k in range(K):
        ours = with_grad(spatial_pool, table[k], source, (size, size), mode, grad[k])
        assert torch.equal(out.view_as(grad)[k], ours[0]) and torch.equal(grad_table.view_as(table)[k], ours[1])


@pytest.mark.parametrize("implementation", ["cpu", "reference"])
@pytest.mark.parametrize("stride", [2, 3, 4])
@pytest.mark.parametrize("mode", ["average", "max"])
def test_equals_torch_pooling(mode: str, stride: int, implementation: str) -> None:
    maps = torch.randn(2, 27, 27, 16)
    expected = (F.avg_pool2d if mode == "average" else F.max_pool2d)(maps.permute(0, 3, 1, 2), stride).permute(0, 2, 3, 1).reshape(-1, 16)
    source = torch.arange(2 * 27 * 27).view(2, 27, 27)
    with registry.use(spatial_pool=implementation):
        assert torch.equal(spatial_pool(maps.view(-1, 16), source, (27 // stride, 27 // stride), mode), expected)


@pytest.mark.parametrize("size", [(14, 14), (13, 40), (1, 1)])
def test_equals_torch_interpolate(size) -> None:
    maps = torch.randn(2, 27, 27, 16, dtype=torch.float64)
    expected = F.interpolate(maps.permute(0, 3, 1, 2), size=size, mode="bilinear", align_corners=False)
    out = spatial_pool(maps.view(-1, 16), torch.arange(2 * 27 * 27).view(2, 27, 27), size, "bilinear")
    torch.testing.assert_close(out, expected.permute(0, 2, 3, 1).reshape(-1, 16), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES)
def test_maximum_of_equal_infinite_and_nan_values(dtype: torch.dtype, isa: str) -> None:
    table = torch.tensor([[1, -0.0, 2, -torch.inf], [1, 0.0, torch.nan, -torch.inf], [0, 0, 3, -torch.inf], [1, 0, torch.nan, -torch.inf]])
    table, source, grad = table.to(dtype), torch.arange(4).view(1, 2, 2), torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    ours = with_grad(spatial_pool, table, source, (1, 1), "max", grad)
    torchs = with_grad(spatial_pool_reference, table, source, (1, 1), "max", grad)
    for our, theirs in zip(ours, torchs, strict=True):
        torch.testing.assert_close(our, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_value_survives(dtype: torch.dtype, isa: str) -> None:
    """Widening and rounding back is the identity on all 65,536 bit patterns (NaN stays NaN)."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    out = spatial_pool(values.view(-1, 256), torch.arange(256).view(1, 16, 16), (16, 16), "max").view(-1)
    numbers = ~values.isnan()
    assert torch.equal(out[numbers].view(torch.int16), values[numbers].view(torch.int16)) and out[~numbers].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_to_16_bits_is_torchs(dtype: torch.dtype, isa: str) -> None:
    """Averages of two neighbours are ties, near-ties, subnormals and overflows; torch rounds the same fp32 mean."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**15), 2**15, (2, 4096), generator=generator, dtype=torch.int16)
    bits[1, ::2] = bits[0, ::2] + torch.randint(1, 4, (2048,), generator=generator, dtype=torch.int16)
    table = bits.view(dtype)
    expected = table.float().mean(0).to(dtype)
    out = spatial_pool(table, torch.arange(2).view(1, 1, 2), (1, 1), "average")[0]
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


def run_all(threads: int, isa: str) -> list[Tensor]:
    before = torch.get_num_threads(), _cpu.isa()
    torch.set_num_threads(threads)
    _cpu.set_isa(isa)
    results: list[Tensor] = []
    for mode, size in [("average", (13, 13)), ("max", (13, 13)), ("bilinear", (14, 14))]:
        for dtype in DTYPES:
            table, source = make(3, 27, 27, 100, dtype)
            grad = torch.randn(3 * size[0] * size[1], 100, generator=torch.Generator().manual_seed(1))
            results += with_grad(spatial_pool, table, source, size, mode, grad)
    torch.set_num_threads(before[0])
    _cpu.set_isa(before[1])
    return results


@pytest.mark.parametrize("isa_name", ISAS)
def test_same_bits_in_every_run_thread_count_and_instruction_set(isa_name: str) -> None:
    expected = run_all(1, "portable")
    for _ in range(2):
        for ours, other in zip(run_all(2, isa_name), expected, strict=True):
            assert torch.equal(ours, other)


@pytest.mark.parametrize(("mode", "size"), [("average", (2, 1)), ("max", (2, 1)), ("bilinear", (3, 5))])
def test_gradcheck(mode: str, size) -> None:
    source = torch.tensor([[[0, 1, 2], [3, 4, 5], [6, 2, 1], [8, 9, 4]]])
    table = torch.randn(11, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: spatial_pool(t, source, size, mode), table)


@pytest.mark.parametrize(("mode", "size"), [("average", [2, 2]), ("max", [2, 2]), ("bilinear", [3, 5])])
def test_opcheck(mode: str, size: list[int]) -> None:
    table, source = make(2, 5, 5, 6, torch.float32)
    torch.library.opcheck(_spatial_pool, (table.requires_grad_(), source, size, mode, "cpu"))
    grad = torch.randn(2 * size[0] * size[1], 6)
    torch.library.opcheck(_spatial_pool_backward, (grad, table.detach(), source, table.shape[0], size, mode, "cpu"))


@pytest.mark.parametrize("implementation", ["cpu", "reference"])
def test_compiles_without_graph_breaks(implementation: str) -> None:
    table, source = make(2, 27, 27, 16, torch.float32)
    table.requires_grad_()

    def step(table: Tensor) -> Tensor:
        return spatial_pool(table * 2, source, (13, 13), "average").sin().sum()

    torch.compiler.reset()
    with registry.use(spatial_pool=implementation):
        (expected,) = torch.autograd.grad(step(table), table)
        (compiled,) = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(table), table)
    torch.testing.assert_close(compiled, expected)


def test_views_and_layouts_that_are_not_contiguous() -> None:
    table, source = make(2, 6, 6, 8, torch.float32)
    wide = torch.stack([table, -table], dim=1)[:, 0]
    transposed = source.permute(0, 2, 1)
    grad = torch.ones(()).expand(2 * 9, 8)
    for our, theirs in zip(
        with_grad(spatial_pool, wide, transposed, (3, 3), "average", grad),
        with_grad(spatial_pool_reference, wide, transposed, (3, 3), "average", grad),
        strict=True,
    ):
        torch.testing.assert_close(our, theirs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": (3, 3)}, r"cannot make maps of \(3, 3\) from maps of \(5, 5\)"),  # a window of 1 gives 5
        ({"size": (6, 5)}, "cannot make maps"),
        ({"size": (0, 5)}, "cannot make maps"),
        ({"size": (5, 0), "mode": "bilinear"}, "cannot make maps"),
        ({"mode": "mean"}, "mode must be average, max or bilinear, got 'mean'"),
        ({"table_MD": torch.zeros(3)}, r"expected a table \[M, D\]"),
        ({"source_KHW": torch.zeros(1, 5, 5, dtype=torch.int32)}, "int64"),
        ({"source_KHW": torch.full((1, 5, 5), 50)}, r"source\[0\] is 50, expected a row of the table, 0 to 49"),
        ({"source_KHW": torch.full((1, 5, 5), -1)}, r"source\[0\] is -1"),
    ],
)
def test_bad_arguments(change: dict, message: str) -> None:
    arguments = {"table_MD": torch.zeros(50, 4), "source_KHW": torch.zeros(1, 5, 5, dtype=torch.int64), "size": (2, 2), "mode": "average"}
    with pytest.raises(ValueError, match=message):
        spatial_pool(**{**arguments, **change})


@pytest.mark.parametrize("row", [50, -1])
def test_the_reference_leaves_rows_outside_the_table_to_torch(row: int) -> None:
    with registry.use(spatial_pool="reference"), pytest.raises(IndexError):
        spatial_pool(torch.zeros(50, 4), torch.full((1, 5, 5), row), (2, 2))


def test_instruction_set_from_the_environment() -> None:
    # The module alone, by its path: importing the package would take seconds each time.
    script = f"""
import importlib.util
spec = importlib.util.spec_from_file_location("_cpu", {_cpu.__file__!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(module.isa())
"""

    def run(isa: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", script], env={**os.environ, "LLAVA_FAST_ISA": isa}, capture_output=True, text=True)

    assert [run(isa).stdout.strip() for isa in [*ISAS, ""]] == [*ISAS, ISAS[-1]]
    unknown = run("sse9")
    if sys.platform == "linux" and "amx" in ISAS:  # who names another instruction set does not ask for the tiles' state, which is for good
        script += """
import ctypes
granted = ctypes.c_uint64()
ctypes.CDLL(None).syscall(158, 0x1022, ctypes.byref(granted))  # arch_prctl(ARCH_GET_XCOMP_PERM)
print(granted.value >> 18 & 1)
"""
        assert [run(isa).stdout.split()[1] for isa in ("portable", "avx512", "amx")] == ["0", "0", "1"]
    assert unknown.returncode == 1 and "ValueError: LLAVA_FAST_ISA must be one of" in unknown.stderr and "'sse9'" in unknown.stderr
