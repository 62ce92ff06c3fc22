"""The Triton kernels of paged_attention, interpreted: decode with one and with several splits, and prefill."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llava_fast.kernels import _paged_attention_triton as kernels
from llava_fast.kernels import _varlen_attention_triton, registry
from llava_fast.kernels.paged_attention import paged_attention
from tests.test_paged_attention import expected, make

TILES = {"BLOCK_M": 16, "BLOCK_N": 16}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    def config(kernel: str, shape_class: str, default: dict[str, Any], device: torch.device) -> dict[str, Any]:
        return {name: TILES.get(name, value) for name, value in default.items()}

    monkeypatch.setattr(kernels, "config", config)
    monkeypatch.setattr(_varlen_attention_triton, "config", config)


DECODE = ([1, 0, 1, 1], [70, 0, 1, 16])
CASES: dict[str, dict[str, Any]] = {
    "decode": dict(H=2, G=2),
    "decode d72": dict(H=1, G=1, d=72),
    "decode d80 grouped": dict(H=3, G=1, d=80),
    "decode grouped": dict(H=8, G=2),
    "decode large pages": dict(H=2, G=2, page=64),
    "decode fp8": dict(H=2, G=2, stored=torch.float8_e4m3fn),
    "decode fp8 grouped": dict(H=4, G=2, stored=torch.float8_e4m3fn),
    "several rows": dict(H=2, G=1, lengths=([2, 3], [2, 50])),
    "prefill": dict(H=2, G=2, lengths=([37, 3], [50, 3])),
    "prefill grouped d96": dict(H=2, G=1, d=96, lengths=([20], [20])),
    "prefill fp8": dict(H=2, G=2, d=128, lengths=([1, 18], [40, 33]), stored=torch.float8_e4m3fn),
}


def case(name: str, dtype: torch.dtype) -> dict[str, Any]:
    options = dict(CASES[name])
    return make(*options.pop("lengths", DECODE), dtype=dtype, **options)


@pytest.mark.parametrize(
    ("name", "splits", "dtype"),
    [
        *((name, 1, torch.float32) for name in CASES),
        *((name, 4, torch.float32) for name in CASES if "prefill" not in name),
        ("decode", 1, torch.float16),
        ("decode fp8 grouped", 4, torch.float16),
        ("prefill", 1, torch.float16),
    ],
)
def test_equals_the_definition(name: str, dtype: torch.dtype, splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "split_count", lambda *shape: splits)
    call = case(name, dtype)
    truth, same = expected(call), paged_attention(**call)
    with registry.use(paged_attention="triton"):
        out, again = paged_attention(**call), paged_attention(**call)
    assert out.dtype == dtype and torch.equal(out, again)
    error, torchs = float((out.double() - truth).abs().max()), float((same.double() - truth).abs().max())
    assert error <= 2 * torchs + 4 * torch.finfo(dtype).eps * float(truth.abs().max()), (error, torchs)


@pytest.mark.parametrize("name", ["decode fp8", "decode fp8 grouped", "prefill fp8"])
def test_fp8_widened_by_hand(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU without fp8: the same numbers, bit for bit."""
    call = case(name, torch.float32)
    with registry.use(paged_attention="triton"):
        converted = paged_attention(**call)
        monkeypatch.setattr(kernels, "device_class", lambda device: "sm_80")
        assert torch.equal(paged_attention(**call), converted)


def test_every_fp8_value_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """One key a sequence: the output is its value."""
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    values = torch.where(values.float().isnan(), torch.zeros(()), values.float()).to(torch.float8_e4m3fn)
    cache = values.view(4, 1, 1, 64).expand(4, 16, 1, 64).contiguous()
    monkeypatch.setattr(kernels, "device_class", lambda device: "sm_80")
    table, cu, ones = torch.arange(4, dtype=torch.int32)[:, None], torch.arange(5, dtype=torch.int32), torch.ones(4, dtype=torch.int32)
    out = kernels.forward(torch.zeros(4, 1, 64), cache, cache, table, cu, ones, 1.0, None, None)
    assert torch.equal(out.flatten(), values.float())


def test_a_sequence_knows_nothing_of_its_neighbours() -> None:
    call = case("decode", torch.float32)
    with registry.use(paged_attention="triton"):
        before = paged_attention(**call)
        other = int(call["block_table"][0, 0])
        call["k_cache"][other], call["v_cache"][other] = 9.0, 9.0
        after = paged_attention(**call)
    assert not torch.equal(before[0], after[0]) and torch.equal(before[1:], after[1:])


@pytest.mark.parametrize(
    ("rows", "groups", "keys", "splits"), [(1, 16, 1500, 32), (1, 32, 4096, 16), (64, 16, 4096, 1), (1, 2, 64, 1), (1, 2, 100_000, 64)]
)
def test_split_count(rows: int, groups: int, keys: int, splits: int) -> None:
    assert kernels.split_count(rows, groups, keys, torch.device("cpu")) == splits
