"""`generate`: requests in, completions out, by an engine that lives as long as the call."""

from __future__ import annotations

import dataclasses
import queue
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from llava_fast.checks import closest
from llava_fast.engine.engine import Engine
from llava_fast.engine.handle import Delta, Handle
from llava_fast.requests import Completion, InputOptions, Request, SamplingParams


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


def serve(
    engine: Engine, requests: list[Request | ValueError], sampling: SamplingParams, inputs: InputOptions, single: bool
) -> Iterator[tuple[int, Delta | list[Completion]]]:
    """(index, delta) as they come, (index, completions) at a request's end. With `single`, a bad request raises."""
    events: queue.SimpleQueue[tuple[int, Delta | list[Completion]]] = queue.SimpleQueue()
    handles: dict[int, Handle] = {}
    for index, request in enumerate(requests):
        if isinstance(request, ValueError):
            if single:
                raise request
            message = f"request {index}: {request}"
            events.put((index, Delta(0, message, "error")))
            events.put((index, [Completion(finish_reason="error", error=message, request=index)]))
            continue

        def tell(_: Handle, delta: Delta, index: int = index) -> None:
            text = f"request {index}: {delta.text}" if delta.finish_reason == "error" else delta.text
            events.put((index, delta._replace(text=text)))

        def end(future: Future[list[Completion]], index: int = index) -> None:
            completions = future.result()
            for completion in completions:
                completion.request = index
                completion.error = None if completion.error is None else f"request {index}: {completion.error}"
            events.put((index, completions))

        handles[index] = handle = engine.submit(request, sampling, inputs, on_delta=tell)
        handle.future.add_done_callback(end)
    left = len(requests)
    try:
        while left:
            index, event = events.get()
            if isinstance(event, list):
                left -= 1
            if single and index in handles and (error := handles[index].error) is not None:
                raise error
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
    **shorthand: Any,
) -> Any:
    """Answer one request or a list of them.

    requests: a string with <image>/<video> marks, a list of chat messages, a `Request`, or a list of these.
    shorthand: fields of SamplingParams and InputOptions, over those of `sampling` and `inputs`; a request's own are used instead.
    engine: one that is running on this model, whose caches know earlier requests; one of its own for this call where None.
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
        return _stream(model, items, sampling, inputs, single, engine)
    results: dict[int, list[Completion]] = {}
    with _engine(model, engine) as running:
        for index, event in serve(running, items, sampling, inputs, single):
            if isinstance(event, list):
                results[index] = event
    flat = [completion for index in range(len(items)) for completion in results[index]]
    return flat[0] if single and len(flat) == 1 else flat


def _engine(model: Any, engine: Engine | None) -> AbstractContextManager[Engine]:
    if engine is not None and engine.model is not model:
        raise ValueError("the engine runs another model than the one given")
    return Engine(model) if engine is None else nullcontext(engine)


def _stream(
    model: Any, items: list[Request | ValueError], sampling: SamplingParams, inputs: InputOptions, single: bool, engine: Engine | None
) -> Iterator[tuple[int, str, str | None]]:
    with _engine(model, engine) as running:
        for index, event in serve(running, items, sampling, inputs, single):
            if isinstance(event, Delta):
                yield index, event.text, event.finish_reason
