"""The true 0.5b architecture with random weights, on two photographs, against transformers."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

import llava_fast as lf
from bench.first_token import messages, photographs
from bench.full_size import make_full_size
from llava_fast.inputs.images import open_image


@pytest.mark.slow
def test_05b_logits(tmp_path):
    path = make_full_size(tmp_path / "model")
    processor = AutoProcessor.from_pretrained(path)
    text = processor.apply_chat_template(messages(), add_generation_prompt=True)
    inputs = processor(images=[open_image(p) for p in photographs()], text=text, return_tensors="pt")

    model = lf.load(path, device="cpu")
    assert (
        model.stored_dtype == torch.bfloat16
        and sum(p.numel() for p in model.parameters()) + sum(t.numel() for t in model.carried.values()) == 864_031_264
    )
    with torch.inference_mode():
        ours = model(**inputs).logits
    first = lf.generate(model, messages(), max_new_tokens=1).token_ids
    del model
    hf = LlavaForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()
    with torch.inference_mode():
        theirs = hf(**inputs).logits
    assert theirs.shape[1] > 2 * 729
    error = (ours - theirs).abs().max() / theirs.abs().max()
    assert error < 1e-4, f"off by {error:.2g} of the largest logit"
    assert first == [theirs[0, -1].argmax().item()]
