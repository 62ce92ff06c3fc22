"""The model of bench/full_size.py's architecture on a device: views a second, prefill and decode tokens a second; and transformers'.

All sides have the same weights, pictures, prompts and caches, and each is compared with our pure torch ops' answer before it is timed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText

from bench.baselines import inference
from bench.full_size import config_05b, fill_random, relative_error
from llava_fast.batch import Sample, pack
from llava_fast.config import LlavaConfig, from_hf
from llava_fast.engine.engine import Engine
from llava_fast.engine.runner import DecodeStep
from llava_fast.engine.sequence import Prompt
from llava_fast.kernels.patchify import normalise
from llava_fast.limits import seconds
from llava_fast.models.llava import Llava
from llava_fast.requests import SamplingParams

Call = Callable[[], Tensor]
Row = dict[str, Any]
PAGE = 64
# Relative in norm. Against fp32, transformers in bf16 is off by 0.010 in the tower, 0.016 in a prefill and 0.017 in a decode step. A page
# of 64 keys of 600 that is lost makes 0.69, one key twice and another lost 0.11, a prompt without its first token 0.77, a mirrored
# picture 0.52.
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 2**-4}


@dataclass(frozen=True)
class Setup:
    """config: transformers'.  views: uint8.  ids: [prompts, length].  keys, values: of every layer [prompts, G, length, d].

    new: tokens of an answer.  small: in few layers and with few tokens.
    """

    model: Llava
    config: Any
    views: Tensor
    ids: Tensor
    keys: Tensor
    values: Tensor
    new: int
    small: bool

    @property
    def device(self) -> str:
        return self.model.device.type


@dataclass(frozen=True)
class Work:
    """What every side does.  kind: tower, prefill or decode.  prompts: none for the tower.  amount: in `unit`s."""

    kind: str
    title: str
    amount: int
    unit: str
    prompts: int = 0


def works(s: Setup) -> list[Work]:
    views, (most, length) = len(s.views), s.ids.shape
    made = [Work("tower", f"tower, {views} views", views, "views")]
    for n in (1, most):
        made.append(Work("prefill", f"prefill, {n} x {length} tokens", n * length, "tokens", n))
        made.append(Work("decode", f"decode at {length}, batch {n}", n, "tokens", n))
    return made


def random_model(config: LlavaConfig, device: str, dtype: torch.dtype) -> Llava:
    with torch.device("meta"):
        model = Llava(config)
    model = model.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    fill_random(model)
    return model


def setup(device: str, small: bool) -> Setup:
    """The values are as large as a mean over the context makes small: of size 1, half a context could be lost and no logit would tell."""
    config = config_05b(1999, 2, 2) if small else config_05b(151_000)
    config.text_config.vocab_size = 2000 if small else config.text_config.vocab_size
    views, prompts, length, new = (1, 2, 12, 3) if small else (32, 8, 1500, 64)
    model = random_model(from_hf(config), device, torch.float32 if device == "cpu" else torch.bfloat16)
    draw, c = torch.Generator(device).manual_seed(0), model.config.decoder
    size = config.vision_config.image_size
    # Noise: constant pictures take less power, and a GPU clocks higher on them.
    pictures = torch.randint(256, (views, 3, size, size), dtype=torch.uint8, device=device, generator=draw)
    ids = torch.randint(10, 1900, (prompts, length), device=device, generator=draw)
    keys, values = (torch.randn(prompts, c.kv_heads, length, c.head_dim, device=device, generator=draw) for _ in range(2))
    dtype = model.compute_dtype
    return Setup(model, config, pictures, ids, keys.to(dtype), (values * length**0.5).to(dtype), new, small)


def times(run: Callable[[], object], device: str, small: bool) -> dict[str, float]:
    """Milliseconds of a call: the median of five and the ends."""
    run()
    each = [seconds(run, device) * 1e3 for _ in range(1 if small else 5)]
    return {"ms": statistics.median(each), "ms_low": min(each), "ms_high": max(each)}


def checked(work: Work, side: str, run: Call, truth: Mapping[str, Tensor], s: Setup) -> Row:
    """A row that says how far the answer is off; void where that is too far, and then not to be timed."""
    found, expected = run().float(), truth[work.title].float()
    error = relative_error(found, expected) if found.shape == expected.shape else math.inf
    return {"name": f"{work.title}, {side}", "error": error} | ({} if error <= BOUNDS[s.model.stored_dtype] else {"void": True})


def row_of(work: Work, side: str, run: Call, truth: Mapping[str, Tensor], s: Setup) -> Row:
    row = checked(work, side, run, truth, s)
    if "void" in row:
        return row
    row |= times(run, s.device, s.small)
    return row | {f"{work.unit}_per_s": work.amount / row["ms"] * 1e3}


# --- ours


def decoding(model: Llava, keys: Tensor, values: Tensor, token: Tensor) -> Call:
    """step() -> logits [B, V] of `token` [B] after the keys and values [B, G, K, d] that each layer has: the engine's step."""
    B, G, K, d = keys.shape
    blocks = K // PAGE + 1
    pages = []
    for past in (keys, values):
        pool = past.new_zeros(model.config.decoder.layers, B * blocks + 1, PAGE, G, d)
        pool[:, :-1].view(-1, B, blocks * PAGE, G, d)[:, :, :K] = past.transpose(1, 2)
        pages.append(pool)
    step = DecodeStep(model, pages[0], pages[1], B, blocks)
    table = torch.arange(B * blocks, device=token.device).view(B, blocks)
    positions = torch.full((B,), K, device=token.device)
    return lambda: step(token, positions, table)


def our_call(s: Setup, work: Work) -> Call:
    model, n = s.model, work.prompts
    if work.kind == "tower":
        return lambda: model.features(s.views)
    if work.kind == "decode":
        return decoding(model, s.keys[:n], s.values[:n], s.ids[:n, 0])
    batch = pack([Sample(token_ids=ids) for ids in s.ids[:n].cpu().numpy()], needed="last").to(s.device)
    return lambda: model.logits(model.hidden(batch))


@torch.no_grad()
def answers(s: Setup) -> dict[str, Tensor]:
    """Ours by the ops in use, by the titles of the works: what every side is held against."""
    return {work.title: our_call(s, work)().clone() for work in works(s)}


def engine_decoding(s: Setup, count: int) -> dict[str, float]:
    """Of a step of `count` sequences in the engine: answers of all tokens less answers of one."""
    c, rows = s.model.config.decoder, count * (s.ids.shape[1] + s.new + PAGE)
    prompts = [Prompt(ids, (), ids.tolist()) for ids in s.ids[:count].cpu().numpy()]

    def generate(tokens: int) -> None:
        params = SamplingParams(max_new_tokens=tokens)
        for handle in [engine.submit_prompt(prompt, params, ()) for prompt in prompts]:
            if (error := handle.result()[0].error) is not None:
                raise RuntimeError(error)

    cache = 2 * c.layers * rows * c.kv_heads * c.head_dim * s.model.compute_dtype.itemsize
    with Engine(s.model, prefix_cache=False, max_running=count, kv_cache_bytes=cache) as engine:
        whole, one = (times(lambda tokens=tokens: generate(tokens), s.device, s.small)["ms"] for tokens in (s.new, 1))  # type: ignore[misc]
    step = (whole - one) / (s.new - 1)
    return {"ms_per_step": step, "tokens_per_s": count / step * 1e3}


def measure_ours(s: Setup, side: str, truth: Mapping[str, Tensor]) -> Iterator[Row]:
    """By the ops in use, which `side` names."""
    for work in works(s):
        with torch.no_grad():
            call = our_call(s, work)
            row = (checked if work.kind == "decode" else row_of)(work, side, call, truth, s)
        yield row | (engine_decoding(s, work.prompts) if work.kind == "decode" and "void" not in row else {})


# --- transformers on the same weights


@torch.no_grad()
def transformers_like(s: Setup) -> Any:
    with torch.device(s.device):
        theirs = AutoModelForImageTextToText.from_config(s.config, dtype=s.model.stored_dtype).eval().requires_grad_(False)
    missing = theirs.load_state_dict({f"model.{name}": tensor for name, tensor in s.model.state_dict().items()}, strict=False)
    unfilled = [name for name in missing.missing_keys if "post_layernorm" not in name and name != "lm_head.weight"]  # not used; tied
    assert not unfilled and not missing.unexpected_keys, (unfilled, missing.unexpected_keys)
    return theirs


def their_call(s: Setup, model: Any, work: Work) -> Call:
    n = work.prompts
    if work.kind == "tower":
        pixels = normalise(s.views)
        return lambda: inference.tower(model, pixels)
    if work.kind == "prefill":
        return lambda: model(input_ids=s.ids[:n], use_cache=True, logits_to_keep=1).logits[:, -1]
    return inference.decoding(model, *past_of(s, n), s.ids[:n, 0])


def past_of(s: Setup, count: int) -> tuple[list[Tensor], list[Tensor]]:
    layers = s.model.config.decoder.layers
    return [s.keys[:count]] * layers, [s.values[:count]] * layers


@torch.inference_mode()
def measure_attention(s: Setup, theirs: Any, attention: str, truth: Mapping[str, Tensor]) -> Iterator[Row]:
    """All works by transformers' 'eager', 'sdpa', 'flash_attention_2': a row each, or one that says why there are none."""
    side = f"transformers {attention}"
    try:
        model = inference.with_attention(theirs, attention)
    except (ImportError, ValueError) as error:
        yield {"name": side, "absent": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
        return
    for work in works(s):
        yield row_of(work, side, their_call(s, model, work), truth, s)


@torch.inference_mode()
def measure_static(s: Setup, theirs: Any, compile: bool, truth: Mapping[str, Tensor]) -> Iterator[Row]:
    """Decoding with a static cache."""
    options: dict[str, Any] = {"backend": "eager"} if s.small else {"mode": "reduce-overhead"}
    for work in works(s):
        if work.kind != "decode":
            continue
        n, side = work.prompts, "transformers static cache" + ", compiled" * compile
        asked = options | {"fullgraph": True, "dynamic": False} if compile else {}
        step = inference.static_decoding(inference.sharing(theirs), *past_of(s, n), s.ids[:n, 0], compile, **asked)
        took = {"compile_s": inference.compiling(step)} if compile else {}
        yield row_of(work, side, step, truth, s) | took
