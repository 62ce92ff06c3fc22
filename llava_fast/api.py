"""`LlavaFast`: the model with its tokenizer and image processor, and the calls a user makes on it."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from llava_fast import checkpoint
from llava_fast.engine import dropin
from llava_fast.engine.generate import generate as generate_requests
from llava_fast.inputs.prepare import InputSpec
from llava_fast.models.llava import Llava
from llava_fast.quantise import GROUPS, quantise_model
from llava_fast.training import lora


class LlavaFast(Llava):
    """Made by `load`. An nn.Module whose parameters are named as in transformers, without the leading 'model.'."""

    input_spec: InputSpec
    generation_config: GenerationConfig

    @property
    def tokenizer(self) -> Any:
        return self.input_spec.tokenizer

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The stop tokens: generation_config's, else the tokenizer's."""
        eos = self.generation_config.eos_token_id
        return tuple([eos] if isinstance(eos, int) else eos or ())

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        logits_to_keep: int = 0,
    ) -> dropin.Output:
        """transformers' forward: ids int64 [B, T] or embeddings [B, T, D], float views [N, 3, S, S], mask [B, T], labels [B, T].

        -> .loss (mean over the labels that are not -100) and .logits fp32 [B, T, V] (the last `logits_to_keep` positions where
        it is not 0; zero at padding). Raises ValueError when placeholders and picture features differ in number.
        """
        return dropin.forward(self, input_ids, attention_mask, pixel_values, labels, inputs_embeds, logits_to_keep)

    def generate(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **settings: Any,
    ) -> Tensor:
        """transformers' generate, greedy or sampled: see engine/dropin.py. An argument that is not implemented raises by name."""
        return dropin.generate(self, input_ids, attention_mask, pixel_values, inputs_embeds, settings)

    def save_pretrained(self, directory: str | os.PathLike, max_shard_size: str = "5GB") -> None:
        """Write a directory that transformers.LlavaForConditionalGeneration loads to the same logits. Not of a quantised model."""
        checkpoint.save_pretrained(self, directory, max_shard_size)


def load(
    path: str | os.PathLike,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    vision_tower: str | os.PathLike | None = None,
    quantise: str | None = None,
) -> LlavaFast:
    """Read a checkpoint: a transformers `llava` directory or hub id, or an original LLaVA / LLaVA-NeXT directory; or the directory of a
    LoRA adapter, in PEFT's format, which is merged into the model it names.

    device 'auto': the GPU where there is one.  dtype 'auto': as in the checkpoint; arithmetic on the CPU is in fp32 all the same.
    vision_tower: where an original checkpoint's tower is, if not where its config says.
    quantise: 'int8', 'int4' or 'fp8': weights of the decoder and the head in that type, for inference; it changes answers.
    Raises ValueError for anything that does not fit, naming it.
    """
    if quantise not in (None, *GROUPS):
        raise ValueError(f"quantise must be one of {', '.join(GROUPS)} or None, got {quantise!r}")
    model = lora.load(LlavaFast, path, device, dtype, vision_tower)
    if quantise is not None:
        quantise_model(model, quantise)
    return model


def generate(model: LlavaFast | str | os.PathLike, requests: Any, *args: Any, **kw: Any) -> Any:
    """Answer requests with a loaded model, or with a checkpoint that is loaded, used and freed: see engine/generate.py."""
    if isinstance(model, LlavaFast):
        return generate_requests(model, requests, *args, **kw)
    loaded = load(model)
    try:
        return generate_requests(loaded, requests, *args, **kw)
    finally:
        del loaded
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


generate.__doc__ = f"{generate.__doc__}\n\n{generate_requests.__doc__}"
