"""The decoder over packed rows: Qwen2 or Llama. Parameters are named as in transformers.

Shape letters: T rows, K key rows, R needed rows, S sequences, D width, H heads, G key-value heads, d head dim, F MLP width.
Sources: transformers' modeling_qwen2.py and modeling_llama.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llava_fast.config import DecoderConfig
from llava_fast.kernels.activation import swiglu
from llava_fast.kernels.paged_attention import paged_attention
from llava_fast.kernels.rope import rope, rope_into_cache, rope_qk, rope_tables
from llava_fast.kernels.varlen_attention import varlen_attention
from llava_fast.models.layers import Checkpointing, Linear, RMSNorm, call_linear, join, joined_linear, run_block
from llava_fast.models.sequence import Split, split_attention


@dataclass
class KVCache:
    """Keys and values of every layer in pages, [layers, B, page, G, d], and where the rows of a step go and look.

    block_table: int32 [S, blocks], the pages of each sequence in order.  slots: int64 [T], the row (block * page + offset) that each row's
    key and value are written to.  lengths: int32 [S], the keys of each sequence once they are written, this step's among them.
    """

    k: Tensor
    v: Tensor
    block_table: Tensor
    slots: Tensor
    lengths: Tensor


@dataclass(frozen=True)
class Queries:
    """Which rows ask, and what they may see: made once a step and shared by all layers. With a cache, cu_seqlens_q alone is read.

    split: where this is part of a row; the others are of the whole one.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    q_index: Tensor | None
    prefix: Tensor | None
    split: Split | None = None


def inverse_frequencies(config: DecoderConfig, device: torch.device) -> tuple[Tensor, float]:
    """fp32 [d/2] and the factor on cos and sin; the scaled kinds are computed by transformers."""
    kind = config.rope.get("rope_type", "default")
    if kind == "default":
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64, device=device).to(torch.float32) / config.head_dim
        return 1.0 / (config.rope["rope_theta"] ** exponents), 1.0
    from transformers import LlamaConfig

    hf = LlamaConfig(
        hidden_size=config.heads * config.head_dim,
        num_attention_heads=config.heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_positions,
        rope_parameters=config.rope,
    )
    inv_freq, scaling = ROPE_INIT_FUNCTIONS[kind](hf, device)
    return inv_freq, scaling


class Attention(nn.Module):
    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.head_dim, self.heads, self.kv_heads = config.head_dim, config.heads, config.kv_heads
        self.q_proj = Linear(config.width, config.heads * config.head_dim, bias=config.qkv_bias)
        self.k_proj = Linear(config.width, config.kv_heads * config.head_dim, bias=config.qkv_bias)
        self.v_proj = Linear(config.width, config.kv_heads * config.head_dim, bias=config.qkv_bias)
        self.o_proj = Linear(config.heads * config.head_dim, config.width, bias=config.out_bias)

    def forward(
        self,
        x_TD: Tensor,
        tables: tuple[Tensor, Tensor],
        queries: Queries,
        needed_R: Tensor | None,
        cache: tuple[Tensor, Tensor, KVCache] | None,
    ) -> Tensor:
        """Keys and values for every row; queries and the output for the needed ones."""
        cos, sin = tables
        if needed_R is None:
            heads = joined_linear(x_TD, (self.q_proj, self.k_proj, self.v_proj)).unflatten(-1, (-1, self.head_dim))
            q, k, v = heads.split((self.heads, self.kv_heads, self.kv_heads), dim=-2)
        else:
            q = call_linear(self.q_proj, x_TD[needed_R]).unflatten(-1, (-1, self.head_dim))
            k, v = joined_linear(x_TD, (self.k_proj, self.v_proj)).unflatten(-1, (-1, self.head_dim)).chunk(2, dim=-2)
        if cache is not None:
            cached_k, cached_v, state = cache
            if needed_R is None:
                q = rope_into_cache(q, k, v, cos, sin, cached_k, cached_v, state.slots)
            else:
                rope_into_cache(k[:, :0], k, v, cos, sin, cached_k, cached_v, state.slots)
                q = rope(q, cos[needed_R], sin[needed_R])
            out = paged_attention(q, cached_k, cached_v, state.block_table, queries.cu_seqlens_q, state.lengths)
            return call_linear(self.o_proj, out.flatten(-2))
        if needed_R is None:
            q, k = rope_qk(q, k, cos, sin)
        else:
            q, k = rope(q, cos[needed_R], sin[needed_R]), rope(k, cos, sin)
        lengths, places = (queries.cu_seqlens_q, queries.cu_seqlens_k), (queries.q_index, queries.prefix)
        if queries.split is None:
            out = varlen_attention(q, k, v, *lengths, q_index=places[0], prefix=places[1])
        else:
            out = split_attention(q, k, v, queries.split, needed_R is not None, *lengths, *places)
        return call_linear(self.o_proj, out.flatten(-2))


class MLP(nn.Module):
    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.gate_proj = Linear(config.width, config.mlp_width, bias=config.mlp_bias)
        self.up_proj = Linear(config.width, config.mlp_width, bias=config.mlp_bias)
        self.down_proj = Linear(config.mlp_width, config.width, bias=config.mlp_bias)

    def forward(self, x_TD: Tensor) -> Tensor:
        return call_linear(self.down_proj, swiglu(joined_linear(x_TD, (self.gate_proj, self.up_proj))))


class Layer(nn.Module):
    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.width, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.width, config.norm_eps)
        self.mlp = MLP(config)

    def forward(
        self,
        x_TD: Tensor,
        residual_TD: Tensor | None,
        tables: tuple[Tensor, Tensor],
        queries: Queries,
        needed_R: Tensor | None = None,
        cache: tuple[Tensor, Tensor, KVCache] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The state of the row is x + residual, on both sides: the sum is made where the next norm reads it."""
        if residual_TD is None:
            normed, residual_TD = self.input_layernorm(x_TD), x_TD
        else:
            normed, residual_TD = self.input_layernorm.add(x_TD, residual_TD)
        attended = self.self_attn(normed, tables, queries, needed_R, cache)
        if needed_R is not None:
            residual_TD = residual_TD[needed_R]
        normed, residual_TD = self.post_attention_layernorm.add(attended, residual_TD)
        return self.mlp(normed), residual_TD


class Decoder(nn.Module):
    """checkpointing: of the layers but the last, whose activations the backward pass wants first of all."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.checkpointing: Checkpointing = "none"
        if config.act != "silu":
            raise ValueError(f"the decoder's hidden_act must be 'silu', got {config.act!r}")
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self._frequencies: dict[torch.device, tuple[Tensor, float]] = {}  # made at first use: on the meta device they would be nothing

    def join(self) -> None:
        """Put the weights of each layer into one buffer, those that share an input side by side: q, k and v; gate and up."""
        for layer in self.layers:
            assert isinstance(layer, Layer)
            attention, mlp = layer.self_attn, layer.mlp
            qkv = (attention.q_proj, attention.k_proj, attention.v_proj)
            join((qkv, (attention.o_proj,), (mlp.gate_proj, mlp.up_proj), (mlp.down_proj,)))

    def forward(
        self,
        x_TD: Tensor,
        positions_T: Tensor,
        cu_seqlens: Tensor,
        prefix: Tensor | None = None,
        needed_R: Tensor | None = None,
        cache: KVCache | None = None,
        split: Split | None = None,
    ) -> Tensor:
        """Normalised last hidden states [R, D] of the needed rows (all T where needed_R, sorted, is None).

        The last layer works on the needed rows alone, save its keys and values; the result is that of working on all.
        With a cache, the rows of a sequence follow what the cache holds of it, and the needed ones are its last.
        With a split, the rows are part of a longer row, which cu_seqlens and prefix describe; needed_R is of the part.
        """
        return self.run(x_TD, self.tables(positions_T, x_TD.dtype), cu_seqlens, prefix, needed_R, cache, split)

    def tables(self, positions_T: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin of the rows, each [T, d/2]."""
        if positions_T.device not in self._frequencies:
            self._frequencies[positions_T.device] = inverse_frequencies(self.config, positions_T.device)
        return rope_tables(positions_T, *self._frequencies[positions_T.device], dtype)

    def run(
        self,
        x_TD: Tensor,
        tables: tuple[Tensor, Tensor],
        cu_seqlens: Tensor,
        prefix: Tensor | None = None,
        needed_R: Tensor | None = None,
        cache: KVCache | None = None,
        split: Split | None = None,
    ) -> Tensor:
        """`forward`, with the rows' cos and sin in place of their positions."""
        queries = Queries(cu_seqlens, cu_seqlens, None, prefix, split)
        last = queries if needed_R is None else _narrow(queries, cu_seqlens, needed_R if split is None else split.needed_rows)
        residual_TD: Tensor | None = None
        for i, layer in enumerate(self.layers):
            final = i == len(self.layers) - 1
            state = None if cache is None else (cache.k[i], cache.v[i], cache)
            given = (x_TD, residual_TD, tables, last if final else queries, needed_R if final else None, state)
            x_TD, residual_TD = run_block(layer, "none" if final else self.checkpointing, *given)
        assert residual_TD is not None, "a decoder has layers"
        return self.norm.add(x_TD, residual_TD)[0]


def _narrow(queries: Queries, cu_seqlens: Tensor, needed_R: Tensor) -> Queries:
    """The same sequences asked by a sorted subset of their rows."""
    bounds = torch.searchsorted(needed_R, cu_seqlens.to(needed_R.dtype)).to(torch.int32)
    sequence = torch.searchsorted(cu_seqlens[1:].to(needed_R.dtype), needed_R, right=True)
    return Queries(bounds, queries.cu_seqlens_k, needed_R - cu_seqlens[sequence], queries.prefix, queries.split)
