"""The Triton kernels of varlen_attention, interpreted: small tiles, so that short sequences take every path of the tile loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from llava_fast.kernels import _varlen_attention_backward as backward
from llava_fast.kernels import _varlen_attention_triton as kernels
from llava_fast.kernels import registry
from llava_fast.kernels.varlen_attention import varlen_attention

TILES = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK": 16}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    def config(kernel: str, shape_class: str, default: dict[str, Any], device: torch.device) -> dict[str, Any]:
        return {name: TILES.get(name, value) for name, value in default.items()}

    monkeypatch.setattr(kernels, "config", config)
    monkeypatch.setattr(backward, "config", config)


def cu(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def allowed(
    cu_q: Tensor, cu_k: Tensor, keys: int, causal: bool, q_index: Tensor | None, used: Tensor | None, prefix: Tensor | None
) -> Tensor:
    """bool [T, K]: the definition, row by row."""
    mask = torch.zeros(int(cu_q[-1]), keys, dtype=torch.bool)
    for s in range(len(cu_q) - 1):
        first, own = int(cu_k[s]), int(cu_k[s + 1] - cu_k[s]) if used is None else int(used[s])
        n = int(cu_q[s + 1] - cu_q[s])
        for i, row in enumerate(range(int(cu_q[s]), int(cu_q[s + 1]))):
            place = own - n + i if q_index is None else int(q_index[row])
            mask[row, first : first + (max(0, min(place + 1, own)) if causal else own)] = True
            if prefix is not None:
                mask[row, int(prefix[s, 0]) : int(prefix[s, 1])] = True
    return mask


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention with the whole score matrix, in the inputs' dtype; (out, lse)."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = (torch.einsum("thd,khd->htk", q, k) * scale).masked_fill(~mask, -torch.inf)
    weights = scores.softmax(-1).nan_to_num(0.0)  # a row that sees no key
    return torch.einsum("htk,khd->thd", weights, v), scores.logsumexp(-1).T


def close(actual: Tensor, same: Tensor, truth: Tensor, what: str) -> None:
    """At most twice the error of torch in the same dtype, and a floor of 4 units in the last place of the largest value."""
    floor = 4 * torch.finfo(actual.dtype).eps * float(truth.abs().max().clamp_min(1e-2)) if truth.numel() else 0.0
    error, torchs = float((actual.double() - truth).abs().max()), float((same.double() - truth).abs().max())
    assert error <= 2 * torchs + floor, (what, error, torchs, floor)


PACK = dict(lengths_q=[37, 0, 1, 20], lengths_k=[37, 0, 1, 20])
CASES: dict[str, dict[str, Any]] = {
    "causal": PACK | dict(causal=True),
    "full": PACK | dict(causal=False, H=2),
    "wide": PACK | dict(causal=True, d=128),
    "d72": PACK | dict(causal=False, d=72),
    "d72 causal": PACK | dict(causal=True, d=72, H=2, G=1),
    "d80": PACK | dict(causal=True, d=80),
    "d96": PACK | dict(causal=False, d=96),
    "narrow": PACK | dict(causal=True, d=8),
    "groups": PACK | dict(causal=True, H=4, G=2),
    "last queries": dict(lengths_q=[5, 18, 0, 1], lengths_k=[33, 20, 7, 40], causal=True),
    "more queries than keys": dict(lengths_q=[40, 3], lengths_k=[18, 0], causal=True),
    "no keys": dict(lengths_q=[4, 20], lengths_k=[0, 17], causal=False),
    "q_index": dict(lengths_q=[4, 20, 1], lengths_k=[40, 19, 3], causal=True, index=True),
    "reserved": dict(lengths_q=[5, 18, 2], lengths_k=[40, 32, 20], causal=True, used=[37, 18, 0], d=72),
    "prefix": dict(lengths_q=[40, 5, 20, 0, 3], lengths_k=[40, 5, 20, 0, 3], causal=True, prefix=[0, 0, 0, 40, 0, 40, 0, 40, 7, 23]),
    "prefix full": dict(lengths_q=[33, 18, 7], lengths_k=[33, 18, 7], causal=False, prefix=[0, 0, 3, 33, 33, 33], H=2, G=1),
    "prefix, d72, q_index": dict(
        lengths_q=[3, 5, 2], lengths_k=[33, 18, 7], causal=True, index=True, prefix=[0, 0, 0, 33, 33, 45], d=72, H=2, G=1
    ),
    "prefix of reserved rows": dict(lengths_q=[4, 20], lengths_k=[50, 20], first_key=21, causal=True, used=[20, 20], prefix=[0, 0, 10, 35]),
}


def inputs(name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    case = CASES[name]
    generator = torch.Generator().manual_seed(3)
    cu_q, cu_k = cu(case["lengths_q"]), cu(case["lengths_k"]) + case.get("first_key", 0)
    d, H, G = case.get("d", 64), case.get("H", 1), case.get("G", case.get("H", 1))
    # Slices of one product, as the models hand them over.
    q = torch.randn(int(cu_q[-1]), (H + 2 * G) * d, generator=generator).to(dtype)[:, : H * d].unflatten(1, (H, d))
    kv = torch.randn(int(cu_k[-1]) + case.get("first_key", 0), (H + 2 * G) * d, generator=generator).to(dtype)
    k, v = (part.unflatten(1, (G, d)) for part in kv[:, H * d :].split(G * d, 1))
    index = None
    if case.get("index"):  # neither sorted nor unique
        index = torch.cat(
            [torch.randint(own, (n,), generator=generator) for n, own in zip(case["lengths_q"], case["lengths_k"], strict=True)]
        )
    used, prefix = case.get("used"), case.get("prefix")
    call = dict(
        cu_q=cu_q,
        cu_k=cu_k,
        causal=case["causal"],
        q_index=index,
        seqused_k=None if used is None else torch.tensor(used, dtype=torch.int32),
        prefix=None if prefix is None else torch.tensor(prefix, dtype=torch.int32).view(-1, 2),
        scale=0.7 * d**-0.5,
    )
    return q, k, v, call


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.float32) for name in CASES), *((name, torch.float16) for name in ("d72 causal", "prefix"))]
)
def test_equals_dense_attention(name: str, dtype: torch.dtype) -> None:
    q, k, v, call = inputs(name, dtype)
    grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(4)).to(dtype)
    mask = allowed(call["cu_q"], call["cu_k"], len(k), call["causal"], call["q_index"], call["seqused_k"], call["prefix"])
    if call["seqused_k"] is not None:  # rows of a cache that nobody has written
        k[~mask.any(0)], v[~mask.any(0)] = torch.nan, torch.nan
    out, lse = kernels.forward(q, k, v, **call)
    grads = backward.backward(grad, q, k, v, out, lse, **call)

    def reference(dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.nan_to_num(0.0).to(dtype).requires_grad_() for x in (q, k, v)]
        expected, expected_lse = dense(*leaves, mask, call["scale"])
        return [expected.detach(), expected_lse.detach(), *torch.autograd.grad(expected, leaves, grad.to(dtype))]

    truth, same = reference(torch.float64), reference(dtype)
    empty = ~mask.any(1)
    assert not out[empty].any() and bool((lse[empty] == -torch.inf).all())
    for what, actual, there, true in zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *grads), same, truth, strict=True):
        rows = ~empty if what == "lse" else slice(None)
        if what in ("dk", "dv"):
            assert not actual[~mask.any(0)].any(), what
        close(actual[rows], there[rows].nan_to_num(0.0), true[rows].nan_to_num(0.0), what)


def test_no_rows() -> None:
    q, k, call = torch.empty(0, 2, 64), torch.randn(5, 2, 64), dict(causal=True, q_index=None, seqused_k=None, prefix=None, scale=1.0)
    out, lse = kernels.forward(q, k, k, cu([0, 0]), cu([2, 3]), **call)
    grads = backward.backward(out, q, k, k, out, lse, cu([0, 0]), cu([2, 3]), **call)
    assert out.shape == (0, 2, 64) and lse.shape == (0, 2) and not grads[1].any() and not grads[2].any()


def test_through_the_public_function() -> None:
    """With its gradients, twice: bit-equal."""
    q, k, v, call = inputs("d72 causal", torch.float32)
    leaves = [x.contiguous().requires_grad_() for x in (q, k, v)]

    def run() -> list[Tensor]:
        out = varlen_attention(*leaves, call["cu_q"], call["cu_k"], scale=call["scale"])
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    expected = run()
    with registry.use(varlen_attention="triton"):
        found, again = run(), run()
    for x, y, z in zip(found, again, expected, strict=True):
        assert torch.equal(x, y)
        torch.testing.assert_close(x, z, rtol=1e-5, atol=1e-5)


def test_a_sequence_knows_nothing_of_its_neighbours() -> None:
    """Bit-equal alone and in a pack: no number depends on where a sequence lies."""
    q, k, v, call = inputs("d72 causal", torch.float32)
    grad = torch.ones_like(q).contiguous()
    out, lse = kernels.forward(q, k, v, **call)
    grads = backward.backward(grad, q, k, v, out, lse, **call)
    own = slice(int(call["cu_q"][3]), int(call["cu_q"][4]))
    alone = call | dict(cu_q=cu([20]), cu_k=cu([20]))
    out_alone, lse_alone = kernels.forward(q[own], k[own], v[own], **alone)
    grads_alone = backward.backward(grad[own], q[own], k[own], v[own], out_alone, lse_alone, **alone)
    for there, here in zip((out, lse, *grads), (out_alone, lse_alone, *grads_alone), strict=True):
        assert torch.equal(there[own], here)


@pytest.mark.parametrize(("d", "expected"), [(8, (16, 0)), (64, (64, 0)), (72, (64, 16)), (80, (64, 16)), (96, (64, 32)), (128, (128, 0))])
def test_split_of_the_head_dim(d: int, expected: tuple[int, int]) -> None:
    assert kernels.split_head_dim(d) == expected
