"""Linears that share their input: one product where their weights lie side by side, the same numbers wherever they lie."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import llava_fast as lf
from llava_fast.kernels.linear import quantise
from llava_fast.models import layers
from llava_fast.models.layers import Linear, join, joined_linear


def make(bias: bool = True, dtype: torch.dtype = torch.float64) -> tuple[Linear, ...]:
    torch.manual_seed(0)
    return tuple(Linear(6, outputs, bias=bias).to(dtype) for outputs in (4, 2, 3))


def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Outputs of every product that joined_linear makes from here on."""
    made: list[int] = []
    plain = layers.linear

    def counted(x, weight, *rest, **named):
        made.append(weight.shape[0])
        return plain(x, weight, *rest, **named)

    monkeypatch.setattr(layers, "linear", counted)
    return made


@pytest.mark.parametrize("bias", [True, False])
def test_one_product_with_the_same_results_and_gradients(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    parts, apart = make(bias), make(bias)
    before = [part.weight for part in parts]
    join([parts])
    assert all(part.weight is old for part, old in zip(parts, before, strict=True))  # an optimiser still holds them
    made = products(monkeypatch)
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(5, 9, dtype=torch.float64)
    ours, expected = joined_linear(x, parts), torch.cat([nn.functional.linear(x, p.weight, p.bias) for p in apart], dim=-1)
    assert made == [9]
    torch.testing.assert_close(ours, expected)
    (ours * grad).sum().backward()
    (x_grad,), x.grad = [x.grad], None
    (expected * grad).sum().backward()
    torch.testing.assert_close(x_grad, x.grad)
    for part, other in zip(parts, apart, strict=True):
        torch.testing.assert_close(part.weight.grad, other.weight.grad)
        if bias:
            torch.testing.assert_close(part.bias.grad, other.bias.grad)


def test_weights_that_lie_apart_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = make()
    x = torch.randn(5, 6, dtype=torch.float64)
    made = products(monkeypatch)
    torch.testing.assert_close(joined_linear(x, parts), torch.cat([part(x) for part in parts], -1))
    assert made == [4, 2, 3] * 2
    join([parts])
    parts[1].weight.data = parts[1].weight.data.clone()  # moved away: nothing is read where it was
    parts[1].weight.data.zero_()
    assert joined_linear(x, parts)[:, 4:6].sub(parts[1].bias).abs().max() == 0


def test_writing_to_a_part_is_seen() -> None:
    parts = make()
    join([parts])
    x = torch.randn(2, 6, dtype=torch.float64)
    with torch.no_grad():
        parts[2].weight.mul_(3)
    torch.testing.assert_close(joined_linear(x, parts), torch.cat([part(x) for part in parts], -1))


@pytest.mark.parametrize("part", [0, 1, 2])
def test_writing_to_a_part_before_the_backward_pass_raises(part: int) -> None:
    parts = make()
    join([parts])
    out = joined_linear(torch.randn(2, 6, dtype=torch.float64, requires_grad=True), parts).sum()
    with torch.no_grad():
        parts[part].weight.mul_(3)
    with pytest.raises(RuntimeError, match="modified"):
        out.backward()


def test_neighbours_in_other_storages_are_not_joined() -> None:
    first, second = (torch.randn(n, 6) for n in (4, 2))
    assert layers._adjacent([first, second]) is None


def test_one_buffer_for_a_layer_and_no_second_move() -> None:
    parts, other = make(), Linear(4, 5, dtype=torch.float32)
    values = [part.weight.clone() for part in (*parts, other)]
    for _ in range(2):
        join([parts, (other,)])
        places = [part.weight.data_ptr() for part in (*parts, other)]
    join([parts, (other,)])
    assert places == [part.weight.data_ptr() for part in (*parts, other)]
    assert len({part.weight.untyped_storage().data_ptr() for part in (*parts, other)}) == 1
    assert all(torch.equal(part.weight, value) for part, value in zip((*parts, other), values, strict=True))


def test_quantised_parts_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = tuple(Linear(64, outputs, bias=False) for outputs in (4, 2))
    whole = quantise(torch.cat([part.weight for part in parts]), "int8", 32)
    for part, rows in zip(parts, (slice(0, 4), slice(4, 6)), strict=True):
        del part.weight
        part.weight = whole.rows(rows)
    made = products(monkeypatch)
    x = torch.randn(3, 64)
    torch.testing.assert_close(joined_linear(x, parts), x @ whole.dequantise().T, rtol=1e-5, atol=1e-5)
    assert made == [6]


@pytest.mark.parametrize("move", [lambda m: m, lambda m: m.double(), lambda m: m.to(torch.bfloat16).float()])
def test_a_loaded_model_is_joined_and_stays_so(directory, move, tmp_path) -> None:
    model = move(lf.load(directory, device="cpu"))
    for layer in model.language_model.layers:
        attention = layer.self_attn
        assert layers._adjacent([part.weight for part in (attention.q_proj, attention.k_proj, attention.v_proj)]) is not None
        assert layers._adjacent([layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight]) is not None
    for layer in model.vision_tower.encoder.layers:
        attention = layer.self_attn
        assert layers._adjacent([part.weight for part in (attention.q_proj, attention.k_proj, attention.v_proj)]) is not None
    model.save_pretrained(tmp_path / "saved")
    saved = dict(lf.load(tmp_path / "saved", device="cpu").named_parameters())
    assert all(torch.equal(saved[name], parameter) for name, parameter in model.named_parameters())
