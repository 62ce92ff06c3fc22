"""The training loop's mechanics on a stand-in model: configuration, schedule, groups, order of data, accumulation, stop and resume."""

from __future__ import annotations

import dataclasses
import json
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import get_scheduler

from llava_fast.batch import IGNORE, Sample
from llava_fast.requests import InputOptions
from llava_fast.training.batches import Example, Position, ahead, make_steps, total_steps
from llava_fast.training.config import TrainConfig, as_config
from llava_fast.training.loop import fit
from llava_fast.training.step import LabelLoss, decays, lr_factor, make_optimizer, part_of, prepare_parameters, train_step

VOCABULARY = 50


class Texts:
    """Random texts of random lengths, the first three tokens not supervised; `broken` ones cannot be loaded."""

    def __init__(self, count=20, broken=(), fingerprint=0):
        self.fingerprint = fingerprint
        self.tokens = np.random.default_rng(0).integers(5, 30, count)
        self.views = np.zeros(count, dtype=np.int64)
        self.broken = broken

    def load(self, index):
        if index in self.broken:
            raise ValueError(f"sample {index} is broken")
        ids = np.random.default_rng(index).integers(1, VOCABULARY, self.tokens[index])
        return Example((Sample(ids, labels=np.where(np.arange(len(ids)) < 3, IGNORE, ids)),))


class Bigram(nn.Module):
    """Predicts a token from the one before; with parameters of every part, the tower's and projector's added to every row."""

    def __init__(self, width=16):
        super().__init__()
        torch.manual_seed(0)
        self.language_model = nn.ModuleDict({"embed_tokens": nn.Embedding(VOCABULARY, width), "norm": nn.LayerNorm(width)})
        self.lm_head = nn.Linear(width, VOCABULARY)
        self.vision_tower = nn.ModuleDict({"layer": nn.Linear(width, width)})
        self.multi_modal_projector = nn.ModuleDict({"linear_1": nn.Linear(width, width)})

    def loss(self, batch, reduction="sum"):
        x = self.language_model["embed_tokens"](batch.token_ids[batch.label_rows])
        x = x + self.multi_modal_projector["linear_1"](self.vision_tower["layer"](x))
        return F.cross_entropy(self.lm_head(self.language_model["norm"](x)).float(), batch.labels, reduction=reduction)


@pytest.fixture
def config(tmp_path):
    return TrainConfig(
        model="stand-in",
        data="none.json",
        output_dir=str(tmp_path / "run"),
        tokens_per_row=64,
        rows_per_step=2,
        epochs=3,
        lr=1e-2,
        lr_vision_tower=1e-3,
        log_every=2,
        save_every=None,
        progress=False,
    )


def change(config, **fields):
    return dataclasses.replace(config, **fields)


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- configuration ---


def test_config_from_mapping_yaml_and_toml(tmp_path):
    fields = {"model": "m", "data": ["a.json"], "output_dir": "out", "lr": 1e-5, "betas": [0.9, 0.95], "inputs": {"pool": "average"}}
    base = as_config(fields)
    assert base.data == ("a.json",) and base.betas == (0.9, 0.95) and base.inputs == InputOptions(pool="average")
    assert as_config(base) is base
    (tmp_path / "c.yaml").write_text("model: m\ndata: a.json\noutput_dir: out\nlr: 1e-5\nbetas: [0.9, 0.95]\ninputs: {pool: average}\n")
    (tmp_path / "c.toml").write_text('model="m"\ndata="a.json"\noutput_dir="out"\nlr=1e-5\nbetas=[0.9,0.95]\n[inputs]\npool="average"\n')
    assert as_config(tmp_path / "c.yaml") == as_config(tmp_path / "c.toml") == base


def test_config_defaults_are_those_of_the_recipe():
    config = TrainConfig("m", "a.json", "out")
    assert [config.part_lr(part) for part in ("vision_tower", "projector", "decoder")] == [2e-6, 1e-5, 1e-5]
    assert (config.betas, config.eps, config.weight_decay, config.clip) == ((0.9, 0.999), 1e-8, 0.0, 1.0)
    assert (config.warmup_ratio, config.schedule, config.epochs) == (0.03, "cosine", 1)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"learning_rat": 1}, "no field 'learning_rat'"),
        ({"lr_visiontower": 1}, "did you mean 'lr_vision_tower'"),
        ({"inputs": {"poool": "max"}}, "inputs has no field 'poool'; did you mean 'pool'"),
        ({"lr": -1}, "lr must be a number > 0, got -1"),
        ({"lr": float("nan")}, "lr must be"),
        ({"lr_decoder": "same"}, "'frozen', got 'same'"),
        ({"lr_vision_tower": None, "lr_projector": None, "lr_decoder": "frozen"}, "not all frozen"),
        ({"betas": [0.9]}, "betas"),
        ({"schedule": "step"}, "cosine or linear or constant"),
        ({"template": "llama_2"}, "'llama_2'"),
        ({"tokens_per_row": 0}, "tokens_per_row must be an integer >= 1, got 0"),
        ({"max_steps": 1.5}, "max_steps"),
        ({"data": []}, "at least one file"),
        ({"clip": 0}, "clip"),
    ],
)
def test_config_errors_name_the_field(fields, message):
    with pytest.raises(ValueError, match=message):
        as_config({"model": "m", "data": ["a.json"], "output_dir": "out", **fields})


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(TrainConfig)])
@pytest.mark.parametrize("value", [object(), [object()], {"a": object()}])
def test_any_field_of_a_wrong_kind_is_named_without_its_address(name, value):
    with pytest.raises(ValueError, match=name) as caught:
        as_config({"model": "m", "data": ["a.json"], "output_dir": "out", name: value})
    assert " at 0x" not in str(caught.value)


def test_a_field_whose_name_is_no_string():
    with pytest.raises(ValueError, match="no field 5; known are .*tokens_per_row") as caught:
        as_config({"model": "m", 5: object()})
    assert " at 0x" not in str(caught.value)


def test_config_files_that_are_not(tmp_path):
    with pytest.raises(ValueError, match="lacks data, output_dir"):
        as_config({"model": "m"})
    with pytest.raises(ValueError, match="no such file"):
        as_config(tmp_path / "none.yaml")
    (tmp_path / "bad.toml").write_text("lr = = 3")
    with pytest.raises(ValueError, match="cannot be read"):
        as_config(tmp_path / "bad.toml")


# --- optimiser ---


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("total, ratio", [(10, 0.0), (10, 0.03), (37, 0.2), (1, 0.5)])
def test_schedule_equals_transformers(schedule, total, ratio):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    theirs = get_scheduler(name, optimizer, num_warmup_steps=int(np.ceil(total * ratio)), num_training_steps=total)
    for step in range(total):
        assert lr_factor(step, total, ratio, schedule) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()


def test_parameter_groups(config):
    trained = prepare_parameters(Bigram(), change(config, weight_decay=0.1, lr_projector=None), "fp32")
    groups = make_optimizer(trained.masters, change(config, weight_decay=0.1)).param_groups
    seen = {(group["part"], group["weight_decay"]): (group["lr"], len(group["params"])) for group in groups}
    assert seen == {
        ("vision_tower", 0.1): (1e-3, 1),
        ("vision_tower", 0.0): (1e-3, 1),
        ("decoder", 0.1): (1e-2, 2),  # embeddings and head
        ("decoder", 0.0): (1e-2, 3),  # the norm's two and the head's bias
    }


def test_names_of_parts_and_of_what_decays():
    assert part_of("vision_tower.encoder.layers.0.mlp.fc1.weight") == "vision_tower"
    assert part_of("multi_modal_projector.linear_1.bias") == "projector"
    assert {part_of(name) for name in ("language_model.norm.weight", "lm_head.weight", "image_newline")} == {"decoder"}
    for name in (
        "language_model.layers.0.input_layernorm.weight",
        "vision_tower.pre_layrnorm.weight",
        "language_model.norm.weight",
        "a.bias",
    ):
        assert not decays(name)
    for name in ("lm_head.weight", "image_newline", "language_model.layers.0.mlp.up_proj.weight", "language_model.embed_tokens.weight"):
        assert decays(name)


def test_how_samples_are_spread_over_rows_changes_nothing(config):
    data = Texts(8)
    results = []
    for tokens_per_row, rows in ((64, 100), (10_000, 1)):
        model, settings = Bigram(), change(config, tokens_per_row=tokens_per_row, rows_per_step=rows, clip=0.5)
        trained = prepare_parameters(model, settings, "fp32")
        (step,) = make_steps(data, change(settings, epochs=1), Position())
        assert (len(step.rows) == 1) == (rows == 1)
        loss, norm, _ = train_step(
            model, trained, make_optimizer(trained.masters, settings), step.rows, 1.0, settings.clip, "cpu", LabelLoss()
        )
        results.append((loss, norm, weights(model)))
    (loss_a, norm_a, weights_a), (loss_b, norm_b, weights_b) = results
    torch.testing.assert_close(loss_a, loss_b, rtol=1e-6, atol=0)
    torch.testing.assert_close(norm_a, norm_b, rtol=1e-5, atol=0)
    for name in weights_a:
        torch.testing.assert_close(weights_a[name], weights_b[name], rtol=0, atol=2e-5, msg=name)


def test_a_run_equals_torch_adamw_written_out(config):
    settings = change(config, schedule="cosine", warmup_ratio=0.2, clip=0.7, weight_decay=0.1, lr_vision_tower="lr")
    data, ours, plain = Texts(), Bigram(), Bigram()
    losses = fit(ours, data, settings).losses
    total = total_steps(data, settings)
    decayed = [p for name, p in plain.named_parameters() if decays(name)]
    rest = [p for name, p in plain.named_parameters() if not decays(name)]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], lr=1e-2)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=int(np.ceil(0.2 * total)), num_training_steps=total)
    for step, expected in zip(make_steps(data, settings, Position()), losses, strict=True):
        loss = sum(plain.loss(row.batch) for row in step.rows) / step.labels
        assert loss.item() == pytest.approx(expected, rel=1e-5)
        loss.backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.7)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("frozen", ["vision_tower", "projector", "decoder"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_frozen_parts_do_not_change(config, frozen, precision):
    model = Bigram()
    before = weights(model)
    fit(model, Texts(), change(config, **{f"lr_{frozen}": None}, precision=precision))
    for name, parameter in model.named_parameters():
        same = torch.equal(parameter, before[name].to(parameter.dtype))
        assert same == (part_of(name) == frozen), name


def test_bf16_keeps_fp32_masters(config):
    """Updates far below bf16's resolution must add up: 300 steps of about 1e-5 move weights of about 0.1 by about 3e-3."""
    settings = change(config, lr=1e-5, lr_vision_tower="lr", max_steps=300, schedule="constant", warmup_ratio=0.0)
    exact, rounded = Bigram(), Bigram()
    start = weights(exact)
    fit(exact, Texts(), settings)
    fit(rounded, Texts(), change(settings, precision="bf16", output_dir=settings.output_dir + "-bf16"))
    assert all(parameter.dtype == torch.bfloat16 for parameter in rounded.parameters())
    name = "lm_head.weight"
    moved = (weights(exact)[name] - start[name]).abs().mean()
    apart = (weights(rounded)[name].float() - weights(exact)[name]).abs().mean()
    assert moved > 1e-3 and apart < 0.35 * moved


# --- order of data ---


def test_steps_visit_every_sample_once_an_epoch_from_any_position(config):
    data = Texts()
    steps = list(make_steps(data, config, Position()))
    assert len(steps) == total_steps(data, config)
    assert sum(step.samples for step in steps) == 3 * len(data.tokens)
    assert sum(step.tokens for step in steps) == 3 * data.tokens.sum()
    assert sum(step.labels for step in steps) == 3 * (data.tokens - 3).sum()
    for number in (1, 4, len(steps) - 1):
        rest = list(make_steps(data, config, steps[number - 1].after))
        assert len(rest) == len(steps) - number
        for a, b in zip(rest, steps[number:], strict=True):
            assert a.after == b.after
            assert all(torch.equal(x.batch.token_ids, y.batch.token_ids) for x, y in zip(a.rows, b.rows, strict=True))


def test_max_steps_goes_round_the_data(config):
    result = fit(Bigram(), Texts(4), change(config, max_steps=11))
    assert result.steps == len(result.losses) == 11 and result.samples > 4 * 2


def test_ahead_keeps_order_raises_in_place_and_stops():
    def items():
        yield from range(5)
        raise ValueError("broken at 5")

    got = []
    with pytest.raises(ValueError, match="broken at 5"):
        for item in ahead(items()):
            got.append(item)
    assert got == [0, 1, 2, 3, 4]

    made = []

    def endless():
        while True:
            made.append(1)
            yield len(made)

    source = ahead(endless(), depth=2)
    assert next(source) == 1
    time.sleep(0.3)
    assert len(made) <= 4  # one taken, two waiting, one in hand
    source.close()
    assert not any(thread.name == "llava_fast-data" for thread in threading.enumerate())


def test_broken_samples_stop_the_run_or_are_listed(config):
    with pytest.raises(ValueError, match="sample 3 is broken"):
        fit(Bigram(), Texts(broken=(3,)), config)
    result = fit(Bigram(), Texts(broken=(3, 7)), change(config, on_bad_record="skip", output_dir=config.output_dir + "-skip"))
    assert sorted(result.skipped) == ["sample 3 is broken", "sample 7 is broken"]
    assert result.samples == 3 * 18


@pytest.mark.parametrize("steps", [{"epochs": 1}, {"epochs": 3}, {"max_steps": 5}, {"max_steps": 5, "rows_per_step": 100}])
def test_an_epoch_without_a_label_ends_the_run(config, steps):
    settings = change(config, on_bad_record="skip", **steps)
    with pytest.raises(ValueError, match=r"none of its samples could be read; see .*skipped\.txt"):
        fit(Bigram(), Texts(broken=range(20)), settings)
    assert len(Path(settings.output_dir, "skipped.txt").read_text().splitlines()) == 20
    assert not list(Path(settings.output_dir).glob("checkpoint-*"))


def test_samples_that_break_later_end_the_run_an_epoch_later(config):
    data = Texts()

    def break_all(metrics):
        data.broken = range(20)

    with pytest.raises(ValueError, match="a whole epoch"):
        fit(Bigram(), data, change(config, on_bad_record="skip", max_steps=10**6, log_every=1), on_step=break_all)


def test_one_readable_sample_is_enough(config):
    result = fit(Bigram(), Texts(broken=range(1, 20)), change(config, on_bad_record="skip", max_steps=4, rows_per_step=1))
    assert result.steps == 4 and result.samples == 4 and len(result.skipped) == 19


def test_frozen_parameters_need_no_gradient_when_the_model_runs(config):
    seen = set()

    class Watched(Bigram):
        def loss(self, batch, reduction="sum"):
            seen.add(tuple(sorted({part_of(name) for name, p in self.named_parameters() if p.requires_grad})))
            return super().loss(batch, reduction)

    fit(Watched(), Texts(), change(config, lr_vision_tower=None, epochs=1))
    assert seen == {("decoder", "projector")}


def test_nothing_to_train_on(config):
    with pytest.raises(ValueError, match="no record"):
        fit(Bigram(), Texts(0), config)


# --- stop and resume ---


class Killed(Exception):
    pass


def kill_after(step):
    def on_step(metrics):
        if metrics.step == step:
            raise Killed

    return on_step


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("killed_at", [3, 8])
def test_a_killed_run_goes_on_bit_for_bit(config, precision, killed_at, tmp_path):
    settings = change(config, precision=precision, save_every=2, log_every=1, weight_decay=0.1)
    whole = Bigram()
    uninterrupted = fit(whole, Texts(), settings)
    again = change(settings, output_dir=str(tmp_path / "again"))
    with pytest.raises(Killed):
        fit(Bigram(), Texts(), again, on_step=kill_after(killed_at))
    other = Bigram()
    nn.init.zeros_(other.lm_head.weight)  # must come from the checkpoint
    resumed = fit(other, Texts(), again)
    assert resumed.losses == uninterrupted.losses
    assert resumed.steps == uninterrupted.steps
    assert equal(weights(other), weights(whole))
    lines = [json.loads(line) for line in (tmp_path / "again" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, resumed.steps + 1))
    assert [line["loss"] for line in lines] == resumed.losses


def test_ctrl_c_saves_and_the_same_call_goes_on(config, tmp_path):
    settings = change(config, log_every=1)
    whole = Bigram()
    uninterrupted = fit(whole, Texts(), settings)
    again = change(settings, output_dir=str(tmp_path / "again"))
    before = signal.getsignal(signal.SIGINT)

    def interrupt(metrics):
        if metrics.step == 3:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        fit(Bigram(), Texts(), again, on_step=interrupt)
    assert signal.getsignal(signal.SIGINT) is before
    assert [path.name for path in (tmp_path / "again").glob("checkpoint-*")] == ["checkpoint-00000003"]
    resumed_model = Bigram()
    assert fit(resumed_model, Texts(), again).losses == uninterrupted.losses
    assert equal(weights(resumed_model), weights(whole))


def test_a_finished_run_is_not_trained_again(config):
    settings = change(config, save_every=4)
    model = Bigram()
    first = fit(model, Texts(), settings)
    other = Bigram()
    second = fit(other, Texts(), settings)
    assert second.losses == first.losses and second.samples == 0
    assert equal(weights(other), weights(model))


def test_checkpoints_are_kept_and_refused_for_other_settings(config, tmp_path):
    settings = change(config, save_every=2, keep=3)
    fit(Bigram(), Texts(), settings)
    folder = tmp_path / "run"
    assert len(list(folder.glob("checkpoint-*"))) == 3
    assert not list(folder.glob("*.partial"))
    with pytest.raises(ValueError, match="lr: 0.01 then, 0.02 now"):
        fit(Bigram(), Texts(), change(settings, lr=0.02))
    with pytest.raises(ValueError, match="data set: '20 samples"):
        fit(Bigram(), Texts(21), settings)
    with pytest.raises(ValueError, match="set resume"):
        fit(Bigram(), Texts(), change(settings, resume=False))


def test_another_base_model_or_other_data_is_refused(config):
    settings = change(config, save_every=2, lr_vision_tower=None)
    fit(Bigram(), Texts(), settings)
    changed = Bigram()
    with torch.no_grad():
        changed.vision_tower["layer"].bias[3] += 1e-6
    with pytest.raises(ValueError, match="base model: 'configuration .* frozen weights .* then, .* now.*choose another output_dir"):
        fit(changed, Texts(), settings)
    with pytest.raises(ValueError, match="base model"):
        fit(Bigram(width=8), Texts(), settings)
    with pytest.raises(ValueError, match="data set: '20 samples, contents 00000000' then, '20 samples, contents 00000001' now"):
        fit(Bigram(), Texts(fingerprint=1), settings)
    trained = Bigram()
    nn.init.zeros_(trained.lm_head.weight)  # comes from the checkpoint
    fit(trained, Texts(), settings)


def test_a_loss_that_is_not_finite_stops_the_run(config):
    model = Bigram()
    nn.init.constant_(model.lm_head.weight, float("nan"))
    with pytest.raises(FloatingPointError, match="step 1"):
        fit(model, Texts(), config)
