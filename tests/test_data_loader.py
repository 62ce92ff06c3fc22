"""Threads that load samples ahead: whatever kills one ends the run by name, at the step that wanted it, and the run goes on later."""

from __future__ import annotations

import json

import pytest
from PIL import Image

import llava_fast as lf
from llava_fast.training import dataset


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, MemoryError, RuntimeError])
def test_a_loader_that_dies_names_the_record_and_the_run_goes_on(checkpoints, tmp_path, monkeypatch, kind):
    records = []
    for i in range(6):
        Image.new("RGB", (40, 30), (40 * i, 0, 0)).save(tmp_path / f"{i}.png")
        talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": f"It is {i}."}]
        records.append({"id": f"r{i}", "image": f"{i}.png", "conversations": talk})
    (tmp_path / "data.json").write_text(json.dumps(records))
    fields = {
        "model": str(checkpoints["qwen"]),
        "data": str(tmp_path / "data.json"),
        "tokens_per_row": 64,
        "epochs": 2,
        "lr": 1e-3,
        "save_every": 1,
        "log_every": 1,
        "cache_mb": 0,
        "progress": False,
    }
    whole = lf.train({**fields, "output_dir": str(tmp_path / "whole")})
    assert whole.steps > 4
    prepare = dataset.prepare
    seen: list[str] = []

    def dies(request, *rest):
        seen.append(request.images[0])
        if seen.count(str(tmp_path / "3.png")) == 2:  # in the second epoch
            raise kind("gone")
        return prepare(request, *rest)

    monkeypatch.setattr(dataset, "prepare", dies)
    with pytest.raises(RuntimeError, match=rf"data.json, record 3 \(id 'r3'\): its loader died of {kind.__name__}: gone"):
        lf.train({**fields, "output_dir": str(tmp_path / "run"), "on_bad_record": "error"})
    assert list((tmp_path / "run").glob("checkpoint-*"))
    monkeypatch.setattr(dataset, "prepare", prepare)
    assert lf.train({**fields, "output_dir": str(tmp_path / "run")}).losses == whole.losses
