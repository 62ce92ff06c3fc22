"""Prefill a pack of prompts, then decode all their sequences together, one token a step, with no padding.

Keys and values live in one contiguous cache: each sequence owns as many rows as it can ever need.
Shape letters: S sequences, T rows of a step, V vocabulary, G key-value heads, d head dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from llava_fast import memory
from llava_fast.batch import PackedBatch
from llava_fast.engine.sampling import choose
from llava_fast.models.decoder import KVCache
from llava_fast.models.llava import Llava
from llava_fast.requests import SamplingParams


@dataclass
class Sequence:
    """One continuation of prompt number `prompt`, which is `prompt_rows` rows. Whoever iterates may set finish_reason to end it."""

    prompt: int
    prompt_rows: int
    prompt_ids: list[int]
    params: SamplingParams
    max_new: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: Literal["stop", "length", "error"] | None = None
    generator: torch.Generator | None = None


def make_generator(seed: int | None, index: int, device: torch.device) -> torch.Generator | None:
    """A stream of its own for sample `index` of a seeded request."""
    return None if seed is None else torch.Generator(device).manual_seed((seed + 0x9E3779B97F4A7C15 * index) % 2**63)


def decode(
    model: Llava, batch: PackedBatch, sequences: list[Sequence], eos_ids: tuple[int, ...], embeds: Tensor | None = None
) -> Iterator[list[Sequence]]:
    """Run to the end; after each step yields the sequences that got a token (their last one), finish_reason set where it ends.

    batch: one packed sequence a prompt, made with needed='last'; `sequences` are ordered by prompt.  embeds: [T, D], in place
    of the batch's ids and pictures.  A sequence's tokens do not depend on the others.
    """
    cache, first_rows, logits_SV = _prefill(model, batch, sequences, embeds)
    eos = torch.tensor(eos_ids, dtype=torch.int64, device=model.device)
    live = list(range(len(sequences)))
    while live:
        running = [sequences[s] for s in live]
        picks = choose(
            logits_SV,
            [seq.params for seq in running],
            [(seq.prompt_ids, seq.tokens) for seq in running],
            [seq.generator for seq in running],
            eos,
        )
        if any(seq.params.logprobs for seq in running):
            chosen = logits_SV.log_softmax(-1).gather(1, picks[:, None])[:, 0].tolist()
            for seq, value in zip(running, chosen, strict=True):
                if seq.params.logprobs:
                    seq.logprobs.append(value)
        for seq, token in zip(running, picks.tolist(), strict=True):
            seq.tokens.append(token)
            if token in eos_ids:
                seq.finish_reason = "stop"
            elif len(seq.tokens) >= seq.max_new:
                seq.finish_reason = "length"
        yield running
        live = [s for s in live if sequences[s].finish_reason is None]
        if live:
            logits_SV = _step(model, cache, first_rows, [(s, sequences[s]) for s in live])


@torch.inference_mode()
def _prefill(model: Llava, batch: PackedBatch, sequences: list[Sequence], embeds: Tensor | None) -> tuple[KVCache, list[int], Tensor]:
    """The cache with every sequence's prompt in it, the row where each begins, and the first logits [S, V]."""
    decoder, device = model.config.decoder, model.device
    lengths = [seq.prompt_rows for seq in sequences]
    # The last token is never fed back, so a sequence needs one row less than its longest form.
    ends = torch.tensor([n + seq.max_new - 1 for n, seq in zip(lengths, sequences, strict=True)]).cumsum(0).tolist()
    first_rows = [0, *ends[:-1]]
    shape = (decoder.layers, ends[-1], decoder.kv_heads, decoder.head_dim)
    k, v = (memory.empty(shape, model.compute_dtype, device) for _ in range(2))

    owner: dict[int, int] = {}
    for s, seq in enumerate(sequences):
        owner.setdefault(seq.prompt, s)
    slots = torch.cat([torch.arange(lengths[s]) + first_rows[s] for _, s in sorted(owner.items())]).to(device)
    starts = torch.tensor([*(first_rows[s] for _, s in sorted(owner.items())), ends[-1]], dtype=torch.int32, device=device)
    used = torch.tensor([lengths[s] for _, s in sorted(owner.items())], dtype=torch.int32, device=device)
    cache = KVCache(k, v, starts, slots, used)
    hidden = model.hidden(batch.to(device), cache, embeds)
    for s, seq in enumerate(sequences):  # samples of one prompt: it was computed once, its rows are copied
        source = owner[seq.prompt]
        if source != s:
            for buffer in (k, v):
                buffer[:, first_rows[s] : first_rows[s] + lengths[s]] = buffer[:, first_rows[source] : first_rows[source] + lengths[s]]
    logits = model.logits(hidden)[torch.tensor([seq.prompt for seq in sequences], device=device)]
    return cache, first_rows, logits


@torch.inference_mode()
def _step(model: Llava, cache: KVCache, first_rows: list[int], live: list[tuple[int, Sequence]]) -> Tensor:
    """Feed each live sequence its last token; returns logits [S, V]."""
    device = model.device
    count = len(live)
    position = [seq.prompt_rows + len(seq.tokens) - 1 for _, seq in live]
    starts = [first_rows[s] for s, _ in live]
    token_ids = torch.tensor([seq.tokens[-1] for _, seq in live], device=device)
    step = KVCache(
        cache.k,
        cache.v,
        starts=torch.tensor([*starts, cache.k.shape[1]], dtype=torch.int32, device=device),
        slots=torch.tensor([a + b for a, b in zip(starts, position, strict=True)], device=device),
        used=torch.tensor([p + 1 for p in position], dtype=torch.int32, device=device),
    )
    cu_seqlens = torch.arange(count + 1, dtype=torch.int32, device=device)
    x_SD = model.language_model.embed_tokens.weight[token_ids].to(model.compute_dtype)
    return model.logits(model.language_model(x_SD, torch.tensor(position, device=device), cu_seqlens, cache=step))
