"""What the kernel suites are timed against on a CPU, and the check that all of them compute the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Of the largest value: fp32 sums of another order; bf16 results of a reference that rounds in between, a few units in the last place.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2**-5}


def inductor(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile for the shapes at hand, with nothing left of what was compiled before: past eight versions of a function torch runs
    it eagerly, without a word."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False, fullgraph=True)


def check_agree(ours: Callable[[], Any], baselines: Mapping[str, Callable[[], Any]]) -> None:
    """AssertionError where a baseline's result (a tensor or several, each's largest error relative to its largest value) is another."""
    expected = _tensors(ours())
    for name, baseline in baselines.items():
        found = _tensors(baseline())
        assert len(found) == len(expected), f"{name} gives {len(found)} tensors, ours {len(expected)}"
        for i, (one, two) in enumerate(zip(expected, found, strict=True)):
            assert one.shape == two.shape, f"{name}, tensor {i}: shape {tuple(two.shape)}, ours {tuple(one.shape)}"
            error = float((one - two).abs().max()) / max(float(two.abs().max()), 1e-30)
            bound = max(TOLERANCE.get(one.dtype, 0.0), TOLERANCE.get(two.dtype, 0.0))  # whole numbers are equal
            assert error <= bound, f"{name}, tensor {i}: off by {error:.2e} of its largest value, at most {bound:.2e} expected"


def _tensors(result: Any) -> Sequence[Tensor]:
    return [result.detach()] if isinstance(result, Tensor) else [tensor.detach() for tensor in result]


def frozen_linear(weight: Tensor, x: Tensor) -> Callable[[Tensor], Tensor]:
    """x W^T under torch.compile, which may lay out a weight that will not change as its library likes best. Under torch.no_grad alone."""
    import torch._inductor.config as inductor_config  # 40 MB, which the processes that take chunked_loss alone do without

    module = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False).eval()
    module.weight = torch.nn.Parameter(weight, requires_grad=False)
    compiled = inductor(module)
    with inductor_config.patch(freezing=True):
        compiled(x)
    return compiled


# --- attention of packed rows [T, H, d], cu: bounds of the sequences


def sdpa_by_sample(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], causal: bool = True) -> Tensor:
    """A call a sequence: no padding, no mask."""
    parts = zip(*(x.split(list(lengths)) for x in (q, k, v)), strict=True)
    outs = [F.scaled_dot_product_attention(*(x[None].transpose(1, 2) for x in part), is_causal=causal, enable_gqa=True) for part in parts]
    return torch.cat([out[0].transpose(0, 1) for out in outs])


def sdpa_masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """One call with a mask [T, T], as transformers has it for a packed row."""
    out = F.scaled_dot_product_attention(*(x[None].transpose(1, 2) for x in (q, k, v)), attn_mask=mask, enable_gqa=True)
    return out[0].transpose(0, 1)


def packed_mask(lengths: Sequence[int]) -> Tensor:
    return torch.block_diag(*(torch.ones(n, n).tril() for n in lengths)).bool()


def flex_packed(lengths: Sequence[int], causal: bool = True) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """FlexAttention, compiled, with the pack's block mask, which is made here and not when it is called. Forward only on a CPU."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))

    def sees(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        own = sequence[row] == sequence[key]
        return own & (row >= key) if causal else own

    T = int(sum(lengths))
    mask = create_block_mask(sees, None, None, T, T, device="cpu")
    compiled = inductor(flex_attention)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = compiled(*(x[None].transpose(1, 2) for x in (q, k, v)), block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
        return out[0].transpose(0, 1)

    return run


# --- loss of label rows


def label_rows_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), labels)


def chunked_loss(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int = 256) -> Tensor:
    """A chunk's logits exist at a time; the backward pass makes them again."""
    from torch.utils.checkpoint import checkpoint

    def part(hidden: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="sum")

    parts = zip(hidden.split(chunk), labels.split(chunk), strict=True)
    return torch.stack([checkpoint(part, *each, use_reentrant=False) for each in parts]).sum() / len(labels)
