"""The serving workload against a running vLLM or SGLang, or against vLLM or our own engine in this process, in the rows of bench_serving.

    vllm serve CHECKPOINT --limit-mm-per-prompt '{"image": 16}'                          # or
    python -m sglang.launch_server --model-path CHECKPOINT --port 8000
    python -m bench.baselines.servers server vllm.json --url http://127.0.0.1:8000       # a running server
    python -m bench.baselines.servers vllm vllm_offline.json --checkpoint CHECKPOINT     # vllm.LLM, where it can be imported
    python -m bench.baselines.servers engine ours.json --checkpoint CHECKPOINT           # llava_fast.Engine
    python -m bench.baselines.servers rows ours.json vllm.json sglang.json               # into bench/results/, one row a point

Each of the first three runs alone on the machine and writes one file of figures. A server is sent streaming chat completions with PNG
pictures as data URLs, at the same times as the engine is given the same messages; all are told to go on past an end token, so that
everyone makes the same number of tokens. The first token is the first chunk with text; between tokens is between two chunks.
A server that cannot be reached, refuses a request or breaks its stream off ends the run with one line that says so.

A server keeps what it saw: the warm-up and every point have requests of the same shapes with pictures and words of their own, so that no
point finds its prompts in a cache, with no need of a server's own command for that. `cached_tokens` says so where the server tells it
(vLLM: --enable-prompt-tokens-details, SGLang: --enable-cache-report).

A side is void, and no ratio is taken against it, where a request's prompt has another number of tokens than ours, for then it has another
template or other views; and where in the mean less than half of an answer's words (AGREEMENT) come before its first difference from ours.
What follows a difference says nothing: in bf16 a greedy token flips at a near-tie now and then, and the rest is another text. Where one
token in a hundred flips, answers of 64 agree over 0.73 of their length, at three in a hundred over 0.43; those of another model, or without
the pictures, over the few words that all answers begin with. `equal_answers` counts those that are the same to the end.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import importlib.util
import io
import json
import statistics
import sys
import threading
import time
import urllib.parse
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from bench.workload import Asked, Served, arrivals, figures, records, requests
from llava_fast.engine.stats import latencies

TIMEOUT = 600.0  # seconds without a byte
AGREEMENT = 0.5  # share of the words below which a side answers something else


@dataclass(frozen=True)
class Answer:
    """tokens, prompt and cached (of the prompt's): as the server counts them; cached is None where it does not tell.

    times: when each chunk with text came.
    """

    text: str
    tokens: int
    prompt: int
    cached: int | None
    times: list[float]


@dataclass(frozen=True)
class Point:
    """prompts: tokens of each request's prompt."""

    served: Served
    prompts: list[int]
    cached: int | None = None


def messages(asked: Asked, picture: Any) -> list[dict[str, Any]]:
    """picture: makes the item of a message from a picture."""
    return [{"role": "user", "content": [*map(picture, asked.pictures), {"type": "text", "text": asked.text}]}]


def data_url(picture: Image.Image) -> dict[str, Any]:
    file = io.BytesIO()
    picture.save(file, "png")
    return {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()}}


class Server:
    """One that speaks the OpenAI protocol. Raises RuntimeError for whatever it does instead of answering."""

    def __init__(self, url: str, model: str | None = None, timeout: float = TIMEOUT):
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"a server's address is http(s)://host[:port], got {url!r}")
        self.url, self.timeout, self._parts = url, timeout, parts
        self._path = parts.path.rstrip("/").removesuffix("/v1") + "/v1/"
        if model is None:
            connection, response = self._send("GET", "models")
            listed = json.loads(response.read())["data"]
            connection.close()
            if not listed:
                raise RuntimeError(f"{url} serves no model")
            model = listed[0]["id"]
        self.model = model

    def _send(self, method: str, name: str, body: str | None = None) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        kind = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(str(self._parts.hostname), self._parts.port, timeout=self.timeout)
        try:
            connection.request(method, self._path + name, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            raise RuntimeError(f"no answer from {self.url}: {type(error).__name__}: {error}") from None
        if response.status != 200:
            told = response.read(2000).decode(errors="replace").strip()
            raise RuntimeError(f"{self.url} refused {name}: {response.status} {response.reason}: {told[:500]}")
        return connection, response

    def body(self, asked: Asked) -> str:
        """ignore_eos, min_tokens: what vLLM and SGLang add to the protocol."""
        wanted = {"max_tokens": asked.new, "min_tokens": asked.new, "ignore_eos": True, "temperature": 0}
        stream = {"stream": True, "stream_options": {"include_usage": True}}
        return json.dumps({"model": self.model, "messages": messages(asked, data_url), **wanted, **stream})

    def stream(self, body: str) -> Answer:
        connection, response = self._send("POST", "chat/completions", body)
        text, usage, times, done = "", dict[str, Any](), [], False
        try:
            for line in response:
                if not line.startswith(b"data:"):
                    continue
                data = line.removeprefix(b"data:").strip()
                if data == b"[DONE]":
                    done = True
                    break
                chunk = json.loads(data)
                if "error" in chunk:
                    raise RuntimeError(f"{self.url} ended a stream: {chunk['error']}")
                usage = chunk.get("usage") or usage
                delta = "".join(choice["delta"].get("content") or "" for choice in chunk["choices"])
                if delta:
                    times.append(time.perf_counter())
                    text += delta
        except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
            raise RuntimeError(f"{self.url} broke a stream off after {len(times)} chunks: {type(error).__name__}: {error}") from None
        finally:
            connection.close()
        if not done or not times:
            raise RuntimeError(f"{self.url} broke a stream off after {len(times)} chunks: it has no end" if not done else "it has no text")
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
        return Answer(text, usage.get("completion_tokens", 0), usage.get("prompt_tokens", 0), cached, times)


def serve(server: Server, asked: Sequence[Asked], times: Sequence[float] | None, clients: int) -> Point:
    """times: seconds from now at which each is sent; None: `clients` who send the next as soon as they have an answer."""
    bodies = [server.body(one) for one in asked]
    start, failed = time.perf_counter(), threading.Event()

    def send(i: int) -> tuple[float, Answer]:
        if times is not None and failed.wait(max(start + times[i] - time.perf_counter(), 0)):
            raise RuntimeError("another request failed")
        came = time.perf_counter() if times is None else start + times[i]
        try:
            answer = server.stream(bodies[i])
        except RuntimeError:
            failed.set()
            raise
        if answer.tokens != asked[i].new:
            failed.set()
            raise RuntimeError(f"{server.url} made {answer.tokens} tokens of {asked[i].new}: it has to know ignore_eos and include_usage")
        return came, answer

    with ThreadPoolExecutor(clients if times is None else len(asked)) as pool:
        told = list(pool.map(send, range(len(asked))))
    between = [b - a for _, one in told for a, b in zip(one.times, one.times[1:], strict=False)]
    served = Served(
        first=[one.times[0] - came for came, one in told],
        between=latencies(between),
        seconds=max(one.times[-1] for _, one in told) - start,
        tokens=sum(one.new for one in asked),
        answers=[one.text for _, one in told],
    )
    cached = [one.cached for _, one in told if one.cached is not None]
    return Point(served, [one.prompt for _, one in told], sum(cached) if cached else None)


def with_vllm(checkpoint: str, asked: Sequence[Asked], warm: Sequence[Asked]) -> dict[str, Any]:
    """All at once, which is all that its offline interface does: rates, and no latencies."""
    if importlib.util.find_spec("vllm") is None:
        raise RuntimeError("vllm is not installed here: start a server elsewhere and use `server --url`")
    import vllm

    model = vllm.LLM(model=checkpoint, limit_mm_per_prompt={"image": max(len(one.pictures) for one in [*asked, *warm])})
    params = [vllm.SamplingParams(temperature=0, max_tokens=one.new, min_tokens=one.new, ignore_eos=True) for one in asked]
    given = [messages(one, data_url) for one in asked]
    model.chat([messages(one, data_url) for one in warm], params[: len(warm)], use_tqdm=False)
    start = time.perf_counter()
    answers = model.chat(given, params, use_tqdm=False)
    seconds = time.perf_counter() - start
    rates = {"requests_per_s": len(asked) / seconds, "tokens_per_s": sum(one.new for one in asked) / seconds}
    prompts = [len(answer.prompt_token_ids) for answer in answers]
    return {"figures": rates, "answers": [answer.outputs[0].text for answer in answers], "prompts": prompts}


def points(rates: Sequence[float], clients: Sequence[int]) -> list[dict[str, float]]:
    """part: of the workload, each point its own (0 is the warm-up's)."""
    every = [{"arrivals_per_s": rate} for rate in rates] + [{"concurrency": n} for n in clients]
    return [point | {"part": part} for part, point in enumerate(every, 1)]


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """The file of one side."""
    found, done = records(arguments.count, most_views=arguments.most_views), []
    every = points(arguments.rates, arguments.clients)
    warm = requests(found, arguments.new)[:2]
    if arguments.side == "vllm":
        every = [point for point in every if point.get("concurrency") == len(found)]
        if not every:
            raise ValueError(f"vllm is asked all at once: expected --count {len(found)} among --clients, got {arguments.clients}")
        done = [with_vllm(arguments.checkpoint, requests(found, arguments.new, part=int(every[0]["part"])), warm)]
    else:
        server: Any = Server(arguments.url, arguments.model) if arguments.side == "server" else load(arguments.checkpoint)
        run = serve if arguments.side == "server" else with_engine
        run(server, warm, None, 1)
        for point in every:
            asked = requests(found, arguments.new, part=int(point["part"]))
            times = arrivals(point["arrivals_per_s"], len(asked)) if "arrivals_per_s" in point else None
            made = run(server, asked, times, int(point.get("concurrency", 1)))
            told = {"answers": list(made.served.answers), "prompts": made.prompts, "cached": made.cached}
            done.append({"figures": figures(made.served), **told})
    settings = {key: getattr(arguments, key) for key in ("count", "most_views", "new")}
    return {"side": arguments.name, "settings": settings, "points": [{**a, **b} for a, b in zip(every, done, strict=True)]}


def load(checkpoint: str) -> Any:
    import llava_fast as lf

    model = lf.load(checkpoint)
    model.generation_config.eos_token_id = []
    return model


def with_engine(model: Any, asked: Sequence[Asked], times: Sequence[float] | None, clients: int) -> Point:
    import llava_fast as lf
    from bench import serving

    def request(one: Asked) -> lf.Request:
        return lf.Request(messages(one, lambda picture: {"type": "image", "image": picture}))

    served, texts, stats = serving.serve(model, asked, times, clients, request, max_running=64)
    return Point(replace(served, answers=texts), stats["prompt_tokens"])


def leading(answer: str, expected: str) -> float:
    """Share of the longer one's words before the first that differs."""
    one, two = answer.split(), expected.split()
    same = next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))
    return same / max(len(one), len(two)) if one or two else 1.0


def why_void(point: dict[str, Any], ours: dict[str, Any], agreement: float) -> str | None:
    """What makes a side's point another work than ours; None if nothing does."""
    others = [(i, a, b) for i, (a, b) in enumerate(zip(point["prompts"], ours["prompts"], strict=True)) if a != b]
    if others:
        i, theirs, own = others[0]
        return f"{len(others)} of {len(ours['prompts'])} prompts are others: request {i} has {theirs} tokens, ours {own}"
    if agreement < AGREEMENT:
        return f"other answers: {agreement:.2f} of their words agree before the first difference, expected {AGREEMENT} or more"
    return None


def rows(files: Sequence[Path], device: str = "cpu") -> list[dict[str, Any]]:
    """A measurement of every point that our side's file (that of 'llava_fast') and another's have."""
    from bench.paired import OURS, row_of_sides

    sides = {told["side"]: told for told in (json.loads(file.read_text()) for file in files)}
    if OURS not in sides or len(sides) < 2:
        raise ValueError(f"expected a file of {OURS} and those of others, got {', '.join(sides)}")
    if len({json.dumps(told["settings"]) for told in sides.values()}) > 1:
        raise ValueError(f"the files are of different requests: { ({side: told['settings'] for side, told in sides.items()}) }")
    made = []
    for ours in sides[OURS]["points"]:
        axis = "arrivals_per_s" if "arrivals_per_s" in ours else "concurrency"
        same = {side: p for side, told in sides.items() for p in told["points"] if p.get(axis) == ours[axis]}
        if len(same) < 2:
            continue
        if len({p["part"] for p in same.values()}) > 1:
            raise ValueError(f"the files are of different requests at {axis} {ours[axis]:g}: all sides take the same --rates and --clients")
        rivals = {side: p for side, p in same.items() if side != OURS}
        pairs = {side: list(zip(p["answers"], ours["answers"], strict=True)) for side, p in rivals.items()}
        agreement = {side: statistics.fmean(leading(a, b) for a, b in own) for side, own in pairs.items()}
        void = {side: why for side, p in rivals.items() if (why := why_void(p, ours, agreement[side])) is not None}
        facts = {"equal_answers": {side: sum(a == b for a, b in own) for side, own in pairs.items()}, "agreement": agreement}
        facts |= {"requests": len(ours["answers"]), "cached_tokens": {side: p.get("cached") for side, p in rivals.items()}}
        facts |= {"prompt_tokens": sum(ours["prompts"]), **sides[OURS]["settings"], **({"void": void} if void else {})}
        name, values = f"servers_{axis}_{ours[axis]:g}", {side: p["figures"] for side, p in same.items() if side not in void}
        if len(values) < 2:
            made.append({"name": name, "device": device, **facts})
        else:
            made.append(row_of_sides(name, values, "requests_per_s", device=device, axis=axis, at=ours[axis], **facts))
    return made


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(prog="python -m bench.baselines.servers", description=__doc__.splitlines()[0])
    sides = root.add_subparsers(dest="side", required=True)
    for side, name in (("server", "server"), ("vllm", "vllm offline"), ("engine", "llava_fast")):
        command = sides.add_parser(side)
        command.add_argument("out", type=Path, help="the file of figures")
        command.add_argument("--name", default=name, help="what the side is called in the rows")
        command.add_argument("--count", type=int, default=64)
        command.add_argument("--most-views", type=int, default=16)
        command.add_argument("--new", type=int, default=64, help="tokens of an answer, at most")
        command.add_argument("--rates", type=float, nargs="*", default=[1, 2, 4, 8])
        command.add_argument("--clients", type=int, nargs="*", default=[1, 4, 16, 64])
        if side == "server":
            command.add_argument("--url", required=True)
            command.add_argument("--model", help="the first that the server lists, if none is named")
        else:
            command.add_argument("--checkpoint", required=True)
    command = sides.add_parser("rows")
    command.add_argument("files", type=Path, nargs="+")
    return root


def main(given: Sequence[str] | None = None) -> None:
    arguments = parser().parse_args(given)
    if arguments.side != "rows":
        arguments.out.write_text(json.dumps(measure(arguments), indent=1) + "\n")
        return
    import torch

    from bench import results
    from llava_fast.limits import probe

    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(results.write("servers", rows(arguments.files, device), {}, probe(device)))


if __name__ == "__main__":
    try:
        main()
    except (RuntimeError, ValueError, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
