"""Where the time goes: operations and bytes of each op against the model's own count, and the command."""

from __future__ import annotations

import sys

import pytest
import torch
from PIL import Image

import llava_fast as lf
from llava_fast import profile
from llava_fast.cli import main
from llava_fast.engine.stats import weight_bytes
from llava_fast.kernels import registry
from llava_fast.kernels.activation import swiglu
from llava_fast.kernels.linear import linear
from llava_fast.kernels.varlen_attention import varlen_attention
from llava_fast.limits import Limits
from llava_fast.training.flops import row_flops

LIMITS = Limits("cpu", 1, 10.0, 10.0, 100.0, 100.0, 100.0)


def total(phase: profile.Phase) -> float:
    return sum(op.operations for op in phase.ops)


@pytest.mark.parametrize("kind", ["qwen", "llama"])
def test_operations_are_those_of_the_model(kind, checkpoints) -> None:
    model = lf.load(checkpoints[kind], device="cpu", dtype="float32")
    tower, prefill, decode, training = profile.profile(model, LIMITS, tokens=100, training_tokens=60)
    c, views = model.config.decoder, 60 // model.config.patches and 1
    batch = profile.row_of(model, 60, views, 60 // 27)
    # The last layer's attention is counted by a mean of its rows' keys.
    assert total(training) == pytest.approx(row_flops(model.config, batch, trained=("projector", "decoder")), rel=0.03)

    only_tower = row_flops(model.config, profile.row_of(model, 60, 1, 2), trained=()) - row_flops(
        model.config, profile.row_of(model, 60, 0, 2), trained=()
    )
    projector = 2 * model.config.patches * (model.config.vision.width + c.width) * c.width
    assert total(tower) == pytest.approx(only_tower - projector, rel=0.02)

    attended, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    products = 2 * (c.layers * (2 * c.width * (attended + kv) + 3 * c.width * c.mlp_width) + c.vocab_size * c.width)
    assert total(decode) == products + 4 * attended * 101 * c.layers
    assert total(prefill) > 90 * products * (c.layers - 1) / c.layers / 2


def test_a_token_reads_its_weights_and_keys(checkpoints) -> None:
    model = lf.load(checkpoints["qwen"], device="cpu", dtype="float32")
    decode = profile.profile(model, LIMITS, tokens=100)[2]
    moved = {op.name: op.moved for op in decode.ops}
    c = model.config.decoder
    keys = 101 * 2 * c.kv_heads * c.head_dim * 4 * c.layers
    assert moved["paged_attention"] == pytest.approx(keys, rel=0.1)  # and its queries and outputs
    assert sum(moved.values()) == pytest.approx(weight_bytes(model) + keys, rel=0.25)  # and a row of everything between


def test_work_of_views_lookups_and_changes_in_place() -> None:
    x = torch.ones(10, 4)
    with profile.Clock(torch.device("cpu")) as clock:
        x.t()
        x[torch.tensor([1, 2])]
        x.add_(1)
        torch.empty(1000)
        x @ x.t()
    assert [clock.calls[name][0][1:3] for name in ("t", "index", "add_", "empty")] == [(0, 0), (64, 0), (320, 0), (0, 0)]
    assert clock.calls["mm"][0][2] == 2 * 10 * 10 * 4


def test_visible_ops_are_custom_ops_and_give_the_same() -> None:
    x = torch.randn(3, 8)
    expected = swiglu(x)
    with profile.Clock(torch.device("cpu")) as clock:
        swiglu(x)
        assert "activation" not in clock.calls
        with registry.visible():
            assert torch.equal(swiglu(x), expected)
        swiglu(x)
    assert len(clock.calls["activation"]) == 1


def test_shares_and_limits() -> None:
    def run() -> None:
        torch.ones(1 << 20).add_(1)

    phase = profile.clock("sum", run, torch.device("cpu"), LIMITS)
    ops = {op.name: op for op in phase.ops}
    assert ops["add_"].limit == pytest.approx(2 * (1 << 22) / 10e9) and ops["add_"].bound == "memory" and ops["add_"].calls == 1
    assert [op.seconds for op in phase.ops] == sorted((op.seconds for op in phase.ops), reverse=True)
    assert phase.between == pytest.approx(phase.seconds - sum(op.seconds for op in phase.ops))


def test_weights_are_multiplied_on_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """100 GFLOP/s of multiply-adds, 1,200 of tiles, three of which make a product with bf16 weights; attention has none."""
    machine = Limits("cpu", 1, 1e6, 1e6, 100.0, 100.0, 100.0, 1200.0)
    x, weight, cu = torch.randn(64, 96), torch.randn(128, 96).bfloat16(), torch.tensor([0, 64], dtype=torch.int32)
    q = torch.randn(64, 2, 48)

    def run() -> None:
        linear(x, weight)
        varlen_attention(q, q, q, cu, cu, causal=False)

    ops = {op.name: op for op in profile.clock("both", run, torch.device("cpu"), machine).ops}
    assert ops["linear"].limit == pytest.approx(2 * 64 * 96 * 128 / 400e9)
    assert ops["varlen_attention"].limit == pytest.approx(4 * 64 * 64 * 96 / 100e9)


def test_command(checkpoints, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("llava_fast.limits.probe", lambda device: LIMITS)
    picture = tmp_path / "profile.png"
    command = ["llava-fast", "bench", "profile", "-m", str(checkpoints["qwen"]), "--tokens", "40", "--training-tokens", "30"]
    monkeypatch.setattr(sys, "argv", [*command, "--out", str(picture), "--device", "cpu"])
    with pytest.raises(SystemExit) as exit:
        main()
    assert not exit.value.code
    said = capsys.readouterr().out
    for phase in ("tower, one picture", "prefill, 40 tokens", "decode after 40 tokens", "training, 30 tokens", "between ops"):
        assert phase in said
    assert Image.open(picture).size[0] > 500


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(tokens=5000), "5000 tokens and an answer are more than the context's 2048"),
        (dict(tokens=20, training_tokens=9), "pictures take 9 of 9 tokens|nothing is left"),
    ],
)
def test_refused(arguments, message, checkpoints) -> None:
    model = lf.load(checkpoints["qwen"], device="cpu", dtype="float32")
    if "training_tokens" in arguments:
        with pytest.raises(ValueError, match=message):
            profile.row_of(model, arguments["training_tokens"], 1)
    else:
        with pytest.raises(ValueError, match=message):
            profile.profile(model, LIMITS, **arguments)


def test_a_quantised_model_is_not_trained(checkpoints) -> None:
    model = lf.load(checkpoints["qwen"], device="cpu", quantise="int8")
    with pytest.raises(ValueError, match="profile it without a training step"):
        profile.profile(model, LIMITS, tokens=20, training_tokens=30)
