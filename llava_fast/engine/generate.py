"""`generate`: requests in, completions out, by an engine that lives as long as the call."""

from __future__ import annotations

import dataclasses
import operator
import os
import queue
from collections.abc import Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from llava_fast.checks import closest
from llava_fast.engine.engine import ANY_ROWS, Engine
from llava_fast.engine.handle import Delta, Handle
from llava_fast.engine.jsonl import Answers
from llava_fast.engine.progress import ProgressLine
from llava_fast.requests import Completion, InputOptions, Request, SamplingParams

# Requests with the engine for each sequence that it runs at a time, where answers go to a file: so that it never waits for one, has
# pictures read ahead, and priorities have something to choose from; few enough to hold in memory, pictures included.
AHEAD = 4


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


def is_chat(item: Any) -> bool:
    return isinstance(item, list) and bool(item) and all(isinstance(message, dict) for message in item)


def as_request(item: Any) -> Request | ValueError:
    """What is no request is its ValueError; one that is given stands for what a reader could not make a request of."""
    try:
        if isinstance(item, str) or is_chat(item):
            return Request(item)
    except ValueError as error:
        return error
    expected = "expected a string, a list of chat messages or a Request"
    return item if isinstance(item, (Request, ValueError)) else ValueError(f"{expected}, got {type(item).__name__}")


def as_requests(requests: Any) -> tuple[list[Request | ValueError], bool]:
    """-> (requests, whether a single one was given). A list of mappings is one chat."""
    if isinstance(requests, (str, Request)) or is_chat(requests):
        return [as_request(requests)], True
    if not isinstance(requests, (list, tuple)):
        raise ValueError(
            f"requests must be a string, a list of chat messages, a Request, or a list of these "
            f"(with out, any iterable), got {type(requests).__name__}"
        )
    return [as_request(item) for item in requests], False


def serve(
    engine: Engine,
    requests: Iterable[tuple[int, Request | ValueError]],
    sampling: SamplingParams,
    inputs: InputOptions,
    single: bool,
    deltas: bool = True,
    ahead: int | None = None,
) -> Generator[tuple[int, Delta | list[Completion]]]:
    """(index, delta) as they come, where asked for; (index, completions) at a request's end. With `single`, a bad request raises.

    ahead: requests with the engine at a time, the others are taken as these end; None: all at once.
    """
    events: queue.SimpleQueue[tuple[int, Delta | list[Completion]]] = queue.SimpleQueue()
    handles: dict[int, Handle] = {}  # of those that are not over
    source = iter(requests)
    more, left = True, 0  # whether there are others; those taken that are not over

    def submit(index: int, request: Request) -> None:
        def tell(_: Handle, delta: Delta) -> None:
            text = f"request {index}: {delta.text}" if delta.finish_reason == "error" else delta.text
            if deltas:
                events.put((index, delta._replace(text=text)))

        def end(future: Future[list[Completion]]) -> None:
            completions = future.result()
            for completion in completions:
                completion.request = index
                completion.error = None if completion.error is None else f"request {index}: {completion.error}"
            events.put((index, completions))

        handles[index] = handle = engine.submit(request, sampling, inputs, on_delta=tell)
        handle.future.add_done_callback(end)

    try:
        while True:
            # What is over goes out before the next is made, which may take an iterator its time.
            while more and (ahead is None or (left < ahead and events.empty())):
                if (entry := next(source, None)) is None:
                    more = False
                    break
                index, request = entry
                left += 1
                if isinstance(request, Request):
                    submit(index, request)
                elif single:
                    raise request
                else:
                    message = f"request {index}: {request}"
                    if deltas:
                        events.put((index, Delta(0, message, "error")))
                    events.put((index, [Completion(finish_reason="error", error=message, request=index)]))
            if not left:
                return
            index, event = events.get()
            if single and (error := handles[index].error) is not None:
                raise error
            if isinstance(event, list):
                left -= 1
                handles.pop(index, None)
            yield index, event
    finally:  # whoever stops listening wants no more of it
        for handle in handles.values():
            handle.cancel()


def generate(
    model: Any,
    requests: Any,
    sampling: SamplingParams | None = None,
    inputs: InputOptions | None = None,
    stream: bool = False,
    engine: Engine | None = None,
    out: str | os.PathLike[str] | None = None,
    retry_errors: bool = False,
    progress: bool | None = None,
    **shorthand: Any,
) -> Any:
    """Answer one request or many.

    requests: a string with <image>/<video> marks, a list of chat messages, a `Request`, or a list of these.
    shorthand: fields of SamplingParams and InputOptions, over those of `sampling` and `inputs`; a request's own are used instead.
    engine: one that is running on this model, whose caches know earlier requests; one of its own for this call where None.
    Returns a Completion, or a list in the order of the requests (with n > 1, the n completions of each follow one another, a bad
    request has one; `Completion.request` says whose each is).
    stream: an iterator of (request index, text delta, finish_reason or None); an error's delta is its message.
    progress: a line on stderr with requests done, tokens/s, shares of prompt rows and pictures that were reused, and the time left;
    None: where stderr is a terminal and there is more than one request. Not with stream.

    out: a JSONL file. Each request's completions are appended as one line when it ends (see engine/jsonl.py), and a request whose line
    is there is not run again: the same call goes on where a killed one was. A request that ended as an error counts as done, since a
    picture that is missing stays so; with retry_errors it is run again. Each line holds a fingerprint of its request, its settings and
    the model: ValueError names the first that is not what was answered before. Pictures are told apart by their paths.
    With out, `requests` may be any iterable, of which at most four times the engine's max_running are with it at a time: priorities
    hold among these, and a deadline counts from when the engine takes a request. Of such an iterable nothing is kept, and a
    `jsonl.Tally` is returned: how many requests the file answers, how many of them as errors, how many it had answered before.

    Raises ValueError for a bad option or a bad single request; in a list, a bad request is a Completion with finish_reason
    'error' and the others are served. With out, RuntimeError where the engine itself fails, whose requests have no line then.
    """
    sampling, inputs = split_options(sampling, inputs, shorthand)
    iterable = out is not None and isinstance(requests, Iterable) and not isinstance(requests, (str, bytes, list, tuple, Mapping))
    items, single = ([], False) if iterable else as_requests(requests)
    if stream:
        if out is not None or progress:
            raise ValueError("stream=True takes neither out nor progress: what it yields is for the caller to keep and to show")
        for i, item in enumerate(items):
            if isinstance(item, Request) and (n := (item.sampling or sampling).n) > 1:
                raise ValueError(f"stream=True takes n=1, but request {i} asks for n={n}")
        return _stream(model, items, sampling, inputs, single, engine)
    if out is None:
        results: dict[int, list[Completion]] = {}
        with _engine(model, engine) as running, ProgressLine(running, len(items), 0, progress) as line:
            for index, event in serve(running, enumerate(items), sampling, inputs, single, deltas=False):
                assert isinstance(event, list)
                results[index] = event
                line.advance()
        return _in_order(results, single)
    with Answers(out, model, sampling, inputs, retry_errors) as answers:
        if not iterable:
            return _in_order(_write(model, items, sampling, inputs, single, engine, answers, progress), single)
        _write(model, requests, sampling, inputs, False, engine, answers, progress, keep=False)
        return answers.tally


def _in_order(results: dict[int, list[Completion]], single: bool) -> Any:
    flat = [completion for index in sorted(results) for completion in results[index]]
    return flat[0] if single and len(flat) == 1 else flat


def _write(
    model: Any,
    requests: Iterable[Any],
    sampling: SamplingParams,
    inputs: InputOptions,
    single: bool,
    engine: Engine | None,
    answers: Answers,
    progress: bool | None,
    keep: bool = True,
) -> dict[int, list[Completion]]:
    """Answer those that the file does not; completions by request, of all where they are to be kept."""
    if answers.found and not isinstance(requests, Iterator):  # which can be gone through once only
        answers.compare(map(as_request, requests))
    total = operator.length_hint(requests, -1)
    with _engine(model, engine) as running, ProgressLine(running, None if total < 0 else total, len(answers.found), progress) as line:
        todo = answers.missing(map(as_request, requests))
        results = {index: answers.read(index) for index in answers.found} if keep else {}
        for index, event in serve(running, todo, sampling, inputs, single, deltas=False, ahead=AHEAD * running.max_running):
            assert isinstance(event, list)
            if running.fault is not None:
                raise RuntimeError(f"the engine stopped; {answers.shown} holds what was done before") from running.fault
            answers.append(index, event)
            line.advance()
            if keep:
                results[index] = event
    return results


def _engine(model: Any, engine: Engine | None, max_mixed_rows: int | None = ANY_ROWS) -> AbstractContextManager[Engine]:
    if engine is not None and engine.model is not model:
        raise ValueError("the engine runs another model than the one given")
    return Engine(model, max_mixed_rows=max_mixed_rows) if engine is None else nullcontext(engine)


def _stream(
    model: Any, items: list[Request | ValueError], sampling: SamplingParams, inputs: InputOptions, single: bool, engine: Engine | None
) -> Iterator[tuple[int, str, str | None]]:
    with _engine(model, engine, max_mixed_rows=None) as running:
        for index, event in serve(running, enumerate(items), sampling, inputs, single):
            if isinstance(event, Delta):
                yield index, event.text, event.finish_reason
