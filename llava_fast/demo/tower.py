"""The demo's tower, trained by itself as SigLIP is (arXiv 2303.15343): pictures against captions, a sigmoid a pair."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from llava_fast.models.llava import Llava

WIDTH = 64  # of the space that both sides are compared in


def train_tower(model: Llava, pictures: Sequence[Image.Image], captions: Sequence[str], seed: int, steps: int, batch: int = 64) -> float:
    """Train the tower of `model` in place; the share of the last steps' pictures whose own caption scored best in their batch.

    The text side is a bag of phrases; it is thrown away, as is the map of the tower's mean feature into the common space.
    """
    generator = torch.Generator().manual_seed(seed)
    side = model.config.vision.image_size
    views = torch.from_numpy(np.stack([np.asarray(picture.resize((side, side), Image.Resampling.BICUBIC)) for picture in pictures]))
    views = views.permute(0, 3, 1, 2).contiguous()
    phrases = sorted({phrase for caption in captions for phrase in caption.split(", ")})  # "red top left": a colour stays with its place
    ids = torch.tensor([[phrases.index(phrase) for phrase in caption.split(", ")] for caption in captions])

    def drawn(*shape: int, std: float) -> nn.Parameter:
        return nn.Parameter(torch.randn(*shape, generator=generator) * std)

    table, to_picture = drawn(len(phrases), WIDTH, std=1.0), drawn(model.config.vision.width, WIDTH, std=model.config.vision.width**-0.5)
    scale, shift = nn.Parameter(torch.tensor(2.3)), nn.Parameter(torch.tensor(-3.0))
    tower = list(model.vision_tower.parameters())
    model.requires_grad_(False)
    for parameter in tower:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW([*tower, table, to_picture, scale, shift], lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    best = []
    for step in range(steps):
        chosen = torch.randint(len(views), (batch,), generator=generator)
        shown = F.normalize(model.features(views[chosen]).mean(1) @ to_picture, dim=-1)
        said = F.normalize(table[ids[chosen]].sum(1), dim=-1)
        scores = shown @ said.T * scale.exp() + shift
        same = (ids[chosen][:, None] == ids[chosen][None]).all(-1)
        loss = -F.logsigmoid(torch.where(same, scores, -scores)).sum() / batch
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(tower, 1.0)
        optimizer.step()
        schedule.step()
        if step >= steps - 20:
            best.append(same[torch.arange(batch), scores.argmax(1)].float().mean().item())
    return sum(best) / len(best)
