"""A frozen tower's features on disk: the same losses to the bit, without the tower, in any mixture, and no harm where the disk fails."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

import llava_fast as lf
from llava_fast import checkpoint
from llava_fast.models.llava import Llava
from llava_fast.models.vision import VisionTower
from llava_fast.training.config import as_config
from llava_fast.training.features import FeatureCache
from llava_fast.training.flops import row_flops


def picture(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (40, 60, 3), dtype=np.uint8))


def write(folder, shown):
    """data.json: a record for each list of pictures' numbers."""
    records = []
    for number, seeds in enumerate(shown):
        for seed in seeds:
            picture(seed).save(folder / f"{seed}.png")
        turns = [{"from": "human", "value": "What are these?"}, {"from": "gpt", "value": ["yes", "no", "red", "green"][number % 4]}]
        media = {"image": [f"{seed}.png" for seed in seeds]} if seeds else {}
        records.append({"id": number, **media, "conversations": turns})
    (folder / "data.json").write_text(json.dumps(records))
    return str(folder / "data.json")


SHOWN = [[0], [1, 2], [], [3, 0, 4], [5], [2], [6, 7]]


def fields(directory, data, out, **changes):
    kept = {"model": str(directory), "data": data, "output_dir": str(out), "tokens_per_row": 300, "epochs": 3, "lr": 1e-3}
    return {**kept, "lr_vision_tower": "frozen", "save_every": None, "progress": False, "precision": "fp32", **changes}


@pytest.fixture
def views_seen(monkeypatch):
    """How many views the tower is given at a time."""
    seen = []
    plain = VisionTower.forward

    def forward(self, views, *args):
        seen.append(views.shape[0])
        return plain(self, views, *args)

    monkeypatch.setattr(VisionTower, "forward", forward)
    return seen


def tensors(folder):
    return dict(checkpoint.read_tensors(checkpoint.index_tensors(Path(folder))))


@pytest.mark.parametrize("kind", ["qwen", "llama"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_losses_are_the_same_to_the_bit_and_the_tower_rests(kind, tmp_path, views_seen, precision):
    """With 36 patches a view: below 17 rows a product takes another path, whose last bits depend on how many views share it."""
    directory, template = tiny.make_checkpoint(tmp_path / "model", kind, image_size=84), "v1" if kind == "llama" else "hf"
    data, cache = write(tmp_path, SHOWN), str(tmp_path / "cache")
    changes = {"precision": precision, "template": template}
    plain = lf.train(fields(directory, data, tmp_path / "plain", **changes))
    assert sum(views_seen) == 3 * sum(map(len, SHOWN))
    views_seen.clear()
    cold = lf.train(fields(directory, data, tmp_path / "cold", feature_cache=cache, workers=1, **changes))
    assert sum(views_seen) == 8
    views_seen.clear()
    warm = lf.train(fields(directory, data, tmp_path / "warm", feature_cache=cache, **changes))
    assert not views_seen
    assert plain.losses == cold.losses == warm.losses
    a, b = tensors(tmp_path / "plain"), tensors(tmp_path / "warm")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    files = list(Path(cache).glob("*/*/*"))
    assert len(files) == 8 and not [file for file in files if file.name.startswith(".")]  # one a picture, however often it is shown


def test_rows_of_known_and_unknown_pictures(checkpoints, tmp_path, views_seen):
    """A second run over more pictures computes these alone."""
    cache = str(tmp_path / "cache")
    lf.train(fields(checkpoints["qwen"], write(tmp_path, SHOWN[:3]), tmp_path / "a", feature_cache=cache, epochs=1))
    views_seen.clear()
    data = write(tmp_path, SHOWN)
    changes = {"epochs": 1, "tokens_per_row": 400}
    mixed = lf.train(fields(checkpoints["qwen"], data, tmp_path / "b", feature_cache=cache, **changes))
    assert sum(views_seen) == 5  # 3 to 7
    plain = lf.train(fields(checkpoints["qwen"], data, tmp_path / "c", **changes))
    assert mixed.losses == plain.losses


def test_a_cache_for_another_epoch_may_come_and_go_in_a_run(checkpoints, tmp_path):
    """Where the features lie is no setting: a run goes on with or without them."""
    data = write(tmp_path, SHOWN)

    def stop(metrics):
        if metrics.step == 2:
            raise RuntimeError("stopped")

    changes = {"save_every": 1, "log_every": 1}
    with pytest.raises(RuntimeError, match="stopped"):
        lf.train(fields(checkpoints["qwen"], data, tmp_path / "a", feature_cache=str(tmp_path / "cache"), **changes), on_step=stop)
    again = lf.train(fields(checkpoints["qwen"], data, tmp_path / "a", **changes))
    assert again.losses == lf.train(fields(checkpoints["qwen"], data, tmp_path / "b")).losses


def test_what_a_feature_is_known_by(checkpoints, tmp_path):
    model = checkpoint.load(Llava, checkpoints["qwen"], dtype=torch.float32)
    cache = FeatureCache(tmp_path, model)
    views = torch.randint(0, 256, (3, 3, 42, 42), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    views[2] = views[0]
    keys = cache.keys(views)
    assert keys[0] == keys[2] != keys[1]
    rows = model.features(views)
    cache.write(keys[:1], rows[:1])
    into = torch.zeros_like(rows[0])
    assert cache.read(keys[2], into) and torch.equal(into, rows[2]) and not cache.read(keys[1], into)
    assert FeatureCache(tmp_path, model).folder == cache.folder
    with torch.no_grad():
        model.vision_tower.encoder.layers[1].mlp.fc1.weight[3, 3] += 1e-6
    other = FeatureCache(tmp_path, model)
    assert other.folder != cache.folder and not other.read(keys[0], into)
    model.image_mean = (0.4, 0.5, 0.5)
    assert FeatureCache(tmp_path, model).folder != other.folder


def test_a_file_of_another_size_is_no_feature(checkpoints, tmp_path, views_seen):
    data, cache = write(tmp_path, SHOWN), tmp_path / "cache"
    first = lf.train(fields(checkpoints["qwen"], data, tmp_path / "a", feature_cache=str(cache), epochs=1))
    cut = next(iter(cache.glob("*/*/*")))
    os.truncate(cut, 100)
    views_seen.clear()
    again = lf.train(fields(checkpoints["qwen"], data, tmp_path / "b", feature_cache=str(cache), epochs=1))
    assert 1 <= sum(views_seen) <= 2 and again.losses == first.losses and cut.stat().st_size > 100


def test_no_more_than_it_may_hold(checkpoints, tmp_path, views_seen):
    data, cache = write(tmp_path, SHOWN), tmp_path / "cache"
    one = 9 * 144 * 4
    changes = {"feature_cache": str(cache), "feature_cache_gb": 3.5 * one / 1e9}
    bounded = lf.train(fields(checkpoints["qwen"], data, tmp_path / "a", **changes))
    assert len(list(cache.glob("*/*/*"))) == 3
    lf.train(fields(checkpoints["qwen"], data, tmp_path / "b", **changes))
    assert len(list(cache.glob("*/*/*"))) == 3
    assert bounded.losses == lf.train(fields(checkpoints["qwen"], data, tmp_path / "c")).losses


def test_the_bound_is_the_folders_whatever_towers_and_processes_write_there(checkpoints, tmp_path):
    """Two towers, and two that write in turn as two processes do: each knows of the other's."""
    models = [checkpoint.load(Llava, checkpoints[kind], dtype=torch.float32) for kind in ("qwen", "qwen_untied")]
    with torch.no_grad():
        models[1].vision_tower.encoder.layers[0].mlp.fc1.weight.mul_(2)
    one, cache = 9 * 144 * 4, tmp_path / "cache"
    writers = [FeatureCache(cache, model, 7.5 * one / 1e9) for model in (*models, models[0])]
    assert writers[0].folder == writers[2].folder != writers[1].folder
    for number in range(5):
        for place, writer in enumerate(writers):
            writer.write([f"{number}{place}" * 16], torch.zeros(1, 9, 144))
    assert len(list(cache.glob("*/*/*"))) == 7 and len({file.parent.parent for file in cache.glob("*/*/*")}) == 2
    again = FeatureCache(cache, models[1], 7.5 * one / 1e9)
    again.write(["ab" * 16], torch.zeros(1, 9, 144))
    assert len(list(cache.glob("*/*/*"))) == 7
    next(cache.glob("*/*/*")).unlink()  # by hand, for room: known when a run starts
    again = FeatureCache(cache, models[1], 7.5 * one / 1e9)
    again.write(["ab" * 16, "cd" * 16], torch.zeros(2, 9, 144))
    assert len(list(cache.glob("*/*/*"))) == 7


def test_a_count_that_was_lost_is_made_again(checkpoints, tmp_path):
    model, one = checkpoint.load(Llava, checkpoints["qwen"], dtype=torch.float32), 9 * 144 * 4
    writer = FeatureCache(tmp_path, model, 3.5 * one / 1e9)
    writer.write(["ab" * 16, "cd" * 16], torch.zeros(2, 9, 144))
    (tmp_path / ".used").write_text("")  # a machine that went down
    writer.write(["ef" * 16, "01" * 16], torch.zeros(2, 9, 144))
    assert len(list(tmp_path.glob("*/*/*"))) == 3 and (tmp_path / ".used").read_text() == str(3 * one)


@pytest.mark.parametrize("dpo", [False, True])
def test_held_out_pictures_are_known_too(checkpoints, tmp_path, views_seen, dpo):
    data = write(tmp_path, SHOWN)
    if dpo:
        pairs = [{"image": [f"{s}.png" for s in seeds], "prompt": "?", "chosen": "yes", "rejected": "no"} for seeds in SHOWN if seeds]
        (tmp_path / "pairs.json").write_text(json.dumps(pairs))
        data = str(tmp_path / "pairs.json")
    changes = {"validation_data": data, "validate_every": 1, "dpo": dpo, "epochs": 1, "log_every": 1}
    plain = lf.train(fields(checkpoints["qwen"], data, tmp_path / "plain", **changes))
    views = sum(views_seen)
    views_seen.clear()
    cold = lf.train(fields(checkpoints["qwen"], data, tmp_path / "cold", feature_cache=str(tmp_path / "cache"), **changes))
    assert 8 <= sum(views_seen) <= 12 < views  # those that the loader asked for before they were there are found when the row comes
    views_seen.clear()
    warm = lf.train(fields(checkpoints["qwen"], data, tmp_path / "warm", feature_cache=str(tmp_path / "cache"), **changes))
    assert not views_seen and warm.losses == cold.losses
    for result in (cold, warm):
        assert result.losses == pytest.approx(plain.losses, rel=1e-6)
        assert result.validation == {name: pytest.approx(value, rel=1e-5, abs=1e-6) for name, value in plain.validation.items()}


def test_what_is_reported_of_known_pictures(checkpoints, tmp_path):
    """They are shown, and projected; the tower's arithmetic is not done and not counted."""
    data, seen = write(tmp_path, SHOWN), {}
    changes = {"feature_cache": str(tmp_path / "cache"), "epochs": 1, "log_every": 1, "tokens_per_row": 1000, "workers": 1}
    for name in ("cold", "warm"):
        seen[name] = []
        lf.train(fields(checkpoints["qwen"], data, tmp_path / name, **changes), on_step=seen[name].append)
    (cold,), (warm,) = seen["cold"], seen["warm"]
    assert cold.views == warm.views == sum(map(len, SHOWN)) and warm.views_per_second > 0
    model = lf.load(checkpoints["qwen"])
    config, done = model.config, [metrics.tflops * metrics.seconds * 1e12 for metrics in (cold, warm)]
    tower = row_flops(config, [1], 8, 1, trained=()) - row_flops(config, [1], 0, 1, trained=()) - _projected(config, 8)
    assert done[0] - done[1] == pytest.approx(tower, rel=1e-9)


def _projected(config, views):
    features, width = config.vision.width * len(config.feature_layers), config.decoder.width
    return 2.0 * views * config.patches * (features * width + width**2)


def test_a_full_disk_ends_the_keeping_and_not_the_run(checkpoints, tmp_path, monkeypatch, caplog):
    data, cache = write(tmp_path, SHOWN), tmp_path / "cache"
    plain, left = os.replace, [2]

    def replace(source, target):
        if cache in Path(target).parents:
            left[0] -= 1
            if left[0] < 0:
                raise OSError(28, "No space left on device")
        plain(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with caplog.at_level(logging.WARNING):
        full = lf.train(fields(checkpoints["qwen"], data, tmp_path / "a", feature_cache=str(cache)))
    assert "takes no more features (No space left on device)" in caplog.text
    assert len(list(cache.glob("*/*/*"))) == 2 and not list(cache.glob("*/*/.*"))
    assert full.losses == lf.train(fields(checkpoints["qwen"], data, tmp_path / "b")).losses


@pytest.mark.parametrize("lora", [None, {"r": 4, "dropout": 0.0}])
def test_preferences_use_the_features_too(checkpoints, tmp_path, views_seen, lora):
    """The policy's and the reference's pass share them; so does the pass that computes the reference before the first step."""
    write(tmp_path, SHOWN)
    pair = {"prompt": "What are these?", "chosen": "yes", "rejected": "no"}
    pairs = [{"image": [f"{s}.png" for s in seeds], **pair} for seeds in SHOWN if seeds]
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    changes = {"dpo": True, "lora": lora, "lr_projector": "frozen" if lora else "lr", "epochs": 2}
    plain = lf.train(fields(checkpoints["qwen"], str(tmp_path / "pairs.json"), tmp_path / "plain", **changes))
    views, passes = sum(map(len, SHOWN)), 2 if lora else 3
    assert sum(views_seen) == passes * views
    changes["feature_cache"] = str(tmp_path / "cache")
    lf.train(fields(checkpoints["qwen"], str(tmp_path / "pairs.json"), tmp_path / "cold", **changes))
    views_seen.clear()
    warm = lf.train(fields(checkpoints["qwen"], str(tmp_path / "pairs.json"), tmp_path / "warm", **changes))
    assert not views_seen and warm.losses == plain.losses


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"feature_cache": "x"}, "lr_vision_tower must be 'frozen' where there is a feature_cache, got 2e-06"),
        ({"feature_cache_gb": 1.0}, "feature_cache_gb must be None without feature_cache"),
        ({"feature_cache": "x", "feature_cache_gb": 0, "lr_vision_tower": "frozen"}, "feature_cache_gb must be a number > 0"),
        ({"feature_cache": 5, "lr_vision_tower": "frozen"}, "feature_cache must be a folder or None, got 5"),
    ],
)
def test_settings_that_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        as_config({"model": "m", "data": "a.json", "output_dir": "o", **changes})
