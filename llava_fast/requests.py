"""What a caller asks for and gets: `Request`, `SamplingParams`, `InputOptions`, `Completion`. Plain data, checked when made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from llava_fast.checks import is_int, is_number, require, shown

Tokenisation = Literal["hf", "eval", "train", "demo"]


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
        object.__setattr__(self, "stop", _strings("stop", self.stop))
        require(is_int(self.max_new_tokens) and self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "a positive integer")
        require(
            is_int(self.min_new_tokens) and 0 <= self.min_new_tokens <= self.max_new_tokens,
            "min_new_tokens",
            self.min_new_tokens,
            f"an integer from 0 to max_new_tokens ({self.max_new_tokens})",
        )
        require(is_number(self.temperature) and self.temperature >= 0, "temperature", self.temperature, "a finite number >= 0")
        require(is_number(self.top_p) and 0 < self.top_p <= 1, "top_p", self.top_p, "in (0, 1]")
        require(is_int(self.top_k) and self.top_k >= 0, "top_k", self.top_k, "an integer >= 0 (0 is off)")
        require(is_number(self.min_p) and 0 <= self.min_p <= 1, "min_p", self.min_p, "in [0, 1]")
        require(
            is_number(self.repetition_penalty) and self.repetition_penalty > 0,
            "repetition_penalty",
            self.repetition_penalty,
            "a finite number > 0",
        )
        require(self.seed is None or is_int(self.seed), "seed", self.seed, "an integer or None")
        require(is_int(self.n) and self.n >= 1, "n", self.n, "a positive integer")


@dataclass(frozen=True)
class InputOptions:
    """How text, pictures and videos become tokens and views. None: as the checkpoint says, and as transformers does.

    tokenisation: 'hf' the checkpoint's chat template; 'eval', 'train', 'demo' as in LLaVA-NeXT (see inputs/chat.py).
    keep_order: keep pictures where they stand in a message although the chat template moves them first.
    image_aspect: 'squash' as the checkpoint's image processor does; 'pad' to a square first (not a picture that is cut into tiles).
    num_frames or fps: frames of a video (uniform, or by rate).  frames_upbound: at most so many by rate (1 a second where none is
    given), uniform instead where there would be more, or always with force_sample.  pool: 'average', 'bilinear' or 'max', stride 2,
    over video frames.  anyres: tiles for requests with a single picture.
    allowed_media_hosts: hosts from which http(s) pictures may be fetched.
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
        object.__setattr__(self, "allowed_media_hosts", _strings("allowed_media_hosts", self.allowed_media_hosts))
        require(self.tokenisation in ("hf", "eval", "train", "demo"), "tokenisation", self.tokenisation, "hf, eval, train or demo")
        require(self.image_aspect in ("squash", "pad"), "image_aspect", self.image_aspect, "squash or pad")
        require(self.num_frames is None or (is_int(self.num_frames) and self.num_frames >= 1), "num_frames", self.num_frames, ">= 1")
        require(
            self.frames_upbound is None or (is_int(self.frames_upbound) and self.frames_upbound >= 1),
            "frames_upbound",
            self.frames_upbound,
            ">= 1",
        )
        require(self.fps is None or (is_number(self.fps) and self.fps > 0), "fps", self.fps, "> 0")
        require(self.pool in (None, "average", "bilinear", "max"), "pool", self.pool, "average, bilinear, max or None")


@dataclass(frozen=True)
class Request:
    """One question. prompt: a string with <image>/<video> marks in reading order, or chat messages in the Hugging Face form.

    images and videos fill the marks of a string prompt (or of messages whose items carry no picture) in order.
    sampling and inputs, where given, are used instead of those of the call.  priority: higher ones are begun first.
    deadline: seconds after the call; a request that is not done by then ends with what it has, as an error.
    id: a name of the caller's, which goes with its answer into a file.
    Raises ValueError for a field of another kind.
    """

    prompt: str | list[dict[str, Any]]
    images: list[Any] = field(default_factory=list)
    videos: list[Any] = field(default_factory=list)
    sampling: SamplingParams | None = None
    inputs: InputOptions | None = None
    priority: int = 0
    deadline: float | None = None
    id: str | int | None = None

    def __post_init__(self) -> None:
        require(isinstance(self.prompt, (str, list)), "prompt", self.prompt, "a string or a list of chat messages")
        for name in ("images", "videos"):
            require(isinstance(getattr(self, name), (list, tuple)), name, getattr(self, name), f"a list of {name}")
        require(self.sampling is None or isinstance(self.sampling, SamplingParams), "sampling", self.sampling, "SamplingParams or None")
        require(self.inputs is None or isinstance(self.inputs, InputOptions), "inputs", self.inputs, "InputOptions or None")
        require(is_int(self.priority), "priority", self.priority, "an integer")
        require(self.deadline is None or is_number(self.deadline), "deadline", self.deadline, "a finite number of seconds or None")
        require(self.id is None or isinstance(self.id, str) or is_int(self.id), "id", self.id, "a string, an integer or None")
        _check_unicode(self.prompt)


def ask(prompt: str, images: Sequence[str], videos: Sequence[str], raw: bool = False) -> Request:
    """A user's message with pictures at their marks, or in front of a text without marks; `raw`: the prompt as the model is to see it.

    Raises ValueError with both counts where marks and media differ in number.
    """
    if raw:
        return Request(prompt, images=list(images), videos=list(videos))
    if "<image>" not in prompt and "<video>" not in prompt:
        prompt = "<image>" * len(images) + "<video>" * len(videos) + prompt
    marks = prompt.count("<image>"), prompt.count("<video>")
    if marks != (len(images), len(videos)):
        raise ValueError(
            f"the prompt has {marks[0]} <image> and {marks[1]} <video> marks but {len(images)} images and {len(videos)} videos were given"
        )
    content: list[dict[str, Any]] = []
    pictures, films = iter(images), iter(videos)
    rest = prompt
    while rest:
        places = [(at, mark) for mark in ("<image>", "<video>") if (at := rest.find(mark)) >= 0]
        at, mark = min(places, default=(len(rest), ""))
        if rest[:at]:
            content.append({"type": "text", "text": rest[:at]})
        if mark == "<image>":
            content.append({"type": "image", "image": next(pictures)})
        elif mark == "<video>":
            content.append({"type": "video", "video": next(films)})
        rest = rest[at + len(mark) :]
    return Request([{"role": "user", "content": content}])


@dataclass
class Completion:
    """One answer. finish_reason: 'stop' (a stop token or string), 'length', 'cancelled', or 'error' with the message in `error`.

    logprobs: float per token where asked for.  timings, in seconds: preprocess, first_token, total.
    request: the place of the request in the call.  index: which of its `n` completions this is.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: Literal["stop", "length", "error", "cancelled"] | None = None
    error: str | None = None
    prompt_tokens: int = 0
    visual_tokens: int = 0
    logprobs: list[float] | None = None
    timings: dict[str, float] = field(default_factory=dict)
    request: int = 0
    index: int = 0


def _strings(name: str, value: object) -> tuple[str, ...]:
    """One string, several, or None for none of them."""
    if value is None or isinstance(value, str):
        value = () if value is None else (value,)
    if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) and item for item in value):
        raise ValueError(f"{name} must be non-empty strings, got {shown(value)}")
    return tuple(value)


def _check_unicode(value: object) -> None:
    """Half a surrogate pair is a Python string but no text: tokenizers fail on it with a TypeError."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the prompt is not valid text: half a surrogate pair at character {error.start}") from None
    elif isinstance(value, Mapping):
        _check_unicode(list(value.values()))
    elif isinstance(value, list):
        for item in value:
            _check_unicode(item)
