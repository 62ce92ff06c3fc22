"""Serving with transformers: the usual loop that takes what waits, pads it on the left and generates until the longest answer is done.

The strongest form of it: of what waits, the batch is that run of neighbours by length with the oldest request in it that computes the
fewest rows; a request counts as answered with its own last token, and the memory that a step frees stays with the process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration
from transformers.generation.streamers import BaseStreamer

from bench.workload import Asked, Served
from llava_fast.engine.stats import latencies
from llava_fast.memory import keep_freed_memory


class Clock(BaseStreamer):
    """When the prompt was taken in, and each token after it was made."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def load(checkpoint: str | Path) -> tuple[LlavaForConditionalGeneration, Any]:
    """In fp32, for answers at its accuracy, as ours are; and its processor."""
    keep_freed_memory()  # as loading does on our side: without it a step faults in its copy of the cache, page by page
    model = LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="sdpa").eval()
    return model, AutoProcessor.from_pretrained(checkpoint, padding_side="left")


def choose(waiting: Sequence[int], lengths: Sequence[int], at_most: int) -> list[int]:
    """Of requests that wait (the oldest first), those of the next batch: neighbours by length, the oldest among them."""
    ranked = sorted(waiting, key=lambda i: lengths[i])
    size, oldest = min(at_most, len(ranked)), ranked.index(waiting[0])
    firsts = range(max(0, oldest - size + 1), min(oldest, len(ranked) - size) + 1)
    best = min(firsts, key=lambda first: lengths[ranked[first + size - 1]])
    return ranked[best : best + size]


def answer(model: Any, processor: Any, batch: Sequence[Asked]) -> tuple[list[list[int]], list[float]]:
    """The ids of each, and the times of the batch's tokens."""
    pictures = [picture for asked in batch for picture in asked.pictures]
    inputs = processor(images=pictures or None, text=[asked.prompt for asked in batch], padding=True, return_tensors="pt")
    clock, longest = Clock(), max(asked.new for asked in batch)
    with torch.inference_mode():
        out = model.generate(**inputs, max_new_tokens=longest, do_sample=False, eos_token_id=[], pad_token_id=0, streamer=clock)
    new = out[:, inputs["input_ids"].shape[1] :].tolist()
    return [row[: asked.new] for row, asked in zip(new, batch, strict=True)], clock.times[1:]


def serve(
    run: Callable[[list[Asked]], tuple[list[list[int]], list[float]]],
    asked: Sequence[Asked],
    arrivals: Sequence[float] | None,
    clients: int,
    at_most: int,
) -> Served:
    """arrivals: seconds from now; None: `clients` who ask again as soon as they have an answer."""
    start = time.perf_counter()
    due = dict(enumerate(start + at for at in ([0.0] * min(clients, len(asked)) if arrivals is None else arrivals)))
    came, lengths = dict(due), [len(one.pictures) * 1000 + len(one.text) for one in asked]
    first, between, ids, last = {}, [], {}, start
    while due:
        now = time.perf_counter()
        waiting = [i for i in due if due[i] <= now]
        if not waiting:
            time.sleep(min(due.values()) - now)
            continue
        batch = choose(waiting, lengths, at_most)
        answers, times = run([asked[i] for i in batch])
        for i, own in zip(batch, answers, strict=True):
            del due[i]
            first[i], ids[i], last = times[0] - came[i], own, max(last, times[len(own) - 1])
            between += [b - a for a, b in zip(times, times[1 : len(own)], strict=False)]
            if arrivals is None and len(came) < len(asked):  # the next client's turn, when this answer was whole
                due[len(came)] = came[len(came)] = times[len(own) - 1]
    order = range(len(asked))
    tokens = sum(map(len, ids.values()))
    return Served([first[i] for i in order], latencies(between), last - start, tokens, [ids[i] for i in order])
