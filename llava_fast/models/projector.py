"""The projector: tower features to decoder width, pooled, cut and ordered by the batch's layout.

    mlp2x_gelu: linear_2(gelu(linear_1(x)))        linear (LLaVA v1): linear_1(x)

Average and bilinear pooling are linear with weights that sum to one, so they commute with linear_2: they run between the two
products, and linear_2 meets a quarter of the rows. Max pooling does not commute and runs last.
Shape letters: N views, P patches, E tower width, D decoder width, V visual rows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from llava_fast.batch import Layout
from llava_fast.config import LlavaConfig
from llava_fast.kernels.activation import activation
from llava_fast.kernels.spatial_pool import spatial_pool
from llava_fast.models.layers import Linear


class Projector(nn.Module):
    def __init__(self, config: LlavaConfig):
        super().__init__()
        features, width, bias = config.vision.width * len(config.feature_layers), config.decoder.width, config.projector_bias
        self.linear_1 = Linear(features, width, bias=bias)
        self.linear_2 = Linear(width, width, bias=bias) if config.projector == "mlp2x_gelu" else None
        self.act = activation(config.projector_act)

    def forward(self, features_NPE: Tensor, layout: Layout | None = None, newline_D: Tensor | None = None) -> Tensor:
        """features [N, P, E] -> visual rows [V, D] in the order of layout.rows; all N * P of them, in order, without a layout."""
        first, second = self.linear_1, self.linear_2
        table = first(features_NPE).flatten(0, 1)
        if second is None:
            return _arrange(table, layout, newline_D)
        table = self.act(table)
        if layout is None or layout.source is None:
            return second(table)
        if any(mode == "max" for mode, _, _ in layout.resamples):
            return _arrange(second(table), layout, newline_D)
        rows = second(_arrange(table, layout, torch.zeros_like(table[0])))
        if newline_D is not None:
            is_newline = layout.source == layout.source.new_tensor(_table_rows(table, layout))
            rows = torch.where(is_newline[:, None], newline_D.to(rows.dtype), rows)
        return rows


def _table_rows(table: Tensor, layout: Layout) -> int:
    """Rows of the feature table before its last one, the newline."""
    return table.shape[0] + sum(source.shape[0] * size[0] * size[1] for _, source, size in layout.resamples)


def _arrange(table: Tensor, layout: Layout | None, newline_D: Tensor | None) -> Tensor:
    """Resample, append the newline row, and take the rows that the layout asks for."""
    if layout is None or layout.source is None:
        return table
    parts = [table] + [spatial_pool(table, source, size, mode) for mode, source, size in layout.resamples]
    if newline_D is not None:
        parts.append(newline_D.to(table.dtype)[None])
    return torch.cat(parts).index_select(0, layout.source)
