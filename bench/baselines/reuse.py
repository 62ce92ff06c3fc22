"""What transformers lets a caller keep between prompts that show the same pictures: their features, or a cache of what prompts begin with.

Tensors as in its models: ids [B, T], features [rows, D] in reading order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache


def features(model: Any, pixels: Tensor) -> Tensor:
    """Projected rows of views [N, 3, H, W], all of them."""
    config = model.config
    how = dict(vision_feature_layer=config.vision_feature_layer, vision_feature_select_strategy=config.vision_feature_select_strategy)
    return torch.cat(list(model.model.get_image_features(pixel_values=pixels, **how).pooler_output))


def embeddings(model: Any, ids: Tensor, rows: Tensor) -> Tensor:
    """Of a prompt whose pictures' rows are known: what the model makes of ids and pixels, without the tower."""
    embeds = model.get_input_embeddings()(ids)
    at = (ids == model.config.image_token_id)[..., None].expand_as(embeds)
    return embeds.masked_scatter(at, rows.expand(len(ids), *rows.shape))


def prefill(model: Any, ids: Tensor, rows: Tensor) -> DynamicCache:
    """A cache of what prompts begin with."""
    kept = DynamicCache()
    model(inputs_embeds=embeddings(model, ids, rows), past_key_values=kept, use_cache=True, logits_to_keep=1)
    return kept


def questions(model: Any, tokenizer: Any, kept: DynamicCache, texts: Sequence[str], new: int) -> list[list[int]]:
    """Answers to several questions of one length on what `kept` holds for as many sequences; it is cropped again afterwards."""
    ids = tokenizer(list(texts), return_tensors="pt", add_special_tokens=False)["input_ids"]
    return decode(model, kept, ids, new, lambda logits: logits.argmax(-1))


def decode(model: Any, kept: DynamicCache, ids: Tensor, new: int, choose: Callable[[Tensor], Tensor]) -> list[list[int]]:
    """`new` tokens of each sequence after ids [B, T]; `choose` takes logits [B, V]. The cache is cropped again afterwards."""
    fed, tokens = 0, []
    for _ in range(new):
        fed += ids.shape[1]
        ids = choose(model(input_ids=ids, past_key_values=kept, use_cache=True, logits_to_keep=1).logits[:, -1])[:, None]
        tokens.append(ids)
    kept.crop(-fed)
    return torch.cat(tokens, 1).tolist()
