"""What a caller holds of a request: its deltas as they come, its completions at the end, from threads and coroutines alike."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from concurrent.futures import Future
from typing import Any, NamedTuple

from llava_fast.requests import Completion

log = logging.getLogger(__name__)


class Delta(NamedTuple):
    """sample: which of the request's n completions.  finish_reason: where it ends; the text of an error is its message."""

    sample: int
    text: str
    finish_reason: str | None


def _nobody(_: Handle) -> None:
    """There is none to tell."""


class Handle:
    """A submitted request. Iterate it (or `async for`) for its deltas, once; `result()` or `await` it for its completions."""

    def __init__(
        self,
        number: int,
        cancel: Callable[[Handle], None] = _nobody,
        over: Callable[[Handle], None] = _nobody,
        on_delta: Callable[[Handle, Delta], None] | None = None,
    ):
        """cancel: what `cancel` calls.  over: called at the end, before `result` returns."""
        self.number = number
        self.error: BaseException | None = None  # what ended it, where something went wrong
        self.future: Future[list[Completion]] = Future()
        self.future.set_running_or_notify_cancel()  # who stops waiting for it does not cancel it: `cancel` does
        self._cancel, self._over, self._on_delta = cancel, over, on_delta
        self._changed = threading.Condition()
        self._unread: dict[int, list[str]] = {}  # what nobody reads is kept by completion, not by token
        self._ends: dict[int, str] = {}
        self._closed = False
        self._wake: Callable[[], None] | None = None

    def cancel(self) -> None:
        """End it now, with what it has; nothing happens where it is over."""
        self._cancel(self)

    def result(self, timeout: float | None = None) -> list[Completion]:
        """Wait for the end: its n completions. An error is told there, by finish_reason and error. Raises TimeoutError."""
        return self.future.result(timeout)

    def __await__(self) -> Generator[Any, None, list[Completion]]:
        return asyncio.wrap_future(self.future).__await__()

    def __iter__(self) -> Iterator[Delta]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._unread or self._closed)
                deltas, closed = self._read(), self._closed
            yield from deltas
            if closed:
                return

    async def __aiter__(self) -> AsyncIterator[Delta]:
        loop, woken = asyncio.get_running_loop(), asyncio.Event()
        with self._changed:

            def wake() -> None:
                loop.call_soon_threadsafe(woken.set)

            self._wake = wake
        try:
            while True:
                with self._changed:
                    deltas, closed = self._read(), self._closed
                    woken.clear()
                for delta in deltas:
                    yield delta
                if closed:
                    return
                await woken.wait()
        finally:
            with self._changed:
                self._wake = None

    def _read(self) -> list[Delta]:
        unread, self._unread = self._unread, {}
        return [Delta(index, "".join(parts), self._ends.pop(index, None)) for index, parts in unread.items()]

    def push(self, delta: Delta) -> None:
        if self._on_delta is not None:
            try:
                self._on_delta(self, delta)
            except Exception:  # the caller's, in the engine's thread, which has others to serve
                log.exception("on_delta of request %d failed", self.number)
            return
        with self._changed:
            self._unread.setdefault(delta.sample, []).append(delta.text)
            if delta.finish_reason:
                self._ends[delta.sample] = delta.finish_reason
            self._notify()

    def close(self, completions: list[Completion]) -> None:
        with self._changed:
            self._closed = True
            self._notify()
        self._over(self)
        self._cancel = self._over = _nobody  # a handle that is kept keeps no engine alive
        self.future.set_result(completions)

    def _notify(self) -> None:
        self._changed.notify_all()
        if self._wake is not None:
            try:
                self._wake()
            except RuntimeError:  # the loop that listened is closed
                self._wake = None
