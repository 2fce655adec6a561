"""Word tokenizers with the special tokens of two families, small enough to read."""

from __future__ import annotations

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "a"]


def _tokenizer(special: list[str]) -> Tokenizer:
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=special[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def gpt_like() -> PreTrainedTokenizerFast:
    """No special tokens around a text, no padding token."""
    return PreTrainedTokenizerFast(
        tokenizer_object=_tokenizer(["<unk>", "<eos>"]), unk_token="<unk>", eos_token="<eos>"
    )


def bert_like() -> PreTrainedTokenizerFast:
    """[CLS] text [SEP], with padding and mask tokens."""
    tokenizer = _tokenizer(["[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )
