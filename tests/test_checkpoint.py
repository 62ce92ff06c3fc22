"""Checkpoints in and out: both formats, every tensor accounted for, faults named, memory bounded."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import tiny
import torch
from originals import make_original
from padded import pixels
from PIL import Image
from safetensors.torch import load_file, save_file
from test_models import assert_close, batch_of
from transformers import AutoProcessor, LlavaForConditionalGeneration

import llava_fast as lf
from llava_fast import checkpoint
from llava_fast.memory import keep_freed_memory

SHAPES = [[3, "image", 5, "image"], [7, "image"], [9]]


def edit_weights(source, target, edit) -> None:
    """A copy of a checkpoint whose tensors went through `edit` (a dict in place)."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    edit(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def test_round_trip(directory, hf, tmp_path):
    """What we save, transformers loads with no key missing or unexpected, to the same logits; and we load it bit for bit."""
    model = lf.load(directory)
    model.save_pretrained(tmp_path / "out", max_shard_size="100KB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    theirs, info = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    before = dict(hf.state_dict())
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    again = lf.load(tmp_path / "out")
    inputs = batch_of(model, SHAPES)
    assert torch.equal(logits(again, inputs), logits(model, inputs))
    kept = inputs["attention_mask"].bool()
    assert_close(logits(model, inputs)[kept], logits(theirs.eval(), inputs)[kept])
    assert AutoProcessor.from_pretrained(tmp_path / "out").chat_template == AutoProcessor.from_pretrained(directory).chat_template


def test_unexecuted_tensors_are_carried(checkpoints, tmp_path):
    """CLIP at layer -2: its last layer and final norm run nowhere, and come back unchanged."""
    model = lf.load(checkpoints["llama"])
    assert len(model.carried) == 16 + 2 and len(model.vision_tower.encoder.layers) == 2
    model.save_pretrained(tmp_path)
    before, after = load_file(checkpoints["llama"] / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert {checkpoint.canonical(k) for k in before} == {checkpoint.canonical(k) for k in after}
    renamed = {checkpoint.canonical(k): v for k, v in after.items()}
    assert all(torch.equal(value, renamed[checkpoint.canonical(key)]) for key, value in before.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_stored_dtype(checkpoints, tmp_path, dtype):
    path = tiny.make_checkpoint(tmp_path / "model", "qwen", dtype=dtype)
    assert {p.dtype for p in lf.load(path).parameters()} == {dtype}
    assert lf.load(path, dtype="float32").stored_dtype == torch.float32
    with pytest.raises(ValueError, match="dtype must be 'auto' or a float dtype"):
        lf.load(path, dtype="int8")


def test_pickled_shards(checkpoints, tmp_path):
    source = checkpoints["qwen_untied"]
    shutil.copytree(source, tmp_path / "bin")
    tensors = load_file(source / "model.safetensors")
    (tmp_path / "bin" / "model.safetensors").unlink()
    names = sorted(tensors)
    torch.save({k: tensors[k] for k in names[::2]}, tmp_path / "bin" / "pytorch_model-00001-of-00002.bin")
    torch.save(  # the format of torch before 1.6
        {k: tensors[k] for k in names[1::2]}, tmp_path / "bin" / "pytorch_model-00002-of-00002.bin", _use_new_zipfile_serialization=False
    )
    inputs = batch_of(model := lf.load(tmp_path / "bin"), SHAPES)
    assert torch.equal(logits(model, inputs), logits(lf.load(source), inputs))


def test_pickles_run_no_code(checkpoints, tmp_path):
    class Trap:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'executed'}",)

    shutil.copytree(checkpoints["qwen"], tmp_path / "bin")
    (tmp_path / "bin" / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Trap()}, tmp_path / "bin" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin"):
        lf.load(tmp_path / "bin")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda t: t.pop("language_model.model.norm.weight"), r"1 missing: language_model\.norm\.weight"),
        (lambda t: t.update({"language_model.model.extra.weight": torch.ones(3)}), r"1 unexpected: language_model\.model\.extra\.weight"),
        (
            lambda t: t.update({"multi_modal_projector.linear_1.bias": torch.ones(3)}),
            r"1 wrongly shaped: multi_modal_projector\.linear_1\.bias is \[3\], expected \[64\]",
        ),
        (
            lambda t: t.update({"multi_modal_projector.linear_1.bias": torch.ones(64, dtype=torch.int8)}),
            r"1 not of a float dtype: multi_modal_projector\.linear_1\.bias",
        ),
        (lambda t: t.update({"language_model.lm_head.weight": torch.ones(384, 64)}), "should equal embed_tokens"),
        (lambda t: t.update({"model.language_model.norm.weight": torch.ones(64)}), "language_model.norm.weight is stored twice"),
    ],
)
def test_faulty_tensors_are_named(checkpoints, tmp_path, edit, message):
    edit_weights(checkpoints["qwen"], tmp_path / "broken", edit)
    with pytest.raises(ValueError, match=message):
        lf.load(tmp_path / "broken")


def test_tied_head_in_the_file(checkpoints, tmp_path):
    def add_head(tensors):
        tensors["language_model.lm_head.weight"] = tensors["language_model.model.embed_tokens.weight"].clone()

    edit_weights(checkpoints["qwen"], tmp_path / "model", add_head)
    assert lf.load(tmp_path / "model").lm_head is None


def test_faulty_directories(checkpoints, tmp_path):
    with pytest.raises(ValueError, match="neither a checkpoint directory nor a hub id"):
        lf.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="could not be fetched from the hub"):
        lf.load("nobody/nothing-of-this-name")
    with pytest.raises(ValueError, match="has no config.json"):
        lf.load(tmp_path)
    (tmp_path / "config.json").write_text("{not json")
    with pytest.raises(ValueError, match="config.json is not JSON"):
        lf.load(tmp_path)
    shutil.copy(checkpoints["qwen"] / "config.json", tmp_path / "config.json")
    with pytest.raises(ValueError, match="no .*weights"):
        lf.load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        lf.load(tmp_path)


def test_saving_over_another_model(checkpoints, tmp_path):
    """The weights of the model that was there go, whatever their number of shards; files that are not the model's stay."""
    foreign = {"adapter_model.safetensors": b"not ours", "training_args.bin": b"nor this", "metrics.jsonl": b"{}"}
    for name, content in foreign.items():
        (tmp_path / name).write_bytes(content)
    first, second = lf.load(checkpoints["qwen"]), lf.load(checkpoints["qwen_untied"])
    for model, size in ((first, "100KB"), (second, "5GB"), (first, "200KB")):
        model.save_pretrained(tmp_path, max_shard_size=size)
        again = lf.load(tmp_path)
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
        _, info = LlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
    assert all((tmp_path / name).read_bytes() == content for name, content in foreign.items())
    assert not list(tmp_path.glob(".saving-*"))


def test_a_full_disk_leaves_the_old_model(checkpoints, tmp_path, monkeypatch):
    first, second = lf.load(checkpoints["qwen"]), lf.load(checkpoints["qwen_untied"])
    first.save_pretrained(tmp_path, max_shard_size="100KB")

    def full(*args, **kw):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        second.save_pretrained(tmp_path)
    assert lf.load(tmp_path).lm_head is None


def test_only_input_files_travel(checkpoints, tmp_path):
    shutil.copytree(checkpoints["qwen"], tmp_path / "model")
    for name in ("trainer_state.json", "skipped.txt", "results.json"):
        (tmp_path / "model" / name).write_text("{}")
    lf.load(tmp_path / "model").save_pretrained(tmp_path / "out")
    assert {f.name for f in (tmp_path / "out").iterdir()} == {f.name for f in checkpoints["qwen"].iterdir()}


def test_the_rescale_factor_reaches_the_model(checkpoints, tmp_path):
    shutil.copytree(checkpoints["qwen"], tmp_path / "model")
    file = tmp_path / "model" / "processor_config.json"
    config = json.loads(file.read_text())
    config["image_processor"] |= {"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3}
    file.write_text(json.dumps(config))
    model = lf.load(tmp_path / "model")
    views = torch.randint(0, 256, (1, 3, 42, 42), dtype=torch.uint8)
    picture = Image.fromarray(views[0].permute(1, 2, 0).numpy())
    pixels_of_hf = AutoProcessor.from_pretrained(tmp_path / "model").image_processor(picture, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        assert torch.equal(model.features(views), model.features(pixels_of_hf))


@pytest.mark.parametrize("device", ["gpu", "tpu:0", "cuda:99"])
def test_devices_that_are_not_there(checkpoints, device):
    with pytest.raises(ValueError, match=device):
        lf.load(checkpoints["qwen"], device=device)


def test_memory_is_kept_unless_the_user_says_otherwise(monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    assert keep_freed_memory() is False
    monkeypatch.delenv("MALLOC_TRIM_THRESHOLD_")
    monkeypatch.setattr(sys, "platform", "win32")
    assert keep_freed_memory() is False


def test_freed_memory_comes_without_page_faults():
    """Of a block of 64 MiB, which is a map of its own unless all is kept. The first ones inside part from each other: glibc keeps what is
    cut off to align them, seven pieces a size, and they lie between."""
    code = """
import resource, torch
from llava_fast.memory import keep_freed_memory, kept_memory

def faults(size, times=15):
    for _ in range(times):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.empty(size).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

assert keep_freed_memory()
before = faults(1 << 24)
with kept_memory() as kept:
    assert kept
    inside = faults(1 << 24)
print(before, inside, faults(1 << 26, 3))  # what is larger than all that was kept
"""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    run = subprocess.run([sys.executable, "-c", code], env=clean, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    before, inside, after = map(int, run.stdout.split())
    assert before > 15_000 and inside < 500 and after > 60_000


def test_broken_json_files(checkpoints, tmp_path):
    shutil.copytree(checkpoints["qwen"], tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match="generation_config.json must hold a JSON object, got a list"):
        lf.load(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="config.json must hold a JSON object"):
        lf.load(tmp_path / "model")


def test_missing_shard(checkpoints, tmp_path):
    lf.load(checkpoints["qwen"]).save_pretrained(tmp_path, max_shard_size="100KB")
    gone = sorted(tmp_path.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(ValueError, match=gone.name):
        lf.load(tmp_path)


@pytest.mark.parametrize("change", [{"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, {"model_type": "gemma"}])
def test_unsupported_decoders(checkpoints, tmp_path, change):
    raw = json.loads((checkpoints["qwen"] / "config.json").read_text())
    raw["text_config"] = {**raw["text_config"], **change, "layer_types": None}
    shutil.copytree(checkpoints["qwen"], tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="sliding-window|must be qwen2 or llama"):
        lf.load(tmp_path / "model")


def test_stop_tokens(checkpoints, tmp_path):
    """generation_config's, then the tokenizer's."""
    path = checkpoints["qwen"]
    assert lf.load(path).eos_ids == (2,)
    shutil.copytree(path, tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    assert lf.load(tmp_path / "model").eos_ids == (2, 0)
    (tmp_path / "model" / "generation_config.json").unlink()
    assert lf.load(tmp_path / "model").eos_ids == (2,)


def test_interrupted_save_loses_nothing(checkpoints, tmp_path, monkeypatch):
    model = lf.load(checkpoints["qwen"])
    model.save_pretrained(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def fail(*args, **kw):
        raise KeyboardInterrupt

    with torch.no_grad():
        model.language_model.norm.weight.add_(1.0)
    monkeypatch.setattr(type(model.generation_config), "to_json_string", fail)
    with pytest.raises(KeyboardInterrupt):
        model.save_pretrained(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize("scaling", [("linear", dict(factor=2.0)), ("llama3", dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0))])
def test_scaled_rope(tmp_path, scaling):
    kind, fields = scaling
    fields = {**fields, "original_max_position_embeddings": 16} if kind == "llama3" else fields
    path = tiny.make_checkpoint(tmp_path / "model", "llama")
    raw = json.loads((path / "config.json").read_text())
    raw["text_config"]["rope_parameters"] = {"rope_type": kind, "rope_theta": 10000.0, **fields}
    (path / "config.json").write_text(json.dumps(raw))
    hf = LlavaForConditionalGeneration.from_pretrained(path).eval()
    model = lf.load(path)
    inputs = batch_of(model, [[40, "image", 5]])
    assert_close(logits(model, inputs), logits(hf, inputs))


# Original directories.


@pytest.mark.parametrize("tower", ["inside", "own"])
def test_original_directories(directory, hf, kind, tmp_path, tower):
    """The function of the transformers checkpoint they were made from; saved, transformers loads it."""
    path = make_original(directory, tmp_path / "original", tower)
    model = lf.load(path)
    assert model.config.drop_class == (kind == "llama")
    inputs = batch_of(model, SHAPES)
    kept = inputs["attention_mask"].bool()
    assert_close(logits(model, inputs)[kept], logits(hf, inputs)[kept])
    assert model.config.options["image_aspect_ratio"] == "pad"

    model.save_pretrained(tmp_path / "converted")
    theirs, info = LlavaForConditionalGeneration.from_pretrained(tmp_path / "converted", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_close(logits(model, inputs)[kept], logits(theirs.eval(), inputs)[kept])
    again = lf.load(tmp_path / "converted")
    assert torch.equal(logits(again, inputs), logits(model, inputs)) and again.config.options == model.config.options


def test_original_generation_config(checkpoints, tmp_path):
    """Vicuna's sets a temperature without sampling, which transformers refuses to save."""
    path = make_original(checkpoints["llama"], tmp_path / "original")
    (path / "generation_config.json").write_text('{"temperature": 0.9, "top_p": 0.6, "eos_token_id": 2}')
    model = lf.load(path)
    model.save_pretrained(tmp_path / "converted")
    assert lf.load(tmp_path / "converted").generation_config.temperature == 0.9 and model.eos_ids == (2,)


def test_original_newline(checkpoints, tmp_path):
    model = lf.load(make_original(checkpoints["qwen"], tmp_path / "original", mm_patch_merge_type="spatial_unpad"))
    assert torch.equal(model.image_newline.detach(), torch.arange(64.0))
    model.save_pretrained(tmp_path / "converted")
    assert torch.equal(lf.load(tmp_path / "converted").image_newline.detach(), torch.arange(64.0))


def test_original_linear_projector(checkpoints, tmp_path):
    """LLaVA v1's single product; transformers has two, so the saved second one is the identity."""
    path = make_original(checkpoints["llama"], tmp_path / "original", mm_projector_type="linear")
    tensors = load_file(path / "model.safetensors")
    for leaf in ("weight", "bias"):
        tensors[f"model.mm_projector.{leaf}"] = tensors.pop(f"model.mm_projector.0.{leaf}")
        del tensors[f"model.mm_projector.2.{leaf}"]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    model = lf.load(path)
    views = pixels(2)
    with torch.no_grad():
        features = model.features(views)
        expected = features @ tensors["model.mm_projector.weight"].T + tensors["model.mm_projector.bias"]
        assert_close(model.multi_modal_projector(features), expected.flatten(0, 1))
    model.save_pretrained(tmp_path / "converted")
    inputs = batch_of(model, SHAPES)
    kept = inputs["attention_mask"].bool()
    theirs = LlavaForConditionalGeneration.from_pretrained(tmp_path / "converted").eval()
    assert_close(logits(theirs, inputs)[kept], logits(model, inputs)[kept])
    assert torch.equal(logits(lf.load(tmp_path / "converted"), inputs), logits(model, inputs))


def test_original_vocabulary_without_image_token(checkpoints, tmp_path):
    """The tokenizer gets <image>; the vocabulary grows to hold it, by the mean row, which greedy decoding never picks."""
    path = make_original(checkpoints["llama"], tmp_path / "original")
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = [t for t in tokenizer["added_tokens"] if t["content"] != "<image>"]
    tokenizer["model"]["vocab"] = {("<pic>" if k == "<image>" else k): v for k, v in tokenizer["model"]["vocab"].items()}
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = json.loads((path / "tokenizer_config.json").read_text())
    settings["extra_special_tokens"] = []
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    raw = json.loads((path / "config.json").read_text())
    rows = max(tokenizer["model"]["vocab"].values()) + 1
    tensors = load_file(path / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:rows].clone()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps({**raw, "vocab_size": rows}))

    model = lf.load(path)
    assert model.config.image_token_id == rows == model.tokenizer.convert_tokens_to_ids("<image>")
    assert model.config.decoder.vocab_size == (rows // 64 + 1) * 64
    assert_close(model.lm_head.weight[rows:], tensors["lm_head.weight"].mean(0).expand(model.config.decoder.vocab_size - rows, -1))
    model.save_pretrained(tmp_path / "converted")
    inputs = batch_of(model, [[3, "image", 5]])
    theirs = LlavaForConditionalGeneration.from_pretrained(tmp_path / "converted").eval()
    assert_close(logits(theirs, inputs), logits(model, inputs))


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"mm_projector_type": "pooler"}, "mm_projector_type must be 'linear' or 'mlp2x_gelu', got 'pooler'"),
        ({"model_type": "llava_mpt"}, "model_type must be one of"),
        ({"mm_vision_tower": "no/such-tower"}, "no/such-tower"),
        ({"mm_vision_select_feature": "slicefour_patch"}, "mm_vision_select_feature"),
    ],
)
def test_original_outside_the_family(checkpoints, tmp_path, overrides, message):
    path = make_original(checkpoints["llama"], tmp_path / "original", **overrides)
    with pytest.raises(ValueError, match=message):
        lf.load(path)


MEASURE = """
import sys, threading, time, torch
import llava_fast as lf
import llava_fast.checkpoint, llava_fast.api
from transformers import AutoConfig, AutoTokenizer, AutoProcessor
torch.set_num_threads(1)
def anon():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) * 1024
small = lf.load(sys.argv[2])  # imports and caches, so that the difference is the load alone
peak, done = [anon()], False
before = peak[0]
def watch():
    while not done:
        peak.append(anon())
        time.sleep(0.001)
thread = threading.Thread(target=watch)
thread.start()
model = lf.load(sys.argv[1], dtype=sys.argv[3])
done = True
thread.join()
weights = sum(p.numel() * p.element_size() for p in model.parameters())
print((max(peak) - before) / weights, weights)
"""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_loading_needs_little_more_memory_than_the_weights(checkpoints, tmp_path, dtype):
    """Peak anonymous memory while loading at most 1.2 times the weights; bf16 on disk, several shards."""
    text = dict(hidden_size=1024, intermediate_size=2816, num_attention_heads=16, num_hidden_layers=8, vocab_size=50_000)
    path = tiny.make_checkpoint(tmp_path / "large", "qwen_untied", dtype=torch.bfloat16, text=text, max_shard_size="150MB")
    assert len(list(path.glob("*.safetensors"))) >= 2
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path), str(checkpoints["qwen"]), dtype], capture_output=True, text=True, check=True
    )
    ratio, weights = map(float, run.stdout.split())
    assert weights > 3e8
    assert ratio <= 1.2


def test_layout_of_the_released_files(checkpoints, tmp_path):
    """llava-interleave-qwen-0.5b-hf was written by transformers 4.43: other key names, rope_theta, three processor files."""
    source, path = checkpoints["qwen"], tmp_path / "released"
    path.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, path / name)
    tensors = {k.replace("vision_tower.", "vision_tower.vision_model."): v for k, v in load_file(source / "model.safetensors").items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    raw = json.loads((source / "config.json").read_text())
    text = {k: v for k, v in raw["text_config"].items() if k not in ("rope_parameters", "layer_types")}
    text |= {"rope_theta": raw["text_config"]["rope_parameters"]["rope_theta"], "sliding_window": 32768, "use_sliding_window": False}
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "ignore_index": -100,
        "image_token_index": raw["image_token_index"],
        "model_type": "llava",
        "projector_hidden_act": "gelu",
        "text_config": text,
        "torch_dtype": "float32",
        "transformers_version": "4.43.0.dev0",
        "vision_config": raw["vision_config"],
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    }
    (path / "config.json").write_text(json.dumps(config))
    (path / "generation_config.json").write_text('{"bos_token_id": 0, "eos_token_id": 2, "transformers_version": "4.43.0.dev0"}')
    processor = json.loads((source / "processor_config.json").read_text())
    image = {k: v for k, v in processor["image_processor"].items() if k != "do_convert_rgb"}
    (path / "preprocessor_config.json").write_text(json.dumps({**image, "do_convert_rgb": None, "processor_class": "LlavaProcessor"}))
    (path / "processor_config.json").write_text(
        json.dumps({"num_additional_image_tokens": 0, "patch_size": 14, "vision_feature_select_strategy": "full"})
    )
    (path / "chat_template.json").write_text(json.dumps({"chat_template": (source / "chat_template.jinja").read_text()}))

    model = lf.load(path)
    assert model.config.decoder.tied and model.eos_ids == (2,)
    inputs = batch_of(model, SHAPES)
    kept = inputs["attention_mask"].bool()
    theirs = LlavaForConditionalGeneration.from_pretrained(path).eval()
    assert_close(logits(model, inputs)[kept], logits(theirs, inputs)[kept])
    message = [{"role": "user", "content": [{"type": "text", "text": "What?"}]}]
    expected = lf.generate(lf.load(source), message, max_new_tokens=6).token_ids
    assert lf.generate(model, message, max_new_tokens=6).token_ids == expected
    model.save_pretrained(tmp_path / "saved")
    _, info = LlavaForConditionalGeneration.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
