"""Masked tokens, and their labels, for the loss of masked language models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_cod.io.text import IGNORED_LABEL, Batch

MASKED_SHARE = 0.15  # BERT (arXiv 1810.04805), section 3.1


def mask_tokens(tokenizer: Any, batches: Sequence[Batch], seed: int) -> list[dict[str, Tensor]]:
    """Replaces a seeded 15 % of each sample's tokens (at least one) by the mask token; labels hold the original ids.

    Special tokens and padding are never masked. All chosen tokens become the mask token; BERT's 10 % random and 10 %
    unchanged tokens are omitted, since they serve training only.

    Raises:
        ValueError: the tokenizer has no mask token.
    """
    if tokenizer.mask_token_id is None:
        raise ValueError("tokenizer: expected a mask token for a masked language model, got none")
    special = torch.tensor(tokenizer.all_special_ids)
    generator = torch.Generator().manual_seed(seed)
    masked = []
    for batch in batches:
        ids = batch["input_ids"]
        chance = torch.rand(ids.shape, generator=generator)
        chance = chance.masked_fill(torch.isin(ids, special) | (batch["attention_mask"] == 0), torch.inf)
        hidden = (chance < MASKED_SHARE) | (chance == chance.amin(-1, keepdim=True))
        hidden &= chance.isfinite()
        masked.append(
            {
                **batch,
                "input_ids": ids.masked_fill(hidden, tokenizer.mask_token_id),
                "labels": ids.masked_fill(~hidden, IGNORED_LABEL),
            }
        )
    return masked
