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
"""

from __future__ import annotations

import argparse
import base64
import http.client
import importlib.util
import io
import json
import sys
import threading
import time
import urllib.parse
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from PIL import Image

from bench.workload import Asked, Served, arrivals, figures, records, requests
from llava_fast.engine.stats import latencies

TIMEOUT = 600.0  # seconds without a byte


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

    def stream(self, body: str) -> tuple[str, int, list[float]]:
        """The text, its tokens as the server counts them, and when each chunk with text came."""
        connection, response = self._send("POST", "chat/completions", body)
        text, tokens, times, done = "", 0, [], False
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
                tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
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
        return text, tokens, times


def serve(server: Server, asked: Sequence[Asked], times: Sequence[float] | None, clients: int) -> Served:
    """times: seconds from now at which each is sent; None: `clients` who send the next as soon as they have an answer."""
    bodies = [server.body(one) for one in asked]
    start, failed = time.perf_counter(), threading.Event()

    def send(i: int) -> tuple[float, tuple[str, int, list[float]]]:
        if times is not None and failed.wait(max(start + times[i] - time.perf_counter(), 0)):
            raise RuntimeError("another request failed")
        came = time.perf_counter() if times is None else start + times[i]
        try:
            answer = server.stream(bodies[i])
        except RuntimeError:
            failed.set()
            raise
        if answer[1] != asked[i].new:
            failed.set()
            raise RuntimeError(f"{server.url} made {answer[1]} tokens of {asked[i].new}: it has to know ignore_eos and include_usage")
        return came, answer

    with ThreadPoolExecutor(clients if times is None else len(asked)) as pool:
        told = list(pool.map(send, range(len(asked))))
    between = [b - a for _, (_, _, chunks) in told for a, b in zip(chunks, chunks[1:], strict=False)]
    return Served(
        first=[chunks[0] - came for came, (_, _, chunks) in told],
        between=latencies(between),
        seconds=max(chunks[-1] for _, (_, _, chunks) in told) - start,
        tokens=sum(one.new for one in asked),
        answers=[text for _, (text, _, _) in told],
    )


def with_vllm(checkpoint: str, asked: Sequence[Asked]) -> tuple[dict[str, float], list[str]]:
    """All at once, which is all that its offline interface does: rates, and no latencies."""
    if importlib.util.find_spec("vllm") is None:
        raise RuntimeError("vllm is not installed here: start a server elsewhere and use `server --url`")
    import vllm

    model = vllm.LLM(model=checkpoint, limit_mm_per_prompt={"image": max(len(one.pictures) for one in asked)})
    params = [vllm.SamplingParams(temperature=0, max_tokens=one.new, min_tokens=one.new, ignore_eos=True) for one in asked]
    given = [messages(one, data_url) for one in asked]
    model.chat(given[:1], params[:1], use_tqdm=False)
    start = time.perf_counter()
    answers = model.chat(given, params, use_tqdm=False)
    seconds = time.perf_counter() - start
    rates = {"requests_per_s": len(asked) / seconds, "tokens_per_s": sum(one.new for one in asked) / seconds}
    return rates, [answer.outputs[0].text for answer in answers]


def points(rates: Sequence[float], clients: Sequence[int]) -> list[dict[str, float]]:
    return [{"arrivals_per_s": rate} for rate in rates] + [{"concurrency": n} for n in clients]


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """The file of one side."""
    found = records(arguments.count, most_views=arguments.most_views)
    asked, done = requests(found, arguments.new), []
    if arguments.side == "vllm":
        every = points([], [len(asked)])
        values, answers = with_vllm(arguments.checkpoint, asked)
        done = [{"figures": values, "answers": answers}]
    else:
        every = points(arguments.rates, arguments.clients)
        server: Any = Server(arguments.url, arguments.model) if arguments.side == "server" else load(arguments.checkpoint)
        run = serve if arguments.side == "server" else with_engine
        run(server, asked[:2], None, 1)
        for point in every:
            times = arrivals(point["arrivals_per_s"], len(asked)) if "arrivals_per_s" in point else None
            served = run(server, asked, times, int(point.get("concurrency", 1)))
            done.append({"figures": figures(served), "answers": list(served.answers)})
    settings = {key: getattr(arguments, key) for key in ("count", "most_views", "new")}
    return {"side": arguments.name, "settings": settings, "points": [{**a, **b} for a, b in zip(every, done, strict=True)]}


def load(checkpoint: str) -> Any:
    import llava_fast as lf

    model = lf.load(checkpoint)
    model.generation_config.eos_token_id = []
    return model


def with_engine(model: Any, asked: Sequence[Asked], times: Sequence[float] | None, clients: int) -> Served:
    import llava_fast as lf
    from bench import serving

    def request(one: Asked) -> lf.Request:
        return lf.Request(messages(one, lambda picture: {"type": "image", "image": picture}))

    served, texts, _ = serving.serve(model, asked, times, clients, request, max_running=64)
    return Served(served.first, served.between, served.seconds, served.tokens, texts)


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
        equal = {side: sum(a == b for a, b in zip(p["answers"], ours["answers"], strict=True)) for side, p in same.items() if side != OURS}
        values = {side: p["figures"] for side, p in same.items()}
        name = f"servers_{axis}_{ours[axis]:g}"
        facts = {"equal_answers": equal, "requests": len(ours["answers"]), **sides[OURS]["settings"]}
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
