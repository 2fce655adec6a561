"""Whether a model keeps samples apart that share a row, found by running it."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from hf_cod.layers.running import evaluation_mode
from hf_cod.layers.stack import find_decoder_layers

MOST_TOKENS = 64
# Share of the change by attention between the samples above which they are not apart.
MOST_CHANGE = 0.05


def keeps_apart(model: Any, first: list[int], second: list[int]) -> bool:
    """Whether the logits of a sample behind another one in a row are those that it has alone.

    Positions that begin anew are all that separates the samples, as in packed rows. Models without attention
    (recurrent ones), or without transformers' masks, ignore that.

    Args:
        model: a causal language model.
        first: token ids of the sample before.
        second: token ids of the sample that is compared.
    """
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return False
    first, second = first[:MOST_TOKENS], second[:MOST_TOKENS]
    places = [*range(len(first)), *range(len(second))]
    with evaluation_mode(find_decoder_layers(model)), torch.no_grad():
        alone = _logits(model, second, [*range(len(second))])
        packed = _logits(model, first + second, places)[len(first) :]
        joined = _logits(model, first + second, [*range(len(places))])[len(first) :]
    return bool((packed - alone).norm() <= MOST_CHANGE * (joined - alone).norm())


def _logits(model: Any, ids: list[int], places: list[int]) -> Tensor:
    """(T, V) float32."""
    given = {"input_ids": torch.tensor([ids]), "position_ids": torch.tensor([places])}
    logits: Tensor = model(**{name: each.to(model.device) for name, each in given.items()}, use_cache=False).logits
    return logits[0].float()
