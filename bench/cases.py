"""What is checked and timed on a GPU: calls of the public functions on the model's own shapes, with the work they do and what competes.

Shared by tests/gpu, bench.correctness and bench.gpu. `small` shrinks rows and vocabulary, not widths and head dims: the dry run's scale.
Shape letters: T rows, S sequences, H heads, G key-value heads, d head dim, D width, F MLP width, L label rows, V vocabulary.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from bench.baselines.kernels import inductor
from llava_fast.kernels.activation import swiglu
from llava_fast.kernels.linear import linear, quantise
from llava_fast.kernels.linear_cross_entropy import linear_cross_entropy
from llava_fast.kernels.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from llava_fast.kernels.paged_attention import paged_attention
from llava_fast.kernels.patchify import patchify
from llava_fast.kernels.rope import rope, rope_into_cache
from llava_fast.kernels.sampling import sample
from llava_fast.kernels.spatial_pool import spatial_pool
from llava_fast.kernels.varlen_attention import varlen_attention

VIEW = 729
HALVES = (torch.bfloat16, torch.float16)
ALL = (*HALVES, torch.float32)


@dataclass(frozen=True)
class Make:
    """Makes inputs on a device, in a dtype, from a seed."""

    device: str
    dtype: torch.dtype
    small: bool
    generator: torch.Generator

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=self.generator, device=self.device) * scale).to(self.dtype)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator, device=self.device)

    def lengths(self, count: int, length: int) -> Tensor:
        """cu_seqlens of `count` sequences of `length` rows."""
        return torch.arange(0, (count + 1) * length, length, dtype=torch.int32, device=self.device)

    def rows(self, count: int) -> int:
        return min(count, 48) if self.small else count


@dataclass(frozen=True)
class Case:
    """make: the inputs by name, of which `grads` are differentiated.  run: our call of them, a tensor or several.

    work: (operations, bytes) of one forward of these inputs.  baselines: what else computes the same, by name.
    """

    op: str
    name: str
    make: Callable[[Make], dict[str, Any]]
    run: Callable[..., Any]
    grads: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = ALL
    work: Callable[..., tuple[float, float]] = lambda **inputs: (0.0, 0.0)
    baselines: dict[str, Callable[..., Any]] = field(default_factory=dict)
    times: bool = True  # whether it is a benchmark too

    def inputs(self, device: str, dtype: torch.dtype, small: bool, seed: int = 0) -> dict[str, Any]:
        return self.make(Make(device, dtype, small, torch.Generator(device).manual_seed(seed)))


def moved(*tensors: Tensor) -> float:
    return float(sum(tensor.numel() * tensor.element_size() for tensor in tensors))


# --- attention: H200 does 4 n^2 d operations a head; half of them where a row sees its past alone


def _attention(name: str, count: int, length: int, H: int, G: int, d: int, causal: bool) -> Case:
    def make(m: Make) -> dict[str, Any]:
        n, s = m.rows(length), min(count, 2) if m.small else count
        return dict(q=m.normal(s * n, H, d), k=m.normal(s * n, G, d), v=m.normal(s * n, G, d), cu=m.lengths(s, n))

    def work(q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> tuple[float, float]:
        sequences = cu.shape[0] - 1
        return 4 * sequences * (q.shape[0] / sequences) ** 2 * H * d * (0.5 if causal else 1.0), moved(q, k, v, q)

    def sdpa(q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> Tensor:
        q, k, v = (x.unflatten(0, (cu.shape[0] - 1, -1)).transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=H != G).transpose(1, 2).flatten(0, 1)

    def cudnn(**inputs: Tensor) -> Tensor:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return sdpa(**inputs)

    def longest(q: Tensor, cu: Tensor) -> int:
        return q.shape[0] // (cu.shape[0] - 1)

    def torch_varlen(q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        n, window = longest(q, cu), (-1, 0) if causal else (-1, -1)
        return varlen_attn(q, k, v, cu, cu, n, n, window_size=window)  # type: ignore[return-value]

    def flash_attn(q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> Tensor:
        function = importlib.import_module("flash_attn").flash_attn_varlen_func
        return function(q, k, v, cu, cu, longest(q, cu), longest(q, cu), causal=causal)

    def xformers(q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> Tensor:
        ops = importlib.import_module("xformers.ops")
        bias = ops.fmha.attn_bias.BlockDiagonalMask.from_seqlens([longest(q, cu)] * (cu.shape[0] - 1))
        return ops.memory_efficient_attention(q[None], k[None], v[None], attn_bias=bias.make_causal() if causal else bias)[0]

    def flex(q: Tensor, k: Tensor, v: Tensor, cu: Tensor) -> Tensor:
        n = longest(q, cu)
        if not made:
            sees = lambda batch, head, row, key: row >= key  # noqa: E731
            made.append(create_block_mask(sees, None, None, n, n, device=str(q.device)) if causal else None)
        q, k, v = (x.unflatten(0, (cu.shape[0] - 1, -1)).transpose(1, 2) for x in (q, k, v))
        return compiled_flex(query=q, key=k, value=v, block_mask=made[0], enable_gqa=H != G).transpose(1, 2).flatten(0, 1)

    made: list[Any] = []
    compiled_flex = compiled(flex_attention)
    return Case(
        "varlen_attention",
        f"attention {name}",
        make,
        lambda q, k, v, cu: varlen_attention(q, k, v, cu, cu, causal=causal),
        ("q", "k", "v"),
        work=work,
        baselines={
            "sdpa": sdpa,
            "sdpa cudnn": cudnn,
            "varlen_attn": torch_varlen,
            "flash_attn": flash_attn,
            "xformers": xformers,
            "flex_attention": flex,
        },
    )


def _odd_attention(causal: bool) -> Case:
    """Queries that are a subset of the rows, an empty sequence, grouped heads, a shared prefix."""

    def make(m: Make) -> dict[str, Any]:
        place = lambda *rows, dtype=torch.int32: torch.tensor(rows, dtype=dtype, device=m.device)  # noqa: E731
        named = dict(q=m.normal(9, 8, 64), k=m.normal(140, 2, 64), v=m.normal(140, 2, 64))
        named |= dict(cu_q=place(0, 1, 6, 6, 9), cu_k=place(0, 1, 124, 124, 140))
        named |= dict(q_index=place(0, 3, 50, 51, 100, 122, 0, 8, 15, dtype=torch.int64))
        return {**named, "prefix": torch.stack([place(0, 0, 0, 1), place(0, 0, 0, 124)], 1)}

    def run(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, q_index: Tensor, prefix: Tensor) -> Tensor:
        return varlen_attention(q, k, v, cu_q, cu_k, causal=causal, q_index=q_index, prefix=prefix)

    return Case("varlen_attention", f"attention odd {'causal' if causal else 'full'}", make, run, ("q", "k", "v"), times=False)


def _paged(name: str, rows: int, length: int, S: int, H: int, G: int, d: int, stored: torch.dtype | None = None) -> Case:
    """`rows` new rows of each of S sequences, the last of `length`; pages of 64 in no order, in q's dtype or in `stored`."""
    page = 64

    def make(m: Make) -> dict[str, Any]:
        s, blocks = min(S, 2) if m.small else S, -(-(min(length, 200) if m.small else length) // page)
        n, keys = min(rows, 20) if m.small else rows, min(length, 200) if m.small else length
        caches = [m.normal(s * blocks, page, G, d) for _ in range(2)]
        named: dict[str, Any] = dict(q=m.normal(s * n, H, d), k=caches[0], v=caches[1])
        if stored is not None:
            named |= {x: named[x].to(stored) for x in "kv"}
        if stored == torch.float8_e4m3fn:
            factor = torch.full((G,), 0.5, device=m.device)
            named |= dict(k_scale=factor, v_scale=factor)
        table = torch.randperm(s * blocks, generator=m.generator, device=m.device).to(torch.int32).view(s, blocks)
        return {**named, "table": table, "cu": m.lengths(s, n), "lengths": torch.full((s,), keys, dtype=torch.int32, device=m.device)}

    def run(q, k, v, table, cu, lengths, k_scale=None, v_scale=None) -> Tensor:
        factors = [factor if factor is None else factor.float() for factor in (k_scale, v_scale)]  # fp64 where the truth is made
        return paged_attention(q, k, v, table, cu, lengths, k_scale=factors[0], v_scale=factors[1])

    def keys_of(**inputs: Any) -> int:
        return length if inputs["table"].shape[1] * page >= length else 200

    def work(**inputs: Any) -> tuple[float, float]:
        q, k, table = inputs["q"], inputs["k"], inputs["table"]
        s, keys = table.shape[0], keys_of(**inputs)
        n = q.shape[0] // s
        return 4.0 * q.shape[0] * (keys - (n - 1) / 2) * H * d, moved(q, q) + 2 * s * keys * G * d * k.element_size()

    def sdpa(**inputs: Any) -> Tensor:
        """The pages of each sequence gathered into one row, then one call."""
        q, table = inputs["q"], inputs["table"]
        s, keys = table.shape[0], keys_of(**inputs)
        k, v = (inputs[x][table.long()].flatten(1, 2)[:, :keys].to(q.dtype).transpose(1, 2) for x in "kv")
        if inputs.get("k_scale") is not None:
            k, v = (x * inputs[f].to(q.dtype)[:, None, None] for x, f in ((k, "k_scale"), (v, "v_scale")))
        q = q.unflatten(0, (s, -1)).transpose(1, 2)
        n = q.shape[2]
        mask = None if n == 1 else torch.ones(n, keys, dtype=torch.bool, device=q.device).tril(keys - n)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=H != G).transpose(1, 2).flatten(0, 1)

    dtypes = HALVES if stored is not None else ALL
    return Case("paged_attention", f"paged {name}", make, run, dtypes=dtypes, work=work, baselines={"sdpa": sdpa})


# --- rows: norms, rope, activations, pooling


def _norm(name: str, T: int, D: int) -> Case:
    centred = name == "layer"

    def make(m: Make) -> dict[str, Any]:
        named = dict(x=m.normal(m.rows(T), D), weight=m.normal(D, scale=0.1) + 1)
        return {**named, "bias": m.normal(D, scale=0.1)} if centred else named

    def run(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return rms_norm(x, weight, 1e-6) if bias is None else layer_norm(x, weight, bias, 1e-6)

    def eager(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, 1e-6) if bias is None else F.layer_norm(x, weight.shape, weight, bias, 1e-6)

    def liger(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        functional = importlib.import_module("liger_kernel.transformers.functional")
        return functional.liger_rms_norm(x, weight, 1e-6) if bias is None else functional.liger_layer_norm(x, weight, bias, 1e-6)

    grads = ("x", "weight", "bias") if centred else ("x", "weight")
    baselines = {"torch": eager, "torch.compile": compiled(eager), "liger": liger}
    return Case("norm", f"{name}_norm {T}x{D}", make, run, grads, ALL, lambda x, **_: (0.0, 2 * moved(x)), baselines)


def _add_norm(name: str, T: int, D: int) -> Case:
    centred = name == "layer"

    def make(m: Make) -> dict[str, Any]:
        named = dict(x=m.normal(m.rows(T), D), residual=m.normal(m.rows(T), D), weight=m.normal(D, scale=0.1) + 1)
        return {**named, "bias": m.normal(D, scale=0.1)} if centred else named

    def run(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return add_rms_norm(x, residual, weight, 1e-6) if bias is None else add_layer_norm(x, residual, weight, bias, 1e-6)

    def eager(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = x + residual
        normed = F.rms_norm(x, weight.shape, weight, 1e-6) if bias is None else F.layer_norm(x, weight.shape, weight, bias, 1e-6)
        return normed, x

    grads = ("x", "residual", "weight", "bias") if centred else ("x", "residual", "weight")
    baselines = {"torch": eager, "torch.compile": compiled(eager)}
    return Case("norm", f"add_{name}_norm {T}x{D}", make, run, grads, ALL, lambda x, **_: (0.0, 4 * moved(x)), baselines)


def _swiglu(T: int, width: int) -> Case:
    def eager(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up

    return Case(
        "activation",
        f"swiglu {T}x{width}",
        lambda m: dict(x=m.normal(m.rows(T), 2 * width)),
        lambda x: swiglu(x),
        ("x",),
        work=lambda x: (0.0, 1.5 * moved(x)),
        baselines={"torch": eager, "torch.compile": compiled(eager)},
    )


def _rope(T: int, H: int, d: int) -> Case:
    def make(m: Make) -> dict[str, Any]:
        angles = torch.outer(torch.arange(m.rows(T)), 1e-3 ** (torch.arange(d // 2) / (d // 2)))
        return dict(x=m.normal(m.rows(T), H, d), cos=angles.cos().to(m.device, m.dtype), sin=angles.sin().to(m.device, m.dtype))

    def eager(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos[:, None] - b * sin[:, None], b * cos[:, None] + a * sin[:, None]], -1)

    def run(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return rope(x, cos, sin)

    baselines = {"torch": eager, "torch.compile": compiled(eager)}
    return Case("rope", f"rope {T}x{H}x{d}", make, run, ("x",), ALL, lambda x, cos, sin: (0.0, 2 * moved(x) + moved(cos, sin)), baselines)


def _rope_into_cache(T: int, H: int, G: int, d: int) -> Case:
    """Rows written to the cache in another order; what comes back is q' and the cache."""

    def make(m: Make) -> dict[str, Any]:
        rows = m.rows(T)
        angles = torch.outer(torch.arange(rows), 1e-3 ** (torch.arange(d // 2) / (d // 2)))
        named = dict(q=m.normal(rows, H, d), k=m.normal(rows, G, d), v=m.normal(rows, G, d), cache=m.normal(2, rows + 8, G, d))
        named |= dict(cos=angles.cos().to(m.device, m.dtype), sin=angles.sin().to(m.device, m.dtype))
        return {**named, "slots": torch.arange(rows - 1, -1, -1, device=m.device)}

    def run(q: Tensor, k: Tensor, v: Tensor, cache: Tensor, cos: Tensor, sin: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        return rope_into_cache(q, k, v, cos, sin, cache[0], cache[1], slots), cache

    def eager(q: Tensor, k: Tensor, v: Tensor, cache: Tensor, cos: Tensor, sin: Tensor, slots: Tensor) -> Tensor:
        def rotated(x: Tensor) -> Tensor:
            a, b = x.chunk(2, -1)
            return torch.cat([a * cos[:, None] - b * sin[:, None], b * cos[:, None] + a * sin[:, None]], -1)

        cache[0, slots], cache[1, slots] = rotated(k), v
        return rotated(q)

    return Case(
        "rope",
        f"rope_into_cache {T}x{H}x{G}x{d}",
        make,
        run,
        work=lambda q, k, v, cos, sin, **_: (0.0, 2 * moved(q, k, v) + moved(cos, sin)),
        baselines={"torch": eager},
    )


def _patchify(N: int, S: int, uint8: bool) -> Case:
    def make(m: Make) -> dict[str, Any]:
        n = 1 if m.small else N
        return dict(views=m.integers(256, n, 3, S, S).to(torch.uint8), like=m.normal(1)) if uint8 else dict(views=m.normal(n, 3, S, S))

    def run(views: Tensor, like: Tensor | None = None) -> Tensor:
        return patchify(views, 14, dtype=(views if like is None else like).dtype)

    def eager(views: Tensor, like: Tensor | None = None) -> Tensor:
        if like is not None:
            views = (views.float() / 255 - 0.5) / 0.5
        grid = S // 14
        rows = views[:, :, : grid * 14, : grid * 14].unflatten(3, (grid, 14)).unflatten(2, (grid, 14)).permute(0, 2, 4, 1, 3, 5)
        return F.pad(rows.reshape(len(views), grid * grid, 588).to((views if like is None else like).dtype), (0, 4))

    return Case(
        "patchify",
        f"patchify {N}x{S} {'uint8' if uint8 else 'float'}",
        make,
        run,
        () if uint8 else ("views",),
        work=lambda views, like=None: (0.0, moved(views) + views.numel() * (views if like is None else like).element_size()),
        baselines={"torch": eager, "torch.compile": compiled(eager)},
    )


def _sampling(S: int, V: int, nucleus: bool) -> Case:
    """Rows of the design's vocabulary, every second one greedy; with top-k, top-p and a penalty, or the temperature alone."""

    def make(m: Make) -> dict[str, Any]:
        vocabulary = 1000 if m.small else V
        # The reference in fp64 must draw the same token: the noise is far from ties.
        named = dict(logits=m.normal(S, vocabulary, scale=4.0).float(), temperature=torch.arange(S, device=m.device) % 2 * 0.7)
        named |= dict(seeds=torch.arange(S, device=m.device), steps=torch.full((S,), 5, device=m.device))
        if not nucleus:
            return named
        full = lambda value: torch.full((S,), value, device=m.device)  # noqa: E731
        counts = m.integers(2, S, vocabulary).int()
        return {**named, "top_k": full(50), "top_p": full(0.9), "repetition_penalty": full(1.1), "counts": counts}

    def run(logits: Tensor, **settings: Tensor) -> Tensor:
        return sample(logits.float(), **{name: x.float() if x.is_floating_point() else x for name, x in settings.items()})

    def eager(logits: Tensor, temperature: Tensor, **_: Tensor) -> Tensor:
        return torch.multinomial(torch.softmax(logits / temperature.clamp_min(1e-5)[:, None], -1), 1)[:, 0]

    return Case(
        "sampling",
        f"sample {'top-k top-p' if nucleus else 'temperature'} {S}x{V}",
        make,
        run,
        dtypes=(torch.float32,),
        work=lambda logits, **_: (0.0, moved(logits)),
        baselines={} if nucleus else {"torch": eager},
    )


def _pool(mode: str, size: int, K: int = 64) -> Case:
    def make(m: Make) -> dict[str, Any]:
        k = 2 if m.small else K
        return dict(table=m.normal(k * VIEW, 1024), source=torch.arange(k * VIEW, device=m.device).view(k, 27, 27))

    def run(table: Tensor, source: Tensor) -> Tensor:
        return spatial_pool(table, source, (size, size), mode)  # type: ignore[arg-type]

    return Case("spatial_pool", f"pool {mode} {K} views", make, run, ("table",), ALL, lambda table, source: (0.0, 1.25 * moved(table)))


# --- products


def _linear(name: str, T: int, O: int, I: int, act: str | None = None, residual: bool = False) -> Case:
    def make(m: Make) -> dict[str, Any]:
        named = dict(x=m.normal(m.rows(T), I), weight=m.normal(min(O, 512) if m.small else O, I, scale=I**-0.5))
        named |= dict(bias=m.normal(named["weight"].shape[0]))
        return {**named, "residual": m.normal(named["x"].shape[0], named["weight"].shape[0])} if residual else named

    def eager(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
        y = F.linear(x, weight, bias)
        y = F.gelu(y, approximate="tanh") if act else y
        return y if residual is None else y + residual

    return Case(
        "linear",
        f"linear {name} {T}x{O}x{I}",
        make,
        lambda x, weight, bias, residual=None: linear(x, weight, bias, act=act, residual=residual),
        ("x", "weight", "bias", "residual") if residual else ("x", "weight", "bias"),
        work=lambda x, weight, **_: (2 * x.shape[0] * weight.numel(), moved(x, weight) + x.shape[0] * weight.shape[0] * x.element_size()),
        baselines={"torch": eager, "torch.compile": compiled(eager)},
    )


def _quantised(kind: str, T: int, O: int, I: int) -> Case:
    def make(m: Make) -> dict[str, Any]:
        full = m.normal(min(O, 512) if m.small else O, I, scale=I**-0.5)
        group = {"group": 128} if kind == "int4" else {}
        return dict(x=m.normal(T, I), weight=quantise(full.float(), kind, **group), full=full)  # type: ignore[arg-type]

    return Case(
        "linear",
        f"linear {kind} {T}x{O}x{I}",
        make,
        lambda x, weight, full: linear(x, weight),
        dtypes=HALVES,
        work=lambda x, weight, full: (2 * x.shape[0] * full.numel(), moved(weight.weight, weight.scale)),
        baselines={"torch bf16": lambda x, weight, full: F.linear(x, full)},
    )


def _loss(name: str, L: int, D: int, V: int, **options: Any) -> Case:
    def make(m: Make) -> dict[str, Any]:
        vocabulary = 1000 if m.small else V
        hidden, weight = m.normal(m.rows(L), D), m.normal(vocabulary, D, scale=D**-0.5)
        return dict(hidden=hidden, weight=weight, labels=m.integers(vocabulary, hidden.shape[0]))

    def eager(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight).float(), labels)

    def liger(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        functional = importlib.import_module("liger_kernel.transformers.functional")
        return functional.liger_fused_linear_cross_entropy(hidden, weight, labels)

    return Case(
        "linear_cross_entropy",
        f"loss {name} {L}x{D}x{V}",
        make,
        lambda hidden, weight, labels: linear_cross_entropy(hidden, weight, labels, **options),
        ("hidden", "weight"),
        work=lambda hidden, weight, labels: (2 * hidden.shape[0] * weight.numel(), moved(hidden, weight)),
        baselines={} if options != {"reduction": "mean"} else {"torch": eager, "torch.compile": compiled(eager), "liger": liger},
        times=options == {"reduction": "mean"},
    )


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """bench.baselines.kernels.inductor when it is first called, and not on import."""
    made: list[Callable[..., Any]] = []

    def run(**inputs: Any) -> Any:
        if not made:
            made.append(inductor(function))
        return made[0](**inputs)

    return run


# In the order of their worth: what the clock cuts off is last.
CASES = [
    _attention("d72 full 64x729", 64, VIEW, 16, 16, 72, causal=False),
    _attention("d128 causal 4x4096", 4, 4096, 32, 32, 128, causal=True),
    _attention("d64 causal 4x4096", 4, 4096, 16, 16, 64, causal=True),
    _paged("decode d64 8x1500", 1, 1500, 8, 16, 16, 64),
    _paged("decode d64 grouped 8x1500", 1, 1500, 8, 14, 2, 64),
    _paged("decode d128 fp8 32x4096", 1, 4096, 32, 32, 32, 128, stored=torch.float8_e4m3fn),
    _paged("prefill d64 512 of 4x4096", 512, 4096, 4, 16, 16, 64),
    _loss("7b", 4096, 4096, 152_000, reduction="mean"),
    _loss("0.5b", 4096, 1024, 152_000, reduction="mean"),
    _norm("layer", 64 * VIEW, 1152),
    _norm("rms", 16_384, 1024),
    _norm("rms", 16_384, 4096),
    _add_norm("layer", 64 * VIEW, 1152),
    _add_norm("rms", 16_384, 4096),
    _swiglu(16_384, 2816),
    _swiglu(8192, 11_008),
    _rope(16_384, 16, 64),
    _rope(8192, 32, 128),
    _rope_into_cache(16_384, 16, 16, 64),
    _rope_into_cache(64, 32, 32, 128),
    _patchify(64, 384, uint8=True),
    _patchify(64, 384, uint8=False),
    _sampling(64, 152_000, nucleus=False),
    _sampling(64, 152_000, nucleus=True),
    *[_quantised(kind, 1, 11_008, 4096) for kind in ("int8", "int4", "fp8")],
    *[_quantised(kind, 8, 4096, 11_008) for kind in ("int8", "int4", "fp8")],
    _linear("gelu", 64 * VIEW, 4304, 1152, act="gelu_pytorch_tanh"),
    _linear("residual", 64 * VIEW, 1152, 4304, residual=True),
    _linear("plain", 1, 4096, 4096),
    _pool("average", 13),
    _pool("bilinear", 14),
    _pool("max", 13),
    # Odd shapes: for the checks alone.
    _odd_attention(causal=True),
    _odd_attention(causal=False),
    _attention("d80 full 3x5", 3, 5, 2, 1, 80, causal=False),
    _loss("rows", 123, 1152, 1003, reduction="none", label_smoothing=0.1, z_loss=1e-4),
    _norm("layer", 5, 1154),
    _norm("rms", 1, 1024),
    _add_norm("layer", 5, 1154),
    _rope_into_cache(3, 4, 2, 80),
    _swiglu(5, 123),
    _rope(5, 3, 72),
    _linear("odd", 5, 123, 588, residual=True),
]


def work_of_backward(operations: float, op: str) -> float:
    """Operations of forward and backward: attention's backward multiplies five times where its forward does twice."""
    return operations * (3.5 if op == "varlen_attention" else 3.0)
