"""A request inside the engine: its prompt once it is read, its sequences, their texts and timings."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from llava_fast.engine.handle import Delta, Handle
from llava_fast.engine.sequence import FinishReason, Prompt, Sequence
from llava_fast.engine.text import TextStream
from llava_fast.requests import Completion, InputOptions, Request, SamplingParams


@dataclass(eq=False)
class Job:
    """number: in order of submission.  submitted: time.perf_counter() then; `deadline` counts from it, in seconds."""

    number: int
    request: Request | None
    params: SamplingParams
    inputs: InputOptions
    eos_ids: tuple[int, ...]
    handle: Handle
    submitted: float
    priority: int = 0
    deadline: float | None = None
    prompt: Prompt | None = None
    error: Exception | None = None
    over: bool = False
    sequences: list[Sequence] = field(default_factory=list)
    texts: list[TextStream] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)

    def __lt__(self, other: Job) -> bool:
        """Whether it is to be served before another."""
        return (-self.priority, self.number) < (-other.priority, other.number)

    def append(self, sequence: Sequence, token: int, logprob: float) -> None:
        """A new token of one of its sequences: its text goes out, and finish_reason is set where it is the last."""
        sequence.tokens.append(token)
        if sequence.params.logprobs:
            sequence.logprobs.append(logprob)
        text, ended = self.texts[sequence.index], token in sequence.eos_ids
        delta = "" if ended else text.push(token)
        if ended or text.stopped:
            sequence.finish_reason = "stop"
        elif len(sequence.tokens) >= sequence.max_new:
            sequence.finish_reason = "length"
        if sequence.finish_reason is not None:
            delta += text.finish()
        if delta or sequence.finish_reason is not None:
            self.handle.push(Delta(sequence.index, delta, sequence.finish_reason))

    def stop(self, reason: FinishReason, message: str | None) -> None:
        """The end of all its sequences that go on, with what they have; an error's delta is its message."""
        for sequence in self.sequences:
            if sequence.finish_reason is None:
                sequence.finish_reason = reason
                self.handle.push(Delta(sequence.index, self._rest(sequence) if message is None else message, reason))
        if not self.sequences:
            self.handle.push(Delta(0, message or "", reason))
        self.close(reason, message)

    def _rest(self, sequence: Sequence) -> str:
        """The text that was held back; nothing where it cannot be made."""
        try:
            return self.texts[sequence.index].finish()
        except BaseException:  # a tokenizer's panic is no Exception
            return ""

    def close(self, reason: FinishReason | None = None, message: str | None = None) -> None:
        """Hand the completions out. reason, message: of those that did not come to an end of their own."""
        self.over = True
        self.timings["total"] = time.perf_counter() - self.submitted
        rows, visual = (0, 0) if self.prompt is None else (len(self.prompt), self.prompt.visual_tokens)
        completions = [
            Completion(
                text=self.texts[sequence.index].text,
                token_ids=sequence.tokens,
                finish_reason=sequence.finish_reason,
                error=message if sequence.finish_reason == "error" else None,
                prompt_tokens=rows,
                visual_tokens=visual,
                logprobs=sequence.logprobs if self.params.logprobs else None,
                timings=dict(self.timings),
                request=self.number,
                index=sequence.index,
            )
            for sequence in self.sequences
        ]
        if not completions:  # it never began
            completions = [Completion(finish_reason=reason, error=message, timings=dict(self.timings), request=self.number)]
        self.handle.close(completions)
