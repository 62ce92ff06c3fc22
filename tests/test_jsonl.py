"""Requests from a JSONL file, answers into one: what a kill leaves, what is run again, and what is refused."""

from __future__ import annotations

import base64
import gc
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

import llava_fast as lf
from llava_fast.cli import count_bytes, main
from llava_fast.engine import generate as generate_module
from llava_fast.engine.core import Core
from llava_fast.engine.job import Job
from llava_fast.engine.jsonl import Answers, BadLine, RequestFile, Tally, fingerprint
from llava_fast.requests import InputOptions, SamplingParams

SETTINGS = dict(max_new_tokens=4)
PROMPTS = ["Hi", "What?", "日本語 émigré ☕\u2028", "Ho", "a" * 30, "No?"]


@pytest.fixture(scope="module")
def model(checkpoints):
    """fp64, so that the order of sums cannot flip a token: what runs together differs between runs."""
    return lf.load(checkpoints["qwen_untied"], dtype=torch.float64)


@pytest.fixture
def submitted(monkeypatch) -> list:
    """Every request that an engine takes on."""
    seen, submit = [], lf.Engine.submit
    monkeypatch.setattr(
        lf.Engine, "submit", lambda self, request, *rest, **kw: (seen.append(request), submit(self, request, *rest, **kw))[1]
    )
    return seen


def save_picture(path, seed: int = 0):
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(path)
    return path


def lines(path) -> list[dict]:
    return sorted((json.loads(line) for line in path.read_bytes().splitlines()), key=lambda line: line["request"])


def told(completions) -> list[tuple]:
    return [(c.request, c.index, c.text, c.token_ids, c.finish_reason, c.error) for c in completions]


# -- answers


def test_lines_say_what_completions_say(model, tmp_path, submitted):
    out = tmp_path / "out.jsonl"
    requests = [lf.Request(prompt, id=f"ü{i}" if i else None) for i, prompt in enumerate(PROMPTS)]
    settings = dict(SETTINGS, n=2, temperature=1.0, seed=1, logprobs=True)
    expected = lf.generate(model, requests, **settings)
    submitted.clear()
    assert told(lf.generate(model, requests, out=out, **settings)) == told(expected)
    assert len(submitted) == len(PROMPTS)
    for i, line in enumerate(lines(out)):
        assert (line["request"], line.get("id")) == (i, f"ü{i}" if i else None)
        for completion, mine in zip(line["completions"], expected[2 * i : 2 * i + 2], strict=True):
            assert completion.pop("timings").keys() == mine.timings.keys()
            assert completion.pop("logprobs") == pytest.approx(mine.logprobs, abs=1e-9)
            assert completion == {k: v for k, v in vars(mine).items() if k not in ("request", "timings", "logprobs")}
    submitted.clear()
    before = out.read_bytes()
    assert told(lf.generate(model, requests, out=str(out), **settings)) == told(expected)
    assert not submitted and out.read_bytes() == before


def test_no_logprobs_where_none_were_asked_for(model, tmp_path):
    out = tmp_path / "out.jsonl"
    one = lf.generate(model, "What?", out=out, **SETTINGS)
    assert isinstance(one, lf.Completion) and "logprobs" not in lines(out)[0]["completions"][0] and "id" not in lines(out)[0]
    assert told([lf.generate(model, "What?", out=out, **SETTINGS)]) == told([one])


def test_whatever_a_kill_leaves_is_gone_on_with(model, tmp_path, submitted):
    out = tmp_path / "out.jsonl"
    expected = told(lf.generate(model, PROMPTS, out=out, **SETTINGS))
    whole = out.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for cut in (0, 1, 5, 14, ends[0] - 1, ends[0], ends[0] + 1, ends[2] + 40, ends[-1] - 1):
        out.write_bytes(whole[:cut])
        submitted.clear()
        assert told(lf.generate(model, PROMPTS, out=out, **SETTINGS)) == expected
        assert len(submitted) == len(PROMPTS) - sum(end <= cut for end in ends)
        assert [line["request"] for line in lines(out)] == list(range(len(PROMPTS)))


@pytest.mark.parametrize("again", [list, iter])
def test_other_requests_than_those_of_the_file(model, checkpoints, tmp_path, submitted, again):
    out = tmp_path / "out.jsonl"
    requests = [lf.Request("<image>What?", images=[tmp_path / "a.png"]), lf.Request("No?", id="x"), "Ho"]
    save_picture(tmp_path / "a.png")
    lf.generate(model, requests, out=out, **SETTINGS)
    before = out.read_bytes()
    cases = [
        ([requests[0], lf.Request("Yes?", id="x"), "Ho"], {}, r"another request 1 \(id 'x'\) .* its prompt or its pictures differ"),
        ([lf.Request("<image>What?", images=[tmp_path / "b.png"]), *requests[1:]], {}, "request 0 .* its prompt or its pictures differ"),
        (requests, dict(temperature=1.0), "request 0 .* its settings differ"),
        (requests, dict(pool="max"), "request 0 .* its settings differ"),
        ([*requests[:2], lf.Request("He", sampling=SamplingParams(seed=1))], {}, "2 .* its prompt or its pictures and its settings differ"),
        (requests[:2], {}, "answers request 2, but 2 requests were given"),
        ([], {}, "answers request 2, but 0 requests were given"),
    ]
    submitted.clear()
    for other, settings, message in cases:
        with pytest.raises(ValueError, match=message):
            lf.generate(model, again(other), out=out, **{**SETTINGS, **settings})
    with pytest.raises(ValueError, match="request 0 .* its model differ"):
        lf.generate(lf.load(checkpoints["qwen"]), again(requests), out=out, **SETTINGS)
    with pytest.raises(ValueError, match="request 0 .* its model differ"):
        lf.generate(lf.load(checkpoints["qwen_untied"], quantise="int8"), again(requests), out=out, **SETTINGS)
    assert out.read_bytes() == before and not submitted
    if again is list:  # told before those without a line are run
        out.write_bytes(before.splitlines(keepends=True)[-1])
        with pytest.raises(ValueError, match="its prompt or its pictures differ"):
            lf.generate(model, [lf.Request(f"{i}") for i in range(3)], out=out, **SETTINGS)
        assert not submitted
        out.write_bytes(before)
    more = lf.generate(model, again([*requests, "He"]), out=out, **SETTINGS)  # what comes after is no other list
    assert len(submitted) == 1 and (more == Tally(4, 0, 3) if again is iter else len(more) == 4)


def test_a_weight_that_differs_is_another_model(model, checkpoints, tmp_path):
    lf.generate(model, ["Hi"], out=tmp_path / "out.jsonl", **SETTINGS)
    other = lf.load(checkpoints["qwen_untied"], dtype=torch.float64)
    other.language_model.layers[1].self_attn.q_proj.weight.data.mul_(1.01)
    with pytest.raises(ValueError, match="its model differ"):
        lf.generate(other, ["Hi"], out=tmp_path / "out.jsonl", **SETTINGS)


def test_files_that_are_not_ours_stay_as_they_are(model, tmp_path):
    out = tmp_path / "out.jsonl"
    lf.generate(model, ["Hi"], out=out, **SETTINGS)
    line = out.read_bytes()
    for content, message in [
        (b'[{"prompt": "Hi"}]', "out.jsonl, line 1 is no line of answers: it begins with '\\[{"),
        (b'{"prompt": "Hi"}\n', "line 1 is no line of answers: KeyError: 'request'"),
        (line + b"\n", "line 2 is no line of answers"),
        (line + line, "line 2 is a second answer to request 0"),
        (line.replace(b'"text"', b'"test"'), "line 1 is no line of answers: TypeError"),
        (line.replace(b'"request": 0', b'"request": -1'), "request must be an integer of at least 0, got -1"),
        (line + b"\x00\xff", "line 2 is no line of answers: it begins with"),
    ]:
        out.write_bytes(content)
        for retry in (False, True):
            with pytest.raises(ValueError, match=message):
                lf.generate(model, ["Hi"], out=out, retry_errors=retry, **SETTINGS)
        assert out.read_bytes() == content
    with pytest.raises(ValueError, match="absent/out.jsonl could not be opened: No such file"):
        lf.generate(model, ["Hi"], out=tmp_path / "absent" / "out.jsonl", **SETTINGS)


def test_one_run_at_a_time(model, tmp_path):
    def requests():
        yield "Hi"
        with pytest.raises(ValueError, match="out.jsonl is being written by another run"):
            lf.generate(model, ["Ho"], out=tmp_path / "out.jsonl", **SETTINGS)
        yield "What?"

    assert lf.generate(model, requests(), out=tmp_path / "out.jsonl", **SETTINGS) == Tally(2, 0, 0)


def test_errors_are_run_again_when_asked_for(model, tmp_path, submitted):
    out = tmp_path / "out.jsonl"
    requests = ["Hi", lf.Request("<image>What?", images=[str(tmp_path / "a.png")]), 7, "Ho", "", "What?"]
    first = lf.generate(model, requests, out=out, **SETTINGS)
    assert [c.finish_reason == "error" for c in first] == [False, True, True, False, True, False]
    submitted.clear()
    assert told(lf.generate(model, requests, out=out, **SETTINGS)) == told(first) and not submitted
    with pytest.raises(ValueError, match="request 4 .*; as its answer is an error, retry_errors would run it anew"):
        lf.generate(model, [*requests[:4], "Now?", "What?"], out=out, **SETTINGS)
    save_picture(tmp_path / "a.png")
    requests[4] = "Now?"
    (tmp_path / "out.jsonl.part").write_text("what a kill left of another try")
    again = lf.generate(model, requests, out=out, retry_errors=True, **SETTINGS)
    assert [c.finish_reason == "error" for c in again] == [False, False, True, False, False, False]
    assert len(submitted) == 2 and [told([again[i]]) for i in (0, 3, 5)] == [told([first[i]]) for i in (0, 3, 5)]
    assert [line["request"] for line in lines(out)] == list(range(6)) and [p.name for p in tmp_path.iterdir() if "part" in p.name] == []
    submitted.clear()
    assert told(lf.generate(model, requests, out=out, **SETTINGS)) == told(again) and not submitted


def test_iterators_are_taken_as_there_is_room(model, tmp_path, monkeypatch):
    """Never more than AHEAD * max_running of them with the engine; each answer is in the file before the next is asked for."""
    out, count, taken, most = tmp_path / "out.jsonl", 60, 0, 0

    def requests():
        nonlocal taken, most
        for i in range(count):
            taken += 1
            most = max(most, taken - (len(out.read_bytes().splitlines()) if out.exists() else 0))
            yield lf.Request(f"What {i}?", id=i)

    with lf.Engine(model, max_running=2) as engine:
        assert lf.generate(model, requests(), out=out, engine=engine, **SETTINGS) == Tally(count, 0, 0)
    bound = generate_module.AHEAD * 2
    assert most == bound
    assert [(line["request"], line["id"]) for line in lines(out)] == [(i, i) for i in range(count)]
    out.write_bytes(b"".join(out.read_bytes().splitlines(keepends=True)[:-3]))
    assert lf.generate(model, requests(), out=out, **SETTINGS) == Tally(count, 0, count - 3)
    with pytest.raises(ValueError, match=r"or a list of these \(with out, any iterable\), got generator"):
        lf.generate(model, requests(), **SETTINGS)


def test_requests_that_are_over_are_let_go(model, tmp_path):
    """Long before their deadlines, which may be centuries away."""

    def alive() -> int:
        gc.collect()
        return sum(type(thing) is Job for thing in gc.get_objects())

    with lf.Engine(model) as engine:
        before = alive()
        requests = (lf.Request(f"What {i}?", deadline=1e10) for i in range(100))
        assert lf.generate(model, requests, out=tmp_path / "out.jsonl", engine=engine, **SETTINGS) == Tally(100, 0, 0)
        assert alive() - before < 20


def test_lines_do_not_wait_for_a_slow_iterator(model, tmp_path):
    with lf.Engine(model) as engine:

        def requests():
            yield "Hi"
            while engine.stats().finished < 1:
                time.sleep(0.01)
            time.sleep(0.1)
            yield "Ho"
            assert len(lines(tmp_path / "out.jsonl")) == 1
            yield "What?"

        assert lf.generate(model, requests(), out=tmp_path / "out.jsonl", engine=engine, **SETTINGS) == Tally(3, 0, 0)


def test_a_full_disk_ends_the_run(model, tmp_path, monkeypatch):
    def full(self, index, completions):
        raise OSError(28, "No space left on device")

    with lf.Engine(model, max_running=1) as engine:
        monkeypatch.setattr(Answers, "append", full)
        with pytest.raises(OSError, match="No space left") as kept:
            lf.generate(model, iter(PROMPTS), out=tmp_path / "out.jsonl", engine=engine, max_new_tokens=200)
        end = time.monotonic() + 20
        while engine.stats().cancelled < 3 and time.monotonic() < end:
            time.sleep(0.01)
        assert engine.stats().cancelled == 3 and kept is not None  # of the four that were with it


def test_an_iterator_that_fails_leaves_what_is_done(model, tmp_path):
    def requests():
        yield from PROMPTS
        raise KeyError("mine")

    with lf.Engine(model) as engine:
        with pytest.raises(KeyError, match="mine"):
            lf.generate(model, requests(), out=tmp_path / "out.jsonl", engine=engine, **SETTINGS)
        assert lf.generate(model, PROMPTS, out=tmp_path / "out.jsonl", engine=engine, **SETTINGS)[-1].token_ids
    assert len(lines(tmp_path / "out.jsonl")) == len(PROMPTS)


def test_cancelled_requests_have_no_line(model, tmp_path, submitted):
    out = tmp_path / "out.jsonl"
    with lf.Engine(model) as engine:
        submit = engine.submit

        def cancelled(request, *rest, **kw):
            handle = submit(request, *rest, **kw)
            if request.prompt == "Ho":
                handle.cancel()
            return handle

        engine.submit = cancelled
        answers = lf.generate(model, ["Hi", "Ho", "No?"], out=out, engine=engine, max_new_tokens=4)
    assert [c.finish_reason == "cancelled" for c in answers] == [False, True, False]
    assert [line["request"] for line in lines(out)] == [0, 2]
    assert [c.finish_reason == "cancelled" for c in lf.generate(model, ["Hi", "Ho", "No?"], out=out, **SETTINGS)] == [False] * 3


def test_an_engine_that_fails_leaves_no_errors_behind(model, tmp_path, monkeypatch):
    out, turn, turns = tmp_path / "out.jsonl", Core.turn, 0

    def fail_later(self):
        nonlocal turns
        turns += 1
        if turns > 5:
            raise MemoryError("none left")
        turn(self)

    with monkeypatch.context() as patch:
        patch.setattr(Core, "turn", fail_later)
        with lf.Engine(model, max_running=2) as engine, pytest.raises(RuntimeError, match="the engine (has )?stopped"):
            lf.generate(model, PROMPTS, out=out, engine=engine, **SETTINGS)
    assert 0 < len(lines(out)) < len(PROMPTS) and all(c["error"] is None for line in lines(out) for c in line["completions"])
    assert told(lf.generate(model, PROMPTS, out=out, **SETTINGS)) == told(lf.generate(model, PROMPTS, **SETTINGS))


def test_fingerprints(tmp_path, monkeypatch):
    """Equal for what is answered equally, wherever the tree lies; different for anything else."""
    save_picture(tmp_path / "a.png"), save_picture(tmp_path / "b.png", 1)
    monkeypatch.chdir(tmp_path)

    def of(*media, folder=tmp_path, videos=(), **kw):
        return fingerprint(lf.Request("<image>", images=list(media), videos=list(videos), **kw), SamplingParams(), InputOptions(), folder)

    data = (tmp_path / "a.png").read_bytes()
    a, b = Image.open("a.png"), Image.open("b.png")
    assert of("a.png") == of(tmp_path / "a.png") == of(str(tmp_path / "a.png")) == of(a) == of("a.png", priority=3, deadline=1, id="x")
    assert of("/x/a.png", folder=tmp_path.__class__("/x")) == of("a.png")
    assert a.fp is not None  # it was not read for this
    different = [of("a.png"), of("b.png"), of(b.copy()), of(a.copy()), of(data), of(data[:-1]), of("data:image/png;base64,AA"), of("A")]
    different += [of("http://h/a.png"), of(np.zeros((2, 2, 3), np.uint8)), of(np.ones((2, 2, 3), np.uint8)), of(), of("a.png", "a.png")]
    different += [of(videos=["a.png"]), of(videos=[["a.png", "b.png"]]), of(videos=[{"video": "a.png", "num_frames": 2}])]
    different += [of("a.png", sampling=SamplingParams(stop=["a"])), of("a.png", inputs=InputOptions(fps=2))]
    different += [fingerprint(ValueError(text), SamplingParams(), InputOptions(), tmp_path) for text in ("a", "b")]
    assert len(set(different)) == len(different)
    damaged = Image.open(tmp_path / "a.png")
    damaged.filename, damaged.fp = "", open(tmp_path / "a.png", "rb")
    damaged.fp.seek(10**6)
    assert of(damaged) != of(a)


def test_progress(model, capsys, tmp_path):
    for settings in ({}, dict(progress=False), dict(out=tmp_path / "a.jsonl")):
        lf.generate(model, PROMPTS, **SETTINGS, **settings)
        assert capsys.readouterr().err == ""
    lf.generate(model, PROMPTS, out=tmp_path / "a.jsonl", progress=True, **SETTINGS)
    last = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", capsys.readouterr().err).strip().splitlines()[-1]
    assert last.startswith("requests 6/6") and "tokens/s" in last
    for settings in (dict(progress=True), dict(out=tmp_path / "b.jsonl")):
        with pytest.raises(ValueError, match="stream=True takes neither out nor progress"):
            lf.generate(model, PROMPTS, stream=True, **settings)


# -- requests


def read(path, *entries, raw=False) -> list:
    path.write_bytes(b"".join((entry if isinstance(entry, bytes) else json.dumps(entry).encode()) + b"\n" for entry in entries))
    requests = RequestFile(path, SamplingParams(max_new_tokens=9, top_k=3), raw)
    assert len(requests) == len(list(requests))
    return list(requests)


def test_what_a_line_may_hold(tmp_path):
    path = tmp_path / "in.jsonl"
    url, data = "https://example.com/a.png", "data:image/png;base64,AA"
    items = [{"type": "image", "image": "a.png"}, {"type": "video", "path": "c", "num_frames": 2}, {"type": "text", "text": "Tëxt/a.png"}]
    plain, marks, chat, own = read(
        path,
        b"\xef\xbb\xbf" + json.dumps({"prompt": "Wäs?", "id": 3}, ensure_ascii=False).encode() + b"\r",
        {"prompt": "Is <image> <image> in <video>?", "images": ["a.png", url], "videos": ["/abs/c.mp4"]},
        {"messages": [{"role": "user", "content": items}], "images": [data], "id": "x"},
        {"prompt": "What?", "sampling": {"temperature": 0.5, "stop": ["a"], "n": 2}, "priority": 2, "deadline": 1.5},
    )
    assert plain.prompt == [{"role": "user", "content": [{"type": "text", "text": "Wäs?"}]}] and plain.id == 3
    assert [item.get("image", item.get("video")) for item in marks.prompt[0]["content"] if item["type"] != "text"] == [
        str(tmp_path / "a.png"),
        url,
        "/abs/c.mp4",
    ]
    put = [{**items[0], "image": str(tmp_path / "a.png")}, {**items[1], "path": str(tmp_path / "c")}, items[2]]
    assert chat.prompt == [{"role": "user", "content": put}] and chat.images == [data] and chat.id == "x"
    assert own.sampling == SamplingParams(max_new_tokens=9, top_k=3, temperature=0.5, stop=("a",), n=2)
    assert (own.priority, own.deadline, plain.sampling) == (2, 1.5, SamplingParams(max_new_tokens=9, top_k=3))
    (raw,) = read(path, {"prompt": "<image>What?", "images": ["a.png"]}, raw=True)
    assert raw.prompt == "<image>What?" and raw.images == [str(tmp_path / "a.png")]


@pytest.mark.parametrize(
    "line, message",
    [
        (b'{"prompt": "cut', "line 3: not valid JSON: Invalid control character at: line 1 column 16"),
        (b'{"prompt": "\xff"}', "line 3: not valid JSON: 'utf-8' codec can't decode"),
        (b"[" * 100_000, "line 3: not valid JSON: "),
        (b"[1]", "line 3: a request must be a JSON object, got [1]"),
        ({"prompt": "What?", "imgaes": ["a.png"]}, "line 3: unknown key 'imgaes'; did you mean 'images'?"),
        ({}, "line 3: a request has either a prompt or messages"),
        ({"prompt": "What?", "messages": []}, "line 3: a request has either a prompt or messages"),
        ({"prompt": 3}, "line 3: prompt must be a string, got 3"),
        ({"messages": "What?"}, "line 3: messages must be a list of chat messages, got 'What?'"),
        ({"prompt": "What?", "images": "a.png"}, "line 3: images must be a list of paths or addresses, got 'a.png'"),
        ({"prompt": "What?", "videos": [None]}, "line 3: videos must be a list of paths or addresses, got [None]"),
        ({"prompt": "<image>?"}, "line 3: the prompt has 1 <image> and 0 <video> marks but 0 images and 0 videos were given"),
        ({"prompt": "What?", "sampling": 3}, "line 3: sampling must be an object with fields of SamplingParams, got 3"),
        ({"prompt": "What?", "sampling": {"temprature": 1}}, "line 3: sampling has no field 'temprature'; did you mean 'temperature'?"),
        ({"prompt": "What?", "sampling": {"top_p": "x"}}, "line 3: top_p must be in (0, 1], got 'x'"),
        ({"prompt": "What?", "priority": 1.5}, "line 3: priority must be an integer, got 1.5"),
        (b'{"prompt": "What?", "deadline": NaN}', "line 3: deadline must be a finite number of seconds or None, got nan"),
        ({"prompt": "What?", "id": [1]}, "line 3: id must be a string or an integer, got [1]"),
        ({"prompt": "What?", "id": "a"}, "line 3: its id 'a' is that of line 1"),
        ({"prompt": "\ud800"}, "line 3: the prompt is not valid text: half a surrogate pair"),
    ],
)
def test_bad_lines(tmp_path, line, message):
    first, bad, last = read(tmp_path / "in.jsonl", {"prompt": "Hi", "id": "a"}, b" ", line, {"prompt": "Ho", "id": "b"})[:3]
    assert isinstance(bad, BadLine) and str(bad).startswith(message) and len(str(bad)) < 300
    assert (first.id, last.id) == ("a", "b")


@pytest.mark.parametrize("content", [b"", b"\n\n", b"[\n1,\n2\n]\n", b'{"prompt":\n"What?"}', b"\x00\x01\x02"])
def test_files_without_requests(tmp_path, content):
    (tmp_path / "in.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=r"in.jsonl holds no request: none of its \d lines is a JSON object"):
        RequestFile(tmp_path / "in.jsonl", SamplingParams())
    for path, reason in ((tmp_path / "absent", "No such file or directory"), (tmp_path, "Is a directory")):
        with pytest.raises(ValueError, match=f"could not be read: {reason}"):
            RequestFile(path, SamplingParams())


# -- the command


def command(checkpoints, tmp_path, *more) -> list[str]:
    base = ["generate", "-m", checkpoints["qwen_untied"], "--requests", tmp_path / "in.jsonl", "--out", tmp_path / "out.jsonl"]
    return [str(part) for part in (*base, *more)]


def run(monkeypatch, arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["llava-fast", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit:
        main()
    return exit.value.code or 0


def test_a_file_of_requests(checkpoints, tmp_path, monkeypatch, capsys):
    (tmp_path / "pictures").mkdir()
    picture = save_picture(tmp_path / "pictures" / "a.png")
    (tmp_path / "cut.png").write_bytes(picture.read_bytes()[:200])
    url = "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
    chat = [{"role": "user", "content": [{"type": "image", "image": "pictures/a.png"}, {"type": "text", "text": "Wäs?"}]}]
    entries = [
        {"prompt": "<image>Wäs?", "images": ["pictures/a.png"], "id": "path"},
        {"messages": chat, "id": 7},
        {"prompt": "<image>Wäs?", "images": ["cut.png"], "id": "cut"},
        {"prompt": "Wäs?", "images": [url]},
        {"prompt": "What?", "colour": "red", "id": "bad"},
        {"prompt": "What?", "sampling": {"max_new_tokens": 3, "n": 2, "logprobs": True}},
    ]
    read(tmp_path / "in.jsonl", *entries)
    monkeypatch.chdir(tmp_path / "pictures")
    options = ["--max-new-tokens", 5, "--max-running", 4, "--kv-cache-bytes", "2MiB", "--speculate", 2]
    assert run(monkeypatch, command(checkpoints, tmp_path, *options)) == 0
    path, chat, cut, data, bad, own = lines(tmp_path / "out.jsonl")
    assert [answer["completions"][0]["visual_tokens"] for answer in (path, chat, data)] == [9, 9, 9]
    assert len({json.dumps(answer["completions"][0]["token_ids"]) for answer in (path, chat, data)}) == 1
    assert [answer.get("id") for answer in (path, chat, cut, data, bad, own)] == ["path", 7, "cut", None, "bad", None]
    assert cut["completions"][0]["error"].startswith("request 2: image 1 of 1: ") and "cut.png" in cut["completions"][0]["error"]
    assert bad["completions"][0]["error"].startswith("request 4: line 5: unknown key 'colour'")
    assert [len(completion["logprobs"]) for completion in own["completions"]] == [3, 3]
    summary = capsys.readouterr().err
    assert "out.jsonl answers 6 requests, 2 of them with an error\n" in summary
    for part in (
        "tokens/s",
        "to the first token, waiting included: p50 ",
        "between tokens: p50 ",
        "p99 ",
        "% of prompt rows, ",
        "% of pictures; decode reads at ",
        "; prefill at ",
    ):
        assert part in summary
    before = (tmp_path / "out.jsonl").read_bytes()
    monkeypatch.chdir(tmp_path)  # relative paths of the command itself change nothing
    again = ["generate", "-m", checkpoints["qwen_untied"], "--requests", "in.jsonl", "--out", "out.jsonl", *options]
    assert run(monkeypatch, again) == 0 and (tmp_path / "out.jsonl").read_bytes() == before
    assert "answers 6 requests (6 of them before), 2 of them with an error" in capsys.readouterr().err
    save_picture(tmp_path / "cut.png")
    assert run(monkeypatch, [*again, "--retry-errors"]) == 0
    assert "answers 6 requests (4 of them before), 1 of them with an error" in capsys.readouterr().err
    assert run(monkeypatch, [*again, "--temperature", 1]) == 2
    assert "out.jsonl answers another request 0 (id 'path') than the one given: its settings differ" in capsys.readouterr().err


def test_interrupted_and_killed(model, checkpoints, tmp_path, monkeypatch, capsys):
    """SIGKILL in the middle, then Ctrl-C, then to the end: every request once, with the answers of a run that was left alone."""
    out, count = tmp_path / "out.jsonl", 24
    read(tmp_path / "in.jsonl", *({"prompt": f"Number {i}: ☕?", "id": f"n{i}"} for i in range(count)))
    arguments = command(checkpoints, tmp_path, "--max-running", 1, "--max-new-tokens", 30, "--dtype", "float64")

    def done() -> int:
        return out.read_bytes().count(b"\n") if out.exists() else 0

    with subprocess.Popen([sys.executable, "-m", "llava_fast.cli", *arguments], stderr=subprocess.PIPE, text=True) as process:
        end = time.monotonic() + 120
        while process.poll() is None and done() < 3 and time.monotonic() < end:
            time.sleep(0.002)
        process.kill()
        told = process.communicate(timeout=60)[1]
    killed = done()
    assert process.returncode == -signal.SIGKILL and 3 <= killed < count, told

    def interrupt() -> None:
        while done() < killed + 3:
            time.sleep(0.002)
        os.kill(os.getpid(), signal.SIGINT)

    watcher = threading.Thread(target=interrupt, daemon=True)
    watcher.start()
    assert run(monkeypatch, arguments) == 130
    watcher.join(timeout=10)
    interrupted = done()
    assert killed < interrupted < count
    assert f"out.jsonl answers {interrupted} of {count} requests; the same command goes on from there" in capsys.readouterr().err

    kept = out.read_bytes()[: out.read_bytes().rindex(b"\n") + 1]
    assert run(monkeypatch, arguments) == 0
    assert f"answers {count} requests ({interrupted} of them before), 0 of them with an error" in capsys.readouterr().err
    assert out.read_bytes().startswith(kept)
    assert [(line["request"], line["id"]) for line in lines(out)] == [(i, f"n{i}") for i in range(count)]
    alone = lf.generate(model, list(RequestFile(tmp_path / "in.jsonl", SamplingParams(max_new_tokens=30))))
    assert [line["completions"][0]["token_ids"] for line in lines(out)] == [completion.token_ids for completion in alone]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["What?", "--requests", "in.jsonl"], "generate takes either a PROMPT or --requests, got both"),
        ([], "generate takes either a PROMPT or --requests, got neither"),
        (["--requests", "in.jsonl"], "--requests needs --out"),
        (["--requests", "in.jsonl", "--out", "o.jsonl", "-i", "a.png"], "--image goes with a PROMPT only"),
        (["--requests", "in.jsonl", "--out", "o.jsonl", "--json"], "--json goes with a PROMPT only"),
        (["What?", "--out", "o.jsonl"], "--out goes with --requests only"),
        (["What?", "--retry-errors"], "--retry-errors goes with --requests only"),
        (["--requests", "absent.jsonl", "--out", "o.jsonl"], "absent.jsonl could not be read: No such file or directory"),
        (["--requests", "in.jsonl", "--out", "absent/o.jsonl"], "absent/o.jsonl cannot be written: there is no folder absent"),
        (["--requests", "in.jsonl", "--out", "in.jsonl"], "in.jsonl, line 1 is no line of answers"),
        (["What?", "--kv-cache-bytes", "many"], "a number of bytes is written like 500000, 1.5GB or 2GiB, got 'many'"),
        (["What?", "--max-running", "0"], "max_running must be an integer of at least 1, got 0"),
    ],
)
def test_arguments_that_do_not_go_together(checkpoints, tmp_path, monkeypatch, capsys, arguments, message):
    read(tmp_path / "in.jsonl", {"prompt": "What?"})
    monkeypatch.chdir(tmp_path)
    before = (tmp_path / "in.jsonl").read_bytes()
    assert run(monkeypatch, ["generate", "-m", checkpoints["qwen"], *arguments]) == 2
    said = capsys.readouterr().err.strip()
    assert message in said and len(said.splitlines()) == 1
    assert (tmp_path / "in.jsonl").read_bytes() == before


def test_numbers_of_bytes():
    cases = {"500000": 500000, "2GiB": 2 << 30, "1.5 GB": 1_500_000_000, "3k": 3000, "4 mib": 4 << 20, "7B": 7, "1Ti": 1 << 40}
    assert {text: count_bytes(text) for text in cases} == cases
    for text in ("", "GiB", "-1", "1e9", "2 GiBs", "1,000"):
        with pytest.raises(ValueError, match="a number of bytes is written like"):
            count_bytes(text)
