"""Sources of records: large JSON lists in blocks, brace lists, mixtures, tar shards, saved data sets; what is broken is named."""

from __future__ import annotations

import io
import json
import tarfile

import datasets
import numpy as np
import pytest
import webdataset
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from reading import load_records

from llava_fast.inputs import sources as sources_module
from llava_fast.inputs.media import Packed, read_media
from llava_fast.inputs.records import BadRecord
from llava_fast.inputs.sources import Source, find_sources, parse, read

TALK = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]


def entries(source: Source) -> list:
    return [parse(raw, "here") for raw in read(source, source.places())]


def jpeg(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (8, 12, 3), dtype=np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


# --- JSON ---

JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-1000, 10**20), st.floats(allow_nan=False), st.text(max_size=12)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None)
@example(values=[0.5, 1e300, -2, True, [], {}], indent=None, ascii=True, block=1, mark=False)
@example(values=[0.5, 1e300, -2, True, [], {}], indent=2, ascii=True, block=3, mark=True)
@given(
    values=st.lists(JSON, max_size=6),
    indent=st.sampled_from([None, 0, 2]),
    ascii=st.booleans(),
    block=st.integers(1, 40),
    mark=st.booleans(),
)
def test_json_lists_are_cut_where_json_says(tmp_path_factory, values, indent, ascii, block, mark):
    path = tmp_path_factory.mktemp("json") / "data.json"
    text = json.dumps(values, indent=indent, ensure_ascii=ascii)
    path.write_bytes((b"\xef\xbb\xbf" if mark else b"") + text.encode("utf-8", "surrogatepass") + b" \n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources_module, "BLOCK", block)
        spans = Source(path, path.parent).places()
    data = path.read_bytes()
    assert [json.loads(data[start:end]) for start, end in spans] == values


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "not valid JSON"),
        ("[", "not valid JSON"),
        ('[{"a": 1}', "not valid JSON"),
        ('[{"a": 1} {"a": 2}]', "expected a comma after record 0, at byte 10"),
        ('[{"a": 1}, {"a": 2,}]', "not valid JSON.*in the record 1, at byte 11"),
        ('[{"a": 1},]', "not valid JSON.*in the record 1"),
        ('[{"a": 1}] x', "more follows the list, at byte 11"),
        ('{"a": 1}', "must hold a list of records, got dict"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
@pytest.mark.parametrize("block", [4, 1 << 20])
def test_broken_json_is_found_whatever_the_block(tmp_path, text, message, block, monkeypatch):
    monkeypatch.setattr(sources_module, "BLOCK", block)
    (tmp_path / "data.json").write_text(text)
    with pytest.raises(ValueError, match=f"data.json .*{message}"):
        Source(tmp_path / "data.json", tmp_path).places()


def test_a_broken_line_is_one_bad_record(tmp_path):
    (tmp_path / "data.jsonl").write_bytes(json.dumps({"conversations": TALK}).encode() + b"\n\n{\n\xff\xfe\n" + b"[" * 100_000 + b"\n5\n")
    said = []
    assert len(load_records(tmp_path / "data.jsonl", on_bad=said.append)) == 1
    assert [message.split(", ")[1].split(":")[0] for message in said] == [f"record {number}" for number in (1, 2, 3, 4)]
    assert "not valid JSON" in said[0] and "not valid JSON" in said[1] and "got int" in said[3]


# --- names ---


def test_braces_ranges_and_wild_cards(tmp_path):
    for name in ("part1.json", "part2.json", "x-08.json", "x-09.json", "x-10.json"):
        (tmp_path / name).write_text("[]")

    def names(pattern):
        return [source.path.name for source in find_sources(str(tmp_path / pattern))]

    assert names("part{1,2}.json") == ["part1.json", "part2.json"]
    assert names("x-{08..10}.json") == ["x-08.json", "x-09.json", "x-10.json"]
    assert names("x-{10..08}.json") == ["x-10.json", "x-09.json", "x-08.json"]
    assert names("x-*.json") == ["x-08.json", "x-09.json", "x-10.json"]
    (tmp_path / "mix.yaml").write_text("datasets: [{json_path: 'part{1,2}.json', sampling_strategy: 'first:1'}, {json_path: x-08.json}]")
    assert [(s.path.name, s.strategy) for s in find_sources([tmp_path / "mix.yaml"])] == [
        ("part1.json", "first:1"),
        ("part2.json", "first:1"),
        ("x-08.json", "all"),
    ]
    assert find_sources(tmp_path / "part1.json", "/media")[0].folder.as_posix() == "/media"


@pytest.mark.parametrize(
    "name, message",
    [
        ("part{1,3}.json", "no data file .*part3.json"),
        ("y-*.json", "no data file .*y-"),
        ("data.csv", "data.csv is no source of records"),
        ("folder", "folder is no source of records"),
        ("bad.yaml", "not valid YAML"),
    ],
)
def test_names_that_are_no_source(tmp_path, name, message):
    (tmp_path / "folder").mkdir()
    for file, text in (("part1.json", "[]"), ("data.csv", ""), ("bad.yaml", "{")):
        (tmp_path / file).write_text(text)
    with pytest.raises(ValueError, match=message):
        find_sources(tmp_path / name)


# --- tar shards ---


@pytest.fixture
def shard(tmp_path):
    path = tmp_path / "shard-000.tar"
    with webdataset.TarWriter(str(path)) as writer:
        writer.write({"__key__": "a/one", "json": {"conversations": TALK}, "jpg": jpeg(1)})
        writer.write({"__key__": "a/two", "json": {"id": 7, "conversations": TALK}, "0.jpg": jpeg(2), "1.jpg": jpeg(3)})
        named = {"image": ["1.jpg", "two.0.jpg"], "conversations": TALK}
        writer.write({"__key__": "b/two", "json": named, "0.jpg": jpeg(4), "1.jpg": jpeg(5)})
        writer.write({"__key__": "c", "json": {"conversations": TALK}})
        writer.write({"__key__": "d", "json": {"conversations": TALK}, "mp4": b"frames"})
    return path


def test_tar_shards_hold_what_webdataset_reads(shard):
    found = entries(find_sources(shard)[0])
    theirs = list(webdataset.WebDataset(str(shard), shardshuffle=False))
    assert [entry["id"] for entry in found] == [sample["__key__"] if sample["__key__"] != "a/two" else 7 for sample in theirs]
    wanted = [["jpg"], ["0.jpg", "1.jpg"], ["1.jpg", "0.jpg"], []]
    for entry, sample, names in zip(found, theirs, wanted, strict=False):
        assert [read_media(picture) for picture in entry.get("image") or []] == [sample[name] for name in names]
    assert read_media(found[4]["video"]) == b"frames" and "image" not in found[4]


def test_records_of_a_shard_and_its_faults(shard, tmp_path):
    with tarfile.open(tmp_path / "more.tar", "w") as tar:
        for name, data in (
            ("x.jpg", b"picture"),
            ("y.json", b"{"),
            ("z.json", json.dumps({"image": "z.png", "conversations": TALK}).encode()),
            ("w.json", b"[]"),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    said = []
    records = load_records([shard, tmp_path / "more.tar"], on_bad=said.append)
    assert [(record.where.rpartition("id ")[2], len(record.images), record.video is not None) for record in records] == [
        ("'a/one')", 1, False),
        ("7)", 2, False),
        ("'b/two')", 2, False),
        ("'c')", 0, False),
        ("'d')", 0, True),
    ]
    assert [message.partition("more.tar, ")[2] for message in said] == [
        "record 0: the sample 'x' has 0 members .json, expected one",
        "record 1: not valid JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
        "record 2: no member z.png in the sample 'z' of the shard",
        "record 3: a record is an object, got list",
    ]


def tar_of(path, *members):
    """Members (name, bytes, fields of TarInfo)."""
    with tarfile.open(path, "w") as tar:
        for name, data, *fields in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            vars_of = fields[0] if fields else {}
            for field, value in vars_of.items():
                setattr(info, field, value)
            tar.addfile(info, io.BytesIO(data))
    return path


RECORD = json.dumps({"conversations": TALK}).encode()


def test_members_that_are_no_part_of_a_sample(tmp_path):
    """What WebDataset passes over, we pass over."""
    path = tar_of(
        tmp_path / "s.tar",
        ("__key__/x.json", b"no record"),
        ("__meta__", b"{}"),
        ("._a.json", b"AppleDouble"),
        ("a.json", RECORD),
        ("._a.jpg", b"AppleDouble"),
        ("README", b"none"),
        ("a.jpg", jpeg(1)),
    )
    (theirs,) = webdataset.WebDataset(str(path), shardshuffle=False)
    (entry,) = entries(find_sources(path)[0])
    assert (entry["id"], [read_media(picture) for picture in entry["image"]]) == (theirs["__key__"], [theirs["jpg"]])


@pytest.mark.parametrize(
    "members, message",
    [
        ([("a.json", RECORD), ("a.jpg", b"p"), ("a.mp4", b"v")], "the sample 'a' has a.mp4, a.jpg: its record must say which"),
        ([("a.json", RECORD), ("a.0.mp4", b"v"), ("a.1.mp4", b"v")], "the sample 'a' has a.0.mp4, a.1.mp4: its record must say which"),
        ([("a.json", RECORD), ("a.jpg", b"p"), ("a.jpg", b"q")], "the sample 'a' has the member a.jpg 2 times"),
        ([("a.json", RECORD), ("a.jpg", b"", {"type": tarfile.SYMTYPE, "linkname": "b.jpg"})], "the member a.jpg is a link"),
        ([("a.json", RECORD), ("a.jpg", b"", {"type": tarfile.LNKTYPE, "linkname": "b.jpg"})], "the member a.jpg is a link"),
        (
            [("a.json", RECORD), ("a.jpg", b"p", {"pax_headers": {"GNU.sparse.map": "0,1", "GNU.sparse.size": "9"}})],
            "the member a.jpg is sparse: its bytes do not lie in the shard as they are",
        ),
    ],
)
def test_samples_that_are_not_clear(tmp_path, members, message):
    path = tar_of(tmp_path / "s.tar", *members, ("b.json", RECORD), ("b.jpg", jpeg(1)))
    said = []
    assert len(load_records(path, on_bad=said.append)) == 1
    assert len(said) == 1 and said[0].startswith(f"{path}, record 0: {message}")


def test_a_record_says_which_of_its_media_it_is_about(tmp_path):
    video, picture = (json.dumps({name: f"a.{end}", "conversations": TALK}).encode() for name, end in (("video", "mp4"), ("image", "jpg")))
    for record, field, data in ((video, "video", b"v"), (picture, "image", b"p")):
        path = tar_of(tmp_path / "s.tar", ("a.json", record), ("a.jpg", b"p"), ("a.mp4", b"v"))
        (entry,) = entries(find_sources(path)[0])
        assert read_media(entry[field]) == data and ("image" in entry) + ("video" in entry) == 1


def test_no_other_member_of_a_shard_is_read(shard, tmp_path):
    """And a path in a record is not taken for one."""
    data = {"image": f"{shard}\x000+10\x00a", "conversations": TALK}
    (tmp_path / "data.json").write_text(json.dumps([data]))
    with pytest.raises(BadRecord, match="no file"):
        load_records(tmp_path / "data.json")
    with pytest.raises(ValueError, match="ends at byte .*it has changed"):
        read_media(Packed.at(shard, 10**9, 5, "x.jpg"))
    with pytest.raises(ValueError, match=r"x.jpg of .*gone.tar could not be read: No such file"):
        read_media(Packed.at(tmp_path / "gone.tar", 0, 5, "x.jpg"))


@pytest.mark.parametrize("kind", ["w:gz", "cut", "text"])
def test_broken_shards(shard, tmp_path, kind):
    path = tmp_path / "bad.tar"
    if kind == "w:gz":
        with tarfile.open(path, kind) as tar:
            tar.add(shard, "x.json")
    else:
        path.write_bytes(shard.read_bytes()[:700] if kind == "cut" else b"no tar file" * 100)
    with pytest.raises(ValueError, match=r"bad.tar is not a tar file that can be read \(compressed ones cannot\)"):
        Source(path, tmp_path).places()


# --- data sets ---


@pytest.fixture
def rows(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(jpeg(i))
    return datasets.Dataset.from_dict(
        {
            "id": ["r0", "r1", "r2"],
            "images": [[{"bytes": jpeg(10), "path": None}, {"bytes": jpeg(11), "path": "x.jpg"}], [], None],
            "conversations": [TALK, TALK, TALK],
        },
        features=datasets.Features(
            {
                "id": datasets.Value("string"),
                "images": datasets.List(datasets.Image()),
                "conversations": datasets.List({"from": datasets.Value("string"), "value": datasets.Value("string")}),
            }
        ),
    )


@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_pictures_inside_a_data_set(rows, tmp_path, kind):
    path = tmp_path / ("saved" if kind == "folder" else "rows.parquet")
    rows.save_to_disk(path) if kind == "folder" else rows.to_parquet(path)
    found = entries(find_sources(path)[0])
    assert [read_media(picture) for picture in found[0]["image"]] == [jpeg(10), jpeg(11)]
    records = load_records(path)
    assert [len(record.images) for record in records] == [2, 0, 0]
    assert records[0].where == f"{path}, record 0 (id 'r0')" and records[0].turns[0].text == "<image><image>\nWhat?"


def test_one_picture_a_row_paths_and_messages(tmp_path):
    (tmp_path / "0.jpg").write_bytes(jpeg(0))
    messages = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}]
    one = {"image": [{"bytes": jpeg(7), "path": None}], "messages": [messages]}
    features = datasets.Features(
        {"image": datasets.Image(), "messages": datasets.List({k: datasets.Value("string") for k in ("role", "content")})}
    )
    datasets.Dataset.from_dict(one, features=features).save_to_disk(tmp_path / "inside")
    datasets.Dataset.from_dict({"image": ["0.jpg"], "messages": [messages]}).to_parquet(tmp_path / "paths.parquet")
    datasets.Dataset.from_dict({"images": [["0.jpg", "0.jpg"]], "messages": [messages]}).to_parquet(tmp_path / "lists.parquet")
    inside, path, two = load_records([tmp_path / "inside", tmp_path / "paths.parquet", tmp_path / "lists.parquet"])
    assert read_media(inside.images[0]) == jpeg(7)
    assert path.images == (str(tmp_path / "0.jpg"),) and len(two.images) == 2
    assert {record.turns for record in (inside, path)} == {inside.turns}


def test_data_sets_that_cannot_be_read(rows, tmp_path):
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "splits")
    with pytest.raises(ValueError, match="splits is no source of records"):
        find_sources(tmp_path / "splits")
    assert len(load_records(tmp_path / "splits" / "train")) == 3
    (tmp_path / "bad.parquet").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="bad.parquet is not a data set that can be read"):
        find_sources(tmp_path / "bad.parquet")[0].places()


def test_parquet_is_read_by_row_groups_where_it_lies(tmp_path, monkeypatch):
    """Pictures' bytes only when they are asked for, and no copy of the file anywhere."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from llava_fast.inputs import media

    monkeypatch.setattr(datasets.Dataset, "from_parquet", None)
    inside, path = [{"bytes": jpeg(i), "path": f"{i}.jpg"} for i in range(3)], {"bytes": None, "path": "0.jpg"}
    lists = [[inside[0]], [inside[1], inside[2]], [], None, [path], [path, path], [], [path], [inside[0], path], None, [None], [inside[2]]]
    picture = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    for column, cells in (("images", lists), ("image", [pictures[0] if pictures else None for pictures in lists])):
        kind = pa.list_(picture) if column == "images" else picture
        table = pa.table({"id": [f"r{i}" for i in range(12)], column: pa.array(cells, kind), "conversations": [TALK] * 12})
        file = tmp_path / f"{column}.parquet"
        pq.write_table(table, file, row_group_size=4)
        found = entries(find_sources(file)[0])
        for i, (entry, cell) in enumerate(zip(found, cells, strict=True)):
            assert entry["id"] == f"r{i}" and entry["conversations"] == TALK
            wanted = cell if isinstance(cell, list) else None if cell is None else [cell]
            got = entry.get("image") if isinstance(entry.get("image"), list) else [entry["image"]] if "image" in entry else None
            if wanted is None:
                assert got is None
                continue
            for one, written in zip(got, wanted, strict=True):
                if written is None or written["bytes"] is None:
                    assert one == (written and "0.jpg") and not isinstance(one, Packed)
                else:
                    assert isinstance(one, Packed) and read_media(one) == written["bytes"]
        types = [media._cells(media.open_rows(str(file)), group)[column].type for group in range(3)]
        assert [("bytes" in str(kind)) for kind in types] == [False, True, column == "images"]
        assert media._group.cache_info().maxsize == media._cells.cache_info().maxsize == 1
