"""The packed embedding buffer: tower features through the projector to their rows, token ids through the embedding table to theirs.

    h      = act(features w1^T + b1)                                   M view rows
    table  = h, then the maps of each resample (see spatial_pool.py), then the newline row
    out[rows[v]]      = table[source[v]] w2^T + b2, or the newline
    out[text_rows[i]] = embedding[token_ids[text_rows[i]]]

Average and bilinear pooling are linear with weights that sum to one, so they commute with the second product: it runs after them and
meets a quarter of the rows, and only those asked for. Max pooling does not commute: with one among the resamples all of them run
after the second product. Without w2 (LLaVA v1) there is one product and no act.

The backward pass keeps only the values before act (and the projected table, for a maximum), and multiplies in the features' dtype. Sums
over rows that share a source or a token id are made in fp32 in the order of the rows: the same in every run.
Sources: get_2dPool and prepare_inputs_labels_for_multimodal of LLaVA-NeXT (llava/model/llava_arch.py).

Shape letters: T rows of the buffer, V visual rows, M view rows, E tower width, D decoder width, K maps of H x W cells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llava_fast.kernels import _linear_triton, linear, registry, spatial_pool
from llava_fast.kernels._triton import DEVICES, config, jit, on_device, tl, triton
from llava_fast.kernels.linear_gradient import multiply
from llava_fast.kernels.registry import Implementation

Resamples = Sequence[tuple[str, Tensor, tuple[int, int]]]


# --- Triton -----------------------------------------------------------------------------------------------------------------------


@jit
def _fill_kernel(
    out_ptr,
    text_rows_ptr,
    token_ids_ptr,
    embedding_ptr,
    rows_ptr,
    source_ptr,
    table_ptr,
    newline_ptr,
    texts,
    table_rows,
    D,
    out_stride,
    COPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program i: text row i; past those, visual row i - texts where it is the newline or, with COPY, a row of the table."""
    i = tl.program_id(0)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if i < texts:
        row = tl.load(text_rows_ptr + i)
        value = tl.load(embedding_ptr + tl.load(token_ids_ptr + row) * D + d, mask=d < D)
        tl.store(out_ptr + row * out_stride + d, value.to(out_ptr.dtype.element_ty), mask=d < D)
    else:
        source = tl.load(source_ptr + i - texts)
        row = tl.load(rows_ptr + i - texts)
        if source < table_rows:
            if COPY:
                value = tl.load(table_ptr + source * D + d, mask=d < D)
                tl.store(out_ptr + row * out_stride + d, value, mask=d < D)
        elif newline_ptr is not None:
            value = tl.load(newline_ptr + d, mask=d < D)
            tl.store(out_ptr + row * out_stride + d, value.to(out_ptr.dtype.element_ty), mask=d < D)


@jit
def _segment_sum_kernel(out_ptr, values_ptr, index_ptr, order_ptr, N, rows, D, value_stride, BLOCK: tl.constexpr):
    """The program of the first of equal indices adds up all their rows; the others have nothing to do."""
    i = tl.program_id(0)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    index = tl.load(index_ptr + i)
    first = (i == 0) | (tl.load(index_ptr + tl.maximum(i - 1, 0)) != index)
    if first & (index < rows):
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        j = i
        same = True
        while same:
            total += tl.load(values_ptr + tl.load(order_ptr + j) * value_stride + d, mask=d < D, other=0.0).to(tl.float32)
            j += 1
            same = (j < N) & (tl.load(index_ptr + tl.minimum(j, N - 1)) == index)
        tl.store(out_ptr + index * D + d, total.to(out_ptr.dtype.element_ty), mask=d < D)


def _product_triton(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    act: str,
    gather: Tensor | None = None,
    rows: Tensor | None = None,
    pre: Tensor | None = None,
) -> None:
    with on_device(out):
        _linear_triton.gemm(out, x, weight, bias, act, gather=gather, rows=rows, pre=pre)


def _fill_triton(
    out: Tensor,
    text_rows: Tensor,
    token_ids: Tensor,
    embedding: Tensor,
    rows: Tensor,
    source: Tensor | None,
    table: Tensor,
    newline: Tensor | None,
    copy: bool,
) -> None:
    texts, D = text_rows.shape[0], out.shape[1]
    visual = rows.shape[0] if source is not None and (copy or newline is not None) else 0
    if texts + visual == 0:
        return
    options = config("_fill_kernel", f"{D}", {"BLOCK": min(1024, triton.next_power_of_2(D)), "num_warps": 4}, out.device)
    pointers = out, text_rows, token_ids, embedding, rows, source, table, newline
    with on_device(out):
        _fill_kernel[(texts + visual, triton.cdiv(D, options["BLOCK"]))](
            *pointers, texts, table.shape[0], D, out.stride(0), COPY=copy, **options
        )


def _segment_sum_triton(values_ND: Tensor, index_N: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    N, D = values_ND.shape
    out = values_ND.new_zeros(rows, D, dtype=dtype)
    if N:
        ordered, order = torch.sort(index_N, stable=True)
        options = config("_segment_sum_kernel", f"{D}", {"BLOCK": min(1024, triton.next_power_of_2(D)), "num_warps": 4}, out.device)
        with on_device(out):
            _segment_sum_kernel[(N, triton.cdiv(D, options["BLOCK"]))](
                out, values_ND, ordered, order, N, rows, D, values_ND.stride(0), **options
            )
    return out


def shipped_calls(device: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """Rows of two views into a buffer of 2048: the second product by gather, the copies, and the gradients' sums."""
    for D in (1024, 4096):
        table, out = (torch.zeros(n, D, dtype=torch.bfloat16, device=device) for n in (2 * 729, 2048))
        weight, bias = torch.zeros(D, D, dtype=torch.bfloat16, device=device), table[0]
        index = torch.zeros(1500, dtype=torch.int64, device=device)
        yield f"gathered product {D}", partial(_product_triton, out, table, weight, bias, "", gather=index, rows=index)
        for copy in (False, True):
            arguments = (out, index[:500], index, table, index, index, table, bias, copy)
            yield f"fill {D}{' with copies' * copy}", partial(_fill_triton, *arguments)
        yield f"segment sum {D}", partial(_segment_sum_triton, out[:1500], index, 2 * 729, torch.bfloat16)


def candidates() -> dict[tuple[str, str], list[dict[str, int]]]:
    """Launch parameters for bench/tune.py: the products of the shapes above."""
    return _linear_triton.gemm_candidates("bfloat16 2048x1024x1024", "bfloat16 2048x4096x4096")


# --- C++ --------------------------------------------------------------------------------------------------------------------------


def _product_cpu(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    act: str,
    gather: Tensor | None = None,
    rows: Tensor | None = None,
    pre: Tensor | None = None,
) -> None:
    if gather is not None:  # the newline's row is multiplied too and written over after
        x = x.index_select(0, gather.clamp(max=x.shape[0] - 1))
    kind = str(weight.dtype).removeprefix("torch.")
    linear.LAUNCHERS["cpu"](out, x, weight, None, bias, None, kind, 0, act, rows, pre)


def _fill_cpu(
    out: Tensor,
    text_rows: Tensor,
    token_ids: Tensor,
    embedding: Tensor,
    rows: Tensor,
    source: Tensor | None,
    table: Tensor,
    newline: Tensor | None,
    copy: bool,
) -> None:
    out.index_copy_(0, text_rows, embedding[token_ids[text_rows]].to(out.dtype))
    if source is None:
        return
    if copy:
        out.index_copy_(0, rows, table.index_select(0, source.clamp(max=table.shape[0] - 1)))
    if newline is not None:
        out[rows[source == table.shape[0]]] = newline.to(out.dtype)


def _segment_sum_cpu(values_ND: Tensor, index_N: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    # One row more: the newline's, which is nobody's here. index_add_ on the CPU goes through the rows in order.
    wide = torch.promote_types(values_ND.dtype, torch.float32)
    return values_ND.new_zeros(rows + 1, values_ND.shape[1], dtype=wide).index_add_(0, index_N, values_ND.to(wide))[:rows].to(dtype)


@dataclass(frozen=True)
class _Launchers:
    product: Callable[..., None]
    fill: Callable[..., None]
    segment_sum: Callable[..., Tensor]


_LAUNCHERS = {
    "cpu": _Launchers(_product_cpu, _fill_cpu, _segment_sum_cpu),
    "triton": _Launchers(_product_triton, _fill_triton, _segment_sum_triton),
}


# --- both -------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Maps:
    """The resamples as a custom op can take them: sources, sizes one after the other, modes joined by commas."""

    sources: list[Tensor]
    sizes: list[int]
    modes: str

    def each(self) -> Iterator[tuple[Tensor, list[int], str, int]]:
        """(source, size, mode, rows it makes)"""
        for i, (source, mode) in enumerate(zip(self.sources, filter(None, self.modes.split(",")), strict=True)):
            size = self.sizes[2 * i : 2 * i + 2]
            yield source, size, mode, source.shape[0] * size[0] * size[1]

    @property
    def rows(self) -> int:
        return sum(rows for _, _, _, rows in self.each())

    @property
    def has_max(self) -> bool:
        return "max" in self.modes.split(",")


def _pool_into(table: Tensor, M: int, maps: _Maps, name: str) -> None:
    """The rows of `table` past its first M, from those."""
    start = M
    for source, size, mode, rows in maps.each():
        spatial_pool._LAUNCHERS[name][0](table[:M], source, table[start : start + rows], size, mode)
        start += rows


def _pool_backward(grad: Tensor, table: Tensor | None, M: int, maps: _Maps, name: str) -> Tensor:
    """Gradient of the first M rows, from that of the whole table."""
    total, start = grad[:M], M
    for source, size, mode, rows in maps.each():
        part = grad[start : start + rows]
        total = total + spatial_pool._LAUNCHERS[name][1](part, None if table is None else table[:M], source, M, size, mode)
        start += rows
    return total


def _forward(
    features: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor | None,
    b2: Tensor | None,
    newline: Tensor | None,
    embedding: Tensor,
    source: Tensor | None,
    rows: Tensor,
    text_rows: Tensor,
    token_ids: Tensor,
    maps: _Maps,
    act: str,
    keep: bool,
    name: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(buffer, values before act, projected table); the latter two are empty where the backward pass has no use for them."""
    run, M, D = _LAUNCHERS[name], features.shape[0], w1.shape[0]
    out = features.new_empty(token_ids.shape[0], D)
    pre = features.new_empty(M, D) if keep and act else features.new_empty(0)
    saved = pre if keep and act else None
    table = features.new_empty(0)
    if w2 is None and source is None:
        run.product(out, features, w1, b1, act, rows=rows, pre=saved)
    else:
        after = w2 is None or maps.has_max  # resampling follows the last product
        table = features.new_empty(M + (0 if source is None else maps.rows), D)
        if w2 is None or source is not None and not after:
            run.product(table[:M], features, w1, b1, act, pre=saved)
        else:
            h = features.new_empty(M, D)
            run.product(h, features, w1, b1, act, pre=saved)
            if source is None:
                run.product(out, h, w2, b2, "", rows=rows)
            else:
                run.product(table[:M], h, w2, b2, "")
        if source is not None:
            _pool_into(table, M, maps, name)
            if not after:
                run.product(out, table, w2, b2, "", gather=source, rows=rows)
    copy = source is not None and (w2 is None or maps.has_max)
    run.fill(out, text_rows, token_ids, embedding, rows, source, table, newline, copy)
    return out, pre, table if keep and maps.has_max and source is not None else features.new_empty(0)


def _backward_pass(
    grad: Tensor,
    features: Tensor,
    w1: Tensor,
    w2: Tensor | None,
    pre: Tensor,
    table: Tensor,
    source: Tensor | None,
    rows: Tensor,
    text_rows: Tensor,
    token_ids: Tensor,
    maps: _Maps,
    act: str,
    needs: Sequence[bool],
    vocabulary: int,
    dtype: torch.dtype,
    name: str,
) -> list[Tensor]:
    """Gradients of features, w1, b1, w2, b2, newline and embedding, empty where not needed; sums in fp32, products in grad's dtype."""
    run, M, D = _LAUNCHERS[name], features.shape[0], w1.shape[0]
    grads = [grad.new_empty(0) for _ in range(7)]
    if needs[6]:
        grads[6] = run.segment_sum(grad.index_select(0, text_rows), token_ids.index_select(0, text_rows), vocabulary, dtype)
    if not any(needs[:6]):
        return grads
    total = M + maps.rows
    g = grad.index_select(0, rows)
    if source is not None:
        is_newline = source == total
        if needs[5]:
            grads[5] = is_newline.to(g.dtype) @ g
        g = g.masked_fill(is_newline[:, None], 0)
    after = w2 is None or maps.has_max
    h = linear.ACTIVATIONS[act](pre) if act and needs[3] else None
    if source is not None and after:
        g = _pool_backward(run.segment_sum(g, source, total, g.dtype), table if maps.has_max else None, M, maps, name)
    if w2 is not None:
        if needs[3]:
            assert h is not None
            if source is None or after:
                grads[3] = multiply(g, h, True, name)
            else:
                whole = h.new_empty(total, D)
                whole[:M] = h
                _pool_into(whole, M, maps, name)
                grads[3] = multiply(g, whole.index_select(0, source.clamp(max=total - 1)), True, name)
        if needs[4]:
            grads[4] = g.sum(0)
        if any(needs[:3]):
            g = multiply(g, w2, False, name)
            if source is not None and not after:
                g = _pool_backward(run.segment_sum(g, source, total, g.dtype), None, M, maps, name)
    if act and any(needs[:3]):
        g = linear._act_backward(g, pre, act)
    if needs[0]:
        grads[0] = multiply(g, w1, False, name)
    if needs[1]:
        grads[1] = multiply(g, features, True, name)
    if needs[2]:
        # Without a product that makes it anew, g may be a view of the argument, which a custom op must not return.
        grads[2] = g.sum(0)
    return grads


@torch.library.custom_op("llava_fast::project", mutates_args=())
def _project(
    features: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor | None,
    b2: Tensor | None,
    newline: Tensor | None,
    embedding: Tensor,
    source: Tensor | None,
    rows: Tensor,
    text_rows: Tensor,
    token_ids: Tensor,
    sources: list[Tensor],
    sizes: list[int],
    modes: str,
    act: str,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    maps = _Maps(sources, sizes, modes)
    arguments = [None if t is None else t.contiguous() for t in (w1, b1, w2, b2, newline, embedding, source, rows, text_rows, token_ids)]
    return _forward(features.contiguous(), *arguments, maps, act, True, implementation)  # type: ignore[call-arg, arg-type]


@_project.register_fake
def _(features, w1, b1, w2, b2, newline, embedding, source, rows, text_rows, token_ids, sources, sizes, modes, act, implementation):
    maps, M, D = _Maps(sources, sizes, modes), features.shape[0], w1.shape[0]
    pre = features.new_empty(M, D) if act else features.new_empty(0)
    table = features.new_empty(M + maps.rows, D) if maps.has_max and source is not None else features.new_empty(0)
    return features.new_empty(token_ids.shape[0], D), pre, table


@torch.library.custom_op("llava_fast::project_backward", mutates_args=())
def _project_backward(
    grad: Tensor,
    features: Tensor,
    w1: Tensor,
    w2: Tensor | None,
    pre: Tensor,
    table: Tensor,
    source: Tensor | None,
    rows: Tensor,
    text_rows: Tensor,
    token_ids: Tensor,
    sources: list[Tensor],
    sizes: list[int],
    modes: str,
    act: str,
    needs: list[bool],
    vocabulary: int,
    dtype: torch.dtype,
    implementation: str,
) -> list[Tensor]:
    maps = _Maps(sources, sizes, modes)
    return _backward_pass(
        grad.contiguous(),
        features,
        w1,
        w2,
        pre,
        table,
        source,
        rows,
        text_rows,
        token_ids,
        maps,
        act,
        needs,
        vocabulary,
        dtype,
        implementation,
    )


@_project_backward.register_fake
def _(grad, features, w1, w2, pre, table, source, rows, text_rows, token_ids, sources, sizes, modes, act, needs, vocabulary, dtype, _):
    D = w1.shape[0]
    shapes = [features.shape, w1.shape, (D,), (D, D), (D,), (D,), (vocabulary, D)]
    made = [grad.new_empty(shape if needed else (0,)) for shape, needed in zip(shapes, needs, strict=True)]
    return [*made[:6], made[6].to(dtype) if needs[6] else made[6]]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    features, w1, b1, w2, b2, newline, embedding, source, rows, text_rows, token_ids, sources, sizes, modes, act, name = inputs
    ctx.set_materialize_grads(False)  # of pre and table, which have none
    ctx.save_for_backward(features, w1, w2, *output[1:], source, rows, text_rows, token_ids, *sources)
    ctx.dtypes = [None if t is None else t.dtype for t in (features, w1, b1, w2, b2, newline, embedding)]
    ctx.arguments = sizes, modes, act
    ctx.vocabulary, ctx.name = embedding.shape[0], name


def _backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    saved, sources = ctx.saved_tensors[:9], list(ctx.saved_tensors[9:])
    if grad is None:
        return (*[None] * 11, [None] * len(sources), None if sources else [], None, None, None)
    needs = list(ctx.needs_input_grad[:7])
    grads = _project_backward(grad, *saved, sources, *ctx.arguments, needs, ctx.vocabulary, ctx.dtypes[6], ctx.name)
    made = [g.to(dtype) if needed else None for g, dtype, needed in zip(grads, ctx.dtypes, needs, strict=True)]
    # torch takes an empty list, of whatever, for a list of tensors.
    return (*made, None, None, None, None, [None] * len(sources), None if sources else [], None, None, None)


_project.register_autograd(_backward, setup_context=_setup_context)


def project_reference(
    features: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor | None,
    b2: Tensor | None,
    newline: Tensor | None,
    embedding: Tensor,
    source: Tensor | None,
    rows: Tensor,
    text_rows: Tensor,
    token_ids: Tensor,
    resamples: Resamples,
    act: str | None,
) -> Tensor:
    """The same function from torch's ops and the references of `linear` and `spatial_pool`, any device."""

    def arrange(table: Tensor, last: Tensor | None) -> Tensor:
        """Resample, append the newline's row, and take the rows asked for."""
        if source is None:
            return table
        parts = [table] + [spatial_pool.spatial_pool_reference(table, cells, size, mode) for mode, cells, size in resamples]  # type: ignore[arg-type]
        return torch.cat(parts if last is None else [*parts, last.to(table.dtype)[None]])[source]

    product = linear.linear_reference
    table = product(features, w1, b1, act)
    if w2 is None:
        made = arrange(table, newline)
    elif any(mode == "max" for mode, _, _ in resamples):
        made = arrange(product(table, w2, b2), newline)
    else:
        made = product(arrange(table, None if newline is None else torch.zeros_like(w1[:, 0])), w2, b2)
        if newline is not None and source is not None:
            total = features.shape[0] + sum(cells.shape[0] * size[0] * size[1] for _, cells, size in resamples)
            made = torch.where((source == total)[:, None], newline.to(made.dtype), made)
    out = made.new_empty(token_ids.shape[0], made.shape[1])
    out = out.index_copy(0, text_rows, embedding[token_ids[text_rows]].to(made.dtype))
    return out.index_copy(0, rows, made)


_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
registry.register(
    "projector",
    {
        "cpu": Implementation(("cpu",), _DTYPES, modules=("llava_fast._cpu",), invariant=True),
        "reference": Implementation(),
        # Compiled and interpreted, and never run on hardware: by name only until it is measured.
        "triton": Implementation(DEVICES, _DTYPES, modules=("triton",), default=False, invariant=True),
    },
)


def project(
    features: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor | None,
    b2: Tensor | None,
    *,
    act: str | None,
    embedding: Tensor,
    token_ids: Tensor,
    rows: Tensor,
    text_rows: Tensor,
    source: Tensor | None = None,
    resamples: Resamples = (),
    newline: Tensor | None = None,
) -> Tensor:
    """The packed embedding buffer [T, D] in the features' dtype.

    features [M, E]; w1 [D, E], w2 [D, D] or None, b1 and b2 [D] or None; embedding [vocabulary, D]; newline [D]; any float dtypes.
    act: a name of `linear`, or None. token_ids int64 [T]; rows int64 [V] and text_rows int64 [T - V]: together each row of T once
    (kernels write rows in any order, so one that is named twice holds either value or parts of both, and one that is not named what the
    memory held; the layouts of `llava_fast.batch` name each once).
    source int64 [V]: the table's row of each visual row, the newline's is the one after all others; None: 0, 1, 2, ... of the M view rows.
    resamples: (mode, cells int64 [K, H, W] of view rows, (H', W')) as spatial_pool takes them; ignored without source.
    Differentiable in features, w1, b1, w2, b2, newline and embedding. Raises ValueError for shapes or dtypes that do not fit; the layouts
    of `llava_fast.batch` are in range by construction, and rows out of range raise where the indices are on the CPU.
    """
    M, (D, E) = features.shape[0], w1.shape
    T, V = token_ids.shape[0], rows.shape[0]
    if features.dim() != 2 or features.shape[1] != E or not features.dtype.is_floating_point:
        raise ValueError(f"expected features [M, {E}] for w1 [{D}, {E}], got {features.dtype} {list(features.shape)}")
    for what, tensor, shape in (("b1", b1, (D,)), ("w2", w2, (D, D)), ("b2", b2, (D,)), ("newline", newline, (D,))):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"expected {what} {list(shape)} for w1 [{D}, {E}], got {list(tensor.shape)}")
    if embedding.dim() != 2 or embedding.shape[1] != D:
        raise ValueError(f"expected an embedding table [vocabulary, {D}], got {list(embedding.shape)}")
    if text_rows.shape[0] + V != T or (V if source is None else source.shape[0]) != V or (source is None and V != M):
        raise ValueError(
            f"expected rows and text_rows to share out {T} rows and a source a visual row, got {V} rows, {text_rows.shape[0]} text rows, "
            f"{'no source' if source is None else f'{source.shape[0]} sources'} and {M} view rows"
        )
    if act is not None and act not in linear.ACTIVATIONS:
        raise ValueError(f"act must be one of {', '.join(linear.ACTIVATIONS)}, got {act!r}")
    for what, tensor in (("rows", rows), ("text_rows", text_rows), ("token_ids", token_ids), ("source", source)):
        if tensor is not None and tensor.dtype != torch.int64:
            raise ValueError(f"expected int64 {what}, got {tensor.dtype}")
    if source is None:
        resamples, newline = (), None
    for tensor in (w1, b1, w2, b2, embedding, newline, rows, text_rows, token_ids, source):
        if tensor is not None and tensor.device != features.device:
            raise ValueError(f"all tensors must be on one device, got {features.device} and {tensor.device}")
    for mode, cells, size in resamples:
        spatial_pool.check_maps(cells, size, mode, features.device)
    if features.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_range(M, T, embedding.shape[0], newline, source, rows, text_rows, token_ids, resamples)
    tensors = (features, w1, b1, w2, b2, newline, embedding)
    name = registry.resolve_name("projector", features.device.type, features.dtype)
    if name == "reference":
        return project_reference(*tensors, source, rows, text_rows, token_ids, resamples, act)
    sources = [cells.contiguous() for _, cells, _ in resamples]
    sizes, modes = [n for _, _, size in resamples for n in size], ",".join(mode for mode, _, _ in resamples)
    if registry.as_op(*tensors):
        return _project(*tensors, source, rows, text_rows, token_ids, sources, sizes, modes, act or "", name)[0]
    flat = [None if t is None else t.contiguous() for t in (*tensors, source, rows, text_rows, token_ids)]
    return _forward(*flat, _Maps(sources, sizes, modes), act or "", False, name)[0]  # type: ignore[call-arg, arg-type]


def _check_range(
    M: int,
    T: int,
    vocabulary: int,
    newline: Tensor | None,
    source: Tensor | None,
    rows: Tensor,
    text_rows: Tensor,
    token_ids: Tensor,
    resamples: Resamples,
) -> None:
    table = M + sum(cells.shape[0] * size[0] * size[1] for _, cells, size in resamples) + (newline is not None)
    for what, index, end in (
        ("rows", rows, T),
        ("text_rows", text_rows, T),
        ("token_ids", token_ids if text_rows.numel() else None, vocabulary),
        ("source", source, table),
    ):
        if index is not None and index.numel():
            low, high = (int(n) for n in index.aminmax())
            if low < 0 or high >= end:
                raise ValueError(f"{what} must be 0 to {end - 1}, got {low} to {high}")
