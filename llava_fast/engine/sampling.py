"""From logits to the next token of each sequence.

The order is that of transformers' processors: repetition penalty, minimum length, temperature, top-k, top-p, min-p.
Shape letters: S sequences, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence as List

import torch
from torch import Tensor

from llava_fast.requests import SamplingParams


def penalise(logits_V: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Divide positive and multiply negative logits of the token ids in `seen` (int64) by `penalty`, of arXiv 1909.05858."""
    score = logits_V[seen]
    return logits_V.index_copy(0, seen, torch.where(score < 0, score * penalty, score / penalty))


def warp(logits_V: Tensor, params: SamplingParams) -> Tensor:
    """Temperature, then all but the top-k, the top-p nucleus and what min-p keeps set to -inf. fp32 in and out."""
    logits_V = logits_V / params.temperature
    if 0 < params.top_k < logits_V.shape[0]:
        smallest = logits_V.topk(params.top_k).values[-1]
        logits_V = logits_V.masked_fill(logits_V < smallest, -torch.inf)
    if params.top_p < 1:
        ascending, order = logits_V.sort(stable=True)  # of equal logits the first go first
        out = ascending.softmax(-1).cumsum(-1) <= 1 - params.top_p
        out[-1] = False  # the most likely token always stays
        logits_V = logits_V.masked_fill(torch.empty_like(out).scatter_(0, order, out), -torch.inf)
    if params.min_p > 0:
        probabilities = logits_V.softmax(-1)
        logits_V = logits_V.masked_fill(probabilities < params.min_p * probabilities.max(), -torch.inf)
    return logits_V


def choose(
    logits_SV: Tensor,
    params: List[SamplingParams],
    histories: List[tuple[List[int], List[int]]],
    generators: List[torch.Generator | None],
    eos_ids: Tensor,
) -> Tensor:
    """The next token id of each sequence, int64 [S].

    histories: the ids of the prompt and the new ones.  generators: one for each sequence with a seed, so that its draws do
    not depend on its neighbours.  eos_ids: int64, the stop tokens.
    """
    picks = logits_SV.argmax(-1)
    for s, p in enumerate(params):
        prompt, new = histories[s]
        shortened = len(new) < p.min_new_tokens and eos_ids.numel() > 0
        if p.temperature == 0 and p.repetition_penalty == 1 and not shortened:
            continue
        row = logits_SV[s]
        if p.repetition_penalty != 1:
            row = penalise(row, torch.tensor(sorted({*prompt, *new}), dtype=torch.int64, device=row.device), p.repetition_penalty)
        if shortened:
            row = row.index_fill(0, eos_ids, -torch.inf)
        picks[s] = row.argmax() if p.temperature == 0 else torch.multinomial(warp(row, p).softmax(-1), 1, generator=generators[s])[0]
    return picks
