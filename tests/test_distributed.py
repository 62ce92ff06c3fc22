"""Two processes (gloo) train as one: every kind of row, ranks with unlike rows, checkpoints across numbers of processes, failures.

The jobs of the module run in one pair of processes, one after the other: starting a pair costs more than all of them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from originals import make_original
from PIL import Image

import llava_fast as lf
from llava_fast import checkpoint
from llava_fast.training.batches import Position, deal, make_steps
from llava_fast.training.config import as_config
from llava_fast.training.dataset import index_records
from llava_fast.training.distributed import Ranks, make_share
from llava_fast.training.loop import fit
from llava_fast.training.sequence import split_row

STEPS = 20
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1")
TILES = {"mm_patch_merge_type": "spatial_unpad", "image_aspect_ratio": "anyres", "image_grid_pinpoints": [[42, 84], [84, 42], [84, 84]]}


def start(*command, rank=None, world=2, port=None):
    path = os.pathsep.join([str(Path(lf.__file__).parent.parent), str(Path(__file__).parent), *filter(None, sys.path)])
    ranks = {} if rank is None else {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_PORT": str(port)}
    environment = {**os.environ, **ranks, "PYTHONPATH": path, "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, *command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def pair(*command, timeout=100):
    """Run a command as ranks 0 and 1: [(exit code, output)]."""
    port = free_port()
    processes = [start(*command, rank=rank, port=port) for rank in (0, 1)]
    try:
        return [(process.communicate(timeout=timeout)[0], process.returncode)[::-1] for process in processes]
    finally:
        for process in processes:
            process.kill()


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
    kinds["mixed"] = [*kinds["text"], *kinds["several"], *kinds["video"]]
    kinds["apart"] = [*kinds["text"][:1], *kinds["several"][3:]]  # one row each: a rank has pictures, the other none
    for name, records in kinds.items():
        (folder / f"{name}.json").write_text(json.dumps(records))
    return folder


@pytest.fixture(scope="module")
def models(checkpoints, tmp_path_factory):
    return {**checkpoints, "tiles": make_original(checkpoints["qwen"], tmp_path_factory.mktemp("tiles") / "original", **TILES)}


# name: model, data, changes of the configuration
CASES: dict[str, tuple[str, str, dict]] = {
    "text": ("qwen", "text", {}),
    "single": ("llama", "single", {}),
    "several": ("qwen_untied", "several", {}),
    "video": ("qwen", "video", {"inputs": {"pool": "average", "num_frames": 5}}),
    "tiles": ("tiles", "mixed", {"inputs": {"anyres": True, "num_frames": 4}, "tokens_per_row": 512}),
    "mixed": ("qwen", "mixed", {"weight_decay": 0.1, "clip": 0.3}),
    "apart": ("qwen", "apart", {"tokens_per_row": 64}),
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
    "validation": ("qwen", "mixed", {"validation_data": "mixed", "validate_every": 8}),
}


def settings(models, folder, out, model, data, changes):
    changes = dict(changes)
    if "validation_data" in changes:
        changes["validation_data"] = str(folder / f"{changes['validation_data']}.json")
    return {
        "model": str(models[model]),
        "data": str(folder / f"{data}.json"),
        "output_dir": str(out),
        "tokens_per_row": 160,
        "inputs": {"num_frames": 4},
        "rows_per_step": 2,
        "max_steps": STEPS,
        "lr": 3e-4,
        "lr_vision_tower": 1e-4,
        "eps": 1e-5,  # some gradients are zero but for rounding (of k's bias, say): AdamW must not make steps of these
        "save_every": None,
        "progress": False,
        "log_every": 5,
        **changes,
    }


@pytest.fixture(scope="module")
def jobs(models, folder, tmp_path_factory):
    """What the jobs of two processes came to, {name: [result of rank 0, of rank 1]}, and the folder of their outputs."""
    out = tmp_path_factory.mktemp("two")
    todo = {name: {"config": settings(models, folder, out / "outputs" / name, *case)} for name, case in CASES.items()}
    saving = settings(models, folder, "", "qwen", "mixed", {"save_every": 4, "log_every": 1})
    todo["2 then 1"] = {"config": {**saving, "output_dir": str(out / "2 then 1")}, "stop_after": 10}
    one_then_two = {**saving, "output_dir": str(out / "1 then 2")}
    with pytest.raises(KeyboardInterrupt):
        lf.train(one_then_two, on_step=lambda metrics: signal.raise_signal(signal.SIGINT) if metrics.step == 10 else None)
    todo["1 then 2"] = {"config": one_then_two}
    todo["bf16"] = {"config": {**saving, "output_dir": str(out / "bf16"), "precision": "bf16", "save_every": None}}
    todo["bad record"] = {"config": settings(models, folder, out / "bad", "qwen", "broken", {"tokens_per_row": 24})}
    (out / "jobs.json").write_text(json.dumps(todo))
    ended = pair(str(Path(__file__).parent / "distributed_worker.py"), str(out), timeout=400)
    assert [code for code, _ in ended] == [0, 0], "\n\n".join(output[-4000:] for _, output in ended)
    return {name: [json.loads((out / f"{name}.{rank}.json").read_text()) for rank in (0, 1)] for name in todo}, out


def tensors(directory):
    return dict(checkpoint.read_tensors(checkpoint.index_tensors(Path(directory))))


def close(a, b, within):
    assert a.keys() == b.keys()
    for name in a:
        apart = (a[name].float() - b[name].float()).norm() / a[name].float().norm()
        assert apart <= within, f"{name}: {apart:.1e}"


@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one(models, folder, jobs, tmp_path, name):
    results, out = jobs
    alone = lf.train({**settings(models, folder, tmp_path / "alone", *CASES[name]), "sequence_parallel": 1})
    first, second = results[name]
    assert first == second and first["steps"] == STEPS
    np.testing.assert_allclose(first["losses"], alone.losses, rtol=1e-5, atol=1e-6)  # a loss is a difference of logits of about 10
    assert (first["tokens"], first["labels"], first["samples"]) == (alone.tokens, alone.labels, alone.samples)
    assert first["skipped"] == alone.skipped and (name == "unreadable") == bool(alone.skipped)
    assert first["validation"] == pytest.approx(alone.validation, rel=1e-5) and (name == "validation") == bool(alone.validation)
    close(tensors(tmp_path / "alone"), tensors(out / "outputs" / name), 1e-5)
    written = [(out / "outputs" / name / "metrics.jsonl"), tmp_path / "alone" / "metrics.jsonl"]
    norms = [[json.loads(line)["grad_norm"] for line in path.read_text().splitlines()] for path in written]
    np.testing.assert_allclose(*(values[:5] for values in norms), rtol=1e-5)  # later on they tell of the weights' last digits


@pytest.fixture(scope="module")
def unbroken(models, folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone")
    return lf.train(settings(models, folder, out, "qwen", "mixed", {"save_every": 4, "log_every": 1})), out


def test_a_checkpoint_of_two_processes_goes_on_in_one(models, folder, jobs, unbroken):
    whole, out = unbroken
    _, two = jobs
    assert sorted(path.name for path in (two / "2 then 1").glob("checkpoint-*")) == ["checkpoint-00000004", "checkpoint-00000008"]
    fields = settings(models, folder, two / "2 then 1", "qwen", "mixed", {"save_every": 4, "log_every": 1})
    resumed = lf.train(fields)
    np.testing.assert_allclose(resumed.losses, whole.losses, rtol=1e-4, atol=1e-6)
    assert 0 < resumed.samples < whole.samples
    close(tensors(out), tensors(two / "2 then 1"), 1e-4)


def test_a_checkpoint_of_one_process_goes_on_in_two(jobs, unbroken):
    whole, out = unbroken
    results, two = jobs
    assert 0 < results["1 then 2"][0]["samples"] < whole.samples
    np.testing.assert_allclose(results["1 then 2"][0]["losses"], whole.losses, rtol=1e-4, atol=1e-6)
    close(tensors(out), tensors(two / "1 then 2"), 1e-4)
    lines = (two / "1 then 2" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, STEPS + 1))


def test_bf16_in_two_processes(models, folder, jobs, tmp_path):
    """Gradients are rounded to bf16 before they are summed, in another order than alone: near, not equal."""
    results, out = jobs
    alone = lf.train(settings(models, folder, tmp_path, "qwen", "mixed", {"precision": "bf16"}))
    np.testing.assert_allclose(results["bf16"][0]["losses"], alone.losses, rtol=0.02)
    dtypes = [{name: tensor.dtype for name, tensor in tensors(path).items()} for path in (out / "bf16", tmp_path)]
    assert dtypes[0] == dtypes[1] and torch.bfloat16 in dtypes[0].values()


def test_a_bad_record_of_one_rank_ends_all_with_its_message(jobs):
    results, _ = jobs
    first, second = results["bad record"]
    assert first == second and "record 0 (id 0)" in first["error"] and "rank" in first["error"]


def test_rows_of_like_cost_share_a_round():
    assert deal([5.0, 1.0, 4.0, 2.0, 3.0], 2) == [[0, 2], [3, 4], [1, None]]
    assert deal([1.0], 3) == [[0, None, None]]
    costs = list(np.random.default_rng(0).random(64))
    rounds = deal(costs, 4)
    assert sorted(row for taken in rounds for row in taken) == list(range(64))
    assert sum(max(costs[row] for row in taken) for taken in rounds) < 1.08 * sum(costs) / 4


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
    with pytest.raises(ValueError, match=message):
        make_share(lf.load(checkpoints[kind]), Ranks(0, world), parts)


def test_what_needs_several_processes_or_one(models, folder, tmp_path):
    with pytest.raises(ValueError, match="sequence_parallel must be 1 in a run of one process, got 2"):
        lf.train(settings(models, folder, tmp_path, "qwen", "text", {"sequence_parallel": 2}))
    config = as_config(settings(models, folder, tmp_path, "qwen", "text", {"optimizer": "adamw_8bit"}))
    model = lf.load(models["qwen"])
    with pytest.raises(ValueError, match="optimizer must be 'adamw' in a run of several processes"):
        fit(model, index_records(config, model.input_spec), config, ranks=Ranks(1, 2))


FAIL = """
import os, signal, sys, time
import torch
torch.set_num_threads(1)
import llava_fast as lf
def on_step(metrics):
    if metrics.step == 3 and os.environ["RANK"] == "1":
        time.sleep(1000) if sys.argv[2] == "hangs" else os.kill(os.getpid(), signal.SIGKILL)
lf.train(sys.argv[1], on_step=on_step)
"""


@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_a_rank_that_fails_ends_the_others(models, folder, tmp_path, how):
    fields = settings(models, folder, tmp_path / "run", "qwen", "mixed", {"collective_timeout": 8, "log_every": 1})
    (tmp_path / "run.json").write_text(json.dumps(fields))
    (tmp_path / "run.yaml").write_text(json.dumps(fields))
    port = free_port()
    processes = [start("-c", FAIL, str(tmp_path / "run.yaml"), how, rank=rank, port=port) for rank in (0, 1)]
    try:
        output, _ = processes[0].communicate(timeout=90)
        assert processes[0].returncode == 1 and "Error" in output, output
        assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) >= 2
    finally:
        for process in processes:
            process.kill()


def test_torchrun_of_the_command_line(models, folder, tmp_path):
    """One process prints and writes; a signal to torchrun saves."""
    fields = settings(models, folder, tmp_path / "run", "qwen", "apart", {"progress": True, "save_every": 10, "tokens_per_row": 64})
    (tmp_path / "run.yaml").write_text(json.dumps(fields))
    process = start(*TORCHRUN, "--master-port", str(free_port()), "-m", "llava_fast.cli", "train", str(tmp_path / "run.yaml"))
    try:
        output, _ = process.communicate(timeout=200)
    finally:
        process.kill()
    assert process.returncode == 0, output
    assert output.count("2 samples") == 1 and output.count(f"{STEPS} steps, checkpoint in") == 1, output
    assert lf.load(tmp_path / "run") and len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == STEPS
