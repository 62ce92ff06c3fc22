"""Loss on held-out samples, by scenario, and what else the objective reports: the same rows every time, and nothing of it reaches the
training."""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from llava_fast.inputs.packing import pack_rows
from llava_fast.training.batches import Dataset, Row, ahead, make_rows, scenario_of
from llava_fast.training.config import TrainConfig
from llava_fast.training.distributed import Ranks, Share
from llava_fast.training.step import Objective

WEIGHT = "weight"  # among the sums of a scenario


@dataclass(frozen=True)
class Validation:
    """Held-out samples in rows of one scenario each, so that any objective's loss can be told apart by scenario.

    objective: where given, what these samples are judged by in place of the training's.
    """

    data: Dataset
    rows: list[tuple[str, list[int]]]
    config: TrainConfig
    on_bad: Callable[[str], None] | None
    ranks: Ranks
    share: Share | None
    objective: Objective | None = None

    @torch.no_grad()
    def losses(self, model: Any, objective: Objective, device: torch.device) -> dict[str, float]:
        """The objective's mean over each scenario's labels (or pairs), and over all of them under 'all'; what else it reports likewise,
        under <scenario>/<name>."""
        training, objective = model.training, self.objective or objective
        model.eval()
        sums: dict[str, Any] = {scenario: Counter() for scenario, _ in self.rows}
        with torch.random.fork_rng([device] if device.type == "cuda" else []), contextlib.closing(ahead(self._made())) as made:
            for scenario, rows in self.ranks.each(made):
                for row in rows:
                    loss, others = objective(model, row.to(device))
                    counts = bool(row.indices)  # a row that stands in adds nothing but the names, which every rank must have
                    sums[scenario][WEIGHT] += objective.weight(row) * counts
                    for name, value in {"": loss, **{f"/{name}": value for name, value in others.items()}}.items():
                        sums[scenario][name] += value.item() if counts else 0.0
        model.train(training)
        sums = {scenario: Counter(dict(zip(own, self.ranks.total(*own.values()), strict=True))) for scenario, own in sums.items()}
        names = dict.fromkeys(name for own in sums.values() for name in own)  # a scenario of which no row could be read has none
        sums["all"] = Counter({name: sum(own[name] for own in sums.values()) for name in names})
        counted = {scenario: own for scenario, own in sums.items() if own[WEIGHT]}
        return {f"{scenario}{name}": own[name] / own[WEIGHT] for scenario, own in counted.items() for name in own if name != WEIGHT}

    def _made(self) -> Generator[tuple[str, list[Row]], None, None]:
        """As many rows at a time as are run at once."""
        at_once = 1 if self.share is None else self.share.world
        with ThreadPoolExecutor(self.config.workers) as pool:
            for scenario, own in itertools.groupby(self.rows, key=lambda row: row[0]):
                rows = [indices for _, indices in own]
                for start in range(0, len(rows), at_once):
                    yield scenario, make_rows(self.data, rows[start : start + at_once], pool, self.on_bad, self.share)


def plan_validation(
    data: Dataset, config: TrainConfig, on_bad: Callable[[str], None] | None, ranks: Ranks, share: Share | None
) -> Validation:
    """Pack each scenario's samples. Raises ValueError where there are none."""
    if not len(data.tokens):
        raise ValueError(f"no record of validation_data ({', '.join(config.validation_data)}) can be validated on")
    members: dict[str, list[int]] = {}
    for index in range(len(data.tokens)):
        members.setdefault(scenario_of(data, index), []).append(index)
    rows = []
    for scenario, indices in sorted(members.items()):
        chosen = np.array(indices)
        packed = pack_rows(
            data.tokens[chosen],
            data.views[chosen],
            config.tokens_per_row,
            config.views_per_row,
            window=config.packing_window,
            seed=0,
            epoch=0,
            too_long="skip",
        )
        rows += [(scenario, [int(chosen[i]) for i in row]) for row in packed.rows]
    return Validation(data, rows, config, on_bad, ranks, share)
