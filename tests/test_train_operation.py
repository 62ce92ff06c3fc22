"""What a run reports and how it ends: metrics, validation, signals, bad losses, full disks, kills."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_train_mechanics import Bigram, Texts, change, config, equal, weights  # noqa: F401  (config is a fixture)

import llava_fast as lf
from llava_fast import checkpoint
from llava_fast.training.batches import Position, make_steps
from llava_fast.training.loop import fit
from llava_fast.training.report import StepMetrics


class Named(Texts):
    def name(self, index):
        return f"record-{index}"

    def scenario(self, index):
        return "long" if self.tokens[index] > 15 else "short"


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- what is reported ---


def test_metrics_of_every_step_and_part(config, tmp_path):  # noqa: F811
    settings = change(config, tensorboard=True, log_every=3)
    seen: list[StepMetrics] = []
    fit(Bigram(), Texts(), settings, on_step=seen.append)
    written = lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in written] == [metrics.step for metrics in seen] == list(range(1, len(seen) + 1))
    steps = list(make_steps(Texts(), settings, Position()))
    for metrics, step in zip(seen, steps, strict=True):
        assert (metrics.tokens, metrics.labels, metrics.samples, metrics.views) == (step.tokens, step.labels, step.samples, 0)
        assert metrics.rates.keys() == {"decoder", "projector", "vision_tower"} and metrics.lr == metrics.rates["decoder"]
        assert metrics.rates["vision_tower"] == pytest.approx(0.1 * metrics.lr)
        assert metrics.memory > 2**20 and metrics.seconds > 0
        assert all(word in metrics.line() for word in ("loss", "lr", "tokens/s", "labels", "data wait", "GiB"))
    # Rates are of the steps that were reported together, whose tokens differ.
    for start in range(0, len(seen), 3):
        window = seen[start : start + 3]
        took = sum(m.seconds for m in window)
        assert len({m.tokens for m in window}) > 1 or len(window) == 1
        for metrics in window:
            assert metrics.tokens_per_second == pytest.approx(sum(m.tokens for m in window) / took)
            assert metrics.waiting == pytest.approx(sum(m.data_wait for m in window) / took)
            assert f"{metrics.tokens_per_second:,.0f} tokens/s" in metrics.line() and f"data wait {metrics.waiting:.0%}" in metrics.line()
            assert metrics.scalars()["speed/tokens_per_second"] == metrics.tokens_per_second

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [(event.step, pytest.approx(event.value)) for event in events.Scalars("loss")] == [(m.step, m.loss) for m in seen]
    assert {"lr/decoder", "lr/projector", "lr/vision_tower", "speed/tokens_per_second", "memory_gib"} <= set(events.Tags()["scalars"])


def test_wandb_is_told_the_same(config, monkeypatch):  # noqa: F811
    told: list = []
    run = types.SimpleNamespace(log=lambda values, step: told.append((step, values["loss"])), finish=lambda: told.append("finished"))
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **options: told.append(options["resume"]) or run))
    result = fit(Bigram(), Texts(), change(config, wandb=True))
    assert told == ["allow", *enumerate(result.losses, start=1), "finished"]


def test_a_run_keeps_its_name_with_wandb_and_another_in_a_folder_of_that_name_has_its_own(config, monkeypatch, tmp_path):  # noqa: F811
    told: list = []
    run = types.SimpleNamespace(log=lambda values, step: None, finish=lambda: None)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **options: told.append(options["id"]) or run))
    settings = change(config, wandb=True, save_every=2, log_every=1)

    def stop(metrics):
        if metrics.step == 3:
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        fit(Bigram(), Texts(), settings, on_step=stop)
    fit(Bigram(), Texts(), settings)
    (tmp_path / "run").rename(tmp_path / "elsewhere")  # as another container sees its own folder
    fit(Bigram(), Texts(), settings)
    assert told[0] == told[1] != told[2] and all(told)


@pytest.mark.parametrize("name, module", [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])
def test_a_board_that_is_not_installed(config, monkeypatch, name, module):  # noqa: F811
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=rf"{name}: true needs the package {name}: pip install"):
        fit(Bigram(), Texts(), change(config, **{name: True}))


def test_tflops_and_share_of_the_peak_of_a_model_of_ours(checkpoints, folder, tmp_path):
    seen: list[StepMetrics] = []
    lf.train(recipe(checkpoints, folder, tmp_path, max_steps=2, log_every=1), on_step=seen.append)
    assert all(m.views and m.mfu is None and 0 < m.tflops < 10 and "TFLOP/s" in m.line() and "views/s" in m.line() for m in seen)
    shown = dataclasses.replace(seen[0], mfu=0.415)
    assert "MFU 41.5%" in shown.line() and shown.scalars()["speed/mfu"] == 0.415


# --- validation ---


class Noisy(Bigram):
    """Draws a factor for every row, in training and in evaluation."""

    def loss(self, batch, reduction="sum"):
        factor = 1 + 0.01 * torch.rand(())
        return super().loss(batch, reduction) * (factor if self.training else 1)


@pytest.mark.parametrize("lost", ["long", "short"])
def test_all_is_there_where_a_scenario_cannot_be_read(config, tmp_path, lost):  # noqa: F811
    class Unreadable(Named):
        def load(self, index):
            if self.scenario(index) == lost:
                raise ValueError(f"record-{index}: gone")
            return super().load(index)

    settings = change(config, validation_data=("held_out.json",), validate_every=3, on_bad_record="skip")
    validation = fit(Bigram(), Texts(), settings, held_out=Unreadable(30)).validation
    assert validation.keys() == {"all", {"long": "short", "short": "long"}[lost]} and len(set(validation.values())) == 1


def test_validation_is_the_loss_by_scenario_and_changes_nothing(config, tmp_path):  # noqa: F811
    """Nor the numbers that training draws, although the held-out rows draw some."""
    settings = change(config, save_every=4, log_every=1)
    plain, watched, held_out = Noisy(), Noisy(), Named(30)
    torch.manual_seed(7)
    result = fit(plain, Texts(), settings)
    after = torch.get_rng_state()
    validated = change(settings, output_dir=str(tmp_path / "validated"), validation_data=("held_out.json",), validate_every=3)
    torch.manual_seed(7)
    again = fit(watched, Texts(), validated, held_out=held_out)
    assert torch.equal(torch.get_rng_state(), after)
    assert again.losses == result.losses and equal(weights(plain), weights(watched)) and not result.validation
    written = lines(tmp_path / "validated" / "validation.jsonl")
    assert [line.pop("step") for line in written] == [*range(3, result.steps, 3), result.steps]
    assert written[-1] == again.validation and written[0]["all"] > written[-1]["all"]

    sums: dict = {}
    with torch.no_grad():
        for index in range(30):
            (sample,) = held_out.load(index).sequences
            (row,) = next(make_steps(_One(sample), change(config, tokens_per_row=64, epochs=1), Position())).rows
            for name in (held_out.scenario(index), "all"):
                loss, labels = sums.get(name, (0.0, 0))
                sums[name] = loss + watched.loss(row.batch).item(), labels + len(row.batch.labels)
    assert again.validation == {name: pytest.approx(loss / labels, rel=1e-5) for name, (loss, labels) in sums.items()}


class _One:
    def __init__(self, sample):
        self.sample, self.fingerprint = sample, 0
        self.tokens, self.views = np.array([len(sample)]), np.array([0])

    def load(self, index):
        from llava_fast.training.batches import Example

        return Example((self.sample,))


def test_scenarios_of_records_and_a_resumed_run_validates_where_it_would_have(checkpoints, folder, tmp_path):
    settings = recipe(checkpoints, folder, tmp_path, max_steps=6, validation_data=str(folder / "data.json"), validate_every=2, save_every=1)
    whole = lf.train(settings)
    assert len(whole.validation) == 4 and "all" in whole.validation
    expected = (tmp_path / "run" / "validation.jsonl").read_text()

    class Killed(Exception):
        pass

    def kill(metrics):
        if metrics.step == 5:
            raise Killed

    again = {**settings, "output_dir": str(tmp_path / "again")}
    with pytest.raises(Killed):
        lf.train(again, on_step=kill)
    assert lf.train(again).validation == whole.validation
    assert (tmp_path / "again" / "validation.jsonl").read_text() == expected


def test_nothing_to_validate_on(config):  # noqa: F811
    with pytest.raises(ValueError, match=r"no record of validation_data \(v.json\)"):
        fit(Bigram(), Texts(), change(config, validation_data="v.json"), held_out=Texts(0))


# --- losses that must not go on ---


class Poisoned(Bigram):
    """From one call on, rows that hold a sample of this many tokens give this loss a label."""

    def __init__(self, length, loss, calls):
        super().__init__()
        self.length, self.bad, self.left = length, loss, calls

    def loss(self, batch, reduction="sum"):
        self.left -= 1
        good = super().loss(batch, reduction)
        bad = self.left < 0 and bool((batch.cu_seqlens.diff() == self.length).any())
        return good * 0 + self.bad * len(batch.labels) if bad else good


@pytest.mark.parametrize("loss, says", [(float("nan"), "is nan"), (float("inf"), "is inf"), (40.0, "more than spike_factor 5 times")])
def test_a_bad_loss_stops_the_run_with_the_rows_samples_and_saves_nothing_of_it(config, tmp_path, loss, says):  # noqa: F811
    data = Named()
    length = int(data.tokens.max())
    settings = change(config, spike_factor=5, save_every=1, keep=100, log_every=4, epochs=20)
    model = Poisoned(length, loss, calls=60)
    with pytest.raises(FloatingPointError, match=says) as caught:
        fit(model, data, settings)
    message = str(caught.value)
    steps = list(make_steps(data, settings, Position()))
    step = int(message.split("the loss of step ")[1].split()[0])
    guilty = [row for row in steps[step - 1].rows if any(data.tokens[i] == length for i in row.indices)]
    assert len(guilty) == 1 and step > 10
    assert message.split("; it came with ")[1].split(". Nothing")[0] == ", ".join(f"record-{i}" for i in guilty[0].indices)
    kept = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))
    assert kept[-1] == f"checkpoint-{step - 1:08d}" and kept[-1] in message
    resumed = fit(Bigram(), data, change(settings, spike_factor=None))
    assert resumed.steps == len(steps) and all(np.isfinite(resumed.losses))


def test_a_gradient_that_is_not_finite_is_not_saved_although_the_loss_is(config, tmp_path):  # noqa: F811
    class Steep(Bigram):
        def loss(self, batch, reduction="sum"):
            value = super().loss(batch, reduction)
            return value + torch.sqrt((self.lm_head.bias * 0).sum().abs())  # the slope of a root at 0

    with pytest.raises(FloatingPointError, match=r"gradient norm nan.*there is no checkpoint yet"):
        fit(Steep(), Texts(), change(config, save_every=1))
    assert not list((tmp_path / "run").glob("checkpoint-*"))


# --- the disk ---


@pytest.fixture
def limited():
    """Files of this process end at a few KiB, as on a full disk, from the call on."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_last_checkpoint_and_the_run_goes_on_and_says_so(config, tmp_path, limited):  # noqa: F811
    settings = change(config, save_every=2, log_every=1, keep=1)
    whole = Bigram()
    expected = fit(whole, Texts(), change(settings, output_dir=str(tmp_path / "whole")))
    said = []

    def fill(metrics):
        said.append(sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")))
        if metrics.step == 3:
            limited(16 * 1024)
        if metrics.step == 5:
            limited(resource.RLIM_INFINITY)

    model = Bigram()
    with pytest.warns(UserWarning, match=r"checkpoint of step 4 could not be written \(.*checkpoint-00000002 is intact; the run goes on"):
        result = fit(model, Texts(), settings, on_step=fill)
    assert said[4] == ["checkpoint-00000002"] and said[6] == ["checkpoint-00000006"]
    assert result.losses == expected.losses and equal(weights(model), weights(whole))


def test_a_disk_that_is_full_at_the_end_is_an_error_and_the_run_can_be_ended_later(config, tmp_path, limited):  # noqa: F811
    settings = change(config, save_every=2, log_every=1)
    expected = fit(Bigram(), Texts(), change(settings, output_dir=str(tmp_path / "whole")))

    def stop(metrics):
        if metrics.step == 5:
            limited(16 * 1024)
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(OSError, match=r"checkpoint of step 5 could not be written .*checkpoint-00000004 is intact"):
        fit(Bigram(), Texts(), settings, on_step=stop)
    limited(resource.RLIM_INFINITY)
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-00000002", "checkpoint-00000004"]
    assert fit(Bigram(), Texts(), settings).losses == expected.losses


# --- signals and kills, with processes of their own ---


def recipe(checkpoints, folder, tmp_path, **changes):
    return {
        "model": str(checkpoints["qwen"]),
        "data": str(folder / "data.json"),
        "output_dir": str(tmp_path / "run"),
        "tokens_per_row": 64,
        "max_steps": 10,
        "lr": 1e-3,
        "save_every": None,
        "progress": False,
        "log_every": 1,
        **changes,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for i in range(3):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    media = [{"image": "0.png"}, {"image": ["1.png", "2.png"]}, {}]
    records = [
        {"id": i, **m, "conversations": [{"from": "human", "value": "Which one?"}, {"from": "gpt", "value": answer}]}
        for i, (answer, m) in enumerate(zip(["yes", "no", "red"], media, strict=True))
    ]
    (folder / "data.json").write_text(json.dumps(records))
    return folder


def start(*command):
    path = os.pathsep.join([str(Path(lf.__file__).parent.parent), *filter(None, sys.path)])
    return subprocess.Popen(
        [sys.executable, *command], env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def tensors(directory):
    return dict(checkpoint.read_tensors(checkpoint.index_tensors(Path(directory))))


def test_sigterm_saves_and_leaves_and_handlers_come_back(config, tmp_path):  # noqa: F811
    expected = fit(Bigram(), Texts(), change(config, output_dir=str(tmp_path / "whole")))
    before = signal.getsignal(signal.SIGTERM)

    def stop(metrics):
        if metrics.step == 2:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(SystemExit) as caught:
        fit(Bigram(), Texts(), change(config, log_every=1), on_step=stop)
    assert caught.value.code == 143 and signal.getsignal(signal.SIGTERM) is before
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-00000002"]
    assert fit(Bigram(), Texts(), config).losses == expected.losses


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_command_line_saves_on_a_signal_and_says_so_in_its_exit_code(checkpoints, folder, tmp_path, number, code):
    settings = tmp_path / "run.yaml"
    settings.write_text(json.dumps(recipe(checkpoints, folder, tmp_path, max_steps=100_000, progress=True)))
    process = start("-m", "llava_fast.cli", "train", str(settings))
    try:
        until = time.monotonic() + 100
        while not (tmp_path / "run" / "metrics.jsonl").exists() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        process.send_signal(number)
        output, _ = process.communicate(timeout=100)
    finally:
        process.kill()
    assert process.returncode == code, output
    (kept,) = (tmp_path / "run").glob("checkpoint-*")
    assert f"stopped after step {int(kept.name[-8:])} of 100000" in output


KILL = """
import os, random, signal, sys
import torch
torch.set_num_threads(1)
import llava_fast as lf
settings, where, number = sys.argv[1], sys.argv[2], int(sys.argv[3])
def on_step(metrics):
    if where == "step" and metrics.step == number:
        os.kill(os.getpid(), signal.SIGKILL)
replace = os.replace
def renamed(source, target):  # called when a checkpoint is complete but for its name
    if where == "checkpoint" and str(target).endswith(f"checkpoint-{number:08d}"):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = renamed
lf.train(settings, on_step=on_step)
"""


@pytest.mark.parametrize("where", ["step", "checkpoint"])
def test_a_process_killed_at_a_random_step_goes_on_to_the_same_weights(checkpoints, folder, tmp_path, where):
    number = int(np.random.default_rng().integers(2, 10))  # another each time: named by the folder and the file on failure
    whole = lf.train(recipe(checkpoints, folder, tmp_path, save_every=2, output_dir=str(tmp_path / "whole")))
    number += number % 2 if where == "checkpoint" else 0
    fields = recipe(checkpoints, folder, tmp_path, save_every=2, output_dir=str(tmp_path / f"killed-{number}"))
    (tmp_path / "run.yaml").write_text(json.dumps(fields))
    process = start("-c", KILL, str(tmp_path / "run.yaml"), where, str(number))
    try:
        output, _ = process.communicate(timeout=100)
    finally:
        process.kill()
    assert process.returncode == -signal.SIGKILL, output
    left = sorted(path.name for path in Path(fields["output_dir"]).glob("checkpoint-*"))
    assert not where == "checkpoint" or left[-1] == f"checkpoint-{number:08d}.partial"
    resumed = lf.train(tmp_path / "run.yaml")
    assert resumed.losses == whole.losses
    a, b = tensors(tmp_path / "whole"), tensors(fields["output_dir"])
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert not list(Path(fields["output_dir"]).glob("*.partial"))
