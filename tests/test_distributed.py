"""Two processes (gloo) train as one: every kind of row and run, checkpoints across numbers of processes, and what ends them.

Processes are forked from a server that has imported torch and the trainer; the runs that end well share one pair of them.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import distributed_worker as worker
import numpy as np
import pytest
import torch
from originals import make_original
from PIL import Image
from safetensors.torch import load_file
from test_footprint import config_7b

import llava_fast as lf
from llava_fast import checkpoint
from llava_fast.inputs.packing import pack_rows
from llava_fast.training.batches import Position, deal, make_steps
from llava_fast.training.config import as_config
from llava_fast.training.dataset import index_records
from llava_fast.training.distributed import Ranks, check_ranks
from llava_fast.training.flops import row_flops
from llava_fast.training.loop import fit
from llava_fast.training.lora import is_adapter
from llava_fast.training.sequence import split_row

STEPS = 8
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1")
TILES = {"mm_patch_merge_type": "spatial_unpad", "image_aspect_ratio": "anyres", "image_grid_pinpoints": [[42, 84], [84, 42], [84, 84]]}


@pytest.fixture(scope="module")
def server():
    """Where processes come from: forked after everything is imported."""
    path = os.pathsep.join([str(Path(lf.__file__).parent.parent), str(Path(__file__).parent), *filter(None, sys.path)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", path)
        patch.setenv("OMP_NUM_THREADS", "1")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["distributed_worker"])
        yield context


@pytest.fixture
def pair(server, tmp_path):
    return lambda work, *args, timeout=200: run_pair(server, tmp_path, work, *args, timeout=timeout)


def run_pair(server, logs, work, *args, timeout):
    """Run `work` as ranks 0 and 1: [(exit code, output)]; a process that is there after `timeout` seconds is killed."""
    port, outputs = free_port(), [logs / f"rank-{rank}.log" for rank in (0, 1)]
    processes = [server.Process(target=worker.as_rank, args=(rank, 2, port, outputs[rank], work, *args)) for rank in (0, 1)]
    until = time.monotonic() + timeout
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(max(0.0, until - time.monotonic()))
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()
    return [(process.exitcode, output.read_text()) for process, output in zip(processes, outputs, strict=True)]


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def record(number, answer, **media):
    question = "What are these?" if media else "Which one?"
    return {"id": number, **media, "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for i in range(6):
        pixels = np.random.default_rng(i).integers(0, 255, (40 + 30 * i, 130 - 20 * i, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    (folder / "frames").mkdir()
    for i in range(5):
        Image.fromarray(np.random.default_rng(9 + i).integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(folder / "frames" / f"{i}.png")
    (folder / "broken.png").write_bytes(b"nothing")
    kinds = {
        "text": [record(i, answer) for i, answer in enumerate(["yes", "no no", "red", "green 0 1 2"])],
        "single": [record(i, "yes red", image=f"{i}.png") for i in range(4)],
        "several": [record(i, "no", image=[f"{j}.png" for j in range(i + 1)]) for i in range(4)],
        "video": [record(0, "red", video="frames"), record(1, "yes", video="frames")],
        "broken": [record(0, "red", image="broken.png"), record(1, "yes")],
    }
    kinds["pairs"] = [
        {"id": i, **media, "prompt": "Which one?", "chosen": chosen, "rejected": rejected}
        for i, (chosen, rejected, media) in enumerate(
            [
                ("yes", "no no", {"image": "0.png"}),
                ("red 0", "red 1", {"image": ["1.png", "2.png", "3.png"]}),
                ("green", "blue 1 2 3", {}),
                ("no", "yes", {"video": "frames"}),
                ("two cats", "the left one", {"image": "4.png"}),
            ]
        )
    ]
    kinds["mixed"] = [*kinds["text"], *kinds["several"], *kinds["video"]]
    kinds["apart"] = [*kinds["text"][:1], *kinds["several"][3:]]  # one row each: a rank has pictures, the other none
    for name, records in kinds.items():
        (folder / f"{name}.json").write_text(json.dumps(records))
    return folder


@pytest.fixture(scope="module")
def models(checkpoints, tmp_path_factory):
    return {**checkpoints, "tiles": make_original(checkpoints["qwen"], tmp_path_factory.mktemp("tiles") / "original", **TILES)}


LORA = {"lora": {"r": 4, "dropout": 0.0}, "lr_vision_tower": "frozen", "lr": 3e-3}
FROZEN = {"lr_vision_tower": "frozen"}

# name: model, data, changes of the configuration
CASES: dict[str, tuple[str, str, dict]] = {
    "text": ("qwen", "text", {}),
    "single": ("llama", "single", {}),
    "several": ("qwen_untied", "several", {}),
    "video": ("qwen", "video", {"inputs": {"pool": "average", "num_frames": 5}}),
    "tiles": ("tiles", "mixed", {"inputs": {"anyres": True, "num_frames": 4}, "tokens_per_row": 512}),
    "mixed": ("qwen", "mixed", {"weight_decay": 0.1, "clip": 0.3}),
    "apart": ("qwen", "apart", {"tokens_per_row": 64, "max_steps": 20}),
    "one row a step": ("llama", "mixed", {"rows_per_step": 1}),
    "three rows a step": ("qwen", "mixed", {"rows_per_step": 3, "tokens_per_row": 80}),
    "frozen tower": ("qwen", "mixed", {"lr_vision_tower": "frozen"}),
    "align": ("llama", "mixed", {"lr_vision_tower": "frozen", "lr_decoder": "frozen"}),
    "only tower": ("qwen", "apart", {"lr_projector": "frozen", "lr_decoder": "frozen", "tokens_per_row": 64}),
    "unreadable": ("qwen", "broken", {"on_bad_record": "skip", "tokens_per_row": 24}),
    "all made again": ("qwen", "mixed", {"checkpointing": "full"}),
    "shared row": ("qwen", "mixed", {"sequence_parallel": 2, "lr_vision_tower": "frozen"}),
    "shared row, grouped heads": ("llama", "apart", {"sequence_parallel": 2, "rows_per_step": 1, "clip": 0.3}),
    "shared row, pooled": ("qwen_untied", "video", {"sequence_parallel": 2, "inputs": {"pool": "average", "num_frames": 5}}),
    "shared row, tiles": ("tiles", "mixed", {"sequence_parallel": 2, "inputs": {"anyres": True, "num_frames": 4}, "tokens_per_row": 512}),
    "validation": ("qwen", "mixed", {"validation_data": "mixed", "validate_every": 4}),
    "lora": ("qwen", "mixed", LORA),
    "lora alone": ("llama", "mixed", {**LORA, "lr_projector": "frozen", "checkpointing": "selective"}),
    "qlora": ("qwen_untied", "mixed", {**LORA, "lora": {**LORA["lora"], "base": "int4"}}),
    "lora, shared row": ("llama", "mixed", {**LORA, "sequence_parallel": 2}),
    "features": ("qwen", "mixed", {**FROZEN, "feature_cache": "features"}),
    "features, lora": ("llama", "mixed", {**LORA, "feature_cache": "features"}),
    "dpo": ("qwen", "pairs", {"dpo": True}),
    "dpo, ipo": ("llama", "pairs", {"dpo": {"loss": "ipo", "gamma": 0.5}, "tokens_per_row": 140, "rows_per_step": 3}),
    "dpo, lora": ("qwen_untied", "pairs", {**LORA, "dpo": True, "lr_projector": "frozen"}),
    "dpo, lora and projector": ("qwen", "pairs", {**LORA, "dpo": True, "validation_data": "pairs"}),
    "dpo, features": ("qwen", "pairs", {**FROZEN, "dpo": True, "feature_cache": "features", "validation_data": "pairs"}),
}
# What each of these kinds of run is must go on in another number of processes.
SAVED = {
    "full": ("qwen", "mixed", {}),
    "lora": ("qwen", "mixed", LORA),
    "dpo": ("qwen", "pairs", {**FROZEN, "dpo": True}),
}


def settings(models, folder, out, model, data, changes):
    changes = dict(changes)
    if "validation_data" in changes:
        changes["validation_data"] = str(folder / f"{changes['validation_data']}.json")
    if "feature_cache" in changes:
        changes["feature_cache"] = f"{out}-features"
    return {
        "model": str(models[model]),
        "data": str(folder / f"{data}.json"),
        "output_dir": str(out),
        "tokens_per_row": 160,
        "inputs": {"num_frames": 4},
        "rows_per_step": 2,
        "max_steps": 5,
        "lr": 3e-4,
        "lr_vision_tower": 1e-4,
        "eps": 1e-5,  # some gradients are zero but for rounding (of k's bias, say): AdamW must not make steps of these
        "save_every": None,
        "progress": False,
        "log_every": 4,
        "workers": 2,
        **changes,
    }


def saving(models, folder, out, name):
    model, data, changes = SAVED[name]
    return settings(models, folder, out, model, data, {**changes, "max_steps": STEPS, "save_every": 2, "log_every": 1})


@pytest.fixture(scope="module")
def jobs(server, models, folder, tmp_path_factory):
    """What the jobs of two processes came to, {name: [result of rank 0, of rank 1]}, and the folder of their outputs."""
    out = tmp_path_factory.mktemp("two")
    todo = {name: {"config": settings(models, folder, out / name, *case)} for name, case in CASES.items()}
    for name in SAVED:
        todo[f"{name}, 2 then 1"] = {"config": saving(models, folder, out / f"{name}, 2 then 1", name), "stop_after": 5}
        one_then_two = saving(models, folder, out / f"{name}, 1 then 2", name)
        with pytest.raises(KeyboardInterrupt):
            lf.train(one_then_two, on_step=lambda metrics: signal.raise_signal(signal.SIGINT) if metrics.step == 5 else None)
        todo[f"{name}, 1 then 2"] = {"config": one_then_two}
    for name, changes in BF16.items():
        todo[name] = {"config": settings(models, folder, out / name, "qwen", "mixed", changes)}
    todo["bad record"] = {"config": settings(models, folder, out / "bad", "qwen", "broken", {"tokens_per_row": 24})}
    bad = {"on_bad_record": "error", "validation_data": "broken", "tokens_per_row": 24}
    todo["bad record to validate on"] = {"config": settings(models, folder, out / "bad-2", "qwen", "text", bad)}
    (out / "jobs.json").write_text(json.dumps(todo))
    ended = run_pair(server, out, worker.run_jobs, out, timeout=400)
    assert [code for code, _ in ended] == [0, 0], "\n\n".join(output[-4000:] for _, output in ended)
    return {name: [json.loads((out / f"{name}.{rank}.json").read_text()) for rank in (0, 1)] for name in todo}, out


BF16 = {"bf16": {"precision": "bf16"}, "bf16, lora": {**LORA, "precision": "bf16"}, "bf16_pure": {"precision": "bf16_pure"}}


def tensors(directory):
    if is_adapter(directory):
        return load_file(Path(directory) / "adapter_model.safetensors")
    return dict(checkpoint.read_tensors(checkpoint.index_tensors(Path(directory))))


def close(a, b, within):
    assert a.keys() == b.keys()
    for name in a:
        apart = (a[name].float() - b[name].float()).norm() / a[name].float().norm()
        assert apart <= within, f"{name}: {apart:.1e}"


@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one(models, folder, jobs, tmp_path, name):
    results, out = jobs
    changes = {**CASES[name][2], "sequence_parallel": 1}
    with worker.views_seen() as seen:
        alone = lf.train(settings(models, folder, tmp_path / "alone", *CASES[name][:2], changes))
    first, second = results[name]
    views = first.pop("views_seen") + second.pop("views_seen")
    assert first.pop("seconds") and second.pop("seconds")
    assert first == second and first["steps"] == alone.steps == changes.get("max_steps", 5)
    np.testing.assert_allclose(first["losses"], alone.losses, rtol=1e-5, atol=1e-6)  # a loss is a difference of logits of about 10
    assert (first["tokens"], first["labels"], first["samples"]) == (alone.tokens, alone.labels, alone.samples)
    assert first["skipped"] == alone.skipped and (name == "unreadable") == bool(alone.skipped)
    assert first["validation"] == pytest.approx(alone.validation, rel=1e-5, abs=1e-6)  # rewards are differences, too
    assert ("validation_data" in changes) == bool(alone.validation)
    close(tensors(tmp_path / "alone"), tensors(out / name), 1e-5)
    written = [(out / name / "metrics.jsonl"), tmp_path / "alone" / "metrics.jsonl"]
    norms = [[json.loads(line)["grad_norm"] for line in path.read_text().splitlines()] for path in written]
    np.testing.assert_allclose(*(values[:5] for values in norms), rtol=1e-5)  # later on they tell of the weights' last digits
    if "sequence_parallel" not in CASES[name][2]:
        assert views == sum(seen), "a picture is in one process's rows"


def test_reference_log_probabilities_are_shared_out_and_known_again(models, folder, jobs, tmp_path):
    """Each process computes its rows'; the file is that of one process, which takes it for its own."""
    _, out = jobs
    ours, theirs = tmp_path / "one", out / "dpo"
    fields = settings(models, folder, ours, *CASES["dpo"])
    lf.train({**fields, "max_steps": 1})
    files = [torch.load(path / "reference.pt", weights_only=True) for path in (ours, theirs)]
    assert files[0]["identity"] == files[1]["identity"] and files[0]["rows"] == files[0]["done"] == files[1]["done"]
    torch.testing.assert_close(files[0]["logps"], files[1]["logps"], rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module", params=SAVED)
def unbroken(request, models, folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone")
    return request.param, lf.train(saving(models, folder, out, request.param)), out


def test_a_checkpoint_of_two_processes_goes_on_in_one(models, folder, jobs, unbroken):
    name, whole, out = unbroken
    two = jobs[1] / f"{name}, 2 then 1"
    assert sorted(path.name for path in two.glob("checkpoint-*")) == ["checkpoint-00000002", "checkpoint-00000004"]
    resumed = lf.train(saving(models, folder, two, name))
    np.testing.assert_allclose(resumed.losses, whole.losses, rtol=1e-4, atol=1e-6)
    assert 0 < resumed.samples < whole.samples
    close(tensors(out), tensors(two), 1e-4)


def test_a_checkpoint_of_one_process_goes_on_in_two(jobs, unbroken):
    name, whole, out = unbroken
    results, two = jobs[0][f"{name}, 1 then 2"], jobs[1] / f"{name}, 1 then 2"
    assert 0 < results[0]["samples"] < whole.samples
    np.testing.assert_allclose(results[0]["losses"], whole.losses, rtol=1e-4, atol=1e-6)
    close(tensors(out), tensors(two), 1e-4)
    lines = (two / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("name", BF16)
def test_bf16_in_two_processes(models, folder, jobs, tmp_path, name):
    """Gradients are rounded to bf16 before they are summed, in another order than alone: near, not equal."""
    results, out = jobs
    alone = lf.train(settings(models, folder, tmp_path, "qwen", "mixed", BF16[name]))
    np.testing.assert_allclose(results[name][0]["losses"], alone.losses, rtol=0.02)
    dtypes = [{key: tensor.dtype for key, tensor in tensors(path).items()} for path in (out / name, tmp_path)]
    assert dtypes[0] == dtypes[1] and torch.bfloat16 in dtypes[0].values()


@pytest.mark.parametrize("name", ["bad record", "bad record to validate on"])
def test_a_bad_record_of_one_rank_ends_all_with_its_message(jobs, name):
    first, second = jobs[0][name]
    assert first == second and "record 0 (id 0)" in first["error"] and "rank" in first["error"]


def test_rows_of_like_cost_share_a_round():
    assert deal([5.0, 1.0, 4.0, 2.0, 3.0], 2) == [[0, 2], [3, 4], [1, None]]
    assert deal([1.0], 3) == [[0, None, None]]
    costs = list(np.random.default_rng(0).random(64))
    rounds = deal(costs, 4)
    assert sorted(row for taken in rounds for row in taken) == list(range(64))
    assert sum(max(costs[row] for row in taken) for taken in rounds) < 1.08 * sum(costs) / 4


def waiting(rows_per_step, world=8, epochs=4):
    """Time of a step over that of evenly spread arithmetic, on the M4-shaped workload in rows of 16k of the 7b model: a round takes as
    long as its costliest row. The cost that rows are dealt by does not know their labels; the one that counts does."""
    records = [json.loads(line) for line in (Path(__file__).parent.parent / "bench/workloads/m4_mix.jsonl").read_text().splitlines()]
    views = np.array([record["views"] for record in records])
    labels = np.array([sum(answer for _, answer in record["turns"]) for record in records])
    tokens = np.array([sum(map(sum, record["turns"])) for record in records]) + 729 * views
    config = config_7b()
    taken = even = 0.0
    for epoch in range(epochs):
        rows = pack_rows(tokens, views, 16384, window=256, epoch=epoch).rows
        for start in range(0, len(rows) - rows_per_step + 1, rows_per_step):
            step = rows[start : start + rows_per_step]
            true = [row_flops(config, tokens[row], int(views[row].sum()), int(labels[row].sum())) for row in step]
            rounds = deal([row_flops(config, tokens[row], int(views[row].sum())) for row in step], world)
            taken += sum(max(true[row] for row in one if row is not None) for one in rounds)
            even += sum(true) / world
    return taken / even


@pytest.mark.parametrize("rows_per_step, most", [(8, 1.05), (64, 1.02)])
def test_ranks_wait_little_for_each_other_on_the_workload(rows_per_step, most):
    assert 1.0 <= waiting(rows_per_step) < most


@pytest.mark.parametrize("name", ["several", "video", "tiles", "mixed"])
@pytest.mark.parametrize("parts", [2, 3, 7])
def test_parts_of_a_row_are_the_row(models, folder, tmp_path, name, parts):
    model_name, data, changes = CASES[name]
    model = lf.load(models[model_name], dtype=torch.float32)
    config = as_config(settings(models, folder, tmp_path, model_name, data, {**changes, "rows_per_step": 1}))
    for step in make_steps(index_records(config, model.input_spec), dataclasses.replace(config, max_steps=None), Position()):
        batch = step.rows[0].batch
        cut = [split_row(batch, part, parts) for part in range(parts)]
        with torch.no_grad():
            torch.testing.assert_close(torch.cat([model.embed(part) for part in cut]), model.embed(batch), rtol=1e-5, atol=1e-5)
        assert torch.equal(torch.cat([part.positions for part in cut]), batch.positions)
        assert sum(cut[0].split.rows) == batch.num_tokens and sum(cut[0].split.needed) == len(batch.needed_rows)
        starts = np.cumsum([0, *cut[0].split.rows])
        labels = [(int(start + row), int(label)) for start, part in zip(starts, cut, strict=False) for row, label in _labels(part)]
        assert sorted(labels) == sorted((int(row), int(label)) for row, label in _labels(batch))
        views = sum(part.views.shape[0] for part in cut if part.views is not None)
        assert (0 if batch.views is None else batch.views.shape[0]) <= views


def _labels(batch):
    rows = batch.needed_rows[batch.label_index]
    assert torch.equal(rows, batch.label_rows)
    return zip(rows.tolist(), batch.labels.tolist(), strict=True)


@pytest.mark.parametrize(
    "kind, world, parts, message",
    [
        ("qwen", 4, 3, "sequence_parallel must divide the 4 processes, got 3"),
        ("qwen", 8, 8, "sequence_parallel must divide the 4 attention heads, got 8"),
        ("llama", 4, 4, "sequence_parallel must divide the 2 key and value heads, got 4"),
    ],
)
def test_heads_that_do_not_divide(checkpoints, kind, world, parts, message):
    decoder = lf.load(checkpoints[kind]).config.decoder
    with pytest.raises(ValueError, match=message):
        check_ranks(as_config({"model": "m", "data": "d", "output_dir": "o", "sequence_parallel": parts}), Ranks(0, world), decoder)


def test_what_needs_several_processes_or_one(models, folder, tmp_path):
    with pytest.raises(ValueError, match="sequence_parallel must be 1 in a run of one process, got 2"):
        lf.train(settings(models, folder, tmp_path, "qwen", "text", {"sequence_parallel": 2}))
    config = as_config(settings(models, folder, tmp_path, "qwen", "text", {"optimizer": "adamw_8bit"}))
    model = lf.load(models["qwen"])
    with pytest.raises(ValueError, match="optimizer must be 'adamw' in a run of several processes"):
        fit(model, index_records(config, model.input_spec), config, ranks=Ranks(1, 2))


@pytest.mark.parametrize("changes", [{"dpo": True}, {"feature_cache": "f", **FROZEN}])
def test_rows_that_cannot_be_shared(changes):
    name = next(iter(changes))
    with pytest.raises(ValueError, match=f"sequence_parallel must be 1 with {name}, got 2"):
        as_config({"model": "m", "data": "d", "output_dir": "o", "sequence_parallel": 2, **changes})


# --- one rank's trouble is everybody's, and is named ---

QUICK = {"log_every": 1, "save_every": 2, "keep": 9, "max_steps": STEPS}


def troubled(models, folder, out, **changes):
    return settings(models, folder, out, "qwen", "mixed", {**QUICK, **changes})


def saved(out):
    return sorted(int(path.name[-8:]) for path in Path(out).glob("checkpoint-????????"))


@pytest.mark.parametrize("guilty", [0, 1])
@pytest.mark.parametrize(
    "trouble, says", [("raises", "KeyError: 'trouble'"), ("out of memory", "OutOfMemoryError: tried to allocate 20 GiB")]
)
def test_an_exception_of_one_rank_ends_the_other_with_its_name(models, folder, pair, tmp_path, guilty, trouble, says):
    ended = pair(worker.train, troubled(models, folder, tmp_path / "run"), trouble, guilty)
    assert [code for code, _ in ended] == [1, 1], ended
    assert f"rank {guilty}: {says}" in ended[1 - guilty][1]
    assert says in ended[guilty][1] and "rank 1: RuntimeError" not in ended[guilty][1]


@pytest.mark.parametrize("guilty", [0, 1])
def test_a_rank_in_a_call_that_does_not_end_is_ended(models, folder, pair, tmp_path, guilty):
    ended = pair(worker.train, troubled(models, folder, tmp_path / "run"), "raises while others sleep", guilty)
    assert [code for code, _ in ended] == [1, 1], ended
    assert f"rank {1 - guilty} ends after a failure of another: rank {guilty}: KeyError: 'trouble'" in ended[1 - guilty][1]


def test_a_rank_that_is_killed_ends_the_other(models, folder, pair, tmp_path):
    ended = pair(worker.train, troubled(models, folder, tmp_path / "run"), "is killed")
    assert [code for code, _ in ended] == [1, -signal.SIGKILL] and "Error" in ended[0][1], ended
    assert saved(tmp_path / "run") == [2]


def test_a_rank_that_hangs_is_given_up_on(models, folder, pair, tmp_path):
    ended = pair(worker.train, troubled(models, folder, tmp_path / "run", collective_timeout=6), "hangs")
    assert [code for code, _ in ended] == [1, 1] and "Timed out" in ended[0][1], ended
    assert "rank 1 ends after a failure of another: rank 0: RuntimeError" in ended[1][1]


def test_a_loader_that_dies_in_one_rank(models, folder, pair, tmp_path):
    ended = pair(worker.train, troubled(models, folder, tmp_path / "run", cache_mb=0), "loader dies")
    for code, output in ended:
        assert code == 1 and "RuntimeError: rank 1: RuntimeError: " in output, output
        assert "its loader died of MemoryError: no room for a picture" in output and "mixed.json, record" in output


@pytest.mark.parametrize("trouble, says", [("loss is nan", "is nan (gradient norm "), ("loss jumps", "more than spike_factor 5")])
def test_a_bad_loss_of_one_rank_stops_all_with_its_samples(models, folder, pair, tmp_path, trouble, says):
    fields = troubled(models, folder, tmp_path / "run", spike_factor=5, max_steps=30, tokens_per_row=64)
    ended = pair(worker.train, fields, trouble, 1, 12)
    guilty = json.loads(ended[1][1].split("guilty: ")[1].splitlines()[0])
    model = lf.load(models["qwen"])
    data = index_records(as_config(fields), model.input_spec)
    names = ", ".join(data.name(index) for index in guilty)
    for code, output in ended:
        assert code == 1 and says in output, output
        assert output.split("; it came with ")[1].split(". Nothing")[0] == names
    assert guilty and max(saved(tmp_path / "run")) % 2 == 0


@pytest.mark.parametrize("guilty", [0, 1])
def test_a_full_disk_of_one_rank_leaves_the_last_checkpoint_and_the_run_goes_on(models, folder, pair, tmp_path, guilty):
    whole = lf.train(troubled(models, folder, tmp_path / "whole"))
    ended = pair(worker.train, troubled(models, folder, tmp_path / "run"), "disk is full", guilty)
    assert [code for code, _ in ended] == [0, 0], ended
    assert (
        "the checkpoint of step 4 could not be written" in ended[0][1] and "checkpoint-00000002 is intact; the run goes on" in ended[0][1]
    )
    assert saved(tmp_path / "run") == [2, 6, 8] and not list((tmp_path / "run").glob("*.partial"))
    close(tensors(tmp_path / "whole"), tensors(tmp_path / "run"), 1e-5)
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == whole.steps


def test_a_disk_that_is_full_for_one_rank_at_the_end_ends_all(models, folder, pair, tmp_path):
    ended = pair(worker.train, troubled(models, folder, tmp_path / "run"), "disk is full", 1, 7)
    for code, output in ended:
        assert code == 1 and "OSError: the checkpoint of step 8 could not be written" in output, output
        assert "rank 1" in output and "checkpoint-00000006 is intact" in output
    assert saved(tmp_path / "run") == [2, 4, 6]


@pytest.mark.parametrize("guilty", [0, 1])
def test_sigterm_to_one_rank_saves_and_ends_all_and_the_run_goes_on(models, folder, pair, tmp_path, guilty):
    lf.train(troubled(models, folder, tmp_path / "whole"))
    fields = troubled(models, folder, tmp_path / "run", save_every=None)
    ended = pair(worker.train, fields, "is terminated", guilty)
    assert [code for code, _ in ended] == [143, 143], ended
    assert saved(tmp_path / "run") == [3]
    assert [code for code, _ in pair(worker.train, fields)] == [0, 0]
    close(tensors(tmp_path / "whole"), tensors(tmp_path / "run"), 1e-5)


def test_two_processes_killed_at_a_random_step_go_on_to_the_same_weights(models, folder, pair, tmp_path):
    step = int(np.random.default_rng().integers(2, STEPS))  # another each time: named by the folder on failure
    assert [code for code, _ in pair(worker.train, troubled(models, folder, tmp_path / "whole"))] == [0, 0]
    fields = troubled(models, folder, tmp_path / f"killed-{step}")
    ended = pair(worker.train, fields, "all are killed", 1, step)
    assert -signal.SIGKILL in [code for code, _ in ended] and all(code in (1, -signal.SIGKILL) for code, _ in ended), ended
    assert saved(fields["output_dir"]) in ([*range(2, step + 1, 2)], [*range(2, step, 2)])
    ended = pair(worker.train, fields)
    assert [code for code, _ in ended] == [0, 0], ended
    a, b = tensors(tmp_path / "whole"), tensors(fields["output_dir"])
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_torchrun_of_the_command_line(models, folder, tmp_path):
    """One process prints and writes."""
    fields = settings(models, folder, tmp_path / "run", "qwen", "apart", {"progress": True, "save_every": 10, "tokens_per_row": 64})
    (tmp_path / "run.yaml").write_text(json.dumps(fields))
    command = [sys.executable, *TORCHRUN, "--master-port", str(free_port()), "-m", "llava_fast.cli", "train", str(tmp_path / "run.yaml")]
    code, output = under_torchrun(command)
    assert code == 0, output
    assert output.count("2 samples") == 1 and output.count("5 steps, checkpoint in") == 1, output
    assert lf.load(tmp_path / "run") and len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 5


def under_torchrun(command):
    path = os.pathsep.join([str(Path(lf.__file__).parent.parent), *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        output, _ = process.communicate(timeout=200)
    finally:
        process.kill()
    return process.returncode, output


def test_a_run_after_one_that_failed(models, folder, tmp_path):
    """torchrun's store, with what the ranks of the first one told each other, outlives both."""
    fields = settings(models, folder, tmp_path / "run", "qwen", "apart", {"tokens_per_row": 64})
    gone = {**fields, "data": str(tmp_path / "gone.json"), "output_dir": str(tmp_path / "gone")}
    script = tmp_path / "twice.py"
    script.write_text(f"""
import llava_fast as lf
from llava_fast.training import distributed
try:
    lf.train({gone!r})
except ValueError as error:
    assert "gone.json" in str(error)
distributed.WATCH_SECONDS = distributed.LEAVE_SECONDS = 0.05  # what the first one left would end this one at once
lf.train({fields!r})
""")
    code, output = under_torchrun([sys.executable, *TORCHRUN, "--master-port", str(free_port()), str(script)])
    assert code == 0, output
    assert lf.load(tmp_path / "run")
