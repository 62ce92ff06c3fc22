"""The memory that is told before a run is the memory that its tensors then take."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import LlavaConfig, Qwen2Config, SiglipVisionConfig

import llava_fast as lf
from llava_fast.config import from_hf
from llava_fast.kernels.linear import Quantised
from llava_fast.training.config import as_config
from llava_fast.training.footprint import GIB, Footprint, check_fits, footprint
from llava_fast.training.lora import attach
from llava_fast.training.step import make_optimizer, prepare_parameters

LORA = {"lora": {"r": 4, "dropout": 0.0}, "lr_vision_tower": "frozen"}


def config_7b():
    """llava-interleave-qwen-7b: SigLIP so400m, Qwen1.5-7B."""
    vision = dict(hidden_size=1152, intermediate_size=4304, num_hidden_layers=26, num_attention_heads=16, image_size=384, patch_size=14)
    text = dict(vocab_size=152_000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
    text |= dict(num_key_value_heads=32, max_position_embeddings=32_768, tie_word_embeddings=False)
    whole = LlavaConfig(
        vision_config=SiglipVisionConfig(**vision, vision_use_head=False),
        text_config=Qwen2Config(**text),
        image_token_id=151_646,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=False,
    )
    return from_hf(whole)


def settings(**changes):
    return as_config({"model": "m", "data": "d.json", "output_dir": "o", "progress": False, "save_every": None, **changes})


def size(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def taken(model, config):
    """Bytes of weights, masters, gradients and moments in a step of a model on the CPU."""
    trained = prepare_parameters(model, config, config.precision)
    optimizer = make_optimizer(trained.masters, config)
    own = {parameter.data_ptr() for parameter in model.parameters()}
    masters = size(master for master in trained.masters.values() if master.data_ptr() not in own)
    for master in trained.masters.values():
        master.grad = torch.zeros_like(master)
    gradients = size(master.grad for master in trained.masters.values())
    optimizer.step()
    moments = size(value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value) and value.ndim)
    weights = size(model.parameters())
    for module in model.modules():
        if isinstance(getattr(module, "weight", None), Quantised):
            weights += size([module.weight.weight, module.weight.scale])
    return Footprint(weights, masters, gradients, moments)


@pytest.mark.parametrize("kind", ["qwen", "llama"])
@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "fp32"},
        {"precision": "bf16"},
        {"precision": "bf16_pure"},
        {"precision": "bf16", "lr_vision_tower": "frozen"},
        {"precision": "fp32", "lr_decoder": "frozen", "lr_vision_tower": "frozen"},
        {"precision": "bf16", **LORA},
        {"precision": "fp32", **LORA, "lora": {"r": 4, "base": "int4", "targets": ["q_proj", "up_proj"]}},
        {"precision": "fp32", **LORA, "lora": {"r": 4, "base": "int8"}, "lr_projector": "frozen"},
    ],
)
def test_it_is_what_the_tensors_of_a_run_take(directory, changes):
    config, model = settings(**changes), lf.load(directory, dtype=torch.float32)
    if config.lora is not None:
        attach(model, config.lora)
    assert footprint(model.config, config, config.precision) == taken(model, config)


def test_moments_in_8_bits(checkpoints):
    """Those of small tensors stay in fp32, and every 256 share two scales: not to be seen in a real model."""
    pytest.importorskip("bitsandbytes")
    config, model = settings(precision="bf16", optimizer="adamw_8bit"), lf.load(checkpoints["qwen"], dtype=torch.float32)
    told, there = footprint(model.config, config), taken(model, config)
    assert dataclasses.replace(there, moments=0) == dataclasses.replace(told, moments=0)
    assert told.moments < there.moments < 1.3 * told.moments


def test_processes_share_all_but_a_frozen_tower():
    model = config_7b()
    alone, eight = footprint(model, settings()), footprint(model, settings(), world=8)
    assert eight.weights + eight.masters == pytest.approx((alone.weights + alone.masters) * 4 / 6 / 8, rel=1e-6)
    assert (eight.gradients, eight.moments) == (-(-alone.gradients // 8), -(-alone.moments // 8))
    frozen = footprint(model, settings(lr_vision_tower="frozen"), world=8)
    assert frozen.weights - eight.weights == pytest.approx(0.398e9 * (2 - 4 / 8), rel=0.02)
    assert 5e9 < eight.gathered < 15e9


@pytest.mark.parametrize(
    "changes, world, gib",
    [
        ({}, 1, 136.5),
        ({"optimizer": "adamw_8bit"}, 1, 91.0),
        ({"precision": "bf16_pure"}, 1, 60.7),
        ({"lr_vision_tower": "frozen", "optimizer": "adamw_8bit"}, 1, 87.3),
        ({"lr_vision_tower": "frozen", "lora": True}, 1, 18.2),
        ({"lr_vision_tower": "frozen", "lora": {"base": "int4"}}, 1, 9.9),
        ({}, 2, 70.9),
        ({}, 8, 25.4),
    ],
)
def test_the_table_of_the_documentation(changes, world, gib):
    precision = changes.get("precision", "bf16")
    assert footprint(config_7b(), settings(**changes), precision, world).total / GIB == pytest.approx(gib, abs=0.06)


def test_a_plan_that_does_not_fit_is_refused_with_what_would_take_less():
    model, card = config_7b(), int(80 * GIB)
    fits = r"what fits: precision bf16_pure 60\.\d GiB, 8 processes 2\d\.\d GiB, lora 1\d\.\d GiB$"
    with pytest.raises(ValueError, match=rf"take 136\.\d GiB of a device's 80\.0, .*{fits}"):
        check_fits(model, settings(), "bf16", 1, card)
    with pytest.raises(ValueError, match="what fits: precision bf16_pure"):
        check_fits(model, settings(optimizer="adamw_8bit"), "bf16", 1, card)
    with pytest.raises(ValueError, match=r"what fits: 8 processes 5\.\d GiB, lora\.base int4 \d"):
        check_fits(model, settings(**LORA), "bf16", 1, int(15 * GIB))
    with pytest.raises(ValueError, match="nor does it fit with optimizer adamw_8bit, precision bf16_pure, 8 processes, lora"):
        check_fits(model, settings(), "bf16", 1, int(5 * GIB))
    check_fits(model, settings(precision="bf16_pure"), "bf16_pure", 1, card)
    check_fits(model, settings(), "bf16", 8, card)
