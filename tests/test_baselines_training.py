"""Training baselines of bench/: each computes the loss and the gradients of the definition; the rows and rates that are made of them."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import LlavaForConditionalGeneration

from bench import training_steps
from bench.baselines import training
from bench.memory import Measured
from bench.training_rows import check_losses, of_sides, rates
from llava_fast.batch import IGNORE

CPU_SIDES = [side for side in training.SIDES if training.why_absent(side, "cpu") is None]


@pytest.fixture(scope="module")
def model(checkpoints):
    return LlavaForConditionalGeneration.from_pretrained(checkpoints["qwen"], dtype=torch.float64).train()


@pytest.fixture(scope="module")
def samples(model):
    """Two pictures, none, one; labels at the end, in the middle, and from the first token on."""
    rng = np.random.default_rng(0)
    made = []
    for pictures, text, supervised in ((2, 40, range(50, 58)), (0, 17, range(3, 9)), (1, 8, range(0, 17))):
        ids = torch.from_numpy(np.concatenate([np.full(9 * pictures, model.config.image_token_id), rng.integers(10, 300, text)]))
        chosen = torch.zeros(len(ids), dtype=torch.bool)
        chosen[list(supervised)] = True
        made.append((ids, torch.where(chosen, ids, IGNORE)))
    pixels = torch.randn(3, 3, 42, 42, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return made, pixels


def by_hand(model, samples, pixels):
    """Each sample alone, its logits shifted by hand; the mean over all labels."""
    total, count, first = 0.0, 0, 0
    for ids, labels in samples:
        views = int((ids == model.config.image_token_id).sum()) // 9
        own = pixels[first : first + views] if views else None
        first += views
        logits = model(input_ids=ids[None], pixel_values=own, use_cache=False).logits[0]
        for row in range(len(ids) - 1):
            if labels[row + 1] != IGNORE:
                total = total - F.log_softmax(logits[row], -1)[labels[row + 1]]
                count += 1
    return total / count


def gradients(model, loss):
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize(("side", "chunk"), [*((side, 256) for side in CPU_SIDES), (training.LABEL_ROWS, 5)])
def test_loss_and_gradients_are_those_of_each_sample_alone(side, chunk, model, samples, monkeypatch):
    expected = by_hand(model, *samples)
    wanted = gradients(model, expected)
    monkeypatch.setattr(training, "CHUNK", chunk)
    baseline = training.SIDES[side]
    own = copy.deepcopy(model)
    baseline.prepare(own)
    loss = baseline.loss(own, baseline.batch(*samples))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)  # every side takes the loss of logits in fp32
    found = gradients(own, loss)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        scale = gradient.abs().max().clamp_min(1e-6)
        assert (found[name] - gradient).abs().max() < 1e-5 * scale, name


def test_a_label_on_a_first_token_counts_for_nobody(model, samples):
    made, _ = samples
    rows = sum(int((labels[1:] != IGNORE).sum()) for _, labels in made)
    assert made[2][1][0] != IGNORE, "the third sample's first token is labelled"
    assert len(training.label_rows_batch(made, None)["labels"]) == len(training.padding_free_batch(made, None)["labels"]) == rows


def test_liger_says_why_it_is_absent(monkeypatch):
    if training.importlib.util.find_spec("liger_kernel") is not None:
        assert training.why_absent(training.LIGER, "cpu") == "its kernels are Triton's and need a GPU"
        assert training.why_absent(training.LIGER, "cuda") is None
    monkeypatch.setattr(training.importlib.util, "find_spec", lambda name: None)
    assert training.why_absent(training.LIGER, "cuda") == "liger_kernel is not installed"


# --- rows and rates ---


@pytest.mark.parametrize("row", ["1000", "2407", "5523", "8000"])
def test_a_row_has_the_tokens_of_its_name(row):
    shapes = training_steps.shapes(row)
    assert sum(training_steps.length(shape) for shape in shapes) == int(row) and all(0 < labels <= text for _, text, labels in shapes)


def test_padding_waste():
    assert training_steps.padding_waste([10, 10, 10], 3) == 0
    assert training_steps.padding_waste([10, 2, 6, 6, 3], 2) == pytest.approx(1 - 27 / (20 + 12 + 3))
    assert training_steps.padding_waste([10, 2, 10, 2], 2, grouped=True) == 0
    lengths = [training_steps.length(shape) for shape in training_steps.shapes("2407")]
    assert training_steps.padding_waste(lengths, 3) == pytest.approx(1 - 2407 / (3 * 1518))


def test_the_batch_of_the_workload_pads_as_its_batches_do():
    known = [training_steps.length(shape) for shape in training_steps.workload()]
    average = training_steps.padding_waste(known, 2)
    batch = [training_steps.length(shape) for shape in training_steps.shapes("batch2")]
    assert average <= training_steps.padding_waste(batch, 2) < average + 0.15 and 2 * max(batch) <= training_steps.LARGEST
    at = known.index(batch[0])
    assert at % 2 == 0 and known[at : at + 2] == batch
    with pytest.raises(ValueError, match="no batch of 16 pads 59% within 12000 positions"):
        training_steps.shapes("batch16")


def test_losses_that_differ_void_a_row():
    def run(*losses, step=2.0, anon=10, **more):
        return [Measured(1.0, 0, anon, {"losses": list(losses), "step_s": step, **more})]

    limits = type("Limits", (), {"fma_fp32_gflops": 100.0})()
    runs = {"llava_fast": run(3.0, 2.5, 2.0, operations=5e10), "slow": run(3.0, 2.5, step=8.0, anon=40)}
    check_losses(runs)
    assert of_sides(runs, 400)["slow"] == {"step_s": 8.0, "tokens_per_s": 50.0, "anon_bytes": 40}
    assert rates(runs, lambda device: limits) == {"gflops": 25.0, "of_limit": 0.25}
    with pytest.raises(AssertionError, match="wrong trains something else"):
        check_losses(runs | {"wrong": run(3.0, 2.501)})
