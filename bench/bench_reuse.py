"""Pictures that are shown again, against what transformers lets a caller keep of them, in fp32.

`pytest bench/bench_reuse.py --benchmark-only --record reuse` writes the results; with --long the second question on the whole 0.5b
architecture. Random weights; a round is void where the answers differ.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import llava_fast as lf
from bench.baselines import reuse, static_batching
from bench.full_size import make_full_size
from bench.workload import Asked, photograph, prompt
from llava_fast.kernels._native import release_threads

LAYERS, NEW, SAMPLES, ROUNDS = 4, 8, 8, 2
SIZE = (640, 480)
QUESTIONS = tuple(f"{n} What is in the pictures?" for n in range(1, 5))  # of one length in tokens, so that nobody pads


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_full_size(tmp_path_factory.mktemp("reuse") / "model", tower_layers=LAYERS, decoder_layers=LAYERS)


@pytest.fixture(scope="module")
def models(checkpoint: Path) -> tuple[Any, Any, Any]:
    """Ours, transformers' and its processor."""
    return both(checkpoint)


def both(checkpoint: Path) -> tuple[Any, Any, Any]:
    ours = lf.load(checkpoint, device="cpu")
    ours.generation_config.eos_token_id = []
    return ours, *static_batching.load(checkpoint)


def in_turns(sides: Mapping[str, Callable[[int], Any]], rounds: int, same: bool = True) -> dict[str, dict[str, float]]:
    """Median seconds of each, called with the number of the round; that of number 0 does not count. Void where answers differ, in all
    rounds (`same`) or in that one."""
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(rounds + 1):
        answers = {}
        for side, run in sides.items():
            release_threads()  # those of the side before would still wait for work on the cores
            begun = time.perf_counter()
            answers[side] = run(number)
            seconds[side].append(time.perf_counter() - begun)
        assert (number and not same) or all(answer == answers["llava_fast"] for answer in answers.values()), answers
    return {side: {"s": statistics.median(times[1:])} for side, times in seconds.items()}


def second_question(ours: Any, theirs: Any, processor: Any, rounds: int) -> dict[str, dict[str, float]]:
    """Seconds to the first token of another question on four photographs that were asked about before.

    as_used: processor and generate over the whole prompt.  features: their features kept, ids put together by hand, prefill.  by_hand: the
    prompt up to the question in a cache that is cropped for each question, the question alone tokenised and fed.
    """
    pictures = [photograph(i, SIZE) for i in range(4)]
    texts = [f"{n} What is in the pictures, and what do they have in common?" for n in ("First.", "And now?", "Then.", "Once more.")]
    params = lf.SamplingParams(max_new_tokens=1)
    with torch.inference_mode(), lf.Engine(ours) as engine:
        begun = processor(images=pictures, text=prompt(pictures, ""), return_tensors="pt")
        rows = reuse.features(theirs, begun["pixel_values"])
        kept = reuse.prefill(theirs, begun["input_ids"], rows)

        def with_engine(number: int) -> list[int]:
            return engine.submit(lf.Request(prompt(pictures, texts[number]), images=pictures), params).result()[0].token_ids

        def as_used(number: int) -> list[int]:
            inputs = processor(images=pictures, text=prompt(pictures, texts[number]), return_tensors="pt")
            return theirs.generate(**inputs, max_new_tokens=1, do_sample=False, eos_token_id=[], pad_token_id=0)[0, -1:].tolist()

        def features(number: int) -> list[int]:
            ids = processor.tokenizer(texts[number], return_tensors="pt", add_special_tokens=False)["input_ids"]
            whole = reuse.embeddings(theirs, torch.cat([begun["input_ids"], ids], 1), rows)
            return theirs(inputs_embeds=whole, use_cache=True, logits_to_keep=1).logits[0, -1].argmax(-1, keepdim=True).tolist()

        def by_hand(number: int) -> list[int]:
            return reuse.questions(theirs, processor.tokenizer, kept, [texts[number]], 1)[0]

        return in_turns({"llava_fast": with_engine, "as_used": as_used, "features": features, "by_hand": by_hand}, rounds)


def record_second_question(sides: dict[str, dict[str, float]], name: str, record_sides: Callable[..., Any], **facts: Any) -> None:
    for side in ("as_used", "features", "by_hand"):
        record_sides(f"{name}_{side}", {"llava_fast": sides["llava_fast"], side: sides[side]}, "s", **facts)


def test_second_question(models: Any, benchmark: Any, record_sides: Any) -> None:
    sides = benchmark.pedantic(second_question, args=(*models, ROUNDS), rounds=1)
    record_second_question(sides, f"second_question_{LAYERS}_layers", record_sides, rounds=ROUNDS, layers=LAYERS)


@pytest.mark.long
def test_second_question_05b(full_size: Path, benchmark: Any, record_sides: Any) -> None:
    """On all 26 and 24 layers."""
    sides = benchmark.pedantic(second_question, args=(*both(full_size), ROUNDS), rounds=1)
    record_second_question(sides, "second_question_four_photographs", record_sides, rounds=ROUNDS)


def test_shared_pictures(models: Any, benchmark: Any, record_sides: Any) -> None:
    """Four questions at once about the same two photographs, which nobody has seen, answered in 8 tokens each.

    batch: a padded batch, each question with its own copy of the pictures.  by hand: the pictures' features and cache made once, the cache
    copied for each question, the questions fed as a batch.
    """
    ours, theirs, processor = models

    def new_pictures(number: int) -> list[Any]:
        return [photograph(100 + 2 * number + i, SIZE) for i in range(2)]

    with torch.inference_mode(), lf.Engine(ours) as engine:

        def with_engine(number: int) -> list[list[int]]:
            pictures, params = new_pictures(number), lf.SamplingParams(max_new_tokens=NEW)
            handles = [engine.submit(lf.Request(prompt(pictures, text), images=pictures), params) for text in QUESTIONS]
            return [handle.result()[0].token_ids for handle in handles]

        def batch(number: int) -> list[list[int]]:
            pictures = new_pictures(number)
            return static_batching.answer(theirs, processor, [Asked(pictures, text, NEW) for text in QUESTIONS])[0]

        def by_hand(number: int) -> list[list[int]]:
            pictures = new_pictures(number)
            begun = processor(images=pictures, text=prompt(pictures, ""), return_tensors="pt")
            kept = reuse.prefill(theirs, begun["input_ids"], reuse.features(theirs, begun["pixel_values"]))
            kept.batch_repeat_interleave(len(QUESTIONS))
            return reuse.questions(theirs, processor.tokenizer, kept, QUESTIONS, NEW)

        run = {"llava_fast": with_engine, "transformers, a batch": batch, "transformers, cache by hand": by_hand}
        sides = benchmark.pedantic(in_turns, args=(run, ROUNDS), rounds=1)
    record_sides("reuse_4_questions_at_once", sides, "s", rounds=ROUNDS, layers=LAYERS, new_tokens=NEW)


def test_samples(models: Any, benchmark: Any, record_sides: Any) -> None:
    """Eight samples of 16 tokens from one prompt with a photograph. The first round, not timed, samples from the likeliest token alone,
    which is the same on all sides.

    num_return_sequences: transformers' way, which sees the picture once and computes the prompt eight times.  by hand: a cache of the
    prompt, made once and copied for each sample.
    """
    ours, theirs, processor = models
    new = 2 * NEW

    def pictures_of(number: int) -> list[Any]:
        return [photograph(50 + number, SIZE)]

    with torch.inference_mode(), lf.Engine(ours) as engine:

        def with_engine(number: int) -> list[list[int]]:
            pictures = pictures_of(number)
            params = lf.SamplingParams(max_new_tokens=new, temperature=1.0, top_k=int(number == 0), n=SAMPLES, seed=number)
            answers = engine.submit(lf.Request(prompt(pictures, QUESTIONS[0]), images=pictures), params).result()
            return [answer.token_ids for answer in answers]

        def num_return_sequences(number: int) -> list[list[int]]:
            pictures = pictures_of(number)
            inputs = processor(images=pictures, text=prompt(pictures, QUESTIONS[0]), return_tensors="pt")
            how = dict(do_sample=True, top_k=int(number == 0), num_return_sequences=SAMPLES, eos_token_id=[], pad_token_id=0)
            return theirs.generate(**inputs, **how, max_new_tokens=new)[:, inputs["input_ids"].shape[1] :].tolist()

        def by_hand(number: int) -> list[list[int]]:
            pictures = pictures_of(number)
            inputs = processor(images=pictures, text=prompt(pictures, QUESTIONS[0]), return_tensors="pt")
            ids = inputs["input_ids"]
            kept = reuse.prefill(theirs, ids[:, :-1], reuse.features(theirs, inputs["pixel_values"]))
            kept.batch_repeat_interleave(SAMPLES)
            last = ids[:, -1:].expand(SAMPLES, 1)
            return reuse.decode(theirs, kept, last, new, likeliest if number == 0 else sampled)

        run = {"llava_fast": with_engine, "num_return_sequences": num_return_sequences, "transformers, cache by hand": by_hand}
        sides = benchmark.pedantic(in_turns, args=(run, ROUNDS, False), rounds=1)
    record_sides("reuse_8_samples", sides, "s", rounds=ROUNDS, layers=LAYERS, new_tokens=new)


def likeliest(logits: torch.Tensor) -> torch.Tensor:
    return logits.argmax(-1)


def sampled(logits: torch.Tensor) -> torch.Tensor:
    return logits.softmax(-1).multinomial(1)[:, 0]
