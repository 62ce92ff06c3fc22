"""Weight-only quantisation of a loaded model: the decoder's linears and the head, which are what a token is read from memory for.

The tower and the projector stay as they are: they are bound by arithmetic. The result answers differently from the checkpoint, is for
inference only, and is not saved.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from llava_fast.kernels.linear import Quantised, quantise
from llava_fast.models.layers import Linear

GROUPS: dict[str, int | None] = {"int8": None, "int4": 32, "fp8": None}  # columns that share a scale by default, None: the whole row


def is_quantised(model: Any) -> bool:
    return any(isinstance(getattr(module, "weight", None), Quantised) for module in model.modules())


def quantised_tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    """The numbers and scales of quantised weights, which are no parameters, by name."""
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Quantised):
            yield f"{name}.weight", weight.weight
            yield f"{name}.scale", weight.scale


@torch.no_grad()
def quantise_model(model: Any, kind: str, group: int | None = None, head: bool = True) -> None:
    """Replace the weights of the decoder's linears and (with `head`) of the head by `Quantised` ones, in place, a layer at a time.

    kind "int8", "int4" or "fp8" (e4m3); group: columns that share a scale, a multiple of 32; by default GROUPS. A head that is the
    embedding table gets a quantised copy for the product, and the table stays for look-ups. Afterwards those weights are no
    parameters: `save_pretrained` refuses the model, `lf.train` trains only adapters on it (with the head as it was, training/lora.py), and
    it stays on its device. Raises ValueError for another kind or
    group (before anything is replaced), and for a model that is quantised.
    """
    if kind not in GROUPS:
        raise ValueError(f"quantise must be one of {', '.join(GROUPS)}, got {kind!r}")
    if is_quantised(model):
        raise ValueError("the model is quantised already: load it anew")
    group = GROUPS[kind] if group is None else group
    for width in {linear.in_features for linear in model.language_model.modules() if isinstance(linear, Linear)}:
        quantise(torch.zeros(1, width), kind, group)  # raises for a group that does not fit
    for layer in model.language_model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        shared = (attention.q_proj, attention.k_proj, attention.v_proj), (mlp.gate_proj, mlp.up_proj)
        for parts in (
            *shared,
            (attention.o_proj,),
            (mlp.down_proj,),
        ):  # linears that share their input stay side by side in memory, so that they can be multiplied at once
            whole, start = quantise(torch.cat([part.weight for part in parts]), kind, group), 0
            for part in parts:
                del part.weight
                part.weight = whole.rows(slice(start, start + part.out_features))
                start += part.out_features
    if not head:
        return
    whole = quantise(model.head_weight, kind, group)
    if model.lm_head is None:
        model.quantised_head = whole
    else:
        del model.lm_head.weight
        model.lm_head.weight = whole
