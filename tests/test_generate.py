"""lf.generate: requests of every form against transformers' processor and generate; streaming, stops, seeds, errors."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

import llava_fast as lf
from llava_fast.engine.engine import ANY_ROWS
from llava_fast.engine.text import TextStream


def picture(seed: int, size=(64, 48)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))


def reference(hf, processor, prompt: str, images: list, new: int) -> list[int]:
    """The new ids of transformers for one prompt with marks."""
    inputs = processor(images=images or None, text=prompt, return_tensors="pt")
    return hf.generate(**inputs, max_new_tokens=new, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()


def test_strings_with_marks(directory, hf, processor):
    model = lf.load(directory)
    cases = [("What are these?", []), ("<image>\nWhat?", [picture(0)]), ("A <image> and <image>, then?", [picture(1), picture(2)])]
    expected = [reference(hf, processor, prompt, images, 16) for prompt, images in cases]
    completions = lf.generate(model, [lf.Request(p, images=i) for p, i in cases], max_new_tokens=16)
    assert [c.token_ids for c in completions] == expected
    for completion, (prompt, images) in zip(completions, cases, strict=True):
        inputs = processor(images=images or None, text=prompt, return_tensors="pt")
        assert completion.prompt_tokens == inputs["input_ids"].shape[1]
        assert completion.visual_tokens == len(images) * model.config.patches
        assert completion.text == processor.tokenizer.decode(completion.token_ids, skip_special_tokens=True)
        assert set(completion.timings) == {"preprocess", "first_token", "total"}


@pytest.mark.parametrize("kind", ["qwen", "qwen_untied"])
def test_messages(directory, hf, processor):
    model = lf.load(directory)
    message = [{"role": "user", "content": [{"type": "image", "image": picture(0)}, {"type": "text", "text": "What is it?"}]}]
    rendered = "<|im_start|>user\n<image>\nWhat is it?<|im_end|>\n<|im_start|>assistant\n"
    assert lf.generate(model, message, max_new_tokens=8).token_ids == reference(hf, processor, rendered, [picture(0)], 8)


def test_every_way_to_give_a_picture(checkpoints, tmp_path):
    model = lf.load(checkpoints["qwen"])
    image = picture(3)
    image.save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    forms = [image, tmp_path / "a.png", str(tmp_path / "a.png"), data, url]
    answers = lf.generate(model, [lf.Request("<image> What?", images=[form]) for form in forms], max_new_tokens=8)
    assert len({tuple(a.token_ids) for a in answers}) == 1 and answers[0].finish_reason in ("stop", "length")


def test_one_request_or_many(checkpoints):
    model = lf.load(checkpoints["qwen"])
    one = lf.generate(model, "What?", max_new_tokens=4)
    many = lf.generate(model, ["What?", "No?"], max_new_tokens=4)
    assert isinstance(one, lf.Completion) and [type(c) for c in many] == [lf.Completion] * 2
    assert many[0].token_ids == one.token_ids
    assert lf.generate(str(checkpoints["qwen"]), "What?", max_new_tokens=4).token_ids == one.token_ids
    assert lf.generate(model, [], max_new_tokens=4) == []


def test_streams_say_what_completions_say(checkpoints):
    model = lf.load(checkpoints["qwen_untied"])
    requests = [lf.Request("What <image>?", images=[picture(0)]), lf.Request("Look"), lf.Request("a" * 40)]
    settings = dict(max_new_tokens=30, temperature=1.5, seed=5)
    completions = lf.generate(model, requests, **settings)
    texts, ends = ["", "", ""], {}
    for index, delta, finish in lf.generate(model, requests, stream=True, **settings):
        texts[index] += delta
        assert index not in ends
        if finish:
            ends[index] = finish
    assert texts == [c.text for c in completions]
    assert ends == {i: c.finish_reason for i, c in enumerate(completions)}


def test_only_who_reads_along_has_a_bound_between_tokens(checkpoints, tmp_path, monkeypatch):
    """Whole answers are wanted soon: no step is kept short for the sake of the tokens of others."""
    model, bounds, made = lf.load(checkpoints["qwen_untied"]), [], lf.Engine
    monkeypatch.setattr(
        "llava_fast.engine.generate.Engine", lambda *given, **options: bounds.append(engine := made(*given, **options)) or engine
    )
    lf.generate(model, "What?", max_new_tokens=1)
    lf.generate(model, ["What?"], max_new_tokens=1, out=tmp_path / "answers.jsonl")
    list(lf.generate(model, "What?", max_new_tokens=1, stream=True))
    monkeypatch.setattr("llava_fast.engine.dropin.Engine", lf.engine.generate.Engine)
    model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=1)
    assert [engine._core.scheduler.max_mixed_rows for engine in bounds] == [ANY_ROWS, ANY_ROWS, 768, ANY_ROWS]


def test_stop_strings(checkpoints):
    model = lf.load(checkpoints["qwen_untied"])
    settings = dict(max_new_tokens=40, temperature=1.5, seed=3)
    free = lf.generate(model, "What?", **settings)
    stop = free.text[7:10]
    cut = lf.generate(model, "What?", stop=stop, **settings)
    assert cut.text == free.text[: free.text.index(stop)] and cut.finish_reason == "stop"
    assert len(cut.token_ids) < len(free.token_ids)
    assert "".join(delta for _, delta, _ in lf.generate(model, "What?", stop=[stop, "never"], stream=True, **settings)) == cut.text


def test_samples_share_their_prompt(checkpoints):
    model = lf.load(checkpoints["qwen_untied"])
    request = lf.Request("What <image>?", images=[picture(0)])
    several = lf.generate(model, request, n=3, temperature=1.2, seed=9, max_new_tokens=12)
    assert [c.index for c in several] == [0, 1, 2] and len({c.text for c in several}) == 3
    alone = lf.generate(model, request, temperature=1.2, seed=9, max_new_tokens=12)
    assert several[0].token_ids == alone.token_ids
    with pytest.raises(ValueError, match="stream=True takes n=1, but request 0 asks for n=3"):
        lf.generate(model, request, n=3, stream=True)


def test_neighbours_change_nothing(checkpoints):
    """fp64, so that the order of sums cannot flip a draw: each request's tokens, alone and among others."""
    model = lf.load(checkpoints["qwen_untied"], dtype=torch.float64)
    requests = [
        lf.Request(
            "<image>" * (i % 3) + "What are these?"[: 3 + i],
            images=[picture(i * 7 + k) for k in range(i % 3)],
            sampling=lf.SamplingParams(max_new_tokens=5 + i, temperature=[0.0, 0.9, 1.4][i % 3], seed=i, top_k=[0, 0, 20][i % 3]),
        )
        for i in range(9)
    ]
    together = lf.generate(model, requests)
    for request, completion in zip(requests, together, strict=True):
        assert lf.generate(model, request).token_ids == completion.token_ids


@pytest.mark.parametrize(
    "item, message",
    [
        (7, "expected a string, a list of chat messages or a Request, got int"),
        (None, "got NoneType"),
        ([{"content": "no role"}], "role"),
        ([{"role": "user", "content": "half a pair \ud800"}], "half a surrogate pair at character 12"),
        ("\ud800", "half a surrogate pair"),
    ],
)
def test_items_that_are_no_requests(checkpoints, item, message):
    model = lf.load(checkpoints["qwen"])
    first, bad, last = lf.generate(model, ["Hi", item, "Ho"], max_new_tokens=2)
    assert bad.finish_reason == "error" and message in bad.error and "object at 0x" not in bad.error
    assert first.token_ids and last.token_ids and [c.request for c in (first, bad, last)] == [0, 1, 2]


def test_whose_each_completion_is(checkpoints):
    model = lf.load(checkpoints["qwen_untied"])
    flat = lf.generate(model, ["Hi", "", "Ho"], n=2, temperature=1.0, max_new_tokens=2)
    assert [(c.request, c.index, c.finish_reason == "error") for c in flat] == [
        (0, 0, False),
        (0, 1, False),
        (1, 0, True),
        (2, 0, False),
        (2, 1, False),
    ]


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(images=Image.new("RGB", (2, 2))), "images must be a list of images, got Image"),
        (dict(images="photo.jpg"), "images must be a list of images, got 'photo.jpg'"),
        (dict(videos=None), "videos must be a list of videos, got None"),
        (dict(sampling={}), "sampling must be SamplingParams or None, got dict"),
        (dict(priority=None), "priority must be an integer, got None"),
        (dict(deadline="1"), "deadline must be a finite number of seconds or None, got '1'"),
        (dict(prompt=3), "prompt must be a string or a list of chat messages, got 3"),
    ],
)
def test_requests_are_checked_when_made(fields, message):
    with pytest.raises(ValueError, match=message):
        lf.Request(**{"prompt": "What?", **fields})


def test_strings_and_none_where_several_strings_are_meant():
    assert lf.SamplingParams(stop="x").stop == ("x",) and lf.SamplingParams(stop=None).stop == ()
    assert lf.InputOptions(allowed_media_hosts="example.com").allowed_media_hosts == ("example.com",)
    with pytest.raises(ValueError, match="temperature must be a finite number >= 0, got object"):
        lf.SamplingParams(temperature=object())


def test_logprobs(checkpoints):
    model = lf.load(checkpoints["qwen_untied"], dtype=torch.float64)
    completion = lf.generate(model, "What are these?", max_new_tokens=6, logprobs=True)
    ids = model.tokenizer("What are these?").input_ids
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids + completion.token_ids])).logits[0]
    expected = logits.log_softmax(-1)[len(ids) - 1 : -1].gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
    assert torch.allclose(torch.tensor(completion.logprobs, dtype=torch.float64), expected, atol=1e-9)
    assert lf.generate(model, "What?", max_new_tokens=2).logprobs is None


BAD = {
    "more pictures than marks": (lf.Request("<image>What?", images=[picture(0), picture(1)]), "1 .*mark.* 2"),
    "fewer pictures than marks": (lf.Request("<image><image>What?", images=[picture(0)]), "2 .*mark.* 1"),
    "empty prompt": (lf.Request(""), "empty"),
    "past the context": (lf.Request("What? " * 3000), "2048"),
    "truncated JPEG": (lf.Request("<image>", images=["cut.jpg"]), "cut.jpg"),
    "text called png": (lf.Request("<image>", images=["text.png"]), "text.png"),
    "missing file": (lf.Request("<image>", images=["absent.png"]), "absent.png"),
    "zero-byte video": (lf.Request("<video>", videos=["zero.mp4"]), "zero.mp4"),
}


@pytest.fixture
def bad_files(tmp_path, monkeypatch):
    buffer = io.BytesIO()
    picture(0, (300, 300)).save(buffer, "JPEG")
    (tmp_path / "cut.jpg").write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    (tmp_path / "text.png").write_text("this is no picture")
    (tmp_path / "zero.mp4").write_bytes(b"")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", BAD)
def test_bad_requests(checkpoints, bad_files, monkeypatch, name):
    """Alone it raises before the model runs; among others it comes back as an error and they are served."""
    request, message = BAD[name]
    model = lf.load(checkpoints["qwen"])
    good = lf.Request("<image>What?", images=[picture(5)])
    expected = lf.generate(model, good, max_new_tokens=5).token_ids
    first, bad, last = lf.generate(model, [good, request, good], max_new_tokens=5)
    assert first.token_ids == last.token_ids == expected
    assert bad.finish_reason == "error" and bad.error.startswith("request 1: ") and bad.token_ids == []
    assert "object at 0x" not in bad.error
    monkeypatch.setattr(type(model), "hidden", None)
    with pytest.raises(ValueError, match=message):
        lf.generate(model, request, max_new_tokens=5)


@pytest.mark.parametrize("size", [(1, 1), (20_000, 3), (3, 2000)])
def test_pictures_of_odd_shapes(directory, hf, processor, size):
    model = lf.load(directory)
    answer = lf.generate(model, lf.Request("<image>What?", images=[picture(1, size)]), max_new_tokens=4)
    assert answer.token_ids == reference(hf, processor, "<image>What?", [picture(1, size)], 4)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(temperature=float("nan")), "temperature must be a finite number >= 0, got nan"),
        (dict(temprature=1.0), "no option 'temprature'; did you mean 'temperature'"),
        (dict(top_p=0.0), r"top_p must be in \(0, 1\], got 0.0"),
        (dict(n=0), "n must be a positive integer, got 0"),
        (dict(min_new_tokens=9, max_new_tokens=3), "min_new_tokens must be an integer from 0 to max_new_tokens"),
        (dict(stop=[""]), "stop must be non-empty strings"),
        (dict(tokenisation="vicuna"), "tokenisation must be hf, eval, train or demo, got 'vicuna'"),
        (dict(pool="mean"), "pool must be average, bilinear, max or None, got 'mean'"),
    ],
)
def test_bad_options(checkpoints, settings, message):
    model = lf.load(checkpoints["qwen"])
    with pytest.raises(ValueError, match=message):
        lf.generate(model, "What?", **settings)
    with pytest.raises(ValueError, match="requests must be a string"):
        lf.generate(model, 7)


@pytest.mark.parametrize("text", ["plain words, more of them", "日本語 and émigré ☕🙂 mixed", "tabs\tand\nnewlines  double"])
def test_text_streams_decode_as_the_tokenizer_does(checkpoints, text):
    tokenizer = AutoTokenizer.from_pretrained(checkpoints["qwen"])
    ids = tokenizer(text).input_ids
    stream = TextStream(tokenizer)
    deltas = [stream.push(token) for token in ids]
    assert "".join(deltas) + stream.finish() == text == stream.text
    assert not any("\ufffd" in delta for delta in deltas)
    assert len(ids) > len([d for d in deltas if d]) or text.isascii()


@pytest.mark.parametrize(
    "stop, expected", [("STOP", "abcS ST "), ("ST", "abcS "), ("abc", ""), ("zzz", "abcS ST STOP def"), ("def!", "abcS ST STOP def")]
)
def test_stop_strings_across_tokens(checkpoints, stop, expected):
    tokenizer = AutoTokenizer.from_pretrained(checkpoints["qwen"])
    stream = TextStream(tokenizer, (stop,))
    for token in tokenizer("abcS ST STOP def").input_ids:
        stream.push(token)
        assert expected.startswith(stream.text)
    stream.finish()
    assert stream.text == expected and stream.stopped == (stop in "abcS ST STOP def")
