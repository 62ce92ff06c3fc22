"""model.generate against transformers' generate, id for id, its padding included."""

from __future__ import annotations

import copy

import pytest
import torch
from padded import pad, pixels, rows_of
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import llava_fast as lf
from llava_fast.kernels.sampling import kept, penalised, sample

BATCHES = {
    "single": [[5, "image", 4]],
    "text only": [[9]],
    "one token": [[1]],
    "multi-image": [[3, "image", 2, "image", 2, "image", 6]],
    "image first": [["image", 8]],
    "image last": [[8, "image"]],
    "adjacent images": [[2, "image", "image", 3]],
    "batched": [[5, "image", 4], [2, "image", 9]],
    "mixed": [[3, "image", 5, "image", 4], [7, "image"], ["image", 6], [11], [1]],
}


def inputs_for(model, shapes, side="left"):
    rows, count = rows_of(shapes, model.config.patches, model.config.image_token_id)
    ids, mask = pad(rows, side, value=model.generation_config.pad_token_id)
    inputs = dict(input_ids=ids, attention_mask=mask)
    return {**inputs, "pixel_values": pixels(count)} if count else inputs


@pytest.mark.parametrize("name", BATCHES)
def test_greedy(directory, hf, name):
    model = lf.load(directory)
    inputs = inputs_for(model, BATCHES[name])
    theirs = hf.generate(**inputs, max_new_tokens=24, do_sample=False)
    ours = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


def test_rows_that_end_early_are_padded(directory, hf):
    """Stop at a token that one row of the batch produces before the others do."""
    model = lf.load(directory)
    inputs = inputs_for(model, BATCHES["mixed"])
    free = model.generate(**inputs, max_new_tokens=16, eos_token_id=None)
    new = free[:, inputs["input_ids"].shape[1] :]
    stop = next(t for row in new for t in row.tolist() if 0 < sum(t in other.tolist() for other in new) < len(new))
    for pad_id in (0, 7):
        settings = dict(max_new_tokens=16, eos_token_id=[stop, 383], pad_token_id=pad_id, do_sample=False)
        theirs = hf.generate(**inputs, **settings)
        assert (theirs == stop).any()
        assert torch.equal(model.generate(**inputs, **settings), theirs)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        dict(max_length=60),
        dict(max_new_tokens=6, min_new_tokens=6, eos_token_id=[2, 119, 24, 314]),
        dict(max_new_tokens=12, repetition_penalty=1.7),
        dict(max_new_tokens=5, num_return_sequences=1, use_cache=True, num_beams=1),
    ],
)
def test_settings(directory, hf, settings):
    model = lf.load(directory)
    inputs = inputs_for(model, [[4, "image", 5], [3, "image", 2]])
    theirs = hf.generate(**inputs, **{"do_sample": False, **settings})
    assert torch.equal(model.generate(**inputs, **settings), theirs)


def test_generation_config_of_the_call(directory, hf):
    model = lf.load(directory)
    inputs = inputs_for(model, BATCHES["single"])
    config = GenerationConfig(max_new_tokens=7, repetition_penalty=1.3, eos_token_id=2, pad_token_id=0)
    assert torch.equal(model.generate(**inputs, generation_config=config), hf.generate(**inputs, generation_config=copy.copy(config)))


def test_layers_of_generation_settings(directory, hf):
    """The call over its config over the checkpoint's: the stop token is the checkpoint's where nobody else names one."""
    model = lf.load(directory)
    inputs = inputs_for(model, BATCHES["single"])
    free = model.generate(**inputs, max_new_tokens=8, eos_token_id=[])[0].tolist()
    model.generation_config.eos_token_id = hf.generation_config.eos_token_id = free[-4]
    config = GenerationConfig(max_new_tokens=8)
    ours = model.generate(**inputs, generation_config=config)
    assert torch.equal(ours, hf.generate(**inputs, generation_config=copy.copy(config))) and ours.shape[1] < len(free)
    assert model.generate(**inputs, generation_config=config, max_new_tokens=1).shape[1] == len(free) - 7


@pytest.mark.parametrize("fields", [dict(num_beams=4), dict(no_repeat_ngram_size=2), dict(penalty_alpha=0.5, top_k=4)])
def test_what_a_generation_config_may_not_ask(checkpoints, fields):
    model = lf.load(checkpoints["qwen"])
    with pytest.raises(ValueError, match=next(iter(fields))):
        model.generate(torch.tensor([[5]]), generation_config=GenerationConfig(**fields))
    model.generation_config = GenerationConfig(**fields)
    with pytest.raises(ValueError, match=next(iter(fields))):
        model.generate(torch.tensor([[5]]))


def test_embeddings_with_a_penalty(checkpoints):
    model = lf.load(checkpoints["qwen_untied"])
    embeds = model.language_model.embed_tokens(torch.tensor([[5, 6]]))
    assert model.generate(inputs_embeds=embeds, max_new_tokens=5, repetition_penalty=1.3, eos_token_id=torch.tensor([2])).shape == (1, 5)
    with pytest.raises(ValueError, match="give pixel_values with input_ids"):
        model(inputs_embeds=embeds, pixel_values=pixels(1))


def test_processor_outputs_are_accepted_as_they_come(directory, hf, processor):
    import numpy as np
    from PIL import Image

    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8))
    processor.tokenizer.padding_side = "left"
    inputs = processor(
        images=[picture] * 3, text=["<image>What?", "Look: <image><image> and <image"[:22]], return_tensors="pt", padding=True
    )
    model = lf.load(directory)
    assert torch.equal(model.generate(**inputs, max_new_tokens=9), hf.generate(**inputs, max_new_tokens=9, do_sample=False))


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(num_beams=4), "takes num_beams=1 only"),
        (dict(penalty_alpha=0.6), "does not implement penalty_alpha"),
        (dict(max_new_tokens=0), "max_new_tokens must be a positive integer, got 0"),
        (dict(do_sample=True, temperature=float("nan")), "temperature must be a finite number >= 0, got nan"),
        (dict(max_length=3), "max_length is 3"),
    ],
)
def test_bad_settings(checkpoints, settings, message):
    model = lf.load(checkpoints["qwen"])
    with pytest.raises(ValueError, match=message):
        model.generate(torch.tensor([[5, 6, 7, 8]]), **settings)


def test_bad_inputs(checkpoints):
    model = lf.load(checkpoints["qwen"])
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model.generate(max_new_tokens=3)
    with pytest.raises(ValueError, match=r"attention_mask must be \[1, 2\]"):
        model.generate(torch.tensor([[5, 6]]), attention_mask=torch.ones(1, 3), max_new_tokens=3)
    with pytest.raises(ValueError, match="input_ids must be from 0 to 383, got 4000"):
        model.generate(torch.tensor([[5, 4000]]), max_new_tokens=3)
    with pytest.raises(ValueError, match=r"rows \[1\] of attention_mask are all padding"):
        model.generate(torch.tensor([[5], [6]]), attention_mask=torch.tensor([[1], [0]]), max_new_tokens=3)
    for ids in (torch.tensor([5, 6]), torch.zeros(0, 3, dtype=torch.long), torch.zeros(1, 0, dtype=torch.long)):
        with pytest.raises(ValueError, match="none of them empty"):
            model.generate(ids, max_new_tokens=3)
    with pytest.raises(ValueError, match="labels must be -100 or from 0 to 383, got 384"):
        model(torch.tensor([[5, 6]]), labels=torch.tensor([[5, 384]]))
    with pytest.raises(ValueError, match="generation_config must be a transformers GenerationConfig, got dict"):
        model.generate(torch.tensor([[5]]), generation_config={"max_new_tokens": 3})
    with pytest.raises(ValueError, match="2048 tokens, which leaves none of the context's 2048"):
        model.generate(torch.full((1, 2048), 5), max_new_tokens=3)


def test_the_context_ends_a_sequence(checkpoints):
    model = lf.load(checkpoints["qwen"])
    assert model.generate(torch.full((1, 2045), 5), max_new_tokens=50, eos_token_id=[]).shape == (1, 2048)


def test_seeded_samples(checkpoints):
    model = lf.load(checkpoints["qwen_untied"])
    ids = torch.tensor([[5, 6, 7]])
    draw = dict(do_sample=True, temperature=2.0, max_new_tokens=10, eos_token_id=[], num_return_sequences=3)
    a, b, c = (model.generate(ids, **draw, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c) and len({tuple(row) for row in a.tolist()}) == 3


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "settings",
    [
        dict(temperature=0.7),
        dict(temperature=1.0, top_k=5),
        dict(temperature=1.5, top_p=0.6),
        dict(temperature=0.9, min_p=0.2),
        dict(temperature=0.8, top_k=20, top_p=0.9, min_p=0.05),
        dict(temperature=1.0, top_p=1e-6),
    ],
)
def test_warped_logits_are_those_of_transformers(seed, settings):
    params = lf.SamplingParams(**settings)
    logits = torch.randn(1, 300, generator=torch.Generator().manual_seed(seed)) * 3
    chain = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
    if params.top_k:
        chain.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        chain.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        chain.append(MinPLogitsWarper(params.min_p))
    row = [torch.tensor([value]) for value in (params.top_k, params.top_p, params.min_p)]
    assert torch.equal(kept(logits / params.temperature, *row), chain(torch.tensor([[1]]), logits))


def test_repetition_penalty_is_that_of_transformers():
    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(0))
    seen = torch.tensor([[3, 3, 7, 11]])
    expected = RepetitionPenaltyLogitsProcessor(1.4)(seen, logits.clone())
    assert torch.equal(penalised(logits, torch.tensor([1.4]), None, None, seen[0].bincount(minlength=50).int()[None]), expected)


def test_samples_follow_the_distribution():
    logits = torch.tensor([[0.0, 1.0, 2.0, -torch.inf]])
    steps = torch.arange(4000)
    drawn = sample(logits.expand(4000, -1).contiguous(), temperature=torch.ones(4000), seeds=torch.zeros_like(steps), steps=steps)
    counts = drawn.bincount(minlength=4)
    assert (counts / 4000 - logits[0].softmax(-1)).abs().max() < 0.03
