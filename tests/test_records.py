"""LLaVA records: what is accepted, where the marks go, and that every fault is named with its file and record."""

from __future__ import annotations

import json
import math

import pytest
from PIL import Image
from reading import load_records

from llava_fast.inputs.records import Turn, sample_indices


@pytest.fixture
def folder(tmp_path):
    for name in "abcd":
        Image.new("RGB", (8, 4)).save(tmp_path / f"{name}.png")
    (tmp_path / "clip.mp4").write_bytes(b"not read here")
    return tmp_path


def talk(question="What?", answer="That.", **media):
    return {"id": "x1", **media, "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}


def write(folder, records, name="data.json"):
    path = folder / name
    path.write_text("\n".join(map(json.dumps, records)) + "\n" if name.endswith(".jsonl") else json.dumps(records))
    return path


def load_one(folder, record):
    (loaded,) = load_records(write(folder, [record]))
    return loaded


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_pictures_lists_videos_and_text_are_read(folder, name):
    path = write(
        folder,
        [
            talk("<image>\nWhat?", image="a.png"),
            talk("<image><image>", image=["a.png", "b.png"]),
            talk("<image>\nWho?", video="clip.mp4"),
            talk(),
        ],
        name,
    )
    one, two, video, text = load_records(path)
    assert one.images == (str(folder / "a.png"),) and one.video is None and one.media == 1
    assert two.images == (str(folder / "a.png"), str(folder / "b.png"))
    assert video.images == () and video.video == str(folder / "clip.mp4") and video.media == 1
    assert text.media == 0 and text.turns == (Turn("user", "What?"), Turn("assistant", "That."))
    assert one.where == f"{path}, record 0 (id 'x1')"


def test_media_folder_sample_id_and_role_content(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("data")
    record = {"sample_id": 7, "image": "a.png", "conversations": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}
    (loaded,) = load_records(write(elsewhere, [record]), media_folder=folder)
    assert loaded.images == (str(folder / "a.png"),)
    assert "(id 7)" in loaded.where
    assert loaded.turns[1] == Turn("assistant", "A")


def test_a_first_system_turn_is_kept(folder):
    record = talk()
    record["conversations"].insert(0, {"from": "system", "value": "Be brief."})
    assert load_one(folder, record).turns[0] == Turn("system", "Be brief.")


@pytest.mark.parametrize(
    "question, images, expected",
    [
        ("Look: <image> what?", ["a.png"], "<image>\nLook:  what?"),
        ("What?\n<image>", ["a.png"], "<image>\nWhat?"),
        ("<image> What?", ["a.png"], "<image> What?"),
        ("<image>", ["a.png"], "<image>"),
        ("From <image> to <image>?", ["a.png", "b.png"], "From <image> to <image>?"),
        ("What?", ["a.png"], "<image>\nWhat?"),
        ("What?", ["a.png", "b.png", "c.png"], "<image><image><image>\nWhat?"),
        ("QA_GT_caption_based_noisyWhat?", [], "What?"),
    ],
)
def test_where_marks_go(folder, question, images, expected):
    assert load_one(folder, talk(question, image=images)).turns[0].text == expected


def test_marks_are_placed_turn_by_turn(folder):
    record = talk("First <image>?", image=["a.png", "b.png"])
    record["conversations"] += [{"from": "human", "value": "Second <image>?"}, {"from": "gpt", "value": "Yes."}]
    assert [turn.text for turn in load_one(folder, record).turns] == ["<image>\nFirst ?", "That.", "<image>\nSecond ?", "Yes."]


def test_a_video_mark_is_an_image_mark(folder):
    assert load_one(folder, talk("<video>\nWhat?", video="clip.mp4")).turns[0].text == "<image>\nWhat?"


def test_a_video_tag_elsewhere_is_text(folder):
    page, tag = "Make this page, with a <video> tag.", "<html><video></video></html>"
    assert [turn.text for turn in load_one(folder, talk(page, tag)).turns] == [page, tag]
    assert [turn.text for turn in load_one(folder, talk(page, tag, image="a.png")).turns] == [f"<image>\n{page}", tag]
    assert load_one(folder, talk("<video>\nWhat?", tag, video="clip.mp4")).turns[1].text == tag


REVERSED = {"id": "x1", "conversations": [{"from": "gpt", "value": "A"}, {"from": "human", "value": "Q"}]}


@pytest.mark.parametrize(
    "record, message",
    [
        (REVERSED, "reversed or repeated"),
        ({"id": "x1", "conversations": [{"from": "human", "value": "Q"}] * 2}, "reversed or repeated"),
        ({"id": "x1", "conversations": [{"from": "human", "value": "Q"}]}, "must be an answer"),
        ({"id": "x1", "conversations": [{"from": "system", "value": "S"}]}, "must be an answer"),
        ({"id": "x1", "conversations": []}, "list of turns"),
        ({"id": "x1"}, "list of turns"),
        ({"id": "x1", "conversations": [{"from": "bot", "value": "Q"}]}, "'bot'"),
        ({"id": "x1", "conversations": [{"from": "human", "value": None}]}, "must have a text"),
        ({"id": "x1", "conversations": ["hello"]}, "'hello'"),
        ({"id": "x1", "conversations": [{"from": ["human"], "value": "Q"}]}, r"\['human'\]"),
        (talk("<image> or <image>?", image=["a.png", "b.png", "c.png", "d.png"]), "2 <image> marks but 4 pictures"),
        (talk("<image><image>", image="a.png"), "2 <image> marks but 1 pictures"),
        (talk("<image>"), "1 <image> marks but 0 pictures"),
        (talk("<image><image>", video="clip.mp4"), "2 <image> marks but 1"),
        (talk("What?", "<image>", image="a.png"), "only questions"),
        (talk("<image>", image="missing.png"), "missing.png"),
        (talk("<image>", video="missing.mp4"), "missing.mp4"),
        (talk("<image>", image="a.png", video="clip.mp4"), "both"),
        (talk("<image>", image=3), "path or a list of paths"),
        (talk("<image>", video=["a"]), "'video' must be a path"),
    ],
)
def test_faults_name_file_and_record(folder, record, message):
    path = write(folder, [talk(), record])
    with pytest.raises(ValueError, match=message) as caught:
        load_records(path)
    assert str(caught.value).startswith(f"{path}, record 1 (id 'x1'): ")


LONG = "private " * 1000


@pytest.mark.parametrize(
    "record",
    [
        {"id": LONG, "conversations": []},
        {"id": "x1", "conversations": LONG},
        {"id": "x1", "conversations": {"value": LONG}},
        {"id": "x1", "conversations": [LONG]},
        {"id": "x1", "conversations": [{"from": LONG, "value": LONG}]},
        {"id": "x1", "conversations": [{"from": "human", "value": [LONG]}]},
        {"id": "x1", "conversations": [{"speaker": "human", "text": LONG}]},
        talk(image={"path": LONG}),
        talk(image=[LONG, 5]),
        talk(video={"path": LONG}),
    ],
)
def test_messages_do_not_carry_a_records_content(folder, record):
    path = write(folder, [record])
    with pytest.raises(ValueError) as caught:
        load_records(path)
    assert len(str(caught.value)) < len(str(path)) + 400


def test_bad_records_can_be_counted_instead(folder):
    said = []
    records = load_records(write(folder, [talk(), REVERSED, talk(), 5]), on_bad=said.append)
    assert len(records) == 2
    assert len(said) == 2 and "reversed" in said[0] and "record 3" in said[1]


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("data.json", "{", "not valid JSON"),
        ("data.json", "{}", "list of records"),
        ("data.jsonl", "{\n{}", "not valid JSON"),
        ("mix.yaml", "datasets: 3", "datasets"),
        ("mix.yaml", "datasets: [{json: a.json}]", "json_path"),
        ("mix.yaml", "datasets: [{json_path: none.json}]", "no data file none.json"),
        ("mix.yaml", "datasets: [{json_path: mix.yaml, strategy: all}]", "strategy"),
        ("mix.yaml", "datasets: [{json_path: mix.yaml}]", r"mix.yaml: datasets\[0\] is a mixture itself, .*mix.yaml"),
        (
            "mix.yaml",
            "datasets: [{json_path: a, sampling_strategy: most}]",
            r"mix.yaml: datasets\[0\]: sampling_strategy must be all.*'most'",
        ),
        ("mix.yaml", "datasets: [{json_path: mix.yaml, strategy: all, 5: x}]", r"\['5', 'strategy'\]"),
    ],
)
def test_broken_files(folder, name, text, message):
    (folder / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        load_records(folder / name)
    with pytest.raises(ValueError, match="no data file"):
        load_records(folder / "absent.json")


def test_a_mixture_joins_files_with_their_strategies(folder):
    write(folder, [{**talk(str(i)), "id": i} for i in range(101)], "many.json")
    write(folder, [{**talk(str(i)), "id": i} for i in range(1000, 1004)], "few.jsonl")
    mixture = folder / "mix.yaml"
    mixture.write_text(
        "datasets:\n- {json_path: many.json, sampling_strategy: 'first:10%'}\n- {json_path: few.jsonl}\n"
        "- {json_path: many.json, sampling_strategy: 'random:5'}\n- {json_path: many.json, sampling_strategy: 'end:2'}\n"
    )

    def questions(seed):
        return [int(record.turns[0].text) for record in load_records(mixture, seed=seed)]

    drawn = questions(1)
    assert drawn[:15] == [*range(11), 1000, 1001, 1002, 1003]
    assert drawn[-2:] == [99, 100]
    assert len(drawn) == 22 and len(set(drawn[15:20])) == 5
    assert questions(1) == drawn != questions(2)


def test_a_strategy_is_of_each_file(folder):
    for name in ("part1", "part2"):
        write(folder, [talk(f"{name} {i}") for i in range(20)], f"{name}.json")
    (folder / "mix.yaml").write_text("datasets: [{json_path: 'part{1,2}.json', sampling_strategy: 'end:10%'}]")
    questions = [record.turns[0].text for record in load_records(folder / "mix.yaml")]
    assert questions == ["part1 18", "part1 19", "part2 18", "part2 19"]


@pytest.mark.parametrize("total", [0, 1, 5, 100, 101])
@pytest.mark.parametrize("amount", ["0", "1", "3", "10%", "33%", "100%", "500"])
def test_sampling_strategies(total, amount):
    count = math.ceil(int(amount[:-1]) * total / 100) if amount.endswith("%") else min(int(amount), total)
    assert sample_indices(total, f"first:{amount}") == list(range(total))[:count]
    assert sample_indices(total, f"end:{amount}") == list(range(total))[total - count :]
    drawn = sample_indices(total, f"random:{amount}", seed=3)
    assert drawn == sample_indices(total, f"random:{amount}", seed=3)
    assert len(set(drawn)) == len(drawn) == count and drawn == sorted(drawn)


@pytest.mark.parametrize("strategy", ["some", "first", "first:", "last:3", "first:1.5%", "random:-1"])
def test_unknown_strategies(strategy):
    with pytest.raises(ValueError, match="sampling_strategy"):
        sample_indices(10, strategy)
