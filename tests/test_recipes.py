"""Recipes: each trains as transformers does with the same settings; what they set, what overrides them, and the table in the docs."""

from __future__ import annotations

import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration

import llava_fast as lf
from llava_fast.demo.model import make_checkpoint, write_records
from llava_fast.demo.scenes import questions
from llava_fast.kernels.patchify import normalise
from llava_fast.requests import InputOptions
from llava_fast.training import recipes
from llava_fast.training.batches import Position, make_row, make_steps
from llava_fast.training.config import PARTS, TrainConfig, _Loader, as_config, change_fields
from llava_fast.training.dataset import index_records
from llava_fast.training.dpo import PreferenceLoss
from llava_fast.training.loop import FREE
from llava_fast.training.lora import attach
from llava_fast.training.options import LoraOptions
from llava_fast.training.preferences import index_pairs
from llava_fast.training.recipes import RECIPES
from llava_fast.training.step import LabelLoss, decays, lr_factor, make_optimizer, part_of, prepare_parameters, train_step

PATHS = {"model": "m", "data": "a.json", "output_dir": "o"}
CAPTIONS = [name for name, recipe in RECIPES.items() if recipe.fields["template"][0] == "plain"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """captions.json of single pictures; mixed.json of none, one, two, and a video of five frames."""
    folder = tmp_path_factory.mktemp("recipes")
    (folder / "frames").mkdir()
    for i in range(6):
        pixels = np.random.default_rng(i).integers(0, 255, (40, 50 + 10 * i, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        Image.fromarray(pixels[:, :50]).save(folder / "frames" / f"{i}.jpg")
    media = [{}, {"image": "0.png"}, {"image": ["1.png", "2.png"]}, {"video": "frames"}, {"image": "3.png"}]
    answers = ["yes", "no", "red", "green", "two cats"]
    for name, shown in (("mixed", media), ("captions", [{"image": f"{i}.png"} for i in range(5)])):
        turns = [[{"from": "human", "value": "What are these?"}, {"from": "gpt", "value": answer}] for answer in answers]
        records = [{"id": i, **m, "conversations": t} for i, (m, t) in enumerate(zip(shown, turns, strict=True))]
        (folder / f"{name}.json").write_text(json.dumps(records))
    return folder


def visual_rows(hf, sample, views):
    """[V, D] by transformers' tower and projector, pooled and ordered as the sample's layouts say, one after the other."""
    config = hf.config
    hidden = hf.model.vision_tower(normalise(views, *mean_and_std(hf)), output_hidden_states=True).hidden_states
    features = hidden[config.vision_feature_layer]
    features = features[:, 1:] if config.vision_feature_select_strategy == "default" else features
    table = hf.model.multi_modal_projector(features).split([visual.views for visual in sample.visuals])
    rows = []
    for visual, own in zip(sample.visuals, table, strict=True):
        own = own.flatten(0, 1)
        for resample in visual.resamples:
            maps = own[torch.from_numpy(resample.source)].permute(0, 3, 1, 2)
            assert resample.mode == "average"
            own = torch.cat([own, F.avg_pool2d(maps, 2).permute(0, 2, 3, 1).flatten(0, 2)])
        rows.append(own[torch.from_numpy(visual.source)])
    return rows


def mean_and_std(hf):
    if hf.config.vision_config.model_type == "siglip_vision_model":
        return (0.5,) * 3, (0.5,) * 3
    return (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def dense_loss(hf, examples):
    """Mean over labels of transformers' losses of samples that it runs one at a time."""
    total, labels = 0.0, 0
    for example in examples:
        (sample,) = example.sequences
        embeds = hf.get_input_embeddings()(torch.from_numpy(sample.token_ids))
        if sample.visuals:
            for rows, start in zip(visual_rows(hf, sample, example.views), sample.starts, strict=True):
                embeds = torch.cat([embeds[:start], rows, embeds[start + len(rows) :]])
        wanted = torch.from_numpy(sample.labels.copy())[1:]
        logits = hf(inputs_embeds=embeds[None]).logits[0, :-1]
        total = total + F.cross_entropy(logits, wanted, reduction="sum")
        labels += int((wanted != -100).sum())
    return total / labels


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "dpo"])  # that one: test_dpo.py
def test_packed_training_is_that_of_transformers(checkpoints, folder, tmp_path, name):
    """20 steps of two rows, at rates that move the model (the recipe's times a factor), unpacked in transformers."""
    directory = checkpoints["llama" if name.startswith("v1") else "qwen"]
    factor = 5e-4 / RECIPES[name].fields["lr"][0]
    plain = recipes.make(name, **{**PATHS})
    rates = {f"lr_{part}": rate * factor for part in ("vision_tower", "projector", "decoder") if (rate := plain.part_lr(part))}
    data = str(folder / ("captions.json" if name in CAPTIONS else "mixed.json"))
    small = {"tokens_per_row": 260, "rows_per_step": 2, "max_steps": 20, "precision": "fp32", "clip": None}
    quiet = {"save_every": None, "progress": False, "log_every": 1}
    config = recipes.make(name, model=str(directory), data=data, output_dir=str(tmp_path), **rates, **small, **quiet)
    norms = []
    result = lf.train(config, on_step=lambda metrics: norms.append(metrics.grad_norm))

    hf = LlavaForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()
    groups: dict = {}
    for long, parameter in hf.named_parameters():
        rate = config.part_lr(part_of(long.removeprefix("model.")))
        parameter.requires_grad_(rate is not None)
        if rate is not None:
            groups.setdefault((rate, decays(long)), []).append(parameter)
    optimizer = torch.optim.AdamW([{"params": p, "peak": rate, "weight_decay": 0.0} for (rate, _), p in groups.items()])
    indexed = index_records(config, lf.load(directory).input_spec)
    packed = 0
    for number, step in enumerate(make_steps(indexed, config, Position())):
        if number == 20:
            break
        packed = max([packed, *(len(row.indices) for row in step.rows)])
        loss = dense_loss(hf, [indexed.load(i) for row in step.rows for i in row.indices])
        assert result.losses[number] == pytest.approx(loss.item(), rel=1e-5), f"step {number}"
        loss.backward()
        gradients = [p.grad for p in hf.parameters() if p.grad is not None]
        assert norms[number] == pytest.approx(torch.nn.utils.get_total_norm(gradients).item(), rel=1e-4 if number else 1e-5)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * lr_factor(number, 20, config.warmup_ratio, config.schedule)
        optimizer.step()
        optimizer.zero_grad()
    assert number >= 19 and packed > 1 and result.losses[-1] < result.losses[0]


@pytest.mark.parametrize(
    "name, lora", [("align", None), ("sft", None), ("interleave", None), ("dpo", None), ("sft", "plain"), ("dpo", "int4")]
)
def test_packed_training_is_unpacked_training(checkpoints, folder, tmp_path, name, lora):
    """20 steps of packed rows, and the same samples of each step in rows of their own, one after the other."""
    data = folder / ("captions.json" if name == "align" else "mixed.json")
    if name == "dpo":
        records = json.loads(data.read_text())
        media = [{key: record[key] for key in ("id", "image", "video") if key in record} for record in records]
        pairs = [{**m, "prompt": "What are these?", "chosen": "red " * (i + 1), "rejected": "two cats"} for i, m in enumerate(media)]
        data = tmp_path / "pairs.json"
        data.write_text(json.dumps(pairs))
    adapters = None if lora is None else {"r": 4, "alpha": 8, "dropout": 0.0, "base": None if lora == "plain" else lora}
    rates = {"lr": 1e-3} | ({} if lora or name == "align" else {"lr_vision_tower": 1e-4})
    small = {"tokens_per_row": 260, "rows_per_step": 2, "max_steps": 20, "precision": "fp32", "save_every": None, "progress": False}
    given = {"model": str(checkpoints["qwen"]), "data": str(data), "output_dir": str(tmp_path / "run"), "media_folder": str(folder)}
    config = recipes.make(name, **given, **rates, **small, **({"lora": adapters} if lora else {}))
    result = lf.train(config)

    model = lf.load(checkpoints["qwen"], dtype=torch.float32)
    objective = LabelLoss() if config.dpo is None else PreferenceLoss(config.dpo)
    indexed = (index_records if config.dpo is None else index_pairs)(config, model.input_spec)
    if config.lora is not None:
        attach(model, config.lora, config.seed)
    trained = prepare_parameters(model, config, "fp32")
    if config.dpo is not None:
        objective.prepare(model, indexed, config, torch.device("cpu"))
    optimizer, most = make_optimizer(trained.masters, config), 0
    model.train()
    with ThreadPoolExecutor(1) as pool:
        for number, step in zip(range(20), make_steps(indexed, config, Position()), strict=False):
            most = max([most, *(len(row.indices) for row in step.rows)])
            rows = [make_row(indexed, [index], pool, None) for row in step.rows for index in row.indices]
            factor = lr_factor(number, 20, config.warmup_ratio, config.schedule)
            loss, _, _ = train_step(model, trained, optimizer, rows, factor, config.clip, "cpu", objective)
            assert result.losses[number] == pytest.approx(loss.item(), rel=1e-5), f"step {number}"
    assert number == 19 and most > 1 and result.losses[-1] < result.losses[0]


# --- as written, on the demo's data ---


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A fresh model, train.json with its four scenarios, captions.json of its single pictures, pairs.json."""
    folder = tmp_path_factory.mktemp("drawn")
    asked = questions(6, 0, "train")
    texts = [part for question in asked for part in ("user\n", "assistant\n", question.text, question.answer)]
    model = make_checkpoint(folder / "fresh", texts, 0)
    records = json.loads(write_records(asked, folder, "train").read_text())
    (folder / "captions.json").write_text(json.dumps([record for record in records if isinstance(record.get("image"), str)]))
    pairs = []
    for record, other in zip(records, [*records[1:], records[0]], strict=True):
        (question, answer), wrong = record["conversations"], other["conversations"][1]["value"]
        media = {key: record[key] for key in ("id", "image", "video") if key in record}
        pairs.append({**media, "prompt": question["value"].replace("<video>", "<image>"), "chosen": answer["value"], "rejected": wrong})
    (folder / "pairs.json").write_text(json.dumps(pairs))
    return folder, model


@pytest.mark.parametrize(
    "name, lora",
    [(name, None) for name in RECIPES]
    + [(name, True) for name, recipe in RECIPES.items() if recipe.lora]
    + [("sft", {"base": "int4"}), ("dpo", {"base": "int4"})],
)
def test_recipes_run_as_written(drawn, tmp_path, name, lora):
    """Nothing is given but model, data, a place, two steps and, where it is asked for, lora. What is trained changes, and nothing else."""
    folder, model = drawn
    data = "pairs.json" if name == "dpo" else "captions.json" if name in CAPTIONS else "train.json"
    given = {"recipe": name, "model": str(model), "data": str(folder / data), "output_dir": str(tmp_path), "max_steps": 2}
    result = lf.train({**given, **({} if lora is None else {"lora": lora})})
    assert result.steps == 2 and np.isfinite(result.losses).all() and not result.skipped
    config = as_config({**given, **({} if lora is None else {"lora": lora})})
    before = LlavaForConditionalGeneration.from_pretrained(model)
    if lora is None:
        after = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    else:
        from peft import PeftModel

        after = PeftModel.from_pretrained(LlavaForConditionalGeneration.from_pretrained(model), tmp_path)
        assert any("lora_B" in key and bool(parameter.any()) for key, parameter in after.named_parameters())
        after = after.merge_and_unload()
    assert {key for key, _ in before.named_parameters()} == {key for key, _ in after.named_parameters()}
    changed = {
        part_of(key.removeprefix("model."))
        for (key, a), (_, b) in zip(before.named_parameters(), after.named_parameters(), strict=True)
        if not torch.equal(a, b)
    }
    assert changed == {part for part in PARTS if config.part_lr(part) is not None}
    assert lf.generate(lf.load(tmp_path), lf.Request("What changed?"), max_new_tokens=2).token_ids


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("lora", [False, True])
def test_every_recipe_makes_a_configuration(name, lora):
    if lora and not RECIPES[name].lora:
        with pytest.raises(ValueError, match="lr_decoder must be a learning rate where there is lora"):
            recipes.make(name, **PATHS, lora=True)
        return
    config = recipes.make(name, **PATHS, lora=lora)
    assert (config.lora is not None) == lora and (config.dpo is not None) == (name == "dpo")
    given = {**RECIPES[name].fields, **(RECIPES[name].lora if lora else {})}
    assert all(source for _, source in given.values())
    for field, (value, _) in given.items():
        found = getattr(config, field)
        if isinstance(value, dict):
            assert all(getattr(found, key) == item for key, item in value.items())
        else:
            assert found == (None if value == "frozen" else value)


def test_published_values():
    def rates(config):
        return [config.part_lr(part) for part in ("vision_tower", "projector", "decoder")]

    assert rates(recipes.align(**PATHS)) == [None, 1e-3, None]
    assert rates(recipes.interleave(**PATHS)) == rates(recipes.sft(**PATHS)) == [2e-6, 1e-5, 1e-5]
    assert rates(recipes.make("v1_pretrain", **PATHS)) == [None, 2e-3, None]
    assert rates(recipes.make("v1_5_finetune", **PATHS)) == [None, 2e-5, 2e-5]
    assert recipes.make("v1_scienceqa", **PATHS).epochs == 12
    lora = recipes.make("v1_5_finetune", **PATHS, lora=True)
    assert rates(lora) == [None, 2e-5, 2e-4] and lora.lora == LoraOptions(r=128, alpha=256)
    preference = recipes.dpo(**PATHS)
    assert (preference.lr, preference.warmup_ratio, preference.dpo.beta, preference.dpo.gamma) == (5e-7, 0.1, 0.1, 0.0)
    assert rates(recipes.dpo(**PATHS, lora=True)) == [None, None, 5e-6]
    # The paper's ablation: 40 frames pooled to a quarter are as many rows as 10 that are not; 16 or 64 are asked of `generate`.
    few, many = recipes.interleave(**PATHS), recipes.make("interleave_pooled", **PATHS)
    assert (few.inputs.num_frames, few.inputs.pool) == (10, None) and (many.inputs.num_frames, many.inputs.pool) == (40, "average")


def test_what_a_run_sets_goes_before_its_recipe(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("recipe: interleave\nmodel: m\ndata: a.json\noutput_dir: o\nlr: 3e-5\ninputs: {num_frames: 4}\nlora: {r: 8}\n")
    config = as_config(file)
    assert config.lr == 3e-5 and config.inputs.num_frames == 4 and config.inputs.anyres is True
    assert config.lora == LoraOptions(r=8) and config.part_lr("vision_tower") is None and config.part_lr("projector") == 2e-5
    assert as_config({"recipe": "dpo", **PATHS, "dpo": {"beta": 0.3}}).dpo.beta == 0.3
    assert as_config({"recipe": "dpo", **PATHS, "dpo": True}).dpo.loss == "sigmoid"


@pytest.mark.parametrize("name, message", [("interlave", "did you mean 'interleave'"), (5, "known are align"), (None, "known are align")])
def test_recipes_that_do_not_exist(name, message):
    with pytest.raises(ValueError, match=f"the training configuration has no recipe .*{message}"):
        as_config({"recipe": name, **PATHS})


def test_changes_on_the_command_line():
    changed = change_fields({"recipe": "sft", "lora": {"r": 4}}, ["lr=1e-4", "lora.alpha=9", "inputs.anyres=false", "betas=[0.9, 0.95]"])
    assert changed == {"recipe": "sft", "lora": {"r": 4, "alpha": 9}, "lr": 1e-4, "inputs": {"anyres": False}, "betas": [0.9, 0.95]}
    for change, message in (("lr", "a change is written like"), ("lora.=3", "a change is written like"), ("lr=[", "lr cannot be read")):
        with pytest.raises(ValueError, match=message):
            change_fields({}, [change])


def test_the_command_line_trains_by_recipe(checkpoints, folder, tmp_path):
    from typer.testing import CliRunner

    from llava_fast.cli import app

    given = ["--model", str(checkpoints["qwen"]), "--data", str(folder / "captions.json"), "--out", str(tmp_path / "out")]
    changes = [part for change in ("max_steps=2", "tokens_per_row=128", "precision=fp32") for part in ("--set", change)]
    result = CliRunner().invoke(app, ["train", "--recipe", "align", *given, *changes], catch_exceptions=False)
    assert result.exit_code == 0 and (tmp_path / "out" / "model.safetensors").is_file()
    with pytest.raises(ValueError, match="either a file or --recipe, got neither"):
        CliRunner().invoke(app, ["train"], catch_exceptions=False)


def test_the_table_in_the_docs_is_the_code():
    assert recipes.table() in (Path(__file__).parent.parent / "docs" / "training.md").read_text()


def test_every_setting_is_in_the_docs_with_its_default_and_whether_it_may_change():
    text = (Path(__file__).parent.parent / "docs" / "training.md").read_text().partition("## 11. Every setting")[2]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| `")]
    described = {name.strip("`"): (default, change == "yes") for name, default, change, what in rows if what}
    fields = dataclasses.fields(TrainConfig)
    assert len(described) == len(rows) and {*described} == {field.name for field in fields}
    assert {field.name for field in fields} >= FREE and {name for name, (_, free) in described.items() if free} == FREE
    made = as_config(PATHS)
    for field in fields:
        default = described[field.name][0]
        if field.name in PATHS:
            assert default == "required"
        elif field.name == "inputs":
            assert default == "{}" and made.inputs == InputOptions()
        else:
            assert as_config({**PATHS, field.name: yaml.load(default, _Loader)}) == made, field.name
