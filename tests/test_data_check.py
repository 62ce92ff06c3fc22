"""`llava-fast data check`: every kind of bad data is counted and named, before a model is touched."""

from __future__ import annotations

import dataclasses
import json
import signal
import sys

import av
import numpy as np
import pytest
from PIL import Image

import llava_fast.training.check as check_module
from llava_fast import checkpoint
from llava_fast.cli import main
from llava_fast.training.check import check_data, read_settings
from llava_fast.training.dataset import index_records
from llava_fast.training.preferences import index_pairs


def talk(name, *turns, **fields):
    turns = turns or ("What?", "That.")
    pairs = zip(["human", "gpt"] * len(turns), turns, strict=False)
    return {"id": name, **fields, "conversations": [{"from": role, "value": text} for role, text in pairs]}


def m4(name, dataset, *turns, **fields):
    """As M4-Instruct's files write a record."""
    metadata = {"dataset": dataset, "split": "train", "num_sample": 4511, "task_instruction": "", "question_type": "open-ended"}
    record = talk(name, *turns, choice_list=None, metadata=metadata, **fields)
    return {"sample_id": record.pop("id"), **record}


@pytest.fixture
def m4_folder(tmp_path):
    """M4-Instruct in small, laid out as released, with its known defects and some more."""
    for path in ("HQ-Edit/1.jpg", "HQ-Edit/2.jpg", "MagicBrush/images/1.jpg", "nuscenes/a.jpg", "nuscenes/b.jpg", "twitter_post/1.jpg"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8)).save(tmp_path / path)
    (tmp_path / "HQ-Edit" / "cut.jpg").write_bytes(b"\xff\xd8\xff\xe0 no picture")
    (tmp_path / "train_300k" / "v1").mkdir(parents=True)
    for i in range(3):
        Image.new("RGB", (32, 24), (40 * i, 0, 0)).save(tmp_path / "train_300k" / "v1" / f"c01_{i:04}.jpeg")
    (tmp_path / "train_300k" / "v2").mkdir()
    (tmp_path / "clip.mp4").write_bytes(b"no video")
    two = ["HQ-Edit/1.jpg", "HQ-Edit/2.jpg"]
    swapped = m4(4, "twitter_post", "Words.", "<image>\nWrite a post.", image=["twitter_post/1.jpg"])
    for turn in swapped["conversations"]:
        turn["from"] = "gpt" if turn["from"] == "human" else "human"
    records = [
        m4(0, "HQ-Edit", "From <image> to <image>?", "Make it red.", image=two),
        m4(1, "HQ-Edit", "<image><image>\nWhat is new?", "Nothing is.", image=two),
        m4(2, "MagicBrush-Diff", "<image><image>\nWhat differs?", "A lot.", image=["MagicBrush/images/1.jpg"] * 4),
        m4(3, "nuscenes", "<image><image>\nWhat is ahead?", "A car.", image=["nuscenes/a.jpg", "nuscenes/b.jpg"]),
        swapped,
        m4(5, "HQ-Edit", "<image><image>\nWhat?", "Red.", image=["HQ-Edit/1.jpg", "HQ-Edit/gone.jpg"]),
        m4(6, "HQ-Edit", "<image><image>\nWhat?", "Red.", image=["HQ-Edit/1.jpg", "HQ-Edit/cut.jpg"]),
        m4(7, "HQ-Edit", "<image><image>\nWhat?", "  ", image=two),
        m4(8, "HQ-Edit", "<image><image>\nWhat?", "Red.", "And?", image=two),
        m4(9, "HQ-Edit", "<image><image>\nWhat?", "No. " * 300, image=two),
        m4(10, "HQ-Edit", "<image>" * 40, "Many.", image=["HQ-Edit/1.jpg"] * 40),
        "no record",
    ]
    (tmp_path / "m4_instruct_annotations.json").write_text(json.dumps(records))
    videos = [
        talk("v1", "<image>\nWho?", "Nobody.", video="train_300k/v1"),
        talk("v2", "<image>\nWho?", "Nobody.", video="train_300k/v2"),
        talk("v3", "<image>\nWho?", "Nobody.", video="clip.mp4"),
    ]
    (tmp_path / "m4_instruct_video.json").write_text(json.dumps(videos))
    return tmp_path


FAULTS = {
    2: "marks and pictures",
    4: "reversed turns",
    5: "missing file",
    6: "unreadable file",
    7: "empty answer",
    8: "turns",
    9: "too long",
    10: "too many views",
    11: "not a record",
    "v2": "unreadable file",
    "v3": "unreadable file",
}


@pytest.fixture
def recipe(m4_folder, checkpoints):
    path = m4_folder / "recipe.yaml"
    fields = {
        "model": str(checkpoints["qwen"]),
        "data": [str(m4_folder / name) for name in ("m4_instruct_annotations.json", "m4_instruct_video.json")],
        "output_dir": str(m4_folder / "out"),
        "tokens_per_row": 500,
        "views_per_row": 32,
        "inputs": {"num_frames": 3},
        "progress": False,
    }
    path.write_text(json.dumps(fields))
    return path


def command(*arguments) -> int:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", ["llava-fast", "data", "check", *map(str, arguments)])
        main()
    return ended.value.code or 0


def named(path) -> dict:
    return {fault["id"] and json.loads(fault["id"].replace("'", '"')): fault for fault in map(json.loads, path.read_text().splitlines())}


def test_m4_instruct_as_released(recipe, m4_folder, capsys):
    out = m4_folder / "check"
    assert command(recipe, "--out", out, "--json") == 1
    found = json.loads(capsys.readouterr().out)
    faults = named(out / "faults.jsonl")
    faults[11] = faults.pop(None)
    assert {name: fault["kind"] for name, fault in faults.items()} == FAULTS and found["faults"] == len(FAULTS)
    for name, fault in faults.items():
        file = "m4_instruct_video.json" if isinstance(name, str) else "m4_instruct_annotations.json"
        assert fault["file"] == str(m4_folder / file) and fault["message"].startswith(f"{fault['file']}, record {fault['record']}")
    assert faults[5]["path"] == str(m4_folder / "HQ-Edit" / "gone.jpg") and "gone.jpg" in faults[5]["message"]
    assert "2 <image> marks but 4 pictures" in faults[2]["message"] and faults[2]["dataset"] == "MagicBrush-Diff"
    counts = {name: (group["records"], group["views"], sum(group["left_out"].values())) for name, group in found["datasets"].items()}
    assert counts == {
        "HQ-Edit": (2, 4, 6),
        "MagicBrush-Diff": (0, 0, 1),
        "nuscenes": (1, 2, 0),
        "twitter_post": (0, 0, 1),
        "m4_instruct_annotations": (0, 0, 1),
        "m4_instruct_video": (1, 3, 2),
    }
    kept = {name: group["records"] for name, group in found["scenarios"].items()}
    assert kept == {"multi-image": 2, "multi-view": 1, "video": 1, "single-image": 0, "text": 0}
    assert found["scenarios"]["video"]["left_out"] == {"unreadable file": 2}
    with Image.open(out / "lengths.png") as picture:
        assert picture.mode == "RGBA" and picture.getpixel((2, 2))[3] == 0 and picture.width > 800


def test_the_index_of_a_check_is_the_one_that_training_finds(recipe, m4_folder, capsys, monkeypatch):
    command(recipe, "--out", m4_folder / "check", "--json")
    found = json.loads(capsys.readouterr().out)
    config, spec = read_settings(recipe)
    unreadable = [name for name, kind in FAULTS.items() if kind == "unreadable file"]
    with monkeypatch.context() as patch:
        patch.setattr("llava_fast.training.index.examine_all", None)
        said = []
        data = index_records(dataclasses.replace(config, on_bad_record="skip"), spec, said.append)
        assert str(data.records.folder) == found["index"] and len(said) == len(FAULTS) - len(unreadable)
        # Its rows do not depend on who looked; what only headers show is known to a run that would stop at it.
        assert len(data.records) == 4 + len(unreadable)
        said = []
        index_records(config, spec, said.append)
        assert len(said) == len(FAULTS) and sum("not a picture" in message for message in said) == 1
        Image.new("RGB", (20, 20)).save(m4_folder / "HQ-Edit" / "cut.jpg")
        said = []
        index_records(config, spec, said.append)
        assert len(said) == len(FAULTS) - 1
    good = [i for i in range(len(data.records)) if not any(f"id {name!r})" in data.records[i].where for name in unreadable)]
    assert sum(group["tokens"] for group in found["scenarios"].values()) == data.tokens[good].sum()
    assert sum(group["labels"] for group in found["scenarios"].values()) == data.records.labels[good].sum()
    assert found["rows"] == 1 and found["fill"] == pytest.approx(data.tokens.sum() / 500)
    again = index_records(dataclasses.replace(config, index_dir=str(m4_folder / "other")), spec, said.append)
    assert again.fingerprint == data.fingerprint and (again.tokens == data.tokens).all()


def test_names_are_shown_as_they_are(m4_folder, capsys):
    """Not as rich's markup, and nothing of them moves the terminal's cursor."""
    records = [m4(i, name, "What?", "That.") for i, name in enumerate(["[red]", "[/nothing]", "a\x1b[2Jb"])]
    (m4_folder / "names.json").write_text(json.dumps(records))
    assert command(m4_folder / "names.json", "--out", m4_folder / "[blue]check") == 0
    said = capsys.readouterr().out
    assert "[red]" in said and "[/nothing]" in said and "a\ufffd[2Jb" in said and "\x1b" not in said


def test_half_a_character_is_named(m4_folder, checkpoints):
    records = [talk("half", "What?", "That \ud83d."), talk("raw", "What?", "That."), talk("whole", "What?", "That \U0001f600 \\ud83d.")]
    text = "\n".join(json.dumps(record, ensure_ascii=record["id"] != "raw") for record in records)
    data = text.encode().replace(
        b'"value": "What?"}, {"from": "gpt", "value": "That."', b'"value": "\xed\xa0\xbd"}, {"from": "gpt", "value": "x"'
    )
    (m4_folder / "half.jsonl").write_bytes(data)
    assert command(m4_folder / "half.jsonl", "--model", checkpoints["qwen"], "--out", m4_folder / "check") == 1
    faults = [json.loads(line) for line in (m4_folder / "check" / "faults.jsonl").read_text().splitlines()]
    assert [(fault["record"], fault["kind"]) for fault in faults] == [(0, "not a record"), (1, "not a record")]
    for number, fault in enumerate(faults):
        assert (
            fault["message"]
            == f"{m4_folder / 'half.jsonl'}, record {number}: broken text: half of a character, '\\ud83d', without the other"
        )


PAIR = {"id": "good", "prompt": "What?", "chosen": "Red.", "rejected": "Blue."}


def test_pairs_and_what_a_run_is_validated_on(recipe, m4_folder, capsys):
    """A recipe with `dpo` has pairs, whose faults are those that training would name."""
    pairs = [
        PAIR,
        {**PAIR, "id": "tiles", "prompt": "<image>What?", "image": "HQ-Edit/1.jpg"},
        {**PAIR, "id": "lacks", "chosen": None},
        {**PAIR, "id": "marks", "prompt": "<image><image>?", "image": "HQ-Edit/1.jpg"},
        {**PAIR, "id": "gone", "image": "gone.jpg"},
        {**PAIR, "id": "cut", "image": "HQ-Edit/cut.jpg"},
        {**PAIR, "id": "long", "prompt": "What? " * 600},
        {**PAIR, "id": "other", "chosen": [{"role": "user", "content": "And?"}, {"role": "assistant", "content": "No."}]},
        talk("record", "What?", "That."),
    ]
    (m4_folder / "pairs.json").write_text(json.dumps(pairs))
    (m4_folder / "held.json").write_text(json.dumps([PAIR, {**PAIR, "id": "held", "prompt": 5}]))
    fields = {**json.loads(recipe.read_text()), "data": [str(m4_folder / "pairs.json")], "validation_data": [str(m4_folder / "held.json")]}
    fields["inputs"] = {"num_frames": 3, "anyres": True}
    recipe.write_text(json.dumps({**fields, "dpo": True, "too_long": "skip"}))
    assert command(recipe, "--out", m4_folder / "check", "--json") == 1
    assert json.loads(capsys.readouterr().out)["faults"] == 6  # what is too long is to be left out
    recipe.write_text(json.dumps({**fields, "dpo": True}))
    assert command(recipe, "--out", m4_folder / "check", "--json") == 1
    found = json.loads(capsys.readouterr().out)
    faults = named(m4_folder / "check" / "faults.jsonl")
    kinds = {"lacks": "not a record", "marks": "marks and pictures", "gone": "missing file", "cut": "unreadable file", "long": "too long"}
    assert {name: fault["kind"] for name, fault in faults.items()} == {
        **kinds,
        "other": "turns",
        "record": "not a record",
        "held": "not a record",
    }
    assert found["faults"] == 7 and found["validation"]["faults"] == 1 and found["index"] is None
    config, spec = read_settings(recipe)
    said = []
    indexed = index_pairs(config, spec, said.append)
    assert set(said) == {fault["message"] for name, fault in faults.items() if name != "held"}
    assert found["datasets"]["pairs"]["records"] == 2 and found["datasets"]["pairs"]["tokens"] == indexed.tokens.sum()
    assert found["rows"] == 1 and found["fill"] == pytest.approx(indexed.tokens.sum() / 500)
    assert command(recipe, "--out", m4_folder / "check") == 1
    shown = capsys.readouterr()
    assert "validation:" in shown.out and "validation: 1 rows" in shown.err and "8 faults" in shown.err
    recipe.write_text(json.dumps({**fields, "dpo": True, "data": str(m4_folder / "mix.yaml")}))
    (m4_folder / "mix.yaml").write_text("datasets: [{json_path: pairs.json}, {json_path: shard.tar}]")
    (m4_folder / "shard.tar").write_bytes(b"")
    assert command(recipe, "--out", m4_folder / "check") == 2
    assert "preferences are a .json or .jsonl file" in capsys.readouterr().err


def test_validation_records_have_an_index_of_their_own(recipe, m4_folder, capsys, monkeypatch):
    (m4_folder / "held.json").write_text(json.dumps([talk("a", "What?", "That."), talk("b", "What?", "")]))
    recipe.write_text(json.dumps({**json.loads(recipe.read_text()), "validation_data": [str(m4_folder / "held.json")]}))
    assert command(recipe, "--out", m4_folder / "check", "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert found["faults"] == len(FAULTS) and found["validation"]["faults"] == 1
    held = found["validation"]["datasets"]["held"]
    assert held["records"] == 1 and held["left_out"] == {"empty answer": 1}
    monkeypatch.setattr("llava_fast.training.index.examine_all", None)
    config, spec = read_settings(recipe)
    held_out = index_records(dataclasses.replace(config, data=config.validation_data, on_bad_record="skip"), spec, lambda message: None)
    assert str(held_out.records.folder) == found["validation"]["index"] and len(held_out.records) == 1


def test_headers_of_frames_are_read(recipe, m4_folder):
    """Of those that are taken: the first, the middle and the last of five."""
    frames = m4_folder / "train_300k" / "v1"
    for i in (3, 4):
        Image.new("RGB", (32, 24)).save(frames / f"c01_{i:04}.jpeg")
    data = [{**talk("v1", "<image>\nWho?", "Nobody."), "video": "train_300k/v1"}]
    (m4_folder / "m4_instruct_video.json").write_text(json.dumps(data))
    (m4_folder / "m4_instruct_annotations.json").write_text("[]")

    def check():
        return command(recipe, "--out", m4_folder / "check", "--json"), (m4_folder / "check" / "faults.jsonl").read_text()

    assert check() == (0, "")
    sound = (frames / "c01_0002.jpeg").read_bytes()
    (frames / "c01_0001.jpeg").write_bytes(b"no picture")
    assert check() == (0, "")
    (frames / "c01_0002.jpeg").write_bytes(b"no picture")
    code, faults = check()
    assert code == 1 and json.loads(faults)["kind"] == "unreadable file" and "c01_0002.jpeg" in faults and "not a picture" in faults
    (frames / "c01_0002.jpeg").write_bytes(sound)
    Image.new("RGB", (24, 32)).save(frames / "c01_0004.jpeg")
    code, faults = check()
    assert code == 1 and "has frames of 32x24 and 24x32" in faults


def test_frames_are_counted_without_a_model(m4_folder):
    (m4_folder / "v.json").write_text(json.dumps([{**talk("v1", "<image>\nWho?", "Nobody."), "video": "train_300k/v1"}]))
    config, spec = read_settings(m4_folder / "v.json")
    assert check_data(config, spec, m4_folder / "check").by(0)["v"].views == 16


def test_sound_data_and_the_tables(recipe, m4_folder, checkpoints, capsys):
    good = m4_folder / "good.json"
    records = json.loads((m4_folder / "m4_instruct_annotations.json").read_text())
    good.write_text(json.dumps(records[:2]))
    assert command(good, "--model", checkpoints["qwen"], "--out", m4_folder / "check") == 0
    said = capsys.readouterr()
    assert "HQ-Edit" in said.out and "multi-image" in said.out and "an epoch" in said.err
    assert (m4_folder / "check" / "faults.jsonl").read_text() == ""
    assert command(good, "--media-folder", m4_folder / "HQ-Edit", "--out", m4_folder / "check") == 1
    said = capsys.readouterr()
    assert "2 missing file" in said.out and "not counted" in said.err and "2 faults" in said.err


def test_too_long_on_purpose_is_no_fault(recipe, m4_folder):
    records = json.loads((m4_folder / "m4_instruct_annotations.json").read_text())
    (m4_folder / "m4_instruct_annotations.json").write_text(json.dumps([records[0], records[9]]))
    (m4_folder / "m4_instruct_video.json").write_text("[]")
    fields = json.loads(recipe.read_text())
    recipe.write_text(json.dumps({**fields, "too_long": "skip"}))
    assert command(recipe, "--out", m4_folder / "check", "--json") == 0
    assert len((m4_folder / "check" / "faults.jsonl").read_text().splitlines()) == 1
    recipe.write_text(json.dumps(fields))
    assert command(recipe, "--out", m4_folder / "check", "--json") == 1


def test_ctrl_c_shows_what_was_found_and_leaves_no_index(recipe, m4_folder, capsys, monkeypatch):
    monkeypatch.setattr("llava_fast.training.workers.CHUNK", 4)
    config, spec = read_settings(recipe)

    def stop(seen, total):
        if seen == 8:
            signal.raise_signal(signal.SIGINT)

    summary = check_data(config, spec, m4_folder / "check", stop)
    assert summary.stopped and summary.faults == 5 and sum(group.records for group in summary.groups.values()) == 3
    assert len((m4_folder / "check" / "faults.jsonl").read_text().splitlines()) == 5
    assert not [path for path in (m4_folder / "index").iterdir() if path.is_dir()]

    def stopped(*arguments):
        return summary

    monkeypatch.setattr(check_module, "check_data", stopped)
    assert command(recipe, "--out", m4_folder / "check") == 130
    assert "stopped before the end" in capsys.readouterr().err


def test_headers_of_videos_are_read(m4_folder, tmp_path):
    with av.open(str(tmp_path / "sound.mp4"), "w") as out:
        stream = out.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(5):
            for packet in stream.encode(av.VideoFrame.from_image(Image.new("RGB", (64, 48)))):
                out.mux(packet)
        for packet in stream.encode():
            out.mux(packet)
    (m4_folder / "v.json").write_text(json.dumps([talk(name, "<image>\nWho?", "I.", video=name) for name in ("sound.mp4", "clip.mp4")]))
    config, spec = read_settings(m4_folder / "v.json")
    assert spec is None
    summary = check_data(config, spec, m4_folder / "check")
    assert summary.faults == 1 and summary.by(0)["v"].records == 1
    assert not (m4_folder / "check" / "lengths.png").exists()


@pytest.mark.parametrize(
    "text, message",
    [("model: 3", "lacks data, output_dir"), ("{", "not valid YAML"), ("datasets: [{json_path: none.json}]", "no data file none.json")],
)
def test_recipes_that_are_none(tmp_path, capsys, text, message):
    (tmp_path / "r.yaml").write_text(text)
    assert command(tmp_path / "r.yaml", "--out", tmp_path / "check") == 2
    assert message in capsys.readouterr().err


def test_input_spec_is_that_of_the_loaded_model(checkpoints):
    import llava_fast as lf

    spec, loaded = checkpoint.input_spec(checkpoints["qwen"]), lf.load(checkpoints["qwen"]).input_spec
    assert repr(spec).replace(str(spec.tokenizer), "") == repr(loaded).replace(str(loaded.tokenizer), "")
