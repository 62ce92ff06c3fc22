"""Prompts and chat messages to token ids, with one placeholder for each picture or frame.

Four tokenisations (sources in LLaVA-NeXT; what they do to several pictures differs id by id):
  hf     the checkpoint's chat template, as transformers' LlavaProcessor renders and tokenises it. A string is taken as written.
  eval   llava/eval/model_vqa.py: ChatML with a system turn; a newline after every picture; text between pictures by itself.
  train  train.py, preprocess_qwen: ChatML with a system turn; each turn tokenised whole, pictures where they stand.
  demo   the interleave demo: all pictures of a turn first, a newline, the text; text between pictures by itself.
For the last three a string is the text of one user turn, and the parts of a message are written one after another with nothing
between (write the newline of LLaVA's records, "<image>\\n", yourself). A tokenizer without <|im_start|> (Llama) gets Vicuna's
"{system} USER: ... ASSISTANT:" for them, and for 'hf' where the checkpoint has no chat template.

Literal text: "<image>" and "<video>" are marks in a string prompt, and in the text of messages only where the request brings
images or videos of its own to fill them; else they are refused. Other special tokens in a user's text, <|im_end|> say, are read
as the tokens they name, as transformers does: escape them before, where users are not trusted.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jinja2

from llava_fast.checks import is_int, is_number, shown
from llava_fast.inputs.templates import (
    IMAGE_MARK,
    INTERLEAVE_CHAT_TEMPLATE,
    QWEN_SYSTEM,
    chatml_eval_turn,
    chatml_turn,
    encode_chunks,
    encode_text,
    has_chatml,
    token_id,
    vicuna_text,
)
from llava_fast.requests import Tokenisation

VIDEO_MARK = "<video>"
_MARKS = re.compile(f"({IMAGE_MARK}|{VIDEO_MARK})")
_SOURCE_KEYS = {"image": ("image", "url", "path", "base64"), "video": ("video", "url", "path")}
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Media:
    """A picture or video and, for a video, how many frames of it are wanted (None: the request's options say)."""

    kind: Literal["image", "video"]
    source: Any
    num_frames: int | None = None
    fps: float | None = None


Part = str | int | tuple[str | int, ...]


@dataclass(frozen=True)
class Message:
    """A turn. parts: text, numbers of `Conversation.media` where they stand, and texts with such numbers in the middle."""

    role: str
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Conversation:
    """Messages and their media in reading order; `written`: one string prompt, taken as written under 'hf'."""

    messages: tuple[Message, ...]
    media: tuple[Media, ...]
    written: bool = False


@functools.cache
def warn_once(message: str) -> None:
    logger.warning(message)


# --- reading a request ---


def read_prompt(prompt: str | Sequence[dict[str, Any]], images: Sequence[Any] = (), videos: Sequence[Any] = ()) -> Conversation:
    """A string with marks, or messages in the Hugging Face form, and the images and videos that fill its marks in order.

    Raises ValueError for an empty prompt, for marks and media that do not match (both counts), and for what is not a message.
    """
    supply = _Supply(list(images), list(videos))
    if isinstance(prompt, str):
        messages = [Message("user", (_split(prompt, supply),))]
    elif isinstance(prompt, (list, tuple)) and all(isinstance(message, dict) for message in prompt):
        messages = [_read_message(message, number, supply) for number, message in enumerate(prompt, 1)]
    else:
        raise ValueError(f"a prompt must be a string or a list of chat messages, got a {type(prompt).__name__}")
    supply.check_all_used(isinstance(prompt, str))
    if not supply.media and not any(part.strip() for message in messages for part in _flat(message.parts) if isinstance(part, str)):
        raise ValueError("the prompt is empty: it holds neither text nor pictures")
    return Conversation(tuple(messages), tuple(supply.media), isinstance(prompt, str))


class _Supply:
    """Media in reading order; marks and items without a picture take the request's images and videos in turn."""

    def __init__(self, images: list[Any], videos: list[Any]) -> None:
        self.given: dict[str, list[Any]] = {"image": images, "video": videos}
        self.marks = {"image": 0, "video": 0}
        self.media: list[Media] = []

    def add(self, medium: Media) -> int:
        self.media.append(medium)
        return len(self.media) - 1

    def take(self, kind: Literal["image", "video"], num_frames: int | None = None, fps: float | None = None) -> int:
        self.marks[kind] += 1
        given = self.given[kind]
        source = given[self.marks[kind] - 1] if self.marks[kind] <= len(given) else None
        if kind == "video" and isinstance(source, dict):  # a video with its own frames: {"video": ..., "num_frames": ...}
            return self.add(_read_item({"type": "video", **source}, "a video"))
        return self.add(Media(kind, source, num_frames, fps))

    def check_all_used(self, string: bool) -> None:
        for kind in ("image", "video"):
            marks, given = self.marks[kind], len(self.given[kind])
            if marks != given:
                advice = "" if string or given else f"; the pictures of messages are items of type {kind}, not marks in their text"
                raise ValueError(f"the prompt has {marks} <{kind}> marks but {given} {kind}s were given{advice}")


def _split(text: str, supply: _Supply) -> str | tuple[str | int, ...]:
    """Text as it is, or, where it holds marks, its pieces with the next image or video for each mark."""
    if not _MARKS.search(text):
        return text
    pieces = [piece for piece in _MARKS.split(text) if piece]
    kinds: dict[str, Literal["image", "video"]] = {IMAGE_MARK: "image", VIDEO_MARK: "video"}
    return tuple(supply.take(kinds[piece]) if piece in kinds else piece for piece in pieces)


def _flat(parts: Sequence[Part]) -> list[str | int]:
    return [piece for part in parts for piece in (part if isinstance(part, tuple) else (part,))]


def _read_message(message: dict[str, Any], number: int, supply: _Supply) -> Message:
    where = f"message {number}"
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise ValueError(f"{where} must name its role (system, user or assistant)")
    if isinstance(content, str):
        return Message(role, (_split(content, supply),))
    if not isinstance(content, (list, tuple)):
        raise ValueError(f"{where} must have content that is a string or a list of items, got a {type(content).__name__}")
    parts: list[Part] = []
    for item in content:
        kind = item.get("type") if isinstance(item, dict) else None
        if kind == "text":
            text = item.get("text")
            if not isinstance(text, str):
                raise ValueError(f"{where} has a text item whose text is a {type(text).__name__}, expected a string")
            parts.append(_split(text, supply))
        elif kind in ("image", "video"):
            if any(isinstance(part, tuple) for part in parts):  # a template may write this one first, out of reading order
                raise ValueError(f"{where} has a {kind} item after marks in its text: give its pictures one way or the other")
            medium = _read_item(item, where)
            bare = medium.source is None
            parts.append(supply.take(medium.kind, medium.num_frames, medium.fps) if bare else supply.add(medium))
        else:
            raise ValueError(f"{where} has an item of type {shown(kind)}, expected text, image or video")
    return Message(role, tuple(parts))


def _read_item(item: dict[str, Any], where: str) -> Media:
    kind: Literal["image", "video"] = item["type"]
    key = next((key for key in _SOURCE_KEYS[kind] if item.get(key) is not None), None)
    source = item[key] if key else None
    if key == "base64":
        if not isinstance(source, str):
            raise ValueError(f"{where} has a base64 image that is a {type(source).__name__}, expected a string")
        source = source if source[:5].lower() == "data:" else f"data:image;base64,{source}"
    if kind == "image":
        return Media("image", source)
    num_frames, fps = item.get("num_frames"), item.get("fps")
    if num_frames is not None and not (is_int(num_frames) and num_frames >= 1):
        raise ValueError(f"{where} has a video with num_frames {shown(num_frames)}, expected an integer >= 1")
    if fps is not None and not (is_number(fps) and fps > 0):
        raise ValueError(f"{where} has a video with fps {shown(fps)}, expected a number > 0")
    return Media("video", source, num_frames, None if fps is None else float(fps))


# --- ids ---


def tokenise(
    conversation: Conversation,
    counts: Sequence[int],
    tokenizer: Any,
    image_token_id: int,
    tokenisation: Tokenisation = "hf",
    chat_template: str | None = None,
    keep_order: bool = False,
) -> list[int]:
    """Prompt ids up to where the answer begins, with counts[k] placeholders (image_token_id) for media k, in reading order.

    counts: 1 for a picture, the number of frames for a video (1 where its frames are pooled into one block).
    chat_template: the checkpoint's, for 'hf'.  keep_order: under 'hf', pictures that follow text in their message stay there
    although the template moves pictures to the front: they and the text after them become one text item of the template.
    Raises ValueError for a role the tokenisation does not know, and where a template does not write every picture once.
    """
    assert len(counts) == len(conversation.media)
    if tokenisation == "hf":
        ids = _hf(conversation, counts, tokenizer, image_token_id, chat_template, keep_order)
    elif not has_chatml(tokenizer):
        text = _vicuna(conversation, [_render(m, counts, first=tokenisation == "demo") for m in conversation.messages], tokenizer)
        ids = encode_chunks(text, tokenizer, image_token_id, special=True)
    else:
        turns = [(m.role, _render(m, counts, first=tokenisation == "demo")) for m in conversation.messages]
        if turns[0][0] != "system":
            turns.insert(0, ("system", QWEN_SYSTEM))
        _check_roles([role for role, _ in turns], tokenisation)
        ids = {"eval": _chatml_eval, "train": _chatml_train, "demo": _chatml_demo}[tokenisation](turns, tokenizer, image_token_id)
    found, expected = ids.count(image_token_id), sum(counts)
    if found != expected:
        raise ValueError(
            f"the prompt was tokenised with {found} pictures instead of {expected}: the chat template does not write each once"
        )
    return ids


def encode(text: str, tokenizer: Any, image_token_id: int, special: bool = True) -> list[int]:
    """Ids of a whole text where <image> is a token of the tokenizer's own; else chunk by chunk around the marks."""
    if token_id(tokenizer, IMAGE_MARK) == image_token_id:
        return encode_text(text, tokenizer, special)
    return encode_chunks(text, tokenizer, image_token_id, special)


def _render(message: Message, counts: Sequence[int], first: bool = False, joint: str = "") -> str:
    """A message as text with marks. first: all marks, a newline, then the text.  joint: put between items, but not two pictures."""
    pieces = _flat(message.parts)
    if first and any(isinstance(piece, int) for piece in pieces):
        marks = IMAGE_MARK * sum(counts[piece] for piece in pieces if isinstance(piece, int))
        return marks + "\n" + "".join(piece for piece in pieces if isinstance(piece, str)).strip()
    text = ""
    for before, part in zip((None, *message.parts), message.parts, strict=False):
        text += "" if before is None or (isinstance(before, int) and isinstance(part, int)) else joint
        text += _inline(part, counts)
    return text


def _inline(part: Part, counts: Sequence[int]) -> str:
    return "".join(IMAGE_MARK * counts[piece] if isinstance(piece, int) else piece for piece in _flat([part]))


def _check_roles(roles: Sequence[str], tokenisation: str) -> None:
    for number, role in enumerate(roles):
        if role not in ("user", "assistant") and (role, number) != ("system", 0):
            raise ValueError(
                f"tokenisation {shown(tokenisation)} takes one system turn at the start, user and assistant turns, got {shown(role)}"
            )


def _chatml_eval(turns: Sequence[tuple[str, str]], tokenizer: Any, image_token_id: int) -> list[int]:
    parts = [part for role, text in turns for part in chatml_eval_turn(role, text, tokenizer, image_token_id)]
    opening, _, _ = chatml_eval_turn("assistant", "", tokenizer, image_token_id)
    return [token for part in [*parts, opening] for token in part]


def _chatml_train(turns: Sequence[tuple[str, str]], tokenizer: Any, image_token_id: int) -> list[int]:
    texts = [chatml_turn(role, text) for role, text in turns] + ["<|im_start|>assistant\n"]
    return [token for text in texts for token in encode(text, tokenizer, image_token_id)]


def _chatml_demo(turns: Sequence[tuple[str, str]], tokenizer: Any, image_token_id: int) -> list[int]:
    text = "".join(chatml_turn(role, text) for role, text in turns) + "<|im_start|>assistant\n"
    return encode_chunks(text, tokenizer, image_token_id, special=True)


def _vicuna(conversation: Conversation, texts: Sequence[str], tokenizer: Any) -> str:
    roles = [message.role for message in conversation.messages]
    _check_roles(roles, "v1")
    return vicuna_text(zip(roles, texts, strict=True), tokenizer.eos_token or "</s>")[0] + "ASSISTANT:"


# --- the checkpoint's template ---


def _hf(
    conversation: Conversation, counts: Sequence[int], tokenizer: Any, image_token_id: int, template: str | None, keep_order: bool
) -> list[int]:
    if conversation.written:
        return encode(_render(conversation.messages[0], counts), tokenizer, image_token_id)
    if template is None and not has_chatml(tokenizer):
        texts = [_render(message, counts, joint="\n") for message in conversation.messages]
        return encode(_vicuna(conversation, texts, tokenizer), tokenizer, image_token_id)
    text = render_template(conversation, counts, tokenizer, template or INTERLEAVE_CHAT_TEMPLATE, keep_order)
    # As transformers' processors: a tokenizer's BOS is added unless the template has written it.
    special = tokenizer.bos_token is None or not text.startswith(tokenizer.bos_token)
    return encode(text, tokenizer, image_token_id, special)


def render_template(conversation: Conversation, counts: Sequence[int], tokenizer: Any, template: str, keep_order: bool = False) -> str:
    """The conversation as a chat template writes it, with the generation prompt; ValueError with the template's own complaint.

    A template that never asks for an item's type wants strings: it gets each message as text, a newline between pictures and text.
    """
    messages: list[dict[str, Any]] = []
    takes_items = re.search(r"""['"]type['"]|\.type\b""", template) is not None
    for message in conversation.messages:
        content: Any = _items(message, counts, keep_order) if takes_items else _render(message, counts, joint="\n")
        messages.append({"role": message.role, "content": content})
    text = _apply(messages, tokenizer, template)
    if takes_items and not keep_order and any(_text_before_picture(message) for message in conversation.messages):
        probe = [{"role": "user", "content": [{"type": "text", "text": "before"}, {"type": "image"}]}]
        written = _apply(probe, tokenizer, template)
        if -1 < written.find(IMAGE_MARK) < written.find("before"):
            warn_once(
                "the checkpoint's chat template moves the pictures of a message before its text; InputOptions(keep_order=True) "
                "keeps them where they stand (said once)"
            )
    return text


def _apply(messages: list[dict[str, Any]], tokenizer: Any, template: str) -> str:
    try:
        return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=True)
    except (jinja2.TemplateError, TypeError) as error:
        raise ValueError(f"the checkpoint's chat template refuses these messages: {error}") from None


def _text_before_picture(message: Message) -> bool:
    kinds = [isinstance(part, int) for part in message.parts]
    return True in kinds and False in kinds[: len(kinds) - kinds[::-1].index(True)]


def _items(message: Message, counts: Sequence[int], keep_order: bool) -> list[dict[str, str]]:
    """The content list a template sees. With keep_order, pictures after text go into that text's item, and so does all after them:
    a message that begins with its pictures is rendered alike either way."""
    items: list[dict[str, str]] = []
    inside = False
    for part in message.parts:
        if isinstance(part, int):
            inside = inside or (keep_order and any(item["type"] == "text" for item in items))
            if inside:
                items[-1]["text"] += IMAGE_MARK * counts[part]
            else:
                items += [{"type": "image"} for _ in range(counts[part])]
        elif inside:
            items[-1]["text"] += _inline(part, counts)
        else:
            items.append({"type": "text", "text": _inline(part, counts)})
    return items
