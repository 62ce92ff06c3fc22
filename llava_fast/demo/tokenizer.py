"""A small byte-level BPE tokenizer in the shape of the real ones, trained on given texts; for the demo and the tests."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

QWEN_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"]
LLAMA_SPECIAL = ["<unk>", "<s>", "</s>", "<image>", "<pad>"]


def train_tokenizer(texts: Iterable[str], family: str = "qwen", vocab_size: int = 512) -> PreTrainedTokenizerFast:
    """A tokenizer with the special tokens of its family: 'qwen' (ChatML) or 'llama' (a leading <s>, closing </s>)."""
    special = QWEN_SPECIAL if family == "qwen" else LLAMA_SPECIAL
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        ),
    )
    if family == "qwen":
        return PreTrainedTokenizerFast(
            tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>", extra_special_tokens=["<|im_start|>", "<image>"]
        )
    from tokenizers.processors import TemplateProcessing

    core.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", special.index("<s>"))])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>", extra_special_tokens=["<image>"]
    )
