"""The model of bench/full_size.py's architecture on a device: views a second, prefill and decode tokens a second."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from bench.full_size import config_05b
from llava_fast.batch import Sample, pack
from llava_fast.config import LlavaConfig, from_hf
from llava_fast.engine.engine import Engine
from llava_fast.engine.sequence import Prompt
from llava_fast.limits import seconds
from llava_fast.models.llava import Llava
from llava_fast.requests import SamplingParams


def random_model(config: LlavaConfig, device: str, dtype: torch.dtype) -> Llava:
    """Matrices of N(0, 1 / inputs): activations keep their size through the depth."""
    with torch.device("meta"):
        model = Llava(config)
    model = model.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.fill_(1.0) if parameter.ndim == 1 else parameter.normal_(std=parameter[0].numel() ** -0.5)
    return model


def kv_bytes(model: Llava, rows: int) -> int:
    c = model.config.decoder
    return 2 * c.layers * rows * c.kv_heads * c.head_dim * model.compute_dtype.itemsize


def measure_model(device: str, small: bool) -> Iterator[dict[str, Any]]:
    """small: two layers of each part, one view, few tokens."""
    config = from_hf(config_05b(image_token_id=151_000))
    if small:
        vision = dataclasses.replace(config.vision, layers=2)
        config = dataclasses.replace(config, vision=vision, decoder=dataclasses.replace(config.decoder, layers=2, vocab_size=2000))
        config = dataclasses.replace(config, image_token_id=1999)
    model = random_model(config, device, torch.float32 if device == "cpu" else torch.bfloat16)
    views, prompts, length, new = (1, 2, 12, 3) if small else (32, 8, 1500, 64)

    pixels = torch.zeros(views, 3, config.vision.image_size, config.vision.image_size, dtype=torch.uint8, device=device)

    def best(run: Any) -> float:
        run()
        return min(seconds(run, device) for _ in range(1 if small else 3))

    time = best(lambda: model.features(pixels))
    yield {"name": f"tower, {views} views", "views_per_s": views / time, "ms": time * 1e3}

    rng = np.random.default_rng(0)
    for count in (1, prompts):
        samples = [Sample(token_ids=rng.integers(10, 1900, length)) for _ in range(count)]
        batch = pack(samples, needed="last").to(device)
        with torch.no_grad():
            time = best(lambda batch=batch: model.logits(model.hidden(batch)))
        yield {"name": f"prefill, {count} x {length} tokens", "tokens_per_s": count * length / time, "ms": time * 1e3}

        prompts = [Prompt(sample.token_ids, (), sample.token_ids.tolist()) for sample in samples]

        def generate(steps: int, prompts: list[Prompt] = prompts) -> None:
            params = SamplingParams(max_new_tokens=steps)
            for handle in [engine.submit_prompt(prompt, params, ()) for prompt in prompts]:
                if (error := handle.result()[0].error) is not None:
                    raise RuntimeError(error)

        with Engine(model, prefix_cache=False, max_running=count, kv_cache_bytes=kv_bytes(model, count * (length + new + 64))) as engine:
            time = (best(lambda: generate(new)) - best(lambda: generate(1))) / (new - 1)
        yield {"name": f"decode at {length}, batch {count}", "tokens_per_s": count / time, "ms_per_step": time * 1e3}
