"""Forward and backward of the head's cross-entropy, 4 % of 8,192 rows with a label, against all rows with ignore_index.

The baseline is what a model without label rows does: logits of every row, F.cross_entropy over them. At the vocabulary of 152,000
its logits, their log-softmax and their gradient are 15 GB in fp32, so both run at a sixteenth of it; the ratio is of rows, 25, and
of passes over logits. Peak memory is measured once each, over what the inputs and the weight's gradient take.

test_label_rows holds it against what knows the label rows too, at a quarter of the vocabulary and over their number.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from bench.baselines.kernels import check_agree, chunked_loss, inductor, label_rows_loss
from bench.memory import peak_in_process, status
from llava_fast.kernels.linear_cross_entropy import linear_cross_entropy

ROWS, LABELS, D, V = 8192, 328, 1024, 9500


def calls() -> tuple[Callable[[], object], Callable[[], object]]:
    hidden = torch.randn(ROWS, D)
    weight = (torch.randn(V, D) / 32).requires_grad_()
    labels = torch.full((ROWS,), -100)
    index = torch.randperm(ROWS)[:LABELS].sort().values
    labels[index] = torch.randint(0, V, (LABELS,))
    chosen, own = labels[index], hidden[index].requires_grad_()
    hidden.requires_grad_()

    def ours() -> object:
        return torch.autograd.grad(linear_cross_entropy(own, weight, chosen, reduction="mean"), (own, weight))

    def baseline() -> object:
        return torch.autograd.grad(F.cross_entropy(hidden @ weight.T, labels), (hidden, weight))

    torch.testing.assert_close(ours()[1], baseline()[1], rtol=1e-3, atol=1e-6)  # type: ignore[index]
    return ours, baseline


# First: what other benchmarks leave with the process would be found again, and not counted.
def test_linear_cross_entropy_memory(benchmark, record_row) -> None:
    row = {"name": "linear_cross_entropy_memory", "device": "cpu", "rounds": 1}
    ours, baseline = calls()

    def measure() -> None:
        for side, call in (("ours", ours), ("baseline", baseline)):
            before = status()["RssAnon"]
            with peak_in_process() as peak:
                kept = call()
            row[f"{side}_mb"] = (peak.anon - before - V * D * 4) / 1e6
            del kept

    benchmark.pedantic(measure, rounds=1)
    row["ratio_mb"] = row["baseline_mb"] / row["ours_mb"]
    record_row(row)
    benchmark.extra_info.update(row)


def test_linear_cross_entropy_at_4_percent_labels(paired, limits) -> None:
    # Three products: logits, and the gradients of hidden rows and weight.
    paired(*calls(), operations=6 * LABELS * D * V, limit=limits("cpu").fma_fp32_gflops * 1e9)


@pytest.mark.usefixtures("kept_memory")  # as a training step has it
@pytest.mark.parametrize("labels", [16, 256, *(pytest.param(rows, marks=pytest.mark.long) for rows in (64, 1024))])
def test_label_rows(paired, limits, labels: int) -> None:
    vocabulary = 38_000  # a quarter: the gradients of four sides at 152,000 would be 2.5 GB
    hidden, weight = torch.randn(labels, D).requires_grad_(), (torch.randn(vocabulary, D) / 32).requires_grad_()
    wanted, compiled = torch.randint(0, vocabulary, (labels,)), inductor(label_rows_loss)

    def gradients(loss: Callable[..., torch.Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(loss(hidden, weight, wanted), (hidden, weight))

    ours = gradients(lambda *arguments: linear_cross_entropy(*arguments, reduction="mean"))
    rivals = {"torch": gradients(label_rows_loss), "torch.compile": gradients(compiled), "torch, in chunks": gradients(chunked_loss)}
    check_agree(ours, rivals)
    operations, limit = 6.0 * labels * D * vocabulary, limits("cpu").fma_fp32_gflops * 1e9
    paired(ours, rivals, operations=operations, limit=limit, axis="rows", at=labels, rounds=3)
