"""Requests shaped like M4-Instruct's (bench/workloads/m4_mix.jsonl), when they arrive, and the figures of how they were served."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

WORKLOAD = Path(__file__).parent / "workloads" / "m4_mix.jsonl"
SCENARIOS = ("text", "single-image", "multi-image", "video", "3d")
WORDS = "what is in the pictures and what do they have in common answer a sentence two".split()


@dataclass(frozen=True)
class Asked:
    """new: tokens of its answer, which every side makes exactly."""

    pictures: list[Image.Image]
    text: str
    new: int

    @property
    def prompt(self) -> str:
        return prompt(self.pictures, self.text)


@dataclass(frozen=True)
class Served:
    """What a server did with some requests: seconds to each one's first token from its arrival, seconds between tokens (percentiles by
    'p50' and 'p95'), seconds from the first arrival to the last token, tokens in all, and every answer (its ids, or its text)."""

    first: list[float]
    between: dict[str, float]
    seconds: float
    tokens: int
    answers: Sequence[Any]


def prompt(pictures: Sequence[Image.Image], text: str) -> str:
    return "<image>" * len(pictures) + text


def photograph(number: int, size: tuple[int, int]) -> Image.Image:
    """A crop of a photograph, of its own for each number, in this size (width, height)."""
    from sklearn.datasets import load_sample_images

    images = load_sample_images().images
    whole = Image.fromarray(images[number % 2])
    left, top = number * 37 % (whole.width // 2), number * 53 % (whole.height // 2)
    return whole.crop((left, top, left + whole.width // 2, top + whole.height // 2)).resize(size)


def records(count: int, scenario: str | None = None, most_views: int | None = None) -> list[dict[str, Any]]:
    """The first `count` of the workload: of one scenario, or with at most so many views. 'text' has the questions of single pictures,
    without the picture: the mixture has no text of its own."""
    if scenario is not None and scenario not in SCENARIOS:
        raise ValueError(f"scenario must be one of {', '.join(SCENARIOS)}, got {scenario!r}")
    every = [json.loads(line) for line in WORKLOAD.read_text().splitlines()]
    like = "single-image" if scenario == "text" else scenario
    found = [r for r in every if like in (None, r["scenario"]) and r["views"] <= (most_views or r["views"])][:count]
    if len(found) < count:
        raise ValueError(f"{WORKLOAD.name} has {len(found)} such requests, {count} were asked for")
    return [{**r, "sizes": []} for r in found] if scenario == "text" else found


def requests(found: Sequence[dict[str, Any]], new: int, exactly: bool = False, part: int = 0) -> list[Asked]:
    """Pictures in a record's sizes, its first question's length in words, and its answer's in tokens: from 2 to `new`, or `new`. Another
    part has other words, and shares no picture."""
    rng, asked, number = np.random.default_rng(part), [], part * sum(len(record["sizes"]) for record in found)
    for record in found:
        pictures = [photograph(number + i, tuple(size)) for i, size in enumerate(record["sizes"])]
        number += len(pictures)
        question, answer = record["turns"][0]
        asked.append(Asked(pictures, " ".join(rng.choice(WORDS, question)), new if exactly else max(2, min(answer, new))))
    return asked


def arrivals(rate: float, count: int, seed: int = 0) -> list[float]:
    """Seconds at which `count` requests of a Poisson process of `rate` a second arrive in count / rate seconds: given their number, the
    times are uniform. Another rate stretches the same times."""
    if rate <= 0 or count < 1:
        raise ValueError(f"arrivals need a rate above 0 and a request at least, got rate={rate}, count={count}")
    return sorted((np.random.default_rng(seed).random(count) * (count / rate)).tolist())


def figures(served: Served) -> dict[str, float]:
    """One side of a measurement."""
    from llava_fast.engine.stats import percentile  # 100 MB with all that it imports, in processes whose memory is measured

    return {
        "first_token_p50_s": percentile(served.first, 50),
        "first_token_p95_s": percentile(served.first, 95),
        "inter_token_p50_ms": served.between["p50"] * 1e3,
        "inter_token_p95_ms": served.between["p95"] * 1e3,
        "requests_per_s": len(served.first) / served.seconds,
        "tokens_per_s": served.tokens / served.seconds,
    }
