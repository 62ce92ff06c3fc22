"""Records through transformers' own Qwen2 tokenizer class (its pre-tokenizer, normaliser and added tokens), trained on a few words: the
released vocabulary is the same class with more merges."""

from __future__ import annotations

import dataclasses
import json

import pytest
import tiny
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer

import llava_fast as lf
from llava_fast.inputs.templates import INTERLEAVE_CHAT_TEMPLATE
from llava_fast.training.config import TrainConfig
from llava_fast.training.dataset import index_records

ANSWER = "It's 1234 cafe\u0301s,\n\n  and {x} \U0001f600!"  # digits one by one, a contraction, NFC, newlines, an emoji


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    directory = tiny.make_checkpoint(tmp_path_factory.mktemp("model") / "model", "qwen", text={"vocab_size": 512})
    core = Tokenizer(models.BPE())
    core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(tiny.TEXTS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False))
    trained = json.loads(core.to_str())["model"]
    special = ["<|im_start|>", "<|im_end|>", "<image>"]
    tokenizer = Qwen2Tokenizer(
        vocab=trained["vocab"], merges=[tuple(pair) for pair in trained["merges"]], eos_token="<|im_end|>", extra_special_tokens=special
    )
    tokenizer.chat_template = INTERLEAVE_CHAT_TEMPLATE
    tokenizer.save_pretrained(directory)
    config = json.loads((directory / "config.json").read_text())
    config["image_token_id"] = config["image_token_index"] = tokenizer.convert_tokens_to_ids("<image>")
    (directory / "config.json").write_text(json.dumps(config))
    loaded = Qwen2Tokenizer.from_pretrained(directory)
    spec = lf.load(directory).input_spec  # whose class is the one of every tokenizer.json
    assert spec.tokenizer(ANSWER)["input_ids"] == loaded(ANSWER)["input_ids"]
    return dataclasses.replace(spec, tokenizer=loaded)


@pytest.mark.parametrize("template", ["hf", "qwen_1_5"])
def test_ids_and_labels_are_those_of_the_tokenizer(spec, tmp_path, template):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    turns = ["From <image> to <image>: what's 42?", ANSWER, "And 7?", "No."]
    conversation = [{"from": role, "value": text} for role, text in zip(["human", "gpt"] * 2, turns, strict=True)]
    (tmp_path / "data.json").write_text(json.dumps([{"image": ["a.png"] * 2, "conversations": conversation}]))
    config = TrainConfig("m", str(tmp_path / "data.json"), str(tmp_path / "out"), template=template, progress=False)
    data = index_records(config, spec)
    ids, labels = data.records.ids_and_labels(0)
    tokenizer = spec.tokenizer
    if template == "hf":
        image, texts = {"type": "image"}, [{"type": "text", "text": text} for text in ("From ", " to ", ": what's 42?")]
        asked = [texts[0], image, texts[1], image, texts[2]]
        messages = [{"role": "user", "content": asked}]
        wanted = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        prompt = tokenizer(wanted)["input_ids"]
        assert ids[: len(prompt)].tolist() == prompt and (labels[: len(prompt)] == -100).all()
        # As written to be read back: composed accents, and everything else as it was.
        answers = [tokenizer(text + "<|im_end|>")["input_ids"] for text in (ANSWER, "No.")]
        assert labels[labels != -100].tolist() == sum(answers, [])
    else:
        said = [("system", "You are a helpful assistant."), *zip(["user", "assistant"] * 2, turns, strict=True)]
        pieces = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in said).split("<image>")
        image = [spec.image_token_id]
        chunks = [tokenizer(piece)["input_ids"] for piece in pieces]
        assert ids.tolist() == chunks[0] + image + chunks[1] + image + chunks[2]
        answer = tokenizer(f"<|im_start|>assistant\n{ANSWER}<|im_end|>\n")["input_ids"]
        assert any(labels[i : i + len(answer)].tolist() == answer for i in range(len(labels)))
    assert "caf\u00e9s" in tokenizer.decode(ids) and len(data.load(0).sequences[0]) == data.tokens[0]
