"""LoRA: the same training as peft on transformers, files that both read, adapters over quantised weights, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration

import llava_fast as lf
from llava_fast import checkpoint
from llava_fast.kernels import registry
from llava_fast.kernels.linear import Quantised, linear, quantise
from llava_fast.kernels.patchify import normalise
from llava_fast.models.layers import Linear, joined_linear
from llava_fast.models.llava import Llava
from llava_fast.training.batches import Position, make_steps
from llava_fast.training.config import as_config
from llava_fast.training.dataset import index_records
from llava_fast.training.flops import row_flops
from llava_fast.training.lora import adapters, attach, decoder_linears, load_adapter, merge, save_adapter, without_adapters
from llava_fast.training.options import LINEARS, LoraOptions
from llava_fast.training.step import prepare_parameters

peft = pytest.importorskip("peft")
OPTIONS = {"r": 4, "alpha": 8, "dropout": 0.0}
TARGETS = rf".*language_model.*\.({'|'.join(LINEARS)})"
IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])


@pytest.fixture
def data(tmp_path):
    """Six records of no, one and two pictures."""
    records = []
    for i in range(6):
        names = [f"{i}-{j}.png" for j in range(i % 3)]
        for j, name in enumerate(names):
            pixels = np.random.default_rng(10 * i + j).integers(0, 255, (40, 60, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name)
        turns = [{"from": "human", "value": "What are these?"}, {"from": "gpt", "value": ["yes", "no", "red", "green", "blue", "cat"][i]}]
        records.append({"id": i, "image": names, "conversations": turns} if names else {"id": i, "conversations": turns})
    (tmp_path / "data.json").write_text(json.dumps(records))
    return str(tmp_path / "data.json")


def fields(directory, data, out, **changes):
    frozen = {"lr_vision_tower": "frozen", "lr_projector": "frozen", "lora": OPTIONS}
    kept = {"model": str(directory), "data": data, "output_dir": str(out), "tokens_per_row": 128, "lr": 1e-2, "precision": "fp32"}
    return {**kept, "save_every": None, "progress": False, "log_every": 1, **frozen, **changes}


def randomise(model, seed=1):
    """B is zero at first: give every adapter an effect."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for adapter in adapters(model):
            adapter.B.normal_(std=0.05, generator=generator)


def same(a, b, tolerance=1e-5):
    assert (a - b).abs().max() <= tolerance * b.abs().max(), f"{(a - b).abs().max():.2e} of {b.abs().max():.2e}"


def adapted(directory, **options) -> lf.LlavaFast:
    model = lf.load(directory, dtype=torch.float32)
    attach(model, LoraOptions(**{**OPTIONS, **options}))
    randomise(model)
    return model


# --- the same function and the same training as peft ---


def test_a_fresh_adapter_changes_nothing_and_is_that_of_peft(directory):
    model = lf.load(directory, dtype=torch.float32)
    before = model(input_ids=IDS).logits
    attach(model, LoraOptions(r=8))
    assert torch.equal(model(input_ids=IDS).logits, before)
    assert len(adapters(model)) == 7 * len(model.language_model.layers)
    randomise(model)
    assert not torch.allclose(model(input_ids=IDS).logits, before, rtol=1e-3)
    with without_adapters(model):
        assert torch.equal(model(input_ids=IDS).logits, before)
    theirs = peft.get_peft_model(
        LlavaForConditionalGeneration.from_pretrained(directory), peft.LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS)
    )
    ours = {name: p.shape for name, p in model.named_parameters() if ".lora." in name}
    assert len(ours) == sum("lora_" in name for name, _ in theirs.named_parameters())
    A = model.language_model.layers[0].mlp.down_proj.lora.A
    theirs_A = theirs.base_model.model.model.language_model.layers[0].mlp.down_proj.lora_A["default"].weight
    assert A.shape == theirs_A.shape and A.abs().max() <= theirs_A.abs().max() * 1.1 and abs(A.std() / theirs_A.std() - 1) < 0.2


def peft_twin(directory, model, options, **extra):
    """transformers + peft with the weights of `model`'s adapters."""
    hf = LlavaForConditionalGeneration.from_pretrained(directory, dtype=torch.float32)
    config = peft.LoraConfig(r=options.r, lora_alpha=options.alpha, lora_dropout=options.dropout, target_modules=TARGETS, **extra)
    twin = peft.get_peft_model(hf, config)
    linears = {f"base_model.model.model.{name}": module for name, module in model.named_modules() if isinstance(module, Linear)}
    with torch.no_grad():
        for name, module in twin.named_modules():
            if name in linears and hasattr(module, "lora_A"):
                module.lora_A["default"].weight.copy_(linears[name].lora.A)
                module.lora_B["default"].weight.copy_(linears[name].lora.B)
    return twin


def dense_loss(hf, row_examples, image_token):
    """Mean over labels of transformers' losses of samples that it runs one at a time."""
    total, labels = 0.0, 0
    for example in row_examples:
        (sample,), views = example.sequences, example.views
        ids, wanted = torch.from_numpy(sample.token_ids.copy()), torch.from_numpy(sample.labels.copy())
        for visual, start in zip(sample.visuals, sample.starts, strict=True):
            ids[start : start + visual.tokens] = image_token
        pixels = None if views is None else normalise(views, (0.5,) * 3, (0.5,) * 3)
        logits = hf(input_ids=ids[None], pixel_values=pixels).logits[0, :-1]
        total = total + F.cross_entropy(logits, wanted[1:], reduction="sum")
        labels += int((wanted[1:] != -100).sum())
    return total / labels


@pytest.mark.parametrize("kind", ["qwen", "qwen_untied"])
@pytest.mark.parametrize("projector", [False, True])
def test_packed_training_equals_peft_on_transformers(directory, data, tmp_path, projector):
    """20 steps of adapters, with the projector trained beside them and without; the first step's gradients too."""
    rates = {"lr_projector": 1e-3} if projector else {}
    config = as_config(fields(directory, data, tmp_path / "run", max_steps=20, rows_per_step=2, weight_decay=0.1, **rates))
    assert config.lora is not None
    start = lf.load(directory, dtype=torch.float32)
    attach(start, config.lora, config.seed)
    twin = peft_twin(directory, start, config.lora, **({"modules_to_save": ["multi_modal_projector"]} if projector else {}))
    names = {n: p for n, p in twin.named_parameters() if p.requires_grad}
    lora = [p for n, p in names.items() if "lora_" in n]
    matrices = [p for n, p in names.items() if "multi_modal" in n and n.endswith("weight")]
    biases = [p for n, p in names.items() if "multi_modal" in n and n.endswith("bias")]
    optimizer = torch.optim.AdamW(
        [{"params": lora, "lr": 1e-2, "weight_decay": 0.1}]
        + ([{"params": matrices, "lr": 1e-3, "weight_decay": 0.1}, {"params": biases, "lr": 1e-3, "weight_decay": 0}] if projector else [])
    )
    rates = [group["lr"] for group in optimizer.param_groups]
    from llava_fast.training.step import lr_factor

    indexed = index_records(config, start.input_spec)
    steps, gradients = make_steps(indexed, config, Position()), []
    result = lf.train(config)
    trained = prepare_parameters(start, config, "fp32")
    for number, (step, ours) in enumerate(zip(steps, result.losses, strict=False)):
        examples = [indexed.load(i) for row in step.rows for i in row.indices]
        loss = dense_loss(twin, examples, start.config.image_token_id)
        assert ours == pytest.approx(loss.item(), rel=1e-5), f"step {number}"
        loss.backward()
        if number == 0:
            (sum(start.loss(row.batch) for row in step.rows) / step.labels).backward()
            for name, parameter in trained.working.items():
                gradients.append(name)
                key = (
                    name.replace(".lora.", ".lora_") + ".default.weight"
                    if ".lora." in name
                    else name.replace("multi_modal_projector.", "multi_modal_projector.modules_to_save.default.")
                )
                theirs = names[f"base_model.model.model.{key}"].grad
                assert (parameter.grad - theirs).abs().max() <= 1e-5 * theirs.abs().max() + 1e-9, name
        torch.nn.utils.clip_grad_norm_(names.values(), 1.0)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * lr_factor(number, 20, config.warmup_ratio, config.schedule)
        optimizer.step()
        optimizer.zero_grad()
    assert number == 19 and len(gradients) == len(names)
    assert result.losses[-1] < result.losses[0] - 0.5

    # What was written is what peft had at the end: its logits on transformers, and ours.
    again = peft.PeftModel.from_pretrained(LlavaForConditionalGeneration.from_pretrained(directory, dtype=torch.float32), tmp_path / "run")
    ids = torch.cat([torch.full((9,), start.config.image_token_id), IDS[0]])[None]
    pixels = torch.randn(1, 3, 42, 42, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = twin.eval()(input_ids=ids, pixel_values=pixels).logits
        same(again.eval()(input_ids=ids, pixel_values=pixels).logits, expected, 1e-4)
        same(lf.load(tmp_path / "run")(input_ids=ids, pixel_values=pixels).logits, expected, 1e-4)


def test_dropout_is_of_the_adapters_input_and_only_in_training(checkpoints):
    model = adapted(checkpoints["qwen"], dropout=0.5)
    projection = model.language_model.layers[0].mlp.down_proj
    x = torch.randn(3, projection.in_features)
    model.eval()
    same(projection(x) - linear(x, projection.weight), x @ projection.lora.A.T @ projection.lora.B.T * 2)
    model.train()
    torch.manual_seed(0)
    dropped = F.dropout(x, 0.5)
    torch.manual_seed(0)
    same(projection(x) - linear(x, projection.weight), dropped @ projection.lora.A.T @ projection.lora.B.T * 2)


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("k_proj", "up_proj"), LINEARS])
def test_linears_side_by_side_with_some_adapters(checkpoints, targets):
    """One product for q, k and v, each with what its own adapter adds; the same one by one, and after merging."""
    model = adapted(checkpoints["qwen_untied"], targets=targets)
    attention = model.language_model.layers[0].self_attn
    parts = (attention.q_proj, attention.k_proj, attention.v_proj)
    x = torch.randn(5, parts[0].in_features)
    same(joined_linear(x, parts), torch.cat([part(x) for part in parts], dim=-1), 1e-6)
    assert [part.lora is not None for part in parts] == [name in targets for name in ("q_proj", "k_proj", "v_proj")]
    before = model(input_ids=IDS).logits
    merge(model)
    assert not adapters(model)
    same(model(input_ids=IDS).logits, before)


# --- files ---


def test_only_the_adapters_are_trained_and_saved_and_a_run_goes_on(checkpoints, data, tmp_path):
    whole = lf.train(fields(checkpoints["qwen"], data, tmp_path / "a", max_steps=6, lora={**OPTIONS, "dropout": 0.2}))
    assert {path.name for path in (tmp_path / "a").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert not (tmp_path / "a" / "model.safetensors").exists()
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(checkpoints["qwen"]) and config["r"] == 4 and config["modules_to_save"] is None
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert all(".lora_" in name for name in tensors) and len(tensors) == 2 * 7 * 3

    def stop(metrics):
        if metrics.step == 3:
            raise RuntimeError("stopped")

    changes = {"max_steps": 6, "save_every": 2, "lora": {**OPTIONS, "dropout": 0.2}}
    with pytest.raises(RuntimeError, match="stopped"):
        lf.train(fields(checkpoints["qwen"], data, tmp_path / "b", **changes), on_step=stop)
    assert lf.train(fields(checkpoints["qwen"], data, tmp_path / "b", **changes)).losses == whole.losses
    resumed = load_file(tmp_path / "b" / "adapter_model.safetensors")
    assert all(torch.equal(tensors[name], resumed[name]) for name in tensors)


@pytest.mark.parametrize("projector", ["frozen", "lr"])
def test_arithmetic_that_is_reported_is_that_of_adapters(checkpoints, data, tmp_path, projector):
    """No gradients of the weights beside them."""
    seen, settings = [], fields(checkpoints["qwen"], data, tmp_path, max_steps=2, lr_projector=projector)
    lf.train(settings, on_step=seen.append)
    config = as_config(settings)
    model = lf.load(checkpoints["qwen"])
    steps = make_steps(index_records(config, model.input_spec), config, Position())
    parts = {"trained": () if projector == "frozen" else ("projector",), "adapted": ("decoder",)}
    for metrics, step in zip(seen, steps, strict=False):
        done = sum(row_flops(model.config, row.batch, **parts) for row in step.rows)
        assert metrics.tflops * metrics.seconds * 1e12 == pytest.approx(done, rel=1e-9)


def test_bf16_and_an_adapter_on_an_adapter(checkpoints, data, tmp_path):
    first = lf.train(fields(checkpoints["qwen"], data, tmp_path / "a", max_steps=12, precision="bf16"))
    assert first.losses[-1] < first.losses[0]
    second = lf.train(fields(tmp_path / "a", data, tmp_path / "b", max_steps=2, warmup_ratio=0.0))
    assert second.losses[0] < first.losses[0]
    assert lf.load(tmp_path / "b")(input_ids=IDS).logits.isfinite().all()


@pytest.mark.parametrize("pattern", ["v_proj", "^model.language_model.layers.0.self_attn.v_proj"])
def test_alpha_patterns_are_matched_against_the_names_of_the_file(pattern, directory, tmp_path):
    hf = LlavaForConditionalGeneration.from_pretrained(directory, dtype=torch.float32)
    twin = peft.get_peft_model(hf, peft.LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS, alpha_pattern={pattern: 40})).eval()
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if "lora_" in name:
                parameter.add_(0.05)
    twin.peft_config["default"].base_model_name_or_path = str(directory)
    twin.save_pretrained(tmp_path)
    with torch.no_grad():
        same(lf.load(tmp_path, dtype=torch.float32)(input_ids=IDS).logits, twin(input_ids=IDS).logits)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**written, "alpha_pattern": {"no_such_layer": 40}}))
    with pytest.raises(ValueError, match="alpha_pattern 'no_such_layer' matches no adapter"):
        lf.load(tmp_path)


def test_adapters_of_peft_are_read(directory, tmp_path):
    hf = LlavaForConditionalGeneration.from_pretrained(directory, dtype=torch.float32)
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=TARGETS, modules_to_save=["multi_modal_projector"], rank_pattern={"q_proj": 2}
    )
    twin = peft.get_peft_model(hf, config).eval()
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.05)
    twin.peft_config["default"].base_model_name_or_path = str(directory)
    twin.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = twin(input_ids=IDS).logits
        same(lf.load(tmp_path, dtype=torch.float32)(input_ids=IDS).logits, expected)
        model = lf.load(directory, dtype=torch.float32)
        load_adapter(model, tmp_path)
        same(model(input_ids=IDS).logits, expected)
    # Written again, what differs among them is said as peft says it.
    next(iter(adapters(model))).scale *= 2
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
    save_adapter(model, tmp_path / "again", str(directory))
    written = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    layers = len(model.language_model.layers)
    assert written["r"] == 3 and sorted(written["rank_pattern"].values()) == [2] * layers and [*written["alpha_pattern"].values()] == [10]
    again = peft.PeftModel.from_pretrained(
        LlavaForConditionalGeneration.from_pretrained(directory, dtype=torch.float32), tmp_path / "again"
    )
    with torch.no_grad():
        same(again.eval()(input_ids=IDS).logits, expected)
        same(lf.load(tmp_path / "again", dtype=torch.float32)(input_ids=IDS).logits, expected)


@pytest.mark.parametrize("kept", [["layers.1"], ["q_proj", "layers.0.mlp.up_proj"]])
def test_adapters_of_some_layers_are_those_that_peft_makes(checkpoints, tmp_path, kept):
    model = adapted(checkpoints["qwen"])
    names = [name for name, linear in decoder_linears(model)]
    for name in names:
        if not any(part in name for part in kept):
            model.get_submodule(name).lora = None
    save_adapter(model, tmp_path, str(checkpoints["qwen"]))
    hf = LlavaForConditionalGeneration.from_pretrained(checkpoints["qwen"], dtype=torch.float32)
    again = peft.PeftModel.from_pretrained(hf, tmp_path).eval()
    assert sum("lora_A" in name for name, _ in again.named_parameters()) == len(adapters(model)) < len(names)
    with torch.no_grad():
        same(again(input_ids=IDS).logits, model(input_ids=IDS).logits)
    merge(model)
    with pytest.raises(ValueError, match="has no adapters to save"):
        save_adapter(model, tmp_path / "none", "base")


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"])
def test_adapters_of_tower_and_projector_are_not_lost(checkpoints, tmp_path, targets):
    hf = LlavaForConditionalGeneration.from_pretrained(checkpoints["qwen"], dtype=torch.float32)
    twin = peft.get_peft_model(hf, peft.LoraConfig(r=2, lora_alpha=4, target_modules=targets)).eval()
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.05)
    assert any("vision_tower" in name and "lora" in name for name, _ in twin.named_parameters())
    twin.peft_config["default"].base_model_name_or_path = str(checkpoints["qwen"])
    twin.save_pretrained(tmp_path)
    model = lf.load(tmp_path, dtype=torch.float32)
    assert not adapters(model)
    config = model.config
    ids = torch.tensor([[config.image_token_id] * config.patches + [5, 6, 7]])
    pixels = torch.randn(1, 3, config.vision.image_size, config.vision.image_size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        same(model(input_ids=ids, pixel_values=pixels).logits, twin(input_ids=ids, pixel_values=pixels).logits)
    model.save_pretrained(tmp_path / "whole")


def test_merged_models_are_saved_and_adapters_alone_are_not(checkpoints, tmp_path):
    model = adapted(checkpoints["llama"])
    expected = model(input_ids=IDS).logits
    with pytest.raises(ValueError, match="a model with adapters is not saved: merge them"):
        model.save_pretrained(tmp_path / "out")
    merge(model)
    model.save_pretrained(tmp_path / "out")
    hf = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        same(hf(input_ids=IDS).logits, expected)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"peft_type": "LOHA"}, "holds a 'LOHA' adapter, expected LORA"),
        ({"use_dora": True}, "use_dora is not implemented"),
        ({"bias": "all"}, "bias must be 'none', got 'all'"),
        ({"lora_alpha": None}, "lora_alpha must be a number, got None"),
        ({"base_model_name_or_path": None}, "does not name the base model"),
    ],
)
def test_configurations_that_are_refused(checkpoints, tmp_path, change, message):
    save_adapter(adapted(checkpoints["qwen"]), tmp_path, str(checkpoints["qwen"]))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=message):
        lf.load(tmp_path)


def test_tensors_that_do_not_fit_are_named_and_change_nothing(checkpoints, tmp_path):
    save_adapter(adapted(checkpoints["qwen"]), tmp_path, str(checkpoints["qwen"]))
    file = tmp_path / "adapter_model.safetensors"
    tensors, model = load_file(file), lf.load(checkpoints["qwen"])
    name = "base_model.model.model.language_model.layers.1.mlp.up_proj.lora_A.weight"
    for changed, message in (
        ({name.replace("layers.1", "layers.7"): tensors[name].clone()}, r"layers\.7.*fits nothing in the model"),
        ({name: torch.zeros(5, 64)}, r"adapter of language_model.layers.1.mlp.up_proj \[112, 64\] has"),
    ):
        save_file({**tensors, **changed}, file)
        with pytest.raises(ValueError, match=message):
            load_adapter(model, tmp_path)
        assert not adapters(model)
    file.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        load_adapter(model, tmp_path)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"r": 0}, "lora.r must be an integer >= 1, got 0"),
        ({"alpha": -1}, "lora.alpha must be"),
        ({"dropout": 1.0}, "lora.dropout must be"),
        ({"targets": ["q_proj", "lm_head"]}, "lora.targets must be some of q_proj"),
        ({"targets": []}, "lora.targets"),
        ({"base": "int2"}, "lora.base must be int8, int4, fp8 or None, got 'int2'"),
        ({"rank": 4}, "lora has no field 'rank'"),
    ],
)
def test_options_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        as_config({"model": "m", "data": "a.json", "output_dir": "o", "lr_vision_tower": "frozen", "lora": options})


def test_parts_that_adapters_need_or_exclude():
    base = {"model": "m", "data": "a.json", "output_dir": "o", "lora": True}
    assert as_config({**base, "lr_vision_tower": "frozen"}).lora == LoraOptions(64, 16, 0.05)
    with pytest.raises(ValueError, match="lr_vision_tower must be 'frozen' where there is lora"):
        as_config(base)
    with pytest.raises(ValueError, match="lr_decoder must be a learning rate where there is lora"):
        as_config({**base, "lr_vision_tower": "frozen", "lr_decoder": "frozen"})
    assert as_config({**base, "lora": False}).lora is None


# --- over quantised weights ---


@pytest.mark.parametrize("implementation", ["cpu", "reference"])
@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
def test_gradients_through_a_quantised_linear(kind, implementation):
    if kind == "fp8" and implementation == "cpu":
        pytest.skip("the C++ kernel has no fp8")
    generator = torch.Generator().manual_seed(0)
    weight = quantise(torch.randn(24, 64, generator=generator), kind, 32)
    bias, x = torch.randn(24, generator=generator), torch.randn(2, 5, 64, generator=generator)
    residual, out = torch.randn(2, 5, 24, generator=generator), torch.randn(2, 5, 24, generator=generator)
    results = []
    for matrix in (weight, weight.dequantise()):
        leaves = [t.clone().requires_grad_() for t in (x, bias, residual)]
        with registry.use(linear=implementation):
            y = linear(leaves[0], matrix, leaves[1], act="silu", residual=leaves[2])
        y.backward(out)
        results.append([y.detach(), *(leaf.grad for leaf in leaves)])
    for ours, expected in zip(*results, strict=True):
        same(ours, expected, 1e-6)


def test_the_reference_keeps_no_widened_weight():
    """What the backward pass of 64 rows keeps of a 256 x 256 int8 weight is far less than the weight in fp32."""
    weight, x = quantise(torch.randn(256, 256), "int8"), torch.randn(64, 256, requires_grad=True)
    kept = []
    with registry.use(linear="reference"), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        linear(x, weight).sum()
    assert sum(kept) < 256 * 256 * 4


@pytest.mark.parametrize("kind", ["qwen", "llama"])
@pytest.mark.parametrize("base", ["int8", "int4"])
def test_adapters_over_quantised_weights_train_as_over_the_same_numbers(directory, data, tmp_path, base):
    template = "hf"
    config = as_config(fields(directory, data, tmp_path / "run", max_steps=20, template=template, lora={**OPTIONS, "base": base}))
    assert config.lora is not None
    result = lf.train(config)
    wide = checkpoint.load(Llava, directory, dtype=torch.float32)
    rounded = checkpoint.load(Llava, directory, dtype=torch.float32)
    attach(rounded, config.lora, config.seed)
    attach(wide, LoraOptions(**OPTIONS), config.seed)
    with torch.no_grad():
        weights = {
            name: module.weight for name, module in rounded.named_modules() if isinstance(getattr(module, "weight", None), Quantised)
        }
        assert len(weights) == 7 * len(wide.language_model.layers)
        for name, weight in weights.items():
            wide.get_submodule(name).weight.copy_(weight.dequantise())
    from llava_fast.training.loop import fit

    plain = as_config({**fields(directory, data, tmp_path / "wide", max_steps=20, template=template)})
    losses = fit(wide, index_records(plain, wide.input_spec), plain).losses
    assert result.losses == pytest.approx(losses, rel=1e-5) and losses[-1] < losses[0]
    assert lf.load(tmp_path / "run")(input_ids=IDS).logits.isfinite().all()


@pytest.mark.parametrize("base", ["int8", "int4", "fp8"])
def test_another_base_under_quantised_weights_is_refused_on_resume(checkpoints, data, tmp_path, base):
    """Of the decoder's linears no parameter is left that could tell."""
    changes = {"max_steps": 4, "save_every": 2, "lora": {**OPTIONS, "base": base}}

    def stop(metrics):
        if metrics.step == 3:
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        lf.train(fields(checkpoints["qwen"], data, tmp_path / "run", **changes), on_step=stop)
    hf = LlavaForConditionalGeneration.from_pretrained(checkpoints["qwen"], dtype=torch.float32)
    with torch.no_grad():
        hf.model.language_model.layers[1].mlp.up_proj.weight[3].mul_(-1)
    other = Path(shutil.copytree(checkpoints["qwen"], tmp_path / "other"))
    hf.save_pretrained(other)
    with pytest.raises(ValueError, match="base model: "):
        lf.train(fields(other, data, tmp_path / "run", **changes))
    assert lf.train(fields(checkpoints["qwen"], data, tmp_path / "run", **changes)).steps == 4


def test_merging_over_quantised_weights_is_refused(checkpoints):
    model = lf.load(checkpoints["qwen"])
    attach(model, LoraOptions(**OPTIONS, base="int8"))
    with pytest.raises(ValueError, match="q_proj is quantised: load the base model anew"):
        merge(model)


def test_an_adapter_of_a_moved_base_is_read_where_the_base_is(checkpoints, tmp_path):
    base = Path(shutil.copytree(checkpoints["qwen"], tmp_path / "base"))
    save_adapter(adapted(base), tmp_path / "adapter", str(base))
    shutil.rmtree(base)
    with pytest.raises(ValueError, match="neither a checkpoint directory nor a hub id"):
        lf.load(tmp_path / "adapter")
    model = lf.load(checkpoints["qwen"])
    load_adapter(model, tmp_path / "adapter")
    assert len(adapters(model)) == 21
