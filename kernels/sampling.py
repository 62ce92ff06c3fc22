"""The next token of each row of logits: penalties, temperature, top-k, top-p, min-p, and one draw, without a host sync.

Order and kept sets are those of transformers' processors (see engine/sampling.py `warp`):

    repetition   z > 0: z / r, z < 0: z r, where the token was seen; then z -= frequency * count + presence * (count > 0)
    temperature  z / t; t = 0 takes the largest logit, the first of equal ones, and nothing below applies
    top-k        keeps z >= the k-th largest (ties stay)
    top-p        drops, from the least likely up, while their summed probability is <= 1 - p; of equal ones the first; never all
    min-p        keeps probabilities of at least m times the largest

The draw is the argmax of z - log E, E = -log(1 - u) exponential (the Gumbel-max trick), so that one pass over the row does. u comes
from Philox 4x32-10 (Salmon et al., SC11) keyed by the row's seed, at counter (token / 4, 0, step), output token % 4: a row's draw
depends on its logits, its parameters, seed and step, and on nothing else in the batch.

`cpu` draws with the same words and the same order of roundings. Its top-k, ties and argmax are exactly the reference's. Where it may
differ: log E is the nearest float to the logarithm of a float there, which torch's log is to within a last place (so a draw may
differ where the two best scores are some 4e-6 apart); top-p sums float exp(z - max) in double and compares with (1 - p) times their
sum, min-p compares z - max with log m, where the reference rounds each probability to fp32 (so a token may differ whose summed
probability, or whose ratio, is within some 1e-6 of the border, relatively). A row with a NaN gives the place of its first NaN, one
without a finite logit 0, in both.

Shape letters: S rows, V vocabulary. fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from llava_fast.kernels import _native, registry
from llava_fast.kernels._sampling_triton import sample_triton, shipped_calls  # noqa: F401 (shipped_calls: what is compiled ahead)
from llava_fast.kernels._triton import DEVICES
from llava_fast.kernels.registry import Implementation

LARGEST_UNIFORM = 1 - 2**-24


def _mul(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low word of the product of 32-bit words, which are kept in int64; the product wraps, the words come out right."""
    product = a * b
    return (product >> 32) & 0xFFFFFFFF, product & 0xFFFFFFFF


def philox(seeds_S: Tensor, steps_S: Tensor, count: int) -> Tensor:
    """Words [S, count], 32-bit in int64: Philox 4x32-10 at counters (i, 0, step low, step high), outputs 0 to 3 side by side."""
    k0, k1 = (seeds_S & 0xFFFFFFFF)[:, None], ((seeds_S >> 32) & 0xFFFFFFFF)[:, None]
    c0 = torch.arange(-(-count // 4), device=seeds_S.device)[None].expand(seeds_S.shape[0], -1)
    c1 = torch.zeros_like(c0)
    c2, c3 = ((steps_S & 0xFFFFFFFF)[:, None].expand_as(c0), ((steps_S >> 32) & 0xFFFFFFFF)[:, None].expand_as(c0))
    for _ in range(10):
        high0, low0 = _mul(c0, 0xD2511F53)
        high2, low2 = _mul(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return torch.stack([c0, c1, c2, c3], dim=-1).flatten(1)[:, :count]


def log_exponential(words: Tensor) -> Tensor:
    """log E of 32-bit words, fp32. Small E, which win, keep 31 bits: near 0 a series stands in for log(1 - u)."""
    u = ((words >> 1).float() + 0.5) * 2**-31
    series = u * (1 + u * (0.5 + u * (1 / 3 + u * 0.25)))
    return torch.where(u < 0.01, series, -(1 - u.clamp(max=LARGEST_UNIFORM)).log()).log()


def penalised(
    logits_SV: Tensor, repetition: Tensor | None, presence: Tensor | None, frequency: Tensor | None, counts_SV: Tensor | None
) -> Tensor:
    if counts_SV is None:
        return logits_SV
    seen = counts_SV > 0
    if repetition is not None:
        r = repetition[:, None]
        logits_SV = torch.where(seen, torch.where(logits_SV < 0, logits_SV * r, logits_SV / r), logits_SV)
    if presence is not None:
        logits_SV = logits_SV - presence[:, None] * seen
    if frequency is not None:
        logits_SV = logits_SV - frequency[:, None] * counts_SV
    return logits_SV


def kept(z_SV: Tensor, top_k: Tensor | None, top_p: Tensor | None, min_p: Tensor | None) -> Tensor:
    """z [S, V] with -inf for what top-k, then top-p, then min-p leave out."""
    V = z_SV.shape[1]
    if top_k is not None:
        smallest = z_SV.sort(-1, descending=True).values.gather(1, (top_k.long() - 1).clamp(0, V - 1)[:, None])
        z_SV = z_SV.masked_fill((z_SV < smallest) & ((top_k > 0) & (top_k < V))[:, None], -torch.inf)
    if top_p is not None:
        ascending, order = z_SV.sort(dim=-1, stable=True)
        out = (ascending.softmax(-1).cumsum(-1) <= (1 - top_p).float()[:, None]) & (top_p < 1)[:, None]
        out[:, -1] = False
        z_SV = z_SV.masked_fill(torch.empty_like(out).scatter_(1, order, out), -torch.inf)
    if min_p is not None:
        probabilities = z_SV.softmax(-1)
        z_SV = z_SV.masked_fill(probabilities < min_p.float()[:, None] * probabilities.amax(-1, keepdim=True), -torch.inf)
    return z_SV


def sample_reference(
    logits_SV: Tensor,
    temperature: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    seeds: Tensor,
    steps: Tensor,
    repetition_penalty: Tensor | None,
    presence_penalty: Tensor | None,
    frequency_penalty: Tensor | None,
    counts: Tensor | None,
) -> Tensor:
    """By sorting; any device."""
    z_SV = penalised(logits_SV.float(), repetition_penalty, presence_penalty, frequency_penalty, counts)
    greedy = temperature <= 0
    warped = kept(z_SV / torch.where(greedy, 1.0, temperature)[:, None], top_k, top_p, min_p)
    score = warped - log_exponential(philox(seeds, steps, z_SV.shape[1]))
    return torch.where(greedy, z_SV.argmax(-1), score.argmax(-1))


def _rows_of(matrix: Tensor) -> tuple[Tensor, int]:
    """A matrix of contiguous rows, and the elements from one to the next."""
    matrix = matrix if matrix.stride(1) == 1 else matrix.contiguous()
    return matrix, matrix.stride(0)


def sample_cpu(
    logits_SV: Tensor,
    temperature: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    seeds: Tensor,
    steps: Tensor,
    repetition: Tensor | None,
    presence: Tensor | None,
    frequency: Tensor | None,
    counts: Tensor | None,
    kept: Tensor | None = None,
) -> Tensor:
    """kept [S, V], for tests: of rows that filter, the logits that are drawn from, -inf for the rest."""
    logits_SV, stride = _rows_of(logits_SV)
    counts = None if counts is None else counts.contiguous()
    tokens = torch.empty_like(seeds)
    address = _native.address
    _native.cpu().sampling(
        *logits_SV.shape, stride, address(logits_SV), address(temperature), address(seeds), address(steps),
        address(top_k), top_k is not None and top_k.dtype == torch.int32,
        address(top_p), _native.element(torch.float32 if top_p is None else top_p.dtype),
        address(min_p), _native.element(torch.float32 if min_p is None else min_p.dtype),
        address(repetition), address(presence), address(frequency), address(counts),
        address(tokens), address(kept), torch.get_num_threads(),
    )  # fmt: skip
    return tokens


_IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {"cpu": sample_cpu, "triton": sample_triton, "reference": sample_reference}


@torch.library.custom_op("llava_fast::sample", mutates_args=())
def _sample(
    logits_SV: Tensor,
    temperature: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    seeds: Tensor,
    steps: Tensor,
    repetition_penalty: Tensor | None,
    presence_penalty: Tensor | None,
    frequency_penalty: Tensor | None,
    counts: Tensor | None,
    implementation: str,
) -> Tensor:
    return _IMPLEMENTATIONS[implementation](
        logits_SV, temperature, top_k, top_p, min_p, seeds, steps, repetition_penalty, presence_penalty, frequency_penalty, counts
    )


@_sample.register_fake
def _(logits_SV, *_):
    return logits_SV.new_empty(logits_SV.shape[0], dtype=torch.int64)


_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_WORDS = (torch.int64,)
_DTYPES = {"seeds": _WORDS, "steps": _WORDS, "top_k": (torch.int32, torch.int64), "top_p": _FLOATING, "min_p": _FLOATING}  # else fp32

registry.register(
    "sampling",
    {
        "cpu": Implementation(("cpu",), (torch.float32,), modules=("llava_fast._cpu",), invariant=True),
        "reference": Implementation(),
        # Never run on hardware: by name only until it is measured.
        "triton": Implementation(DEVICES, (torch.float32,), modules=("triton",), default=False, invariant=True),
    },
)


def sample(
    logits_SV: Tensor,
    *,
    temperature: Tensor,
    seeds: Tensor,
    steps: Tensor,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
    repetition_penalty: Tensor | None = None,
    presence_penalty: Tensor | None = None,
    frequency_penalty: Tensor | None = None,
    counts: Tensor | None = None,
) -> Tensor:
    """The next token of each row, int64 [S]. Nothing is read back to the host.

    logits fp32 [S, V], finite or -inf.  By row, [S]: temperature fp32, 0 for the largest logit; seeds and steps int64, what the noise
    is made of; top_k int32 or int64 (0 or >= V: all), top_p (1: all) and min_p (0: all) floating, penalties fp32 (1, 0, 0: none).
    counts int32 [S, V]: how often each token was seen, which penalties need. Raises ValueError for shapes, dtypes or devices that do not
    fit, on the CPU also for a negative temperature (a GPU, which does not wait to look, takes it as 0).
    """
    S = logits_SV.shape[0]
    if logits_SV.dim() != 2 or logits_SV.shape[1] == 0 or logits_SV.dtype != torch.float32:
        raise ValueError(f"expected fp32 logits [S, V], got {logits_SV.dtype} {list(logits_SV.shape)}")
    rows = {"temperature": temperature, "seeds": seeds, "steps": steps, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    penalties = {"repetition": repetition_penalty, "presence": presence_penalty, "frequency": frequency_penalty}
    for name, value in {**rows, **penalties}.items():
        if value is None:
            continue
        if value.shape != (S,) or value.device != logits_SV.device:
            raise ValueError(f"expected {name} [{S}] on {logits_SV.device}, got {list(value.shape)} on {value.device}")
        if value.dtype not in _DTYPES.get(name, (torch.float32,)):
            raise ValueError(f"expected {name} in {' or '.join(map(str, _DTYPES.get(name, (torch.float32,))))}, got {value.dtype}")
    if logits_SV.device.type == "cpu" and not torch.compiler.is_compiling() and not bool((temperature >= 0).all()):
        raise ValueError(f"expected temperatures of at least 0, got {temperature.min().item()}")
    if any(value is not None for value in penalties.values()) and counts is None:
        raise ValueError("penalties need counts, int32 [S, V], got None")
    if counts is not None and (counts.shape != logits_SV.shape or counts.dtype != torch.int32):
        raise ValueError(f"expected int32 counts {list(logits_SV.shape)}, got {counts.dtype} {list(counts.shape)}")
    if counts is not None and counts.device != logits_SV.device:
        raise ValueError(f"all tensors must be on one device, got {logits_SV.device} and {counts.device}")
    by_row = [None if t is None else t.contiguous() for t in (temperature, top_k, top_p, min_p, seeds, steps, *penalties.values())]
    name = registry.resolve_name("sampling", logits_SV.device.type, logits_SV.dtype)
    run = partial(_sample, implementation=name) if torch.compiler.is_compiling() else _IMPLEMENTATIONS[name]
    return run(logits_SV, *by_row, counts)


def argmax(logits_SV: Tensor) -> Tensor:
    """The largest logit of each row, int64 [S]: the first of equal ones, a NaN before all. torch's takes 7 to 18 times as long on a CPU."""
    if not logits_SV.is_cpu or logits_SV.dtype != torch.float32 or registry.resolve_name("sampling", "cpu", torch.float32) != "cpu":
        return logits_SV.argmax(-1)
    logits_SV, stride = _rows_of(logits_SV)
    tokens = torch.empty(logits_SV.shape[0], dtype=torch.int64)
    _native.cpu().argmax(*logits_SV.shape, stride, logits_SV.data_ptr(), tokens.data_ptr(), torch.get_num_threads())
    return tokens
