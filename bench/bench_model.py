"""The parts of an answer on the 0.5b architecture: the tower over its batch, a prefill over its length, a token over context and batch.

Against transformers (eager, SDPA, bf16 where the CPU multiplies it, a static cache compiled, int8) and OpenVINO where it is installed.
A ratio is against the fastest of transformers' sides that give the same answer to 1e-4; `sides` has the others' times, `errors` how far
each is off, and `void` those that are further off than their dtype explains, which are not timed. The limit of the tower and of the
prefill is the rate of fp32 multiply-adds (ours makes fp32 products of bf16 weights on AMX, and can pass it); that of a token is the
bandwidth at which memory is read: every weight of the decoder and the head once, and the keys and values of the context.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.baselines import inference, openvino
from bench.full_size import relative_error
from bench.paired import OURS
from bench.sides import SAME, SDPA, Call, Sides, compare
from llava_fast import load
from llava_fast.engine.runner import Runner
from llava_fast.engine.stats import weight_bytes
from llava_fast.kernels import registry
from llava_fast.models.decoder import KVCache
from llava_fast.models.llava import Llava

CONTEXT, PAGE = 1500, 64
BF16, STATIC = "transformers bf16", "transformers static cache"
SECONDS = 5.0  # of a race; one that takes longer has two rounds


@pytest.fixture
def race(paired: Any, limits: Any) -> Callable[..., None]:
    """race(sides, operations=... | bytes_read=..., names=...): answers compared with transformers', then `paired`, within SECONDS or two
    rounds. own_bound: what ours may be off. any_answer: narrower sides count for the ratio. Further keywords are `paired`'s."""

    def run(sides: Sides, *, own_bound: float = SAME, any_answer: bool = False, **named: Any) -> None:
        calls, errors, void = compare(sides, own_bound)
        ours = calls.pop(OURS)
        named |= {"errors": errors, **({"void": void} if void else {})}
        among = [name for name in calls if any_answer or name in sides.same]
        limit = limits("cpu").fma_fp32_gflops * 1e9
        paired(ours, calls, among=among, limit=limit, rounds=2, budget=SECONDS, warm=True, **named)

    return run


@pytest.fixture(scope="module")
def theirs(full_size: Path) -> Any:
    return inference.load(full_size)


@pytest.fixture(scope="module")
def theirs_bf16(full_size: Path) -> Any:
    """None where the CPU does not multiply bf16."""
    return inference.load(full_size, torch.bfloat16) if inference.has_bf16_units() else None


@pytest.fixture(scope="module")
def ours(full_size: Path) -> Llava:
    return load(full_size, device="cpu")


@pytest.fixture(scope="module")
def openvino_tower(theirs: Any) -> Any:
    """None without OpenVINO."""
    return openvino.tower_graph(theirs) if openvino.available() else None


@pytest.fixture(scope="module")
def openvino_decoders(theirs: Any) -> Any:
    """decoder('f32' | 'bf16'): a session, the last one alone kept; None without OpenVINO."""
    known: dict[str, Any] = {}

    def of(precision: str) -> Any:
        if not openvino.available():
            return None
        if "graph" not in known:
            known["graph"] = openvino.decoder_graph(theirs)
        if precision not in known:
            known[precision] = openvino.Session(theirs, known["graph"], precision)
        return known[precision]

    return of


def embeds(rows: int) -> Tensor:
    return torch.randn(rows, 1024, generator=torch.Generator().manual_seed(0))


def bf16_bound(layers: int) -> float:
    """Half a unit of bf16, 2^-9, for each of the two sums of a layer, as if they all pointed one way."""
    return layers * 2**-8


def decoder_operations(model: Llava, rows: int) -> float:
    """Multiply-adds count two: the layers' products for all rows, those of the last layer but k and v and the head for one row, and causal
    attention."""
    c = model.config.decoder
    qkv, rest = (c.heads + 2 * c.kv_heads) * c.head_dim * c.width, c.heads * c.head_dim * c.width + 3 * c.mlp_width * c.width
    last = 2 * c.kv_heads * c.head_dim * c.width
    products = (c.layers - 1) * (qkv + rest) * rows + last * rows + c.vocab_size * c.width
    return 2.0 * products + 2.0 * (c.layers - 1) * c.heads * c.head_dim * rows * rows


def tower_operations(model: Llava, views: int) -> float:
    v = model.config.vision
    patches = v.grid**2
    layer = 4 * v.width**2 + 2 * v.width * v.mlp_width
    products = patches * (model.config.executed_layers * layer + 3 * v.patch_size**2 * v.width)
    return views * (2.0 * products + 4.0 * model.config.executed_layers * patches**2 * v.width)


# --- the tower: eager attention and OpenVINO at one view, for they take what SDPA takes and more at each


@pytest.mark.parametrize("views", [1, 4, *(pytest.param(n, marks=pytest.mark.long) for n in (2, 8))])
@torch.inference_mode()
def test_vision_tower(views: int, ours: Llava, theirs: Any, theirs_bf16: Any, openvino_tower: Any, race: Any) -> None:
    pixels = torch.rand(views, 3, 384, 384, generator=torch.Generator().manual_seed(1)) * 2 - 1
    sides = Sides({OURS: lambda: ours.features(pixels), SDPA: lambda: inference.tower(theirs, pixels)})
    bound = bf16_bound(ours.config.executed_layers)
    if theirs_bf16 is not None:
        sides.others[BF16] = lambda: inference.tower(theirs_bf16, pixels), bound
    if views == 1:
        eager = inference.with_attention(theirs, "eager")
        sides.same["transformers eager"] = lambda: inference.tower(eager, pixels)
        if openvino_tower is not None:
            exact = openvino.tower(openvino_tower, "f32")
            sides.others["OpenVINO"] = (lambda: exact(pixels)), SAME
    if openvino_tower is not None and inference.has_bf16_units():
        narrow = openvino.tower(openvino_tower, "bf16")
        sides.others["OpenVINO bf16"] = (lambda: narrow(pixels)), bound
    race(sides, operations=tower_operations(ours, views), names={f"test_vision_tower[{views}]": ("views", views)})


# --- a prompt


@pytest.mark.parametrize("rows", [256, CONTEXT, pytest.param(3000, marks=pytest.mark.long)])
@torch.inference_mode()
def test_prefill(rows: int, ours: Llava, theirs: Any, theirs_bf16: Any, openvino_decoders: Any, race: Any) -> None:
    x = embeds(rows)
    positions, bounds, last = torch.arange(rows), torch.tensor([0, rows], dtype=torch.int32), torch.tensor([rows - 1])
    runner = Runner(ours, blocks_for(rows), PAGE, torch.float32, 1)
    table = torch.arange(blocks_for(rows), dtype=torch.int32)[None]
    cache = KVCache(runner.k, runner.v, table, positions, bounds[1:])

    def prefill() -> Tensor:
        return ours.logits(ours.language_model(x, positions, bounds, needed_R=last, cache=cache))

    sides = Sides({OURS: prefill, SDPA: lambda: inference.prefill(theirs, x)})
    bound = bf16_bound(ours.config.decoder.layers)
    if theirs_bf16 is not None:
        sides.others[BF16] = (lambda: inference.prefill(theirs_bf16, x)), bound
    if rows == 256:
        eager = inference.with_attention(theirs, "eager")
        sides.same["transformers eager"] = lambda: inference.prefill(eager, x)
    if (exact := openvino_decoders("f32")) is not None and rows <= CONTEXT:
        sides.others["OpenVINO"] = (lambda: exact.prefill(x)), SAME
    if exact is not None and inference.has_bf16_units():
        narrow = openvino_decoders("bf16")
        sides.others["OpenVINO bf16"] = (lambda: narrow.prefill(x)), bound
    names = {f"test_prefill_rows[{rows}]": ("rows", rows)} | ({"test_prefill": None} if rows == CONTEXT else {})
    race(sides, operations=decoder_operations(ours, rows), names=names)


# --- a token


def blocks_for(rows: int) -> int:
    return rows // PAGE + 1


def filled_runner(model: Llava, batch: int, context: int, dtype: torch.dtype) -> Runner:
    """With a cache that holds something, the same in each layer."""
    runner = Runner(model, batch * blocks_for(context), PAGE, dtype, batch)
    generator = torch.Generator().manual_seed(2)
    for buffer in (runner.k, runner.v):
        buffer.copy_(torch.randn(buffer.shape[1:], generator=generator))
    return runner


def past_of(runner: Runner, batch: int, context: int) -> tuple[list[Tensor], list[Tensor]]:
    """Of each layer [B, G, K, d], fp32: the layers are alike, and share one tensor."""
    keys, values = (
        buffer[0, : batch * blocks_for(context)].unflatten(0, (batch, -1)).flatten(1, 2)[:, :context].float().transpose(1, 2).contiguous()
        for buffer in (runner.k, runner.v)
    )
    return [keys] * len(runner.k), [values] * len(runner.k)


def our_step(runner: Runner, batch: int, context: int) -> tuple[Tensor, Call]:
    """The tokens, and a step."""
    tokens, positions = torch.arange(7, 7 + batch), torch.full((batch,), context)
    table = torch.arange(batch * blocks_for(context)).view(batch, -1)
    recorded = runner.new_step(batch)
    return tokens, lambda: recorded(tokens, positions, table)


def bytes_of(runner: Runner, batch: int, context: int) -> float:
    return weight_bytes(runner.model) + 2 * batch * context * runner.k[:, 0, 0].nbytes


LONG = [pytest.param(*point, marks=pytest.mark.long) for point in ((2, CONTEXT), (8, CONTEXT), (1, 4000))]


@pytest.mark.parametrize(("batch", "context"), [(1, CONTEXT), (1, 256), (4, CONTEXT), *LONG])
@torch.inference_mode()
def test_decode_at(batch: int, context: int, ours: Llava, theirs: Any, theirs_bf16: Any, openvino_decoders: Any, race: Any) -> None:
    """bf16 weights, fp32 keys and values, the fp32 answer."""
    runner = filled_runner(ours, batch, context, torch.float32)
    token, step = our_step(runner, batch, context)
    keys, values = past_of(runner, batch, context)
    static = inference.static_decoding(theirs, keys, values, token, compile=False)
    sides = Sides({OURS: step, SDPA: inference.decoding(theirs, keys, values, token), STATIC: static})
    bound = bf16_bound(ours.config.decoder.layers)
    if theirs_bf16 is not None:
        sides.others[BF16] = inference.decoding(theirs_bf16, keys, values, token), bound
    names: dict[str, tuple[str, float] | None] = {}
    if batch == 1:
        names[f"test_decode_context[{context}]"] = "context", context
    if context == CONTEXT:
        names[f"test_decode_batch[{batch}]"] = "batch", batch
    if len(names) == 2:
        names["test_decode[bf16]"] = None
        sides.same["transformers eager"] = inference.decoding(inference.with_attention(theirs, "eager"), keys, values, token)
    if (exact := openvino_decoders("f32")) is not None:
        sides.others["OpenVINO"] = exact.decoding(keys, values, token), SAME
        if inference.has_bf16_units():
            sides.others["OpenVINO bf16"] = openvino_decoders("bf16").decoding(keys, values, token), bound
    race(sides, bytes_read=bytes_of(runner, batch, context), names=names, batch=batch, context=context)


@pytest.mark.long
@torch.inference_mode()
def test_decode_compiled(ours: Llava, theirs: Any, race: Any) -> None:
    """A static cache and torch.compile by hand, which take a minute or more to compile."""
    runner = filled_runner(ours, 1, CONTEXT, torch.float32)
    token, step = our_step(runner, 1, CONTEXT)
    keys, values = past_of(runner, 1, CONTEXT)
    compiled = inference.static_decoding(inference.sharing(theirs), keys, values, token)
    took = inference.compiling(compiled)
    sides = Sides({OURS: step, SDPA: inference.decoding(theirs, keys, values, token), "transformers static cache, compiled": compiled})
    race(sides, bytes_read=bytes_of(runner, 1, CONTEXT), compile_s=took)


@pytest.mark.parametrize("weights", ["int8", "int4"])
@torch.inference_mode()
def test_decode(weights: str, full_size: Path, theirs: Any, race: Any) -> None:
    """One token at a context of 1,500 with narrower weights and bf16 keys and values. Ours gives what torch gives for the same numbers
    widened; the baseline is the fastest of transformers in fp32 and of the narrower sides, which may be off by twice what ours is, and
    2^-7 a layer for int8 activations."""
    model = load(full_size, device="cpu", quantise=weights)
    runner = filled_runner(model, 1, CONTEXT, torch.bfloat16)
    token, step = our_step(runner, 1, CONTEXT)
    with registry.use(linear="reference"):
        widened = our_step(runner, 1, CONTEXT)[1]()
    assert relative_error(step(), widened) < SAME
    keys, values = past_of(runner, 1, CONTEXT)
    reference = inference.decoding(theirs, keys, values, token)
    static = inference.static_decoding(theirs, keys, values, token, compile=False)
    off = relative_error(widened, reference())
    bound = 2 * off + model.config.decoder.layers * 2**-7

    quantised: dict[str, tuple[Call, float]] = {}
    if weights == "int8":
        quantised["torch dynamic int8"] = inference.decoding(inference.dynamic_int8(theirs), keys, values, token), bound
    if openvino.available(compressed=True):
        precision = "bf16" if inference.has_bf16_units() else "f32"
        session = openvino.Session(theirs, openvino.decoder_graph(theirs, weights), precision)
        quantised[f"OpenVINO {weights}"] = session.decoding(keys, values, token), bound
    sides = Sides({SDPA: reference, STATIC: static, OURS: step}, quantised)
    race(sides, bytes_read=bytes_of(runner, 1, CONTEXT), own_bound=1.1 * off, any_answer=True)
