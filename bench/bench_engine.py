"""The engine against transformers in fp32: many requests at once, whole processes in turns; and a second question on the same pictures.

`pytest bench/bench_engine.py --benchmark-only --record engine` writes the results. Random weights; equal_requests counts the requests whose
ids are equal on both sides (one near tie among thousands of tokens makes a request differ from there on).
"""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoProcessor, DynamicCache, LlavaForConditionalGeneration

import llava_fast as lf
from bench.full_size import make_full_size
from bench.many_requests import photograph, prompt
from bench.memory import median_of, run_in_turns
from llava_fast.kernels._native import release_threads

ROUNDS = 3
SHOWN = (
    "time_to_first_token",
    "inter_token",
    "tokens_per_s",
    "views_per_s",
    "prefix_reused",
    "pictures_reused",
    "host_ms_per_step",
    "decode_gbs",
    "prefill_gflops",
)


@pytest.mark.parametrize("kind, layers, rounds", [("m4", 2, 1), ("long", 6, 2)])
def test_many_requests(kind: str, layers: int, rounds: int, tmp_path: Path, benchmark: Any, record_row: Any, limits: Any) -> None:
    checkpoint = make_full_size(tmp_path / "model", tower_layers=layers, decoder_layers=layers)
    sides = ("llava_fast", "transformers")
    commands = {side: ["-m", "bench.many_requests", side, kind, str(checkpoint)] for side in sides}
    runs = benchmark.pedantic(lambda: run_in_turns(commands, rounds, env={"PYTHONPATH": os.getcwd()}), rounds=1)
    ours, theirs = runs["llava_fast"], runs["transformers"]
    row = {"name": f"many_requests_{kind}", "device": "cpu", "layers": layers, "rounds": rounds}
    for key in ("total_s", "requests_per_s", "decode_ms", "anon"):
        name = {"anon": "anon_bytes"}.get(key, key)
        row[f"ours_{name}"], row[f"baseline_{name}"] = median_of(ours, key), median_of(theirs, key)
        gain = row[f"baseline_{name}"] / row[f"ours_{name}"]
        row[f"ratio_{name}"] = 1 / gain if key == "requests_per_s" else gain  # above 1: ours is better
    stats, machine = ours[0].report["stats"], limits("cpu")
    row["stats"] = {name: stats[name] for name in SHOWN}
    row["decode_of_limit"] = stats["decode_gbs"] / machine.read_gbs
    row["prefill_of_limit"] = stats["prefill_gflops"] / machine.fma_fp32_gflops
    row["requests"] = len(ours[0].report["ids"])
    row["equal_requests"] = sum(a == b for a, b in zip(ours[0].report["ids"], theirs[0].report["ids"], strict=True))
    assert row["equal_requests"] >= 0.8 * row["requests"], row
    record_row(row)
    benchmark.extra_info.update(row)


def test_second_question(full_size: Path, benchmark: Any, record_row: Any) -> None:
    """Seconds to the first token of another question on four photographs that were asked about before.

    As used: processor and generate over the whole prompt. By hand: the prompt up to the question in a cache that is cropped for each
    question, the question alone tokenised and fed.
    """
    pictures = [photograph(i, (640, 480)) for i in range(4)]
    texts = [f"{n} What is in the pictures, and what do they have in common?" for n in ("First.", "And now?", "Then.", "Once more.")]
    ours = lf.load(full_size, device="cpu")
    theirs = LlavaForConditionalGeneration.from_pretrained(full_size, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(full_size)
    ours.generation_config.eos_token_id = []
    params = lf.SamplingParams(max_new_tokens=1)

    def as_used(text: str) -> int:
        inputs = processor(images=pictures, text=prompt(pictures, text), return_tensors="pt")
        return int(theirs.generate(**inputs, max_new_tokens=1, do_sample=False, eos_token_id=[])[0, -1])

    with torch.inference_mode(), lf.Engine(ours) as engine:
        inputs = processor(images=pictures, text=prompt(pictures, ""), return_tensors="pt")
        kept = DynamicCache()
        theirs(**inputs, past_key_values=kept, use_cache=True, logits_to_keep=1)

        def by_hand(text: str) -> int:
            ids = processor.tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
            logits = theirs(input_ids=ids, past_key_values=kept, use_cache=True, logits_to_keep=1).logits
            kept.crop(-ids.shape[1])  # the question's tokens go again
            return int(logits[0, -1].argmax())

        def with_engine(text: str) -> int:
            return engine.submit(lf.Request(prompt(pictures, text), images=pictures), params).result()[0].token_ids[0]

        with_engine("What?")
        by_hand("What?")
        seconds: dict[str, list[float]] = {"ours": [], "as_used": [], "by_hand": []}
        sides = {"ours": with_engine, "by_hand": by_hand, "as_used": as_used}

        def rounds() -> None:
            for text in texts[:ROUNDS]:
                answers = {}
                for name, run in sides.items():
                    release_threads()  # those of the side before would still wait for work on the cores
                    begun = time.perf_counter()
                    answers[name] = run(text)
                    seconds[name].append(time.perf_counter() - begun)
                assert len(set(answers.values())) == 1, answers

        benchmark.pedantic(rounds, rounds=1)
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    for name in ("as_used", "by_hand"):
        row = {"name": f"second_question_four_photographs_{name}", "device": "cpu", "rounds": ROUNDS}
        row |= {
            "ours_s": middle["ours"],
            "baseline_s": middle[name],
            "ratio_s": middle[name] / middle["ours"],
            "ours_all_s": seconds["ours"],
        }
        record_row(row)
        benchmark.extra_info.update(row)
