"""Each baseline of bench/baselines/inference.py and openvino.py gives the model's answer: tiny models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench import loading
from bench.baselines import inference, openvino
from bench.full_size import relative_error
from bench.paired import OURS
from bench.sides import SDPA, Sides, compare
from tests.tiny import make_checkpoint

KINDS = ("qwen", "llama")  # equal and grouped heads
T = 7


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    return inference.load(make_checkpoint(tmp_path_factory.mktemp(request.param), request.param))


def embeds(model) -> Tensor:
    return torch.randn(T, model.config.text_config.hidden_size, generator=torch.Generator().manual_seed(0))


def pixels(model) -> Tensor:
    size = model.config.vision_config.image_size
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def past(model, batch: int = 2) -> tuple[list[Tensor], list[Tensor]]:
    text, generator = model.config.text_config, torch.Generator().manual_seed(2)
    shape = (batch, text.num_key_value_heads, T, text.hidden_size // text.num_attention_heads)
    keys, values = ([torch.randn(shape, generator=generator) for _ in range(text.num_hidden_layers)] for _ in range(2))
    return keys, values


def whole(model, x: Tensor) -> Tensor:
    return model(inputs_embeds=x[None], use_cache=False).logits[0, -1:]


@torch.inference_mode()
@pytest.mark.parametrize("change", ["none", "eager", "sharing"])
def test_prefill_and_tower(model, change: str) -> None:
    makes = {"none": lambda: model, "eager": lambda: inference.with_attention(model, "eager"), "sharing": lambda: inference.sharing(model)}
    other = makes[change]()
    assert relative_error(inference.prefill(other, embeds(model)), whole(model, embeds(model))) < 1e-5
    features = model.get_image_features(pixel_values=pixels(model))
    tower = inference.tower(other, pixels(model))
    if model.config.vision_feature_select_strategy == "full":
        projected = model.model.multi_modal_projector(tower)
        assert relative_error(projected, torch.stack(list(getattr(features, "pooler_output", features)))) < 1e-5
    if change == "eager":
        assert other.config.text_config._attn_implementation == "eager" != model.config.text_config._attn_implementation
    assert other.lm_head.weight.data_ptr() == model.lm_head.weight.data_ptr()


@torch.inference_mode()
def test_decoding_goes_on_from_a_past_and_takes_its_step_back(model) -> None:
    keys, values = past(model)
    token = torch.tensor([5, 9])
    step = inference.decoding(model, keys, values, token)
    first = step()
    assert torch.equal(first, step())
    static = inference.static_decoding(model, keys, values, token, compile=False)
    assert relative_error(static(), first) < 1e-5
    assert relative_error(static(), first) < 1e-5
    alone = inference.decoding(model, [k[1:] for k in keys], [v[1:] for v in values], token[1:])()
    assert relative_error(alone, first[1:]) < 1e-5
    assert relative_error(alone, first[:1]) > 0.1


@torch.inference_mode()
def test_the_compiled_step_is_the_same(model) -> None:
    """Through the tracer alone: the compiler's minutes belong to the benchmark, which compares its answer too."""
    keys, values = past(model)
    token = torch.tensor([5, 9])
    step = inference.static_decoding(model, keys, values, token, backend="eager", fullgraph=True)
    assert inference.compiling(step) > 0
    assert relative_error(step(), inference.decoding(model, keys, values, token)()) < 1e-5


@torch.inference_mode()
def test_int8_multiplies_in_int8_and_leaves_the_model_alone(model) -> None:
    keys, values = past(model)
    token = torch.tensor([5, 9])
    expected = inference.decoding(model, keys, values, token)()
    other = inference.dynamic_int8(model)
    kinds = {type(module).__module__ for module in other.model.language_model.layers[0].modules() if hasattr(module, "in_features")}
    assert all("quantized" in kind for kind in kinds) and "quantized" in type(other.lm_head).__module__
    error = relative_error(inference.decoding(other, keys, values, token)(), expected)
    assert 1e-4 < error < 0.1
    assert torch.equal(inference.decoding(model, keys, values, token)(), expected)


def test_bf16_units_are_those_of_the_processor() -> None:
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    assert inference.has_bf16_units() == ("avx512_bf16" in flags)


with_openvino = pytest.mark.skipif(not openvino.available(), reason="needs openvino")


@with_openvino
@torch.inference_mode()
def test_openvino_tower(model) -> None:
    x = pixels(model)
    expected = inference.tower(model, x)
    assert relative_error(openvino.tower(openvino.tower_graph(model), "f32")(x), expected) < 1e-5


@with_openvino
@torch.inference_mode()
def test_openvino_decoder(model) -> None:
    session = openvino.Session(model, openvino.decoder_graph(model), "f32")
    x = embeds(model)
    for _ in range(2):  # each from empty states
        assert relative_error(session.prefill(x), whole(model, x)) < 1e-5
    assert relative_error(session.rows(x[None, :1], T), whole(model, torch.cat([x, x[:1]]))) < 1e-5  # goes on from them

    keys, values = past(model)
    token = torch.tensor([5, 9])
    step = session.decoding(keys, values, token)
    assert relative_error(step(), inference.decoding(model, keys, values, token)()) < 1e-5


@pytest.mark.skipif(not openvino.available(compressed=True), reason="needs openvino and nncf")
@torch.inference_mode()
def test_openvino_int8(model) -> None:
    x = embeds(model)
    error = relative_error(openvino.Session(model, openvino.decoder_graph(model, "int8"), "f32").prefill(x), whole(model, x))
    assert 1e-4 < error < 0.1


# --- what the benchmarks make of them


def test_a_side_that_is_off_is_void_and_one_that_says_it_is_the_same_fails() -> None:
    one = torch.ones(3)
    sides = Sides(
        {SDPA: lambda: one, OURS: lambda: one * (1 + 1e-6)}, {"narrow": (lambda: one * 1.01, 0.1), "wrong": (lambda: one * 2, 0.1)}
    )
    calls, errors, void = compare(sides)
    assert list(calls) == [SDPA, OURS, "narrow"] and void == {"wrong": 0.1}
    assert errors == pytest.approx({SDPA: 0, OURS: 1e-6, "narrow": 0.01, "wrong": 1}, rel=0.1)
    sides.same["other"] = lambda: one * 1.01
    with pytest.raises(AssertionError, match="other is off by 0.01"):
        compare(sides)
    del sides.same["other"]
    sides.same[OURS] = lambda: one * 1.01
    with pytest.raises(AssertionError, match="llava_fast is off"):
        compare(sides)
    assert OURS in compare(sides, own_bound=0.02)[0]


def test_loading_tells_what_a_load_takes(tmp_path) -> None:
    checkpoint = make_checkpoint(tmp_path / "model")
    for side in loading.SIDES:
        found = loading.loaded(side, str(checkpoint))
        assert found.keys() == {"load_s", "peak_bytes", "kept_bytes"} and found["load_s"] > 0, side
    with pytest.raises(ValueError, match="a side is one of llava_fast, .*, got 'theirs'"):
        loading.loaded("theirs", str(checkpoint))
