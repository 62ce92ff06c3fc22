"""The vision tower: SigLIP or CLIP, up to the layer whose output is used. Parameters are named as in transformers.

Shape letters: N views, P rows a view (patches, and a class row in CLIP), E tower width, H heads, d head dim, K = 3 * patch^2.
Sources: arXiv 2303.15343 (SigLIP), 2103.00020 (CLIP); transformers' modeling_siglip.py and modeling_clip.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llava_fast.config import LlavaConfig, VisionConfig
from llava_fast.kernels.activation import activation
from llava_fast.kernels.linear import linear
from llava_fast.kernels.patchify import patchify
from llava_fast.kernels.varlen_attention import varlen_attention
from llava_fast.models.layers import Checkpointing, LayerNorm, Linear, call_linear, join, joined_linear, run_block

Normalisation = tuple[tuple[float, ...], tuple[float, ...], float]  # mean, std and factor of uint8 views


class PatchEmbedding(nn.Module):
    """Non-overlapping patches times a matrix: equal to the strided convolution whose weight [E, 3, p, p] is stored."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        p = config.patch_size
        self.weight = nn.Parameter(torch.empty(config.width, 3, p, p))
        self.bias = nn.Parameter(torch.empty(config.width)) if config.kind == "siglip" else None

    def forward(self, views: Tensor, normalisation: Normalisation, dtype: torch.dtype) -> Tensor:
        """views [N, 3, S, S] -> [N, grid^2, E]; the S % p rows and columns left over are not read (384 = 27 * 14 + 6)."""
        width, _, p, _ = self.weight.shape
        patches_NPK = patchify(views, p, *normalisation, dtype=dtype)
        weight = self.weight.reshape(width, -1)
        return linear(patches_NPK, F.pad(weight, (0, patches_NPK.shape[-1] - weight.shape[1])), self.bias)


class Embeddings(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        if config.kind == "clip":
            self.class_embedding = nn.Parameter(torch.empty(config.width))
        self.patch_embedding = PatchEmbedding(config)
        self.position_embedding = nn.Embedding(config.positions, config.width)

    def forward(self, views: Tensor, normalisation: Normalisation, dtype: torch.dtype) -> Tensor:
        x_NPE = self.patch_embedding(views, normalisation, dtype)
        if hasattr(self, "class_embedding"):
            x_NPE = torch.cat([self.class_embedding.to(x_NPE.dtype).expand(x_NPE.shape[0], 1, -1), x_NPE], dim=1)
        return x_NPE + self.position_embedding.weight.to(x_NPE.dtype)


class Attention(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.heads = config.heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (Linear(config.width, config.width) for _ in range(4))

    def forward(self, x_TE: Tensor, cu_seqlens: Tensor) -> Tensor:
        q, k, v = joined_linear(x_TE, (self.q_proj, self.k_proj, self.v_proj)).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        return call_linear(self.out_proj, varlen_attention(q, k, v, cu_seqlens, cu_seqlens, causal=False).flatten(-2))


class MLP(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.act = config.act
        activation(config.act)  # raises for one that is not known
        self.fc1 = Linear(config.width, config.mlp_width)
        self.fc2 = Linear(config.mlp_width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return call_linear(self.fc2, call_linear(self.fc1, x, self.act))


class Layer(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.layer_norm1 = LayerNorm(config.width, config.norm_eps)
        self.self_attn = Attention(config)
        self.layer_norm2 = LayerNorm(config.width, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x_TE: Tensor, residual_TE: Tensor | None, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
        """The state of the rows is x + residual, on both sides: the sum is made where the next norm reads it."""
        if residual_TE is None:
            normed, residual_TE = self.layer_norm1(x_TE), x_TE
        else:
            normed, residual_TE = self.layer_norm1.add(x_TE, residual_TE)
        normed, residual_TE = self.layer_norm2.add(self.self_attn(normed, cu_seqlens), residual_TE)
        return self.mlp(normed), residual_TE


class Encoder(nn.Module):
    def __init__(self, config: VisionConfig, layers: int):
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(layers))


class VisionTower(nn.Module):
    """Only the layers that run are here: what lies after the selected one (and the final norm) is carried by the checkpoint.

    checkpointing: of the layers, where the tower is trained.
    """

    def __init__(self, config: LlavaConfig):
        super().__init__()
        self.checkpointing: Checkpointing = "none"
        vision = config.vision
        self.config = vision
        self.selected = config.selected
        self.drop_class = config.drop_class
        self.embeddings = Embeddings(vision)
        if vision.kind == "clip":
            self.pre_layrnorm = LayerNorm(vision.width, vision.norm_eps)  # transformers' spelling
        self.encoder = Encoder(vision, config.executed_layers)

    def join(self) -> None:
        """Put the weights of each layer into one buffer, those of q, k and v side by side."""
        for layer in self.encoder.layers:
            assert isinstance(layer, Layer)
            attention, mlp = layer.self_attn, layer.mlp
            join(((attention.q_proj, attention.k_proj, attention.v_proj), (attention.out_proj,), (mlp.fc1,), (mlp.fc2,)))

    def forward(self, views: Tensor, normalisation: Normalisation, dtype: torch.dtype) -> Tensor:
        """views [N, 3, S, S], uint8 or already normalised -> features [N, P, E * number of selected layers] in `dtype`."""
        x_NPE = self.embeddings(views, normalisation, dtype)
        if self.config.kind == "clip":
            x_NPE = self.pre_layrnorm(x_NPE)
        N, P, _ = x_NPE.shape
        cu_seqlens = torch.arange(0, (N + 1) * P, P, dtype=torch.int32, device=views.device)
        x_TE: Tensor = x_NPE.flatten(0, 1)
        residual_TE: Tensor | None = None
        states = {0: x_TE} if 0 in self.selected else {}
        for i, layer in enumerate(self.encoder.layers, start=1):
            x_TE, residual_TE = run_block(layer, self.checkpointing, x_TE, residual_TE, cu_seqlens)
            if i in self.selected:
                assert residual_TE is not None
                states[i] = x_TE + residual_TE
        features = [states[i].unflatten(0, (N, P))[:, int(self.drop_class) :] for i in self.selected]  # N may be 0
        return features[0] if len(features) == 1 else torch.cat(features, dim=-1)
