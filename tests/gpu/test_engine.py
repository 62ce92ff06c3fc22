"""The engine on a GPU: captured steps give the tokens of steps that are run, and a step never waits for the device."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from bench.full_size import config_05b
from bench.whole_model import random_model
from llava_fast.config import from_hf
from llava_fast.engine.core import Core, Options
from llava_fast.engine.engine import Engine
from llava_fast.engine.runner import SMALL_VIEWS, Runner
from llava_fast.engine.sequence import Prompt
from llava_fast.kernels import registry
from llava_fast.models.llava import Llava
from llava_fast.requests import SamplingParams

OPS = ("activation", "linear", "norm", "paged_attention", "rope", "sampling", "varlen_attention")


@pytest.fixture(scope="module")
def model(machine: tuple[str, str]) -> Llava:
    config = from_hf(config_05b(image_token_id=1999, tower_layers=2, decoder_layers=2))
    config = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, vocab_size=2000))
    return random_model(config, machine[0], torch.float32)


@pytest.fixture(autouse=True)
def implementations(machine: tuple[str, str]) -> Iterator[None]:
    with registry.use(**dict.fromkeys(OPS, machine[1])):
        yield


def prompts() -> list[Prompt]:
    rng = np.random.default_rng(0)
    ids = [rng.integers(10, 1900, int(n)) for n in rng.integers(5, 300, 20)]
    return [Prompt(one, (), one.tolist()) for one in ids]


def answers(model: Llava, **options: Any) -> list[list[int]]:
    params = [SamplingParams(max_new_tokens=20, temperature=0.8 * (i % 2), seed=i, top_k=30) for i in range(20)]
    with Engine(model, max_running=8, kv_cache_bytes=1 << 27, **options) as engine:
        handles = [engine.submit_prompt(prompt, own, ()) for prompt, own in zip(prompts(), params, strict=True)]
        done = [handle.result(300)[0] for handle in handles]
    assert all(one.error is None for one in done), [one.error for one in done]
    return [one.token_ids for one in done]


def test_captured_steps_give_the_same_tokens(model: Llava) -> None:
    """In fp32; rows are computed by other shapes of products, so that a near tie may fall the other way."""
    run = answers(model, graphs=False, overlap=False)
    for options in (dict(graphs=True, overlap=False), dict(graphs=True, overlap=True)):
        captured = answers(model, **options)
        assert sum(a == b for a, b in zip(run, captured, strict=True)) >= 18


def test_deterministic_steps_agree_to_the_bit(model: Llava, machine: tuple[str, str]) -> None:
    """Whatever runs beside a request, however its prompt is cut, captured or not."""
    with registry.use(**dict.fromkeys(OPS, "cpu" if machine[0] == "cpu" else machine[1])):
        expected = answers(model, deterministic=True, graphs=False, prefix_cache=False)
        for options in (dict(max_rows=64), dict(max_rows=64, graphs=False, overlap=False), dict(max_rows=2048, speculate=3)):
            assert answers(model, deterministic=True, **options) == expected


@torch.inference_mode()
def test_captured_towers_see_what_the_tower_sees(model: Llava, machine: tuple[str, str]) -> None:
    if machine[0] == "cpu":
        pytest.skip("nothing is captured without a GPU")
    runner = Runner(model, 4, 64, torch.float32, 2, graphs=True)
    assert runner.graphs
    for count in (1, 3, 4):
        views = torch.randint(0, 256, (count, 3, 384, 384), dtype=torch.uint8, device=model.device)
        step = runner._towers[next(n for n in SMALL_VIEWS if n >= count)]
        torch.testing.assert_close(step(views), model.features(views), rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_a_step_never_waits(model: Llava, machine: tuple[str, str]) -> None:
    core = Core(model, Options(kv_cache_bytes=1 << 27, max_running=8, max_rows=512, feature_cache_bytes=0, overlap=True, graphs=True))
    from llava_fast.engine.handle import Handle
    from llava_fast.engine.job import Job
    from llava_fast.requests import InputOptions

    for number, prompt in enumerate(prompts()[:8]):
        params = SamplingParams(max_new_tokens=40, temperature=0.8 * (number % 2), seed=number)
        core.begin(Job(number, None, params, InputOptions(), (), Handle(number), 0.0, prompt=prompt))
    for _ in range(12):  # prompts, and steps that make what is made once
        core.turn()
    launch, mode = core.runner.run, "error" if machine[0] == "cuda" else "default"

    def watched(plan: Any) -> Any:
        if machine[0] == "cuda":
            torch.cuda.set_sync_debug_mode(mode)
        try:
            return launch(plan)
        finally:
            if machine[0] == "cuda":
                torch.cuda.set_sync_debug_mode("default")

    core.runner.run = watched  # type: ignore[method-assign]
    before = core.counters.decode_steps
    for _ in range(20):
        core.turn()
    assert core.counters.decode_steps >= before + 15
    while not core.idle:
        core.turn()
