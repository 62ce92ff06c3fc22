"""Training a transformers `LlavaForConditionalGeneration` with packed rows and a loss of label rows alone, in a script that is there.

    patch(model)
    Trainer(model, args, train_dataset=..., data_collator=PackingCollator(processor), ...)

The model stays transformers': its modules, parameters and their names, so that optimisers, adapters and saving see what they saw. Only
`forward` is another, and only for a batch with labels: without labels, and in evaluation of padded batches, it is the old one.
"""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoProcessor, LlavaForConditionalGeneration, PreTrainedModel
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast

from llava_fast.batch import IGNORE, PackedBatch, Sample, splice
from llava_fast.checks import shown
from llava_fast.config import from_hf
from llava_fast.engine.dropin import pack_marked, pack_padded
from llava_fast.inputs.images import ImageProcessor
from llava_fast.inputs.labels import Template, encode_turns
from llava_fast.inputs.prepare import InputSpec, prepare
from llava_fast.inputs.records import MARK, ROLES, Turn, check_record
from llava_fast.kernels.patchify import normalise
from llava_fast.models.llava import Llava
from llava_fast.requests import InputOptions, Request

# Of the arguments that the packed forward has no use for: what says the same as position_ids, and what asks for nothing.
WITHOUT_EFFECT = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx", "use_cache", "num_items_in_batch"}
# Hooks that libraries leave on modules and that say nothing here: two ask for a gradient of embeddings, which checkpointing of torch's old
# kind needs, and one, put there by a forward of transformers' own, collects hidden states, which the packed forward refuses to give.
HARMLESS_HOOKS = {"make_inputs_require_grads", "make_inputs_require_grad", "output_capturing_hook"}
HARMLESS = {"return_dict": True, "logits_to_keep": 0, "output_attentions": False, "output_hidden_states": False}


class _Shared(Llava):
    """Our model over the modules and parameters of another. autocast: on a GPU, the dtype that torch.autocast asks for.
    embedding: theirs, where it has hooks (NEFTune's, for one), which are called."""

    autocast: torch.dtype | None = None
    embedding: nn.Module | None = None

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.autocast or super().compute_dtype

    def embed(self, batch: PackedBatch) -> Tensor:
        if self.embedding is None:
            return super().embed(batch)
        layout, ids = batch.layout, batch.token_ids
        rows_TD = self.embedding((ids if layout is None else ids.index_fill(0, layout.rows, self.config.image_token_id))[None])[0]
        if layout is None:
            return rows_TD.to(self.compute_dtype)
        text = layout.text_rows
        places = torch.zeros_like(ids).index_copy(0, text, torch.arange(text.shape[0], device=ids.device))
        return self.multi_modal_projector.embed(self.features_of(batch), layout, self.image_newline, places, rows_TD[text])


@dataclass
class _Patched:
    """What `patch` keeps beside a model: ours, whose linears (by path) are theirs, and the forward of its own that theirs had."""

    ours: _Shared
    linears: frozenset[str]
    before: Any


def patch(model: Any) -> Any:
    """Give a loaded LlavaForConditionalGeneration (or a PEFT model of one) the packed forward; returns it.

    A batch with labels is packed: padded [B, T] with a mask, or one row [1, T] of several sequences whose position_ids start again at 0
    (`PackingCollator`, or transformers' DataCollatorWithFlattening). `.loss` is transformers', save that no pad row predicts a token;
    `.logits` is None. Raises ValueError for a model it cannot run: another class, dropout in attention, layers on several devices.
    """
    hf = _base(model)
    if not isinstance(hf, LlavaForConditionalGeneration):
        raise ValueError(f"patch takes a LlavaForConditionalGeneration, got a {type(hf).__name__}")
    if getattr(hf, "_llava_fast", None) is not None:
        raise ValueError("the model is patched already")
    dropout = getattr(hf.config.text_config, "attention_dropout", 0.0) or getattr(hf.config.vision_config, "attention_dropout", 0.0)
    if dropout:
        raise ValueError(f"attention_dropout must be 0, got {dropout}")
    if len(set(getattr(hf, "hf_device_map", {"": 0}).values())) > 1:
        raise ValueError(f"all layers must be on one device, got hf_device_map {shown(hf.hf_device_map)}")
    with torch.device("meta"):
        ours = _Shared(from_hf(hf.config))
    linears = frozenset(name for name, module in ours.named_modules() if isinstance(module, nn.Linear))
    # Not registered as a submodule: state_dict and parameters stay what they were.
    object.__setattr__(hf, "_llava_fast", _Patched(ours, linears, hf.__dict__.get("forward")))
    _bind(hf)
    hf.forward = types.MethodType(_forward, hf)
    return model


def unpatch(model: Any) -> Any:
    """Undo `patch`; returns the model. Raises ValueError where it is not patched."""
    hf = _base(model)
    state = getattr(hf, "_llava_fast", None)
    if state is None:
        raise ValueError("the model is not patched")
    del hf.forward
    if state.before is not None:
        hf.forward = state.before
    object.__delattr__(hf, "_llava_fast")
    return model


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


# --- the model --------------------------------------------------------------------------------------------------------------------


def _bind(hf: Any) -> _Shared:
    """Point ours at the modules that theirs has now: adapters come and go, embeddings grow."""
    state: _Patched = hf._llava_fast
    tower = hf.model.vision_tower
    parts = {
        "vision_tower": getattr(tower, "vision_model", tower),
        "multi_modal_projector": hf.model.multi_modal_projector,
        "language_model": hf.model.language_model,
    }
    called: set[nn.Module] = set()
    for name, theirs in parts.items():
        _share(getattr(state.ours, name), theirs, name, state.linears, called)
    embedding = _active(hf.model.language_model.embed_tokens)
    state.ours.__dict__["embedding"] = embedding if _hooks(embedding) else None
    _refuse_hooks(hf, {hf, embedding, *called})
    head, table = _plain(_active(hf.lm_head), "lm_head"), state.ours.language_model.embed_tokens.weight
    state.ours._modules["lm_head"] = None if head.weight is table else head
    sample = next(state.ours.parameters())
    if hasattr(sample, "placements") or hasattr(sample, "ds_id"):
        raise ValueError("the parameters are sharded (FSDP or ZeRO 3), which the packed forward does not gather: lf.train shards by itself")
    state.ours.train(hf.training)
    name = "is_activation_checkpointing" if hasattr(hf, "is_activation_checkpointing") else "is_gradient_checkpointing"  # before 5.23
    state.ours.language_model.checkpointing = state.ours.vision_tower.checkpointing = "full" if getattr(hf, name) else "none"
    return state.ours


def _share(ours: nn.Module, theirs: nn.Module, name: str, linears: frozenset[str], called: set[nn.Module]) -> None:
    """Give ours the parameters of theirs. called: what stands in for a linear, and is called as it is, is added."""
    theirs = _active(theirs)
    for key in ours._parameters:
        if key not in theirs._parameters:
            raise ValueError(f"{name} is a {type(theirs).__name__}, which the packed forward does not run")
        ours._parameters[key] = theirs._parameters[key]
    for key, child in ours._modules.items():
        path = f"{name}.{key}"
        if child is None:
            continue
        if path in linears:  # an adapter may stand in for one, save where the projector's op takes the matrices themselves
            other = _active(theirs._modules[key])
            ours._modules[key] = _plain(other, path) if path.startswith("multi_modal_projector.") else other
            if type(other) is not nn.Linear:
                called.update(other.modules())
        else:
            _share(child, theirs._modules[key], path, linears, called)  # type: ignore[arg-type]


def _refuse_hooks(hf: Any, called: set[nn.Module]) -> None:
    """ValueError for a hook on a module that is not called: it would be passed over in silence."""
    for name, module in hf.named_modules():
        hooks = [] if module in called else _hooks(module)
        if hooks:
            raise ValueError(f"{name} has a hook ({hooks[0]}), which the packed forward does not call: remove it, or unpatch the model")


def _hooks(module: nn.Module) -> list[str]:
    """Names of the hooks around a module's forward and backward pass."""
    kinds = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    names = [getattr(hook, "__name__", type(hook).__name__) for hooks in kinds for hook in hooks.values()]
    return [name for name in names if name not in HARMLESS_HOOKS]


def _active(module: Any) -> Any:
    """The copy that PEFT trains of a module in modules_to_save."""
    copies = getattr(module, "modules_to_save", None)
    return module if copies is None else copies[module.active_adapters[0]]


def _plain(module: Any, name: str) -> nn.Linear:
    if type(module) is not nn.Linear:
        raise ValueError(
            f"{name} must be an nn.Linear, got a {type(module).__name__}: leave it out of target_modules, or name it in modules_to_save"
        )
    return module


def _forward(
    self: Any,
    input_ids: Tensor | None = None,
    pixel_values: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    labels: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
    **others: Any,
) -> Any:
    if labels is None or not (self.training or position_ids is not None):
        given = {"attention_mask": attention_mask, "position_ids": position_ids, "labels": labels}
        extra = {} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}
        original = self._llava_fast.before or types.MethodType(type(self).forward, self)
        return original(input_ids=input_ids, pixel_values=pixel_values, **given, **extra, **others)
    for name, value in others.items():
        if value is not None and name not in WITHOUT_EFFECT and not (name in HARMLESS and value == HARMLESS[name]):
            raise ValueError(f"the packed forward does not implement {name}: leave it out, or unpatch the model")
    if input_ids is None:
        raise ValueError("the packed forward needs input_ids")
    ours, kind = _bind(self), input_ids.device.type
    ours.autocast = torch.get_autocast_dtype(kind) if kind != "cpu" and torch.is_autocast_enabled(kind) else None
    with torch.autocast(kind, enabled=False):
        batch = _packed(ours, input_ids, attention_mask, position_ids, pixel_values, labels)
        total = ours.loss(batch, reduction="sum")
    return LlavaCausalLMOutputWithPast(loss=total / (batch.labels.shape[0] if num_items_in_batch is None else num_items_in_batch))


def _packed(ours: Llava, ids: Tensor, mask: Tensor | None, positions: Tensor | None, pixels: Tensor | None, labels: Tensor) -> PackedBatch:
    if positions is None:
        return pack_padded(ours, ids, mask, pixels, labels, "labels")[0]
    if ids.shape[0] != 1 or positions.shape != ids.shape or labels.shape != ids.shape:
        shapes = f"input_ids {list(ids.shape)}, position_ids {list(positions.shape)} and labels {list(labels.shape)}"
        raise ValueError(f"with position_ids a batch is one row [1, T] of sequences, got {shapes}")
    if mask is not None and not bool(mask.all()):
        raise ValueError("with position_ids no row is padding: leave attention_mask out")
    place = positions[0].cpu().numpy()
    starts = np.flatnonzero(place == 0)
    bounds = np.append(starts, len(place))
    if len(starts) == 0 or not np.array_equal(place, np.arange(len(place)) - np.repeat(starts, np.diff(bounds))):
        raise ValueError("position_ids must count 0, 1, 2, ... within each sequence, from the first row on")
    rows, wanted = ids[0].cpu().numpy(), labels[0].cpu().numpy()
    samples = [Sample(rows[a:b], labels=wanted[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)]
    return pack_marked(ours, samples, pixels, "labels")


# --- the data ---------------------------------------------------------------------------------------------------------------------


class PackingCollator:
    """A Trainer's `data_collator`: the samples of a batch in one row, no padding.

    A sample is a LLaVA record ({"conversations", "image" | "video"}), messages ({"messages", "images"}: pictures in the content's parts or,
    in order, in "images"), or ids that are made already ({"input_ids", "labels", "pixel_values"}, a placeholder for every feature).
    -> input_ids, position_ids, labels int64 [1, T] and, with pictures, pixel_values [N, 3, S, S]: also what transformers' own forward
    takes, with use_cache=False.

    processor: a LlavaProcessor, or a model whose directory has one.  tokens_per_row: what a row may hold; a batch of more raises
    ValueError.  template: as in TrainConfig.  media_folder: where a record's paths start.  inputs: frames of a video, for one.
    """

    def __init__(
        self,
        processor: Any,
        tokens_per_row: int | None = None,
        *,
        template: Template = "hf",
        media_folder: str = ".",
        inputs: InputOptions | None = None,
    ):
        processor = AutoProcessor.from_pretrained(processor.name_or_path) if isinstance(processor, PreTrainedModel) else processor
        self.spec = input_spec(processor)
        self.tokens_per_row = tokens_per_row
        self.template: Template = template
        self.media_folder = media_folder
        self.inputs = inputs or InputOptions()
        if self.inputs.pool is not None or self.inputs.anyres:
            raise ValueError("pool and anyres are not for a transformers model, which has a placeholder for each of a view's features")

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        made = [self._make(sample, f"sample {number} of the batch") for number, sample in enumerate(samples)]
        tokens = sum(len(ids) for ids, _, _ in made)
        if self.tokens_per_row is not None and tokens > self.tokens_per_row:
            raise ValueError(
                f"the {len(made)} samples of the batch take {tokens} tokens, more than tokens_per_row {self.tokens_per_row}: "
                "lower per_device_train_batch_size, and accumulate"
            )
        row = {
            "input_ids": np.concatenate([ids for ids, _, _ in made]),
            "position_ids": np.concatenate([np.arange(len(ids)) for ids, _, _ in made]),
            "labels": np.concatenate([[IGNORE, *labels[1:]] for _, labels, _ in made]),
        }
        batch = {name: torch.from_numpy(values.astype(np.int64))[None] for name, values in row.items()}
        views = [pixels for _, _, pixels in made if pixels is not None and pixels.shape[0]]
        return {**batch, "pixel_values": torch.cat(views)} if views else batch

    def _make(self, sample: Mapping[str, Any], where: str) -> tuple[np.ndarray, np.ndarray, Tensor | None]:
        """ids and labels [T], float views."""
        if "input_ids" in sample:
            ids, labels = (np.asarray(sample[name], dtype=np.int64).reshape(-1) for name in ("input_ids", "labels"))
            pixels = sample.get("pixel_values")
            return ids, labels, None if pixels is None else torch.as_tensor(pixels)
        if "messages" in sample:
            turns, images = _read_messages(sample, where)
            request = Request(MARK * len(images), images=images)
        elif "conversations" in sample:
            record = check_record(dict(sample), where, Path(self.media_folder))
            turns, images = list(record.turns), list(record.images)
            videos = [] if record.video is None else [record.video]
            request = Request("<video>" if videos else MARK * len(images), images=images, videos=videos)
        else:
            raise ValueError(
                f"{where} has neither messages, nor conversations, nor input_ids, got {shown(sorted(sample))}: "
                "a Trainer drops columns that forward does not take unless remove_unused_columns=False"
            )
        try:
            prepared = prepare(request, self.inputs, self.spec) if request.images or request.videos else None
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        visuals = prepared.sample.visuals if prepared is not None else ()
        counts = [len(visuals)] if request.videos else [1] * len(visuals)
        image, keep = self.spec.image_token_id, self.inputs.keep_order
        made = encode_turns(turns, self.template, self.spec.tokenizer, image, counts, self.spec.chat_template, keep)
        wide = splice(made.ids, visuals, self.spec.image_token_id, made.labels)
        assert wide.labels is not None
        for visual, start in zip(wide.visuals, wide.starts, strict=True):
            wide.token_ids[start : start + visual.tokens] = self.spec.image_token_id
        if prepared is None or prepared.views is None:
            return wide.token_ids, wide.labels, None
        images_of = self.spec.image_processor
        return wide.token_ids, wide.labels, normalise(prepared.views, images_of.image_mean, images_of.image_std, images_of.rescale)


def input_spec(processor: Any) -> InputSpec:
    """What inputs need to know, from a LlavaProcessor. Raises ValueError for what is none."""
    if not all(hasattr(processor, name) for name in ("tokenizer", "image_processor", "image_token_id", "patch_size")):
        raise ValueError(f"expected a LlavaProcessor, or a model whose directory has one, got a {type(processor).__name__}")
    images = ImageProcessor.from_config(processor.image_processor.to_dict(), "the processor")
    grid = images.size // processor.patch_size
    extra = processor.num_additional_image_tokens - (processor.vision_feature_select_strategy == "default")
    tokenizer = processor.tokenizer
    template = processor.chat_template or tokenizer.chat_template
    limit = int(min(tokenizer.model_max_length, 1 << 31))
    return InputSpec(tokenizer, images, processor.image_token_id, grid, images.size, limit, template, extra_rows=extra)


def _read_messages(sample: Mapping[str, Any], where: str) -> tuple[list[Turn], list[Any]]:
    """Turns with a mark a picture, and the pictures."""
    waiting = list(sample.get("images") or ())
    turns: list[Turn] = []
    images: list[Any] = []
    for number, message in enumerate(sample["messages"]):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES or not isinstance(content, (str, list)):
            raise ValueError(f"{where}: message {number} needs a role of {', '.join(ROLES)} and a content, got {shown(message)}")
        text = content if isinstance(content, str) else ""
        for part in content if isinstance(content, list) else ():
            if part.get("type") == "image":
                own = part.get("image")
                if own is None and not waiting:
                    raise ValueError(f"{where}: message {number} has a picture, of which 'images' has none left")
                images.append(waiting.pop(0) if own is None else own)
                text += MARK
            elif part.get("type") == "text":
                text += part["text"]
            else:
                raise ValueError(f"{where}: message {number} has a part that is neither text nor image: {shown(part)}")
        turns.append(Turn(ROLES[role], text))  # type: ignore[arg-type]
    if waiting:
        raise ValueError(f"{where}: {len(waiting)} of its images have no place in the messages")
    dialogue = turns[1:] if turns and turns[0].role == "system" else turns
    expected = [("user", "assistant")[i % 2] for i in range(len(dialogue))]
    if not dialogue or len(dialogue) % 2 or [turn.role for turn in dialogue] != expected:
        raise ValueError(f"{where}: messages must be user, assistant, ..., assistant, got {[turn.role for turn in turns]}")
    return turns, images
