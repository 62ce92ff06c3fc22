"""What a caller asks for and gets: `Request`, `SamplingParams`, `InputOptions`, `Completion`. Plain data, checked when made."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

Tokenisation = Literal["hf", "eval", "train", "demo"]


def _require(ok: bool, name: str, value: object, expected: str) -> None:
    if not ok:
        raise ValueError(f"{name} must be {expected}, got {value!r}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen. temperature 0 is greedy. Raises ValueError for a value out of range.

    stop: strings that end the text (they are cut off).  seed: equal seeds give equal tokens whatever else is in the batch.
    n: completions per request.  logprobs: also return the log-probability of each chosen token.
    """

    max_new_tokens: int = 1024
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    n: int = 1
    logprobs: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        else:
            object.__setattr__(self, "stop", tuple(self.stop))
        _require(_is_int(self.max_new_tokens) and self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "a positive integer")
        _require(
            _is_int(self.min_new_tokens) and 0 <= self.min_new_tokens <= self.max_new_tokens,
            "min_new_tokens",
            self.min_new_tokens,
            f"an integer from 0 to max_new_tokens ({self.max_new_tokens})",
        )
        _require(_is_number(self.temperature) and self.temperature >= 0, "temperature", self.temperature, "a finite number >= 0")
        _require(_is_number(self.top_p) and 0 < self.top_p <= 1, "top_p", self.top_p, "in (0, 1]")
        _require(_is_int(self.top_k) and self.top_k >= 0, "top_k", self.top_k, "an integer >= 0 (0 is off)")
        _require(_is_number(self.min_p) and 0 <= self.min_p <= 1, "min_p", self.min_p, "in [0, 1]")
        _require(
            _is_number(self.repetition_penalty) and self.repetition_penalty > 0,
            "repetition_penalty",
            self.repetition_penalty,
            "a finite number > 0",
        )
        _require(all(isinstance(s, str) and s for s in self.stop), "stop", self.stop, "non-empty strings")
        _require(self.seed is None or _is_int(self.seed), "seed", self.seed, "an integer or None")
        _require(_is_int(self.n) and self.n >= 1, "n", self.n, "a positive integer")


@dataclass(frozen=True)
class InputOptions:
    """How text, pictures and videos become tokens and views. None: as the checkpoint says, and as transformers does.

    tokenisation: 'hf' the checkpoint's chat template; 'eval', 'train', 'demo' as in LLaVA-NeXT (see inputs/chat.py).
    keep_order: keep pictures where they stand in a message although the chat template moves them first.
    image_aspect: 'squash' as the checkpoint's image processor does; 'pad' to a square first.
    num_frames or fps: frames of a video (uniform, or by rate); frames_upbound: at most so many by rate, uniform instead where there
    would be more, or always with force_sample.  pool: 'average', 'bilinear' or 'max', stride 2, over video frames.
    anyres: tiles for requests with a single picture.  allowed_media_hosts: hosts from which http(s) pictures may be fetched.
    """

    tokenisation: Tokenisation = "hf"
    keep_order: bool = False
    image_aspect: Literal["squash", "pad"] = "squash"
    num_frames: int | None = None
    fps: float | None = None
    frames_upbound: int | None = None
    force_sample: bool = False
    pool: Literal["average", "bilinear", "max"] | None = None
    anyres: bool | None = None
    allowed_media_hosts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "allowed_media_hosts", tuple(self.allowed_media_hosts))
        _require(self.tokenisation in ("hf", "eval", "train", "demo"), "tokenisation", self.tokenisation, "hf, eval, train or demo")
        _require(self.image_aspect in ("squash", "pad"), "image_aspect", self.image_aspect, "squash or pad")
        _require(self.num_frames is None or (_is_int(self.num_frames) and self.num_frames >= 1), "num_frames", self.num_frames, ">= 1")
        _require(
            self.frames_upbound is None or (_is_int(self.frames_upbound) and self.frames_upbound >= 1),
            "frames_upbound",
            self.frames_upbound,
            ">= 1",
        )
        _require(self.fps is None or (_is_number(self.fps) and self.fps > 0), "fps", self.fps, "> 0")
        _require(self.pool in (None, "average", "bilinear", "max"), "pool", self.pool, "average, bilinear, max or None")


@dataclass(frozen=True)
class Request:
    """One question. prompt: a string with <image>/<video> marks in reading order, or chat messages in the Hugging Face form.

    images and videos fill the marks of a string prompt (or of messages whose items carry no picture) in order.
    """

    prompt: str | list[dict[str, Any]]
    images: list[Any] = field(default_factory=list)
    videos: list[Any] = field(default_factory=list)
    sampling: SamplingParams | None = None
    inputs: InputOptions | None = None
    priority: int = 0
    deadline: float | None = None


@dataclass
class Completion:
    """One answer. finish_reason: 'stop' (a stop token or string), 'length', or 'error' with the message in `error`.

    logprobs: float per token where asked for.  timings, in seconds: preprocess, first_token, total.
    index: which of the request's `n` completions this is.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: Literal["stop", "length", "error"] | None = None
    error: str | None = None
    prompt_tokens: int = 0
    visual_tokens: int = 0
    logprobs: list[float] | None = None
    timings: dict[str, float] = field(default_factory=dict)
    index: int = 0
