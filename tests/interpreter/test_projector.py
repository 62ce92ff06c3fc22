"""The projector's Triton kernels, interpreted, forward and backward in fp32 and fp16: the cases of tests/test_projector.py."""

from __future__ import annotations

import pytest
import torch
from projector_cases import CASES, check, make, run

from llava_fast.kernels.projector import _segment_sum_triton


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case: str, dtype: torch.dtype) -> None:
    check(case, dtype, dtype, "triton")


def test_sums_of_equal_indices() -> None:
    """Long runs, one row, rows past the table and no rows at all."""
    generator = torch.Generator().manual_seed(0)
    for N, rows, D in ((300, 4, 70), (1, 3, 5), (0, 3, 5), (40, 50, 1)):
        index = torch.randint(0, rows + 2, (N,), generator=generator)
        values = torch.randn(N, D, generator=generator)
        expected = torch.zeros(rows + 2, D).index_add_(0, index, values)[:rows]
        torch.testing.assert_close(_segment_sum_triton(values, index, rows, torch.float32), expected)


def test_same_bits_twice() -> None:
    arguments = make("mixed", torch.float16)
    first, second = run(arguments, "triton"), run(arguments, "triton")
    assert all(torch.equal(first[key], second[key]) for key in first)
