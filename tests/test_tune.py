"""bench/tune.py with a clock of our own: what it times, what it keeps, what it writes."""

from __future__ import annotations

import importlib
import sys
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


TUNED_OPS = ["varlen_attention", "paged_attention", "linear", "linear_cross_entropy", "norm", "spatial_pool", "projector"]


@pytest.mark.parametrize("op", TUNED_OPS)
def test_candidates_are_overrides_of_shipped_launches(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each names launch parameters that its kernel's `config` call has. That it compiles without spills: bench.tune --check."""
    runtime = pytest.importorskip("triton.runtime.jit")
    module = importlib.import_module(f"llava_fast.kernels.{op}")
    defaults: dict[tuple[str, str], dict[str, Any]] = {}

    def config(kernel: str, shape: str, default: dict[str, Any], device: torch.device) -> dict[str, Any]:
        return defaults.setdefault((kernel, shape), dict(default)).copy()

    for loaded in [file for name, file in sys.modules.items() if name.startswith("llava_fast.kernels.") and hasattr(file, "config")]:
        monkeypatch.setattr(loaded, "config", config)
    monkeypatch.setattr(runtime.JITFunction, "run", lambda *arguments, **named: None)
    for _, call in module.shipped_calls("meta"):
        call()
    for key, lists in module.candidates().items():
        assert key in defaults, f"no shipped call asks for {key}"
        assert 1 <= len(lists) <= 15 and len({tuple(sorted(found.items())) for found in lists}) == len(lists), key
        for found in lists:
            assert set(found) <= set(defaults[key]), (key, found, defaults[key])
            sizes = [value for name, value in found.items() if name not in ("num_stages", "programs")]
            assert all(value & (value - 1) == 0 for value in sizes), (key, found)
