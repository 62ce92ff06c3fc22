"""Requests to samples and views, against transformers' LlavaProcessor on the same checkpoint directory."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import skimage
import sklearn.datasets
import torch
from PIL import Image
from transformers import LlavaProcessor

from llava_fast.batch import NEWLINE
from llava_fast.inputs.images import CLIP_MEAN, CLIP_STD, HALF, open_image
from llava_fast.inputs.prepare import InputSpec, Prepared, prepare, read_chat_template
from llava_fast.inputs.templates import VICUNA_SYSTEM
from llava_fast.kernels.patchify import normalise
from llava_fast.requests import InputOptions, Request

CHINA = Path(sklearn.datasets.__file__).parent / "images" / "china.jpg"
COFFEE = Path(skimage.__file__).parent / "data" / "coffee.png"
GRID, TILE = 3, 42  # of tests/tiny.py


@pytest.fixture(scope="session")
def specs(checkpoints) -> dict[str, InputSpec]:
    made = {}
    for kind, path in checkpoints.items():
        config = json.loads((path / "config.json").read_text())
        image = config.get("image_token_index", config.get("image_token_id"))
        made[kind] = InputSpec.from_dir(path, image, GRID, TILE, 2048, has_newline=True)
    return made


@pytest.fixture
def qwen(specs) -> InputSpec:
    return specs["qwen"]


def run(spec: InputSpec, prompt, images=(), videos=(), **options) -> Prepared:
    return prepare(Request(prompt, list(images), list(videos)), InputOptions(**options), spec)


def user(*items):
    return [{"role": "user", "content": [{"type": "text", "text": i} if isinstance(i, str) else i for i in items]}]


def picture(source=CHINA):
    return {"type": "image", "image": source}


def frames(count: int, size=(30, 20)) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)) for _ in range(count)]


PROMPTS = {
    "string": ("<image>\nWhat are these?", [CHINA]),
    "two": ("<image>\n<image>\nWhich picture is the odd one?", [CHINA, COFFEE]),
    "text": ("What are these?", []),
    "messages": (user(picture(), picture(COFFEE), "Describe the picture."), []),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_rows_and_pixels_are_those_of_llava_processor(name, kind, directory, specs):
    prompt, images = PROMPTS[name]
    spec = specs[kind]
    got = run(spec, prompt, images)
    processor = LlavaProcessor.from_pretrained(directory)
    if not isinstance(prompt, str):
        images = [item["image"] for item in prompt[0]["content"] if item["type"] == "image"]
        # The tiny Llama has no chat template, as the original LLaVA-1.5: Vicuna's form is used.
        prompt = (
            f"{VICUNA_SYSTEM} USER: <image><image>\nDescribe the picture. ASSISTANT:"
            if kind == "llama"
            else processor.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        )
    want = processor(text=prompt, images=[open_image(image) for image in images] or None, return_tensors="pt")
    ids = want["input_ids"][0].numpy()
    assert np.array_equal(got.sample.token_ids, np.where(ids == spec.image_token_id, 0, ids))
    rows = [row for start, v in zip(got.sample.starts, got.sample.visuals, strict=True) for row in range(start, start + v.tokens)]
    assert rows == np.flatnonzero(ids == spec.image_token_id).tolist()
    if images:
        mean, std = (CLIP_MEAN, CLIP_STD) if kind == "llama" else (HALF, HALF)
        assert torch.equal(normalise(got.views, mean, std), want["pixel_values"])
    else:
        assert got.views is None and got.sample.visuals == ()


def test_what_is_prepared(qwen):
    got = run(qwen, "<image><image> odd", [CHINA, COFFEE])
    assert got.views.dtype == torch.uint8 and got.views.shape == (2, 3, TILE, TILE)
    assert got.prompt_ids.count(qwen.image_token_id) == 2 and len(got.sample) == len(got.prompt_ids) - 2 + 2 * GRID**2
    assert [visual.tokens for visual in got.sample.visuals] == [9, 9] and got.sample.starts == (0, 9)
    assert set(got.timings) == {"media", "text", "total"} and got.timings["total"] >= got.timings["media"] > 0


def test_the_requests_own_inputs_win(qwen):
    request = Request("What?", inputs=InputOptions(tokenisation="eval"))
    assert prepare(request, InputOptions(), qwen).prompt_ids == run(qwen, "What?", tokenisation="eval").prompt_ids
    assert prepare(request, InputOptions(), qwen).prompt_ids != run(qwen, "What?").prompt_ids


def test_pad(qwen):
    squashed, padded = (run(qwen, "<image>", [COFFEE], image_aspect=aspect).views for aspect in ("squash", "pad"))
    assert not torch.equal(squashed, padded)
    assert (padded[0, :, 0] == 127).all() and (padded[0, :, -1] == 127).all()  # 600x400: grey above and below


# --- anyres ---


def test_anyres_is_for_a_single_picture_and_off_by_default(qwen):
    assert run(qwen, "<image>", [COFFEE]).views.shape[0] == 1
    got = run(qwen, "<image>", [COFFEE], anyres=True)
    assert got.views.shape == (1 + 2 * 2, 3, TILE, TILE) and got.sample.visual_tokens == 5 * 9  # 600x400 fits 2x2 tiles; flat
    assert torch.equal(got.views, qwen.image_processor.tiles(open_image(COFFEE), [(w * TILE, h * TILE) for w, h in ((1, 2), (2, 2))]))
    assert run(qwen, "<image><image>", [COFFEE, COFFEE], anyres=True).views.shape[0] == 2
    assert run(qwen, "<video>", [], [frames(1)], anyres=True).views.shape[0] == 1
    assert run(qwen, "<image><video>", [COFFEE], [frames(2)], anyres=True).views.shape[0] == 3


def test_the_checkpoints_options_turn_anyres_on(qwen):
    options = {"image_aspect_ratio": "anyres_max_2", "mm_patch_merge_type": "spatial_unpad", "image_grid_pinpoints": "(1x1),...,(6x6)"}
    spec = qwen.with_options(options)
    assert spec.anyres and spec.max_tiles == 2 and len(spec.pinpoints) == 36
    got = run(spec, "<image>", [COFFEE])
    (visual,) = got.sample.visuals
    assert visual.views == got.views.shape[0] > 5 and visual.resamples[0].mode == "bilinear" and NEWLINE in visual.source
    assert run(spec, "<image>", [COFFEE], anyres=False).sample.visual_tokens == 10  # a view and the newline that unpad adds
    assert run(spec, "<image><image>", [COFFEE] * 2).sample.visual_tokens == 20


def test_pad_in_the_options_changes_nothing(qwen):
    spec = qwen.with_options({"image_aspect_ratio": "pad", "mm_patch_merge_type": "flat", "mm_projector_type": "mlp2x_gelu"})
    assert spec == qwen


# --- video ---


def test_frames_are_pictures_where_they_are_not_pooled(qwen):
    clip = frames(5)
    video, images = run(qwen, "<video> what", [], [clip]), run(qwen, "<image>" * 5 + " what", clip)
    assert np.array_equal(video.sample.token_ids, images.sample.token_ids) and torch.equal(video.views, images.views)
    assert video.sample.visual_tokens == 5 * 9
    message = run(qwen, user({"type": "video", "video": clip, "num_frames": 3}, "what"))
    assert torch.equal(message.views, video.views[[0, 2, 4]])
    options = run(qwen, user({"type": "video", "video": clip}, "what"), num_frames=2)
    assert torch.equal(options.views, video.views[[0, 4]])
    assert run(qwen, user({"type": "video", "video": clip, "num_frames": 3}, "what"), fps=2.0).views.shape[0] == 3


def test_an_upper_bound_of_frames(qwen, tmp_path):
    """Of 9 frames taken at 2 a second: by rate up to the bound, uniform past it or where asked for."""
    for number, frame in enumerate(frames(9)):
        frame.save(tmp_path / f"{number}.png")
    every = run(qwen, "<video>", videos=[str(tmp_path)], fps=2.0).views
    assert every.shape[0] == 9

    def taken(source, **options):
        views = run(qwen, "<video>", videos=[source], **options).views
        return [next(i for i in range(9) if torch.equal(view, every[i])) for view in views]

    folder = str(tmp_path)
    assert taken(folder, fps=1.0, frames_upbound=5) == taken(folder, frames_upbound=5) == [0, 2, 4, 6, 8]
    assert taken(folder, fps=2.0, frames_upbound=3) == [0, 4, 8]
    assert taken(folder, fps=1.0, frames_upbound=7, force_sample=True) == np.linspace(0, 8, 7, dtype=int).tolist()
    assert taken(folder, num_frames=2, frames_upbound=5) == [0, 8]
    assert taken({"video": folder, "num_frames": 3}, frames_upbound=2) == [0, 4, 8]
    assert taken(frames(9), frames_upbound=9) == list(range(9)) and taken(frames(9), frames_upbound=2) == [0, 8]


def test_frames_asked_for_twice(qwen):
    clip = frames(2)
    got = run(qwen, "<video>", [], [clip], num_frames=4)
    want = run(qwen, "<video>", [], [clip]).views
    assert torch.equal(got.views, want[[0, 0, 0, 1]])


@pytest.mark.parametrize(("pool", "tokens"), [("average", 1), ("max", 1), ("bilinear", 4)])
def test_pooling_is_for_videos(qwen, pool, tokens):
    got = run(qwen, "<image><video>", [COFFEE], [frames(3)], pool=pool)
    assert [visual.tokens for visual in got.sample.visuals] == [9, 3 * tokens] and got.views.shape[0] == 4
    assert got.sample.visuals[1].resamples[0].mode == pool


@pytest.mark.parametrize(("position", "tokens"), [("grid", 3 * 2 * 3), ("frame", 3 * 5), ("one_token", 13), ("no_token", 12), (None, 13)])
def test_newlines_of_a_pooled_video(qwen, position, tokens):
    options = {"mm_patch_merge_type": "spatial_unpad", "mm_spatial_pool_mode": "bilinear", "mm_newline_position": position}
    spec = qwen.with_options(options)
    assert run(spec, "<video>", [], [frames(3)]).sample.visual_tokens == tokens


def test_one_newline_needs_unpad(qwen):
    spec = qwen.with_options({"mm_patch_merge_type": "spatial", "mm_spatial_pool_mode": "bilinear"})
    assert run(spec, "<video>", [], [frames(3)]).sample.visual_tokens == 12
    flat = qwen.with_options({"mm_spatial_pool_mode": "bilinear", "mm_newline_position": "grid"})
    assert run(flat, "<video>", [], [frames(3)]).sample.visual_tokens == 12


# --- a class row ---


def test_views_with_a_class_row(qwen):
    spec = replace(qwen, extra_rows=1)
    got = run(spec, "<image><video>", [COFFEE], [frames(2)])
    assert [visual.patches for visual in got.sample.visuals] == [10, 10, 10] and got.sample.visual_tokens == 30
    with pytest.raises(ValueError, match="class row"):
        run(spec, "<image>", [COFFEE], anyres=True)
    with pytest.raises(ValueError, match="class row"):
        run(spec, "<video>", [], [frames(2)], pool="max")


# --- what is refused ---


@pytest.mark.parametrize(
    ("prompt", "images", "videos", "options", "message"),
    [
        ("", [], [], {}, "the prompt is empty"),
        ("<image>" * 9, [COFFEE] * 10, [], {}, "9 <image> marks but 10 images"),
        ("<image><image>", [COFFEE, b"junk"], [], {}, "image 2 of 2: a picture of 4 bytes is not a picture"),
        ("<image><image>", ["/nowhere/a.png", COFFEE], [], {}, "image 1 of 2: '/nowhere/a.png' could not be opened: No such file"),
        ("<video>", [], [b""], {}, "video 1 of 1: a video of 0 bytes is empty"),
        ("<video>", [], [[COFFEE] * 4], {"num_frames": 3, "fps": 1.0}, "num_frames or fps, not both"),
        ("What? " * 3000, [], [], {}, r"takes \d+ tokens \(0 of them of pictures\), more than the context's 2048"),
        ("<image>" * 230, [COFFEE] * 230, [], {}, r"takes 2070 tokens \(2070 of them of pictures\), more than the context's 2048"),
    ],
)
def test_bad_requests(qwen, prompt, images, videos, options, message):
    with pytest.raises(ValueError, match=message):
        run(qwen, prompt, images, videos, **options)


def test_a_context_that_is_just_long_enough(qwen):
    length = len(run(qwen, "<image>\nWhat?", [COFFEE]).sample)
    assert len(run(replace(qwen, max_positions=length), "<image>\nWhat?", [COFFEE]).sample) == length
    with pytest.raises(ValueError, match=f"takes {length} tokens .* context's {length - 1}"):
        run(replace(qwen, max_positions=length - 1), "<image>\nWhat?", [COFFEE])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_aspect_ratio": "anyres_lots"}, "anyres or anyres_max_N .* got 'anyres_lots'"),
        ({"mm_patch_merge_type": "unires"}, "got 'unires'"),
        ({"mm_spatial_pool_mode": "conv"}, "got 'conv'"),
        ({"mm_newline_position": "row"}, "got 'row'"),
        ({"image_grid_pinpoints": [[40, 42]]}, "multiples of the tile of 42"),
    ],
)
def test_bad_options(qwen, options, message):
    with pytest.raises(ValueError, match=message):
        qwen.with_options(options)


def test_a_newline_the_model_lacks(qwen):
    bare = replace(qwen, has_newline=False)
    with pytest.raises(ValueError, match="needs a newline row, which the model lacks"):
        bare.with_options({"mm_patch_merge_type": "spatial_unpad"})
    with pytest.raises(ValueError, match="needs a newline row, which the model lacks"):
        run(replace(bare, merge="spatial_unpad"), "<image>", [COFFEE], anyres=True)


def test_a_processor_for_another_tower(directory):
    with pytest.raises(ValueError, match="gives views of 42 pixels, the tower takes 56"):
        InputSpec.from_dir(directory, 5, 4, 56, 2048)


# --- chat templates of a directory ---


def test_where_a_chat_template_is_found(tmp_path):
    class Tokenizer:
        chat_template = "tokenizer"

    assert read_chat_template(tmp_path) is None and read_chat_template(tmp_path, Tokenizer) == "tokenizer"
    (tmp_path / "processor_config.json").write_text(json.dumps({"chat_template": "processor", "patch_size": 14}))
    assert read_chat_template(tmp_path, Tokenizer) == "processor"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": {"default": "json", "other": "no"}}))
    assert read_chat_template(tmp_path, Tokenizer) == "json"
    (tmp_path / "chat_template.jinja").write_text("jinja")
    assert read_chat_template(tmp_path, Tokenizer) == "jinja"
    Tokenizer.chat_template = [{"name": "default", "template": "first"}, {"name": "tools", "template": "second"}]
    assert read_chat_template(tmp_path / "none", Tokenizer) == "first"
