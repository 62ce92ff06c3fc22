"""Which implementation runs: order, requests by name, and what is refused."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch

from llava_fast.kernels import registry
from llava_fast.kernels.registry import Implementation


@pytest.fixture(autouse=True)
def op(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An op 'toy' whose functions return their own names; everything is resolved anew in each test."""
    registry.explain("cpu", [])  # loads every op: one that is first loaded by a test would be gone with its copy
    monkeypatch.setattr(registry, "_ops", dict(registry._ops))
    monkeypatch.delenv(registry.ENVIRONMENT, raising=False)
    registry.register(
        "toy",
        {
            "flash_attn": Implementation(modules=("a_module_that_does_not_exist",)),
            "triton": Implementation(devices=("cuda",), serves=lambda head_dim: head_dim != 72),
            "cuda": Implementation(devices=("cuda",), default=False),
            "cpu": Implementation(("cpu",), (torch.float32,)),
            "reference": Implementation(),
        },
    )
    with registry.use():
        yield


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (("cpu", torch.float32), "cpu"),
        (("cpu", torch.float64), "reference"),
        (("cuda", torch.bfloat16, 64), "triton"),
        (("cuda", torch.bfloat16, 72), "reference"),
    ],
)
def test_first_default_that_serves(call: tuple, expected: str) -> None:
    assert registry.resolve_name("toy", *call) == expected


def test_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert registry.resolve_name("toy", "cuda", torch.float32) == "triton"
    with registry.use(toy="cuda"):
        assert registry.resolve_name("toy", "cuda", torch.float32) == "cuda"
        with registry.use(toy="reference", spatial_pool="reference"):
            assert registry.resolve_name("toy", "cuda", torch.float32) == "reference"
        assert registry.resolve_name("toy", "cuda", torch.float32) == "cuda"
    monkeypatch.setenv(registry.ENVIRONMENT, "toy = reference, spatial_pool=reference")
    with registry.use():
        assert registry.resolve_name("toy", "cpu", torch.float32) == "reference"
        assert registry.resolve_name("spatial_pool", "cpu", torch.float32) == "reference"
        with registry.use(toy="cpu"):
            assert registry.resolve_name("toy", "cpu", torch.float32) == "cpu"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("toys=cpu", "no op 'toys'"),
        ("toy=xformers", "toy has no implementation 'xformers'"),
        ("spatial_pool=flash_attn", "spatial_pool has no implementation 'flash_attn'"),
        ("toy", "must look like"),
        ("toy=cpu=cpu", "no implementation 'cpu=cpu'"),
        ("toy=triton", "it runs on cuda, not on cpu"),
        ("toy=cpu", "it takes float32, not float64"),
        ("toy=flash_attn", "a_module_that_does_not_exist does not import"),
    ],
)
def test_requests_that_cannot_be_met(setting: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(registry.ENVIRONMENT, setting)
    with pytest.raises(ValueError, match=message):
        registry.resolve_name("toy", "cpu", torch.float64)


def test_use_checks_at_once_and_restores_after_errors() -> None:
    with pytest.raises(ValueError, match="no op 'nrom'"), registry.use(nrom="reference"):
        pass
    with pytest.raises(KeyError), registry.use(toy="reference"):
        raise KeyError
    assert registry.resolve_name("toy", "cpu", torch.float32) == "cpu"


def test_every_file_is_an_op_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """An op is known by the name of its file before anything imports it."""
    monkeypatch.setattr(registry, "_ops", {})
    with pytest.raises(ValueError, match=r"expected one of .*\bspatial_pool\b"):
        registry._check("no_such_op", "reference")


def test_resolved_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="llava_fast.kernels"):
        for _ in range(3):
            registry.resolve_name("toy", "cpu", torch.float32)
            registry.resolve_name("toy", "cuda", torch.float32, 64)
    cpu, cuda = caplog.messages
    assert cpu.startswith("toy (cpu, float32): cpu, default") and "flash_attn: a_module_that_does_not_exist" in cpu
    assert cuda.startswith("toy (cuda, float32, 64): triton, default")


def test_only_import_errors_are_caught(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    (tmp_path / "broken_module.py").write_text("raise RuntimeError('broken')")
    monkeypatch.syspath_prepend(tmp_path)
    registry.register("toy", {"cpu": Implementation(modules=("broken_module",)), "reference": Implementation()})
    with pytest.raises(RuntimeError, match="broken"):
        registry.resolve_name("toy", "cpu", torch.float32)


def test_explain_says_what_runs_and_why_the_others_do_not() -> None:
    toy = {choice.shape: choice for choice in registry.explain("cuda", [torch.bfloat16]) if choice.op == "toy"}
    assert list(toy) == [None]
    registry.register("toy", registry._ops["toy"], shapes=(64, 72))
    toy = {choice.shape: choice for choice in registry.explain("cuda", [torch.bfloat16]) if choice.op == "toy"}
    assert (toy[64].name, toy[64].reason, toy[72].name) == ("triton", "default", "reference")
    assert toy[72].others["triton"] == "it does not serve shape class 72"
    assert toy[64].others["cpu"] == "it runs on cpu, not on cuda" and toy[64].others["reference"] == "triton comes first"
    assert toy[64].others["cuda"].startswith("not a default") and "does not import" in toy[64].others["flash_attn"]
    with registry.use(toy="cuda"):
        asked = next(choice for choice in registry.explain("cuda", [torch.bfloat16]) if choice.op == "toy")
        assert (asked.name, asked.reason, asked.others["triton"]) == ("cuda", "asked for", "cuda was asked for")


def test_explain_knows_every_op() -> None:
    """Every op's shape classes can be asked about, on both kinds of device."""
    for device, dtype in (("cpu", torch.float32), ("cpu", torch.float64), ("cuda", torch.bfloat16)):
        choices = registry.explain(device, [dtype])
        assert "spatial_pool" in {choice.op for choice in choices}
        assert all(choice.name or choice.op == "toy" for choice in choices), choices
        for choice in choices:
            if choice.name:
                assert registry.resolve_name(choice.op, device, dtype, choice.shape) == choice.name
