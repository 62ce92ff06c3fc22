"""DPO: losses and gradients against separate dense passes of transformers, pairs in any company, upstream's quirks, what is refused."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration

import llava_fast as lf
from llava_fast.batch import IGNORE
from llava_fast.kernels.patchify import normalise
from llava_fast.training import dpo as dpo_module
from llava_fast.training import steps as steps_module
from llava_fast.training.batches import Position, Row, make_steps
from llava_fast.training.config import as_config
from llava_fast.training.dpo import PreferenceLoss, pair_labels, pair_logps, reference_logps
from llava_fast.training.loop import fit
from llava_fast.training.lora import adapters, attach
from llava_fast.training.options import DpoOptions
from llava_fast.training.preferences import check_pair, encode_pair, index_pairs
from llava_fast.training.step import decays, lr_factor, part_of, prepare_parameters

MARK = "<image>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures and a folder of frames."""
    folder = tmp_path_factory.mktemp("pairs")
    for i in range(5):
        pixels = np.random.default_rng(i).integers(0, 255, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        (folder / "frames").mkdir(exist_ok=True)
        Image.fromarray(pixels[::-1].copy()).save(folder / "frames" / f"{i}.jpg")
    return folder


PAIRS = [
    {"id": "one", "image": "0.png", "prompt": "What are these?", "chosen": "two cats", "rejected": "the left"},
    {
        "id": "alike",
        "images": ["1.png", "2.png", "3.png"],
        "prompt": f"{MARK} and {MARK} or {MARK}?",
        "chosen": "red green",
        "rejected": "red blue",
    },
    {"id": "video", "video": "frames", "prompt": "Which one?", "chosen": "yes", "rejected": "no no no"},
    {"id": "text", "prompt": "Which one?", "chosen": "green", "rejected": "blue"},
    {
        "id": "turns",
        "image": ["4.png"],
        "prompt": [
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What are these?"}]},
            {"role": "assistant", "content": "two cats"},
            {"role": "user", "content": "Which one?"},
        ],
        "chosen": [{"role": "assistant", "content": "the left"}],
        "rejected": [{"role": "assistant", "content": "the right one"}],
    },
]


def write(folder, pairs, name="pairs.json"):
    (folder / name).write_text(json.dumps(pairs))
    return str(folder / name)


def fields(directory, data, out, **changes):
    kept = {"model": str(directory), "data": data, "output_dir": str(out), "tokens_per_row": 400, "inputs": {"num_frames": 3}, "dpo": True}
    rates = {"lr": 5e-5, "lr_vision_tower": 5e-6, "precision": "fp32", "weight_decay": 0.1}
    return {**kept, **rates, "save_every": None, "progress": False, "log_every": 1, **changes}


def dense_logps(hf, example, image_token):
    """Sums of log-probabilities and numbers of labels, [2], of the two conversations, each a pass of its own with its own pictures."""
    prompt, *answers = example.sequences
    pixels = None if example.views is None else normalise(example.views, (0.5,) * 3, (0.5,) * 3)
    ids = torch.from_numpy(prompt.token_ids.copy())
    for visual, start in zip(prompt.visuals, prompt.starts, strict=True):
        ids[start : start + visual.tokens] = image_token
    sums, counts = [], []
    for answer in answers:
        whole = torch.cat([ids, torch.from_numpy(answer.token_ids)])
        labels = torch.from_numpy(np.concatenate([prompt.labels, answer.labels]))[1:]
        logits = hf(input_ids=whole[None], pixel_values=pixels).logits[0, :-1]
        sums.append(-F.cross_entropy(logits, labels, reduction="sum"))
        counts.append((labels != IGNORE).sum())
    return torch.stack(sums), torch.stack(counts)


def dense_loss(options, policy, reference, counts):
    """The formulas of the papers (arXiv 2305.18290, 2305.10425, 2310.12036), one pair at a time."""
    if options.loss == "ipo":
        policy, reference = policy / counts, reference / counts
    h = (policy[0] - policy[1]) - (reference[0] - reference[1])
    ce = -policy[0] / (1 if options.loss == "ipo" else counts[0])
    loss = {
        "sigmoid": lambda: torch.log1p(torch.exp(-options.beta * h)),
        "hinge": lambda: torch.clamp(1 - options.beta * h, min=0),
        "ipo": lambda: (h - 0.5 / options.beta) ** 2,
    }[options.loss]()
    return options.alpha * loss + options.gamma * ce


@pytest.mark.parametrize("kind", ["qwen", "qwen_untied"])
@pytest.mark.parametrize(
    "options, template",
    [
        ({"loss": "sigmoid"}, "hf"),
        ({"loss": "hinge", "beta": 2.0, "gamma": 0.5}, "qwen_1_5"),
        ({"loss": "ipo", "alpha": 0.7}, "qwen_1_5_eval"),
        ({"loss": "sigmoid", "beta": 1.5, "gamma": 1.0}, "qwen_1_5"),
    ],
)
def test_steps_equal_dense_passes_of_two_models(directory, folder, tmp_path, options, template):
    """20 steps: losses, and the first step's gradients, of every parameter, to 1e-5."""
    data = write(folder, PAIRS)
    config = as_config(fields(directory, data, tmp_path / "run", dpo=options, template=template, max_steps=20, rows_per_step=2, clip=None))
    result = lf.train(config)
    assert result.steps == 20

    ours = lf.load(directory, dtype=torch.float32)
    indexed = index_pairs(config, ours.input_spec)
    policy, frozen = (LlavaForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval() for _ in range(2))
    named = {name.removeprefix("model."): parameter for name, parameter in policy.named_parameters()}
    groups = {}
    for name, parameter in named.items():
        groups.setdefault((part_of(name) == "vision_tower", decays(name)), []).append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": p, "peak": 5e-6 if tower else 5e-5, "weight_decay": 0.1 if d else 0.0} for (tower, d), p in groups.items()]
    )
    prepare_parameters(ours, config, "fp32")
    steps = make_steps(indexed, config, Position())
    for number, (step, loss) in enumerate(zip(steps, result.losses, strict=False)):
        examples = [indexed.load(i) for row in step.rows for i in row.indices]
        expected = 0.0
        for example in examples:
            sums, counts = dense_logps(policy, example, ours.config.image_token_id)
            with torch.no_grad():
                reference, _ = dense_logps(frozen, example, ours.config.image_token_id)
            expected = expected + dense_loss(config.dpo, sums, reference, counts) / len(examples)
        assert loss == pytest.approx(expected.item(), rel=1e-5), f"step {number}"
        expected.backward()
        if number == 0:
            objective = PreferenceLoss(config.dpo)
            objective.prepare(ours, indexed, dataclasses.replace(config, output_dir=str(tmp_path / "run")), torch.device("cpu"))
            (sum(objective(ours, row)[0] for row in step.rows) / len(examples)).backward()
            largest = max(p.grad.abs().max() for p in named.values() if p.grad is not None)
            for name, parameter in ours.named_parameters():
                theirs = named[name].grad
                assert (parameter.grad - theirs).abs().max() <= 1e-5 * theirs.abs().max() + 1e-7 * largest, (
                    name
                )  # key biases: zero but for rounding
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * lr_factor(number, 20, config.warmup_ratio, config.schedule)
        optimizer.step()
        optimizer.zero_grad()
    assert number == 19


@pytest.mark.parametrize("kind", ["qwen", "llama"])
def test_adapters_need_no_second_model(directory, folder, tmp_path, monkeypatch):
    """Under LoRA the reference is the model without its adapters: the losses of precomputed ones, at one pass of the tower a row."""
    data = write(folder, PAIRS)
    frozen = {"lr_vision_tower": "frozen", "lr_projector": "frozen", "lora": {"r": 4, "dropout": 0.0}, "lr": 1e-2}
    template = "v1" if directory.parent.name.startswith("llama") else "hf"
    config = as_config(fields(directory, data, tmp_path / "run", max_steps=8, **frozen, template=template))
    counted = []
    monkeypatch.setattr(steps_module, "row_flops", lambda *row, reference, **more: counted.append(reference) or 1.0)
    result = lf.train(config)
    assert not (tmp_path / "run" / "reference.pt").exists()
    model = lf.load(directory, dtype=torch.float32)
    indexed = index_pairs(config, model.input_spec)
    known = reference_logps(model, indexed, dataclasses.replace(config, output_dir=str(tmp_path)), torch.device("cpu"))
    attach(model, config.lora, config.seed)
    again = dataclasses.replace(config, output_dir=str(tmp_path / "again"))
    again = fit(model, indexed, again, objective=PreferenceLoss(config.dpo, known))
    assert result.losses == pytest.approx(again.losses, rel=1e-5)
    halves = counted[: len(counted) // 2], counted[len(counted) // 2 :]
    assert [set(half) for half in halves] == [{True}, {False}], "MFU counts the pass of the reference, where there is one"
    assert result.losses[0] == pytest.approx(math.log(2), rel=1e-6) and result.losses[-1] < 0.6


def rows_of(directory, data, tmp_path, **changes) -> tuple[lf.LlavaFast, list[Row]]:
    config = as_config(fields(directory, data, tmp_path / "run", epochs=1, **changes))
    model = lf.load(directory, dtype=torch.float32)
    prepare_parameters(model, config, "fp32")
    return model, [row for step in make_steps(index_pairs(config, model.input_spec), config, Position()) for row in step.rows]


@pytest.mark.parametrize("kind", ["qwen"])
def test_a_pair_is_the_same_in_any_company(directory, folder, tmp_path):
    data = write(folder, PAIRS)
    model, (together,) = rows_of(directory, data, tmp_path)
    _, alone = rows_of(directory, data, tmp_path, tokens_per_row=120)
    assert len(alone) > 1 and len(together.indices) == 5
    with torch.no_grad():
        expected = dict(zip(together.indices, pair_logps(model, together), strict=True))
        for row in alone:
            for index, logps in zip(row.indices, pair_logps(model, row), strict=True):
                torch.testing.assert_close(logps, expected[index], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["qwen"])
@pytest.mark.parametrize("loss, expected", [("sigmoid", math.log(2)), ("hinge", 1.0), ("ipo", 25.0)])
def test_identical_pairs_and_an_untrained_policy(directory, folder, tmp_path, loss, expected):
    """Chosen and rejected alike, or the policy the reference: h is 0."""
    alike = [{**pair, "rejected": pair["chosen"]} for pair in PAIRS]
    model, (row,) = rows_of(directory, write(folder, alike, "alike.json"), tmp_path)
    wild = torch.randn(5, 1, generator=torch.Generator().manual_seed(0)).expand(5, 2)
    total, sums = PreferenceLoss(DpoOptions(loss), wild)(model, row)
    assert total.item() / 5 == pytest.approx(expected, rel=1e-5)
    assert sums["rewards/margins"].abs() < 1e-5 and sums["rewards/accuracies"] <= 5
    model, (row,) = rows_of(directory, write(folder, PAIRS), tmp_path)
    with torch.no_grad():
        own = pair_logps(model, row)
    by_index = torch.zeros(5, 2)
    by_index[list(row.indices)] = own
    total, sums = PreferenceLoss(DpoOptions(loss), by_index)(model, row)
    assert total.item() / 5 == pytest.approx(expected, rel=1e-5) and sums["rewards/accuracies"] == 0


@pytest.mark.parametrize("kind", ["qwen"])
def test_what_is_shared_and_what_is_counted(directory, folder, tmp_path):
    """The prompt with its pictures once, answers shared as far as they are alike; only answers count, upstream what the template says."""
    data = write(folder, PAIRS)
    config = as_config(fields(directory, data, tmp_path, template="qwen_1_5"))
    model = lf.load(directory)
    indexed = index_pairs(config, model.input_spec)
    decode = model.tokenizer.decode
    for index in range(5):
        example = indexed.load(index)
        prompt, chosen, rejected = example.sequences
        assert example.prefix_of == (None, 0, 0) and chosen.token_ids[0] != rejected.token_ids[0]
        assert indexed.tokens[index] == len(prompt) + len(chosen) + len(rejected)
        assert prompt.views == indexed.views[index] == (0 if example.views is None else len(example.views))
        supervised = [decode(np.concatenate([s.labels[s.labels != IGNORE] for s in (prompt, side)])) for side in (chosen, rejected)]
        last = [PAIRS[index][name] if index < 4 else PAIRS[index][name][0]["content"] for name in ("chosen", "rejected")]
        assert supervised == [f"{text}<|im_end|>\n" for text in last]
    assert decode(indexed.load(1).sequences[1].token_ids).strip().startswith("green")  # "red" is shared, and counts twice
    (row,) = (row for step in make_steps(indexed, dataclasses.replace(config, epochs=1), Position()) for row in step.rows)
    counts = dict(zip(row.indices, pair_labels(row).tolist(), strict=True))
    for index in range(5):
        prompt, *answers = indexed.load(index).sequences
        assert counts[index] == [sum(int((s.labels != IGNORE).sum()) for s in (prompt, answer)) for answer in answers]
    upstream = as_config(fields(directory, data, tmp_path, template="qwen_1_5_eval", dpo={"upstream": True}))
    sides = check_pair({**PAIRS[0], "prompt": f"What {MARK}is {MARK} it?"}, "here", folder, upstream=True)
    assert sides[0].turns[0].text == f"{MARK}\nWhat is  it?"
    pair = encode_pair(sides, 1, upstream, model.input_spec)
    assert any(label != IGNORE for label in pair.prompt.labels[:5])


# --- reference log-probabilities ---


def test_the_reference_is_computed_once_and_goes_on_where_it_stopped(checkpoints, folder, tmp_path, monkeypatch):
    data = write(folder, PAIRS)
    calls = []
    plain = dpo_module.pair_logps
    monkeypatch.setattr(dpo_module, "SAVE_SECONDS", 0.0)

    def counted(*args):
        calls.append(1)
        if len(calls) == 2 and not (tmp_path / "second").exists():
            raise KeyboardInterrupt
        return plain(*args)

    monkeypatch.setattr(dpo_module, "pair_logps", counted)
    config = as_config(fields(checkpoints["qwen"], data, tmp_path, tokens_per_row=120, max_steps=2))
    model = lf.load(checkpoints["qwen"], dtype=torch.float32)
    indexed = index_pairs(config, model.input_spec)
    with pytest.raises(KeyboardInterrupt):
        reference_logps(model, indexed, config, torch.device("cpu"))
    (tmp_path / "second").touch()
    logps = reference_logps(model, indexed, config, torch.device("cpu"))
    rows = len(calls) - 1
    assert rows > 2 and logps.isfinite().all()
    assert torch.equal(reference_logps(model, indexed, config, torch.device("cpu")), logps) and len(calls) == rows + 1
    (tmp_path / "whole").mkdir()
    whole = reference_logps(model, indexed, dataclasses.replace(config, output_dir=str(tmp_path / "whole")), torch.device("cpu"))
    torch.testing.assert_close(whole, logps, rtol=1e-6, atol=1e-6)


def test_a_stopped_run_keeps_its_reference(checkpoints, folder, tmp_path):
    """The full fine-tune has changed the model by then: what is on disk counts."""
    data = write(folder, PAIRS)
    changes = {"max_steps": 6, "save_every": 2}
    whole = lf.train(fields(checkpoints["qwen"], data, tmp_path / "a", **changes))
    assert whole.losses[0] == pytest.approx(math.log(2), rel=1e-6)

    def stop(metrics):
        if metrics.step == 3:
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        lf.train(fields(checkpoints["qwen"], data, tmp_path / "b", **changes), on_step=stop)
    assert lf.train(fields(checkpoints["qwen"], data, tmp_path / "b", **changes)).losses == whole.losses


def test_another_model_or_other_inputs_get_a_reference_of_their_own(checkpoints, folder, tmp_path):
    """In the same output_dir: an untrained policy is its own reference, so its first loss says whose that is."""
    data = write(folder, PAIRS)
    for directory, changes in (
        (checkpoints["qwen"], {}),
        (checkpoints["qwen_untied"], {}),
        (checkpoints["qwen_untied"], {"image_aspect": "pad"}),
    ):
        settings = fields(directory, data, tmp_path / "out", max_steps=1, save_every=None, inputs=changes)
        assert lf.train(settings).losses[0] == pytest.approx(math.log(2), rel=1e-6)
        for checkpoint in (tmp_path / "out").glob("checkpoint-*"):
            shutil.rmtree(checkpoint)


def test_pairs_that_could_not_be_read_are_tried_again(checkpoints, folder, tmp_path):
    config = as_config(fields(checkpoints["qwen"], write(folder, PAIRS), tmp_path, on_bad_record="skip"))
    model = lf.load(checkpoints["qwen"], dtype=torch.float32)
    data = index_pairs(config, model.input_spec)
    load, data.load = data.load, lambda index: load(index) if index else (_ for _ in ()).throw(ValueError("not now"))  # type: ignore[method-assign]
    first = reference_logps(model, data, config, torch.device("cpu"))
    assert first[0].isnan().all() and first[1:].isfinite().all()
    data.load = load  # type: ignore[method-assign]
    assert reference_logps(model, data, config, torch.device("cpu")).isfinite().all()


def test_the_reference_pass_draws_nothing(checkpoints, folder, tmp_path):
    """Dropout of adapters is for training, and a run whose reference is there already draws the same masks."""
    options = {"lora": {"r": 2, "dropout": 0.5}, "lr_vision_tower": "frozen", "max_steps": 2}
    config = as_config(fields(checkpoints["qwen"], write(folder, PAIRS), tmp_path, **options))
    model = lf.load(checkpoints["qwen"], dtype=torch.float32)
    attach(model, config.lora)
    with torch.no_grad():
        for adapter in adapters(model):
            adapter.B.normal_(std=0.1)
    model.train()
    pairs = index_pairs(config, model.input_spec)
    torch.manual_seed(3)
    first = reference_logps(model, pairs, config, torch.device("cpu"), name="first.pt")
    drawn = torch.rand(3)
    second = reference_logps(model, pairs, config, torch.device("cpu"), name="second.pt")
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(3)) and torch.equal(first, second) and model.training


def test_metrics_are_reported(checkpoints, folder, tmp_path):
    seen = []
    settings = fields(checkpoints["qwen"], write(folder, PAIRS), tmp_path, max_steps=12, lr=1e-3)
    lf.train(settings, on_step=lambda metrics: seen.append(metrics.others))
    assert {"rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "losses/dpo", "losses/sft"} <= seen[0].keys()
    assert seen[0]["rewards/margins"] == pytest.approx(0, abs=1e-5) and seen[-1]["rewards/margins"] > 0.1
    assert seen[-1]["rewards/accuracies"] == 1.0
    assert seen[-1]["rewards/margins"] == pytest.approx(seen[-1]["rewards/chosen"] - seen[-1]["rewards/rejected"], abs=1e-4)


def test_held_out_pairs_by_scenario(checkpoints, folder, tmp_path):
    """Losses, rewards, accuracies and margins of each kind of pair are those of its pairs alone, whatever their numbers of views."""
    pairs = [{**pair, "id": f"{pair['id']}{i}", "chosen": answer} for i, answer in enumerate(("yes", "green", "red")) for pair in PAIRS[:4]]
    held_out, data = write(folder, pairs, "held_out.json"), write(folder, PAIRS)
    settings = fields(checkpoints["qwen"], data, tmp_path / "run", max_steps=6, lr=1e-3, validation_data=held_out, validate_every=3)
    result = lf.train(settings)
    model, fresh = lf.load(tmp_path / "run", dtype=torch.float32), lf.load(checkpoints["qwen"], dtype=torch.float32)
    kinds = {"one": "single-image", "alike": "multi-image", "video": "video", "text": "text"}
    expected: dict = {}
    for pair in pairs:
        alone = as_config(fields("m", write(folder, [pair], "alone.json"), tmp_path, epochs=1))
        (row,) = next(make_steps(index_pairs(alone, model.input_spec), alone, Position())).rows
        with torch.no_grad():
            loss, sums = PreferenceLoss(DpoOptions(), pair_logps(fresh, row))(model, row)
        for name in (kinds[pair["id"][:-1]], "all"):
            for key, value in {name: loss, **{f"{name}/{key}": value for key, value in sums.items()}}.items():
                expected.setdefault(key, []).append(value.item())
    assert result.validation.keys() == expected.keys() and len(expected) == 5 * 9
    assert result.validation == {name: pytest.approx(np.mean(values), rel=1e-4, abs=1e-6) for name, values in expected.items()}
    first, last = [json.loads(line) for line in (tmp_path / "run" / "validation.jsonl").read_text().splitlines()]
    assert first["step"] == 3 and {name: last[name] for name in expected} == result.validation


def test_the_line_says_what_preferences_are_judged_by(checkpoints, folder, tmp_path, capsys):
    data = write(folder, PAIRS)
    lf.train(fields(checkpoints["qwen"], data, tmp_path, max_steps=1, validation_data=data, progress=True))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "validation:" in line]
    assert "multi-image 0.693" in line and "all/rewards/accuracies" in line and "all/rewards/margins" in line and "logps" not in line


def test_pairs_that_are_too_long_are_left_out_and_counted(checkpoints, folder, tmp_path, capsys):
    long, wide = {**PAIRS[3], "id": "long", "prompt": "What are these? " * 200}, {**PAIRS[1], "id": "wide", "images": ["0.png"] * 3}
    data = write(folder, [PAIRS[3], long, wide, PAIRS[0]], "long.json")
    changes = {"too_long": "skip", "views_per_row": 2}
    result = lf.train(fields(checkpoints["qwen"], data, tmp_path, epochs=1, progress=True, **changes))
    assert result.samples == 2 and len(result.skipped) == 2
    assert "2 pairs, left out: 1 too long, 1 too many views" in capsys.readouterr().out
    assert all(name in line for name, line in zip(("'long'", "'wide'"), (tmp_path / "skipped.txt").read_text().splitlines(), strict=True))
    with pytest.raises(ValueError, match="'long'.*more than tokens_per_row 400"):
        index_pairs(as_config(fields("m", data, tmp_path)), lf.load(checkpoints["qwen"]).input_spec)
    broken = write(folder, [PAIRS[3], {"prompt": "a"}], "broken.json")
    with pytest.raises(ValueError, match="lacks chosen, rejected"):
        index_pairs(as_config(fields("m", broken, tmp_path, **changes)), lf.load(checkpoints["qwen"]).input_spec)


def test_pairs_are_kept_in_memory_within_the_budget(checkpoints, folder, tmp_path):
    data, spec = write(folder, PAIRS), lf.load(checkpoints["qwen"]).input_spec
    kept, read = (index_pairs(as_config(fields("m", data, tmp_path, cache_mb=mb)), spec) for mb in (16, 0))
    first = [kept.load(i) for i in range(5)]
    assert all(kept.load(i) is first[i] for i in range(5))
    assert all(read.load(i) is not read.load(i) for i in range(5))


# --- what is refused ---


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"too_long": "cut"}, "too_long must be 'refuse' or 'skip' where there is dpo"),
        ({"front_share": 0.5}, r"front_share must be 0 where there is dpo.*got 0\.5"),
        ({"index_dir": "x"}, "index_dir must be None where there is dpo.*got 'x'"),
    ],
)
def test_settings_of_records_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        as_config({"model": "m", "data": "a.json", "output_dir": "o", "dpo": True, **changes})


def talk(*texts):
    """An answer of several turns, as messages."""
    return [{"role": ("assistant", "user")[i % 2], "content": text} for i, text in enumerate(texts)]


@pytest.mark.parametrize(
    "entry, message",
    [
        ([], "a record is an object, got list"),
        ({"prompt": "a"}, "this one lacks chosen, rejected"),
        ({**PAIRS[3], "chosen": 5}, "chosen must be a text or a list of messages, got 5"),
        ({**PAIRS[3], "prompt": []}, "prompt must be a text or a list of messages"),
        ({**PAIRS[3], "prompt": [{"role": "user", "content": [{"type": "audio"}]}]}, "a message of prompt has a role and a content"),
        ({**PAIRS[3], "prompt": [{"role": "user", "content": [5]}]}, "a message of prompt has a role and a content"),
        ({**PAIRS[3], "prompt": [{"content": "a"}]}, "a message of prompt has a role and a content"),
        ({**PAIRS[0], "images": ["0.png"]}, "has both 'image' and 'images'"),
        ({**PAIRS[3], "chosen": talk("A", "B", "C"), "rejected": talk("X", "B", "C")}, "must be one answer each, to the same conversation"),
        ({**PAIRS[3], "chosen": talk("A"), "rejected": talk("A", "B", "C")}, "must be one answer each, to the same conversation"),
        ({**PAIRS[0], "prompt": f"{MARK}{MARK}"}, "2 <image> marks but 1 pictures"),
        ({**PAIRS[0], "image": "none.png"}, "none.png"),
        ({**PAIRS[3], "prompt": "What are these? " * 200}, "more than tokens_per_row 400"),
    ],
)
def test_pairs_that_are_refused(checkpoints, folder, tmp_path, entry, message):
    data = write(folder, [PAIRS[3], entry], "bad.json")
    spec = lf.load(checkpoints["qwen"]).input_spec
    with pytest.raises(ValueError, match=rf"bad\.json, record 1.*{message}"):
        index_pairs(as_config(fields("m", data, tmp_path)), spec)
    said = []
    kept = index_pairs(as_config(fields("m", data, tmp_path, on_bad_record="skip")), spec, said.append)
    assert len(kept.tokens) == 1 and len(said) == 1


def test_files_contexts_and_views_that_are_refused(checkpoints, folder, tmp_path):
    spec = lf.load(checkpoints["qwen"]).input_spec
    for name, content, message in (
        ("a.json", "{", "is not valid JSON"),
        ("b.json", "{}", "must hold a list of records, got dict"),
        ("c.csv", "", "a .json or .jsonl file"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=message):
            index_pairs(as_config(fields("m", str(tmp_path / name), tmp_path)), spec)
    with pytest.raises(ValueError, match="no such file"):
        index_pairs(as_config(fields("m", str(tmp_path / "none.json"), tmp_path)), spec)
    data = write(folder, PAIRS)
    with pytest.raises(ValueError, match="'alike'.*3 views, more than views_per_row 2"):
        index_pairs(as_config(fields("m", data, tmp_path, views_per_row=2)), spec)
    with pytest.raises(ValueError, match="tokens, more than the context's 20"):
        index_pairs(as_config(fields("m", data, tmp_path)), dataclasses.replace(spec, max_positions=20))
    with pytest.raises(ValueError, match="'alike'.*3 pictures, but train_dpo.py has one mark"):
        index_pairs(as_config(fields("m", data, tmp_path, dpo={"upstream": True})), spec)
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS[2:4]))
    again = as_config(fields("m", str(tmp_path / "pairs.jsonl"), tmp_path, media_folder=str(folder)))
    assert len(index_pairs(again, spec).tokens) == 2


def test_media_that_change_or_break_are_named(checkpoints, folder, tmp_path):
    Image.new("RGB", (40, 40)).save(tmp_path / "0.png")
    data = write(tmp_path, [PAIRS[0]])
    indexed = index_pairs(as_config(fields("m", data, tmp_path)), lf.load(checkpoints["qwen"]).input_spec)
    (tmp_path / "0.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"record 0 \(id 'one'\)"):
        indexed.load(0)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"loss": "kto"}, "dpo.loss must be sigmoid, hinge or ipo, got 'kto'"),
        ({"beta": 0}, "dpo.beta must be a number > 0, got 0"),
        ({"gamma": -1}, "dpo.gamma must be a number >= 0"),
        ({"alpha": 0}, "dpo.alpha, dpo.gamma must be not both 0"),
        ({"upstream": 1}, "dpo.upstream must be true or false"),
        ({"betta": 1}, "dpo has no field 'betta'; did you mean 'beta'"),
    ],
)
def test_options_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        as_config({"model": "m", "data": "a.json", "output_dir": "o", "dpo": options})
