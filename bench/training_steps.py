"""One process of the training benchmark: `python -m bench.training_steps SIDE CHECKPOINT ROW STEPS`.

SIDE: llava_fast, padded or padding_free (bench/baselines/training.py). ROW: a name of ROWS, or a number of tokens, filled with samples of
bench/workloads/m4_mix.jsonl. The tower is frozen, everything else trained, AdamW fused, fp32; the same samples, weights and steps on every
side. Prints JSON: loss of each step, seconds of the fastest and of the median one, operations.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llava_fast.batch import IGNORE
from llava_fast.memory import kept_memory

PATCHES, SIZE = 729, 384
# (views, tokens of text, labels) of each sample. The first two are the rows of the issue of padding: 2,407 tokens in 3, 5,523 in 4.
ROWS = {
    "2407": [(1, 40, 16), (0, 120, 48), (2, 60, 24)],
    "5523": [(1, 40, 16), (0, 120, 48), (2, 60, 24), (4, 200, 80)],
}
CONFIG: dict[str, Any] = {"lr": 1e-5, "lr_vision_tower": "frozen", "clip": 1.0}


def shapes(row: str) -> list[tuple[int, int, int]]:
    """The samples of a row; past ROWS, those of the workload in order, as many as fit, the last cut to what is left."""
    if row in ROWS:
        return ROWS[row]
    left, made = int(row), []
    for line in (Path(__file__).parent / "workloads" / "m4_mix.jsonl").read_text().splitlines():
        record = json.loads(line)
        answers = sum(answer for _, answer in record["turns"])
        views, text = record["views"], sum(question for question, _ in record["turns"]) + answers
        if views * PATCHES + text > left:
            views = min(views, (left - text) // PATCHES)
        if views >= 0 and text + views * PATCHES <= left:
            made.append((views, text, answers))
            left -= views * PATCHES + text
        if left < 300:
            break
    views, text, answers = made[-1]
    return [*made[:-1], (views, text + left, answers)]


def samples(row: str, image_token: int) -> tuple[list[tuple[Tensor, Tensor]], Tensor | None]:
    """ids and labels of each sample (pictures first, the last tokens supervised), and normalised views."""
    rng = np.random.default_rng(0)
    made, views = [], 0
    for pictures, text, answers in shapes(row):
        ids = np.concatenate([np.full(pictures * PATCHES, image_token), rng.integers(1000, 100_000, text)])
        labels = np.where(np.arange(len(ids)) >= len(ids) - answers, ids, IGNORE)
        made.append((torch.from_numpy(ids), torch.from_numpy(labels)))
        views += pictures
    pixels = torch.rand(views, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return made, pixels if views else None


def with_llava_fast(checkpoint: str, row: str, steps: int) -> dict[str, Any]:
    from llava_fast import checkpoint as files
    from llava_fast.batch import Sample
    from llava_fast.engine.dropin import pack_marked
    from llava_fast.models.llava import Llava
    from llava_fast.training.batches import Row
    from llava_fast.training.config import TrainConfig
    from llava_fast.training.flops import row_flops
    from llava_fast.training.step import LabelLoss, make_optimizer, prepare_parameters, train_step

    model = files.load(Llava, checkpoint, device="cpu", dtype=torch.float32)
    config = TrainConfig("m", "a.json", "out", **CONFIG)
    trained = prepare_parameters(model, config, "fp32")
    optimizer = make_optimizer(trained.masters, config)
    made, pixels = samples(row, model.config.image_token_id)
    batch = pack_marked(model, [Sample(ids.numpy(), labels=labels.numpy()) for ids, labels in made], pixels, "labels")
    packed = Row(batch, tuple(range(len(made))), tuple(range(len(made) + 1)))

    def step() -> float:
        return float(train_step(model, trained, optimizer, [packed], 1.0, config.clip, "cpu", LabelLoss())[0])

    parts = ("projector", "decoder")
    return timed(step, steps) | {"operations": row_flops(model.config, batch, trained=parts), "tokens": batch.num_tokens}


def with_transformers(side: str, checkpoint: str, row: str, steps: int) -> dict[str, Any]:
    from transformers import LlavaForConditionalGeneration

    from bench.baselines import training

    model = LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).train()
    model.model.vision_tower.requires_grad_(False)
    make, loss_of = {
        "padded": (training.padded_batch, training.padded_loss),
        "padding_free": (training.padding_free_batch, training.padding_free_loss),
    }[side]
    batch = make(*samples(row, model.config.image_token_id))
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=CONFIG["lr"], weight_decay=0.0, fused=True)

    def step() -> float:
        loss = loss_of(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learning, CONFIG["clip"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return timed(step, steps)


def timed(step: Any, steps: int) -> dict[str, Any]:
    """The first step is not timed: it makes the optimiser's state."""
    with kept_memory():  # as fit has it, for every side
        losses, times = [step()], []
        for _ in itertools.repeat(None, steps):
            start = time.perf_counter()
            losses.append(step())
            times.append(time.perf_counter() - start)
    return {"losses": losses, "step_s": statistics.median(times), "best_s": min(times)}


if __name__ == "__main__":
    Path("/proc/self/oom_score_adj").write_text("1000")  # where memory runs out, it is this process that goes
    side, checkpoint, row, steps = sys.argv[1:]
    if side == "llava_fast":
        print(json.dumps(with_llava_fast(checkpoint, row, int(steps))))
    else:
        print(json.dumps(with_transformers(side, checkpoint, row, int(steps))))
