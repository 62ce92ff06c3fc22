"""Prompts to ids: the four tokenisations against transformers' LlavaProcessor and against layouts spelt out by hand."""

from __future__ import annotations

import base64
import logging

import pytest
from PIL import Image
from transformers import LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from llava_fast.demo.tokenizer import train_tokenizer
from llava_fast.inputs import chat
from llava_fast.inputs.chat import Media, read_prompt, render_template, tokenise
from llava_fast.inputs.templates import INTERLEAVE_CHAT_TEMPLATE, QWEN_SYSTEM, VICUNA_SYSTEM

TEXTS = [
    "system user assistant You are a helpful assistant. USER: ASSISTANT: A chat between a curious user and an artificial assistant.",
    "What is the difference between the two pictures?\n\nCompare them in detail.\n Which is the odd one out, and why?\n",
]
# As shipped with llava-1.5-hf.
VICUNA_CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}USER: {% else %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{# Render all images first #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{# Render all text next #}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' ' }}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
STRING_CHAT_TEMPLATE = (  # Qwen's own, for text models: content is a string
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PICTURE = Image.new("RGB", (4, 4))


@pytest.fixture(scope="module")
def qwen():
    return train_tokenizer(TEXTS * 4, "qwen", 400)


@pytest.fixture(scope="module")
def llama():
    return train_tokenizer(TEXTS * 4, "llama", 400)


def image(source=PICTURE):
    return {"type": "image", "image": source}


def text(words):
    return {"type": "text", "text": words}


def user(*items):
    return {"role": "user", "content": list(items)}


def assistant(words):
    return {"role": "assistant", "content": [text(words)]}


def mark_id(tokenizer):
    return tokenizer.convert_tokens_to_ids("<image>")


def ids_of(prompt, tokenizer, tokenisation="hf", images=(), counts=None, **options):
    conversation = read_prompt(prompt, images)
    return tokenise(conversation, counts or [1] * len(conversation.media), tokenizer, mark_id(tokenizer), tokenisation, **options)


def processor(tokenizer, template):
    """LlavaProcessor with one token a picture, so that its ids can be compared with placeholders."""
    if tokenizer.bos_token:
        picture = CLIPImageProcessorPil(size={"shortest_edge": 4}, crop_size={"height": 4, "width": 4})
    else:
        picture = SiglipImageProcessorPil(size={"height": 4, "width": 4})
    return LlavaProcessor(picture, tokenizer, patch_size=4, vision_feature_select_strategy="full", chat_template=template)


CONVERSATIONS = {
    "one": [user(image(), text("What is this?"))],
    "two": [user(image(), image(), text("What is the difference?"))],
    "text only": [user(text("Hello, what are you?"))],
    "hoisted": [user(text("Compare"), image(), text("with"), image(), text("in detail."))],
    "system": [{"role": "system", "content": [text("You are terse.")]}, user(image(), text("What is this?"))],
    "turns": [user(image(), text("What?")), assistant("A cat."), user(image(), text("And this?")), assistant("Two."), user(text("Why?"))],
    "empty text": [user(image(), text(""))],
    "two texts": [user(text("First."), text("Second."), image())],
    "special": [user(image(), text("a<|im_end|>\n<|im_start|>system\nb</s><s>c"))],
    "unicode": [user(image(), text("Was ist das für ein Bär? 猫 🐈\n\n\n"))],
}


# --- hf ---


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("family", ["qwen", "llama"])
def test_hf_equals_llava_processor(name, family, request):
    tokenizer = request.getfixturevalue(family)
    template = INTERLEAVE_CHAT_TEMPLATE if family == "qwen" else VICUNA_CHAT_TEMPLATE
    messages = CONVERSATIONS[name]
    want = processor(tokenizer, template).apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    assert ids_of(messages, tokenizer, chat_template=template) == want["input_ids"][0]


def test_hf_is_the_text_of_the_released_template(qwen):
    conversation = read_prompt(CONVERSATIONS["turns"])
    assert render_template(conversation, [1, 1], qwen, INTERLEAVE_CHAT_TEMPLATE) == (
        "<|im_start|>user\n<image>\nWhat?<|im_end|>\n<|im_start|>assistant\n\nA cat.<|im_end|>\n"
        "<|im_start|>user\n<image>\nAnd this?<|im_end|>\n<|im_start|>assistant\n\nTwo.<|im_end|>\n"
        "<|im_start|>user\n\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert ids_of(CONVERSATIONS["turns"], qwen) == ids_of(CONVERSATIONS["turns"], qwen, chat_template=INTERLEAVE_CHAT_TEMPLATE)


@pytest.mark.parametrize("family", ["qwen", "llama"])
@pytest.mark.parametrize(
    "prompt",
    [
        "<|im_start|>user <image>\nWhat are these?<|im_end|><|im_start|>assistant",
        "USER: <image>\nWhat? ASSISTANT:",
        "<image>",
        "<image><image> difference?",
        "Compare <image> with <image>\n\nin detail ",
        "<s>USER: <image>",
        "no picture",
    ],
)
def test_a_string_is_taken_as_written(prompt, family, request):
    tokenizer = request.getfixturevalue(family)
    pictures = [PICTURE] * prompt.count("<image>")
    want = processor(tokenizer, None)(text=prompt, images=pictures or None)
    assert ids_of(prompt, tokenizer, images=pictures) == want["input_ids"][0]


def test_a_plain_string_as_content_is_one_text_item(qwen):
    assert ids_of([{"role": "user", "content": "What?"}], qwen) == ids_of([user(text("What?"))], qwen)


def test_llama_without_a_template_is_vicuna(llama):
    prompt = f"{VICUNA_SYSTEM} USER: <image>\nWhat? ASSISTANT:"
    assert ids_of([user(image(), text("What?"))], llama) == ids_of(prompt, llama, images=[PICTURE])
    turns = [user(image(), text("What?")), assistant("A cat."), user(text("Why?"))]
    prompt = f"{VICUNA_SYSTEM} USER: <image>\nWhat? ASSISTANT: A cat.</s>USER: Why? ASSISTANT:"
    assert ids_of(turns, llama) == ids_of(prompt, llama, images=[PICTURE])
    system = [{"role": "system", "content": "Be terse."}, user(image(), image(), text("What?"))]
    assert ids_of(system, llama) == ids_of("Be terse. USER: <image><image>\nWhat? ASSISTANT:", llama, images=[PICTURE] * 2)


def test_a_template_for_strings_gets_strings(qwen):
    messages = [{"role": "system", "content": "Be terse."}, user(image(), image(), text("What?"))]
    want = "<|im_start|>system\nBe terse.<|im_end|>\n<|im_start|>user\n<image><image>\nWhat?<|im_end|>\n<|im_start|>assistant\n"
    assert render_template(read_prompt(messages), [1, 1], qwen, STRING_CHAT_TEMPLATE) == want


def test_a_video_is_its_frames_in_place(qwen):
    messages = [user(image(), {"type": "video", "video": "clip.mp4"}, text("What?"))]
    frames = [user(*[image()] * 5, text("What?"))]
    assert ids_of(messages, qwen, counts=[1, 4]) == ids_of(frames, qwen)
    conversation = read_prompt("<image>\n<video>\nWhat?", [PICTURE], ["clip.mp4"])
    assert tokenise(conversation, [1, 3], qwen, mark_id(qwen)) == ids_of(
        "<image>\n<image><image><image>\nWhat?", qwen, images=[PICTURE] * 4
    )


def test_marks_unknown_to_the_tokenizer_split_the_text(qwen):
    conversation = read_prompt("Compare <image> with <image>\n", [PICTURE] * 2)
    want = [*qwen("Compare ").input_ids, -200, *qwen(" with ").input_ids, -200, *qwen("\n").input_ids]
    assert tokenise(conversation, [1, 1], qwen, -200) == want


def test_a_template_that_writes_bos_loses_nothing_after_a_picture(llama):
    """Text after a mark that the tokenizer does not know begins with a word, not with a BOS to be cut off."""
    template = "{{ bos_token }}{% for m in messages %}USER: {{ m['content'] }} {% endfor %}ASSISTANT:"
    conversation = read_prompt([user(text("Compare"), image(), text("with"), image(), text("now"))])
    plain = [llama(words, add_special_tokens=False).input_ids for words in ("<s>USER: Compare\n", "\nwith\n", "\nnow ASSISTANT:")]
    assert plain[0][0] == llama.bos_token_id
    assert tokenise(conversation, [1, 1], llama, -200, chat_template=template) == [*plain[0], -200, *plain[1], -200, *plain[2]]


# --- keep_order ---


def kept(messages, tokenizer):
    conversation = read_prompt(messages)
    return render_template(conversation, [1] * len(conversation.media), tokenizer, INTERLEAVE_CHAT_TEMPLATE, keep_order=True)


def test_keep_order_leaves_pictures_where_they_stand(qwen):
    assert (
        kept(CONVERSATIONS["hoisted"], qwen) == "<|im_start|>user\n\nCompare<image>with<image>in detail.<|im_end|>\n<|im_start|>assistant\n"
    )
    mixed = [user(image(), text("first "), image(), text(" second"))]
    assert kept(mixed, qwen) == "<|im_start|>user\n<image>\nfirst <image> second<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("name", ["one", "two", "text only", "system", "turns", "empty text"])
def test_keep_order_changes_nothing_where_pictures_come_first(name, qwen):
    assert ids_of(CONVERSATIONS[name], qwen, keep_order=True) == ids_of(CONVERSATIONS[name], qwen)


def test_moving_pictures_is_said_once(qwen, caplog):
    chat.warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, "llava_fast.inputs.chat"):
        for name in ("one", "two", "turns"):
            ids_of(CONVERSATIONS[name], qwen)
        ids_of(CONVERSATIONS["hoisted"], qwen, keep_order=True)
        for tokenisation in ("eval", "train", "demo"):
            ids_of(CONVERSATIONS["hoisted"], qwen, tokenisation)
        ids_of(CONVERSATIONS["hoisted"], qwen, chat_template=STRING_CHAT_TEMPLATE)
        assert not caplog.records
        ids_of(CONVERSATIONS["hoisted"], qwen)
        ids_of(CONVERSATIONS["hoisted"], qwen)
    assert [record.message for record in caplog.records if "keep_order=True" in record.message] == [caplog.records[0].message]


# --- eval, train, demo ---


def test_eval_layout_id_for_id(qwen):
    def tok(words):
        return qwen(words).input_ids

    start, end, mark = (qwen.convert_tokens_to_ids(token) for token in ("<|im_start|>", "<|im_end|>", "<image>"))
    (newline,) = tok("\n")
    head = [start, *tok("system"), newline, *tok(QWEN_SYSTEM), end, newline, start, *tok("user"), newline]
    tail = [end, newline, start, *tok("assistant"), newline]
    got = ids_of("<image>\n<image>\nWhat is the difference?", qwen, "eval", [PICTURE] * 2)
    assert got == [*head, mark, newline, *tok("\n"), mark, newline, *tok("\nWhat is the difference?"), *tail]
    got = ids_of("Compare <image> with <image>\n\nin detail.", qwen, "eval", [PICTURE] * 2)
    assert got == [*head, *tok("Compare "), mark, newline, *tok(" with "), mark, newline, *tok("\n\nin detail."), *tail]
    turns = [user(image(), text("\nWhat?")), assistant("A cat."), user(text("Why?"))]
    assert ids_of(turns, qwen, "eval") == [
        *head, mark, newline, *tok("\nWhat?"), end, newline, start, *tok("assistant"), newline, *tok("A cat."), end, newline,
        start, *tok("user"), newline, *tok("Why?"), *tail,
    ]  # fmt: skip
    own = [{"role": "system", "content": "Be terse."}, user(text("Why?"))]
    assert ids_of(own, qwen, "eval")[:3] == [start, *tok("system"), newline]
    assert ids_of(own, qwen, "eval") == [
        start, *tok("system"), newline, *tok("Be terse."), end, newline, start, *tok("user"), newline, *tok("Why?"), *tail,
    ]  # fmt: skip


def test_train_layout_id_for_id(qwen):
    turns = ["<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n", "<|im_start|>user\n{}<|im_end|>\n", "<|im_start|>assistant\n"]
    for question in ("<image>\n<image>\nWhat is it?", "Compare <image> with <image>\n\nin detail.", "\nWhat?"):
        want = [token for turn in turns for token in qwen(turn.format(question)).input_ids]
        assert ids_of(question, qwen, "train", [PICTURE] * question.count("<image>")) == want


def test_eval_and_train_differ_where_newlines_merge():
    # Of "user\n" and "\n\nWhat" the training form sees three newlines, of which it merges two; the evaluation form 1 + 2, no merge.
    tokenizer = train_tokenizer(["user\n\n\nWhat\n\n"] * 50, "qwen", 320)
    assert len(tokenizer("\n\n").input_ids) == 1
    train, evaluate = ids_of("\n\nWhat", tokenizer, "train"), ids_of("\n\nWhat", tokenizer, "eval")
    assert tokenizer.decode(train) == tokenizer.decode(evaluate) and len(evaluate) == len(train) + 1


def test_demo_layout_id_for_id(qwen):
    head = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    tail = "<|im_end|>\n<|im_start|>assistant\n"
    mark = mark_id(qwen)
    want = [*qwen(head).input_ids, mark, mark, *qwen("\nCompare  with in detail." + tail).input_ids]
    assert ids_of("Compare <image> with <image>in detail.", qwen, "demo", [PICTURE] * 2) == want
    want = [*qwen(head).input_ids, mark, mark, *qwen("\nWhat?" + tail).input_ids]
    assert ids_of("<image>\n<image>\nWhat?", qwen, "demo", [PICTURE] * 2) == want
    assert ids_of([user(text("What?"), image(), image())], qwen, "demo") == want
    assert ids_of("What?", qwen, "demo") == qwen(head + "What?" + tail).input_ids


def test_eval_newlines_follow_every_frame_of_a_video_but_one_block(qwen):
    newline = qwen("\n").input_ids
    conversation = read_prompt("<video>What?", (), ["clip.mp4"])
    three, one = (tokenise(conversation, [count], qwen, mark_id(qwen), "eval") for count in (3, 1))
    assert len(three) == len(one) + 4
    at = three.index(mark_id(qwen))
    assert three[at : at + 6] == [mark_id(qwen), *newline] * 3


@pytest.mark.parametrize("tokenisation", ["eval", "train", "demo"])
def test_llama_takes_vicunas_form_chunk_by_chunk(tokenisation, llama):
    mark, bos = mark_id(llama), llama.bos_token_id
    want = [*llama(f"{VICUNA_SYSTEM} USER: ").input_ids, mark, *llama("\nWhat? ASSISTANT:").input_ids[1:]]
    got = ids_of("<image>\nWhat?", llama, tokenisation, [PICTURE])
    assert got == want and got[0] == bos and got.count(bos) == 1


# --- what is read ---


def test_every_way_to_give_a_picture():
    data = base64.b64encode(b"abc").decode()
    items = [
        image("a.png"), {"type": "image", "url": "https://host.example/b.png"}, {"type": "image", "path": "c.png"},
        {"type": "image", "base64": data}, {"type": "image", "base64": f"data:image/png;base64,{data}"},
        {"type": "video", "video": "d.mp4", "num_frames": 8}, {"type": "video", "path": "e.mp4", "fps": 2}, {"type": "video", "url": "f"},
    ]  # fmt: skip
    assert read_prompt([user(*items)]).media == (
        Media("image", "a.png"), Media("image", "https://host.example/b.png"), Media("image", "c.png"),
        Media("image", f"data:image;base64,{data}"), Media("image", f"data:image/png;base64,{data}"),
        Media("video", "d.mp4", 8), Media("video", "e.mp4", None, 2.0), Media("video", "f"),
    )  # fmt: skip


def test_images_and_videos_of_the_request_fill_marks_and_bare_items():
    conversation = read_prompt("<video> then <image>", ["a.png"], [{"video": "b.mp4", "num_frames": 3}])
    assert conversation.media == (Media("video", "b.mp4", 3), Media("image", "a.png"))
    messages = [user({"type": "image"}, text("first")), user(text("second <image> here"), {"type": "text", "text": "x"})]
    conversation = read_prompt(messages, ["a.png", "b.png"])
    assert conversation.media == (Media("image", "a.png"), Media("image", "b.png"))
    assert conversation.messages[1].parts == (("second ", 1, " here"), "x")


def test_marks_in_the_text_of_messages_stay_there(qwen):
    messages = [user(text("Compare <image> with <image>."))]
    want = processor(qwen, INTERLEAVE_CHAT_TEMPLATE)
    rendered = want.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert ids_of(messages, qwen, images=[PICTURE] * 2) == want(text=rendered, images=[PICTURE] * 2)["input_ids"][0]


@pytest.mark.parametrize(
    ("prompt", "images", "message"),
    [
        ("", [], "empty"),
        ("  \n", [], "empty"),
        ([], [], "empty"),
        ([user()], [], "empty"),
        ([user(text(" "))], [], "empty"),
        ("<image>" * 9, [PICTURE] * 10, "9 <image> marks but 10 images were given"),
        ("<image>" * 10, [PICTURE] * 9, "10 <image> marks but 9 images were given"),
        ("<image>", [], "1 <image> marks but 0 images were given$"),
        ("What?", [PICTURE], "0 <image> marks but 1 images were given"),
        ("<video>", [], "1 <video> marks but 0 videos"),
        ([user(text("the word <image>"))], [], "1 <image> marks but 0 images were given; the pictures of messages are items of type image"),
        ([user(image(), text("the word <image>"))], [], "1 <image> marks but 0 images"),
        ([user({"type": "image"})], [], "1 <image> marks but 0 images"),
        ([user(text("a <image>"), image())], [PICTURE], "message 1 has a image item after marks in its text"),
        (5, [], "string or a list of chat messages, got a int"),
        (["hello"], [], "string or a list of chat messages"),
        ([{"content": "x"}], [], "message 1 must name its role"),
        ([{"role": "user"}], [], "message 1 must have content .* got a NoneType"),
        (
            [user(text("a")), user({"type": "audio", "audio": "x"})],
            [],
            "message 2 has an item of type 'audio', expected text, image or video",
        ),
        ([user("hello")], [], "item of type None"),
        ([user({"type": "text"})], [], "text is a NoneType"),
        ([user({"type": "image", "base64": b"x"})], [], "base64 image that is a bytes"),
        ([user({"type": "video", "video": "x", "num_frames": 0})], [], "num_frames 0, expected an integer >= 1"),
        ([user({"type": "video", "video": "x", "fps": -1})], [], "fps -1, expected a number > 0"),
    ],
)
def test_bad_prompts(prompt, images, message):
    with pytest.raises(ValueError, match=message):
        read_prompt(prompt, images)


@pytest.mark.parametrize("tokenisation", ["eval", "train", "demo"])
def test_unknown_roles(tokenisation, qwen, llama):
    for tokenizer in (qwen, llama):
        with pytest.raises(ValueError, match="got 'tool'"):
            ids_of([user(text("a")), {"role": "tool", "content": "b"}], tokenizer, tokenisation)
        with pytest.raises(ValueError, match="got 'system'"):
            ids_of([user(text("a")), {"role": "system", "content": "b"}], tokenizer, tokenisation)


def test_templates_that_refuse_or_lose_pictures(qwen):
    with pytest.raises(ValueError, match="refuses these messages: no user turns here"):
        ids_of([user(text("a"))], qwen, chat_template="{{ raise_exception('no user turns here') }}{{ 'type' }}")
    with pytest.raises(ValueError, match="0 pictures instead of 1"):
        ids_of([user(image(), text("a"))], qwen, chat_template="{{ messages[0]['content'][0]['type'] }}")
