"""The tower and the decoder of a transformers model in OpenVINO, on the CPU (`pip install -e '.[openvino]'`).

The decoder keeps its keys and values as states, which is what the CPU plugin's attention is fastest with; bf16 or weights of 8 and 4 bits
where asked. Without the package `available()` is False, and a row has no such side.
"""

from __future__ import annotations

import importlib.util
import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def available(compressed: bool = False) -> bool:
    """compressed: with nncf, which narrows weights."""
    return all(importlib.util.find_spec(name) is not None for name in ("openvino", "nncf")[: 1 + compressed])


class Tower(nn.Module):
    """Pixels [N, 3, S, S] -> last hidden states before the last norm [N, P, E]."""

    def __init__(self, tower: nn.Module):
        super().__init__()
        self.tower = getattr(tower, "vision_model", tower)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.tower.embeddings(pixels)
        x = self.tower.pre_layrnorm(x) if hasattr(self.tower, "pre_layrnorm") else x  # CLIP's, spelt as in transformers
        for layer in self.tower.encoder.layers:
            x = layer(x, None)
            x = x[0] if isinstance(x, tuple) else x
        return x


class Decoder(nn.Module):
    """Embeddings [B, T, D], their positions [T] with cosines and sines [T, d], the order of the sequences in the states [B], and the past
    keys and values of each layer [B, G, K, d] -> logits of the last row [B, V], then the states with the new rows. Qwen2 or Llama.

    Cosines come from outside: made in bf16, those of position 1,500 are another position's.
    """

    def __init__(self, model: Any):
        super().__init__()
        language = model.model.language_model
        self.layers, self.norm, self.head = language.layers, language.norm, model.lm_head

    def forward(self, x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, order: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        mask = torch.arange(past[0].shape[2] + x.shape[1])[None] <= positions[:, None]
        states = []
        for i, layer in enumerate(self.layers):
            attention, normed = layer.self_attn, layer.input_layernorm(x)
            q, k, v = (
                project(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
                for project in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            q, k = (rows * cos + turned(rows) * sin for rows in (q, k))
            k, v = (torch.cat([old.index_select(0, order), new], 2) for old, new in zip(past[2 * i : 2 * i + 2], (k, v), strict=True))
            states += [k, v]
            groups = attention.num_key_value_groups
            keys, values = (k, v) if groups == 1 else (each.repeat_interleave(groups, 1) for each in (k, v))
            y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask[None, None])
            x = x + attention.o_proj(y.transpose(1, 2).flatten(2))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return self.head(self.norm(x[:, -1])), *states


def turned(rows: Tensor) -> Tensor:
    low, high = rows.chunk(2, -1)
    return torch.cat([-high, low], -1)


def compiled(graph: Any, precision: str) -> Any:
    """precision: 'f32' or 'bf16', of arithmetic and states."""
    import openvino

    settings = {
        "INFERENCE_PRECISION_HINT": precision,
        "KV_CACHE_PRECISION": precision,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    return openvino.Core().compile_model(graph, "CPU", settings)


@torch.inference_mode()
def tower_graph(model: Any) -> Any:
    """Of pixels [N, 3, S, S]."""
    import openvino

    size = model.config.vision_config.image_size
    return openvino.convert_model(
        Tower(model.model.vision_tower), example_input=(torch.zeros(1, 3, size, size),), input=[(-1, 3, size, size)]
    )


def tower(graph: Any, precision: str) -> Callable[[Tensor], Tensor]:
    """run(pixels) -> features [N, P, E]."""
    run = compiled(graph, precision)
    return lambda pixels: torch.from_numpy(run(pixels.numpy())[0])


@torch.inference_mode()
def decoder_graph(model: Any, weights: str = "f32") -> Any:
    """weights: 'f32', or 'int8' and 'int4' (groups of 64), narrowed by nncf."""
    import openvino
    from openvino._offline_transformations import apply_make_stateful_transformation

    text = model.config.text_config
    heads, d = text.num_key_value_heads, text.hidden_size // text.num_attention_heads
    past = [torch.zeros(1, heads, 3, d) for _ in range(2 * text.num_hidden_layers)]
    order = torch.zeros(1, dtype=torch.int64)
    example = (torch.zeros(1, 2, text.hidden_size), torch.arange(3, 5), torch.zeros(2, d), torch.zeros(2, d), order, *past)
    graph = openvino.convert_model(Decoder(model).eval(), example_input=example)
    shapes = [(-1, -1, text.hidden_size), (-1,), (-1, d), (-1, d), (-1,), *[(-1, heads, -1, d)] * len(past)]
    graph.reshape({port: openvino.PartialShape(list(shape)) for port, shape in zip(graph.inputs, shapes, strict=True)})
    names = {}
    for i, port in enumerate(graph.inputs[5:]):
        port.get_tensor().set_names({f"past_{i:03}"})
        graph.outputs[1 + i].get_tensor().set_names({f"present_{i:03}"})
        names[f"past_{i:03}"] = f"present_{i:03}"
    apply_make_stateful_transformation(graph, names)
    if weights == "f32":
        return graph
    import nncf

    if weights == "int8":
        return nncf.compress_weights(graph, mode=nncf.CompressWeightsMode.INT8_ASYM)
    return nncf.compress_weights(graph, mode=nncf.CompressWeightsMode.INT4_SYM, group_size=64, ratio=1.0)


class Session:
    """A compiled decoder with its states."""

    def __init__(self, model: Any, graph: Any, precision: str):
        self.request = compiled(graph, precision).create_infer_request()
        language = model.model.language_model
        self.embed, self.rotary = language.embed_tokens, language.rotary_emb

    def rows(self, x: Tensor, first: int) -> Tensor:
        """Logits of the last of the rows [B, T, D] at positions first, first + 1, ...; their keys and values join the states."""
        positions = torch.arange(first, first + x.shape[1])
        tables = (table[0].numpy() for table in self.rotary(x, positions[None]))
        given = [x.numpy(), positions.numpy(), *tables, torch.arange(x.shape[0]).numpy()]
        return torch.from_numpy(self.request.infer(given)[0])

    def prefill(self, x: Tensor) -> Tensor:
        """Of [T, D] from empty states: [1, V]."""
        self.request.reset_state()
        return self.rows(x[None], 0)

    def decoding(self, keys: Sequence[Tensor], values: Sequence[Tensor], token: Tensor) -> Callable[[], Tensor]:
        """step() -> logits [B, V] of `token` [B] after the past [B, G, K, d] of each layer. A step's rows stay: the context grows by one
        with each."""
        import openvino

        self.request.reset_state()
        places = {}
        for state in self.request.query_state():
            places[int(re.findall(r"past_(\d+)", state.name)[0])] = state
        for i, past in enumerate(each for pair in zip(keys, values, strict=True) for each in pair):
            places[i].state = openvino.Tensor(past.contiguous().numpy())
        count = itertools.count(keys[0].shape[2])
        return lambda: self.rows(self.embed(token)[:, None], next(count))
