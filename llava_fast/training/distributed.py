"""Several processes of one run: who they are, what they tell each other, and a model in shards over all of them (FSDP2).

Every rank makes the same calls in the same order, whatever its rows hold: that is what keeps them from waiting for each other for ever.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from llava_fast.batch import IGNORE, Layout, PackedBatch, Sample, pack
from llava_fast.checks import require
from llava_fast.config import DecoderConfig
from llava_fast.training.batches import Row
from llava_fast.training.config import TrainConfig
from llava_fast.training.flops import row_flops
from llava_fast.training.sequence import split_row
from llava_fast.training.step import Objective, Trained

T = TypeVar("T")
WATCH_SECONDS = 0.5  # between looks for a failure of another rank
LEAVE_SECONDS = 10.0  # that a rank has to come to its end after one; the first, who may keep the notice, waits twice that for the others


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, this one among them; one alone by default."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def total(self, *values: float) -> list[float]:
        """The sums of each value over all ranks."""
        if self.world == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(sums)
        return sums.tolist()

    def add(self, values: Tensor) -> Tensor:
        """The sum of a tensor, on whatever device, over all ranks."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in the order of ranks, on all of them."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def first_then_others(self, work: Callable[[], T]) -> T:
        """What `work` returns here, done by the first rank before the others: they find the files it made. Its error is everybody's."""
        done, error = None, None
        for turn in (True, False):
            if self.first == turn:
                try:
                    done = work()
                except (ValueError, OSError) as failure:
                    error = failure
            self.agree(error)
        return done  # type: ignore[return-value]

    def agree(self, error: Exception | None) -> None:
        """Raise what any rank failed with, on all of them: one that waits for another that has left waits until the time-out."""
        if self.world == 1:
            if error is not None:
                raise error
            return
        if not self.total(error is not None)[0]:
            return
        for rank, said in enumerate(self.gather(None if error is None else (type(error).__name__, str(error)))):
            if said is not None:
                name, message = said
                kind = {"ValueError": ValueError, "OSError": OSError}.get(name)
                raise (kind or RuntimeError)(f"rank {rank}: " + (message if kind else f"{name}: {message}")) from error

    def each(self, items: Iterator[T]) -> Iterator[T]:
        """The items, of which every rank has as many; an exception of whatever kind in making one is raised on all ranks."""
        while True:
            item, error = None, None
            try:
                item = next(items, None)
            except Exception as failure:
                error = failure
            self.agree(error)
            if item is None:
                return
            yield item


@contextlib.contextmanager
def connected(device: torch.device, timeout: int) -> Iterator[tuple[Ranks, torch.device]]:
    """The processes that torchrun started (or whoever set its variables), and this one's device; alone without them.

    timeout: seconds after which a rank gives up on another. The group is left at the end: one that the interpreter tears down can abort.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1 or dist.is_initialized():
        known = dist.is_initialized()
        yield Ranks(dist.get_rank(), dist.get_world_size()) if known else Ranks(), device
        return
    backend = "gloo"
    if device.type == "cuda":
        device, backend = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    store, rank, world = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout)))
    # torchrun's store outlives a run: the addresses and notices of one are not those of the next. Every rank counts the same.
    run = f"llava_fast/{store.add(f'llava_fast/runs/{rank}', 1)}"
    board = dist.PrefixStore(run, store.clone())  # a connection of its own: calls on one wait for each other
    store = dist.PrefixStore(run, store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timedelta(seconds=timeout))
    ranks = Ranks(rank, world)
    try:
        with one_fate(board, ranks):
            yield ranks, device
            dist.barrier()  # the one that keeps the store leaves last
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def one_fate(board: dist.Store, ranks: Ranks) -> Iterator[None]:
    """What ends one rank ends all, wherever it happens: the first to fail leaves a notice, which names it and its reason.

    Others see the notice when a call of theirs fails, as gloo's do once a process is gone, or in the thread that looks for it: NCCL's calls
    wait for a rank that has left until they time out, and this process is then ended from outside of them.
    """
    over, seen = threading.Event(), []

    def watch() -> None:
        while not over.wait(WATCH_SECONDS):
            try:
                said = board.get("failure").decode() if board.check(["failure"]) else None
            except RuntimeError as error:
                said = f"rank 0, or who keeps the store, is gone ({error})"
            if said is not None:
                seen.append(said)
                if not over.wait(LEAVE_SECONDS):
                    print(f"rank {ranks.rank} ends after a failure of another: {said}", file=sys.stderr, flush=True)
                    os._exit(1)
                return

    thread = threading.Thread(target=watch, name="llava_fast-ranks", daemon=True)
    thread.start()
    try:
        yield
    except BaseException as error:
        if getattr(error, "agreed", False):  # all ranks stop, and some have more to put away than others
            dist.barrier()
            raise
        over.set()
        own = f"rank {ranks.rank}: {type(error).__name__}: {error}"
        said = seen[0] if seen else own
        with contextlib.suppress(RuntimeError):  # the store is gone
            said = board.compare_set("failure", "", own).decode()
            board.set(f"left/{ranks.rank}", "")
            if ranks.first:
                board.wait([f"left/{rank}" for rank in range(ranks.world)], timedelta(seconds=2 * LEAVE_SECONDS))
        if said != own and isinstance(error, RuntimeError) and not str(error).startswith("rank "):
            raise RuntimeError(said) from error
        raise
    finally:
        over.set()
        thread.join()


class Sharded(nn.Module):
    """The root of a sharded model: what runs inside `forward` finds its own parameters whole, and those of a block while the block runs."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, run: Callable[[Any], tuple[Tensor, dict[str, Tensor]]]) -> tuple[Tensor, dict[str, Tensor]]:
        value, others = run(self.model)
        for name, parameter in self.model.named_parameters(recurse=False):  # the newline row: only rows with tiles have a use for it
            if parameter.requires_grad:
                assert parameter.ndim == 1, name
                value = value + 0.0 * parameter.sum()
        return value, others


def shard(model: Any, device: torch.device, precision: str) -> Sharded:
    """Cut every block's parameters over all ranks: decoder layers, tower layers, tower, projector, and what is left.

    model: on the CPU, whole on every rank; it is moved block by block. A frozen tower stays whole: its passes differ in number from rank
    to rank, and it needs no gradients. Weights are gathered in bf16 and gradients summed in fp32 where precision is 'bf16'.
    The joined products (`models.layers.join`) fall back to one a weight, since gathered weights lie apart.
    """
    whole = torch.bfloat16 if precision == "bf16" else None
    policy = MixedPrecisionPolicy(param_dtype=whole, reduce_dtype=torch.float32, cast_forward_inputs=False)
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    stored = torch.bfloat16 if precision == "bf16_pure" else torch.float32
    tower, trained = model.vision_tower, any(p.requires_grad for p in model.vision_tower.parameters())
    kept: set[nn.Parameter] = set()
    if not trained:
        tower.to(device, whole or stored).join()
        kept = set(tower.parameters())
    else:
        model.views_a_pass = None
    blocks = [*(tower.encoder.layers if trained else ()), *([tower] if trained else ()), model.multi_modal_projector]
    for block in [*blocks, *model.language_model.layers, model]:  # the model last, for what is in none
        for parameter in block.parameters():  # a frozen one as it is gathered: it is no master
            if parameter not in kept and not isinstance(parameter, DTensor):
                parameter.data = parameter.data.to(stored if parameter.requires_grad else whole or stored)
        if block is not model:
            fully_shard(block, mesh=mesh, mp_policy=policy)
    root = Sharded(model)
    fully_shard(root, mesh=mesh, mp_policy=policy, ignored_params=kept)
    register_fsdp_forward_method(model.multi_modal_projector, "embed")
    for module in root.modules():
        if isinstance(module, FSDPModule):  # a sum, since every rank's loss is over the weight of all
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)
    return root


def trained_shards(root: Sharded) -> Trained:
    """The sharded parameters that are trained, named as in the model; they are their own masters."""
    working = {name: parameter for name, parameter in root.model.named_parameters() if parameter.requires_grad}
    return Trained(working, dict(working))


class ThroughRoot:
    """An objective of a sharded model."""

    def __init__(self, inner: Objective, root: Sharded):
        self.inner, self.root = inner, root
        self.weight = inner.weight

    def __call__(self, model: Any, row: Row) -> tuple[Tensor, dict[str, Tensor]]:
        return self.root(lambda whole: self.inner(whole, row))


def gather_parameters(model: nn.Module, ranks: Ranks, dtype: torch.dtype | None) -> None:
    """Give the first rank's model its whole parameters, on the CPU, one after the other; those of the others become empty.

    dtype: what they are rounded to first; None: as they are. The model can be saved afterwards; it cannot run.
    """
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            value = parameter.detach() if dtype is None else parameter.detach().to(dtype)
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            module._parameters[name] = nn.Parameter(
                whole.cpu() if ranks.first else whole.new_empty(0, device="cpu"), parameter.requires_grad
            )


@dataclass(frozen=True)
class Share:
    """What a rank runs of each step: of the step's rows, dealt to `world` groups, those of group `rank`; of these its part.

    cost: of a row, from the lengths of its samples and its views.  size, patches: of a view.  part, parts, group: of a row that several
    processes run together.
    """

    rank: int
    world: int
    cost: Callable[[np.ndarray, int], float]
    size: int
    patches: int
    part: int = 0
    parts: int = 1
    group: Any = None

    def fit(self, row: Row | None, pictures: bool) -> Row:
        """The row that is run. Without one it is a pair of answers to a prompt, of a token each, that counts for nothing; pictures:
        whether a rank has any in this round, so that all run the tower."""
        row = stand_in(self.parts) if row is None else row
        batch = row.batch
        if pictures and batch.layout is None:
            batch = _without_views(batch, self.size, self.patches)
        if self.parts > 1:
            batch = split_row(batch, self.part, self.parts, self.group)
        return dataclasses.replace(row, batch=batch)


def check_ranks(config: TrainConfig, ranks: Ranks, decoder: DecoderConfig | None = None) -> None:
    """ValueError where these processes cannot share a run as configured; decoder: the model's, once it is known."""
    parts = config.sequence_parallel
    if ranks.world == 1:
        require(parts == 1, "sequence_parallel", parts, "1 in a run of one process")
        return
    require(config.optimizer == "adamw", "optimizer", config.optimizer, "'adamw' in a run of several processes")
    counts = {"processes": ranks.world}
    if decoder is not None:
        counts |= {"attention heads": decoder.heads, "key and value heads": decoder.kv_heads}
    for what, count in counts.items():
        if count % parts:
            raise ValueError(f"sequence_parallel must divide the {count} {what}, got {parts}")


def make_share(model: Any, ranks: Ranks, parts: int) -> Share:
    """parts: processes that share a row, as `check_ranks` lets pass."""
    config = model.config
    group = dist.new_subgroups(parts)[0] if parts > 1 else None

    def cost(lengths: np.ndarray, views: int) -> float:
        return row_flops(config, lengths, views)

    place = ranks.rank // parts, ranks.world // parts
    return Share(*place, cost, config.vision.image_size, config.patches, ranks.rank % parts, parts, group)


def stand_in(parts: int = 1) -> Row:
    """With a token at least for each part."""
    answer = Sample(np.zeros(2 * parts, dtype=np.int64), labels=np.array([IGNORE, 0] * parts))
    prompt = Sample(np.zeros(1, dtype=np.int64), labels=np.array([IGNORE]))
    return Row(pack([prompt, answer, answer], None, [None, 0, 0]), (), (0, 3))


def _without_views(batch: PackedBatch, size: int, patches: int) -> PackedBatch:
    """The same row with a tower pass over no views, whose weights then get gradients of zero."""
    rows = torch.arange(batch.num_tokens)
    views = torch.empty(0, 3, size, size, dtype=torch.uint8)
    return dataclasses.replace(batch, views=views, layout=Layout(rows[:0], rows, None, (), patches))
