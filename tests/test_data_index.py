"""The index of a run's data: what it holds, when it is made anew, several processes, memory, cutting, pictures in front."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image
from reading import load_records

import llava_fast as lf
from llava_fast.inputs.labels import encode_turns
from llava_fast.inputs.records import Turn, pictures_in_front
from llava_fast.inputs.sources import find_sources
from llava_fast.training import workers
from llava_fast.training.config import TrainConfig
from llava_fast.training.dataset import RecordData, index_records
from llava_fast.training.examine import Job
from llava_fast.training.index import Index, build_index, index_folder, open_index
from llava_fast.training.workers import examine_all


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    return lf.load(tiny.make_checkpoint(tmp_path_factory.mktemp("model"), "qwen")).input_spec


def talk(number, *turns, **media):
    turns = turns or ("What?", f"That is {number}.")
    pairs = zip(["human", "gpt"] * len(turns), turns, strict=False)
    return {"id": number, **media, "conversations": [{"from": role, "value": text} for role, text in pairs]}


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "data"
    (folder / "frames").mkdir(parents=True)
    for i in range(4):
        Image.new("RGB", (60 + 20 * i, 40), (50 * i, 0, 0)).save(folder / f"{i}.png")
        Image.new("RGB", (32, 32)).save(folder / "frames" / f"{i}.png")
    records = [
        talk(0, "<image>\nWhat?", "Red.", image="0.png"),
        talk(1, "<image> or <image>?", "The second.", "And <image>?", "None.", image=["0.png", "1.png", "2.png"]),
        talk("x", "<video>\nWho?", "Nobody.", video="frames"),
        talk(3),
        talk(4, "<image>?", "yes", image=str(folder / "3.png")),
    ]
    (folder / "data.json").write_text(json.dumps(records))
    return folder


def config(folder, **changes) -> TrainConfig:
    fields = {"tokens_per_row": 500, "progress": False, **changes}
    return TrainConfig("m", str(folder / "data.json"), str(folder.parent / "out"), **fields)


def opened(config, spec) -> Index:
    return index_records(config, spec).records


def never(*_, **__):
    raise AssertionError("examined again")


# --- what it holds ---


@pytest.mark.parametrize("template", ["hf", "qwen_1_5", "qwen_1_5_eval"])
def test_an_index_holds_what_records_give(folder, spec, template):
    settings = config(folder, template=template, inputs={"num_frames": 3})
    index = opened(settings, spec)
    records = load_records(settings.data)
    assert len(index) == len(records) == 5
    for i, record in enumerate(records):
        counts = [3] if record.video else [1] * len(record.images)
        expected = encode_turns(record.turns, template, spec.tokenizer, spec.image_token_id, counts, spec.chat_template)
        ids, labels = index.ids_and_labels(i)
        assert ids.tolist() == expected.ids and labels.tolist() == expected.labels
        views = sum(counts) if record.media else 0
        assert index.views[i] == views and index.tokens[i] == len(ids) + 8 * views
        assert index.labels[i] == sum(label != -100 for label in expected.labels[1:])
        assert (index[i].where, index[i].images, index[i].video) == (record.where, record.images, record.video)
        assert index[i].scenario == record.scenario and index[i].dataset == "data" and index[i].dropped == 0
    assert [entry.scenario for entry in index[:4]] == ["single-image", "multi-image", "video", "text"]
    with pytest.raises(IndexError, match="record 5 of 5"):
        index[5]
    assert index.tokens.dtype == np.int64 and not index.tokens.flags.owndata


def test_media_of_shards_and_data_sets_train_like_files(folder, spec, tmp_path):
    """The same pictures and words as files, in a tar shard and in a saved data set."""
    import datasets
    import webdataset

    record = json.loads((folder / "data.json").read_text())[1]
    pictures = [(folder / name).read_bytes() for name in record.pop("image")]
    with webdataset.TarWriter(str(tmp_path / "s.tar")) as writer:
        writer.write({"__key__": "k", "json": record, **{f"{i}.png": data for i, data in enumerate(pictures)}})
    features = {
        "images": datasets.List(datasets.Image()),
        "conversations": datasets.List({k: datasets.Value("string") for k in ("from", "value")}),
    }
    rows = {"images": [[{"bytes": data, "path": None} for data in pictures]], "conversations": [record["conversations"]]}
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).save_to_disk(tmp_path / "saved")
    expected = index_records(config(folder), spec).load(1)
    for name in ("s.tar", "saved"):
        data = index_records(dataclasses.replace(config(folder), data=(str(tmp_path / name),)), spec)
        example = data.load(0)
        np.testing.assert_array_equal(example.sequences[0].token_ids, expected.sequences[0].token_ids)
        np.testing.assert_array_equal(example.sequences[0].labels, expected.sequences[0].labels)
        assert (example.views == expected.views).all() and data.tokens[0] == len(example.sequences[0])


def test_anyres_sizes_of_packed_pictures_are_read(spec, folder, tmp_path):
    import webdataset

    with webdataset.TarWriter(str(tmp_path / "s.tar")) as writer:
        writer.write({"__key__": "k", "json": talk(0), "png": (folder / "3.png").read_bytes()})
    settings = dataclasses.replace(config(folder, inputs={"anyres": True}), data=(str(tmp_path / "s.tar"), str(folder / "data.json")))
    data = index_records(settings, spec)
    assert data.views[0] == data.views[5] > 1
    assert data.load(0).views.shape[0] == data.views[0]


# --- found again, or made anew ---


def test_an_index_is_found_again(folder, spec, monkeypatch):
    first = opened(config(folder), spec)
    monkeypatch.setattr("llava_fast.training.index.examine_all", never)
    hosts = {"inputs": {"allowed_media_hosts": ["a.b"], "image_aspect": "pad"}}
    for free in (
        {},
        {"lr": 1.0},
        {"workers": 1},
        {"on_bad_record": "skip"},
        {"rows_per_step": 7},
        {"seed": 5},
        {"too_long": "skip"},
        hosts,
    ):
        again = opened(config(folder, **free), spec)
        assert again.folder == first.folder and again.fingerprint == first.fingerprint


@pytest.mark.parametrize(
    "change",
    [
        {"template": "qwen_1_5"},
        {"inputs": {"num_frames": 5}},
        {"inputs": {"keep_order": True}},
        {"tokens_per_row": 400},
        {"views_per_row": 40},
        {"seed": 1, "front_share": 0.1},
        {"front_share": 0.5},
        {"too_long": "cut"},
    ],
)
def test_a_setting_that_shapes_tokens_makes_a_new_index(folder, spec, change):
    assert opened(config(folder, **change), spec).folder != opened(config(folder), spec).folder


def test_the_model_and_its_tokenizer_are_settings_too(folder, spec, tmp_path):
    sources = find_sources([folder / "data.json"])
    other = lf.load(tiny.make_checkpoint(tmp_path / "llama", "llama")).input_spec
    changes = [
        spec,
        other,
        *(dataclasses.replace(spec, **c) for c in ({"chat_template": "x"}, {"grid": 4}, {"anyres": True}, {"image_token_id": 9})),
    ]
    assert len({index_folder(config(folder), each, sources) for each in changes}) == len(changes)


def test_what_shapes_no_tokens_is_not_in_the_key(folder, spec):
    """A seed decides where something is drawn; a tokenizer is not asked to cut or fill up."""
    (folder / "mix.yaml").write_text("datasets: [{json_path: data.json, sampling_strategy: 'random:3'}]")
    all_of_it, drawn = find_sources(folder / "data.json"), find_sources(folder / "mix.yaml")
    assert index_folder(config(folder, seed=1), spec, all_of_it) == index_folder(config(folder, seed=2), spec, all_of_it)
    assert index_folder(config(folder, seed=1), spec, drawn) != index_folder(config(folder, seed=2), spec, drawn)
    before = index_folder(config(folder), spec, all_of_it)
    cutting = copy.deepcopy(spec.tokenizer)
    cutting.backend_tokenizer.enable_truncation(5)
    cutting.backend_tokenizer.enable_padding(length=9)
    assert index_folder(config(folder), dataclasses.replace(spec, tokenizer=cutting), all_of_it) == before
    cutting.add_tokens(["another"])
    assert index_folder(config(folder), dataclasses.replace(spec, tokenizer=cutting), all_of_it) != before


def test_a_changed_source_makes_a_new_index(folder, spec):
    before = opened(config(folder), spec)
    records = json.loads((folder / "data.json").read_text())
    (folder / "data.json").write_text(json.dumps(records[::-1]))
    after = opened(config(folder), spec)
    assert after.folder != before.folder and after.fingerprint != before.fingerprint


def test_moved_data_are_found_again_unless_something_is_missing(folder, spec, tmp_path, monkeypatch):
    first = opened(config(folder, index_dir=str(tmp_path / "index")), spec)
    records = json.loads((folder / "data.json").read_text())
    moved = folder.rename(tmp_path / "moved")
    settings = config(moved, index_dir=str(tmp_path / "index"))
    with pytest.raises(ValueError, match="record 4.*no file .*data/3.png"):  # an absolute path has not moved with them
        index_records(settings, spec)
    folder.mkdir()
    shutil.copy(moved / "3.png", folder / "3.png")
    with monkeypatch.context() as patch:
        patch.setattr("llava_fast.training.index.examine_all", never)
        again = opened(settings, spec)
        patch.setattr("llava_fast.training.index._all_there", never)  # looked for once
        opened(settings, spec)
    assert again.folder == first.folder and again[0].images == (str(moved / "0.png"),) and again[4].images == (records[4]["image"],)
    (moved / "1.png").unlink()
    shutil.copytree(moved, tmp_path / "thrice")
    with pytest.raises(ValueError, match=f"{tmp_path}/thrice/data.json, record 1 .*no file {tmp_path}/thrice/1.png"):
        index_records(config(tmp_path / "thrice", index_dir=str(tmp_path / "index")), spec)


def test_a_missing_picture_that_comes_is_looked_at_again(folder, spec):
    picture = (folder / "1.png").read_bytes()
    (folder / "1.png").unlink()
    said = []
    for _ in range(2):  # made, and found again
        assert len(index_records(config(folder), spec, said.append).records) == 4
    assert len(said) == 2 and said[0] == said[1] and "1.png" in said[0]
    with pytest.raises(ValueError, match="no file"):
        index_records(config(folder), spec)
    (folder / "1.png").write_bytes(picture)
    assert len(index_records(config(folder), spec).records) == 5


def test_messages_name_files_where_they_are_now(folder, spec, tmp_path, monkeypatch):
    records = json.loads((folder / "data.json").read_text())[:4]
    records[3]["conversations"].reverse()
    (folder / "data.json").write_text(json.dumps(records))
    index_records(config(folder, index_dir=str(tmp_path / "index")), spec, lambda message: None)
    moved = folder.rename(tmp_path / "moved")
    said = []
    monkeypatch.setattr("llava_fast.training.index.examine_all", never)
    data = index_records(config(moved, index_dir=str(tmp_path / "index")), spec, said.append)
    assert len(said) == 1 and said[0].startswith(f"{moved}/data.json, record 3 (id 3): turns must be")
    assert data.records.faults[0].file == f"{moved}/data.json"


def test_changed_media_that_decide_lengths_are_seen_at_the_start(folder, spec, monkeypatch, caplog):
    settings = config(folder, inputs={"anyres": True, "fps": 2})
    before = index_records(settings, spec)
    Image.new("RGB", (500, 40)).save(folder / "0.png")
    after = index_records(settings, spec)
    assert after.tokens[0] > before.tokens[0] and after.load(0).views.shape[0] == after.views[0]
    assert f"{folder}/0.png has changed" in caplog.text
    (folder / "frames" / "1.png").unlink()
    assert index_records(settings, spec).views[2] == 3
    with monkeypatch.context() as patch:
        patch.setattr("llava_fast.training.index.examine_all", never)
        index_records(settings, spec)
    # Where there are many, some are looked at, and what the others were is seen when their row comes.
    monkeypatch.setattr("llava_fast.training.index.STAMPS", 1)
    many = index_records(dataclasses.replace(settings, index_dir=str(folder.parent / "few")), spec)
    assert len(many.records.facts["stamps"]) == 1
    Image.new("RGB", (60, 40)).save(folder / "3.png")  # fewer tiles
    again = index_records(dataclasses.replace(settings, index_dir=str(folder.parent / "few")), spec)
    assert again.fingerprint == many.fingerprint
    skipping = RecordData(again.records, dataclasses.replace(settings, on_bad_record="skip"), spec)
    for data in (skipping, again):
        assert index_records(dataclasses.replace(settings, index_dir=str(folder.parent / "few")), spec).fingerprint == many.fingerprint
        with pytest.raises(ValueError, match="its media have changed; the next run counts them anew"):
            data.load(4)
    few = dataclasses.replace(settings, index_dir=str(folder.parent / "few"))
    assert index_records(dataclasses.replace(few, on_bad_record="skip"), spec).fingerprint == many.fingerprint
    assert index_records(few, spec).load(4).views.shape[0] != many.views[4]


def test_media_that_changed_after_indexing_are_named(folder, spec):
    data = index_records(config(folder, inputs={"anyres": True}), spec)
    Image.new("RGB", (500, 40)).save(folder / "0.png")
    with pytest.raises(
        ValueError, match=r"record 0 \(id 0\): \d+ tokens and \d+ views, but \d+ and \d+ when it was indexed: its media have changed"
    ):
        data.load(0)
    settings = config(folder, inputs={"frames_upbound": 8})
    frames = index_records(settings, spec)
    (folder / "frames" / "0.png").unlink()
    (folder / "frames" / "1.png").unlink()
    with pytest.raises(ValueError, match=r"record 2 \(id 'x'\): .*its media have changed"):
        frames.load(2)


def test_sizes_are_part_of_what_a_run_knows_its_data_by(folder, spec):
    """A picture of another shape takes other tiles: no id or label changes, but where records lie in an epoch's rows does."""
    before = index_records(config(folder, inputs={"anyres": True}), spec)
    Image.new("RGB", (500, 40)).save(folder / "0.png")
    after = index_records(config(folder, inputs={"anyres": True}, index_dir=str(folder.parent / "again")), spec)
    assert before.tokens[0] != after.tokens[0] and before.fingerprint != after.fingerprint


# --- how it is written ---


def test_a_build_that_stops_leaves_nothing(folder, spec):
    settings = config(folder)
    place = index_folder(settings, spec, find_sources(settings.data))

    def stop(finding):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_index(settings, spec, stop)
    assert [path.name for path in place.parent.iterdir()] in ([], [place.name + ".lock"])
    assert len(opened(settings, spec)) == 5


def test_a_build_that_was_killed_is_cleaned_up(folder, spec):
    """Long after it: where locks do not reach, another machine may be at it."""
    settings = config(folder)
    place = index_folder(settings, spec, find_sources(settings.data))
    young, old = (place.with_name(f"{place.name}.partial-host-{i}") for i in (1, 2))
    for partial in (young, old):
        partial.mkdir(parents=True)
        (partial / "records.arrow").write_bytes(b"half")
    for path in (old, old / "records.arrow"):
        os.utime(path, (1e9, 1e9))
    opened(settings, spec)
    assert young.is_dir() and not old.exists()


@pytest.mark.parametrize("kill_at", [1, 2])
def test_a_kill_while_one_index_replaces_another(folder, spec, monkeypatch, kill_at):
    settings = config(folder)
    before = opened(settings, spec)
    job = Job(tuple(find_sources(settings.data)), settings, spec)
    renames = []

    def rename(source, target):
        if Path(source).suffix != ".new":
            renames.append(source)
        if len(renames) == kill_at:
            raise SystemExit  # as if by a signal: the next line does not run
        return real(source, target)

    real = os.replace
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr("llava_fast.training.index.os.replace", rename)
        build_index(job, before.folder, lambda finding: None)
    monkeypatch.setattr("llava_fast.training.index.examine_all", never)
    after = opened(settings, spec)
    assert after.folder == before.folder and after.fingerprint == before.fingerprint


@pytest.mark.parametrize("name", ["records.arrow", "sizes.arrow", "faults.jsonl", "index.json"])
@pytest.mark.parametrize("harm", ["cut", "empty", "gone"])
def test_an_index_that_cannot_be_read_is_made_anew(folder, spec, caplog, name, harm):
    (folder / "1.png").unlink()  # so that there is a fault
    before = index_records(config(folder), spec, lambda message: None)
    content = {path.name: path.read_bytes() for path in before.records.folder.iterdir()}
    path = before.records.folder / name
    path.unlink()
    if harm != "gone":
        path.write_bytes(content[name][: len(content[name]) // 2] if harm == "cut" else b"")
    after = index_records(config(folder), spec, lambda message: None)
    assert {path.name: path.read_bytes() for path in after.records.folder.iterdir()} == content
    assert "is made anew: it cannot be read" in caplog.text


def test_a_full_disk_is_an_error_and_leaves_nothing(folder, spec, monkeypatch):
    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("llava_fast.training.index._to_disk", full)
    with pytest.raises(ValueError, match="index could not be written to .*No space left"):
        opened(config(folder), spec)
    place = index_folder(config(folder), spec, find_sources(config(folder).data))
    assert not [path for path in place.parent.iterdir() if path.is_dir()]
    with pytest.raises(ValueError, match="index_dir .* cannot be made"):
        opened(config(folder, index_dir=str(folder / "data.json")), spec)


def test_who_wants_the_same_index_waits_for_it(folder, spec, monkeypatch):
    builds = []
    build = build_index
    monkeypatch.setattr("llava_fast.training.index.build_index", lambda *a, **k: builds.append(1) or build(*a, **k))
    found = []
    threads = [threading.Thread(target=lambda: found.append(opened(config(folder), spec))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(builds) == 1 and len(found) == 4 and {index.fingerprint for index in found} == {found[0].fingerprint}


@pytest.fixture
def many(folder):
    """2,500 records, some of them bad, so that batches are not what processes give."""
    records = [talk(i, "What?", f"Answer {i} " * (i % 7 + 1)) for i in range(2500)]
    for i in (0, 700, 701, 2499):
        records[i]["conversations"].reverse()
    (folder / "data.json").write_text(json.dumps(records))
    return folder


def test_several_processes_write_the_same_index(many, spec, tmp_path):
    job = Job(tuple(find_sources(many / "data.json")), config(many), spec)
    seen = []
    one, two = (
        build_index(job, tmp_path / str(n), lambda finding: None, processes=n, progress=lambda done, total: seen.append((done, total)))
        for n in (1, 2)
    )
    assert len(one) == 2496 and seen[-1] == (2500, 2500)
    for name in ("records.arrow", "sizes.arrow", "faults.jsonl"):
        assert (one.folder / name).read_bytes() == (two.folder / name).read_bytes(), name
    assert [fault.record for fault in two.faults] == [0, 700, 701, 2499]
    for i in (0, 1023, 1024, 2495):
        assert spec.tokenizer.decode(one.ids_and_labels(i)[0]).count("Answer") == one[i].where.count("id") * (
            int(one[i].where.split()[-1][:-1]) % 7 + 1
        )


def test_a_process_that_dies_and_one_that_fails_are_named(many, spec, monkeypatch):
    job = Job(tuple(find_sources(many / "data.json")), config(many), spec)
    monkeypatch.setattr(workers, "WORKER", "import os, sys; sys.stdin.buffer.read(100); os._exit(9)")
    with pytest.raises(RuntimeError, match=r"looked at records \d+ to \d+ of .*data.json has died \(exit code 9\)"):
        list(examine_all(job, processes=2))
    broken = (
        "from llava_fast.training import examine, workers\n"
        "def fail(*_): raise ZeroDivisionError('oops')\nexamine.check_record = fail\nworkers.serve()"
    )
    monkeypatch.setattr(workers, "WORKER", broken)
    with pytest.raises(RuntimeError, match=r"(?s)ZeroDivisionError: oops.*data.json, record 0 \(id 0\)"):
        list(examine_all(job, processes=2))


def test_findings_wait_for_whoever_takes_them(many, spec, monkeypatch):
    """So that a slow disk is no reason to hold the whole data set in memory."""
    monkeypatch.setattr(workers, "CHUNK", 10)
    job = Job(tuple(find_sources(many / "data.json")), config(many), spec)
    submitted = []
    submit = workers.ThreadPoolExecutor.submit
    monkeypatch.setattr(workers.ThreadPoolExecutor, "submit", lambda self, *a: submitted.append(a) or submit(self, *a))
    findings = examine_all(job, processes=2)
    for taken in range(3):
        assert next(findings).rows.num_rows in (9, 10)
        assert len(submitted) - 2 <= taken + 1 + 2 * 2
    findings.close()


def test_processes_that_cannot_be_started_leave_none(many, spec, monkeypatch):
    job = Job(tuple(find_sources(many / "data.json")), config(many), spec)
    started = []
    start = subprocess.Popen

    def second_fails(*a, **k):
        if started:
            raise OSError(11, "Resource temporarily unavailable")
        started.append(start(*a, **k))
        return started[0]

    monkeypatch.setattr(workers.subprocess, "Popen", second_fails)
    with pytest.raises(OSError, match="temporarily unavailable"):
        list(examine_all(job, processes=2))
    assert started[0].poll() is not None


@pytest.mark.parametrize(
    "files, group, expected",
    [
        ({}, "0::/", 64),
        ({"cpu.max": "max 100000"}, "0::/", 64),
        ({"cpu.max": "150000 100000"}, "0::/", 2),
        ({"a/cpu.max": "300000 100000", "a/b/cpu.max": "max 100000"}, "0::/a/b", 3),
        ({"a/cpu.max": "300000 100000", "a/b/cpu.max": "50000 100000"}, "0::/a/b", 1),
        ({"cpu.max": "300000 100000"}, "0::/host/only", 3),
        ({"cpu/d/cpu.cfs_quota_us": "400000", "cpu/d/cpu.cfs_period_us": "100000"}, "5:memory:/x\n4:cpu,cpuacct:/d", 4),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, "4:cpu,cpuacct:/d", 64),
    ],
)
def test_cores_that_a_container_pays_for(tmp_path, monkeypatch, files, group, expected):
    monkeypatch.setattr(workers.os, "sched_getaffinity", lambda process: set(range(64)), raising=False)
    for name, text in files.items():
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).write_text(text + "\n")
    (tmp_path / "own").write_text(group + "\n")
    assert workers.cores(tmp_path / "root", tmp_path / "own") == expected
    assert workers.cores(tmp_path / "root", tmp_path / "none") == 64


SYNTHETIC = """
import sys
from pathlib import Path
import numpy as np, pyarrow as pa
from llava_fast.training.examine import Finding, schema
from llava_fast.training.index import Index, _Writer
from llava_fast.inputs.sources import Source

def lists(values, length):
    return pa.ListArray.from_arrays(pa.array(np.arange(0, len(values) + 1, length, dtype=np.int32)), pa.array(values.astype(np.int32)))

def write(folder, records, n):
    folder.mkdir()
    writer = _Writer(folder)
    columns = {
        "source": np.zeros(n), "record": np.arange(n), "id": ["record"] * n, "dataset": ["set"] * n, "scenario": np.zeros(n),
        "video": np.zeros(n, bool), "dropped": np.zeros(n), "media": [["folder/picture.jpg"] * 3] * n, "ids": None,
        "spans": lists(np.tile([150, 200], n), 2), "tokens": np.full(n, 2387), "views": np.full(n, 3), "labels": np.full(n, 50),
        "crc": np.arange(n, dtype=np.uint32),
    }
    types = {field.name: field.type for field in schema()}
    arrays = {name: column if isinstance(column, pa.Array) else pa.array(column, types[name])
              for name, column in columns.items() if column is not None}
    for start in range(0, records, n):
        arrays["ids"] = lists(np.arange(start, start + n * 200), 200)
        writer.add(Finding(pa.record_batch([arrays[name] for name in types], schema=schema()), []))
    writer.close({"folders": [], "cut": 0, "stamps": [], "faults": [0, 0]})

write(Path(sys.argv[1]), 1000, 1000)
write(Path(sys.argv[2]), 300_000, 5000)
"""
MEASURE = """
import sys, time
from pathlib import Path
import numpy as np
from llava_fast.inputs.sources import Source
from llava_fast.training.index import Index
import pyarrow

def anonymous():
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1])

Index(Path(sys.argv[1]), [Source(Path("a.json"), Path("."))]).ids_and_labels(0)
before = anonymous()
began = time.perf_counter()
index = Index(Path(sys.argv[2]), [Source(Path("a.json"), Path("."))])
seconds = time.perf_counter() - began
total = int(index.tokens.sum() + index.views.sum())
for i in np.random.default_rng(0).integers(0, len(index), 3000):
    assert index.ids_and_labels(int(i))[0].shape == (200,)
    assert index[int(i)].images[2] == "./folder/picture.jpg"
print(len(index), anonymous() - before, seconds)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_does_not_grow_with_the_data(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(lf.__file__).parent.parent), *filter(None, sys.path)])}

    def python(script, *arguments):
        done = subprocess.run(
            [sys.executable, "-c", script, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    python(SYNTHETIC, tmp_path / "small", tmp_path / "large")
    size = sum(path.stat().st_size for path in (tmp_path / "large").iterdir()) / 1e6
    count, grown, seconds = python(MEASURE, tmp_path / "small", tmp_path / "large")
    print(f"{count} records, {size:.0f} MB: opened in {float(seconds):.3f} s, anonymous memory grew by {grown} kB")
    assert size > 250 and int(grown) < 10_000 and float(seconds) < 1


# --- too long, and pictures in front ---


@pytest.fixture
def long(folder):
    turns = [text for i in range(6) for text in (f"<image>{'what ' * 20}?" if i % 2 == 0 else f"and {i}?", f"Answer {i}.")]
    records = [talk("long", *turns, image=["0.png", "1.png", "2.png"]), talk("hopeless", "what " * 200, "No."), talk("short")]
    (folder / "data.json").write_text(json.dumps(records))
    return folder


def test_too_long_is_refused_skipped_or_cut_at_turns(long, spec):
    with pytest.raises(ValueError, match=r"record 0 \(id 'long'\): \d+ tokens, more than the 120"):
        index_records(config(long, tokens_per_row=120), spec)
    said = []
    assert len(index_records(config(long, tokens_per_row=120, too_long="skip"), spec, note=said.append).records) == 1
    assert len(said) == 2 and "'long'" in said[0] and "'hopeless'" in said[1]
    said.clear()
    data = index_records(config(long, tokens_per_row=120, too_long="cut"), spec, said.append)
    assert len(said) == 1 and "'hopeless'" in said[0]
    assert len(data.records) == 2 and data.tokens[0] <= 120 and data.records.facts["cut"] == 1
    entry = data.records[0]
    kept = (12 - entry.dropped) // 2
    assert 0 < entry.dropped < 12 and entry.dropped % 2 == 0
    text = spec.tokenizer.decode(data.records.ids_and_labels(0)[0])
    assert f"Answer {kept - 1}." in text and f"Answer {kept}." not in text
    assert len(entry.images) == (kept + 1) // 2 == data.views[0]
    assert data.load(0).views.shape[0] == data.views[0] and len(data.load(0).sequences[0]) == data.tokens[0]
    # One question and answer more would not have fitted.
    whole = index_records(config(long, tokens_per_row=500), spec, said.append)
    (more,) = [r for r in load_records(config(long).data) if "'long'" in r.where]
    one_more = dataclasses.replace(more, turns=more.turns[: 2 * kept + 2])
    counts = [1] * sum(turn.text.count("<image>") for turn in one_more.turns)
    ids = encode_turns(one_more.turns, "hf", spec.tokenizer, spec.image_token_id, counts, spec.chat_template).ids
    assert len(ids) + 8 * len(counts) > 120 and len(whole.records) == 2


def test_what_is_cut_goes_to_the_front_only_then(long, spec):
    """Pictures of the turns that leave do so with them, wherever those that stay are shown."""
    common = {"views_per_row": 2, "too_long": "cut", "template": "qwen_1_5"}
    inside = index_records(config(long, **common), spec, lambda message: None)
    front = index_records(config(long, **common, front_share=1), spec, lambda message: None)
    assert inside.views[0] == front.views[0] == 2 and front.records[0].dropped == inside.records[0].dropped == 4
    assert len(front.records[0].images) == 2 and front.load(0).views.shape[0] == 2
    text = spec.tokenizer.decode(front.records.ids_and_labels(0)[0])
    assert text.count("<image>") == 2 and "<image><image>" in text and "(image 2)" in text and "(image 3)" not in text


def test_views_past_the_budget_are_cut_too(long, spec):
    data = index_records(config(long, views_per_row=2, too_long="cut"), spec, lambda message: None)
    assert data.views[0] == 2 and data.records[0].dropped == 4
    with pytest.raises(ValueError, match="'long'.*3 views, more than views_per_row 2"):
        index_records(config(long, views_per_row=2), spec)


def test_cut_records_are_counted_aloud(long, spec, capsys):
    settings = config(long, tokens_per_row=120, too_long="cut", on_bad_record="skip", progress=True)
    for _ in range(2):
        index_records(settings, spec, lambda message: None)
        said = " ".join(capsys.readouterr().out.split())
        assert "2 records in" in said and "1 cut at a turn's end" in said and "left out: 1 too long" in said


@pytest.mark.parametrize(
    "before, after",
    [
        (["<image><image>\nWhat?"], ["<image><image>\nWhat?"]),
        (["From <image> to <image>?"], ["<image><image>\nFrom (image 1) to (image 2)?"]),
        (["<image>\nFirst <image>."], ["<image><image>\nFirst (image 2)."]),
        (["<image>\nFirst?", "a", "<image>\nSecond?"], ["<image><image>\nFirst?", "a", "(image 2)\nSecond?"]),
        (["Hello", "a", "<image><image>\nBoth?"], ["<image><image>\nHello", "a", "(image 1)(image 2)\nBoth?"]),
    ],
)
def test_pictures_in_front(before, after):
    def turns(texts):
        return tuple(Turn(role, text) for role, text in zip(["user", "assistant"] * 2, texts, strict=False))

    assert pictures_in_front(turns(before)) == turns(after)
    assert pictures_in_front((Turn("system", "s"), *turns(before))) == (Turn("system", "s"), *turns(after))


def test_the_share_of_records_in_front_is_drawn_by_the_seed(folder, spec):
    records = [talk(i, "From <image> to <image>?", f"{i}", image=["0.png", "1.png"]) for i in range(400)] + [
        talk("one", "A <image>?", "b", image="0.png")
    ]
    (folder / "data.json").write_text(json.dumps(records))

    def front(**changes):
        index = opened(config(folder, template="qwen_1_5", **changes), spec)
        return [i for i in range(len(index)) if "(image 2)" in spec.tokenizer.decode(index.ids_and_labels(i)[0])]

    drawn = front(front_share=0.25)
    assert 70 < len(drawn) < 130 and drawn == front(front_share=0.25, lr=1.0)
    assert drawn != front(front_share=0.25, seed=1)
    assert set(drawn) < set(front(front_share=0.5)) and front() == [] and front(front_share=1) == list(range(400))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"too_long": "drop"}, "too_long must be refuse or skip or cut"),
        ({"front_share": 1.5}, r"front_share must be in \[0, 1\], got 1.5"),
        ({"index_dir": 3}, "index_dir must be a directory"),
    ],
)
def test_settings_out_of_range(folder, fields, message):
    with pytest.raises(ValueError, match=message):
        config(folder, **fields)


@pytest.mark.parametrize("inputs, views, tokens", [({"num_frames": 10}, 10, 90), ({"num_frames": 40, "pool": "average"}, 40, 40)])
def test_few_whole_frames_or_many_pooled_ones(folder, spec, inputs, views, tokens):
    """Frames and pooling of training are the recipe's; those of inference are given to `generate`."""
    data = index_records(config(folder, inputs=inputs), spec)
    assert data.views[2] == views == data.load(2).views.shape[0]
    assert data.load(2).sequences[0].visual_tokens == tokens
