"""The next token of each row, on the device.

Shape letters: R rows, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llava_fast.engine.scheduler import Work
from llava_fast.engine.sequence import Sequence
from llava_fast.kernels.sampling import argmax, sample

CHUNK = 1024  # logits that are summed in one go


def stream_seed(seed: int, index: int) -> int:
    """The seed of sample `index` of a request, so that each draws for itself; in int64."""
    return (seed + 0x9E3779B97F4A7C15 * index) % 2**63


def needs_history(sequence: Sequence) -> bool:
    """Whether the choice depends on the tokens before: the host has to know them."""
    return sequence.params.repetition_penalty != 1


def log_sum_exp(logits_RV: Tensor) -> Tensor:
    """[R], each row's in the same order whatever R is: torch splits one long row among threads, and leaves one of many to one."""
    padded = torch.nn.functional.pad(logits_RV, (0, -logits_RV.shape[1] % CHUNK), value=-torch.inf)
    return padded.unflatten(1, (-1, CHUNK)).logsumexp(-1).logsumexp(-1)


class Sampler:
    def __init__(self, vocab_size: int, device: torch.device):
        self.vocab_size, self.device = vocab_size, device

    def _rows(self, values: list[float] | list[int], dtype: torch.dtype) -> Tensor:
        rows = torch.tensor(values, dtype=dtype)
        return rows if self.device.type == "cpu" else rows.pin_memory().to(self.device, non_blocking=True)

    def __call__(self, logits_RV: Tensor, works: list[Work], greedy_R: Tensor | None = None) -> Tensor:
        """fp64 [2, R]: tokens, and their log-probabilities under the model where a sequence asks (else 0). Rows: 1 + its draft a work.

        greedy_R: the likeliest token of each row, where it is known.
        A row's token depends on its logits, its sequence's settings and seed, and how many tokens came before.
        """
        sequences = [work.sequence for work in works for _ in range(1 + len(work.draft))]
        # What was drafted is not counted: drafts are for sequences without a minimum left, a temperature or a penalty.
        before = [sequence.produced - 1 for sequence in sequences]
        picked = logits_RV
        short = [r for r, s in enumerate(sequences) if before[r] < s.params.min_new_tokens and s.eos_ids]
        if short:
            picked = logits_RV.clone()
            for r in short:
                picked[r].index_fill_(0, self._rows(list(sequences[r].eos_ids), torch.int64), -torch.inf)
        params = [sequence.params for sequence in sequences]
        if all(p.temperature == 0 and p.repetition_penalty == 1 for p in params):
            tokens = argmax(picked) if greedy_R is None or short else greedy_R
        else:
            drawn = [r for r, p in enumerate(params) if p.temperature > 0 or p.repetition_penalty != 1]
            rows = self._rows(drawn, torch.int64)
            tokens = argmax(picked) if len(drawn) < len(params) else torch.empty(len(params), dtype=torch.int64, device=self.device)
            tokens[rows] = self._draw(picked[rows], [sequences[r] for r in drawn], [before[r] for r in drawn])
        values = torch.zeros(2, len(params), dtype=torch.float64, device=self.device)
        values[0] = tokens
        if any(p.logprobs for p in params):
            values[1] = logits_RV.gather(1, tokens[:, None])[:, 0] - log_sum_exp(logits_RV)
        return values

    def _draw(self, logits_RV: Tensor, sequences: list[Sequence], before: list[int]) -> Tensor:
        params = [sequence.params for sequence in sequences]

        def given(values: list, dtype: torch.dtype, off: float) -> Tensor | None:
            return self._rows(values, dtype) if any(value != off for value in values) else None

        penalty = given([p.repetition_penalty for p in params], torch.float32, 1.0)
        return sample(
            logits_RV.float(),
            temperature=self._rows([p.temperature for p in params], torch.float32),
            seeds=self._rows([sequence.seed for sequence in sequences], torch.int64),
            steps=self._rows(before, torch.int64),
            top_k=given([p.top_k for p in params], torch.int64, 0),
            top_p=given([p.top_p for p in params], torch.float64, 1.0),
            min_p=given([p.min_p for p in params], torch.float64, 0.0),
            repetition_penalty=penalty,
            counts=None if penalty is None else torch.stack([self._seen(sequence) for sequence in sequences]),
        )

    def _seen(self, sequence: Sequence) -> Tensor:
        """int32 [V]: how often each token is in the prompt and the answer."""
        if sequence.seen is None:
            ids = torch.tensor([*sequence.prompt.text_ids, *sequence.tokens], dtype=torch.int64)
            sequence.seen = ids.bincount(minlength=self.vocab_size).int().to(self.device)
        return sequence.seen
