"""The model of bench/full_size.py's architecture on a device: views a second, prefill and decode tokens a second; and transformers'."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForImageTextToText

from bench.baselines import inference
from bench.full_size import config_05b, relative_error
from llava_fast.batch import Sample, pack
from llava_fast.config import LlavaConfig, from_hf
from llava_fast.engine.engine import Engine
from llava_fast.engine.sequence import Prompt
from llava_fast.kernels.patchify import normalise
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


def hf_config(small: bool) -> Any:
    """small: two layers of each part and few tokens."""
    config = config_05b(1999, 2, 2) if small else config_05b(151_000)
    config.text_config.vocab_size = 2000 if small else config.text_config.vocab_size
    return config


def sizes(small: bool) -> tuple[int, int, int, int]:
    """Views, prompts, their length, new tokens of each."""
    return (1, 2, 12, 3) if small else (32, 8, 1500, 64)


def best(run: Any, device: str, small: bool) -> float:
    run()
    return min(seconds(run, device) for _ in range(1 if small else 3))


def views_of(count: int, size: int, device: str) -> torch.Tensor:
    """The same noise for every side, uint8: constant pictures take less power, and a GPU clocks higher on them."""
    generator = torch.Generator(device).manual_seed(0)
    return torch.randint(256, (count, 3, size, size), dtype=torch.uint8, device=device, generator=generator)


def measure_model(device: str, small: bool) -> Iterator[dict[str, Any]]:
    config = from_hf(hf_config(small))
    model = random_model(config, device, torch.float32 if device == "cpu" else torch.bfloat16)
    views, prompts, length, new = sizes(small)

    pixels = views_of(views, config.vision.image_size, device)
    time = best(lambda: model.features(pixels), device, small)
    yield {"name": f"tower, {views} views", "views_per_s": views / time, "ms": time * 1e3}

    rng = np.random.default_rng(0)
    for count in (1, prompts):
        samples = [Sample(token_ids=rng.integers(10, 1900, length)) for _ in range(count)]
        batch = pack(samples, needed="last").to(device)
        with torch.no_grad():
            time = best(lambda batch=batch: model.logits(model.hidden(batch)), device, small)
        yield {"name": f"prefill, {count} x {length} tokens", "tokens_per_s": count * length / time, "ms": time * 1e3}

        prompts = [Prompt(sample.token_ids, (), sample.token_ids.tolist()) for sample in samples]

        def generate(steps: int, prompts: list[Prompt] = prompts) -> None:
            params = SamplingParams(max_new_tokens=steps)
            for handle in [engine.submit_prompt(prompt, params, ()) for prompt in prompts]:
                if (error := handle.result()[0].error) is not None:
                    raise RuntimeError(error)

        with Engine(model, prefix_cache=False, max_running=count, kv_cache_bytes=kv_bytes(model, count * (length + new + 64))) as engine:
            time = (best(lambda: generate(new), device, small) - best(lambda: generate(1), device, small)) / (new - 1)
        yield {"name": f"decode at {length}, batch {count}", "tokens_per_s": count / time, "ms_per_step": time * 1e3}


# --- transformers on the same weights


def transformers_like(model: Llava, config: Any) -> Any:
    with torch.device(model.device):
        theirs = AutoModelForImageTextToText.from_config(config, dtype=model.stored_dtype).eval().requires_grad_(False)
    missing = theirs.load_state_dict({f"model.{name}": tensor for name, tensor in model.state_dict().items()}, strict=False)
    unfilled = [name for name in missing.missing_keys if "post_layernorm" not in name and name != "lm_head.weight"]  # not used; tied
    assert not unfilled and not missing.unexpected_keys, (unfilled, missing.unexpected_keys)
    return theirs


def attentions(theirs: Any, device: str) -> dict[str, Any]:
    """By name: the same weights with each kind of attention that is here. On a GPU also FlashAttention."""
    found = {"sdpa": theirs}
    for name in ("flash_attention_2",) if device == "cuda" else ():
        try:
            found[name] = inference.with_attention(theirs, name)
        except (ImportError, ValueError):
            pass  # not installed
    return found


@torch.inference_mode()
def measure_transformers(device: str, small: bool) -> Iterator[dict[str, Any]]:
    """The rows of measure_model on transformers' side, each answer compared with ours first; what compiles comes last, for it may take what
    is left of the time."""
    config = hf_config(small)
    ours = random_model(from_hf(config), device, torch.float32 if device == "cpu" else torch.bfloat16)
    theirs = transformers_like(ours, config)
    views, prompts, length, _ = sizes(small)
    bound = 1e-4 if ours.stored_dtype == torch.float32 else 2**-8 * config.vision_config.num_hidden_layers
    text = config.text_config
    generator = torch.Generator(device).manual_seed(0)
    pixels = normalise(views_of(views, config.vision_config.image_size, device))
    ids = torch.randint(10, 1900, (prompts, length), device=device, generator=generator)
    shape = (prompts, text.num_key_value_heads, length, text.hidden_size // text.num_attention_heads)
    past = [torch.randn(shape, device=device, generator=generator) for _ in range(2)]

    def row(name: str, run: Any, expected: torch.Tensor, count: int, unit: str) -> dict[str, Any]:
        """Without figures where the answer is another."""
        if (error := relative_error(run().float(), expected.float())) > bound:
            return {"name": name, "void": True, "error": error}
        time = best(run, device, small)
        return {"name": name, f"{unit}_per_s": count / time, "ms": time * 1e3, "error": error}

    sides, features = attentions(theirs, device), ours.features(pixels)
    wanted = {}
    for name, model in sides.items():
        side = f"transformers {name}"
        yield row(f"tower, {views} views, {side}", lambda model=model: inference.tower(model, pixels), features, views, "views")
        for count in (1, prompts):
            samples = [Sample(token_ids=prompt.cpu().numpy()) for prompt in ids[:count]]
            expected = ours.logits(ours.hidden(pack(samples, needed="last").to(device)))

            def prefill(model: Any = model, count: int = count) -> torch.Tensor:
                return model(input_ids=ids[:count], use_cache=True, logits_to_keep=1).logits[:, -1]

            yield row(f"prefill, {count} x {length} tokens, {side}", prefill, expected, count * length, "tokens")
            keys, values = ([each[:count]] * text.num_hidden_layers for each in past)
            step = inference.decoding(model, keys, values, ids[:count, 0])
            wanted.setdefault(count, step())  # ours decodes in its engine's own cache; these against each other
            yield row(f"decode at {length}, batch {count}, {side}", step, wanted[count], count, "tokens")
    options = {"backend": "eager"} if small else {"mode": "reduce-overhead"}
    for count in (1, prompts):
        keys, values = ([each[:count]] * text.num_hidden_layers for each in past)
        step = inference.static_decoding(inference.sharing(theirs), keys, values, ids[:count, 0], fullgraph=True, dynamic=False, **options)
        took = inference.compiling(step)
        name = f"decode at {length}, batch {count}, transformers static cache, compiled"
        yield {**row(name, step, wanted[count], count, "tokens"), "compile_s": took}
