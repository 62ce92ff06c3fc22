"""A conversation as token ids with one placeholder a picture, and the labels that its template trains on.

Templates, with LLaVA-NeXT's sources (llava/train/train.py at df17966 unless said):
  qwen_1_5       preprocess_qwen. ChatML; the whole assistant turn is supervised, and so is every newline, <|im_start|> and
                 <|im_end|> anywhere, in system and user turns too.
  qwen_1_5_eval  the older preprocess_qwen of llava/eval/model_vqa.py and train_dpo.py: an extra newline after every picture; the
                 assistant's role word and its newline are not supervised, of the other turns only <|im_start|>, <|im_end|> and
                 the last newline are.
  v1             preprocess_v1 (Vicuna): answers and their </s>.
  plain          preprocess_plain: "<image>{caption}\\n", caption and newline supervised, the question dropped.
  hf             the checkpoint's chat template: the prompt ids are those that `generate` renders, the answer and the token that
                 ends its turn are supervised.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from llava_fast.batch import IGNORE
from llava_fast.checks import shown
from llava_fast.inputs import chat
from llava_fast.inputs.records import MARK, Turn
from llava_fast.inputs.templates import (
    INTERLEAVE_CHAT_TEMPLATE,
    QWEN_SYSTEM,
    chatml_eval_turn,
    chatml_ids,
    chatml_turn,
    encode_chunks,
    encode_text,
    has_chatml,
    vicuna_text,
)

Template = Literal["qwen_1_5", "qwen_1_5_eval", "v1", "plain", "hf"]


@dataclass(frozen=True)
class Labelled:
    """ids with one placeholder a picture, and labels of the same length: the id where it is supervised, IGNORE elsewhere."""

    ids: list[int]
    labels: list[int]


def encode_turns(
    turns: Sequence[Turn],
    template: Template,
    tokenizer: Any,
    image_token_id: int,
    counts: Sequence[int] | None = None,
    chat_template: str | None = None,
    keep_order: bool = False,
) -> Labelled:
    """Ids and labels of checked turns (`records.Record.turns`) for a fast Hugging Face tokenizer.

    A leading system turn replaces the template's own system text. Text between marks is tokenised by itself, so that no merge
    crosses a picture.
    counts: placeholders that each mark stands for, in order (the frames of a video); None: one each.
    chat_template, keep_order: for 'hf', as in chat.tokenise; None: the tokenizer's own template, else ChatML or Vicuna as there.
    Raises ValueError for an unknown template or a tokenizer that lacks what the template needs.
    """
    if template not in get_args(Template):
        raise ValueError(f"template must be one of {', '.join(get_args(Template))}, got {shown(template)}")
    if counts is not None:
        turns = _expand_marks(turns, counts)
    system = turns[0].text if turns[0].role == "system" else None
    dialogue = [turn for turn in turns if turn.role != "system"]
    if template == "qwen_1_5":
        return _qwen(system, dialogue, tokenizer, image_token_id)
    if template == "qwen_1_5_eval":
        return _qwen_eval(system, dialogue, tokenizer, image_token_id)
    if template == "v1":
        return _vicuna(turns, tokenizer, image_token_id)
    if template == "plain":
        return _plain(dialogue, tokenizer, image_token_id)
    chat_template = chat_template or tokenizer.chat_template
    if chat_template is None and not has_chatml(tokenizer):
        return _vicuna(turns, tokenizer, image_token_id)
    return _hf(turns, tokenizer, image_token_id, chat_template, keep_order)


def _expand_marks(turns: Sequence[Turn], counts: Sequence[int]) -> list[Turn]:
    remaining = iter(counts)
    expanded = []
    for turn in turns:
        first, *rest = turn.text.split(MARK)
        expanded.append(Turn(turn.role, first + "".join(MARK * next(remaining) + piece for piece in rest)))
    return expanded


def _with_system(system: str | None, dialogue: Sequence[Turn]) -> list[Turn]:
    return [Turn("system", QWEN_SYSTEM if system is None else system), *dialogue]


def _qwen(system: str | None, dialogue: Sequence[Turn], tokenizer: Any, image: int) -> Labelled:
    always = {*_chatml_tokens(tokenizer)}
    ids: list[int] = []
    labels: list[int] = []
    for turn in _with_system(system, dialogue):
        turn_ids = encode_chunks(chatml_turn(turn.role, turn.text), tokenizer, image)
        ids += turn_ids
        labels += [i if turn.role == "assistant" or i in always else IGNORE for i in turn_ids]
    return Labelled(ids, labels)


def _qwen_eval(system: str | None, dialogue: Sequence[Turn], tokenizer: Any, image: int) -> Labelled:
    ids: list[int] = []
    labels: list[int] = []
    for turn in _with_system(system, dialogue):
        opening, text, end = chatml_eval_turn(turn.role, turn.text, tokenizer, image)
        ids += opening + text + end
        labels += [opening[0], *[IGNORE] * len(opening[1:]), *(text if turn.role == "assistant" else [IGNORE] * len(text)), *end]
    return Labelled(ids, labels)


def _vicuna(turns: Sequence[Turn], tokenizer: Any, image: int) -> Labelled:
    """Answers and what ends them; the labels are found by character, not by counting tokens as upstream."""
    stop = tokenizer.eos_token
    if stop is None or not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"template v1 needs a fast tokenizer with an end-of-sequence token, got {type(tokenizer).__name__} with eos {shown(stop)}"
        )
    text, answers = vicuna_text([(turn.role, turn.text) for turn in turns], stop)
    ids = _start(tokenizer)
    labels = [IGNORE] * len(ids)
    offset = 0
    for number, chunk in enumerate(text.split(MARK)):
        if number:
            ids.append(image)
            labels.append(IGNORE)
            offset += len(MARK)
        encoded = tokenizer(chunk, add_special_tokens=False, return_offsets_mapping=True)
        for token, (begin, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
            # A token that carries the space before the answer starts ahead of it, so the end decides.
            inside = any(first < offset + end <= last and offset + begin < last for first, last in answers)
            ids.append(token)
            labels.append(token if inside else IGNORE)
        offset += len(chunk)
    return Labelled(ids, labels)


def _plain(dialogue: Sequence[Turn], tokenizer: Any, image: int) -> Labelled:
    marks = dialogue[0].text.count(MARK)
    if len(dialogue) != 2 or not marks or MARK * marks not in dialogue[0].text:
        raise ValueError(
            f"template plain takes one picture (or several side by side) and one caption, got {marks} pictures and {len(dialogue)} turns"
        )
    prompt = [*_start(tokenizer), *[image] * marks]
    caption = encode_text(dialogue[1].text + "\n", tokenizer)
    return Labelled(prompt + caption, [IGNORE] * len(prompt) + caption)


def _hf(turns: Sequence[Turn], tokenizer: Any, image: int, chat_template: str | None, keep_order: bool) -> Labelled:
    """Every answer follows a generation prompt, as in `generate`; a template may render past answers a little differently
    (the released ones put a newline before them that the generation prompt lacks)."""
    template = chat_template or INTERLEAVE_CHAT_TEMPLATE

    def render(shown: Sequence[Turn]) -> str:
        messages = tuple(chat.Message(turn.role, _parts(turn.text)) for turn in shown)
        return chat.render_template(chat.Conversation(messages, ()), [1], tokenizer, template, keep_order)

    generation_prompt, tail, supervised = _answer_frame(tokenizer, template)
    ids: list[int] = []
    labels: list[int] = []
    done = ""
    for number, turn in enumerate(turns, 1):
        if turn.role == "assistant":
            answer = encode_text(turn.text, tokenizer)
            ids += answer + tail
            labels += answer + tail[:supervised] + [IGNORE] * (len(tail) - supervised)
            done = render(turns[:number]).removesuffix(generation_prompt) if number < len(turns) else ""
        elif turn.role == "user":
            text = render(turns[:number])
            if not text.startswith(done):
                raise ValueError(f"the chat template rewrites earlier turns: {shown(done)} became {shown(text[: len(done)])}")
            add_start = not done and (tokenizer.bos_token is None or not text.startswith(tokenizer.bos_token))
            prompt = chat.encode(text[len(done) :], tokenizer, image, add_start)
            ids += prompt
            labels += [IGNORE] * len(prompt)
    return Labelled(ids, labels)


@functools.lru_cache(maxsize=4)
def _answer_frame(tokenizer: Any, template: str) -> tuple[str, list[int], int]:
    """What a chat template writes to ask for an answer; the ids after an answer; how many of those are supervised."""
    content: list[Any] = [[{"type": "text", "text": text}] if "type" in template else text for text in ("?", "\N{END OF TEXT}")]
    messages = [{"role": "user", "content": content[0]}, {"role": "assistant", "content": content[1]}]
    without, asking, answered = (
        tokenizer.apply_chat_template(shown, chat_template=template, tokenize=False, add_generation_prompt=prompt)
        for shown, prompt in ((messages[:1], False), (messages[:1], True), (messages, False))
    )
    tail = encode_text(answered.rpartition("\N{END OF TEXT}")[2], tokenizer)
    special = set(tokenizer.all_special_ids)
    supervised = next((number + 1 for number, token in enumerate(tail) if token in special), 0)
    if not supervised:  # LLaVA-1.5's template ends an answer with a space, but generation must learn to stop
        tail, supervised = [tokenizer.eos_token_id], 1
    return asking.removeprefix(without), tail, supervised


def _parts(text: str) -> tuple[str | int, ...]:
    """Text and media numbers of a turn; the newline that sets a mark off from its text is the template's to write."""
    parts: list[str | int] = []
    for number, piece in enumerate(text.split(MARK)):
        if number:
            parts.append(0)
        if piece := (piece.strip("\n") if MARK in text else piece):
            parts.append(piece)
    return tuple(parts)


def _chatml_tokens(tokenizer: Any) -> tuple[int, int, int]:
    """Ids of <|im_start|>, <|im_end|> and newline."""
    start, end, newline = chatml_ids(tokenizer)
    if len(newline) != 1:
        raise ValueError(f"template qwen_1_5 needs a tokenizer whose newline is one token, got {newline}")
    return start, end, newline[0]


def _start(tokenizer: Any) -> list[int]:
    """The token that the tokenizer puts before every text ([] for Qwen)."""
    return [tokenizer.bos_token_id] if tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id] else []
