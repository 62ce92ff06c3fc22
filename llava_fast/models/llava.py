"""The model over packed rows: tower, projector, decoder, head.

Shape letters: T rows, R needed rows, L label rows, N views, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llava_fast.batch import PackedBatch
from llava_fast.config import LlavaConfig
from llava_fast.kernels.linear import Quantised, linear
from llava_fast.kernels.linear_cross_entropy import linear_cross_entropy
from llava_fast.models.decoder import Decoder, KVCache
from llava_fast.models.projector import Projector
from llava_fast.models.vision import VisionTower

VIEWS_A_PASS = 8  # views in the tower at a time without gradients: bounds its activations (12.5 MB a view for so400m's MLP in fp32)


class Llava(nn.Module):
    """Parameters are named as in transformers' LlavaForConditionalGeneration without its leading 'model.'.

    image_mean, image_std, image_rescale: how uint8 views are normalised.
    Set by checkpoint.load, for those above: input_spec, what inputs need; generation_config; carried, tensors of the checkpoint that
    nothing runs; sidecar, its other files by name, saved back unchanged.
    views_a_pass: in the tower without gradients; None: all of them, so that processes that share its weights make as many passes.
    looked_up: where it is a list, the embedding table has no gradient from the rows it gives: `embed` adds (ids, rows) to the list, and
    whoever made it adds the rows' gradients to the table's.
    """

    input_spec: Any
    generation_config: Any
    carried: dict[str, Tensor]
    sidecar: dict[str, bytes]

    def __init__(self, config: LlavaConfig):
        super().__init__()
        self.config = config
        self.carried, self.sidecar = {}, {}
        self.looked_up: list[tuple[Tensor, Tensor]] | None = None
        self.views_a_pass: int | None = VIEWS_A_PASS
        self.image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
        self.image_std: tuple[float, ...] = (0.5, 0.5, 0.5)
        self.image_rescale: float = 1 / 255
        self.vision_tower = VisionTower(config)
        self.multi_modal_projector = Projector(config)
        self.language_model = Decoder(config.decoder)
        self.lm_head = None if config.decoder.tied else nn.Linear(config.decoder.width, config.decoder.vocab_size, bias=False)
        self.quantised_head: Quantised | None = None  # of a head that is the embedding table
        self.image_newline = nn.Parameter(torch.empty(config.decoder.width)) if config.has_newline else None

    def join(self) -> None:
        """Put weights that share an input side by side in memory, so that they are multiplied at once; after loading or moving them."""
        self.vision_tower.join()
        self.language_model.join()

    def _apply(self, fn: Any, recurse: bool = True) -> Llava:
        if any(isinstance(getattr(m, "weight", None), Quantised) for m in self.language_model.modules()):  # they would stay behind
            here, there = self.device, fn(torch.empty(0, device=self.device)).device
            if here != there:
                raise ValueError(f"a quantised model stays on {here}, got {there}: load it there, with device={str(there)!r}")
        super()._apply(fn, recurse)  # `.to()` and the like give every parameter a storage of its own
        self.join()
        return self

    @property
    def head_weight(self) -> Tensor | Quantised:
        """[V, D]"""
        if self.quantised_head is not None:
            return self.quantised_head
        return self.language_model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    @property
    def device(self) -> torch.device:
        return self.language_model.embed_tokens.weight.device

    @property
    def stored_dtype(self) -> torch.dtype:
        return self.language_model.embed_tokens.weight.dtype

    @property
    def compute_dtype(self) -> torch.dtype:
        """The stored dtype on a device; at least fp32 on the CPU, where bf16 weights are widened as they are read."""
        stored = self.stored_dtype
        return torch.promote_types(stored, torch.float32) if self.device.type == "cpu" else stored

    def features(self, views: Tensor) -> Tensor:
        """views [N, 3, S, S], uint8 or normalised float -> tower features [N, P, E]."""
        size = self.config.vision.image_size
        if tuple(views.shape[1:]) != (3, size, size):
            raise ValueError(f"views must be [N, 3, {size}, {size}], got {list(views.shape)}")
        views = views if views.dtype == torch.uint8 else views.to(self.compute_dtype)
        options = ((self.image_mean, self.image_std, self.image_rescale), self.compute_dtype)
        if torch.is_grad_enabled() and (views.requires_grad or any(p.requires_grad for p in self.vision_tower.parameters())):
            return self.vision_tower(views, *options)
        with torch.no_grad():  # a frozen tower in training too: nothing of it is kept for a backward pass
            at_once = self.views_a_pass or max(1, views.shape[0])
            return torch.cat([self.vision_tower(chunk, *options) for chunk in views.split(at_once)])

    def embed(self, batch: PackedBatch) -> Tensor:
        """The packed embedding buffer [T, D]: text rows looked up, visual rows written by the projector."""
        weight, ids = self.language_model.embed_tokens.weight, batch.token_ids
        if self.looked_up is not None and torch.is_grad_enabled() and weight.requires_grad:
            text = ids if batch.layout is None else ids[batch.layout.text_rows]
            weight = weight.detach()[text].requires_grad_()
            self.looked_up.append((text, weight))
            if batch.layout is None:
                return weight.to(self.compute_dtype)
            ids = torch.zeros_like(ids).index_copy(0, batch.layout.text_rows, torch.arange(text.shape[0], device=ids.device))
        if batch.layout is None:
            return weight[ids].to(self.compute_dtype)
        return self.multi_modal_projector.embed(self.features_of(batch), batch.layout, self.image_newline, ids, weight)

    def features_of(self, batch: PackedBatch) -> Tensor:
        """[N, P, E] of a batch with pictures: those it brings, and the tower's of the views it brings."""
        if batch.features is None or batch.views is not None:
            assert batch.views is not None
            made = self.features(batch.views)
            return made if batch.features is None else batch.features.rows.index_copy(0, batch.features.missing, made)
        return batch.features.rows

    def hidden(self, batch: PackedBatch, cache: KVCache | None = None, embeds: Tensor | None = None) -> Tensor:
        """Last hidden states [R, D] of batch.needed_rows; writes keys and values to `cache` where one is given."""
        x_TD = self.embed(batch) if embeds is None else embeds
        needed = None if batch.needed_rows.shape[0] == batch.num_tokens and batch.split is None else batch.needed_rows
        return self.language_model(x_TD, batch.positions, batch.cu_seqlens, batch.prefix, needed, cache, batch.split)

    def logits(self, hidden_RD: Tensor) -> Tensor:
        """[R, V], fp32 (fp64 for fp64 weights)."""
        return linear(hidden_RD, self.head_weight).to(torch.promote_types(hidden_RD.dtype, torch.float32))

    def label_losses(self, batch: PackedBatch, reduction: str = "none", embeds: Tensor | None = None) -> Tensor:
        """-log p of each label, fp32 [L], in the order of batch.labels (batch.label_seq says whose each is); or reduced as the op does:
        'sum', 'mean', or 'sequence' for the log-probability (not the loss) of each sequence's labels, [S]."""
        weight = self.head_weight
        if isinstance(weight, Quantised):
            raise ValueError("a quantised model has no loss of packed batches: load it without quantise")
        hidden_LD = self.hidden(batch, embeds=embeds)[batch.label_index]
        if reduction == "sequence":
            whose, count = batch.label_seq, batch.num_sequences
            return linear_cross_entropy(hidden_LD, weight, batch.labels, reduction=reduction, label_seq=whose, sequences=count)
        return linear_cross_entropy(hidden_LD, weight, batch.labels, reduction=reduction)

    def loss(self, batch: PackedBatch, reduction: str = "sum") -> Tensor:
        """Cross-entropy over the label rows: their 'sum' or 'mean', at one product less than through their losses."""
        return self.label_losses(batch, reduction)
