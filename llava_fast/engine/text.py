"""Token ids to text as they come: whole UTF-8 characters only, and cut at stop strings that may span tokens."""

from __future__ import annotations

from typing import Any


class TextStream:
    """Decodes one sequence, to nothing without a tokenizer. `text` is what is settled; after `stopped` nothing is added."""

    def __init__(self, tokenizer: Any, stop: tuple[str, ...] = ()):
        self.tokenizer = tokenizer
        self.stop = stop
        self.text = ""
        self.stopped = False
        self._ids: list[int] = []
        self._settled = 0  # ids[:settled] are decoded into text + held
        self._context = 0  # decode from here, so that a token that depends on its left neighbour comes out right
        self._held = ""  # decoded, but may be the beginning of a stop string

    def push(self, token: int) -> str:
        """Add a token; returns the text that became certain."""
        if self.stopped or self.tokenizer is None:
            return ""
        self._ids.append(token)
        return self._release(self._decode_new(final=False), final=False)

    def finish(self) -> str:
        """The end: returns what was held back."""
        return "" if self.stopped or self.tokenizer is None else self._release(self._decode_new(final=True), final=True)

    def _decode(self, start: int, end: int) -> str:
        return self.tokenizer.decode(self._ids[start:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _decode_new(self, final: bool) -> str:
        before = self._decode(self._context, self._settled)
        now = self._decode(self._context, len(self._ids))
        if now.endswith("\ufffd") and not final:  # a character whose last bytes are still to come
            return ""
        self._context, self._settled = self._settled, len(self._ids)
        return now[len(before) :]

    def _release(self, new: str, final: bool) -> str:
        pending = self._held + new
        cut = min((at for s in self.stop if (at := pending.find(s)) >= 0), default=-1)
        if cut >= 0:
            self.stopped, self._held, out = True, "", pending[:cut]
        else:
            keep = 0 if final else max((_overlap(pending, s) for s in self.stop), default=0)
            out, self._held = pending[: len(pending) - keep], pending[len(pending) - keep :]
        self.text += out
        return out


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper beginning of `stop` that ends `text`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
