"""Values in error messages, and the shared checks."""

from __future__ import annotations

import numpy as np
import pytest

from llava_fast.checks import closest, is_int, is_number, require, shown


@pytest.mark.parametrize(
    "value, text",
    [
        ("a'b", '"a\'b"'),
        (3, "3"),
        (1.5, "1.5"),
        (np.float64(1.5), "1.5"),
        (float("nan"), "nan"),
        (None, "None"),
        (True, "True"),
        ([1, "x", None], "[1, 'x', None]"),
        ((1,), "(1,)"),
        ((), "()"),
        ([(1, 2), (3, 4)], "[(1, 2), (3, 4)]"),
        (object(), "object"),
        ([object()], "[object]"),
        (np.arange(10**6), "ndarray"),
        (list(range(11)), "a list of 11"),
        (["x" * 50, "y" * 50], "a list of 2"),
        ({"prompt": "private"}, "dict"),
        (b"bytes", "bytes"),
        (10**100, "an integer of 333 bits"),
    ],
)
def test_shown(value: object, text: str) -> None:
    assert shown(value) == text


def test_shown_is_short_and_holds_no_address() -> None:
    class Own(str):
        def __repr__(self) -> str:
            return object.__repr__(self)

    for value in (object(), lambda: 0, Own("x"), [Own("x")], "y" * 10_000, [[object()] * 5] * 5, "\0" * 80):
        assert len(shown(value)) <= 400 and " at 0x" not in shown(value), shown(value)
    assert shown("z" * 81).endswith("... (81 characters)")


def test_require() -> None:
    require(True, "x", object(), "anything")
    with pytest.raises(ValueError, match=r"^lr must be a number > 0, got object$"):
        require(False, "lr", object(), "a number > 0")


def test_numbers() -> None:
    assert is_int(3) and not is_int(True) and not is_int(3.0)
    assert is_number(3) and is_number(0.5)
    assert not any(is_number(value) for value in (True, "3", float("inf"), float("nan"), None, 1j, 10**400))


def test_closest() -> None:
    known = {"temperature", "top_p"}
    assert closest("temprature", known) == "; did you mean 'temperature'?"
    assert closest("zzz", known) == closest(object(), known) == "; known are temperature, top_p"
