"""First-fit packing: every sample once, both budgets held, deterministic, and the fill that the workload promises."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llava_fast.inputs.packing import pack_rows

WORKLOAD = Path(__file__).parent.parent / "bench" / "workloads" / "m4_mix.jsonl"

SAMPLES = st.lists(st.tuples(st.integers(1, 60), st.integers(0, 9)), max_size=80)


@settings(max_examples=150, deadline=None)
@given(
    samples=SAMPLES,
    tokens_per_row=st.integers(1, 80),
    views_per_row=st.one_of(st.none(), st.integers(1, 12)),
    window=st.integers(1, 100),
    seed=st.integers(0, 5),
    order=st.sampled_from(["first_fit", "first_fit_decreasing"]),
)
def test_every_sample_once_within_both_budgets(samples, tokens_per_row, views_per_row, window, seed, order):
    tokens, views = [t for t, _ in samples], [v for _, v in samples]

    def run():
        return pack_rows(tokens, views, tokens_per_row, views_per_row, window=window, seed=seed, order=order, too_long="skip")

    packing = run()
    limit = sum(views) if views_per_row is None else views_per_row
    expected_over = [i for i in range(len(samples)) if tokens[i] > tokens_per_row or views[i] > limit]
    assert packing.too_long == expected_over
    assert sorted([i for row in packing.rows for i in row] + packing.too_long) == list(range(len(samples)))
    for row in packing.rows:
        assert row
        assert sum(tokens[i] for i in row) <= tokens_per_row
        assert sum(views[i] for i in row) <= limit
    assert run() == packing
    assert 0 <= packing.fill(tokens, tokens_per_row) <= 1


@settings(max_examples=50, deadline=None)
@given(tokens=st.lists(st.integers(1, 50), min_size=1, max_size=60), seed=st.integers(0, 5))
def test_first_fit_leaves_no_two_rows_that_would_fit_in_one(tokens, seed):
    packing = pack_rows(tokens, [0] * len(tokens), 50, window=len(tokens), seed=seed)
    sums = sorted(sum(tokens[i] for i in row) for row in packing.rows)
    assert len(sums) < 2 or sums[0] + sums[1] > 50


def test_rows_change_with_the_seed_and_the_epoch_only():
    tokens, views = np.arange(1, 200) % 37 + 1, np.zeros(199, dtype=int)
    base = pack_rows(tokens, views, 64, seed=3, epoch=0)
    assert pack_rows(tokens, views, 64, seed=3, epoch=0) == base
    assert pack_rows(tokens, views, 64, seed=3, epoch=1) != base
    assert pack_rows(tokens, views, 64, seed=4, epoch=0) != base


def m4_counts() -> tuple[list[int], list[int]]:
    records = [json.loads(line) for line in WORKLOAD.read_text().splitlines()]
    views = [record["views"] for record in records]
    return [729 * record["views"] + sum(sum(turn) for turn in record["turns"]) for record in records], views


@pytest.mark.parametrize("views_per_row", [None, 24])
def test_m4_workload_fills_16k_rows(views_per_row):
    tokens, views = m4_counts()
    fills = [pack_rows(tokens, views, 16384, views_per_row, window=256, seed=seed) for seed in range(5)]
    assert min(packing.fill(tokens, 16384) for packing in fills) >= 0.985
    plain = pack_rows(tokens, views, 16384, window=256, order="first_fit")
    assert plain.fill(tokens, 16384) < min(packing.fill(tokens, 16384) for packing in fills)


def test_rows_are_lists_kept_in_one_array():
    packing = pack_rows([3, 2, 2, 1], [0] * 4, 4)
    rows = [packing.rows[i] for i in range(len(packing.rows))]
    assert rows == list(packing.rows) == packing.rows[:] and packing.rows[-1] == rows[-1] and sorted(sum(rows, [])) == [0, 1, 2, 3]
    with pytest.raises(IndexError, match="row 2 of 2"):
        packing.rows[2]


def test_view_budget_binds_before_tokens():
    assert all(len(row) <= 2 for row in pack_rows([1] * 9, [2] * 9, 1000, 5).rows)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"tokens": [5, 99], "views": [0, 0], "tokens_per_row": 50}, "sample 1 has 99 tokens"),
        ({"tokens": [5, 9], "views": [0, 7], "tokens_per_row": 50, "views_per_row": 6}, "7 views"),
        ({"tokens": [5], "views": [0, 0], "tokens_per_row": 50}, "one length"),
        ({"tokens": [0], "views": [0], "tokens_per_row": 50}, "at least 1 token"),
        ({"tokens": [1], "views": [0], "tokens_per_row": 0}, "tokens_per_row"),
        ({"tokens": [1], "views": [0], "tokens_per_row": 5, "window": 0}, "window"),
        ({"tokens": [1], "views": [0], "tokens_per_row": 5, "order": "best_fit"}, "best_fit"),
    ],
)
def test_errors_name_the_sample_and_the_budget(arguments, message):
    with pytest.raises(ValueError, match=message):
        pack_rows(**arguments)
