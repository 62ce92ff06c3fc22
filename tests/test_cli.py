"""The command line, as a process and in-process."""

from __future__ import annotations

import json
import subprocess
import sys

import av
import numpy as np
import pytest
from originals import make_original
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

import llava_fast as lf
from llava_fast.cli import ask, main
from llava_fast.info import describe


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "llava_fast.cli", *map(str, arguments)], capture_output=True, text=True)


@pytest.fixture
def pictures(tmp_path):
    paths = [tmp_path / "a.jpg", tmp_path / "b.png"]
    for seed, path in enumerate(paths):
        Image.fromarray(np.random.default_rng(seed).integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(path)
    return paths


def test_generate_streams_the_answer(checkpoints, pictures):
    done = run(
        "generate", "--model", checkpoints["qwen"], "--image", pictures[0], "--image", pictures[1], "--max-new-tokens", 9, "What changed?"
    )
    assert done.returncode == 0, done.stderr
    expected = lf.generate(lf.load(checkpoints["qwen"]), ask("What changed?", pictures, []), max_new_tokens=9)
    assert done.stdout == expected.text + "\n"
    assert "first text after" in done.stderr


def test_generate_json(checkpoints, pictures, capsys, monkeypatch):
    command = ["llava-fast", "generate", "-m", str(checkpoints["qwen"]), "-i", str(pictures[0]), "--json", "--max-new-tokens", "5", "What?"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as exit:
        main()
    assert not exit.value.code
    answer = json.loads(capsys.readouterr().out)
    assert len(answer["token_ids"]) == 5 and answer["visual_tokens"] == 9 and answer["error"] is None and answer["load_seconds"] > 0


def test_generate_quantised(checkpoints, pictures, capsys, monkeypatch):
    command = ["llava-fast", "generate", "-m", str(checkpoints["qwen"]), "-i", str(pictures[0]), "--quantise", "int8", "--json"]
    monkeypatch.setattr(sys, "argv", [*command, "--max-new-tokens", "5", "What?"])
    with pytest.raises(SystemExit) as exit:
        main()
    assert not exit.value.code
    expected = lf.generate(lf.load(checkpoints["qwen"], quantise="int8"), ask("What?", pictures[:1], []), max_new_tokens=5)
    assert json.loads(capsys.readouterr().out)["token_ids"] == expected.token_ids


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["generate", "-m", "/nowhere", "Hello"], "neither a checkpoint directory nor a hub id"),
        (["generate", "-m", "{model}", "-i", "absent.png", "What?"], "absent.png"),
        (["generate", "-m", "{model}", "<image> What?"], "1 <image> and 0 <video> marks but 0 images and 0 videos"),
        (["generate", "-m", "{model}", "--temperature", "nan", "What?"], "temperature must be a finite number >= 0, got nan"),
        (["info", "/nowhere"], "neither a checkpoint directory nor a hub id"),
        (["info"], "a checkpoint or --kernels"),
        (["info", "--kernels", "{model}"], "a checkpoint or --kernels"),
        (["convert", "{model}", "{model}"], "is not empty"),
    ],
)
def test_errors_are_one_line(checkpoints, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["llava-fast", *(a.format(model=checkpoints["qwen"]) for a in arguments)])
    with pytest.raises(SystemExit) as exit:
        main()
    assert exit.value.code == 2
    told = capsys.readouterr().err.strip()
    assert message in told and len(told.splitlines()) == 1


def test_names_with_brackets(checkpoints, monkeypatch, capsys):
    """What a message quotes is not markup."""
    monkeypatch.setattr(sys, "argv", ["llava-fast", "generate", "-m", str(checkpoints["qwen"]), "-i", "photo[/x][b].jpg", "What?"])
    with pytest.raises(SystemExit):
        main()
    assert "photo[/x][b].jpg" in capsys.readouterr().err


def make_video(path, frames=12):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=4)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for i in range(frames):
            picture = np.full((64, 64, 3), 20 * i, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def answer(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["llava-fast", "generate", "--json", "--max-new-tokens", "12", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit:
        main()
    assert not exit.value.code
    return json.loads(capsys.readouterr().out)


def test_video_and_its_options(checkpoints, pictures, tmp_path, monkeypatch, capsys):
    make_video(tmp_path / "c.mp4")
    model = ["-m", checkpoints["qwen"], "--video", tmp_path / "c.mp4"]
    assert answer(monkeypatch, capsys, *model, "--num-frames", 5, "What?")["visual_tokens"] == 5 * 9
    assert answer(monkeypatch, capsys, *model, "--fps", 2, "What?")["visual_tokens"] == 6 * 9
    assert answer(monkeypatch, capsys, *model, "--num-frames", 5, "--pool", "bilinear", "What?")["visual_tokens"] == 5 * 4
    both = answer(monkeypatch, capsys, *model, "-i", pictures[0], "-i", pictures[1], "--num-frames", 2, "What do they share?")
    assert both["visual_tokens"] == 4 * 9


def test_raw_order_and_aspect(checkpoints, pictures, monkeypatch, capsys):
    model = lf.load(checkpoints["qwen_untied"])
    base = ["-m", checkpoints["qwen_untied"], "-i", pictures[0]]
    raw = answer(monkeypatch, capsys, *base, "--raw", "<image>What?")
    assert raw["token_ids"] == lf.generate(model, lf.Request("<image>What?", images=[str(pictures[0])]), max_new_tokens=12).token_ids
    messages, seen = ask("Is <image> red?", [pictures[0]], []), set()
    for flag, options in ([], {}), (["--keep-order"], {"keep_order": True}), (["--image-aspect", "pad"], {"image_aspect": "pad"}):
        expected = lf.generate(model, messages, max_new_tokens=12, **options)
        assert answer(monkeypatch, capsys, *base, *flag, "Is <image> red?")["token_ids"] == expected.token_ids
        seen.add(tuple(expected.token_ids))
    assert len(seen) == 3  # each flag matters
    # The tiny model's pictures are 60 x 40, a tile 42: one base view and one row of two tiles.
    assert answer(monkeypatch, capsys, *base, "--anyres", "What?")["visual_tokens"] > 9


def test_pictures_stand_at_their_marks():
    (message,) = ask("Is <image> before <image>?", ["a.png", "b.png"], []).prompt
    assert [item.get("image", item.get("text")) for item in message["content"]] == ["Is ", "a.png", " before ", "b.png", "?"]
    (front,) = ask("Which?", ["a.png"], ["c.mp4"]).prompt
    assert [item["type"] for item in front["content"]] == ["image", "video", "text"]


def test_convert(checkpoints, tmp_path):
    original = make_original(checkpoints["llama"], tmp_path / "original")
    done = run("convert", original, tmp_path / "converted")
    assert done.returncode == 0, done.stderr
    _, info = LlavaForConditionalGeneration.from_pretrained(tmp_path / "converted", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_info_kernels():
    told = run("info", "--kernels")
    assert told.returncode == 0, told.stderr
    lines = told.stdout.splitlines()
    place = lines.index("spatial_pool (cpu, float32): cpu, default")
    assert {"    reference: cpu comes first", "    cuda: it runs on cuda, not on cpu"} <= set(lines[place + 1 : place + 5])
    assert "linear (cpu, float32; fp8): reference, default" in lines  # a line of its own: another implementation
    assert [line.partition(" (")[0] for line in lines[1:] if line[0] != " "].count("norm") == 1  # one line for all widths
    choices = {choice["op"]: choice for choice in json.loads(run("info", "--kernels", "--json").stdout)}
    assert choices["spatial_pool"]["name"] == "cpu" and choices["spatial_pool"]["others"]["cuda"] == "it runs on cuda, not on cpu"


def test_info_with_tiles_and_faults(checkpoints, tmp_path):
    tiles = {"mm_patch_merge_type": "spatial_unpad", "image_aspect_ratio": "anyres", "image_grid_pinpoints": [[42, 84], [84, 42], [84, 84]]}
    path = make_original(checkpoints["qwen"], tmp_path / "original", **tiles)
    facts = describe(path)
    assert facts["tokens_per_image"] == 10  # with its newline
    model = lf.load(path)
    picture = Image.fromarray(np.zeros((48, 64, 3), dtype=np.uint8)).resize((640, 480))
    completion = lf.generate(model, lf.Request("<image>What?", images=[picture]), max_new_tokens=1)
    assert facts["tokens_with_tiles"]["640x480"] == completion.visual_tokens
    tensors = load_file(path / "model.safetensors")
    save_file({**tensors, "model.surprise": tensors["model.norm.weight"].clone()}, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="1 unexpected: model.surprise"):
        describe(path)


def test_info(kind, directory, tmp_path, capsys, monkeypatch):
    facts = describe(directory)
    model = lf.load(directory)
    parameters = sum(p.numel() for p in model.parameters())
    assert facts["parameters"]["total"] == parameters
    assert facts["parameters"]["carried"] == sum(t.numel() for t in model.carried.values())
    assert facts["tokens_per_image"] == 9 and facts["tokens_with_tiles"] == {} and facts["memory"]["weights"] == 4 * parameters
    decoder = model.config.decoder
    assert facts["kv_bytes_per_token"] == 2 * 4 * decoder.layers * decoder.kv_heads * decoder.head_dim
    assert describe(make_original(directory, tmp_path / "original"))["parameters"] == facts["parameters"]
    monkeypatch.setattr(sys, "argv", ["llava-fast", "info", str(directory)])
    with pytest.raises(SystemExit):
        main()
    printed = capsys.readouterr().out
    assert f"{parameters:,}" in printed and "tokens a picture" in printed
