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
from llava_fast.models.layers import LayerNorm, Linear


class PatchEmbedding(nn.Module):
    """Non-overlapping patches times a matrix: equal to the strided convolution whose weight [E, 3, p, p] is stored."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        p = config.patch_size
        self.weight = nn.Parameter(torch.empty(config.width, 3, p, p))
        self.bias = nn.Parameter(torch.empty(config.width)) if config.kind == "siglip" else None

    def forward(self, views: Tensor) -> Tensor:
        """views [N, 3, S, S] -> [N, grid^2, E]; the S % p rows and columns left over are not read (384 = 27 * 14 + 6)."""
        width, _, p, _ = self.weight.shape
        N, _, S, _ = views.shape
        grid = S // p
        patches = views[:, :, : grid * p, : grid * p].reshape(N, 3, grid, p, grid, p).permute(0, 2, 4, 1, 3, 5)
        weight = self.weight.reshape(width, -1).to(views.dtype)
        return F.linear(patches.reshape(N, grid * grid, -1), weight, None if self.bias is None else self.bias.to(views.dtype))


class Embeddings(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        if config.kind == "clip":
            self.class_embedding = nn.Parameter(torch.empty(config.width))
        self.patch_embedding = PatchEmbedding(config)
        self.position_embedding = nn.Embedding(config.positions, config.width)

    def forward(self, views: Tensor) -> Tensor:
        x_NPE = self.patch_embedding(views)
        if hasattr(self, "class_embedding"):
            x_NPE = torch.cat([self.class_embedding.to(x_NPE.dtype).expand(x_NPE.shape[0], 1, -1), x_NPE], dim=1)
        return x_NPE + self.position_embedding.weight.to(x_NPE.dtype)


class Attention(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.heads = config.heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (Linear(config.width, config.width) for _ in range(4))

    def forward(self, x_NPE: Tensor) -> Tensor:
        q, k, v = (proj(x_NPE).unflatten(-1, (self.heads, -1)).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.act = activation(config.act)
        self.fc1 = Linear(config.width, config.mlp_width)
        self.fc2 = Linear(config.mlp_width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Layer(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.layer_norm1 = LayerNorm(config.width, config.norm_eps)
        self.self_attn = Attention(config)
        self.layer_norm2 = LayerNorm(config.width, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x_NPE: Tensor) -> Tensor:
        x_NPE = x_NPE + self.self_attn(self.layer_norm1(x_NPE))
        return x_NPE + self.mlp(self.layer_norm2(x_NPE))


class Encoder(nn.Module):
    def __init__(self, config: VisionConfig, layers: int):
        super().__init__()
        self.layers = nn.ModuleList(Layer(config) for _ in range(layers))


class VisionTower(nn.Module):
    """Only the layers that run are here: what lies after the selected one (and the final norm) is carried by the checkpoint."""

    def __init__(self, config: LlavaConfig):
        super().__init__()
        vision = config.vision
        self.config = vision
        self.selected = config.selected
        self.drop_class = config.drop_class
        self.embeddings = Embeddings(vision)
        if vision.kind == "clip":
            self.pre_layrnorm = LayerNorm(vision.width, vision.norm_eps)  # transformers' spelling
        self.encoder = Encoder(vision, config.executed_layers)

    def forward(self, views: Tensor) -> Tensor:
        """views [N, 3, S, S], normalised -> features [N, P, E * number of selected layers]."""
        x_NPE = self.embeddings(views)
        if self.config.kind == "clip":
            x_NPE = self.pre_layrnorm(x_NPE)
        states = {0: x_NPE} if 0 in self.selected else {}
        for i, layer in enumerate(self.encoder.layers, start=1):
            x_NPE = layer(x_NPE)
            if i in self.selected:
                states[i] = x_NPE
        features = [states[i][:, 1:] if self.drop_class else states[i] for i in self.selected]
        return features[0] if len(features) == 1 else torch.cat(features, dim=-1)
