"""Checks of what a caller gives, and how a value looks in an error message."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable

SHOWN = 80  # characters of a value in a message


def shown(value: object) -> str:
    """A value for an error message, in about 80 characters: a string, number, None, or short list or tuple of these as Python writes
    it, anything else by the name of its type: an object's own repr may hold its address, or all of its data."""
    if isinstance(value, str):
        return str.__repr__(value) if len(value) <= SHOWN else f"{value[: SHOWN - 10]!r}... ({len(value)} characters)"
    if value is None or isinstance(value, bool):
        return str(value)
    if isinstance(value, int):  # repr refuses more than 4300 digits
        return int.__repr__(value) if value.bit_length() < 200 else f"an integer of {value.bit_length()} bits"
    if isinstance(value, float):
        return float.__repr__(value)
    if isinstance(value, (list, tuple)):
        text = ", ".join(shown(item) for item in value[:10])
        if len(value) > 10 or len(text) > SHOWN:
            return f"a {type(value).__name__} of {len(value)}"
        return f"[{text}]" if isinstance(value, list) else f"({text}{',' * (len(value) == 1)})"
    return type(value).__name__


def require(ok: bool, name: str, value: object, expected: str) -> None:
    """ValueError with the name, the value and what was expected, unless `ok`."""
    if not ok:
        raise ValueError(f"{name} must be {expected}, got {shown(value)}")


def is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """A finite float, or an integer that a float can hold."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def closest(name: object, known: Iterable[str]) -> str:
    """What to say after an unknown name: '; did you mean ...?' where a known one is like it, else '; known are ...'."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1) if isinstance(name, str) else []
    return f"; did you mean {close[0]!r}?" if close else f"; known are {', '.join(known)}"
