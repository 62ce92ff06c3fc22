"""The engine with its threads, the faults of requests and of the engine itself, and its parts."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from engine_cases import GREEDY, Ask, answers, assert_clean, drive, new_core, new_job, solo, views_of
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

import llava_fast as lf
from llava_fast.engine.blocks import BlockPool, Content
from llava_fast.engine.features import FeatureCache
from llava_fast.engine.handle import Delta
from llava_fast.engine.stats import read


@pytest.fixture(scope="module")
def model(checkpoints) -> lf.LlavaFast:
    loaded = lf.load(checkpoints["qwen_untied"], dtype=torch.float64)
    loaded.generation_config.eos_token_id = [5]
    return loaded


@pytest.fixture(scope="module", params=["qwen", "qwen_untied", "llama"])
def theirs(request, checkpoints) -> tuple[lf.LlavaFast, list[lf.Request], list[list[int]]]:
    """A model, requests of every form, and transformers' greedy ids for them, in fp32."""
    directory = checkpoints[request.param]
    hf = LlavaForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(directory)
    texts = ["What are these?", "<image>\nWhat?", "A <image> and <image>, then?", "<image>", "<image>\nWhat? And <image><image>"]
    requests, expected = [], []
    for i, text in enumerate(texts):
        images = [picture(10 * (i % 2) + k) for k in range(text.count("<image>"))]
        requests.append(lf.Request(text, images=images))
        inputs = processor(images=images or None, text=text, return_tensors="pt")
        ids = hf.generate(**inputs, max_new_tokens=12, do_sample=False)
        expected.append(ids[0, inputs["input_ids"].shape[1] :].tolist())
    return lf.load(directory, dtype=torch.float32), requests, expected


@pytest.mark.parametrize("rows", [1, 7, 64, 2048])
@pytest.mark.parametrize("page", [16, 64])
@pytest.mark.parametrize("cached", [True, False])
def test_tokens_are_those_of_transformers(rows, page, cached, theirs) -> None:
    model, requests, expected = theirs
    with lf.Engine(model, max_rows=rows, page=page, prefix_cache=cached, feature_cache_bytes=1 << 20 if cached else 0) as engine:
        for _ in range(2):  # the second time what was kept is used
            completions = lf.generate(model, requests, max_new_tokens=12, engine=engine)
            assert [completion.token_ids for completion in completions] == expected
        assert (engine.stats().prefix_reused > 0) == cached


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.05), (torch.float16, 0.01), (torch.float8_e4m3fn, 0.3)])
def test_narrower_caches(dtype, tolerance, checkpoints) -> None:
    model = lf.load(checkpoints["qwen_untied"], dtype=torch.float32)
    ask = lf.Request("<image>What are these?", images=[picture(1)])
    exact = lf.generate(model, ask, replace(GREEDY, logprobs=True))
    with lf.Engine(model, kv_dtype=dtype) as engine:
        (answer,) = engine.submit(ask, replace(GREEDY, logprobs=True)).result(60)
        assert engine.stats().kv_bytes == engine.stats().blocks * 64 * 2 * 3 * 64 * dtype.itemsize
    assert answer.finish_reason in ("stop", "length") and answer.logprobs is not None
    assert abs(answer.logprobs[0] - exact.logprobs[0]) < tolerance


# -- faults


@pytest.mark.parametrize("where", ["the vision tower", "the decoder", "sampling", "making text of its tokens"])
def test_a_fault_hits_its_request_alone(where, model, monkeypatch) -> None:
    core = new_core(model)
    asks = [Ask([views_of(i), [10 + i] * 5], GREEDY) for i in range(4)]
    jobs = [new_job(model, ask, number) for number, ask in enumerate(asks)]
    bad_views, marker = views_of(2), 12
    if where == "the vision tower":
        features = model.features
        monkeypatch.setattr(
            model, "features", lambda views: _fail() if any(torch.equal(v, bad_views[0]) for v in views) else features(views)
        )
    elif where == "the decoder":
        mixed = core.runner._mixed
        monkeypatch.setattr(
            core.runner, "_mixed", lambda works: _fail() if any(w.sequence.owner is jobs[2] for w in works) else mixed(works)
        )
    elif where == "sampling":
        sampler = core.runner.sampler
        monkeypatch.setattr(
            core.runner,
            "sampler",
            lambda logits, works, greedy: _fail() if any(w.sequence.owner is jobs[2] for w in works) else sampler(logits, works, greedy),
        )
    else:
        monkeypatch.setattr(jobs[2], "append", lambda *_: _fail())
        monkeypatch.setattr("llava_fast.engine.text.TextStream.finish", lambda _: _fail())
    drive(core, jobs, [0] * 4)
    monkeypatch.undo()
    failed = jobs[2].handle.result(0)[0]
    assert failed.finish_reason == "error" and failed.error == f"{where} failed: RuntimeError: injected" and marker
    others = [i for i in range(4) if i != 2]
    assert [answers([jobs[i]])[0] for i in others] == [solo(model, asks[i]) for i in others]
    assert_clean(core)


def _fail() -> Any:
    raise RuntimeError("injected")


def test_what_a_failed_step_did_not_compute_is_not_shared(model, monkeypatch) -> None:
    """Two samples of one request in a step that fails: neither's rows may be found by a later request."""
    ask = Ask([[9] * 40], lf.SamplingParams(max_new_tokens=8, temperature=1.0, seed=3, n=2))
    core, job = new_core(model), new_job(model, ask, 0)
    decode, steps = core.runner._decode, iter(range(100))
    monkeypatch.setattr(core.runner, "_decode", lambda works: _fail() if next(steps) >= 3 else decode(works))
    drive(core, [job], [0])
    assert job.handle.result(0)[0].finish_reason == "error"
    monkeypatch.undo()
    again = new_job(model, Ask([[9] * 40, *[job.sequences[0].tokens]], GREEDY), 1)
    drive(core, [again], [0])
    assert answers([again])[0] == solo(model, Ask([[9] * 40, *[job.sequences[0].tokens]], GREEDY))
    for block, content in core.pool._content.items():
        keys = core.runner.k[:, block, : len(content.rows)]
        assert keys.abs().sum((0, 2, 3)).all(), "a row that was never written"
    assert_clean(core)


# -- threads


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (48, 64, 3), dtype=np.uint8))


def test_submit_iterate_await(model) -> None:
    with lf.Engine(model, page=16) as engine:
        handles = [engine.submit(lf.Request("<image>What?", images=[picture(i)]), GREEDY) for i in range(3)]
        texts = ["".join(delta.text for delta in handle) for handle in handles]
        completions = [handle.result(60)[0] for handle in handles]
        assert texts == [completion.text for completion in completions]
        assert [c.token_ids for c in completions] == [
            lf.generate(model, lf.Request("<image>What?", images=[picture(i)]), GREEDY).token_ids for i in range(3)
        ]

        async def ask(i: int) -> tuple[str, str]:
            handle = engine.submit(lf.Request("<image>What?", images=[picture(i)]), GREEDY)
            text = "".join([delta.text async for delta in handle])
            return text, (await handle)[0].text

        async def all_of_them() -> list[tuple[str, str]]:
            return await asyncio.gather(*(ask(i) for i in range(3)))

        assert asyncio.run(all_of_them()) == [(text, text) for text in texts]
        stats = engine.stats()
        assert stats.finished == 6 and stats.running == stats.waiting == 0 and stats.prefix_reused > 0.4 and stats.blocks_held == 0
        assert stats.time_to_first_token["p50"] <= stats.time_to_first_token["p99"] and stats.tokens_per_s > 0
        assert stats.decode_of_limit is None is stats.prefill_of_torch
        measured = engine.stats(limits=True)
        assert measured.decode_of_limit > 0 and measured.prefill_of_torch > 0
    with pytest.raises(RuntimeError, match="the engine is closed"):
        engine.submit("What?")


def test_shares_of_the_limits(model) -> None:
    core = new_core(model)
    core.weight_bytes = 2_000_000_000
    assert read(core, 0, 1.0, (20.0, 100.0)).decode_of_limit is None is read(core, 0, 1.0, (20.0, 100.0)).prefill_of_torch
    core.counters.decode_steps, core.counters.decode_seconds = 5, 1.0  # 10 GB a second
    assert read(core, 0, 1.0, (20.0, 100.0)).decode_of_limit == pytest.approx(0.5)
    assert read(core, 0, 1.0, None).decode_of_limit is None
    core.counters.prompt_rows, core.counters.prefill_seconds = 1000, 1.0
    c = model.config.decoder
    products = sum(p.numel() for name, p in model.language_model.layers.named_parameters() if name.endswith("proj.weight"))
    assert c.layers and read(core, 0, 1.0, (20.0, 2 * products * 1000 / 1e9)).prefill_of_torch == pytest.approx(1.0)


def test_limits_are_measured_while_nothing_runs(model) -> None:
    with lf.Engine(model) as engine:
        handle = engine.submit("What?", lf.SamplingParams(max_new_tokens=1500, min_new_tokens=1500))
        next(iter(handle))
        with pytest.raises(ValueError, match="limits are measured while nothing runs"):
            engine.stats(limits=True)
        handle.cancel()


def test_cancelling_at_any_moment(model) -> None:
    long = lf.SamplingParams(max_new_tokens=1500, min_new_tokens=1500)
    with lf.Engine(model) as engine:
        before = engine.submit("Never begun", long)
        before.cancel()
        running = engine.submit("Running", long)
        next(iter(running))
        running.cancel()
        assert [h.result(60)[0].finish_reason for h in (before, running)] == ["cancelled"] * 2
        assert 0 < len(running.result()[0].token_ids) < 1500
        running.cancel()
        assert engine.submit("After", GREEDY).result(60)[0].finish_reason in ("stop", "length")
    with pytest.raises(KeyError), lf.Engine(model) as engine:  # leaving by an exception cancels
        handle = engine.submit("Running", long)
        raise KeyError
    assert handle.result(0)[0].finish_reason == "cancelled"


def test_who_stops_listening_stops_nobody(model) -> None:
    """A wait that times out, a stream that is left and whose loop is closed: the engine and its other requests go on."""
    long = lf.SamplingParams(max_new_tokens=400, min_new_tokens=400)
    with lf.Engine(model) as engine:
        handle, left = engine.submit("Waited for", long), engine.submit("Left", long)

        async def leave() -> None:
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(handle, 0.01)
            async for _ in left:
                break

        asyncio.run(leave())
        assert [len(h.result(120)[0].token_ids) for h in (handle, left)] == [400, 400]

        async def cancel() -> str | None:
            other = engine.submit("Cancelled", long)
            async for _ in other:
                other.cancel()
            return (await other)[0].finish_reason

        assert asyncio.run(cancel()) == "cancelled"
        with pytest.raises(ValueError, match="sampling must be SamplingParams or None, got dict"):
            engine.submit("What?", {"max_new_tokens": 3})
        broken = engine.submit("What?", GREEDY, on_delta=lambda *_: _fail())
        assert broken.result(60)[0].finish_reason in ("stop", "length")
        stats = engine.stats()
        assert stats.waiting == stats.running == 0


def test_a_closed_engine_lets_go_of_its_memory(checkpoints) -> None:
    import gc
    import weakref

    model = lf.load(checkpoints["qwen_untied"])
    gc.disable()  # by counting references alone
    try:
        engine = lf.Engine(model)
        assert engine.submit("What?", GREEDY).result(60)[0].token_ids
        cache, engine_alive = weakref.ref(engine._core.runner.k), weakref.ref(engine._core.runner)
        engine.close()
        assert cache() is None
        del engine
        assert engine_alive() is None
    finally:
        gc.enable()


def test_deadlines(model) -> None:
    with lf.Engine(model) as engine:
        late = engine.submit(lf.Request("What?", deadline=0.0)).result(60)[0]
        assert late.finish_reason == "error" and late.error == "its deadline of 0.0 s passed before it was begun"
        turn = engine._core.turn
        engine._core.turn = lambda: (time.sleep(0.005), turn())[1]  # 2,000 tokens take 10 s, the first on any machine less than 3
        cut = engine.submit(lf.Request("What?", deadline=3.0), lf.SamplingParams(max_new_tokens=2000, min_new_tokens=2000))
        *_, last = cut
        answer = cut.result(60)[0]
        assert answer.error == "its deadline of 3.0 s passed" and 0 < len(answer.token_ids) < 2000
        assert last == Delta(0, answer.error, "error")


def test_a_picture_that_does_not_decode(model) -> None:
    with lf.Engine(model) as engine:
        good, bad = (engine.submit(lf.Request("<image>What?", images=[image]), GREEDY) for image in (picture(0), b"no picture"))
        assert good.result(60)[0].finish_reason in ("stop", "length")
        failed = bad.result(60)[0]
        assert failed.finish_reason == "error" and "image 1 of 1" in failed.error and isinstance(bad.error, ValueError)


def test_a_stream_that_nobody_reads(model) -> None:
    """Is kept as one text, and holds nobody up."""
    with lf.Engine(model) as engine:
        unread = engine.submit("What?", lf.SamplingParams(max_new_tokens=300, min_new_tokens=300))
        assert engine.submit("And?", GREEDY).result(60)
        completion = unread.result(60)[0]
        (whole,) = unread
        assert whole == Delta(0, completion.text, "length")


def test_a_stop_string_that_never_comes(model) -> None:
    answer = lf.generate(model, "What?", max_new_tokens=20, stop="\u2603never")
    assert answer.finish_reason in ("stop", "length") and answer.text == lf.generate(model, "What?", max_new_tokens=20).text


def test_an_engine_that_breaks_says_so(model, monkeypatch) -> None:
    engine = lf.Engine(model)
    monkeypatch.setattr(engine._core.scheduler, "plan", lambda *_: _fail())
    answer = engine.submit("What?", GREEDY).result(60)[0]
    assert answer.finish_reason == "error" and answer.error == "the engine stopped: RuntimeError: injected"
    with pytest.raises(RuntimeError, match="the engine has stopped: RuntimeError: injected"):
        engine.submit("What?")
    engine.close()


def test_many_threads_submit(model) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with lf.Engine(model, max_running=4) as engine, ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: engine.submit(f"Number {i % 5}", GREEDY).result(120)[0].token_ids, range(40)))
    assert [found[i] for i in range(40)] == [found[i % 5] for i in range(40)]


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(page=24), "page must be one of 16, 32, 64, 128, 256 rows, got 24"),
        (dict(max_rows=0), "max_rows must be an integer of at least 1, got 0"),
        (dict(kv_cache_bytes=10), "kv_cache_bytes=10 holds no block: 64 rows take"),
        (dict(kv_dtype=torch.int8), "kv_dtype must be one of torch.float32, .* got torch.int8"),
        (dict(max_mixed_rows=0), "max_mixed_rows must be an integer of at least 1, got 0"),
        (dict(speculate=-1), "speculate must be an integer of at least 0, got -1"),
    ],
)
def test_bad_options(options, message, model) -> None:
    with pytest.raises(ValueError, match=message):
        lf.Engine(model, **options)


# -- parts


def test_blocks() -> None:
    pool = BlockPool(3)
    a, b = pool.take(), pool.take()
    pool.publish(a, Content(b"a", b"", (1, 2)))
    pool.publish(b, Content(b"a", b"", (1, 2)))  # the same content again stays unknown
    assert pool.find(b"a") == a and pool.available == 1
    pool.release([a, b])
    assert pool.held == 1  # a, by who found it
    pool.release([a])
    assert pool.available == 3 and pool.find(b"a") == a
    pool.release([a])
    c, d, e = pool.take(), pool.take(), pool.take()
    assert {c, d} == {1, 2} and e == a and pool.find(b"a") is None  # what holds something is taken last


def test_rows_inside_blocks() -> None:
    pool = BlockPool(4)
    a, b = pool.take(), pool.take()
    pool.publish(a, Content(None, b"x", (1, 2)))
    pool.publish(b, Content(b"b", b"x", (1, 2, 3, 4)))
    assert pool.find_rows(b"x", (1, 2, 3, 9)) == (b, 3) and pool.find_rows(b"y", (1, 2)) is None and pool.find_rows(b"x", (2,)) is None
    pool.publish(a, Content(None, b"x", (1, 2, 3, 9, 9)))  # it has grown
    assert pool.find_rows(b"x", (1, 2, 3, 9)) == (a, 4)
    pool.release([a, a, b, b])
    assert pool.available == 4 and {pool.take() for _ in range(4)} == {0, 1, 2, 3}
    assert pool.find_rows(b"x", (1,)) is None and pool.find(b"b") is None


def test_features_by_bytes() -> None:
    cache = FeatureCache(100)
    for key in (b"a", b"b", b"c"):
        cache.put(key, torch.zeros(10, dtype=torch.float32))
        cache.get(b"a")
    assert cache.get(b"a") is not None and cache.get(b"b") is None and cache.bytes == 80 and len(cache) == 2
    cache.put(b"d", torch.zeros(1000))
    assert cache.get(b"d") is None and cache.bytes == 80
