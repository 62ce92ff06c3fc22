"""One process of the training benchmark: `python -m bench.training_steps SIDE CHECKPOINT ROW STEPS`.

SIDE: llava_fast, or one of bench.baselines.training.SIDES. ROW: a name of ROWS, `batch2` (two samples of the workload, see `batch_of`), or
a number of tokens, filled with samples of bench/workloads/m4_mix.jsonl. The tower is frozen, everything else trained, AdamW fused, fp32;
the same samples, weights and steps on every side. Before the steps that are timed comes one on the row's first two samples: it makes the
optimiser's state and compiles what is compiled. Prints JSON: loss of each step, seconds of that first and of the fastest step, operations.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.workload import WORKLOAD
from llava_fast.batch import IGNORE
from llava_fast.memory import kept_memory

PATCHES, SIZE = 729, 384
Shape = tuple[int, int, int]  # views, tokens of text, labels of a sample
# The last two are the rows of the issue of padding: 2,407 tokens in 3 samples, 5,523 in 4.
ROWS: dict[str, list[Shape]] = {
    "1000": [(1, 60, 24), (0, 211, 80)],
    "2407": [(1, 40, 16), (0, 120, 48), (2, 60, 24)],
    "5523": [(1, 40, 16), (0, 120, 48), (2, 60, 24), (4, 200, 80)],
}
CONFIG: dict[str, Any] = {"lr": 1e-5, "lr_vision_tower": "frozen", "clip": 1.0}
LARGEST = 12_000  # padded positions of `batch_of`'s batch: what 24 GB train


def workload() -> list[Shape]:
    records = [json.loads(line) for line in WORKLOAD.read_text().splitlines()]
    return [(r["views"], sum(map(sum, r["turns"])), sum(answer for _, answer in r["turns"])) for r in records]


def length(shape: Shape) -> int:
    return shape[0] * PATCHES + shape[1]


def padding_waste(lengths: Sequence[int], size: int, grouped: bool = False) -> float:
    """Share of padded positions in batches of `size` in order; grouped: sorted within each 50 batches, as Trainer's group_by_length."""
    order = list(lengths)
    if grouped:
        order = [n for i in range(0, len(order), 50 * size) for n in sorted(order[i : i + 50 * size], reverse=True)]
    batches = [order[i : i + size] for i in range(0, len(order), size)]
    return 1 - sum(order) / sum(max(batch) * len(batch) for batch in batches)


def batch_of(size: int) -> list[Shape]:
    """Of the workload's batches in order the first that pads as much as they do on average, and fits LARGEST positions."""
    known = workload()
    average = padding_waste([length(shape) for shape in known], size)
    for i in range(0, len(known), size):
        batch = known[i : i + size]
        lengths = [length(shape) for shape in batch]
        if padding_waste(lengths, size) >= average and size * max(lengths) <= LARGEST:
            return batch
    raise ValueError(f"no batch of {size} pads {average:.0%} within {LARGEST} positions")


def shapes(row: str) -> list[Shape]:
    """The samples of a row; of a number past ROWS those of the workload in order, as many as fit, the last cut to what is left."""
    if row in ROWS:
        return ROWS[row]
    if row.startswith("batch"):
        return batch_of(int(row.removeprefix("batch")))
    left, made = int(row), []
    for views, text, answers in workload():
        if views * PATCHES + text > left:
            views = min(views, (left - text) // PATCHES)
        if views >= 0 and text + views * PATCHES <= left:
            made.append((views, text, answers))
            left -= views * PATCHES + text
        if left < 300:
            break
    views, text, answers = made[-1]
    return [*made[:-1], (views, text + left, answers)]


def samples(wanted: list[Shape], image_token: int, vocabulary: int = 100_000) -> tuple[list[tuple[Tensor, Tensor]], Tensor | None]:
    """ids and labels of each sample (pictures first, the last tokens supervised), and normalised views."""
    rng = np.random.default_rng(0)
    made, views = [], 0
    for pictures, text, answers in wanted:
        ids = np.concatenate([np.full(pictures * PATCHES, image_token), rng.integers(1000, vocabulary, text)])
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

    def row_of(wanted: list[Shape]) -> Row:
        made, pixels = samples(wanted, model.config.image_token_id)
        batch = pack_marked(model, [Sample(ids.numpy(), labels=labels.numpy()) for ids, labels in made], pixels, "labels")
        return Row(batch, tuple(range(len(made))), tuple(range(len(made) + 1)))

    packed = row_of(shapes(row))

    def step() -> float:
        return float(train_step(model, trained, optimizer, [packed], 1.0, config.clip, "cpu", LabelLoss())[0])

    operations = row_flops(model.config, packed.batch, trained=("projector", "decoder"))
    return timed(step, steps) | {"operations": operations}


def with_transformers(side: str, checkpoint: str, row: str, steps: int) -> dict[str, Any]:
    from transformers import LlavaForConditionalGeneration

    from bench.baselines.training import SIDES

    model = LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).train()
    model.model.vision_tower.requires_grad_(False)
    SIDES[side].prepare(model)
    batch = SIDES[side].batch(*samples(shapes(row), model.config.image_token_id))
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=CONFIG["lr"], weight_decay=0.0, fused=True)

    def step() -> float:
        loss = SIDES[side].loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learning, CONFIG["clip"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return timed(step, steps)


def timed(step: Callable[[], float], steps: int) -> dict[str, Any]:
    """The first step is not timed: it makes the optimiser's state, faults the memory in, and compiles what is to be compiled."""
    with kept_memory():  # as fit has it, for every side
        start = time.perf_counter()
        losses, times = [step()], []
        first = time.perf_counter() - start
        for _ in itertools.repeat(None, steps):
            start = time.perf_counter()
            losses.append(step())
            times.append(time.perf_counter() - start)
    return {"losses": losses, "step_s": statistics.median(times), "warm_up_s": first}


if __name__ == "__main__":
    Path("/proc/self/oom_score_adj").write_text("1000")  # where memory runs out, it is this process that goes
    side, checkpoint, row, steps = sys.argv[1:]
    if side == "llava_fast":
        print(json.dumps(with_llava_fast(checkpoint, row, int(steps))))
    else:
        print(json.dumps(with_transformers(side, checkpoint, row, int(steps))))
