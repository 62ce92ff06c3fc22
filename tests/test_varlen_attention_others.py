"""flash_attn, xformers and torch behind varlen_attention: what they are called with, and their conventions, on stand-ins of theirs.

The stand-ins take the libraries' arguments, check them and answer with the reference; tests/gpu runs the libraries themselves.
"""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.attention.varlen  # before its ops are replaced
from torch import Tensor

from llava_fast.kernels import registry
from llava_fast.kernels import varlen_attention as op
from tests.test_varlen_attention import bounds, make

NAMES = ("flash_attn", "torch", "xformers")


def forward(q, k, v, cu_q, cu_k, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """out, and lse as the libraries have it: [H, T], infinity where nothing is seen."""
    out, lse = op._forward_reference(q, k, v, cu_q, cu_k, causal, None, None, None, scale)
    return out, lse.masked_fill(lse.isneginf(), torch.inf).T.contiguous()


def backward(grad, q, k, v, out, lse_HT, cu_q, cu_k, causal: bool, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    assert lse_HT.shape == (q.shape[1], q.shape[0]) and lse_HT.is_contiguous() and grad.is_contiguous()
    assert torch.equal(lse_HT, forward(q, k, v, cu_q, cu_k, causal, scale)[1])
    return op._backward_reference(grad, q, k, v, out, lse_HT.T, cu_q, cu_k, causal, None, None, None, scale)


def check_lengths(q, k, cu_q, cu_k, longest_q: int, longest_k: int) -> None:
    assert longest_q >= cu_q.diff().max() and longest_k >= cu_k.diff().max()


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    flash: Any = ModuleType("flash_attn.flash_attn_interface")

    def flash_forward(q, k, v, cu_q, cu_k, longest_q, longest_k, dropout_p, softmax_scale, causal):
        check_lengths(q, k, cu_q, cu_k, longest_q, longest_k)
        assert dropout_p == 0.0
        return *forward(q, k, v, cu_q, cu_k, causal, softmax_scale), None, None

    def flash_backward(dout, q, k, v, out, lse, dq, dk, dv, cu_q, cu_k, longest_q, longest_k, *, dropout_p, softmax_scale, causal, **rest):
        check_lengths(q, k, cu_q, cu_k, longest_q, longest_k)
        assert dropout_p == 0.0
        assert rest == dict(window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, deterministic=True)
        for to, grad in zip((dq, dk, dv), backward(dout, q, k, v, out, lse, cu_q, cu_k, causal, softmax_scale), strict=True):
            to.copy_(grad)

    flash._flash_attn_varlen_forward, flash._flash_attn_varlen_backward = flash_forward, flash_backward

    def torch_forward(q, k, v, cu_q, cu_k, longest_q, longest_k, dropout_p, is_causal, return_debug_mask, *, scale):
        check_lengths(q, k, cu_q, cu_k, longest_q, longest_k)
        assert dropout_p == 0.0 and not return_debug_mask
        return *forward(q, k, v, cu_q, cu_k, is_causal, scale), None, None, None

    def torch_backward(dout, q, k, v, out, lse, cu_q, cu_k, longest_q, longest_k, dropout_p, is_causal, seed, unused, *, scale):
        check_lengths(q, k, cu_q, cu_k, longest_q, longest_k)
        assert dropout_p == 0.0
        return backward(dout, q, k, v, out, lse, cu_q, cu_k, is_causal, scale)

    fmha: Any = ModuleType("xformers.ops.fmha")
    fmha.flash = SimpleNamespace(FwOp="forward", BwOp="backward")

    def mask(causal: bool) -> Any:
        return SimpleNamespace(from_seqlens=lambda q, k: (bounds(q), bounds(k), causal))

    biases: Any = ModuleType("xformers.ops.fmha.attn_bias")
    biases.BlockDiagonalCausalFromBottomRightMask, biases.BlockDiagonalMask = mask(True), mask(False)

    def xformers_forward(q, k, v, *, attn_bias, scale, op):
        assert op == "forward" and q.dim() == 4
        return tuple(x[None] for x in forward(q[0], k[0], v[0], *attn_bias, scale))

    def xformers_backward(grad, out, lse, q, k, v, *, attn_bias, scale, op):
        assert op == "backward" and q.dim() == 4
        return tuple(x[None] for x in backward(grad[0], q[0], k[0], v[0], out[0], lse[0], *attn_bias, scale))

    fmha.memory_efficient_attention_forward_requires_grad = xformers_forward
    fmha.memory_efficient_attention_backward = xformers_backward
    packages = [ModuleType(name) for name in ("flash_attn", "xformers", "xformers.ops")]
    for module in (*packages, flash, fmha, biases):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", torch_forward)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", torch_backward)


LENGTHS = {"rows": ([7, 1, 30], [7, 1, 30]), "last rows": ([7, 0, 1], [20, 3, 9]), "blind": ([5, 2], [3, 4]), "none": ([0], [4])}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("name", NAMES)
def test_calls(name: str, lengths: str, causal: bool, libraries: None) -> None:
    q, k, v, grad, cu_q, cu_k = make(*LENGTHS[lengths], 4, 4, 16)
    cu: Any = (cu_q, cu_k)
    indices: Any = (causal, None, None, None, 0.3)
    ours, our_backward = op._LAUNCHERS[name]
    expected, expected_lse = op._forward_reference(q, k, v, *cu, *indices)
    out, lse = ours(q, k, v, *cu, *indices)
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)
    assert out.is_contiguous() and lse.is_contiguous()
    grads = our_backward(grad, q, k, v, out, lse, *cu, *indices)
    for one, two in zip(grads, op._backward_reference(grad, q, k, v, out, lse, *cu, *indices), strict=True):
        assert torch.equal(one, two) and one.is_contiguous()
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, _ = op._varlen_attention(*leaves, *cu, *indices, name)
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(out, leaves, grad), grads, strict=True))


def test_torch_takes_these_arguments() -> None:
    """Its own schema, on tensors without data."""
    q, k, v, grad, *cu = (x.to("meta") for x in make([7, 3], [9, 3], 4, 2, 16, torch.bfloat16))
    indices = True, None, None, None, 0.3
    ours, our_backward = op._LAUNCHERS["torch"]
    out, lse = ours(q, k, v, *cu, *indices)
    assert (out.shape, lse.shape, lse.dtype) == (q.shape, (10, 4), torch.float32)
    assert [x.shape for x in our_backward(grad, q, k, v, out, lse, *cu, *indices)] == [x.shape for x in (q, k, v)]


@pytest.mark.parametrize("name", NAMES)
def test_what_they_serve(name: str, libraries: None) -> None:
    def resolve(dtype: torch.dtype = torch.bfloat16, d: int = 72, asked: str = "causal", device: str = "cuda") -> str:
        return registry.resolve_name("varlen_attention", device, dtype, (d, asked))

    assert resolve() == "reference"
    with registry.use(varlen_attention=name):
        assert resolve() == resolve(torch.float16, 256, "full lse") == name
        for refused in (
            dict(dtype=torch.float32),
            dict(d=75),
            dict(d=264),
            dict(device="cpu"),
            *[dict(asked=f"causal {word}") for word in ("q_index", "seqused_k", "prefix", "torch.float16")],
        ):
            with pytest.raises(ValueError, match=f"varlen_attention={name} was asked for but"):
                resolve(**refused)  # type: ignore[arg-type]
        if name == "xformers":
            with pytest.raises(ValueError, match="causal grouped"):
                resolve(asked="causal grouped")
        else:
            assert resolve(asked="causal grouped") == name
    q, k, v, _, *cu = make([3], [3], 2, 2, 8)
    with pytest.raises(ValueError, match="scale must not be negative .* got -1"):
        op._LAUNCHERS[name][0](q, k, v, *cu, True, None, None, None, -1.0)


@pytest.mark.parametrize("name", ["flash_attn", "xformers"])
def test_absent(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with registry.use(varlen_attention=name), pytest.raises(ValueError, match=f"{name}.* does not import"):
        registry.resolve_name("varlen_attention", "cuda", torch.bfloat16, (64, "causal"))
