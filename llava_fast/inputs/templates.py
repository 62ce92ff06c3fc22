"""What chat.py and labels.py write alike: system texts, the turns of ChatML and Vicuna, ids around pictures; and a chat template that
this package can write into a checkpoint that has none."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer

IMAGE_MARK = "<image>"
QWEN_SYSTEM = "You are a helpful assistant."
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

# As shipped with llava-interleave-qwen: pictures first, then the text, each message closed by <|im_end|>.
INTERLEAVE_CHAT_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ '\n' + content['text'] }}{% endfor %}"
    "{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ '\n' + content['text'] }}{% endgeneration %}{% endfor %}{% endif %}"
    "{{'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def token_id(tokenizer: Any, token: str) -> int | None:
    """The id of a token of the vocabulary. (`get_vocab` would copy 150,000 entries for each.)"""
    found = tokenizer.convert_tokens_to_ids(token)
    return None if found is None or found == tokenizer.unk_token_id else found


def has_chatml(tokenizer: Any) -> bool:
    return token_id(tokenizer, "<|im_start|>") is not None


def encode_text(text: str, tokenizer: Any, special: bool = False) -> list[int]:
    """special: with the tokens that the tokenizer puts around every text.

    A fast tokenizer's own Rust object is asked where it neither cuts nor pads: 0.33 ms for 1,250 characters, against 0.55.
    """
    backend = getattr(tokenizer, "_tokenizer", None)
    if isinstance(backend, Tokenizer) and backend.truncation is None and backend.padding is None and not tokenizer.split_special_tokens:
        return backend.encode_batch_fast([text], add_special_tokens=special)[0].ids
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def encode_chunks(text: str, tokenizer: Any, image_token_id: int, special: bool = False) -> list[int]:
    """LLaVA's tokenizer_image_token: the text between marks by itself, one leading BOS at most, no merge across a picture."""
    chunks = [encode_text(chunk, tokenizer, special) for chunk in text.split(IMAGE_MARK)]
    bos = int(special and chunks[0][:1] == [tokenizer.bos_token_id])
    ids = chunks[0]
    for chunk in chunks[1:]:
        ids = [*ids, image_token_id, *chunk[bos:]]
    return ids


def chatml_turn(role: str, text: str) -> str:
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


def chatml_ids(tokenizer: Any) -> tuple[int, int, list[int]]:
    """Ids of <|im_start|>, <|im_end|> and of a newline."""
    start, end = token_id(tokenizer, "<|im_start|>"), token_id(tokenizer, "<|im_end|>")
    if start is None or end is None:
        raise ValueError(f"a ChatML template needs a tokenizer with <|im_start|> and <|im_end|>, got {type(tokenizer).__name__} without")
    return start, end, encode_text("\n", tokenizer)


def chatml_eval_turn(role: str, text: str, tokenizer: Any, image_token_id: int) -> tuple[list[int], list[int], list[int]]:
    """Ids of a turn's opening, text and end as llava/eval/model_vqa.py makes them: in pieces, a newline after every picture."""
    start, end, newline = chatml_ids(tokenizer)
    body: list[int] = []
    for number, chunk in enumerate(text.split(IMAGE_MARK)):
        body += ([image_token_id, *newline] if number else []) + encode_text(chunk, tokenizer)
    return [start, *encode_text(role, tokenizer), *newline], body, [end, *newline]


def vicuna_text(turns: Iterable[tuple[str, str]], stop: str) -> tuple[str, list[tuple[int, int]]]:
    """ "{system} USER: {question} ASSISTANT: {answer}</s>USER: ..." of (role, text), and where each answer and its `stop` begin and end."""
    turns = list(turns)
    if turns[0][0] != "system":
        turns.insert(0, ("system", VICUNA_SYSTEM))
    text, answers = "", []
    for role, words in turns:
        if role == "assistant":
            text += "ASSISTANT: "
            answers.append((len(text), len(text) + len(words) + len(stop)))
            text += words + stop
        else:
            text += f"{words} " if role == "system" else f"USER: {words} "
    return text, answers
