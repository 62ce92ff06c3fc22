"""Forward and backward of the head's cross-entropy, 4 % of 8,192 rows with a label, against all rows with ignore_index.

The baseline is what a model without label rows does: logits of every row, F.cross_entropy over them. At the vocabulary of 152,000
its logits, their log-softmax and their gradient are 15 GB in fp32, so both run at a sixteenth of it; the ratio is of rows, 25, and
of passes over logits. Peak memory is measured once each, over what the inputs and the weight's gradient take.

test_label_rows holds it against what knows the label rows too, at a quarter of the vocabulary and over their number.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from bench.baselines.kernels import check_agree, chunked_loss, inductor, label_rows_loss
from bench.memory import peak_in_process, run_measured, status
from llava_fast.kernels.linear_cross_entropy import linear_cross_entropy

ROWS, LABELS, D, V = 8192, 328, 1024, 9500


def calls(rows: int = ROWS, count: int = LABELS) -> tuple[Callable[[], tuple[torch.Tensor, ...]], Callable[[], tuple[torch.Tensor, ...]]]:
    """Ours and the baseline's gradients of hidden rows, of which `count` have a label, and of the weight."""
    hidden = torch.randn(rows, D)
    weight = (torch.randn(V, D) / 32).requires_grad_()
    labels = torch.full((rows,), -100)
    index = torch.randperm(rows)[:count].sort().values
    labels[index] = torch.randint(0, V, (count,))
    chosen, own = labels[index], hidden[index].requires_grad_()
    hidden.requires_grad_()

    def ours() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(linear_cross_entropy(own, weight, chosen, reduction="mean"), (own, weight))

    def baseline() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(F.cross_entropy(hidden @ weight.T, labels), (hidden, weight))

    return ours, baseline


def memory_of(side: str) -> float:
    """MB at the peak of a call, past the inputs and the weight's gradient. In a process of its own: another call's blocks would be found
    again, and not counted."""
    for call in calls(2, 1):
        call()  # the libraries' own
    call = dict(zip(("ours", "baseline"), calls(), strict=True))[side]
    before = status()["RssAnon"]
    with peak_in_process() as peak:
        call()
    return (peak.anon - before - V * D * 4) / 1e6


def test_linear_cross_entropy_memory(benchmark, record_row) -> None:
    row = {"name": "linear_cross_entropy_memory", "device": "cpu", "rounds": 1}

    def measure() -> None:
        for side in ("ours", "baseline"):
            run = run_measured(["-m", "bench.bench_linear_cross_entropy", side], env={"PYTHONPATH": os.getcwd()})
            row[f"{side}_mb"] = run.report["mb"]

    benchmark.pedantic(measure, rounds=1)
    row["ratio_mb"] = row["baseline_mb"] / row["ours_mb"]
    record_row(row)
    benchmark.extra_info.update(row)


def test_linear_cross_entropy_at_4_percent_labels(paired, limits) -> None:
    ours, baseline = calls()
    for mine, theirs in zip(ours(), baseline(), strict=True):
        rows = theirs.abs().sum(1) > 0 if len(theirs) == ROWS else slice(None)  # those with a label
        torch.testing.assert_close(mine, theirs[rows], rtol=1e-3, atol=1e-6)
    # Three products: logits, and the gradients of hidden rows and weight.
    paired(ours, baseline, operations=6 * LABELS * D * V, limit=limits("cpu").fma_fp32_gflops * 1e9)


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


if __name__ == "__main__":
    print(json.dumps({"mb": memory_of(sys.argv[1])}))
