"""`llava-fast`: demo, generate, data, train, convert, info, bench."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import os
import re
import sys
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import llava_fast
from llava_fast.requests import ask

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
notes = Console(stderr=True)

Model = Annotated[str, typer.Option("--model", "-m", help="a checkpoint directory (transformers or original LLaVA) or a hub id")]
VisionTower = Annotated[str | None, typer.Option(help="an original checkpoint's tower, if not where its config says")]


def megabytes(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str | None, typer.Argument(help="the question; may hold <image> and <video> marks")] = None,
    requests: Annotated[Path | None, typer.Option(help="a JSONL file of requests in place of a prompt; see the README")] = None,
    out: Annotated[Path | None, typer.Option(help="the JSONL file for their answers; one that was begun is gone on with")] = None,
    retry_errors: Annotated[bool, typer.Option("--retry-errors", help="run requests again whose answer there is an error")] = False,
    image: Annotated[list[Path] | None, typer.Option("--image", "-i", help="a picture; repeat for more")] = None,
    video: Annotated[list[Path] | None, typer.Option("--video", help="a video file or a folder of frames; repeat for more")] = None,
    raw: Annotated[bool, typer.Option(help="the prompt is the whole text as the model is to see it, chat markup included")] = False,
    keep_order: Annotated[bool, typer.Option(help="keep pictures at their marks although the chat template moves them first")] = False,
    num_frames: Annotated[int | None, typer.Option(help="frames of a video, spread evenly")] = None,
    fps: Annotated[float | None, typer.Option(help="frames a second of a video")] = None,
    pool: Annotated[Literal["average", "bilinear", "max"] | None, typer.Option(help="pool video frames 2x2")] = None,
    anyres: Annotated[bool | None, typer.Option(help="cut a single picture into tiles")] = None,
    image_aspect: Annotated[Literal["squash", "pad"], typer.Option(help="how a picture is made square")] = "squash",
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    quantise: Annotated[Literal["int8", "int4", "fp8"] | None, typer.Option(help="the decoder's weights in fewer bits")] = None,
    kv_cache_bytes: Annotated[str | None, typer.Option(help="memory for keys and values, like 2GiB")] = None,
    max_running: Annotated[int, typer.Option(help="sequences at a time")] = 64,
    speculate: Annotated[int, typer.Option(help="tokens to guess a step from the prompt, for greedy answers")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object instead of the streamed text")] = False,
) -> None:
    """Answer a question about pictures and videos, or with --requests a file of them; an answer to a prompt streams as it is made."""
    if (prompt is None) == (requests is None):
        raise ValueError(f"generate takes either a PROMPT or --requests, got {'both' if prompt is not None else 'neither'}")
    if requests is not None and out is None:
        raise ValueError("--requests needs --out, a file for the answers")
    others = ("--image", image), ("--video", video), ("--json", as_json)
    for name, value in others if requests is not None else (("--out", out), ("--retry-errors", retry_errors)):
        if value:
            raise ValueError(f"{name} goes with {'a PROMPT' if requests is not None else '--requests'} only")
    inputs = llava_fast.InputOptions(
        keep_order=keep_order,
        num_frames=num_frames,
        fps=fps,
        pool=pool,
        anyres=anyres,
        image_aspect=image_aspect,
    )
    sampling = llava_fast.SamplingParams(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    loading = dict(device=device, dtype=dtype, quantise=quantise)
    cache = None if kv_cache_bytes is None else count_bytes(kv_cache_bytes)
    options = dict(kv_cache_bytes=cache, max_running=max_running, speculate=speculate)
    if requests is not None and out is not None:
        answers_to_file(model, requests, out, raw, sampling, inputs, loading, options, retry_errors)
    elif prompt is not None:
        request = ask(prompt, [str(path) for path in image or []], [str(path) for path in video or []], raw)
        one_answer(model, request, sampling, inputs, loading, options, as_json)


def one_answer(
    model: str,
    request: llava_fast.Request,
    sampling: llava_fast.SamplingParams,
    inputs: llava_fast.InputOptions,
    loading: dict[str, Any],
    options: dict[str, Any],
    as_json: bool,
) -> None:
    start = time.perf_counter()
    with notes.status(escape(f"loading {model}")):
        loaded = llava_fast.load(model, **loading)
    ready = time.perf_counter()
    with llava_fast.Engine(loaded, **options) as engine:
        if as_json:
            completion = llava_fast.generate(loaded, request, sampling, inputs, engine=engine)
            print(json.dumps({**dataclasses.asdict(completion), "load_seconds": round(ready - start, 3)}))
            return
        deltas = llava_fast.generate(loaded, request, sampling, inputs, stream=True, engine=engine)
        with notes.status("reading the pictures"):
            first_delta = next(deltas, (0, "", None))
        first = time.perf_counter() - ready
        for _, delta, _ in itertools.chain([first_delta], deltas):
            print(delta, end="", flush=True)
    print()
    notes.print(
        f"[dim]loaded in {ready - start:.1f} s, first text after {first:.2f} s, all after {time.perf_counter() - ready:.2f} s[/dim]"
    )


def answers_to_file(
    model: str,
    path: Path,
    out: Path,
    raw: bool,
    sampling: llava_fast.SamplingParams,
    inputs: llava_fast.InputOptions,
    loading: dict[str, Any],
    options: dict[str, Any],
    retry_errors: bool,
) -> None:
    from llava_fast.engine.engine import ANY_ROWS
    from llava_fast.engine.jsonl import RequestFile

    requests = RequestFile(path, sampling, raw)
    if not out.parent.is_dir():  # said before a model is loaded
        raise ValueError(f"{out} cannot be written: there is no folder {out.parent}")
    try:
        with notes.status(escape(f"loading {model}")):
            loaded = llava_fast.load(model, **loading)
        with llava_fast.Engine(loaded, max_mixed_rows=ANY_ROWS, **options) as engine:
            tally = llava_fast.generate(loaded, requests, sampling, inputs, engine=engine, out=out, retry_errors=retry_errors)
    except KeyboardInterrupt:
        done = 0
        if out.exists():
            with out.open("rb") as file:
                done = sum(line.endswith(b"\n") for line in file)
        notes.print(
            f"stopped: {out} answers {done} of {len(requests)} requests; the same command goes on from there", markup=False, soft_wrap=True
        )
        raise typer.Exit(130) from None
    except OSError as error:  # a full disk, say
        raise ValueError(f"{out} could not be written: {error.strerror}; the same command goes on from what it holds") from None
    stats = engine.stats(limits=True)
    first, between = stats.time_to_first_token, stats.inter_token
    found = f" ({tally.found} of them before)" if tally.found else ""
    notes.print(
        f"{out} answers {tally.requests} requests{found}, {tally.errors} of them with an error\n"
        f"{stats.tokens_per_s:,.1f} tokens/s; to the first token, waiting included: p50 {first['p50']:.2f} s, p95 {first['p95']:.2f} s; "
        f"between tokens: p50 {between['p50'] * 1e3:.1f} ms, p95 {between['p95'] * 1e3:.1f} ms, p99 {between['p99'] * 1e3:.1f} ms\n"
        f"reused: {stats.prefix_reused:.0%} of prompt rows, {stats.pictures_reused:.0%} of pictures"
        + ("" if stats.decode_of_limit is None else f"; decode reads at {stats.decode_of_limit:.0%} of this machine's limit")
        + ("" if stats.prefill_of_torch is None else f"; prefill at {stats.prefill_of_torch:.0%} of torch's fp32 products"),
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def count_bytes(text: str) -> int:
    """A number of bytes: 2GiB, 1.5 GB, 500000. Raises ValueError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?))?b?", text.strip().lower())
    if match is None:
        raise ValueError(f"a number of bytes is written like 500000, 1.5GB or 2GiB, got {text!r}")
    number, prefix, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** ("kmgt".index(prefix) + 1 if prefix else 0))


@app.command()
def train(
    config: Annotated[Path | None, typer.Argument(help="a YAML or TOML file with the fields of TrainConfig")] = None,
    recipe: Annotated[str | None, typer.Option(help="in place of a file: align, sft, interleave, dpo, ...")] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="the checkpoint to start from")] = None,
    data: Annotated[list[str] | None, typer.Option(help="a file of records; repeat for more")] = None,
    out: Annotated[str | None, typer.Option(help="output_dir")] = None,
    changes: Annotated[list[str] | None, typer.Option("--set", help="a field, like lr=1e-4 or lora.r=128; repeat for more")] = None,
) -> None:
    """Train by a configuration file or a recipe; a run that was stopped goes on where it was."""
    from llava_fast.training.config import change_fields, read_fields

    if (config is None) == (recipe is None):
        raise ValueError(f"train takes either a file or --recipe, got {'both' if config is not None else 'neither'}")
    fields: dict[str, Any] = {"recipe": recipe} if config is None else read_fields(config)
    given = {"model": model, "data": tuple(data or ()) or None, "output_dir": out}
    fields |= {name: value for name, value in given.items() if value is not None}
    result = llava_fast.train(change_fields(fields, changes or []))
    if os.environ.get("RANK", "0") == "0":  # under torchrun
        notes.print(f"{result.steps} steps, checkpoint in {result.output_dir}", markup=False)


data = typer.Typer(no_args_is_help=True, help="Look at training data before a run.")
app.add_typer(data, name="data")


@data.command("check")
def check(
    sources: Annotated[list[Path], typer.Argument(help="files and folders of records, mixtures of them, or a recipe")],
    model: Annotated[str | None, typer.Option("--model", "-m", help="counts tokens with this checkpoint's tokenizer and layout")] = None,
    media_folder: Annotated[str | None, typer.Option(help="where media paths start, if not beside each file")] = None,
    out: Annotated[Path, typer.Option(help="the folder for faults.jsonl and lengths.png")] = Path("data-check"),
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object instead of tables")] = False,
) -> None:
    """Check every record: files, headers, marks, turns, lengths. Exit code 1 where something is wrong, 130 after Ctrl-C."""
    from rich.progress import Progress

    from llava_fast.training.check import check_data, read_settings, tables

    config, spec = read_settings(sources, model, media_folder)
    if config.output_dir == "none":
        config = dataclasses.replace(config, index_dir=str(out / "index"))
    with Progress(console=notes, transient=True) as bar:
        task = bar.add_task("checking", total=None)
        summary = check_data(config, spec, out, lambda seen, total: bar.update(task, completed=seen, total=total))
    if as_json:
        print(json.dumps(summary.plain()))
    else:
        for table in tables(summary):
            Console().print(table)
        for whose, found in summary.parts:
            if found.rows is not None:
                where = "" if found.index is None else f"; index in {found.index}"
                notes.print(
                    f"{whose}{found.rows:,} rows of {config.tokens_per_row:,} tokens an epoch, {found.fill:.1%} full{where}",
                    markup=False,
                    soft_wrap=True,
                )
        if spec is None:
            notes.print("no --model: tokens were not counted")
    if summary.stopped:
        notes.print(f"stopped before the end; {out}/faults.jsonl holds the faults found so far", markup=False, soft_wrap=True)
        raise typer.Exit(130)
    faults = sum(found.faults for _, found in summary.parts)
    if faults:
        notes.print(f"{faults:,} faults, each with file and record in {out}/faults.jsonl", markup=False, soft_wrap=True)
        raise typer.Exit(1)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="an original LLaVA or LLaVA-NeXT directory (or any checkpoint that loads)")],
    target: Annotated[Path, typer.Argument(help="the directory to write")],
    vision_tower: VisionTower = None,
    dtype: str = "auto",
) -> None:
    """Write a checkpoint as a directory that transformers loads."""
    if target.exists() and any(target.iterdir()):
        raise ValueError(f"{target} is not empty")
    with notes.status(escape(f"reading {source}")):
        model = llava_fast.load(source, device="cpu", dtype=dtype, vision_tower=vision_tower)
    with notes.status(escape(f"writing {target}")):
        model.save_pretrained(target)
    notes.print(f"wrote {target}", markup=False)


@app.command()
def info(
    path: Annotated[str | None, typer.Argument(help="a checkpoint directory or hub id")] = None,
    vision_tower: VisionTower = None,
    kernels: Annotated[bool, typer.Option("--kernels", help="which implementation each op runs on this machine, and why")] = False,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Architecture, parameters, tokens a picture, KV bytes a token, memory; reads no weights. Or, with --kernels, what runs here."""
    if kernels == (path is not None):
        raise ValueError(f"info takes a checkpoint or --kernels, one of the two, got path={path!r} and --kernels={kernels}")
    if kernels:
        show_kernels(as_json)
        return
    from llava_fast.info import describe

    assert path is not None
    facts = describe(path, vision_tower)
    if as_json:
        print(json.dumps(facts))
        return
    table = Table(show_header=False, box=None)
    for name in ("vision", "projector", "decoder", "dtype"):
        table.add_row(name, facts[name])
    for part, count in facts["parameters"].items():
        table.add_row(f"parameters, {part}", f"{count:,}")
    table.add_row("tokens a picture", str(facts["tokens_per_image"]))
    for size, tokens in facts["tokens_with_tiles"].items():
        table.add_row(f"tokens a single picture of {size}", str(tokens))
    table.add_row("context", f"{facts['context']} tokens, {facts['images_per_context']} pictures")
    table.add_row("KV cache", f"{facts['kv_bytes_per_token']:,} bytes a token, {megabytes(facts['kv_bytes_per_image'])} a picture")
    table.add_row("memory, weights", megabytes(facts["memory"]["weights"]))
    table.add_row("memory, weights and a full context", megabytes(facts["memory"]["total"]))
    table.add_row("the same on the CPU (fp32 keys and values)", megabytes(facts["memory"]["total_on_cpu"]))
    Console().print(table)


def show_kernels(as_json: bool) -> None:
    import torch

    from llava_fast.kernels import registry

    # Arithmetic is fp32 on a CPU, in the stored dtype on a GPU.
    device, dtypes = ("cuda", (torch.bfloat16, torch.float16)) if torch.cuda.is_available() else ("cpu", (torch.float32,))
    choices = registry.explain(device, dtypes)
    if as_json:
        print(json.dumps([{**dataclasses.asdict(choice), "dtype": str(choice.dtype).removeprefix("torch.")} for choice in choices]))
        return
    print("op (device, dtype of the input; kinds of weights, widths or masks): what runs, why; then why the others do not")
    # Shape classes with the same answer share a line.
    groups: dict[tuple[Any, ...], list[str]] = {}
    for choice in choices:
        key = choice.op, str(choice.dtype).removeprefix("torch."), choice.name, choice.reason, tuple(choice.others.items())
        shape = choice.shape if isinstance(choice.shape, tuple) else () if choice.shape is None else (choice.shape,)
        groups.setdefault(key, []).append(" ".join(str(part) for part in shape))
    for (op, dtype, name, reason, others), shapes in groups.items():
        kinds = f"; {', '.join(shapes)}" if any(shapes) else ""
        print(f"{op} ({device}, {dtype}{kinds}): {name}, {reason}")
        for other, why in others:
            print(f"    {other}: {why}")


bench = typer.Typer(no_args_is_help=True, help="Where the time goes on this machine.")
app.add_typer(bench, name="bench")


@bench.command("profile")
def profile(
    model: Model,
    tokens: Annotated[int, typer.Option(help="of the prefill, and before the decoded token")] = 1500,
    training_tokens: Annotated[int | None, typer.Option(help="also a training step on a row of so many")] = None,
    out: Annotated[Path | None, typer.Option(help="a .png of it")] = None,
    device: str = "auto",
    dtype: str = "auto",
    quantise: Annotated[Literal["int8", "int4", "fp8"] | None, typer.Option(help="the decoder's weights in fewer bits")] = None,
) -> None:
    """Where the time of the tower, a prefill, a decode step and a training step goes: each op's share, and how near it is to its limit."""
    from llava_fast.limits import describe, probe
    from llava_fast.profile import draw
    from llava_fast.profile import profile as measure

    if out is not None and (out.suffix != ".png" or not out.parent.is_dir()):
        raise ValueError(f"--out must be a .png in a directory that exists, got {out}")
    loaded = llava_fast.load(model, device=device, dtype=dtype, quantise=quantise)
    limits = probe(loaded.device.type)
    console = Console()
    console.print(describe(limits), markup=False)
    phases = measure(loaded, limits, tokens, training_tokens)
    for phase in phases:
        table = Table("op", "calls", "ms", "share", "of its limit", "bound by", title=f"{phase.name}: {phase.seconds * 1e3:,.1f} ms")
        for op in phase.ops:
            if op.seconds >= 0.005 * phase.seconds:
                share = f"{op.seconds / phase.seconds:.0%}"
                table.add_row(op.name, str(op.calls), f"{op.seconds * 1e3:,.1f}", share, f"{op.of_limit:.0%}" if op.limit else "", op.bound)
        table.add_row("between ops", "", f"{phase.between * 1e3:,.1f}", f"{phase.between / phase.seconds:.0%}", "", "")
        console.print(table)
    if out is not None:
        draw(phases, out)
        console.print(f"drew {out}", markup=False)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="where checkpoint, pictures and results go")] = Path("runs/demo"),
    seed: int = 0,
) -> None:
    """Train a small model from nothing through every stage on generated data, measure each, compare answers with transformers."""
    from llava_fast.demo.run import run

    raise typer.Exit(run(out, seed=seed))


def main() -> None:
    """The console entry: an expected error is one line on stderr and exit code 2; typer makes Ctrl-C exit code 130."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        app()
    except (ValueError, FloatingPointError, OSError) as error:
        notes.print("error:", style="red", end=" ")
        notes.print(str(error), markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
