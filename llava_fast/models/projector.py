"""The projector: tower features to decoder width, pooled, cut and ordered by the batch's layout.

    mlp2x_gelu: linear_2(gelu(linear_1(x)))        linear (LLaVA v1): linear_1(x)

Shape letters: N views, P patches, E tower width, D decoder width, V visual rows, T rows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llava_fast.batch import Layout
from llava_fast.config import LlavaConfig
from llava_fast.kernels.activation import activation
from llava_fast.kernels.projector import project
from llava_fast.models.layers import Linear


class Projector(nn.Module):
    def __init__(self, config: LlavaConfig):
        super().__init__()
        features, width, bias = config.vision.width * len(config.feature_layers), config.decoder.width, config.projector_bias
        activation(config.projector_act)  # that it is one we have
        self.linear_1 = Linear(features, width, bias=bias)
        self.linear_2 = Linear(width, width, bias=bias) if config.projector == "mlp2x_gelu" else None
        self.act = None if self.linear_2 is None or config.projector_act == "linear" else config.projector_act

    def forward(self, features_NPE: Tensor, layout: Layout | None = None, newline_D: Tensor | None = None) -> Tensor:
        """features [N, P, E] -> visual rows [V, D] in the order of layout.rows; all N * P of them, in order, without a layout."""
        count = features_NPE.shape[0] * features_NPE.shape[1] if layout is None else layout.rows.shape[0]
        rows, none = torch.arange(count, device=features_NPE.device), self.linear_1.weight.new_empty(0, self.linear_1.out_features)
        layout = Layout(rows, rows[:0], None if layout is None else layout.source, () if layout is None else layout.resamples, 0)
        return self.embed(features_NPE, layout, newline_D, torch.zeros_like(rows), none)

    def embed(self, features_NPE: Tensor, layout: Layout, newline_D: Tensor | None, token_ids_T: Tensor, embedding_VD: Tensor) -> Tensor:
        """The packed embedding buffer [T, D]: visual rows from features [N, P, E], text rows from the embedding table."""
        first, second = self.linear_1, self.linear_2
        return project(
            features_NPE.flatten(0, 1),
            first.weight,
            first.bias,
            None if second is None else second.weight,
            None if second is None else second.bias,
            act=self.act,
            embedding=embedding_VD,
            token_ids=token_ids_T,
            rows=layout.rows,
            text_rows=layout.text_rows,
            source=layout.source,
            resamples=layout.resamples,
            newline=newline_D,
        )
