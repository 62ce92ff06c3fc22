"""Label masks, id for id: every expected sequence is written out as pieces, each supervised (+) or not (-)."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from llava_fast.batch import IGNORE
from llava_fast.demo.tokenizer import train_tokenizer
from llava_fast.inputs.chat import read_prompt, tokenise
from llava_fast.inputs.labels import encode_turns
from llava_fast.inputs.records import Turn
from llava_fast.inputs.templates import INTERLEAVE_CHAT_TEMPLATE, QWEN_SYSTEM, VICUNA_SYSTEM

TEXTS = ["system user assistant You are a helpful assistant.", "What is this? A red cat.\n\nAnd that? A dog.", "USER: ASSISTANT: yes no"]
IMAGE = 9999  # a placeholder that no tokenizer gives
LLAVA_15_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
TWO_TURNS = (
    Turn("user", "<image>\nWhat is this?"),
    Turn("assistant", "A red cat.\nYes."),
    Turn("user", "And that?"),
    Turn("assistant", "A dog."),
)
TWO_PICTURES = (Turn("user", "Is <image> like <image>?"), Turn("assistant", "no"))
WITH_SYSTEM = (Turn("system", "Be a cat."), Turn("user", "And?"), Turn("assistant", "yes"))


@pytest.fixture(scope="module")
def qwen():
    tokenizer = train_tokenizer(TEXTS, "qwen", 400)
    tokenizer.chat_template = INTERLEAVE_CHAT_TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def vicuna():
    """Spaces become part of the following word and every text gets one in front, as with Vicuna's sentencepiece model."""
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    core.decoder = decoders.Metaspace()
    special = ["<unk>", "<s>", "</s>", "<image>"]
    core.train_from_iterator([*TEXTS, VICUNA_SYSTEM], trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False))
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def expected(tokenizer, pieces):
    """[(text | special token | IMAGE, '+' or '-')] -> ids and labels; each piece is tokenised by itself."""
    ids, labels = [], []
    for piece, sign in pieces:
        if piece == IMAGE or piece in tokenizer.all_special_tokens:
            part = [IMAGE if piece == IMAGE else tokenizer.convert_tokens_to_ids(piece)]
        else:
            part = tokenizer(piece, add_special_tokens=False)["input_ids"]
        ids += part
        labels += part if sign == "+" else [IGNORE] * len(part)
    return ids, labels


def check(tokenizer, turns, template, pieces, **options):
    got = encode_turns(turns, template, tokenizer, IMAGE, **options)
    ids, labels = expected(tokenizer, pieces)
    assert got.ids == ids
    assert got.labels == labels


def open_turn(role, sign="-"):
    return [("<|im_start|>", "+"), (role, sign), ("\n", "+")]


CLOSE = [("<|im_end|>", "+"), ("\n", "+")]


def test_qwen_unmasks_newlines_and_turn_marks_everywhere(qwen):
    check(
        qwen,
        TWO_TURNS,
        "qwen_1_5",
        [
            *open_turn("system"), (QWEN_SYSTEM, "-"), *CLOSE,
            *open_turn("user"), (IMAGE, "-"), ("\n", "+"), ("What is this?", "-"), *CLOSE,
            *open_turn("assistant", "+"), ("A red cat.", "+"), ("\n", "+"), ("Yes.", "+"), *CLOSE,
            *open_turn("user"), ("And that?", "-"), *CLOSE,
            *open_turn("assistant", "+"), ("A dog.", "+"), *CLOSE,
        ],
    )  # fmt: skip
    check(
        qwen,
        TWO_PICTURES,
        "qwen_1_5",
        [
            *open_turn("system"), (QWEN_SYSTEM, "-"), *CLOSE,
            *open_turn("user"), ("Is ", "-"), (IMAGE, "-"), (" like ", "-"), (IMAGE, "-"), ("?", "-"), *CLOSE,
            *open_turn("assistant", "+"), ("no", "+"), *CLOSE,
        ],
    )  # fmt: skip


def test_qwen_newlines_are_looked_up_not_numbered_198(qwen):
    newline = qwen("\n", add_special_tokens=False)["input_ids"]
    assert len(newline) == 1 and newline[0] != 198
    got = encode_turns(TWO_TURNS, "qwen_1_5", qwen, IMAGE)
    assert all(label == token for token, label in zip(got.ids, got.labels, strict=True) if token == newline[0])


def test_qwen_eval_variant(qwen):
    masked_open = [("<|im_start|>", "+"), ("assistant", "-"), ("\n", "-")]

    def masked_turn(role, *text):
        return [("<|im_start|>", "+"), (role, "-"), ("\n", "-"), *((piece, "-") for piece in text), *CLOSE]

    check(
        qwen,
        TWO_TURNS,
        "qwen_1_5_eval",
        [
            *masked_turn("system", QWEN_SYSTEM),
            *masked_turn("user", IMAGE, "\n", "\nWhat is this?"),
            *masked_open, ("A red cat.\nYes.", "+"), *CLOSE,
            *masked_turn("user", "And that?"),
            *masked_open, ("A dog.", "+"), *CLOSE,
        ],
    )  # fmt: skip
    check(
        qwen,
        TWO_PICTURES,
        "qwen_1_5_eval",
        [
            *masked_turn("system", QWEN_SYSTEM),
            *masked_turn("user", "Is ", IMAGE, "\n", " like ", IMAGE, "\n", "?"),
            *masked_open, ("no", "+"), *CLOSE,
        ],
    )  # fmt: skip


@pytest.mark.parametrize("template", ["qwen_1_5", "qwen_1_5_eval"])
def test_a_system_turn_replaces_the_default(qwen, template):
    got = encode_turns(WITH_SYSTEM, template, qwen, IMAGE)
    assert qwen.decode(got.ids).startswith("<|im_start|>system\nBe a cat.<|im_end|>\n<|im_start|>user\nAnd?")


def test_vicuna_supervises_answers_and_their_stop(vicuna):
    # The token that opens an answer carries the space before it, so the pieces are cut there; Metaspace adds one to each piece.
    check(
        vicuna,
        TWO_TURNS,
        "v1",
        [
            ("<s>", "-"), (VICUNA_SYSTEM + " USER: ", "-"), (IMAGE, "-"),
            ("\nWhat is this? ASSISTANT:", "-"), ("A red cat.\nYes.", "+"), ("</s>", "+"),
            ("USER: And that? ASSISTANT:", "-"), ("A dog.", "+"), ("</s>", "+"),
        ],
    )  # fmt: skip
    check(vicuna, WITH_SYSTEM, "v1", [("<s>", "-"), ("Be a cat. USER: And? ASSISTANT:", "-"), ("yes", "+"), ("</s>", "+")])


def upstream_vicuna(tokenizer, turns, image):
    """The counting of LLaVA's preprocess_v1 in our own words: rounds are re-tokenised and their lengths summed."""

    def tokens(text):
        ids = [1]
        for number, chunk in enumerate(text.split("<image>")):
            ids += ([image] if number else []) + tokenizer(chunk)["input_ids"][1:]
        return ids

    rounds = [f"USER: {q.text} ASSISTANT: {a.text}" for q, a in zip(turns[::2], turns[1::2], strict=True)]
    rounds[0] = f"{VICUNA_SYSTEM} {rounds[0]}"
    ids = tokens("</s>".join(rounds) + "</s>")
    labels, at = list(ids), 1
    labels[0] = IGNORE
    for text in rounds:
        prompt = len(tokens(text.split(" ASSISTANT: ")[0] + " ASSISTANT: ")) - 2
        labels[at : at + prompt] = [IGNORE] * prompt
        at += len(tokens(text))  # <s> is counted in place of </s>
    assert at == len(ids)
    return ids, labels


@pytest.mark.parametrize("turns", [TWO_TURNS, TWO_PICTURES, TWO_TURNS[2:]])
def test_vicuna_equals_counting_rounds_as_upstream(vicuna, turns):
    got = encode_turns(turns, "v1", vicuna, IMAGE)
    assert (got.ids, got.labels) == upstream_vicuna(vicuna, turns, IMAGE)


def test_vicuna_with_a_byte_level_tokenizer(qwen):
    got = encode_turns(TWO_TURNS[2:], "v1", qwen, IMAGE)
    supervised = [token for token, label in zip(got.ids, got.labels, strict=True) if label != IGNORE]
    assert qwen.decode(supervised) == " A dog.<|im_end|>"


@pytest.mark.parametrize("name", ["qwen", "vicuna"])
def test_plain_supervises_the_caption_and_drops_the_question(name, request):
    tokenizer = request.getfixturevalue(name)
    turns = (Turn("user", "<image>\nDescribe."), Turn("assistant", "A red cat."))
    start = [("<s>", "-")] if name == "vicuna" else []
    check(tokenizer, turns, "plain", [*start, (IMAGE, "-"), ("A red cat.\n", "+")])


def test_hf_supervises_answers_after_the_generation_prompt(qwen):
    check(
        qwen,
        TWO_TURNS,
        "hf",
        [
            ("<|im_start|>", "-"), ("user\n", "-"), (IMAGE, "-"), ("\nWhat is this?", "-"), ("<|im_end|>", "-"), ("\n", "-"),
            ("<|im_start|>", "-"), ("assistant\n", "-"), ("A red cat.\nYes.", "+"), ("<|im_end|>", "+"), ("\n", "-"),
            ("<|im_start|>", "-"), ("user\n\nAnd that?", "-"), ("<|im_end|>", "-"), ("\n", "-"),
            ("<|im_start|>", "-"), ("assistant\n", "-"), ("A dog.", "+"), ("<|im_end|>", "+"), ("\n", "-"),
        ],
    )  # fmt: skip


def test_hf_with_a_template_that_names_no_stop(vicuna):
    check(
        vicuna,
        TWO_TURNS,
        "hf",
        [
            ("<s>", "-"), ("USER: ", "-"), (IMAGE, "-"), ("\nWhat is this? ASSISTANT:", "-"), ("A red cat.\nYes.", "+"), ("</s>", "+"),
            ("USER: And that? ASSISTANT:", "-"), ("A dog.", "+"), ("</s>", "+"),
        ],
        chat_template=LLAVA_15_TEMPLATE,
    )  # fmt: skip


@pytest.mark.parametrize("keep_order", [False, True])
@pytest.mark.parametrize(
    "turns", [TWO_TURNS, TWO_PICTURES, (Turn("user", "<image><image>\nWhat is this?"), Turn("assistant", "cat")), WITH_SYSTEM]
)
@pytest.mark.parametrize("name", ["qwen", "vicuna"])
def test_hf_prompt_is_what_generate_renders(name, turns, keep_order, request):
    tokenizer = request.getfixturevalue(name)
    template = INTERLEAVE_CHAT_TEMPLATE if name == "qwen" else LLAVA_15_TEMPLATE
    first = turns[: 1 + (turns[0].role == "system")]
    messages, media = [], 0
    for turn in first:
        content = []
        for number, piece in enumerate(turn.text.split("<image>")):
            content += [{"type": "image", "image": "x"}] if number else []
            content += [{"type": "text", "text": piece.strip("\n")}] if piece.strip("\n") else []
        media += turn.text.count("<image>")
        messages.append({"role": turn.role, "content": content})
    mark = tokenizer.convert_tokens_to_ids("<image>")
    prompt = tokenise(read_prompt(messages), [1] * media, tokenizer, mark, "hf", template, keep_order)
    got = encode_turns(turns, "hf", tokenizer, mark, chat_template=template, keep_order=keep_order)
    assert got.ids[: len(prompt)] == prompt
    assert set(got.labels[: len(prompt)]) == {IGNORE} and got.labels[len(prompt)] != IGNORE


@pytest.mark.parametrize("template", ["qwen_1_5", "qwen_1_5_eval", "hf"])
def test_a_mark_stands_for_as_many_placeholders_as_its_video_has_frames(qwen, template):
    turns = (Turn("user", "<image>\nAnd <image>?"), Turn("assistant", "yes"))
    written_out = (Turn("user", "<image><image><image>\nAnd <image>?"), Turn("assistant", "yes"))
    assert encode_turns(turns, template, qwen, IMAGE, counts=[3, 1]) == encode_turns(written_out, template, qwen, IMAGE)


def test_hf_without_a_template_is_vicunas(vicuna):
    assert vicuna.chat_template is None
    assert encode_turns(TWO_TURNS, "hf", vicuna, IMAGE) == encode_turns(TWO_TURNS, "v1", vicuna, IMAGE)


def test_errors(qwen, vicuna):
    with pytest.raises(ValueError, match="'llama_2'"):
        encode_turns(TWO_TURNS, "llama_2", qwen, IMAGE)
    with pytest.raises(ValueError, match="im_start"):
        encode_turns(TWO_TURNS, "qwen_1_5", vicuna, IMAGE)
    with pytest.raises(ValueError, match="rewrites earlier turns"):
        encode_turns(TWO_TURNS, "hf", qwen, IMAGE, chat_template="{{ messages | length }}" + LLAVA_15_TEMPLATE)
    for turns, message in ((TWO_TURNS, "4 turns"), (TWO_PICTURES, "2 pictures"), (TWO_TURNS[2:], "0 pictures")):
        with pytest.raises(ValueError, match=message):
            encode_turns(turns, "plain", qwen, IMAGE)
