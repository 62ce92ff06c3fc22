"""What the kernel suites are timed against computes what the kernels do, and what does not is found."""

from __future__ import annotations

import pytest
import torch

from bench.baselines import kernels
from llava_fast.kernels.linear_cross_entropy import linear_cross_entropy
from llava_fast.kernels.varlen_attention import varlen_attention


@pytest.mark.parametrize("G", [4, 2])
def test_packed_attention(G: int) -> None:
    lengths = [5, 1, 17]
    q, k, v = (torch.randn(23, heads, 16) for heads in (4, G, G))
    cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    mask = kernels.packed_mask(lengths)
    assert mask.sum() == 15 + 1 + 153 and not mask[5, 4] and mask[22, 6]
    calls = {
        "by sample": lambda: kernels.sdpa_by_sample(q, k, v, lengths),
        "masked": lambda: kernels.sdpa_masked(q, k, v, mask),
    }
    kernels.check_agree(lambda: varlen_attention(q, k, v, cu, cu), calls)
    with pytest.raises(AssertionError, match="masked, tensor 0: off by"):
        mask[20, 3] = True
        kernels.check_agree(lambda: varlen_attention(q, k, v, cu, cu), calls)


def test_loss_of_label_rows() -> None:
    hidden, weight, labels = torch.randn(600, 32).requires_grad_(), torch.randn(101, 32).requires_grad_(), torch.randint(0, 101, (600,))
    losses = {name: getattr(kernels, name)(hidden, weight, labels) for name in ("label_rows_loss", "chunked_loss")}
    expected = linear_cross_entropy(hidden, weight, labels, reduction="mean")
    for name, loss in losses.items():
        kernels.check_agree(
            lambda: torch.autograd.grad(expected, (hidden, weight), retain_graph=True),
            {name: lambda loss=loss: torch.autograd.grad(loss, (hidden, weight), retain_graph=True)},
        )


def test_an_answer_that_differs_voids_the_row() -> None:
    x = torch.randn(4, 5)
    kernels.check_agree(lambda: (x, x.bfloat16()), {"same": lambda: (x + 1e-6, x.bfloat16() * 1.01)})
    for name, other in {"wrong": x * 1.001, "narrow": x[:, :4], "two": (x, x)}.items():
        with pytest.raises(AssertionError, match=f"^{name}"):
            kernels.check_agree(lambda: x, {name: lambda other=other: other})
    with pytest.raises(AssertionError, match="off by"):
        kernels.check_agree(lambda: torch.tensor([7, 8]), {"argmax": lambda: torch.tensor([7, 9])})
