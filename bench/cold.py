"""Inputs that lie in no cache when they are used, nor what is written: calls walk round a ring of copies.

A share of the bandwidth of memory means something only so: 32 MB that a rival has just read are read again from the last-level cache, at
twice that bandwidth.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from llava_fast.limits import CPU_BYTES


def copies_for(nbytes: float) -> int:
    """So many that a walk round the ring, `nbytes` a call, moves what passes the last-level cache: two at the least."""
    return max(2, -(-CPU_BYTES // int(nbytes)))


def copied(inputs: Sequence[Any], count: int) -> list[tuple[Any, ...]]:
    """The same numbers in memory of their own; what is no tensor is shared."""
    return [tuple(x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in inputs) for _ in range(count)]


def ring(sets: Sequence[Sequence[Any]]) -> Callable[..., Callable[[], None]]:
    """around(run, calls): a function that calls run(*inputs) on the next `calls` sets, by default on all, and keeps what each call gives
    until it is made again: an output's memory is then the one that was written longest ago. All functions of a ring go on where the last
    one stopped, so that none finds what another has just read."""
    turn = itertools.cycle(range(len(sets)))

    def around(run: Callable[..., object], calls: int = len(sets)) -> Callable[[], None]:
        kept: list[object] = [None] * calls

        def some() -> None:
            for call in range(calls):
                kept[call] = run(*sets[next(turn)])

        return some

    return around


Sets = Sequence[Sequence[Any]]


def gradients(run: Callable[..., Any], sets: Sets, grads: Sequence[Sequence[Tensor]]) -> Callable[[int], Sequence[Tensor]]:
    """backward(i): the gradients of the i-th set, by a graph that stays: torch.compile refuses a second pass of one that does not."""
    outs = [run(*each) for each in sets]
    wanted = [[x for x in each if isinstance(x, Tensor) and x.requires_grad] for each in sets]
    return lambda i: torch.autograd.grad(outs[i], wanted[i], grads[i], retain_graph=True)
