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
from llava_fast.engine.replay import Replay
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
    step: Stepper | None = None
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
            running = [sequences[s] for s in live]
            if step is None or step.x_SD.shape[0] != len(live):
                step = Stepper(model, cache, len(live))
            positions = [seq.prompt_rows + len(seq.tokens) - 1 for seq in running]
            logits_SV = step([seq.tokens[-1] for seq in running], [first_rows[s] for s in live], positions)


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


class Stepper:
    """Feeds a number of sequences their last tokens. On the CPU, what the first step launches is recorded, and the others repeat it."""

    @torch.inference_mode()
    def __init__(self, model: Llava, cache: KVCache, count: int):
        device, dtype = model.device, model.compute_dtype
        self.model = model
        self.weights = [parameter.data for parameter in model.parameters()]  # a recorded launch holds addresses
        self.x_SD = torch.zeros(count, model.config.decoder.width, dtype=dtype, device=device)
        self.tables = model.language_model.tables(torch.zeros(count, dtype=torch.int64, device=device), dtype)
        starts = torch.zeros(count + 1, dtype=torch.int32, device=device)
        starts[-1] = cache.k.shape[1]
        slots, used = (torch.zeros(count, dtype=kind, device=device) for kind in (torch.int64, torch.int32))
        self.cache = KVCache(cache.k, cache.v, starts, slots, used)
        self.cu_seqlens = torch.arange(count + 1, dtype=torch.int32, device=device)
        self.replay: Replay | None = None

    def _run(self) -> Tensor:
        return self.model.logits(self.model.language_model.run(self.x_SD, self.tables, self.cu_seqlens, cache=self.cache))

    @torch.inference_mode()
    def __call__(self, token_ids: list[int], first_rows: list[int], positions: list[int]) -> Tensor:
        """Logits [S, V], overwritten by the next call. Sequence s owns cache rows from first_rows[s]; its token is at positions[s]."""
        model, device = self.model, self.x_SD.device
        place, start = torch.tensor(positions, device=device), torch.tensor(first_rows, device=device)
        self.x_SD.copy_(model.language_model.embed_tokens.weight[torch.tensor(token_ids, device=device)])
        for table, values in zip(self.tables, model.language_model.tables(place, self.x_SD.dtype), strict=True):
            table.copy_(values)
        self.cache.starts[:-1] = start
        torch.add(start, place, out=self.cache.slots)
        torch.add(place, 1, out=self.cache.used)
        if device.type != "cpu":
            return self._run()
        if self.replay is None:
            self.replay = Replay(self._run)
            return self.replay.result
        return self.replay()
