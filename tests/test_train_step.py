"""How a step is computed: checkpointing by block, pure bf16 with unbiased rounding, 8-bit moments, compiled blocks, accumulation."""

from __future__ import annotations

import dataclasses
import sys

import numpy as np
import pytest
import torch
from test_train_flops import batch, sample
from test_train_mechanics import Bigram, Killed, Texts, change, config, equal, kill_after, weights  # noqa: F401 (config: a fixture)
from torch._dynamo.backends.debugging import aot_eager
from torch.utils._python_dispatch import TorchDispatchMode

import llava_fast as lf
from llava_fast.kernels import registry
from llava_fast.training import step as step_module
from llava_fast.training.batches import Row
from llava_fast.training.config import TrainConfig
from llava_fast.training.loop import fit
from llava_fast.training.rounding import RoundedAdamW, round_
from llava_fast.training.step import LabelLoss, make_optimizer, prepare_blocks, prepare_parameters, train_step

CONFIG = TrainConfig("m", "a.json", "out", lr=1e-3, lr_vision_tower=1e-3)


@pytest.fixture
def row():
    return batch([sample(40, 7, 2), sample(25, 3, 1, seed=1), sample(11, 11, seed=2)])


def gradients(model, row):
    model.zero_grad(set_to_none=True)
    loss = model.loss(row)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


class Saved:
    """Bytes that autograd keeps between the passes, each storage once."""

    def __enter__(self):
        self.storages = {}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def _pack(self, tensor):
        self.storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def __exit__(self, *error):
        self.hooks.__exit__(*error)


# --- checkpointing ---


@pytest.mark.parametrize("kind", ["qwen", "llama"])
@pytest.mark.parametrize("checkpointing", ["full", "selective"])
@pytest.mark.parametrize("kernels", [{}, dict.fromkeys(("linear", "varlen_attention"), "reference")], ids=["kernels", "reference"])
def test_checkpointed_gradients_are_the_same_to_the_bit(directory, checkpointing, kernels, row):
    model = lf.load(directory, device="cpu", dtype=torch.float32)
    with registry.use(**kernels):
        expected = gradients(model, row)
        prepare_blocks(model, dataclasses.replace(CONFIG, checkpointing=checkpointing))
        assert model.language_model.checkpointing == model.vision_tower.checkpointing == checkpointing
        loss, found = gradients(model, row)
    assert torch.equal(loss, expected[0])
    assert equal(found, expected[1])


def test_what_is_made_again(checkpoints, row):
    """Operations: attention only under 'full'; the last decoder layer never."""
    model = lf.load(checkpoints["qwen"], device="cpu", dtype=torch.float32)
    runs = {}
    for checkpointing in ("none", "selective", "full"):
        prepare_blocks(model, dataclasses.replace(CONFIG, checkpointing=checkpointing))
        calls = []
        layers = [*model.language_model.layers, *model.vision_tower.encoder.layers]
        handles = [layer.register_forward_pre_hook(lambda module, _, calls=calls: calls.append(module)) for layer in layers]
        attended = Attended()
        with attended:
            gradients(model, row)
        for handle in handles:
            handle.remove()
        runs[checkpointing] = ([calls.count(layer) for layer in layers], attended.count)
    layers = runs["none"][1]
    assert runs["none"] == ([1] * layers, layers)
    assert runs["selective"] == ([2, 2, 1] + [2] * (layers - 3), layers)
    assert runs["full"] == ([2, 2, 1] + [2] * (layers - 3), 2 * layers - 1)


class Attended(TorchDispatchMode):
    """Counts forward passes of attention that are computed."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.llava_fast.varlen_attention.default
        return func(*args, **(kwargs or {}))


def test_without_gradients_nothing_is_checkpointed(checkpoints, row):
    model = lf.load(checkpoints["qwen"], device="cpu", dtype=torch.float32)
    prepare_blocks(model, dataclasses.replace(CONFIG, checkpointing="full"))
    with torch.no_grad():
        assert not model.loss(row).requires_grad


def test_a_model_without_blocks_is_refused(config):  # noqa: F811
    with pytest.raises(ValueError, match="are for models with blocks, got a Bigram"):
        fit(Bigram(), Texts(), change(config, checkpointing="full"))
    with pytest.raises(ValueError, match="are for models with blocks, got a Bigram"):
        fit(Bigram(), Texts(), change(config, compile=True))


# --- compiled blocks ---


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_compiled_blocks_compute_the_same(checkpoints, row, checkpointing, monkeypatch):
    graphs = []
    monkeypatch.setattr(step_module, "BACKEND", lambda graph, inputs: graphs.append(graph) or aot_eager(graph, inputs))
    model = lf.load(checkpoints["qwen"], device="cpu", dtype=torch.float32)
    loss, expected = gradients(model, row)
    prepare_blocks(model, dataclasses.replace(CONFIG, compile=True, checkpointing=checkpointing))
    compiled_loss, compiled = gradients(model, row)
    called = [str(graph.code) for graph in graphs]
    assert any("fc1" in code for code in called) and any("gate_proj" in code for code in called)  # of both stacks
    torch.testing.assert_close(compiled_loss, loss, rtol=1e-5, atol=0)
    floor = 1e-6 * torch.nn.utils.get_total_norm(expected.values())  # a key's bias has the gradient zero in exact arithmetic
    for name in expected:
        assert (compiled[name] - expected[name]).norm() < 1e-5 * expected[name].norm() + floor, name


# --- accumulation ---


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_rows_accumulated_equal_one_row(checkpoints, precision):
    samples = [sample(40, 7, 2), sample(25, 3, 1, seed=1), sample(11, 11, seed=2)]
    results = []
    for rows in ([samples], [[s] for s in samples]):
        model = lf.load(checkpoints["qwen"], device="cpu", dtype=torch.float32)
        trained = prepare_parameters(model, CONFIG, precision)
        made = [Row(batch(row), tuple(range(len(row))), tuple(range(len(row) + 1))) for row in rows]
        sgd = torch.optim.SGD([{"params": list(trained.masters.values()), "peak_lr": 1.0}], lr=1.0)
        before = {name: master.detach().clone() for name, master in trained.masters.items()}
        loss, norm, _ = train_step(model, trained, sgd, made, 1.0, None, "cpu", LabelLoss())
        results.append((loss, norm, {name: before[name] - master.detach() for name, master in trained.masters.items()}))
    (loss_a, norm_a, a), (loss_b, norm_b, b) = results
    torch.testing.assert_close(loss_a, loss_b, rtol=1e-6, atol=0)
    torch.testing.assert_close(norm_a, norm_b, rtol=1e-5 if precision == "fp32" else 1e-3, atol=0)
    for name in a:
        # A key's bias has the gradient zero in exact arithmetic: the floor is a millionth of all gradients.
        allowed = (1e-5 if precision == "fp32" else 1e-2) * a[name].norm() + (1e-6 if precision == "fp32" else 1e-3) * norm_a
        assert (a[name] - b[name]).norm() < allowed, name


@pytest.mark.parametrize("kind", ["qwen", "qwen_untied"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("pictures", [True, False])
def test_looked_up_rows_are_added_to_the_heads_gradient(directory, precision, pictures):
    """The gradients of a step are those of a plain backward pass; a token that stands in the row twice counts twice."""
    samples = [sample(40, 7, 2 * pictures), sample(25, 25, seed=1), sample(25, 3, seed=1)]
    rows = [Row(batch(samples), (0, 1, 2), (0, 1, 2, 3)), Row(batch([sample(9, 0)]), (3,), (0, 1))]
    model = lf.load(directory, device="cpu", dtype=torch.float32)
    if precision == "bf16":
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16().float()
    sum(model.loss(row.batch) / 34 for row in rows).backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    scale = torch.nn.utils.get_total_norm(expected.values())
    model.zero_grad()
    trained = prepare_parameters(model, CONFIG, precision)
    sgd = torch.optim.SGD([{"params": list(trained.masters.values()), "peak_lr": 1.0}], lr=1.0)
    before = {name: master.detach().clone() for name, master in trained.masters.items()}
    _, norm, _ = train_step(model, trained, sgd, rows, 1.0, None, "cpu", LabelLoss())
    assert model.looked_up is None
    name = "language_model.embed_tokens.weight"
    difference = (before[name] - trained.masters[name].detach() - expected[name]).norm()
    assert difference < (1e-5 if precision == "fp32" else 2e-2) * expected[name].norm()
    torch.testing.assert_close(norm, scale, rtol=1e-5 if precision == "fp32" else 2e-2, atol=0)


def test_a_step_that_fails_leaves_the_model_as_any_other(checkpoints, row):
    model = lf.load(checkpoints["qwen"], device="cpu", dtype=torch.float32)
    trained = prepare_parameters(model, CONFIG, "fp32")

    class Broken(LabelLoss):
        def __call__(self, model, row):
            raise RuntimeError("broken")

    made = [Row(row, (0, 1, 2), (0, 1, 2, 3))]
    with pytest.raises(RuntimeError, match="broken"):
        train_step(model, trained, make_optimizer(trained.masters, CONFIG), made, 1.0, None, "cpu", Broken())
    assert model.looked_up is None


# --- pure bf16 ---


def test_rounding_is_unbiased_between_the_two_neighbours():
    generator = torch.Generator().manual_seed(0)
    values = torch.tensor([0.1, -0.1, 1.0, 3.14159, 1e-30, -7e4])
    draws = torch.stack([torch.empty(6, dtype=torch.bfloat16) for _ in range(4000)])
    for draw in draws:
        round_(draw, values.clone(), generator)
    for i, value in enumerate(values.tolist()):
        seen = draws[:, i].float().unique()
        gap = abs(value) * 2.0**-7
        assert len(seen) <= 2 and all(abs(float(neighbour) - value) < gap for neighbour in seen)
        # The mean of 4,000 draws between two neighbours: five standard errors.
        assert abs(float(draws[:, i].double().mean()) - value) <= 5 * gap / 2 / 4000**0.5
    special = torch.tensor([0.0, float("inf"), -float("inf"), float("nan")])
    rounded = torch.empty(4, dtype=torch.bfloat16)
    round_(rounded, special.clone(), generator)
    quiet = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, 0x7FC00000], dtype=torch.int32).view(torch.float32)  # NaNs of several devices
    for _ in range(20):
        nans = torch.empty(4, dtype=torch.bfloat16)
        round_(nans, quiet.clone(), generator)
        assert nans.isnan().all()
    assert rounded[0] == 0 and rounded[1] == float("inf") and rounded[2] == -float("inf") and rounded[3].isnan()


def test_the_update_is_adamw_but_for_rounding(monkeypatch):
    """Many equal parameters: their mean follows AdamW in fp32, over steps that nearest rounding would lose whole."""
    count, steps = 20_000, 60
    target = torch.full((count,), 0.1, dtype=torch.bfloat16, requires_grad=True)
    exact = target[:1].detach().float().requires_grad_()
    ours = RoundedAdamW([{"params": [target], "lr": 1e-5, "weight_decay": 0.1}], (0.9, 0.999), 1e-8, seed=3)
    theirs = torch.optim.AdamW([exact], lr=1e-5, weight_decay=0.1)
    monkeypatch.setattr("llava_fast.training.rounding.CHUNK", 7_000)  # several, the last one short
    start = float(exact.detach())
    for number in range(steps):
        gradient = 0.5 if number % 3 else -0.25
        target.grad, exact.grad = torch.full_like(target, gradient), torch.full_like(exact, gradient)
        ours.step()
        theirs.step()
    moved = float(exact.detach()) - start
    assert abs(moved) > 1e-4 and len(target.unique()) > 1
    assert float(target.detach().double().mean()) - start == pytest.approx(moved, rel=0.05)
    assert all(value.dtype == torch.bfloat16 for key, value in ours.state[target].items() if key != "step")


def test_pure_bf16_learns_what_nearest_rounding_would_lose(config):  # noqa: F811
    """As the test of fp32 masters: 300 steps of about 1e-5 on weights of about 0.1."""
    settings = change(config, lr=1e-5, lr_vision_tower="lr", max_steps=300, schedule="constant", warmup_ratio=0.0)
    exact, pure = Bigram(), Bigram()
    start = weights(exact)
    fit(exact, Texts(), settings)
    fit(pure, Texts(), change(settings, precision="bf16_pure", output_dir=settings.output_dir + "-pure"))
    assert all(parameter.dtype == torch.bfloat16 for parameter in pure.parameters())
    name = "lm_head.weight"
    moved, ours = (weights(exact)[name] - start[name]).flatten(), (weights(pure)[name].float() - start[name].bfloat16().float()).flatten()
    assert torch.corrcoef(torch.stack([moved, ours]))[0, 1] > 0.8  # a walk of 300 roundings, 1e-3 wide, over moves of 3e-3
    assert float(moved @ ours / (moved @ moved)) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("fields", [{"precision": "bf16_pure"}, {"optimizer": "adamw_8bit"}], ids=["bf16_pure", "adamw_8bit"])
def test_a_killed_run_goes_on_bit_for_bit(config, fields, tmp_path):  # noqa: F811
    settings = change(config, save_every=2, log_every=1, weight_decay=0.1, **fields)
    whole = Bigram(width=128)  # matrices of 6,400 values: smaller ones keep their moments in fp32
    uninterrupted = fit(whole, Texts(), settings)
    again = change(settings, output_dir=str(tmp_path / "again"))
    with pytest.raises(Killed):
        fit(Bigram(width=128), Texts(), again, on_step=kill_after(5))
    resumed_model = Bigram(width=128)
    resumed = fit(resumed_model, Texts(), again)
    assert resumed.losses == uninterrupted.losses
    assert equal(weights(resumed_model), weights(whole))


def test_the_draws_follow_from_the_seed(config):  # noqa: F811
    found = []
    for seed in (20_240_601, 20_240_601, 1):
        model = Bigram()
        trained = prepare_parameters(model, change(config, precision="bf16_pure", seed=seed), "bf16_pure")
        optimizer = make_optimizer(trained.masters, change(config, precision="bf16_pure", seed=seed))
        for parameter in trained.masters.values():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        found.append(weights(model))
    assert equal(found[0], found[1]) and not equal(found[0], found[2])


def test_every_step_draws_anew():
    """A value that was rounded up in one step and not in the next, and the other way round: with the same draws one set holds the other."""
    parameter = torch.full((1000,), 0.1, dtype=torch.bfloat16, requires_grad=True)
    optimizer = RoundedAdamW([{"params": [parameter], "lr": 1e-4}], (0.9, 0.999), 1e-8, seed=0)
    start, moved = parameter.detach().clone(), []
    for _ in range(2):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        moved.append(parameter.detach() != start)
        parameter.data.copy_(start)
        for moment in ("exp_avg", "exp_avg_sq"):
            optimizer.state[parameter][moment].zero_()
    assert (moved[0] & ~moved[1]).any() and (moved[1] & ~moved[0]).any()


# --- 8 bits ---


def test_8_bit_moments_learn_like_adamw(config):  # noqa: F811
    plain, narrow = Bigram(width=128), Bigram(width=128)
    expected = fit(plain, Texts(), config)
    found = fit(narrow, Texts(), change(config, optimizer="adamw_8bit", output_dir=config.output_dir + "-8"))
    assert found.losses[0] == expected.losses[0]
    np.testing.assert_allclose(found.losses, expected.losses, rtol=0.02)
    trained = prepare_parameters(Bigram(width=128), config, "fp32")
    optimizer = make_optimizer(trained.masters, change(config, optimizer="adamw_8bit"))
    for master in trained.masters.values():
        master.grad = torch.ones_like(master)
    optimizer.step()
    assert optimizer.state[trained.masters["lm_head.weight"]]["state1"].dtype == torch.uint8
    assert {group["part"] for group in optimizer.param_groups} == {"vision_tower", "projector", "decoder"}


def test_without_bitsandbytes_the_message_says_what_to_install(config, monkeypatch):  # noqa: F811
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ValueError, match=r"needs bitsandbytes .*pip install llava_fast\[train\]"):
        fit(Bigram(), Texts(), change(config, optimizer="adamw_8bit"))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"checkpointing": "some"}, "none or full or selective, got 'some'"),
        ({"optimizer": "lion"}, "adamw or adamw_8bit, got 'lion'"),
        ({"compile": "yes"}, "compile must be true or false, got 'yes'"),
        ({"precision": "fp16"}, "bf16 or bf16_pure, got 'fp16'"),
        ({"precision": "bf16_pure", "optimizer": "adamw_8bit"}, "takes optimizer adamw, got adamw_8bit"),
    ],
)
def test_settings_that_are_refused(config, fields, message):  # noqa: F811
    with pytest.raises(ValueError, match=message):
        change(config, **fields)
