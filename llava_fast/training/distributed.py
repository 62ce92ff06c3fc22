"""Several processes of one run: who they are and what they tell each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, this one among them; one alone by default. control: a group for numbers and objects on the CPU."""

    rank: int = 0
    world: int = 1
    control: Any = None

    @property
    def first(self) -> bool:
        return self.rank == 0

    def total(self, *values: float) -> list[float]:
        """The sums of each value over all ranks."""
        if self.world == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(sums, group=self.control)
        return sums.tolist()

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in the order of ranks, on all of them."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self.control)
        return values

    def agree(self, error: Exception | None) -> None:
        """Raise what any rank failed with, on all of them: one that waits for another that has left waits until the time-out."""
        if self.world == 1:
            if error is not None:
                raise error
            return
        for rank, said in enumerate(self.gather(None if error is None else (type(error).__name__, str(error)))):
            if said is not None:
                name, message = said
                kind = {"ValueError": ValueError, "OSError": OSError}.get(name, RuntimeError)
                raise kind(f"rank {rank}: {message}") from error
