"""Samples of an encoder-decoder from plain text: the encoder reads the first half, the decoder writes the second."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hf_cod.io.text import IGNORED_LABEL, Batch


def split_in_two(batches: Sequence[Batch], start: int, padding: int) -> list[dict[str, Tensor]]:
    """Splits each sample into the input of the encoder and the target of the decoder (prefix language modelling,
    arXiv 1910.10683, section 3.2.3).

    Args:
        batches: input_ids and attention_mask (S, T), padded on the right.
        start: token with which the decoder begins.
        padding: token for padding.

    Returns:
        Batches with input_ids, attention_mask, decoder_input_ids, decoder_attention_mask and labels. The encoder gets
        the larger half of each sample's tokens.
    """
    return [_split(batch, start, padding) for batch in batches]


def _split(batch: Batch, start: int, padding: int) -> dict[str, Tensor]:
    samples = [ids[mask.bool()] for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    sources = [sample[: (len(sample) + 1) // 2] for sample in samples]
    labels = [sample[(len(sample) + 1) // 2 :] for sample in samples]
    # The decoder reads its start token and all labels but the last; one token at least.
    targets = [torch.cat([label.new_tensor([start]), label[:-1]]) for label in labels]
    wanted = pad_sequence(labels, True, IGNORED_LABEL)
    width = max(len(target) for target in targets) - wanted.shape[1]
    return {
        "input_ids": pad_sequence(sources, True, padding),
        "attention_mask": pad_sequence([torch.ones_like(source) for source in sources], True, 0),
        "decoder_input_ids": pad_sequence(targets, True, padding),
        "decoder_attention_mask": pad_sequence([torch.ones_like(target) for target in targets], True, 0),
        "labels": torch.nn.functional.pad(wanted, (0, width), value=IGNORED_LABEL),
    }
