"""Against released weights; needs the network: `make test-online`.

The case is transformers' test_generation_siglip_backbone: two cats (COCO 39769), 30 greedy tokens. Its expected text is for fp16 on
one GPU and differs between backends, so both sides run here, in fp32.
"""

from __future__ import annotations

import os
import urllib.request

import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

import llava_fast as lf
from llava_fast.inputs.images import open_image

MODEL = os.environ.get("LLAVA_FAST_ONLINE_MODEL", "llava-hf/llava-interleave-qwen-0.5b-hf")
PICTURE = os.environ.get("LLAVA_FAST_ONLINE_PICTURE", "http://images.cocodataset.org/val2017/000000039769.jpg")
PROMPT = "<|im_start|>user\n<image>\nWhat are these?<|im_end|>\n<|im_start|>assistant"


@pytest.mark.online
def test_released_checkpoint():
    if PICTURE.startswith("http"):
        with urllib.request.urlopen(PICTURE, timeout=60) as response:
            image = open_image(response.read())
    else:
        image = open_image(PICTURE)
    model = lf.load(MODEL, device="cpu")
    hf = LlavaForConditionalGeneration.from_pretrained(MODEL, dtype=torch.float32).eval()
    inputs = AutoProcessor.from_pretrained(MODEL)(images=image, text=PROMPT, return_tensors="pt")
    with torch.inference_mode():
        ours, theirs = model(**inputs).logits, hf(**inputs).logits
        expected = hf.generate(**inputs, max_new_tokens=30, do_sample=False)
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()
    assert torch.equal(model.generate(**inputs, max_new_tokens=30, do_sample=False), expected)
    completion = lf.generate(model, lf.Request(PROMPT, images=[image]), max_new_tokens=30)
    new = expected[0, inputs["input_ids"].shape[1] :].tolist()
    assert completion.token_ids == new
    if "LLAVA_FAST_ONLINE_MODEL" not in os.environ:
        assert "cats" in completion.text
