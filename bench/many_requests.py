"""One process of the throughput benchmark: `python -m bench.many_requests llava_fast|transformers m4|long CHECKPOINT`.

m4: 32 requests shaped like the first of bench/workloads/m4_mix.jsonl, 64 new tokens each.  long: 8 of one view, 256 new tokens.
At most 8 at a time on both sides: transformers takes them in padded batches of 8, sorted by length, which is the order that pads least.
Prints JSON: seconds and peak included by who watches, requests a second, milliseconds a decode step, and every request's ids.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

AT_A_TIME = 8
WORDS = "what is in the pictures and what do they have in common answer a sentence two".split()


def photograph(number: int, size: tuple[int, int]) -> Image.Image:
    """A crop of a photograph, of its own for each number, in this size (width, height)."""
    from sklearn.datasets import load_sample_images

    images = load_sample_images().images
    whole = Image.fromarray(images[number % 2])
    left, top = number * 37 % (whole.width // 2), number * 53 % (whole.height // 2)
    return whole.crop((left, top, left + whole.width // 2, top + whole.height // 2)).resize(size)


def questions(kind: str) -> tuple[list[tuple[list[Image.Image], str]], int]:
    """(pictures, text) of each request, and the new tokens."""
    rng = np.random.default_rng(0)
    if kind == "long":
        return [([photograph(i, (640, 480))], " ".join(rng.choice(WORDS, 20))) for i in range(8)], 256
    lines = (Path(__file__).parent / "workloads" / "m4_mix.jsonl").read_text().splitlines()
    asked, number = [], 0
    for record in map(json.loads, lines[:32]):
        pictures = [photograph(number + i, tuple(size)) for i, size in enumerate(record["sizes"])]
        number += len(pictures)
        asked.append((pictures, " ".join(rng.choice(WORDS, record["turns"][0][0]))))
    return asked, 64


def prompt(pictures: list[Image.Image], text: str) -> str:
    return "<image>" * len(pictures) + text


def with_llava_fast(kind: str, checkpoint: str) -> dict[str, Any]:
    import llava_fast as lf

    model = lf.load(checkpoint, device="cpu")
    model.generation_config.eos_token_id = []
    asked, new = questions(kind)
    start = time.perf_counter()
    with lf.Engine(model, max_running=AT_A_TIME) as engine:
        params = lf.SamplingParams(max_new_tokens=new)
        handles = [engine.submit(lf.Request(prompt(pictures, text), images=pictures), params) for pictures, text in asked]
        answers = [handle.result()[0] for handle in handles]
        total, stats = time.perf_counter() - start, engine.stats()
    assert all(answer.error is None for answer in answers), [answer.error for answer in answers]
    return {
        "total_s": total,
        "requests_per_s": len(asked) / total,
        "decode_ms": stats.inter_token["p50"] * 1e3,
        "ids": [answer.token_ids for answer in answers],
        "stats": dataclasses.asdict(stats),
    }


def with_transformers(kind: str, checkpoint: str) -> dict[str, Any]:
    import torch
    from transformers import AutoProcessor, LlavaForConditionalGeneration
    from transformers.generation.streamers import BaseStreamer

    from llava_fast.memory import keep_freed_memory

    keep_freed_memory()  # as loading does on the other side: without it a step faults in its copy of the cache, page by page
    model = LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(checkpoint, padding_side="left")
    asked, new = questions(kind)
    ids: dict[int, list[int]] = {}
    steps: list[float] = []

    class Clock(BaseStreamer):
        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, value: Any) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None:
            pass

    start = time.perf_counter()
    order = sorted(range(len(asked)), key=lambda i: (len(asked[i][0]), len(asked[i][1])))
    for first in range(0, len(order), AT_A_TIME):
        batch = order[first : first + AT_A_TIME]
        pictures = [picture for i in batch for picture in asked[i][0]]
        inputs = processor(images=pictures, text=[prompt(*asked[i]) for i in batch], padding=True, return_tensors="pt")
        clock = Clock()
        with torch.inference_mode():
            out = model.generate(**inputs, max_new_tokens=new, do_sample=False, eos_token_id=[], pad_token_id=0, streamer=clock)
        steps += [b - a for a, b in zip(clock.times[1:], clock.times[2:], strict=False)]
        ids |= {i: row[inputs["input_ids"].shape[1] :].tolist() for i, row in zip(batch, out, strict=True)}
    total = time.perf_counter() - start
    return {
        "total_s": total,
        "requests_per_s": len(asked) / total,
        "decode_ms": statistics.median(steps) * 1e3,
        "ids": [ids[i] for i in range(len(asked))],
    }


if __name__ == "__main__":
    side, kind, checkpoint = sys.argv[1:]
    print(json.dumps({"llava_fast": with_llava_fast, "transformers": with_transformers}[side](kind, checkpoint)))
