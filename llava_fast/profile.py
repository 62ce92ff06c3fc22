"""Where the time goes: each op of a prefill, a decode step and a training step, its share and how far it is from its own limit.

`llava-fast bench profile -m MODEL`. Every op that dispatches is timed alone, between two looks at the clock (on a GPU between two
synchronisations, so that what overlaps in truth is added up here: shares mean more than sums). An op's limit is the larger of two times:
its bytes at the bandwidth of the machine (products and attention read them, what else there is copies), which those that are in a cache
pass, and its operations at the machine's rate: of fp32 multiply-adds, of tile products where a CPU has them and the op multiplies by
weights (as if all its products were with them: a weight's own gradient takes more), on a GPU of bf16 products.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from llava_fast.batch import IGNORE, PackedBatch, Sample, Visual, pack, splice
from llava_fast.engine.runner import Runner
from llava_fast.kernels import registry
from llava_fast.kernels.linear import Quantised
from llava_fast.limits import Limits
from llava_fast.memory import kept_memory
from llava_fast.models.llava import Llava
from llava_fast.training.batches import Row
from llava_fast.training.config import TrainConfig
from llava_fast.training.step import LabelLoss, make_optimizer, prepare_parameters, train_step

PAGE = 64


@dataclass(frozen=True)
class OpTime:
    """One op in a phase, all its calls together. moved: bytes.  limit: seconds that they take at the machine's limits, 0 where nothing is
    known of the op; bound: by which of them."""

    name: str
    calls: int
    seconds: float
    moved: float
    operations: float
    limit: float
    bound: str

    @property
    def of_limit(self) -> float:
        return self.limit / self.seconds


@dataclass(frozen=True)
class Phase:
    """ops: the longest first.  seconds: of the phase as it runs, nothing timed inside."""

    name: str
    seconds: float
    ops: tuple[OpTime, ...]

    @property
    def between(self) -> float:
        """Seconds in no op: Python and the dispatcher; negative where ops alone take longer than in the whole."""
        return self.seconds - sum(op.seconds for op in self.ops)


class Clock(TorchDispatchMode):
    """Inside, the seconds, bytes and operations of every op that this thread dispatches, by name."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        self.calls: dict[str, list[tuple[float, float, float, torch.dtype | None]]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.wait()
        start = time.perf_counter()
        out = func(*args, **(kwargs or {}))
        self.wait()
        seconds = time.perf_counter() - start
        name = func.overloadpacket.__name__
        weight = args[_WEIGHTS[name]].dtype if name in _WEIGHTS else None
        self.calls.setdefault(name, []).append((seconds, *work(func, args, kwargs or {}, out), weight))
        return out


def work(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> tuple[float, float]:
    """(bytes that a call has to read and write, its operations): what it is given and what it makes, once each, and twice what it changes
    in place. Views move nothing, lookups and pages what is looked at."""
    name = func.overloadpacket.__name__
    given = {(t.data_ptr(), t.nbytes) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
    made = {(t.data_ptr(), t.nbytes) for t in tree_leaves(out) if isinstance(t, Tensor)}
    storages = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
    new = [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in storages]
    if name.startswith(("empty", "new_empty")) or (not new and not func._schema.is_mutable):
        return 0.0, 0.0
    if name in ("embedding", "index", "index_select", "gather"):
        return 2.0 * sum(size for _, size in made), 0.0
    if name == "paged_attention":
        return _paged(args)
    changed = {
        (t.data_ptr(), t.nbytes)
        for argument, value in zip(func._schema.arguments, args, strict=False)
        if argument.alias_info is not None and argument.alias_info.is_write
        for t in tree_leaves(value)
        if isinstance(t, Tensor)
    }
    moved = float(sum(size for _, size in given | made) + sum(size for _, size in changed))
    if name in _OPERATIONS:
        return moved, _OPERATIONS[name](args, out)
    known = flop_registry.get(func.overloadpacket)
    return moved, float(known(*args, **kwargs, out_val=out)) if known is not None else 0.0


def _pairs(cu_q: Tensor, cu_k: Tensor, causal: bool, prefix: Tensor | None) -> int:
    """(query, key) pairs that attention has to look at; q_index and seqused_k, which leave some out, are not counted."""
    q, k = cu_q.diff().long(), cu_k.diff().long()
    own = q * k - (q * (q - 1) // 2 if causal else 0)
    if prefix is not None:
        own = own + q * (prefix[:, 1] - prefix[:, 0]).long()
    return int(own.sum())


def _attention(args: tuple[Any, ...], out: Any) -> float:
    q, _, _, cu_q, cu_k, causal, q_index, _, prefix = args[:9]
    share = 1.0 if q_index is None else q.shape[0] / max(int(cu_q[-1]), 1)  # of the rows; their keys are taken as the mean
    return 4.0 * q.shape[1] * q.shape[2] * _pairs(cu_q, cu_k, causal, prefix) * share


def _attention_backward(args: tuple[Any, ...], out: Any) -> float:
    return 2.0 * _attention(args[1:4] + args[6:], out)


def _paged(args: tuple[Any, ...]) -> tuple[float, float]:
    q, k_cache, _, _, _, seqlens_k = args[:6]
    keys = int(seqlens_k.sum())
    return 2.0 * q.nbytes + 2.0 * keys * k_cache[0, 0].nbytes, 4.0 * q.shape[1] * q.shape[2] * keys


def _linear(args: tuple[Any, ...], out: Any) -> float:
    return 2.0 * (args[0].numel() // args[0].shape[-1]) * args[0].shape[-1] * args[1].shape[0]


def _cross_entropy(args: tuple[Any, ...], out: Any) -> float:
    hidden, weight = args[:2]
    gradients = sum(bool(need) for need in args[6:8]) if len(args) == 9 else 0
    return 2.0 * hidden.shape[0] * weight.shape[0] * weight.shape[1] * (1 + gradients)


def _project(args: tuple[Any, ...], out: Any) -> float:
    features, w1, _, w2 = args[:4]
    return 2.0 * (features.shape[0] * w1.numel() + (0 if w2 is None else features.shape[0] * w2.numel()))


def _project_backward(args: tuple[Any, ...], out: Any) -> float:
    features, w1, w2, needs = args[1], args[2], args[3], args[14]
    first = features.shape[0] * w1.numel() * (needs[0] + needs[1])
    return 2.0 * (first + (0 if w2 is None else features.shape[0] * w2.numel() * (1 + needs[3])))


_OPERATIONS: dict[str, Callable[[tuple[Any, ...], Any], float]] = {
    "linear": _linear,
    "linear_into": lambda args, out: _linear(args[1:], out),
    "linear_gradient": lambda args, out: 2.0 * args[0].numel() * args[1].shape[1],
    "varlen_attention": _attention,
    "varlen_attention_backward": _attention_backward,
    "linear_cross_entropy": _cross_entropy,
    "linear_cross_entropy_total": _cross_entropy,
    "project": _project,
    "project_backward": _project_backward,
}

# Those that multiply by weights, on tiles where there are any: which argument has their dtype.
_WEIGHTS = {
    "linear": 1,
    "linear_into": 2,
    "linear_gradient": 1,
    "linear_cross_entropy": 1,
    "linear_cross_entropy_total": 1,
    "project": 1,
    "project_backward": 2,
}


def clock(name: str, run: Callable[[], object], device: torch.device, limits: Limits) -> Phase:
    """`run` once to warm up, thrice as it is (the fastest counts), once with every op timed."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    run()
    whole = []
    for _ in range(3):
        wait()
        start = time.perf_counter()
        run()
        wait()
        whole.append(time.perf_counter() - start)
    with registry.visible(), Clock(device) as timed:
        run()
    plain = limits.fma_fp32_gflops or limits.gemm_bf16_gflops
    ops = []
    for op, calls in timed.calls.items():
        seconds, moved, operations = (sum(call[i] for call in calls) for i in range(3))
        bandwidth = (limits.read_gbs if operations else limits.copy_gbs) * 1e9
        times = [
            (bytes_moved / bandwidth, work_done / (plain if weight is None else limits.products_gflops(weight)) / 1e9)
            for _, bytes_moved, work_done, weight in calls
        ]
        by = {"memory": sum(memory for memory, _ in times), "arithmetic": sum(arithmetic for _, arithmetic in times)}
        limit = sum(max(both) for both in times)
        ops.append(
            OpTime(op, len(calls), seconds, moved, operations, limit, max(by, key=lambda what: by[what]) if moved or operations else "")
        )
    return Phase(name, min(whole), tuple(sorted(ops, key=lambda op: -op.seconds)))


# --- the steps --------------------------------------------------------------------------------------------------------------------


def row_of(model: Llava, tokens: int, views: int, labels: int = 0) -> PackedBatch:
    """A conversation of `tokens` rows, the first of them pictures as they are; the last `labels` are supervised."""
    config = model.config
    text = tokens - views * config.patches
    if text < max(labels, 1):
        raise ValueError(f"{views} pictures take {views * config.patches} of {tokens} tokens: nothing is left for a question")
    rng = np.random.default_rng(0)
    words = rng.integers(0, min(1000, config.decoder.vocab_size), text)
    words[words == config.image_token_id] = 0
    ids = np.concatenate([np.full(views, config.image_token_id), words])
    wanted = np.where(np.arange(len(ids)) >= len(ids) - labels, ids, IGNORE)
    sample = splice(ids, [Visual(1, config.patches, np.arange(config.patches))] * views, config.image_token_id, wanted)
    size = config.vision.image_size
    pixels = torch.zeros(views, 3, size, size, dtype=torch.uint8) if views else None
    return pack([Sample(sample.token_ids, sample.visuals, sample.starts, sample.labels)], pixels, None, "labels" if labels else "last")


def profile(model: Llava, limits: Limits, tokens: int = 1500, training_tokens: int | None = None) -> list[Phase]:
    """The tower on one picture, a prefill of `tokens` text tokens, a decode step after them, and, with training_tokens, a step on a row
    with a picture in a thousand tokens (tower frozen, AdamW), which changes the model. Raises ValueError for too many tokens."""
    device, c = model.device, model.config.decoder
    if tokens + 1 > c.max_positions:
        raise ValueError(f"{tokens} tokens and an answer are more than the context's {c.max_positions}")
    if training_tokens is not None and isinstance(model.head_weight, Quantised):
        raise ValueError("a quantised model is not trained: profile it without a training step")
    model.eval()
    pixels = torch.zeros(1, 3, *[model.config.vision.image_size] * 2, dtype=torch.uint8, device=device)
    batch = row_of(model, tokens, 0).to(device)
    blocks = tokens // PAGE + 1
    runner = Runner(model, blocks, PAGE, model.compute_dtype, 1)
    step = runner.new_step(1)
    token, position = torch.tensor([7], device=device), torch.tensor([tokens], device=device)
    table = torch.arange(blocks, device=device)[None]
    with torch.inference_mode():
        for buffer in (runner.k, runner.v):
            buffer.fill_(0.1)
        phases = [
            clock("tower, one picture", lambda: model.features(pixels), device, limits),
            clock(f"prefill, {tokens:,} tokens", lambda: model.logits(model.hidden(batch)), device, limits),
        ]
        step(token, position, table)  # of the phase, what is repeated: its launches, where they are recorded
        phases.append(_decode(step, (token, position, table), tokens, device, limits))
    runner.close()
    if training_tokens is not None:
        phases.append(_training(model, training_tokens, device, limits))
    return phases


def _decode(step: Any, inputs: Sequence[Tensor], tokens: int, device: torch.device, limits: Limits) -> Phase:
    whole = clock(f"decode after {tokens:,} tokens", lambda: step(*inputs), device, limits)
    by_op = clock("", step._run, device, limits)  # what the recorded launches were made from
    return Phase(whole.name, whole.seconds, by_op.ops)


def _training(model: Llava, tokens: int, device: torch.device, limits: Limits) -> Phase:
    views = min(-(-tokens // 1000), (tokens - 1) // model.config.patches)
    config = TrainConfig("m", ("a.json",), "out", lr=1e-9, lr_vision_tower="frozen", weight_decay=0.0)
    trained = prepare_parameters(model.train(), config, "fp32" if device.type == "cpu" else "bf16")
    optimizer = make_optimizer(trained.masters, config)
    packed = Row(row_of(model, tokens, views, max(1, tokens // 27)).to(device), (0,), (0, 1))

    def run() -> None:
        train_step(model, trained, optimizer, [packed], 1.0, config.clip, device.type, LabelLoss())

    with kept_memory() if device.type == "cpu" else nullcontext():  # as fit does
        return clock(f"training, {tokens:,} tokens", run, device, limits)


# --- the picture ------------------------------------------------------------------------------------------------------------------


def draw(phases: Sequence[Phase], target: Path) -> None:
    """A panel a phase: an op a bar, as long as its time; in it, blue, what it would take at its limit."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    grey = "#808080"
    figure, axes = pyplot.subplots(len(phases), 1, figsize=(9, 2.4 * len(phases)), layout="constrained", squeeze=False)
    for axis, phase in zip(axes[:, 0], phases, strict=True):
        shown = [op for op in phase.ops if op.seconds >= 0.01 * phase.seconds][:8]
        names = [op.name for op in shown] + ["between ops"]
        axis.barh(names, [op.seconds * 1e3 for op in shown] + [max(phase.between, 0) * 1e3], color="#d9822b", alpha=0.45)
        axis.barh(names, [op.limit * 1e3 for op in shown] + [0], height=0.35, color="#3b82c4")
        for y, op in enumerate(shown):
            axis.text(max(op.seconds, op.limit) * 1e3, y, f" {op.of_limit:.0%}" if op.limit else "", va="center", color=grey, fontsize=8)
        axis.invert_yaxis()
        axis.set_title(f"{phase.name}: {phase.seconds * 1e3:,.1f} ms (blue: at its limit)", loc="left", color=grey, fontsize=10)
        axis.set_xlabel("ms", color=grey)
        axis.tick_params(colors=grey, labelsize=8)
        for spine in axis.spines.values():
            spine.set_color(grey)
    figure.savefig(target, dpi=110, transparent=True, metadata={"Software": None})
    pyplot.close(figure)
