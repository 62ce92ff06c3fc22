"""`generate`: requests in, completions out. Prompts are packed under a row budget and decoded together."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import torch

from llava_fast.batch import pack
from llava_fast.checks import closest
from llava_fast.engine.decode import Sequence, decode, make_generator
from llava_fast.engine.text import TextStream
from llava_fast.inputs.prepare import Prepared, prepare
from llava_fast.requests import Completion, InputOptions, Request, SamplingParams

MAX_ROWS = 16_384  # rows of cache a pack may reserve; a single request may take more
Delta = tuple[int, str, str | None]


@dataclasses.dataclass
class Job:
    """A request on its way: prepared inputs, its sequences, their texts and timings."""

    index: int
    request: Request
    params: SamplingParams
    prepared: Prepared
    max_new: int
    sequences: list[Sequence] = dataclasses.field(default_factory=list)
    texts: list[TextStream] = dataclasses.field(default_factory=list)
    timings: dict[str, float] = dataclasses.field(default_factory=dict)
    ended: int = 0

    def ends(self) -> int:
        """Count the end of one sequence; returns how many go on or are still to be told of."""
        self.ended += 1
        return len(self.sequences) - self.ended

    @property
    def rows(self) -> int:
        return (len(self.prepared.sample) + self.max_new) * self.params.n


def split_options(
    sampling: SamplingParams | None, inputs: InputOptions | None, shorthand: dict[str, Any]
) -> tuple[SamplingParams, InputOptions]:
    """Merge keyword shorthand into the two option sets. Raises ValueError for a name that neither has."""
    sampling, inputs = sampling or SamplingParams(), inputs or InputOptions()
    ours = {f.name for f in dataclasses.fields(SamplingParams)}, {f.name for f in dataclasses.fields(InputOptions)}
    for name in shorthand:
        if name not in ours[0] | ours[1]:
            raise ValueError(f"generate has no option {name!r}{closest(name, ours[0] | ours[1])}")
    return (
        dataclasses.replace(sampling, **{k: v for k, v in shorthand.items() if k in ours[0]}),
        dataclasses.replace(inputs, **{k: v for k, v in shorthand.items() if k in ours[1]}),
    )


def as_requests(requests: Any) -> tuple[list[Request | ValueError], bool]:
    """-> (requests, whether a single one was given); what is no request is its ValueError. A list of mappings is one chat."""

    def is_chat(item: Any) -> bool:
        return isinstance(item, list) and bool(item) and all(isinstance(message, dict) for message in item)

    def as_request(item: Any) -> Request | ValueError:
        try:
            if isinstance(item, str) or is_chat(item):
                return Request(item)
        except ValueError as error:
            return error
        expected = "expected a string, a list of chat messages or a Request"
        return item if isinstance(item, Request) else ValueError(f"{expected}, got {type(item).__name__}")

    if isinstance(requests, (str, Request)) or is_chat(requests):
        return [as_request(requests)], True
    if not isinstance(requests, (list, tuple)):
        raise ValueError(
            f"requests must be a string, a list of chat messages, a Request, or a list of these, got {type(requests).__name__}"
        )
    return [as_request(item) for item in requests], False


def run(
    model: Any, requests: list[Request | ValueError], sampling: SamplingParams, inputs: InputOptions, single: bool
) -> Iterator[tuple[Delta, list[Completion] | None]]:
    """Serve all requests; yields (request index, text delta, finish reason) and, at a request's end, its completions.

    Requests go by priority, then in order. With `single`, a bad request raises; in a list it comes back as an error.
    """
    begun = time.perf_counter()
    priority = [item.priority if isinstance(item, Request) else 0 for item in requests]
    order = sorted(range(len(requests)), key=lambda i: -priority[i])
    waiting: Job | None = None
    while order or waiting:
        jobs: list[Job] = []
        rows = 0
        while order or waiting:
            if waiting is None:
                index = order.pop(0)
                try:
                    waiting = _admit(model, index, requests[index], sampling, inputs, begun)
                except ValueError as error:
                    if single:
                        raise
                    message = f"request {index}: {error}"
                    timings = {"total": time.perf_counter() - begun}
                    yield (index, message, "error"), [Completion(finish_reason="error", error=message, timings=timings, request=index)]
                    continue
            if jobs and rows + waiting.rows > MAX_ROWS:
                break
            jobs.append(waiting)
            rows += waiting.rows
            waiting = None
        if jobs:
            yield from _run_pack(model, jobs, begun)


def _admit(model: Any, index: int, request: Request | ValueError, sampling: SamplingParams, inputs: InputOptions, begun: float) -> Job:
    """Check and prepare one request on the CPU. Raises ValueError."""
    if isinstance(request, ValueError):
        raise request
    params = request.sampling or sampling
    if _expired(request, begun):
        raise ValueError(f"its deadline of {request.deadline} s passed before it was begun")
    start = time.perf_counter()
    prepared = prepare(request, inputs, model.input_spec)
    limit, length = model.config.decoder.max_positions, len(prepared.sample)
    if length >= limit:
        raise ValueError(f"the prompt takes {length} tokens, which leaves none of the context's {limit} for an answer")
    job = Job(index, request, params, prepared, min(params.max_new_tokens, limit - length))
    job.timings["preprocess"] = time.perf_counter() - start
    return job


def _expired(request: Request, begun: float) -> bool:
    return request.deadline is not None and time.perf_counter() - begun > request.deadline


def _run_pack(model: Any, jobs: list[Job], begun: float) -> Iterator[tuple[Delta, list[Completion] | None]]:
    eos_ids = model.eos_ids
    owner: dict[int, tuple[Job, int]] = {}
    sequences: list[Sequence] = []
    for p, job in enumerate(jobs):
        for n in range(job.params.n):
            sequence = Sequence(p, len(job.prepared.sample), job.prepared.prompt_ids, job.params, job.max_new)
            sequence.generator = make_generator(job.params.seed, n, model.device)
            job.sequences.append(sequence)
            job.texts.append(TextStream(model.tokenizer, job.params.stop))
            owner[id(sequence)] = (job, n)
            sequences.append(sequence)
    views = [job.prepared.views for job in jobs if job.prepared.views is not None]
    batch = pack([job.prepared.sample for job in jobs], torch.cat(views) if views else None, needed="last")
    for running in decode(model, batch, sequences, eos_ids):
        for sequence in running:
            job, n = owner[id(sequence)]
            job.timings.setdefault("first_token", time.perf_counter() - begun)
            text = job.texts[n]
            ended = sequence.finish_reason == "stop"
            delta = "" if ended else text.push(sequence.tokens[-1])
            if text.stopped:
                sequence.finish_reason = "stop"
            elif sequence.finish_reason is None and _expired(job.request, begun):
                sequence.finish_reason = "error"
            if sequence.finish_reason is not None:
                rest = text.finish()
                delta = _late(job) if sequence.finish_reason == "error" else delta + rest
            finished = sequence.finish_reason is not None and job.ends() == 0
            if finished:
                job.timings["total"] = time.perf_counter() - begun
            if delta or sequence.finish_reason:
                yield (job.index, delta, sequence.finish_reason), _completions(job) if finished else None


def _late(job: Job) -> str:
    return f"request {job.index}: its deadline of {job.request.deadline} s passed"


def _completions(job: Job) -> list[Completion]:
    return [
        Completion(
            text=text.text,
            token_ids=sequence.tokens,
            finish_reason=sequence.finish_reason,
            error=_late(job) if sequence.finish_reason == "error" else None,
            prompt_tokens=len(job.prepared.sample),
            visual_tokens=job.prepared.sample.visual_tokens,
            logprobs=sequence.logprobs if job.params.logprobs else None,
            timings=dict(job.timings),
            request=job.index,
            index=n,
        )
        for n, (sequence, text) in enumerate(zip(job.sequences, job.texts, strict=True))
    ]


def generate(
    model: Any,
    requests: Any,
    sampling: SamplingParams | None = None,
    inputs: InputOptions | None = None,
    stream: bool = False,
    **shorthand: Any,
) -> Any:
    """Answer one request or a list of them.

    requests: a string with <image>/<video> marks, a list of chat messages, a `Request`, or a list of these.
    shorthand: fields of SamplingParams and InputOptions, over those of `sampling` and `inputs`; a request's own are used instead.
    Returns a Completion, or a list in the order of the requests (with n > 1, the n completions of each follow one another, a bad
    request has one; `Completion.request` says whose each is).
    stream: an iterator of (request index, text delta, finish_reason or None); an error's delta is its message.
    Raises ValueError for a bad option or a bad single request; in a list, a bad request is a Completion with finish_reason
    'error' and the others are served.
    """
    sampling, inputs = split_options(sampling, inputs, shorthand)
    items, single = as_requests(requests)
    if stream:
        for i, item in enumerate(items):
            if isinstance(item, Request) and (n := (item.sampling or sampling).n) > 1:
                raise ValueError(f"stream=True takes n=1, but request {i} asks for n={n}")
        return (delta for delta, _ in run(model, items, sampling, inputs, single))
    results: dict[int, list[Completion]] = {}
    for (index, _, _), completions in run(model, items, sampling, inputs, single):
        if completions is not None:
            results[index] = completions
    flat = [completion for index in range(len(items)) for completion in results[index]]
    return flat[0] if single and len(flat) == 1 else flat
