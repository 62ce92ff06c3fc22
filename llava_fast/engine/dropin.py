"""transformers' calling conventions over the packed model: padded ids and masks in, padded ids or logits out.

Shape letters: B rows of the caller's batch, T their padded length, N views, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig

from llava_fast.batch import IGNORE, Layout, PackedBatch, Sample, pack
from llava_fast.engine.engine import ANY_ROWS, Engine
from llava_fast.engine.sampling import stream_seed
from llava_fast.engine.sequence import Prompt
from llava_fast.requests import SamplingParams


def pack_padded(
    model: Any,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    pixel_values: Tensor | None,
    labels: Tensor | None,
    needed: Any,
    inputs_embeds: Tensor | None = None,
) -> tuple[PackedBatch, Tensor, Tensor | None]:
    """-> (the batch without its padding, the flat index int64 of its rows among B * T, embeddings [rows, D] or None).

    Placeholders are matched with features in reading order over the whole batch, as transformers does.
    Raises ValueError when their numbers differ, and for shapes that do not fit.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give exactly one of input_ids and inputs_embeds")
    if inputs_embeds is not None and pixel_values is not None:
        raise ValueError("give pixel_values with input_ids: in inputs_embeds the pictures' places are not known")
    given = input_ids if input_ids is not None else inputs_embeds
    assert given is not None
    if given.ndim != (2 if input_ids is not None else 3) or 0 in given.shape:
        raise ValueError(f"input_ids must be [B, T] and inputs_embeds [B, T, D], none of them empty, got {list(given.shape)}")
    B, T = given.shape[:2]
    for name, tensor in (("attention_mask", attention_mask), ("labels", labels)):
        if tensor is not None and tuple(tensor.shape) != (B, T):
            raise ValueError(f"{name} must be [{B}, {T}] as the inputs are, got {list(tensor.shape)}")
    kept = np.ones((B, T), dtype=bool) if attention_mask is None else attention_mask.cpu().numpy() != 0
    empty = np.flatnonzero(~kept.any(1))
    if len(empty):
        raise ValueError(f"rows {empty.tolist()} of attention_mask are all padding")
    ids = np.zeros((B, T), dtype=np.int64) if input_ids is None else input_ids.cpu().numpy().astype(np.int64)
    out_of_range = ids[(ids < 0) | ((ids >= model.config.decoder.vocab_size) & (ids != model.config.image_token_id))]
    if len(out_of_range):
        raise ValueError(f"input_ids must be from 0 to {model.config.decoder.vocab_size - 1}, got {int(out_of_range[0])}")
    all_labels = None if labels is None else labels.cpu().numpy()
    if all_labels is not None:
        wrong = all_labels[(all_labels != IGNORE) & ((all_labels < 0) | (all_labels >= model.config.decoder.vocab_size))]
        if len(wrong):
            raise ValueError(f"labels must be {IGNORE} or from 0 to {model.config.decoder.vocab_size - 1}, got {int(wrong[0])}")
    samples = [Sample(ids[b][kept[b]], labels=None if all_labels is None else all_labels[b][kept[b]].astype(np.int64)) for b in range(B)]
    batch = pack_marked(model, samples, pixel_values, needed, embedded=inputs_embeds is not None)
    rows = torch.from_numpy(np.flatnonzero(kept))
    embeds = None if inputs_embeds is None else inputs_embeds.flatten(0, 1)[rows.to(inputs_embeds.device)].to(model.compute_dtype)
    return batch, rows, embeds


def pack_marked(model: Any, samples: Sequence[Sample], pixel_values: Tensor | None, needed: Any, embedded: bool = False) -> PackedBatch:
    """Samples whose ids hold a placeholder for every feature row, in one row on the model's device; embedded: pictures need no place.

    Raises ValueError where there are more or fewer placeholders than features.
    """
    batch = pack(samples, needed=needed)
    marked = batch.token_ids == model.config.image_token_id
    marks, features = int(marked.sum()), 0 if pixel_values is None else pixel_values.shape[0] * model.config.patches
    if marks != features and not embedded:
        raise ValueError(f"Image features and image tokens do not match, tokens: {marks}, features: {features}")
    if pixel_values is not None and marks:
        layout = Layout(marked.nonzero()[:, 0], (~marked).nonzero()[:, 0], None, (), model.config.patches)
        batch = dataclasses.replace(batch, views=pixel_values, layout=layout, token_ids=batch.token_ids.masked_fill(marked, 0))
    return batch.to(model.device)


@dataclasses.dataclass
class Output:
    """loss: mean cross-entropy or None.  logits: fp32 [B, T, V], zero at padding."""

    loss: Tensor | None
    logits: Tensor


def forward(
    model: Any,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    pixel_values: Tensor | None,
    labels: Tensor | None,
    inputs_embeds: Tensor | None,
    logits_to_keep: int,
) -> Output:
    """As transformers' LlavaForConditionalGeneration.forward, save that no padding row predicts anything."""
    batch, rows, embeds = pack_padded(model, input_ids, attention_mask, pixel_values, labels, "all", inputs_embeds)
    given = input_ids if input_ids is not None else inputs_embeds
    assert given is not None
    B, T = given.shape[:2]
    hidden = model.hidden(batch, embeds=embeds)
    padded = hidden.new_zeros(B * T, hidden.shape[-1]).index_copy(0, rows.to(hidden.device), hidden).view(B, T, -1)
    logits = model.logits(padded[:, -logits_to_keep:] if logits_to_keep else padded)
    loss = None
    if labels is not None:
        full = logits.flatten(0, 1) if not logits_to_keep else model.logits(padded.flatten(0, 1))
        at = rows.to(hidden.device)[batch.label_rows]
        loss = torch.nn.functional.cross_entropy(full[at], batch.labels, ignore_index=IGNORE)
    return Output(loss, logits)


# transformers' defaults for what neither the call nor the checkpoint sets.
DEFAULTS = dict(do_sample=False, temperature=1.0, top_k=50, top_p=1.0, min_p=None, repetition_penalty=1.0, min_new_tokens=None)
DEFAULTS |= dict(num_return_sequences=1, max_new_tokens=None, max_length=None, eos_token_id=None, pad_token_id=None)
# Accepted with these values alone: they change no token here.
WITHOUT_EFFECT = {"use_cache": True, "num_beams": 1, "return_dict_in_generate": False, "output_scores": False}
# Of a generation_config: what is no setting of this call, or is told by the model itself.
NOT_SETTINGS = {"bos_token_id", "transformers_version", "_from_model_config", "cache_implementation", "decoder_start_token_id"}


def settings(model: Any, shorthand: dict[str, Any]) -> dict[str, Any]:
    """The call's arguments over its generation_config over the checkpoint's over transformers' defaults.

    Raises ValueError naming what none of them may ask for here.
    """
    own, base = shorthand.pop("generation_config", None) or GenerationConfig(), model.generation_config
    if not isinstance(own, GenerationConfig):
        raise ValueError(f"generation_config must be a transformers GenerationConfig, got {type(own).__name__}")
    layers = [{name: value for name, value in shorthand.items() if value is not None}]
    layers += [{k: v for k, v in config.to_diff_dict().items() if k not in NOT_SETTINGS and v is not None} for config in (own, base)]
    for layer in layers:
        for name, harmless in WITHOUT_EFFECT.items():
            if layer.get(name, harmless) != harmless:
                raise ValueError(f"generate takes {name}={harmless} only")
        unknown = sorted(set(layer) - set(DEFAULTS) - set(WITHOUT_EFFECT) - {"seed"})
        if unknown:
            raise ValueError(f"generate does not implement {', '.join(unknown)}; it takes {', '.join(sorted(DEFAULTS))} and seed")
    # An argument that is named is meant, an empty eos_token_id too; None leaves it to the next layer, as in transformers.
    chosen = {name: next((layer[name] for layer in layers if name in layer), default) for name, default in DEFAULTS.items()}
    return {**chosen, "seed": shorthand.get("seed")}


@torch.no_grad()
def generate(
    model: Any,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    pixel_values: Tensor | None,
    inputs_embeds: Tensor | None,
    shorthand: dict[str, Any],
) -> Tensor:
    """As transformers' generate: int64 [B * num_return_sequences, T + new], the caller's ids and padding kept as they came.

    With inputs_embeds, only the new tokens come back. Rows that end early are filled with pad_token_id.
    """
    chosen = settings(model, dict(shorthand))
    batch, rows, embeds = pack_padded(model, input_ids, attention_mask, pixel_values, None, "last", inputs_embeds)
    given = input_ids if input_ids is not None else inputs_embeds
    assert given is not None
    B, T = given.shape[:2]
    lengths = batch.cu_seqlens.diff().tolist()

    limit = model.config.decoder.max_positions
    if max(lengths) >= limit:
        raise ValueError(f"the prompt takes {max(lengths)} tokens, which leaves none of the context's {limit} for an answer")
    if chosen["max_new_tokens"] is not None:
        max_new = chosen["max_new_tokens"]
    elif chosen["max_length"] is not None:
        max_new = chosen["max_length"] - (T if input_ids is not None else 0)
        if max_new < 1:
            raise ValueError(f"the input is {T} tokens long but max_length is {chosen['max_length']}")
    else:
        max_new = min(20, limit - max(lengths))
    params = SamplingParams(
        max_new_tokens=max_new,
        min_new_tokens=chosen["min_new_tokens"] or 0,
        temperature=float(chosen["temperature"]) if chosen["do_sample"] else 0.0,
        top_k=chosen["top_k"] or 0,
        top_p=chosen["top_p"],
        min_p=chosen["min_p"] or 0.0,
        repetition_penalty=float(chosen["repetition_penalty"]),
        seed=chosen["seed"],
    )
    eos = chosen["eos_token_id"]
    eos_ids = () if eos is None else tuple(torch.as_tensor(eos, dtype=torch.int64).flatten().tolist())
    pad = chosen["pad_token_id"] if chosen["pad_token_id"] is not None else (eos_ids[0] if eos_ids else 0)

    n = chosen["num_return_sequences"]
    whole = model.embed(batch) if embeds is None else embeds
    prompts = [
        Prompt.of_embeddings(rows_TD, [] if input_ids is None else input_ids[b].tolist(), name=str(b).encode())
        for b, rows_TD in enumerate(whole.split(lengths))
    ]
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)  # the engine's thread has a stream of its own
    with Engine(model, max_mixed_rows=ANY_ROWS, prefix_cache=False, graphs=False) as engine:
        handles = []
        for b, prompt in enumerate(prompts):
            seed = None if params.seed is None else stream_seed(params.seed, b * n)  # rows draw each for itself
            handles.append(engine.submit_prompt(prompt, dataclasses.replace(params, n=n, seed=seed), eos_ids))
        answers = [completion for handle in handles for completion in handle.result()]
    failed = [answer.error for answer in answers if answer.error is not None]
    if failed:
        raise RuntimeError(failed[0])
    new_ids = [answer.token_ids for answer in answers]
    longest = max(map(len, new_ids))
    new = torch.tensor([ids + [pad] * (longest - len(ids)) for ids in new_ids], device=given.device)
    return new if input_ids is None else torch.cat([input_ids.repeat_interleave(n, 0), new], dim=1)
