"""The engine's core: any schedule gives every request the tokens that it gets alone, and nothing is leaked.

fp64, so that the order of sums cannot flip a choice; in lower precision with kernels whose sums do not depend on the schedule.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_cases import GREEDY, Ask, answers, assert_clean, drive, new_core, new_job, prompt_of, solo, some_asks, views_of

import llava_fast as lf
from llava_fast.engine.job import Job
from llava_fast.engine.sampling import log_sum_exp
from llava_fast.engine.speculate import guess
from llava_fast.kernels import registry

WORKLOAD = Path(__file__).parent.parent / "bench" / "workloads" / "m4_mix.jsonl"


@pytest.fixture(scope="module")
def model(checkpoints) -> lf.LlavaFast:
    loaded = lf.load(checkpoints["qwen_untied"], dtype=torch.float64)
    loaded.generation_config.eos_token_id = [5]
    return loaded


@pytest.fixture(scope="module")
def asks() -> list[Ask]:
    return some_asks()


@pytest.fixture(scope="module")
def alone(model, asks) -> list[list[list[int]]]:
    return [solo(model, ask) for ask in asks]


def test_alone_is_what_the_whole_model_says(model, asks, alone) -> None:
    """Greedy answers against the model without any cache, every token from all rows before it."""
    for ask, (first, *_) in zip(asks, alone, strict=True):
        if ask.params.temperature or ask.params.repetition_penalty != 1:
            continue
        for known in range(0, len(first), 5):
            prompt = prompt_of(model, [*ask.parts, first[:known]])
            core, job = new_core(model), new_job(model, Ask([], GREEDY), 0)
            job.prompt = prompt
            drive(core, [job], [0])
            assert job.sequences[0].tokens[0] == first[known]


@pytest.mark.parametrize("seed", range(120))
def test_any_schedule_gives_the_same_tokens(seed, model, asks, alone) -> None:
    rng = np.random.default_rng(seed)
    page = int(rng.choice([16, 64]))
    block = new_core(model, page=page).block_bytes
    chosen = rng.permutation(len(asks))[: rng.integers(2, 14)].tolist()
    most = max(len(prompt_of(model, asks[i].parts)) + asks[i].params.max_new_tokens for i in chosen)
    core = new_core(
        model,
        page=page,
        kv_cache_bytes=block * (-(-most // page) + int(rng.integers(0, 12))),  # little: preemption, eviction
        max_running=int(rng.choice([1, 2, 5, 8])),
        max_rows=int(rng.choice([8, 17, 64, 512])),
        max_views=int(rng.choice([1, 3, 8])),
        max_mixed_rows=int(rng.choice([1, 9, 40, 512])),
        prefix_cache=bool(rng.random() < 0.7),
        feature_cache_bytes=int(rng.choice([0, 20_000, 1 << 20])),
        overlap=bool(rng.random() < 0.5),
        speculate=int(rng.choice([0, 0, 3])),
    )
    jobs = [new_job(model, replace(asks[i], priority=int(rng.integers(0, 3))), number) for number, i in enumerate(chosen)]
    drive(core, jobs, rng.integers(0, 30, len(jobs)).tolist())
    assert answers(jobs) == [alone[i] for i in chosen]
    assert_clean(core)


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def narrow(request, checkpoints) -> lf.LlavaFast:
    return lf.load(checkpoints["qwen_untied"], dtype=request.param)


def told(jobs: list[Job]) -> list[list[tuple[list[int], list[float]]]]:
    return [[(completion.token_ids, completion.logprobs) for completion in job.handle.result(0)] for job in jobs]


def random_schedule(model: lf.LlavaFast, asks: list[Ask], seed: int, deterministic: bool) -> list[list[tuple[list[int], list[float]]]]:
    rng = np.random.default_rng(seed)
    core = new_core(
        model,
        kv_dtype=torch.bfloat16 if seed % 2 else None,
        max_running=int(rng.choice([1, 2, 8])),
        max_rows=int(rng.choice([8, 17, 64, 512])),
        max_views=int(rng.choice([1, 3, 8])),
        max_mixed_rows=int(rng.choice([1, 9, 40, 512])),
        prefix_cache=bool(rng.random() < 0.7),
        speculate=int(rng.choice([0, 0, 3])),
        deterministic=deterministic,
    )
    jobs = [new_job(model, ask, number) for number, ask in enumerate(asks)]
    drive(core, jobs, rng.integers(0, 30, len(jobs)).tolist())
    return told(jobs)


@pytest.mark.parametrize("seed", range(16))
def test_deterministic_engines_agree_to_the_bit(seed, narrow, asks) -> None:
    """Tokens and log-probabilities in fp32, with keys and values in bf16 too, against each request alone."""
    chosen = [
        replace(asks[i], params=replace(asks[i].params, logprobs=True)) for i in np.random.default_rng(seed).permutation(len(asks))[:6]
    ]
    expected = []
    for ask in chosen:
        core = new_core(narrow, kv_dtype=torch.bfloat16 if seed % 2 else None, prefix_cache=False, deterministic=True)
        drive(core, [job := new_job(narrow, ask, 0)], [0])
        expected += told([job])
    assert random_schedule(narrow, chosen, seed, deterministic=True) == expected
    if seed == 0:  # the same schedule does differ without: it is no empty promise
        assert random_schedule(narrow, chosen, seed, deterministic=False) != expected


def test_deterministic_needs_kernels_that_can(model) -> None:
    with pytest.raises(ValueError, match="no batch-invariant implementation of activation .*float64"):
        new_core(model, deterministic=True)
    assert not registry.is_invariant()


def test_deterministic_refuses_what_comes_late(checkpoints) -> None:
    """Kinds of weights, implementations asked for by name, and adapters: before any request."""
    load = partial(lf.load, checkpoints["qwen_untied"], dtype=torch.float32)
    with pytest.raises(ValueError, match="no batch-invariant implementation of linear"):
        new_core(load(quantise="fp8"), deterministic=True)
    new_core(load(quantise="int8"), deterministic=True)
    with registry.use(norm="reference"), pytest.raises(ValueError, match="norm=reference was asked for but its results depend on how many"):
        new_core(load(), deterministic=True)
    adapted = load()
    adapted.language_model.layers[1].mlp.up_proj = torch.nn.Sequential(adapted.language_model.layers[1].mlp.up_proj)
    with pytest.raises(ValueError, match="layers.1.mlp.up_proj has an adapter"):
        new_core(adapted, deterministic=True)


def test_log_probabilities_of_a_large_vocabulary() -> None:
    """torch splits one long row among its threads, and one of several to each."""
    torch.manual_seed(0)
    logits, threads = torch.randn(120, 152_000) * 3, torch.get_num_threads()  # of which some 5 differ by torch's own
    torch.set_num_threads(2)
    try:
        whole = log_sum_exp(logits)
        for first, last in [(i, i + 1) for i in range(120)] + [(3, 5), (7, 30)]:
            assert torch.equal(log_sum_exp(logits[first:last]), whole[first:last])
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(whole.double(), logits.double().logsumexp(-1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("rows, page, cached", [(r, p, c) for r in (1, 7, 64, 2048) for p in (16, 64) for c in (True, False)])
def test_chunks_of_any_size(rows, page, cached, model, asks, alone) -> None:
    """Also inside pictures, whose views come one at a time."""
    core = new_core(model, max_rows=rows, max_running=min(rows, 4), page=page, prefix_cache=cached, max_views=1)
    jobs = [new_job(model, ask, number) for number, ask in enumerate(asks[:6])]
    drive(core, jobs, [0] * 6)
    assert answers(jobs) == alone[:6]
    assert_clean(core)


def test_tokens_wait_for_few_rows_of_others_prompts(model, asks, alone, monkeypatch) -> None:
    """A step in which somebody decodes computes `max_mixed_rows` of prompts and shows the tower a view, or a picture of several."""
    core, plans = new_core(model, max_mixed_rows=24, max_running=4), []
    monkeypatch.setattr(core.runner, "run", lambda plan, run=core.runner.run: plans.append(plan) or run(plan))
    jobs = [new_job(model, ask, number) for number, ask in enumerate(asks[:8])]
    drive(core, jobs, [3 * i for i in range(8)])
    assert answers(jobs) == alone[:8]
    mixed = [plan for plan in plans if any(work.repeats for work in plan.works)]
    rows = [sum(work.last - work.first for work in plan.works if not work.repeats) for plan in mixed]
    assert max(rows) == 24 and max(sum(work.last - work.first for work in plan.works) for plan in plans if plan not in mixed) > 24
    assert max(len(plan.encode) for plan in mixed) == 1 < max(len(plan.encode) for plan in plans)


def test_a_second_question_computes_its_new_tokens_alone(model) -> None:
    core, pictures = new_core(model), views_of(3, 4)
    beginning = [[11, 12, 13], pictures, [20] * 30]
    first, second = (new_job(model, Ask([*beginning, question], GREEDY), i) for i, question in enumerate(([30, 31], [40, 41, 42])))
    drive(core, [first], [0])
    views, rows = core.counters.views, core.counters.prompt_rows
    drive(core, [second], [0])
    shared = 3 + 4 * model.config.patches + 30
    assert core.counters.views == views == 4
    assert core.counters.prompt_rows - rows <= len(second.prompt) - shared // core.page * core.page
    assert answers([second])[0] == solo(model, Ask([*beginning, [40, 41, 42]], GREEDY))


def test_samples_share_the_blocks_of_their_prompt(model) -> None:
    for cached in (True, False):
        core = new_core(model, prefix_cache=cached)
        job = new_job(model, Ask([[9] * 100], lf.SamplingParams(max_new_tokens=4, temperature=1.0, seed=1, n=4)), 0)
        drive(core, [job], [0])
        assert core.counters.prompt_rows == 100 + 3


def test_different_pictures_behind_the_same_ids_share_nothing(model) -> None:
    core = new_core(model)
    jobs = [new_job(model, Ask([[9] * 16, views_of(seed, 3), [10] * 20], GREEDY), seed) for seed in (0, 1)]
    drive(core, [jobs[0]], [0])
    drive(core, [jobs[1]], [0])
    assert core.scheduler.reused_rows == 16  # the text before the pictures
    keys = [[job.sequences[0].key(block, 16) for block in range(3)] for job in jobs]
    assert keys[0][0] == keys[1][0] and not set(keys[0][1:]) & set(keys[1][1:])
    assert answers(jobs) == [solo(model, Ask([[9] * 16, views_of(seed, 3), [10] * 20], GREEDY)) for seed in (0, 1)]
    same = prompt_of(model, [views_of(0)]).pictures[0].key
    assert same == prompt_of(model, [[1], views_of(0)]).pictures[0].key
    assert same != prompt_of(model, [views_of(0).flip(3)]).pictures[0].key


def test_the_workload(model) -> None:
    """500 requests shaped like M4-Instruct: random arrivals and cancellations, a cache too small for them, little memory for pictures."""
    rng = np.random.default_rng(5)
    records = [json.loads(line) for line in WORKLOAD.read_text().splitlines()][:500]
    P = model.config.patches
    asks = []
    for record in records:
        prompt, answer = record["turns"][0]
        pictures = views_of(int(rng.integers(0, 40)), min(record["views"], 16))
        asks.append(Ask([pictures, rng.integers(10, 300, prompt).tolist()], lf.SamplingParams(max_new_tokens=1 + answer % 24, seed=1)))
    block = new_core(model).block_bytes
    core = new_core(
        model, kv_cache_bytes=20 * block, feature_cache_bytes=40 * P * model.config.decoder.width * 8, max_running=16, max_rows=128
    )
    jobs = [new_job(model, ask, number) for number, ask in enumerate(asks)]
    arrivals = np.sort(rng.integers(0, 1500, 500)).tolist()
    cancels = {i: arrivals[i] + int(rng.integers(0, 40)) for i in rng.permutation(500)[:60].tolist()}
    drive(core, jobs, arrivals, cancels)
    assert_clean(core)
    assert core.scheduler.preemptions > 0 and core.scheduler.reused_rows > 0 and core.counters.pictures_reused > 0
    cancelled = [job for job in jobs if job.handle.result(0)[0].finish_reason == "cancelled"]
    assert 10 < len(cancelled) == core.counters.cancelled
    for i in range(500):
        completion = jobs[i].handle.result(0)[0]
        expected = solo(model, asks[i])[0]
        assert completion.token_ids == expected[: len(completion.token_ids)]
        assert completion.finish_reason == "cancelled" or len(completion.token_ids) == len(expected)


def test_preemption_and_order(model) -> None:
    """Two long answers that do not fit together: the later one gives way, and nobody overtakes it."""
    block = new_core(model).block_bytes
    core = new_core(model, kv_cache_bytes=6 * block)
    model.generation_config.eos_token_id = []
    long = lf.SamplingParams(max_new_tokens=60)
    asks = [Ask([[9] * 30], long), Ask([[10] * 30], long), Ask([[11] * 3], GREEDY)]
    jobs = [new_job(model, ask, number) for number, ask in enumerate(asks)]
    model.generation_config.eos_token_id = [5]
    drive(core, jobs, [0, 0, 3])
    assert core.scheduler.preemptions > 0
    totals = [job.timings["total"] + job.submitted for job in jobs]
    assert totals[0] < totals[1]
    assert [len(tokens) for tokens in (answers(jobs)[0][0], answers(jobs)[1][0])] == [60, 60]
    with pytest.raises(ValueError, match="30 tokens and up to 80 new ones do not fit into the cache's 96 rows: .* at least"):
        refused = new_job(model, Ask([[9] * 30], lf.SamplingParams(max_new_tokens=80)), 3)
        core.begin(refused)
        raise refused.handle.error


def test_higher_priorities_come_first(model) -> None:
    core = new_core(model, max_running=1)
    jobs = [new_job(model, Ask([[9 + i]], GREEDY, priority), i) for i, priority in enumerate((0, 5, 1))]
    drive(core, jobs, [0, 0, 0])
    ends = [job.submitted + job.timings["total"] for job in jobs]
    assert ends[1] < ends[2] < ends[0]


def test_guesses_are_checked(model) -> None:
    """A model that repeats itself: guesses are right, and take fewer steps for the same tokens."""
    assert guess([1, 2, 3, 4, 1, 2], [], 3) == [3, 4, 1] and guess([1, 2, 3], [4], 3) == [] and guess([1, 2, 1, 2], [], 0) == []
    ask = Ask([[20, 21, 22] * 8], lf.SamplingParams(max_new_tokens=60))
    expected = solo(model, ask)
    core, job = new_core(model, speculate=4), new_job(model, ask, 0)
    turns = drive(core, [job], [0])
    assert answers([job])[0] == expected
    assert core.counters.drafted >= core.counters.accepted > 0 and turns <= len(expected[0])
    assert len(expected[0]) - turns == core.counters.accepted
