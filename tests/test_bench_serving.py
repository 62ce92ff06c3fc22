"""The serving benchmarks' logic: the workload's shapes, arrivals, figures, the static batching loop, and the client of a server."""

from __future__ import annotations

import base64
import http.server
import io
import json
import statistics
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import make_checkpoint

import llava_fast as lf
from bench import many_requests, serving, workload
from bench.baselines import reuse, servers, static_batching
from bench.workload import Asked, Served

# -- the workload


@pytest.mark.parametrize(
    "scenario, views", [("text", {0}), ("single-image", {1}), ("video", set(range(10, 17))), ("3d", set(range(4, 17)))]
)
def test_scenarios_have_the_shapes_of_the_mixture(scenario: str, views: set[int]) -> None:
    found = workload.records(8, scenario)
    asked = workload.requests(found, 16)
    assert {len(one.pictures) for one in asked} <= views
    for record, one in zip(found, asked, strict=True):
        assert [picture.size for picture in one.pictures] == [tuple(size) for size in record["sizes"]]
        question, answer = record["turns"][0]
        assert len(one.text.split()) == question and one.new == max(2, min(answer, 16))
        assert one.prompt == "<image>" * len(one.pictures) + one.text


def test_no_two_pictures_are_the_same() -> None:
    """Nor are those of another part, whose requests have the same shapes."""
    found = workload.records(6, most_views=2)
    parts = [workload.requests(found, 16, part=part) for part in range(3)]
    pictures = [picture.tobytes() for asked in parts for one in asked for picture in one.pictures]
    assert len(set(pictures)) == len(pictures) and max(len(one.pictures) for one in parts[0]) == 2
    shapes = [[([p.size for p in one.pictures], len(one.text.split()), one.new) for one in asked] for asked in parts]
    assert shapes[0] == shapes[1] == shapes[2] and len({one.text for asked in parts for one in asked}) == 18


def test_the_long_benchmarks_are_what_they_were() -> None:
    asked = many_requests.questions("m4")
    assert [len(one.pictures) for one in asked[:8]] == [1, 2, 3, 14, 2, 1, 1, 8] and {one.new for one in asked} == {64} and len(asked) == 32
    assert [(len(one.pictures), one.new) for one in many_requests.questions("long")] == [(1, 256)] * 8


def test_records_that_are_not_there_are_refused() -> None:
    with pytest.raises(ValueError, match="scenario must be one of text, single-image.*got 'audio'"):
        workload.records(1, "audio")
    with pytest.raises(ValueError, match="has 64 such requests, 65 were asked for"):
        workload.records(65, "3d")


def test_arrivals_are_seeded_and_keep_their_rate() -> None:
    times = workload.arrivals(4.0, 2000)
    assert times == workload.arrivals(4.0, 2000) != workload.arrivals(4.0, 2000, seed=1)
    assert times == sorted(times) and 0 <= times[0] and times[-1] <= 500
    assert len(times) / times[-1] == pytest.approx(4.0, rel=0.01)
    gaps = np.diff(times)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.1), "exponential, not even"
    assert workload.arrivals(2.0, 2000) == pytest.approx([2 * at for at in times]), "another rate stretches the same times"


@pytest.mark.parametrize("rate, count", [(0.0, 4), (-1.0, 4), (1.0, 0)])
def test_arrivals_of_nothing_are_refused(rate: float, count: int) -> None:
    with pytest.raises(ValueError, match=f"got rate={rate}, count={count}"):
        workload.arrivals(rate, count)


def test_figures_of_a_point() -> None:
    served = Served([0.1 * i for i in range(1, 101)], {"p50": 0.02, "p95": 0.5}, 50.0, 800, [])
    expected = {"first_token_p50_s": 5.1, "first_token_p95_s": 9.6, "inter_token_p50_ms": 20, "inter_token_p95_ms": 500}
    assert workload.figures(served) == pytest.approx({**expected, "requests_per_s": 2, "tokens_per_s": 16})


# -- static batches


def test_a_batch_is_the_run_by_length_that_pads_least_with_the_oldest_in_it() -> None:
    lengths = [10, 90, 11, 12, 95, 13]
    assert static_batching.choose([0, 1, 2, 3, 4, 5], lengths, 3) == [0, 2, 3]
    assert static_batching.choose([3, 0, 2, 5], lengths, 3) == [0, 2, 3], "12 is neither the shortest nor the longest"
    assert static_batching.choose([1, 0, 2, 3, 4, 5], lengths, 2) == [5, 1], "the oldest never waits for shorter ones"
    assert sorted(static_batching.choose([4, 0], lengths, 8)) == [0, 4]


class Time:
    """In place of the module: a clock that moves where somebody sleeps, or computes for a tenth of a second a token."""

    def __init__(self) -> None:
        self.now, self.sizes = 100.0, list[int]()

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def run(self, batch: list[Asked]) -> tuple[list[list[int]], list[float]]:
        self.sizes.append(len(batch))
        times = [self.now + 0.1 * (i + 1) for i in range(max(one.new for one in batch))]
        self.now = times[-1]
        return [[0] * one.new for one in batch], times


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Time:
    monkeypatch.setattr(static_batching, "time", made := Time())
    return made


def test_static_batches_of_clients_who_ask_again(clock: Time) -> None:
    """The third is asked when the first is answered, and waits for the end of the second's batch; nobody waits for the longest's tokens."""
    asked = [Asked([], "a", new) for new in (2, 4, 2, 2, 2)]
    served = static_batching.serve(clock.run, asked, None, clients=2, at_most=8)
    assert clock.sizes == [2, 2, 1] and list(map(len, served.answers)) == [2, 4, 2, 2, 2] and served.tokens == 12
    assert served.first == pytest.approx([0.1, 0.1, 0.3, 0.1, 0.1]) and served.seconds == pytest.approx(0.8)
    assert served.between["p50"] == pytest.approx(0.1)


def test_static_batches_of_arrivals(clock: Time) -> None:
    served = static_batching.serve(clock.run, [Asked([], "a", 2)] * 4, [0.0, 0.0, 0.0, 0.7], clients=0, at_most=2)
    assert clock.sizes == [2, 1, 1]
    assert served.first == pytest.approx([0.1, 0.1, 0.3, 0.1]) and served.seconds == pytest.approx(0.9)


# -- the same answers on all sides


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any]:
    path = make_checkpoint(tmp_path_factory.mktemp("serving") / "model")
    ours = lf.load(path, device="cpu")
    ours.generation_config.eos_token_id = []
    return ours, *static_batching.load(path)


@pytest.mark.parametrize("times, clients", [(None, 2), ([0.0, 0.0, 0.01, 0.02], 0)])
def test_both_loops_give_the_same_answers(times: list[float] | None, clients: int, models: Any) -> None:
    ours, theirs, processor = models
    asked = [Asked([workload.photograph(i, (50, 40))] * (i % 3), f"{i} cats", 3 + i) for i in range(4)]
    one, texts, stats = serving.serve(ours, asked, times, clients)
    other = static_batching.serve(lambda batch: static_batching.answer(theirs, processor, batch), asked, times, clients, 2)
    assert one.answers == other.answers and list(map(len, one.answers)) == [3, 4, 5, 6] and len(texts) == 4
    assert one.tokens == other.tokens == 18 and all(s > 0 for s in one.first + other.first) and stats["finished"] == 4
    assert 0 < max(one.first) <= one.seconds


class Sides:
    """Sides that answer at once, and write down who was asked for what."""

    def __init__(self, **answers: list[list[list[int]]]):
        self.calls, self.answers = list[tuple[str, str]](), answers

    def side(self, name: str) -> Any:
        def run(point: Any) -> Any:
            self.calls.append((name, point["name"]))
            count = sum(call == self.calls[-1] for call in self.calls)
            ids = self.answers.get(name, [[[1, 2], [3]]] * 9)[count - 1]
            return {"figures": {"requests_per_s": float(count), "anon_bytes": 10 - count}, "ids": ids, "stats": {}}

        return run


def test_sides_take_turns_at_each_point_in_either_order() -> None:
    sides, points = Sides(), {"p": {"name": "p"}, "q": {"name": "q"}}
    given = {name: sides.side(name) for name in ("a", "b")}
    reports = serving.in_rounds(given, points, 3, lambda side, point: (side, point) == ("b", "q"))
    assert sides.calls == [(s, "p") for s in "ab"] + [("a", "q")] + [(s, "p") for s in "ba"] + [("a", "q")] + [(s, "p") for s in "ab"] + [
        ("a", "q")
    ]
    assert set(reports["p"]) == {"a", "b"} and set(reports["q"]) == {"a"} and len(reports["p"]["b"]) == 3
    assert serving.medians(reports["p"]["a"]) == {"requests_per_s": 2.0, "anon_bytes": 7}


@pytest.mark.parametrize("wrong", ["a", "b", "c"])
@pytest.mark.parametrize("number", [0, 1])
def test_one_wrong_answer_of_any_side_in_any_round_voids_the_run(wrong: str, number: int) -> None:
    ids = [[[1, 2], [3]]] * 2
    ids[number] = [[1, 2], [4]]
    sides = Sides(**{wrong: ids})
    with pytest.raises(ValueError, match=f"p, round {number if (wrong, number) != ('a', 0) else 0}: of 2 answers of . 1 are those of"):
        serving.in_rounds({name: sides.side(name) for name in "abc"}, {"p": {"name": "p"}}, 2, lambda side, point: False)


def test_a_process_a_side_serves_point_after_point(tmp_path_factory: pytest.TempPathFactory, models: Any) -> None:
    """In fp32 on both sides, from one checkpoint; what ends early says what it was."""
    path = make_checkpoint(tmp_path_factory.mktemp("processes") / "model")
    commands = {side: ["-m", "bench.serving", side, str(path)] for side in ("llava_fast", "transformers-1")}
    point = {"count": 2, "most_views": 1, "new": 3, "concurrency": 2}
    with serving.processes(commands) as sides:
        bound = point | {"engine": {"max_mixed_rows": 5}}
        ours, theirs = sides["llava_fast"](bound), [sides["transformers-1"](point) for _ in range(2)]
        assert ours["ids"] == theirs[0]["ids"] == theirs[1]["ids"] and ours["stats"]["finished"] == 2
        assert ours["figures"].keys() == theirs[0]["figures"].keys() >= {"first_token_p50_s", "requests_per_s", "anon_bytes"}
        with pytest.raises(RuntimeError, match="bench.serving llava_fast .* ended with 1:(?s:.*)got 'audio'"):
            sides["llava_fast"](point | {"scenario": "audio"})
    with (
        pytest.raises(RuntimeError, match="bench.serving no_such x ended with 1"),
        serving.processes({"a": ["-m", "bench.serving", "no_such", "x"]}),
    ):
        pass


@torch.inference_mode()
def test_what_is_kept_by_hand_gives_what_the_whole_prompt_gives(models: Any) -> None:
    _, model, processor = models
    pictures, texts = [workload.photograph(i, (50, 40)) for i in range(2)], ["1 cat", "2 cat"]
    whole = [static_batching.answer(model, processor, [Asked(pictures, text, 4)])[0][0] for text in texts]
    begun = processor(images=pictures, text="<image><image>", return_tensors="pt")
    rows = reuse.features(model, begun["pixel_values"])
    ids = processor.tokenizer(texts, return_tensors="pt", add_special_tokens=False)["input_ids"]
    for text, own, answer in zip(texts, ids, whole, strict=True):
        embeds = reuse.embeddings(model, torch.cat([begun["input_ids"], own[None]], 1), rows)
        assert int(model(inputs_embeds=embeds).logits[0, -1].argmax()) == answer[0], text
    kept = reuse.prefill(model, begun["input_ids"], rows)
    length = kept.get_seq_length()
    for _ in range(2):
        assert reuse.questions(model, processor.tokenizer, kept, texts[:1], 4) == whole[:1] and kept.get_seq_length() == length
    kept.batch_repeat_interleave(2)
    assert reuse.questions(model, processor.tokenizer, kept, texts, 4) == whole


# -- a server's client


class OpenAI(http.server.BaseHTTPRequestHandler):
    """Answers with as many words as tokens were asked for, a chunk each; `fault` of the server says what goes wrong."""

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"data": [{"id": "a model"}]}).encode())

    def do_POST(self) -> None:
        server: Any = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.bodies.append(body)
        if server.fault == "refusal":
            self.send_error(400, "too many pictures")
            return
        self.send_response(200)
        self.end_headers()
        words = body["max_tokens"] - (server.fault == "end token")
        for i in range(words):
            if server.fault == "error" and i == 2:
                self.tell({"error": {"message": "out of memory"}})
                return
            if server.fault == "break" and i == 2:
                return
            if server.fault == "nonsense" and i == 2:
                self.wfile.write(b"data: {not json\n\n")
                return
            self.tell({"choices": [{"delta": {"content": f"w{i} "}}]})
        usage: dict[str, Any] = {"completion_tokens": words, "prompt_tokens": 7}
        usage |= {"prompt_tokens_details": {"cached_tokens": 2}} if server.fault == "cache report" else {}
        self.tell({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")

    def tell(self, chunk: dict[str, Any]) -> None:
        self.wfile.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
        self.wfile.flush()


@pytest.fixture
def server() -> Iterator[Any]:
    running: Any = http.server.ThreadingHTTPServer(("127.0.0.1", 0), OpenAI)
    running.bodies, running.fault = [], None
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    running.url = f"http://127.0.0.1:{running.server_port}"
    yield running
    running.shutdown()
    thread.join()
    running.server_close()


ASKED = [Asked([workload.photograph(0, (32, 24))], "What is it?", 3), Asked([], "And so?", 4)]


@pytest.mark.parametrize("times, clients", [(None, 1), ([0.0, 0.05], 0)])
def test_a_server_is_served_the_workload(server: Any, times: list[float] | None, clients: int) -> None:
    point = servers.serve(servers.Server(server.url + "/v1"), ASKED, times, clients)
    served = point.served
    assert point.prompts == [7, 7] and point.cached is None
    assert served.answers == ["w0 w1 w2 ", "w0 w1 w2 w3 "] and served.tokens == 7
    assert len(served.first) == 2 and all(0 < first <= served.seconds for first in served.first) and served.between["p50"] > 0
    body = next(body for body in server.bodies if body["max_tokens"] == 3)
    assert body["model"] == "a model" and body["stream"] and body["ignore_eos"] and body["temperature"] == 0
    picture, text = body["messages"][0]["content"]
    sent = Image.open(io.BytesIO(base64.b64decode(picture["image_url"]["url"].removeprefix("data:image/png;base64,"))))
    assert sent.tobytes() == ASKED[0].pictures[0].tobytes() and text == {"type": "text", "text": "What is it?"}


def test_what_a_server_found_in_its_cache(server: Any) -> None:
    server.fault = "cache report"
    assert servers.serve(servers.Server(server.url), ASKED, None, 2).cached == 4


@pytest.mark.parametrize(
    "fault, message",
    [
        ("refusal", "refused chat/completions: 400 too many pictures"),
        ("error", "ended a stream: .*out of memory"),
        ("break", "broke a stream off after 2 chunks: it has no end"),
        ("nonsense", "broke a stream off after 2 chunks: JSONDecodeError"),
        ("end token", "made 2 tokens of 3: it has to know ignore_eos"),
    ],
)
def test_what_a_server_does_wrong_is_told(server: Any, fault: str, message: str) -> None:
    server.fault = fault
    with pytest.raises(RuntimeError, match=message):
        servers.serve(servers.Server(server.url), ASKED[:1], [0.0], 0)


def test_a_server_that_is_not_there_is_told() -> None:
    with pytest.raises(RuntimeError, match="no answer from http://127.0.0.1:1: ConnectionRefusedError"):
        servers.Server("http://127.0.0.1:1")
    with pytest.raises(ValueError, match=r"http\(s\)://host\[:port\], got 'localhost:8000'"):
        servers.Server("localhost:8000")


def test_one_failure_ends_the_others(server: Any) -> None:
    """Nobody waits for arrivals that are minutes off."""
    server.fault = "refusal"
    begun = time.perf_counter()
    with pytest.raises(RuntimeError, match="refused"):
        servers.serve(servers.Server(server.url), ASKED, [0.0, 300.0], 0)
    assert time.perf_counter() - begun < 60


def test_vllm_where_it_is_not_installed() -> None:
    with pytest.raises(RuntimeError, match="vllm is not installed here"):
        servers.with_vllm("nowhere", ASKED, ASKED)


def test_vllm_offline_is_asked_for_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    import types

    made: dict[str, Any] = {}

    class LLM:
        def __init__(self, **options: Any):
            made["options"] = options

        def chat(self, given: list[Any], params: list[Any], use_tqdm: bool) -> list[Any]:
            made.setdefault("given", []).append(given)
            made["params"] = params
            outputs = [[types.SimpleNamespace(text=f"{len(one[0]['content'])}")] for one in given]
            return [types.SimpleNamespace(outputs=out, prompt_token_ids=[1, 2, 3]) for out in outputs]

    module = types.ModuleType("vllm")
    module.LLM, module.SamplingParams = LLM, lambda **fields: fields  # type: ignore[attr-defined]
    module.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "vllm", module)
    told = servers.with_vllm("a checkpoint", ASKED, ASKED[1:])
    rates = told["figures"]
    assert told["answers"] == ["2", "1"] and told["prompts"] == [3, 3] and list(map(len, made["given"])) == [1, 2]
    assert rates["tokens_per_s"] == pytest.approx(3.5 * rates["requests_per_s"])
    assert made["options"] == {"model": "a checkpoint", "limit_mm_per_prompt": {"image": 1}}
    assert made["params"][1] == {"temperature": 0, "max_tokens": 4, "min_tokens": 4, "ignore_eos": True}


@pytest.fixture(scope="module")
def sides(models: Any, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Our file, and one of a side that answers as we do, of one rate and one number of clients."""
    shape = ["--count", "2", "--most-views", "1", "--new", "12", "--rates", "50", "--clients", "2"]
    path = tmp_path_factory.mktemp("sides") / "ours.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(servers, "load", lambda checkpoint: models[0])
        servers.main(["engine", str(path), "--checkpoint", "tiny", *shape])
    ours = json.loads(path.read_text())
    return [ours, json.loads(path.read_text()) | {"side": "vllm"}]


def rows_of(*told: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    files = [folder / f"{i}.json" for i in range(len(told))]
    for file, side in zip(files, told, strict=True):
        file.write_text(json.dumps(side))
    return servers.rows(files)


def test_files_of_sides_become_rows(sides: list[dict[str, Any]], tmp_path: Path) -> None:
    made = rows_of(*sides, folder=tmp_path)
    assert [(row["name"], row["axis"], row["at"]) for row in made] == [
        ("servers_arrivals_per_s_50", "arrivals_per_s", 50.0),
        ("servers_concurrency_2", "concurrency", 2),
    ]
    for row in made:
        assert row["baseline"] == "vllm" and row["equal_answers"] == {"vllm": 2} and row["requests"] == 2 and "void" not in row
        assert row["agreement"] == {"vllm": 1.0} and row["prompt_tokens"] > 2
        assert row["ratio_requests_per_s"] == pytest.approx(row["ours_requests_per_s"] / row["baseline_requests_per_s"])
        assert set(row["sides"]["vllm"]) == set(row["sides"]["llava_fast"]) >= {"first_token_p50_s", "inter_token_p95_ms", "tokens_per_s"}


def test_points_share_no_request(server: Any, tmp_path: Path) -> None:
    """What a server keeps of one is of no use for the next, nor is the warm-up's."""
    shape = ["--count", "3", "--most-views", "1", "--new", "3", "--rates", "50", "--clients", "2", "3"]
    servers.main(["server", str(tmp_path / "theirs.json"), "--url", server.url, *shape])
    asked = [json.dumps(body["messages"]) for body in server.bodies]
    assert len(asked) == len(set(asked)) == 2 + 3 * 3
    pictures = [item["image_url"]["url"] for body in server.bodies for item in body["messages"][0]["content"] if "image_url" in item]
    assert len(pictures) == len(set(pictures)) > 3
    assert [point["part"] for point in json.loads((tmp_path / "theirs.json").read_text())["points"]] == [1, 2, 3]


def test_a_server_of_other_answers_is_void(sides: list[dict[str, Any]], server: Any, tmp_path: Path) -> None:
    """Of words that nobody else says; a third side is compared all the same."""
    shape = ["--count", "2", "--most-views", "1", "--new", "12", "--rates", "50", "--clients", "2"]
    servers.main(["server", str(tmp_path / "theirs.json"), "--url", server.url, "--name", "sglang", *shape])
    wrong = json.loads((tmp_path / "theirs.json").read_text())
    alone = rows_of(sides[0], wrong, folder=tmp_path)
    assert "2 of 2 prompts are others: request 0 has 7 tokens, ours" in alone[0]["void"]["sglang"]
    assert "sides" not in alone[0] and "axis" not in alone[0] and not any("ratio" in key for key in alone[0])
    for point, ours in zip(wrong["points"], sides[0]["points"], strict=True):
        point["prompts"] = ours["prompts"]
    three = rows_of(*sides, wrong, folder=tmp_path)
    assert three[1]["void"] == {"sglang": "other answers: 0.00 of their words agree before the first difference, expected 0.5 or more"}
    assert three[1]["baseline"] == "vllm" and set(three[1]["sides"]) == {"llava_fast", "vllm"}
    assert three[1]["equal_answers"] == {"vllm": 2, "sglang": 0}


def test_answers_agree_up_to_their_first_difference(sides: list[dict[str, Any]], tmp_path: Path) -> None:
    assert servers.leading("a b c d", "a b x d") == 0.5 and servers.leading("a", "a b c d") == 0.25
    assert servers.leading("", "") == 1.0 and servers.leading("", "a") == 0.0
    ours, theirs = json.loads(json.dumps(sides))
    for told, words in ((ours, "a b c d e f g h"), (theirs, "a b c d e x g h")):
        for point in told["points"]:
            point["answers"] = [words, "yes no"]
    (row, _) = rows_of(ours, theirs, folder=tmp_path)
    assert row["equal_answers"] == {"vllm": 1} and row["agreement"] == {"vllm": pytest.approx((5 / 8 + 1) / 2)} and "void" not in row
    theirs["points"][0]["answers"] = ["a x c d e f g h", "no yes"]
    (row, other) = rows_of(ours, theirs, folder=tmp_path)
    assert "0.06 of their words" in row["void"]["vllm"] and "void" not in other


def test_files_of_other_requests_are_refused(sides: list[dict[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a file of llava_fast and those of others, got vllm"):
        rows_of(sides[1], folder=tmp_path)
    with pytest.raises(ValueError, match="the files are of different requests: {'llava_fast': .*'count': 3"):
        rows_of(sides[0], sides[1] | {"settings": {"count": 3}}, folder=tmp_path)
    other = json.loads(json.dumps(sides[1]))
    other["points"][1]["part"] = 5
    with pytest.raises(ValueError, match="different requests at concurrency 2: all sides take the same --rates and --clients"):
        rows_of(sides[0], other, folder=tmp_path)


def test_vllm_offline_answers_a_point_of_the_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[Any] = []

    def with_vllm(checkpoint: str, given: list[Asked], warm: list[Asked]) -> dict[str, Any]:
        asked.append((given, warm))
        return {"figures": {}, "answers": ["a"] * len(given), "prompts": [1] * len(given)}

    monkeypatch.setattr(servers, "with_vllm", with_vllm)
    command = ["vllm", str(tmp_path / "v.json"), "--checkpoint", "c", "--count", "3", "--most-views", "1", "--rates", "1"]
    servers.main([*command, "--clients", "2", "3"])
    (point,) = json.loads((tmp_path / "v.json").read_text())["points"]
    assert point["concurrency"] == point["part"] == 3
    found = workload.records(3, most_views=1)
    assert asked == [(workload.requests(found, 64, part=3), workload.requests(found, 64)[:2])]
    with pytest.raises(ValueError, match=r"expected --count 3 among --clients, got \[2\]"):
        servers.main([*command, "--clients", "2"])


def test_the_engine_s_latencies_are_the_requests_own(models: Any) -> None:
    """Nearest rank, as the other side's."""
    asked = [Asked([], "What is it?", 6)] * 3
    served, _, stats = serving.serve(models[0], asked, None, 1)
    assert workload.figures(served)["first_token_p50_s"] == pytest.approx(statistics.median(served.first))
    assert served.between == stats["inter_token"] and served.tokens == stats["steps"] == 18
