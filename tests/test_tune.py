"""bench/tune.py with a clock of our own: what it times, what it keeps, what it writes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench import tune
from llava_fast.kernels import _triton

META = torch.device("meta")  # stands for sm_90
seen: list[dict[str, Any]] = []


def launch(kernel: str, shape: str) -> Callable[[], object]:
    return lambda: seen.append(_triton.config(kernel, shape, {"BLOCK": 64, "num_warps": 4}, META))


def clock(call: Callable[[], object]) -> float:
    call()
    launched = seen[-1]
    if launched["BLOCK"] == 512:
        raise RuntimeError("out of resource: shared memory")
    return {64: 1.0, 128: 0.5, 256: 0.99}[launched["BLOCK"]] * (1 if launched["num_warps"] == 4 else 2)


CALLS = [("a", launch("_k", "small")), ("b", launch("_k", "large")), ("c", launch("_other", "small"))]


def test_the_fastest_candidate_is_kept() -> None:
    found = list(tune.tune({("_k", "small"): [{"BLOCK": 256}, {"BLOCK": 512}, {"BLOCK": 128}, {"num_warps": 8}]}, CALLS, "sm_90", clock))
    assert found == [(("_k", "small"), {"BLOCK": 128}, 1.0, 0.5)]
    assert list(tune.tune({("_k", "large"): [{"BLOCK": 256}]}, CALLS, "sm_90", clock)) == []  # 1 % better: noise
    with pytest.raises(ValueError, match="no shipped call asks for"):
        list(tune.tune({("_k", "absent"): [{}]}, CALLS, "sm_90", clock))


def test_only_the_key_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_triton, "_tuned", lambda: {"sm_90": {"_k": {"large": {"BLOCK": 256}}}})
    with tune.tuned("sm_90", ("_k", "small"), {"BLOCK": 128}) as asked:
        for _, call in CALLS:
            call()
    assert [launched["BLOCK"] for launched in seen[-3:]] == [128, 256, 64]
    assert asked == [("_k", "small"), ("_k", "large"), ("_other", "small")]
    assert tune.calls_of(("_k", "large"), CALLS, "sm_90") == [CALLS[1][1]]
    # What is in use is what candidates are held against: 0.99 there, so 0.98 is no gain.
    assert list(tune.tune({("_k", "large"): [{"BLOCK": 256}]}, CALLS, "sm_90", clock)) == []


def test_the_table_of_other_devices_stays() -> None:
    table = {"sm_80": {"_k": {"small": {"BLOCK": 32}}}, "sm_90": {"_k": {"small": {"BLOCK": 64}, "large": {"BLOCK": 64}}}}
    new = tune.merged(table, "sm_90", [(("_k", "small"), {"BLOCK": 128}), (("_new", "any"), {"num_warps": 8})])
    assert new["sm_80"] == table["sm_80"] and new["sm_90"]["_k"] == {"small": {"BLOCK": 128}, "large": {"BLOCK": 64}}
    assert new["sm_90"]["_new"] == {"any": {"num_warps": 8}} and table["sm_90"]["_k"]["small"] == {"BLOCK": 64}


def test_needs_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    if not torch.cuda.is_available():
        assert tune.main([]) == 2 and "needs a GPU" in capsys.readouterr().out
