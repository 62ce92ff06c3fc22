"""Direct preference optimisation over packed rows (arXiv 2305.18290; losses as in LLaVA-NeXT's trl/trainer/dpo_trainer.py).

Every pair of a row is three sequences: the prompt, and the two answers that attend to it. So prompt and pictures are in the row once, and
where nothing but adapters is trained they are encoded once for policy and reference too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llava_fast.batch import Features, PackedBatch
from llava_fast.quantise import quantised_tensors
from llava_fast.training.batches import Dataset, Position, Row, ahead, make_steps, plan_epoch
from llava_fast.training.config import TrainConfig
from llava_fast.training.distributed import Ranks, Share
from llava_fast.training.features import weights_fingerprint
from llava_fast.training.lora import adapters, without_adapters
from llava_fast.training.options import DpoOptions
from llava_fast.training.step import Objective

REFERENCE = "reference.pt"
SAVE_SECONDS = 30.0
ALONE = Ranks()


class PreferenceLoss:
    """An `Objective`: the mean over pairs of DpoOptions' loss.

    reference: log-probabilities of the model as it was, fp32 [pairs, 2] (chosen, rejected) by the data set's index; None: they are those
    of the model without its adapters, which must be all that is trained.
    """

    def __init__(self, options: DpoOptions, reference: Tensor | None = None):
        self.options, self.reference = options, reference

    def prepare(self, model: Any, data: Dataset, config: TrainConfig, device: torch.device, *rest: Any, **options: Any) -> None:
        """Before the first step: the reference's log-probabilities (`reference_logps`), where the model will forget them."""
        if self.reference is None and forgets(model):
            self.reference = reference_logps(model, data, config, device, *rest, **options)

    def weight(self, row: Row) -> int:
        return len(row.indices)

    def __call__(self, model: Any, row: Row) -> tuple[Tensor, dict[str, Tensor]]:
        options, batch = self.options, row.batch
        if batch.layout is not None and not any(p.requires_grad for p in model.vision_tower.parameters()):
            # One pass of the tower, for policy and reference.
            batch = dataclasses.replace(batch, views=None, features=Features(model.features_of(batch), batch.label_rows[:0]))
        policy = pair_logps(model, row, batch)
        if self.reference is not None:
            reference = self.reference[list(row.indices)].to(policy)
        else:
            with torch.no_grad(), without_adapters(model):
                reference = pair_logps(model, row, batch)
        labels = pair_labels(row).to(policy)
        if options.loss == "ipo":
            policy, reference = policy / labels, reference / labels
        ahead = policy - reference
        h = ahead[:, 0] - ahead[:, 1]
        if options.loss == "sigmoid":
            losses = -F.logsigmoid(options.beta * h)
        elif options.loss == "hinge":
            losses = torch.relu(1 - options.beta * h)
        else:
            losses = (h - 1 / (2 * options.beta)).square()
        chosen = -policy[:, 0] / (1 if options.loss == "ipo" else labels[:, 0])
        rewards = options.beta * ahead.detach()
        sums = {
            "losses/dpo": losses,
            "losses/sft": chosen,
            "rewards/chosen": rewards[:, 0],
            "rewards/rejected": rewards[:, 1],
            "rewards/margins": rewards[:, 0] - rewards[:, 1],
            "rewards/accuracies": (rewards[:, 0] > rewards[:, 1]).float(),
            "logps/chosen": policy[:, 0],
            "logps/rejected": policy[:, 1],
        }
        total = options.alpha * losses + (options.gamma * chosen if options.gamma else 0)
        return total.sum(), {name: value.detach().sum() for name, value in sums.items()}


def pair_logps(model: Any, row: Row, batch: PackedBatch | None = None) -> Tensor:
    """Log-probabilities of the labels of each pair's two conversations, fp32 [pairs, 2]; labels in the shared part count in both."""
    batch = row.batch if batch is None else batch
    return _by_pair(row, model.label_losses(batch, "sequence"))


def pair_labels(row: Row) -> Tensor:
    """How many labels those are, [pairs, 2]."""
    counts = torch.zeros(row.batch.num_sequences, device=row.batch.label_seq.device)
    return _by_pair(row, counts.index_add(0, row.batch.label_seq, torch.ones_like(row.batch.label_seq, dtype=counts.dtype)))


def _by_pair(row: Row, values_S: Tensor) -> Tensor:
    shared, chosen, rejected = values_S.view(-1, 3).unbind(1)
    return torch.stack([shared + chosen, shared + rejected], dim=1)


def forgets(model: Any) -> bool:
    """Whether something besides adapters is trained, so that the model as it was is gone after the first step."""
    own = {parameter for adapter in adapters(model) for parameter in adapter.parameters()}
    return any(parameter.requires_grad and parameter not in own for parameter in model.parameters())


class Logps:
    """`pair_logps` as an `Objective`, for a pass without gradients."""

    def weight(self, row: Row) -> int:
        return len(row.indices)

    def __call__(self, model: Any, row: Row) -> tuple[Tensor, dict[str, Tensor]]:
        return pair_logps(model, row), {}


@torch.no_grad()
def reference_logps(
    model: Any,
    data: Dataset,
    config: TrainConfig,
    device: torch.device,
    objective: Objective | None = None,
    name: str = REFERENCE,
    base: str | None = None,
    ranks: Ranks = ALONE,
    share: Share | None = None,
) -> Tensor:
    """`pair_logps` of every pair under the model as it is, fp32 [pairs, 2]; kept in output_dir under `name`, from which a run that was
    stopped goes on. Pairs that cannot be read stay NaN.

    objective: `Logps`, or what it runs inside of.  base: what the model's weights are known by, where they are in parts.  ranks, share:
    every rank computes its rows of each round, all get the values of all, and the first one writes them down.
    """
    file = Path(config.output_dir) / name
    objective, base = objective or Logps(), base or weights_fingerprint([*model.named_parameters(), *quantised_tensors(model)])
    made_of = (config.template, config.inputs, config.precision, config.lora and config.lora.base)
    identity = f"{len(data.tokens)} pairs, contents {data.fingerprint:08x}, {made_of}, model {base}"
    at_once = 1 if share is None else share.world
    settings = dataclasses.replace(config, epochs=1, max_steps=None, rows_per_step=at_once)
    rows = len(plan_epoch(data, settings, 0).rows)
    logps, done = ranks.gather(_known(file, identity, rows, len(data.tokens)) if ranks.first else None)[0]
    fresh: list[tuple[tuple[int, ...], Tensor]] = []

    def save() -> None:
        for indices, values in itertools.chain.from_iterable(ranks.gather(fresh)):
            logps[list(indices)] = values
        fresh.clear()
        ranks.first_then_others(lambda: _keep(file, identity, rows, done, logps) if ranks.first else None)

    saved = time.monotonic()
    training = model.training
    model.eval()  # nothing is dropped, and nothing drawn: a run whose reference is there already draws the same as this one
    steps = make_steps(data, settings, Position(0, done), (lambda message: None) if config.on_bad_record == "skip" else None, share)
    with torch.random.fork_rng([device] if device.type == "cuda" else []), contextlib.closing(ahead(steps)) as made:
        for step in ranks.each(made):
            for row in step.rows:
                values = objective(model, row.to(device))[0].float().cpu()
                if row.indices:
                    fresh.append((row.indices, values))
            done = step.after.row if step.after.epoch == 0 else rows
            if ranks.total(ranks.first and time.monotonic() - saved > SAVE_SECONDS)[0]:
                save()
                saved = time.monotonic()
    model.train(training)
    save()
    return logps


def _known(file: Path, identity: str, rows: int, pairs: int) -> tuple[Tensor, int]:
    """Log-probabilities and finished rows of an earlier pass over the same pairs with the same model; of none where there was none."""
    if file.is_file():
        state = torch.load(file, weights_only=True)
        unread = state["done"] == rows and bool(state["logps"].isnan().any())  # those may be readable by now
        if state["identity"] == identity and state["rows"] == rows and not unread:
            return state["logps"], state["done"]
    return torch.full((pairs, 2), torch.nan), 0


def _keep(file: Path, identity: str, rows: int, done: int, logps: Tensor) -> None:
    torch.save({"identity": identity, "rows": rows, "done": done, "logps": logps}, partial := file.with_suffix(f".{os.getpid()}"))
    os.replace(partial, file)
