"""The loss of language models."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hf_cod.io.text import IGNORED_LABEL

# Logits that are converted to losses at a time: a chunk and its exponentials fit in the cache.
LOSS_CHUNK = 2**21


def negative_log_likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    """-log p(label) in nats, 0 where the label is IGNORED_LABEL.

    Computed in float32 or wider, a few rows at a time, so that there is no second copy of the logits.

    Args:
        logits: (S, T, V).
        labels: (S, T).

    Returns:
        (S, T).

    Raises:
        ValueError: the model returns logits for other tokens than those of the text.
    """
    if logits.shape[:-1] != labels.shape:
        got = tuple(logits.shape[:-1])
        raise ValueError(
            f"batches: expected logits for the {tuple(labels.shape)} tokens of the text, got {got}; a model that adds "
            "tokens to the text, such as those of an image, has no loss here: leave out the image"
        )
    flat, flat_labels = logits.flatten(0, -2), labels.flatten()
    high = torch.promote_types(logits.dtype, torch.float32)
    chunk = max(1, LOSS_CHUNK // logits.shape[-1])
    losses = [
        nn.functional.cross_entropy(rows.to(high), wanted, reduction="none", ignore_index=IGNORED_LABEL)
        for rows, wanted in zip(flat.split(chunk), flat_labels.split(chunk), strict=True)
    ]
    return torch.cat(losses).view(labels.shape)
