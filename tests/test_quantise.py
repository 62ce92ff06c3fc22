"""Quantised models: the same function as with dequantised weights, less memory, and errors that say what is not possible."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import llava_fast as lf
from llava_fast.batch import Sample, pack
from llava_fast.kernels.linear import Quantised
from llava_fast.models.layers import Linear
from llava_fast.quantise import is_quantised, quantise_model
from llava_fast.training.loop import fit

KINDS = ["int8", "int4", "fp8"]
TINY = ["qwen", "qwen_untied"]
PROMPT = {"input_ids": torch.tensor([[5, 6, 7, 8, 9, 10, 11]]), "attention_mask": torch.ones(1, 7, dtype=torch.int64)}


def dequantised(model: lf.LlavaFast, original: lf.LlavaFast) -> lf.LlavaFast:
    """`original` with the weights of `model`, as numbers. A tied head's are those of the product: the table is as it was."""
    with torch.no_grad():
        pairs = dict(model.language_model.named_modules())
        for name, module in original.language_model.named_modules():
            if isinstance(weight := getattr(pairs[name], "weight", None), Quantised):
                module.weight.copy_(weight.dequantise())
        if original.lm_head is not None:
            original.lm_head.weight.copy_(model.lm_head.weight.dequantise())
        else:
            original.lm_head = torch.nn.Linear(*reversed(model.head_weight.shape), bias=False)
            original.lm_head.weight.copy_(model.head_weight.dequantise())
    return original


@pytest.mark.parametrize("quantise", KINDS)
@pytest.mark.parametrize("kind", TINY)
@torch.no_grad()
def test_logits_are_those_of_the_dequantised_weights(checkpoints, kind: str, quantise: str) -> None:
    model, original = lf.load(checkpoints[kind], dtype="float32", quantise=quantise), lf.load(checkpoints[kind], dtype="float32")
    assert is_quantised(model) and not is_quantised(original)
    exact = original(**PROMPT).logits
    ours, expected = model(**PROMPT).logits, dequantised(model, original)(**PROMPT).logits
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert 0 < (ours - exact).abs().max() < {"int8": 0.1, "int4": 1.0, "fp8": 0.5}[quantise] * exact.abs().max()


@pytest.mark.parametrize("quantise", KINDS)
def test_generates_and_is_smaller(checkpoints, quantise: str) -> None:
    original = lf.load(checkpoints["qwen_untied"])
    names = [name for name, _ in original.named_parameters()]
    quantise_model(original, quantise)
    kept = dict(original.named_parameters())
    gone = [name for name in names if name not in kept]
    assert all(name == "lm_head.weight" or name.startswith("language_model.layers.") for name in gone)
    assert len(gone) == 1 + 7 * len(original.language_model.layers)
    assert "language_model.embed_tokens.weight" in kept and any(name.startswith("vision_tower.") for name in kept)
    original.to("cpu")  # nothing to move, and nothing to put side by side anew
    completion = lf.generate(original, "What is this?", max_new_tokens=4, min_new_tokens=4)
    assert len(completion.token_ids) == 4 and completion.finish_reason == "length"


@pytest.mark.parametrize(("kind", "bytes_a_weight", "group"), [("int8", 1.0, None), ("int4", 0.5, 32), ("fp8", 1.0, None)])
@pytest.mark.parametrize("model", TINY)
def test_bytes_held(checkpoints, model: str, kind: str, bytes_a_weight: float, group: int | None) -> None:
    """Whole storages are counted: a bias or a norm that lay in the buffer of the old weights would keep all of it."""
    loaded = lf.load(checkpoints[model], quantise=kind)
    layers = loaded.language_model.layers
    linears = [module for module in layers.modules() if isinstance(module, Linear)]
    shapes = [*((linear.out_features, linear.in_features) for linear in linears), tuple(loaded.head_weight.weight.shape)]
    shapes[-1] = (shapes[-1][0], loaded.config.decoder.width)
    expected = sum(int(O * I * bytes_a_weight) + 4 * O * (-(-I // group) if group else 1) for O, I in shapes)
    held = [tensor for linear in linears for tensor in (linear.weight.weight, linear.weight.scale)]
    held += [loaded.head_weight.weight, loaded.head_weight.scale]
    assert sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}.values()) == expected
    kept = list(layers.parameters())
    assert sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}.values()) == sum(t.nbytes for t in kept)


def test_linears_that_share_their_input_stay_side_by_side(checkpoints) -> None:
    attention = lf.load(checkpoints["qwen"], quantise="int8").language_model.layers[0].self_attn
    q, k = attention.q_proj.weight, attention.k_proj.weight
    assert k.weight.data_ptr() == q.weight.data_ptr() + q.weight.numel() and k.scale.data_ptr() == q.scale.data_ptr() + 4 * q.scale.numel()


def test_what_a_quantised_model_cannot_do(checkpoints, tmp_path) -> None:
    with pytest.raises(ValueError, match="quantise must be one of int8, int4, fp8 or None, got 'int3'"):
        lf.load(checkpoints["qwen"], quantise="int3")
    model = lf.load(checkpoints["qwen"])
    with pytest.raises(ValueError, match="group must be a multiple of 32 .* got 33"):
        quantise_model(model, "int8", group=33)
    assert not is_quantised(model)
    quantise_model(model, "int8", group=32)
    with pytest.raises(ValueError, match="quantised already"):
        quantise_model(model, "int4")
    with pytest.raises(ValueError, match="a quantised model stays on cpu, got meta: load it there, with device='meta'"):
        model.to("meta")
    assert model.device.type == "cpu" and model.language_model.norm.weight.device.type == "cpu"
    with pytest.raises(ValueError, match="a quantised model is not saved"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    config = lf.TrainConfig(model=str(checkpoints["qwen"]), data=["x.json"], output_dir=str(tmp_path / "run"))
    with pytest.raises(ValueError, match="a quantised model has no loss"):
        model.loss(pack([Sample(np.arange(5), labels=np.arange(5))]))
    with pytest.raises(ValueError, match="a quantised model cannot be trained"):
        fit(model, [], config)  # type: ignore[arg-type]
