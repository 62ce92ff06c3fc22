"""transformers' model at inference, the ways that people speed it up: attention, dtype, int8, a static cache with torch.compile.

Each is a function of the same inputs as ours and gives the model's answer. On a GPU also FlashAttention, where it is installed.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, LlavaForConditionalGeneration, StaticCache


def load(path: Any, dtype: torch.dtype = torch.float32, **options: Any) -> LlavaForConditionalGeneration:
    return LlavaForConditionalGeneration.from_pretrained(path, dtype=dtype, **options).eval()


def has_bf16_units() -> bool:
    """Whether the CPU multiplies bf16 (AVX512-BF16, AMX): elsewhere bf16 runs at a sixth of fp32's rate."""
    return bool(torch.cpu._is_avx512_bf16_supported())


def sharing(model: Any) -> Any:
    """A model of its own on the same weights."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]})


def with_attention(model: Any, name: str) -> Any:
    """A model on the same weights whose attention is 'eager', 'sdpa', 'flash_attention_2', ..."""
    other = sharing(model)
    other.set_attn_implementation(name)
    return other


def tower(model: Any, pixels: Tensor) -> Tensor:
    """[N, 3, S, S] -> [N, P, E], what the projector takes: the hidden states before the last norm."""
    return model.model.vision_tower(pixels.to(model.dtype), output_hidden_states=True).hidden_states[-1].float()


def prefill(model: Any, embeds: Tensor) -> Tensor:
    """Last logits [1, V] of embeddings [T, D]; makes the cache that decoding would go on with."""
    return model(inputs_embeds=embeds[None].to(model.dtype), use_cache=True, logits_to_keep=1).logits[0].float()


Past = Sequence[Tensor]  # of each layer [B, G, K, d]


def decoding(model: Any, keys: Past, values: Past, token: Tensor) -> Callable[[], Tensor]:
    """step() -> logits [B, V] of `token` [B] after the past, with the growing cache; the step is taken back each time."""
    past = DynamicCache()
    for layer, (k, v) in enumerate(zip(keys, values, strict=True)):
        past.update(k.to(model.dtype), v.to(model.dtype), layer)
    position = torch.full((len(token), 1), keys[0].shape[2], device=token.device)

    def step() -> Tensor:
        logits = model(input_ids=token[:, None], past_key_values=past, position_ids=position, use_cache=True).logits[:, 0]
        past.crop(-1)
        return logits.float()

    return step


def static_decoding(model: Any, keys: Past, values: Past, token: Tensor, compile: bool = True, **options: Any) -> Callable[[], Tensor]:
    """The same with a static cache of one row more than the past, and the forward compiled: generate compiles on a GPU alone, so this is by
    hand. options: torch.compile's. The first calls compile: `compiling` times them."""
    length = keys[0].shape[2]
    past = StaticCache(config=model.config.text_config, max_cache_len=length + 1)
    for layer, (k, v) in enumerate(zip(keys, values, strict=True)):
        past.update(k.to(model.dtype), v.to(model.dtype), layer)
    position = torch.full((len(token), 1), length, device=token.device)
    inner = torch.compile(model.forward, **options) if compile else model.forward

    def step() -> Tensor:
        for layer in past.layers:
            layer.cumulative_length.fill_(length)
        return inner(input_ids=token[:, None], past_key_values=past, position_ids=position, use_cache=True).logits[:, 0].float()

    return step


def compiling(step: Callable[[], Tensor]) -> float:
    """Seconds of the two calls in which a compiled function settles."""
    start = time.perf_counter()
    step()
    step()
    return time.perf_counter() - start


def dynamic_int8(model: Any) -> Any:
    """A copy whose decoder and head multiply in int8 with activations scaled as they come: torch's own quantisation for the CPU."""
    other = sharing(model)
    other.tie_weights = lambda *_, **__: None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", (DeprecationWarning, FutureWarning))  # torchao's successor of it wants torch.compile
        for part in (other.model.language_model, other):
            kinds = {torch.nn.Linear} if part is not other else {"lm_head": torch.ao.quantization.default_dynamic_qconfig}
            torch.ao.quantization.quantize_dynamic(part, kinds, dtype=torch.qint8, inplace=True)
    return other
