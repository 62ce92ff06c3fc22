"""One step on the device: pictures to rows, rows through the decoder, last rows to tokens.

Shape letters: T rows of a step, S sequences, R rows whose output is read, V vocabulary, D width, B blocks, G key-value heads, d head dim.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from llava_fast import memory
from llava_fast.batch import Sample, pack
from llava_fast.engine.features import FeatureCache
from llava_fast.engine.replay import Replay
from llava_fast.engine.sampling import Sampler
from llava_fast.engine.scheduler import Plan, Work
from llava_fast.engine.sequence import Picture
from llava_fast.kernels import registry
from llava_fast.kernels.linear import Quantised
from llava_fast.kernels.sampling import argmax
from llava_fast.models.decoder import KVCache
from llava_fast.models.layers import Linear
from llava_fast.models.llava import Llava

SMALL_VIEWS = (1, 2, 4)  # numbers of views that get a captured tower of their own
RECORDED = 32  # numbers of decoding sequences whose steps are kept, on the CPU


class StageError(RuntimeError):
    """What went wrong, and in which stage of a step."""


@contextmanager
def stage(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise StageError(f"{name} failed: {type(error).__name__}: {error}") from error


T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass
class Result:
    """Of a step under way. `wait` gives the tokens and log-probabilities of its sampled rows, in the order of its works."""

    works: list[Work]
    values: list[Tensor]  # fp64 [2, R] each, on the host once `ready` is
    ready: torch.cuda.Event | None = None

    def wait(self) -> tuple[list[int], list[float]]:
        if self.ready is not None:
            self.ready.synchronize()
        tokens, logprobs = torch.cat([torch.empty(2, 0, dtype=torch.float64), *self.values], dim=1)
        return tokens.long().tolist(), logprobs.tolist()

    @staticmethod
    def join(results: list[Result]) -> Result | None:
        """Of steps launched one after the other; None of none."""
        if not results:
            return None
        ready = next((r.ready for r in reversed(results) if r.ready is not None), None)
        return Result([w for r in results for w in r.works], [v for r in results for v in r.values], ready)


class Runner:
    """Owns the cache of keys and values, [layers, B + 1, page, G, d]; block B is what a captured step's rows of nobody look at."""

    def __init__(
        self,
        model: Llava,
        blocks: int,
        page: int,
        dtype: torch.dtype,
        max_running: int,
        max_views: int = 8,
        graphs: bool = False,
        deterministic: bool = False,
    ):
        c, device = model.config.decoder, model.device
        self.model, self.page, self.device, self.blocks = model, page, device, blocks
        shape = (c.layers, blocks + 1, page, c.kv_heads, c.head_dim)
        self.k, self.v = (memory.empty(shape, dtype, device) for _ in range(2))
        self.width = -(-c.max_positions // page)  # of a block table
        self.last_tokens = torch.zeros(max_running, dtype=torch.int64, device=device)
        self.sampler = Sampler(model.config.decoder.vocab_size, device)
        self.weights = [parameter.data for parameter in model.parameters()]  # a recorded step holds addresses
        self.deterministic = deterministic
        on_gpu = graphs and device.type == "cuda"
        with self.kernels():
            if deterministic:  # what is missing is told now, not in a request's first step
                check_invariant(model, dtype)
            self.graphs = on_gpu and capturable("decode steps", *decode_ops(model, dtype))
            towers = [n for n in SMALL_VIEWS if on_gpu and n <= max_views] if on_gpu and capturable("the tower", *tower_ops(model)) else []
        self._steps: dict[int, DecodeStep] = {}
        self._towers: dict[int, TowerStep] = {}
        pool = None
        with torch.inference_mode(), self.kernels():  # the largest first: the others live in its memory
            for size in reversed(buckets(max_running)) if self.graphs else ():
                self._steps[size] = step = self.new_step(size)
                pool = step.capture(pool)
            for views in reversed(towers):
                self._towers[views] = tower = TowerStep(model, views)
                pool = tower.capture(pool)

    def kernels(self) -> AbstractContextManager[None]:
        return registry.batch_invariant() if self.deterministic else nullcontext()

    def new_step(self, size: int) -> DecodeStep:
        return DecodeStep(self.model, self.k, self.v, size, self.width)

    def close(self) -> None:
        """Give the memory back."""
        for step in self._steps.values():
            step.repeat = None
        self._steps.clear()
        self._towers.clear()
        self.k = self.v = self.k.new_empty(0)

    def populate(self, first: int, last: int) -> None:
        """Have the memory of blocks first : last ready; on the CPU, from any thread."""
        for buffer in (self.k, self.v):
            for layer in buffer:
                memory.populate(layer[first:last])

    # -- pictures

    def encode(self, pictures: list[Picture], missing: list[Picture], features: FeatureCache) -> None:
        """Run the tower and the projector over the views of `missing` at once; they get their rows, so do `pictures` that are like them."""
        if not missing:
            return
        samples, views = [], []
        for picture in missing:
            assert picture.visual is not None and picture.views is not None
            samples.append(Sample(np.zeros(picture.tokens, dtype=np.int64), (picture.visual,), (0,)))
            views.append(picture.views)
        with stage("the vision tower"), self.kernels():
            batch = pack(samples, torch.cat(views), needed="last").to(self.device)
            assert batch.views is not None and batch.layout is not None
            rows = self.model.multi_modal_projector(self._features(batch.views), batch.layout, self.model.image_newline)
        made = {}
        for picture, own in zip(missing, rows.split([picture.tokens for picture in missing]), strict=True):
            made[picture.key] = own.clone() if len(missing) > 1 else own  # storage of its own
            features.put(picture.key, made[picture.key])
        for picture in pictures:
            picture.rows = made.get(picture.key, picture.rows)

    def _features(self, views: Tensor) -> Tensor:
        if views.dtype == torch.uint8:
            for count, tower in sorted(self._towers.items()):
                if views.shape[0] <= count:
                    return tower(views)
        return self.model.features(views)

    # -- steps

    def copy_rows(self, block: int, into: int, rows: int) -> None:
        """The keys and values of a block's first rows, to another."""
        for buffer in (self.k, self.v):
            buffer[:, into, :rows] = buffer[:, block, :rows]

    def run(self, plan: Plan) -> Result:
        """Launch a step. Its pictures have their rows."""
        works = plan.works
        with stage("the decoder"), self.kernels():
            logits, slots, greedy = self._decode(works) if all(work.repeats for work in works) else (*self._mixed(works), None)
        if logits is None:
            return Result(works, [])
        with stage("sampling"), self.kernels():
            sampled = [work for work in works if work.samples]
            values = self.sampler(logits, sampled, greedy)
            result = self._to_host(works, values)
            if all(not work.draft for work in sampled):
                self.last_tokens[slots] = values[0].long()
        return result

    def _to_host(self, works: list[Work], values: Tensor) -> Result:
        if self.device.type == "cpu":
            return Result(works, [values])
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        ready = torch.cuda.Event()
        ready.record()
        return Result(works, [host], ready)

    def _upload(self, arrays: list[np.ndarray]) -> list[Tensor]:
        """int64 arrays to the device in one copy."""
        whole = torch.from_numpy(np.concatenate([array.reshape(-1) for array in arrays]))
        if self.device.type != "cpu":
            whole = whole.pin_memory().to(self.device, non_blocking=True)
        parts = whole.split([array.size for array in arrays])
        return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]

    def _table(self, works: list[Work], width: int) -> np.ndarray:
        table = np.zeros((len(works), width), dtype=np.int64)
        for s, work in enumerate(works):
            table[s, : len(work.sequence.blocks)] = work.sequence.blocks
        return table

    def _mixed(self, works: list[Work]) -> tuple[Tensor | None, Tensor]:
        """Prompts in chunks and decoding sequences in one pack: logits [R, V] and the slots of the sequences that sample."""
        counts = np.array([work.last - work.first + len(work.draft) for work in works])
        bounds = np.concatenate([[0], counts.cumsum()])
        ids = np.concatenate([np.concatenate([work.sequence.ids(work.first, work.last), work.draft]) for work in works]).astype(np.int64)
        positions = np.concatenate([np.arange(work.first, work.first + n) for work, n in zip(works, counts, strict=True)])
        table = self._table(works, max(len(work.sequence.blocks) for work in works))
        slots = np.repeat(np.arange(len(works)), counts)
        slots = table[slots, positions // self.page] * self.page + positions % self.page
        lengths = np.array([work.first for work in works]) + counts
        needed = [np.arange(bounds[s + 1] - 1 - len(work.draft), bounds[s + 1]) for s, work in enumerate(works) if work.samples]
        needed_rows = np.concatenate(needed) if needed else np.empty(0, dtype=np.int64)
        unknown = np.flatnonzero(ids < 0)
        owners = np.searchsorted(bounds, unknown, side="right") - 1
        unknown_slots = np.array([works[s].sequence.slot for s in owners], dtype=np.int64)
        sampled_slots = np.array([work.sequence.slot for work in works if work.samples], dtype=np.int64)
        arrays = [ids, positions, table, slots, lengths, bounds, needed_rows, unknown, unknown_slots, sampled_slots]
        ids_T, positions_T, table_SB, slots_T, lengths_S, bounds_S, needed_R, unknown_U, from_U, into = self._upload(arrays)

        if len(unknown):
            ids_T = ids_T.index_put((unknown_U,), self.last_tokens[from_U])
        x_TD = self.model.language_model.embed_tokens.weight[ids_T].to(self.model.compute_dtype)
        for s, work in enumerate(works):
            for picture in work.sequence.prompt.pictures:
                first, last = max(picture.first, work.first), min(picture.first + picture.tokens, work.last)
                if first < last:
                    assert picture.rows is not None
                    row = int(bounds[s]) - work.first
                    x_TD[row + first : row + last] = picture.rows[first - picture.first : last - picture.first]
        cache = KVCache(self.k, self.v, table_SB.int(), slots_T, lengths_S.int())
        narrow = None if len(needed_rows) == len(ids) else needed_R
        hidden = self.model.language_model(x_TD, positions_T, bounds_S.int(), needed_R=narrow, cache=cache)
        return (self.model.logits(hidden) if len(needed_rows) else None), into

    def _decode(self, works: list[Work]) -> tuple[Tensor, Tensor, Tensor | None]:
        """One row for each of the sequences: a step that is recorded (captured, on a GPU) once for their number, and repeated.

        Logits [S, V], the sequences' slots, and the likeliest tokens where the step finds them itself.
        """
        count = len(works)
        size = next((size for size in sorted(self._steps) if size >= count), count) if self.graphs else count
        if size not in self._steps:
            if len(self._steps) >= RECORDED:
                del self._steps[next(iter(self._steps))]
            self._steps[size] = self.new_step(size)
        step = self._steps[size]
        position = np.array([work.first for work in works])
        table = self._table(works, max(len(work.sequence.blocks) for work in works))
        ids = np.array([work.sequence.ids(work.first, work.last)[0] for work in works])
        slots = np.array([work.sequence.slot for work in works])
        ids_S, positions_S, table_SB, slots_S = self._upload([ids, position, table, slots])
        if (ids < 0).any():
            ids_S = torch.where(ids_S < 0, self.last_tokens[slots_S], ids_S)
        logits = step(ids_S, positions_S, table_SB)[:count]
        return logits, slots_S, None if step.greedy is None else step.greedy[:count]


Op = tuple[str, torch.dtype, Any]  # its name, the dtype of its input, its shape class


def decode_ops(model: Llava, kv_dtype: torch.dtype) -> list[Op]:
    """Those of a decode step whose reference reads lengths and slots on the host."""
    dtype = model.compute_dtype
    return [("paged_attention", dtype, (model.config.decoder.head_dim, str(kv_dtype).removeprefix("torch."))), ("rope", dtype, None)]


def tower_ops(model: Llava) -> list[Op]:
    vision = model.config.vision
    return [("varlen_attention", model.compute_dtype, (vision.width // vision.heads, "full"))]


def capturable(what: str, *ops: Op) -> bool:
    """Whether none of these ops waits for the device, as references do."""
    waiting = [op for op, dtype, shape in ops if registry.resolve_name(op, "cuda", dtype, shape) == "reference"]
    if waiting:
        log.info("%s are not captured: %s would wait for the device", what, " and ".join(waiting))
    return not waiting


def check_invariant(model: Llava, kv_dtype: torch.dtype) -> None:
    """Raise ValueError where a step has a part whose results depend on how many rows there are."""
    dtype = model.compute_dtype
    quantised = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Quantised)]
    kinds = {*(weight.kind for weight in quantised), *(str(weight.dtype).removeprefix("torch.") for weight in model.parameters())}
    widths = {model.config.vision.width, model.config.decoder.width}
    plain = [(op, dtype, None) for op in ("activation", "patchify", "projector", "spatial_pool")]
    shaped = [*(("linear", dtype, kind) for kind in sorted(kinds)), *(("norm", dtype, width) for width in sorted(widths))]
    for op, taken, shape in [*plain, *shaped, ("sampling", torch.float32, None), *decode_ops(model, kv_dtype), *tower_ops(model)]:
        registry.resolve_name(op, model.device.type, taken, shape)
    for name, module in model.language_model.named_modules():
        if name.endswith("_proj") and (type(module) is not Linear or getattr(module, "lora", None) is not None):
            raise ValueError(f"deterministic=True: {name} has an adapter, whose products depend on the number of rows: merge it first")


def buckets(most: int) -> list[int]:
    """Numbers of sequences that get a captured step of their own: 1, 2, 4, then every eighth."""
    return sorted({size for size in (1, 2, 4, *range(8, most, 8), most) if size <= most})


def capture(run: Callable[[], T], pool: Any) -> tuple[torch.cuda.CUDAGraph, T]:
    """What `run` does as a CUDA graph in `pool`, and the tensors that a replay writes."""
    run()  # lazily made handles and buffers are made before
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        made = run()
    return graph, made


class TowerStep:
    """The tower over up to `views` uint8 views, captured: at few of them it is launches that cost."""

    def __init__(self, model: Llava, views: int):
        size = model.config.vision.image_size
        self.model = model
        self.views = torch.zeros(views, 3, size, size, dtype=torch.uint8, device=model.device)

    def capture(self, pool: Any) -> Any:
        self.graph, self.features = capture(lambda: self.model.features(self.views), pool)
        return self.graph.pool()

    def __call__(self, views: Tensor) -> Tensor:
        """Features [N, P, E], overwritten by the next call."""
        self.views[: views.shape[0]] = views
        self.graph.replay()
        return self.features[: views.shape[0]]


class DecodeStep:
    """A step of `size` sequences, one row each, over memory that stays where it is. On the CPU its launches are recorded and repeated, on
    a GPU it can be captured; fewer sequences fill up with rows that are written nowhere and look at the spare block.

    width: blocks of a row of the table."""

    def __init__(self, model: Llava, k: Tensor, v: Tensor, size: int, width: int):
        device = model.device
        self.model, self.size, self.page, self.spare = model, size, k.shape[2], k.shape[1] - 1
        dtype = model.compute_dtype
        self.x_SD = torch.zeros(size, model.config.decoder.width, dtype=dtype, device=device)
        self.tables = model.language_model.tables(torch.zeros(size, dtype=torch.int64, device=device), dtype)
        table = torch.full((size, width), self.spare, dtype=torch.int32, device=device)
        slots = torch.full((size,), -1, dtype=torch.int64, device=device)
        lengths = torch.ones(size, dtype=torch.int32, device=device)
        self.cache = KVCache(k, v, table, slots, lengths)
        self.cu_seqlens = torch.arange(size + 1, dtype=torch.int32, device=device)
        self.repeat: Callable[[], Tensor] | None = None
        self.greedy: Tensor | None = None  # [size], the likeliest tokens, where the step is captured

    def _run(self) -> Tensor:
        model = self.model
        return model.logits(model.language_model.run(self.x_SD, self.tables, self.cu_seqlens, cache=self.cache))

    def capture(self, pool: Any) -> Any:
        """Record the step and the choice of greedy tokens as a CUDA graph in `pool`; returns the pool."""

        def run() -> tuple[Tensor, Tensor]:
            logits = self._run()
            return logits, argmax(logits)

        graph, (logits, self.greedy) = capture(run, pool)

        def repeat() -> Tensor:
            graph.replay()
            return logits

        self.repeat = repeat
        return graph.pool()

    def __call__(self, ids_S: Tensor, positions_S: Tensor, table_SB: Tensor) -> Tensor:
        """Logits [size, V], overwritten by the next call."""
        model, cache, count, blocks = self.model, self.cache, ids_S.shape[0], table_SB.shape[1]
        self.x_SD[:count] = model.language_model.embed_tokens.weight[ids_S]
        for table, values in zip(self.tables, model.language_model.tables(positions_S, self.x_SD.dtype), strict=True):
            table[:count] = values
        cache.block_table[:count, :blocks] = table_SB
        block = table_SB.gather(1, (positions_S // self.page)[:, None])[:, 0]
        cache.slots[:count] = block * self.page + positions_S % self.page
        cache.lengths[:count] = positions_S + 1
        if count < self.size:
            cache.slots[count:] = -1
            cache.lengths[count:] = 1
            cache.block_table[count:, 0] = self.spare
        if self.repeat is None:
            if model.device.type != "cpu":
                return self._run()
            self.repeat = replay = Replay(self._run)
            return replay.result
        return self.repeat()
