"""What a checkpoint is, as frozen dataclasses; read from a transformers config, `raw` kept so that it can be written back.

Sources: transformers' LlavaConfig, SiglipVisionConfig, CLIPVisionConfig, Qwen2Config, LlamaConfig; LLaVA-NeXT's config.json.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
OPTIONS_KEY = "llava_fast"  # the key of config.json that holds what transformers' config cannot


@dataclass(frozen=True)
class VisionConfig:
    """A SigLIP or CLIP tower. `layers` are those in the checkpoint; LlavaConfig.executed_layers says how many run."""

    kind: Literal["siglip", "clip"]
    width: int
    mlp_width: int
    layers: int
    heads: int
    image_size: int
    patch_size: int
    act: str
    norm_eps: float

    @property
    def grid(self) -> int:
        return self.image_size // self.patch_size

    @property
    def positions(self) -> int:
        """Rows inside the tower: patches, and a class token in CLIP."""
        return self.grid**2 + (self.kind == "clip")


@dataclass(frozen=True)
class DecoderConfig:
    """A Qwen2- or Llama-type decoder."""

    kind: Literal["qwen2", "llama"]
    vocab_size: int
    width: int
    mlp_width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    max_positions: int
    tied: bool
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    act: str
    rope: dict[str, Any] = field(hash=False)


@dataclass(frozen=True)
class LlavaConfig:
    """A whole model. feature_layers: the tower's layers whose outputs are taken (i: after layer i, from 1; negative from the end);
    drop_class: CLIP's class row is left out ('default'), kept otherwise ('full').
    """

    vision: VisionConfig
    decoder: DecoderConfig
    image_token_id: int
    feature_layers: tuple[int, ...]
    drop_class: bool
    projector: Literal["mlp2x_gelu", "linear"]
    projector_act: str
    projector_bias: bool
    options: dict[str, Any] = field(hash=False)
    raw: dict[str, Any] = field(hash=False, repr=False)

    @property
    def selected(self) -> tuple[int, ...]:
        """The feature layers counted from the first, which is 1."""
        return tuple(i + self.vision.layers + 1 if i < 0 else i for i in self.feature_layers)

    @property
    def executed_layers(self) -> int:
        return max(self.selected)

    @property
    def patches(self) -> int:
        """P: feature rows a view."""
        return self.vision.positions - self.drop_class

    @property
    def has_newline(self) -> bool:
        return "unpad" in (self.options.get("mm_patch_merge_type") or "")


def from_hf(hf: Any) -> LlavaConfig:
    """Read a transformers LlavaConfig (AutoConfig gives one). Raises ValueError for a part this package does not run."""
    if hf.model_type != "llava":
        raise ValueError(f"model_type must be 'llava', got {hf.model_type!r}")
    raw = hf.to_dict()
    options = dict(raw.get(OPTIONS_KEY) or {})
    vision = _vision(hf.vision_config)
    decoder = _decoder(hf.text_config, tied=bool(getattr(hf, "tie_word_embeddings", False) or hf.text_config.tie_word_embeddings))
    layers = hf.vision_feature_layer
    layers = (layers,) if isinstance(layers, int) else tuple(layers)
    if not layers or any(not 1 <= abs(i) <= vision.layers for i in layers):
        raise ValueError(f"vision_feature_layer must name the tower's {vision.layers} layers, got {hf.vision_feature_layer!r}")
    strategy = hf.vision_feature_select_strategy
    if strategy not in ("default", "full"):
        raise ValueError(f"vision_feature_select_strategy must be 'default' or 'full', got {strategy!r}")
    return LlavaConfig(
        vision=vision,
        decoder=decoder,
        image_token_id=int(hf.image_token_index if hasattr(hf, "image_token_index") else hf.image_token_id),
        feature_layers=layers,
        drop_class=strategy == "default",
        projector=options.get("mm_projector_type", "mlp2x_gelu"),
        projector_act=hf.projector_hidden_act,
        projector_bias=bool(hf.multimodal_projector_bias),
        options=options,
        raw=raw,
    )


def _vision(hf: Any) -> VisionConfig:
    kinds: dict[str, Literal["siglip", "clip"]] = {"siglip_vision_model": "siglip", "clip_vision_model": "clip"}
    if hf.model_type not in kinds:
        raise ValueError(f"the vision tower must be one of {sorted(kinds)}, got {hf.model_type!r}")
    return VisionConfig(
        kind=kinds[hf.model_type],
        width=hf.hidden_size,
        mlp_width=hf.intermediate_size,
        layers=hf.num_hidden_layers,
        heads=hf.num_attention_heads,
        image_size=hf.image_size,
        patch_size=hf.patch_size,
        act=hf.hidden_act,
        norm_eps=hf.layer_norm_eps,
    )


def _decoder(hf: Any, tied: bool) -> DecoderConfig:
    if hf.model_type not in ("qwen2", "llama"):
        raise ValueError(f"the decoder must be qwen2 or llama, got {hf.model_type!r}")
    if any(kind != "full_attention" for kind in getattr(hf, "layer_types", None) or []):
        raise ValueError("sliding-window attention is not supported (use_sliding_window must be false)")
    rope = dict(hf.rope_parameters)
    if rope.get("rope_type", "default") not in ROPE_TYPES:
        raise ValueError(f"rope_type must be one of {ROPE_TYPES}, got {rope.get('rope_type')!r}")
    qwen = hf.model_type == "qwen2"
    bias = bool(getattr(hf, "attention_bias", False))
    return DecoderConfig(
        kind=hf.model_type,
        vocab_size=hf.vocab_size,
        width=hf.hidden_size,
        mlp_width=hf.intermediate_size,
        layers=hf.num_hidden_layers,
        heads=hf.num_attention_heads,
        kv_heads=hf.num_key_value_heads,
        head_dim=getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
        norm_eps=hf.rms_norm_eps,
        max_positions=hf.max_position_embeddings,
        tied=tied,
        qkv_bias=qwen or bias,
        out_bias=bias and not qwen,
        mlp_bias=bool(getattr(hf, "mlp_bias", False)),
        act=hf.hidden_act,
        rope=rope,
    )
