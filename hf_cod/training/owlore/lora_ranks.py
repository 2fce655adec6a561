"""Ranks of LoRA and DoRA adapters, layer by layer."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from hf_cod.functional.budget import round_to, spread
from hf_cod.io.arguments import checked
from hf_cod.io.deprecation import renamed
from hf_cod.layers.stack import find_decoder_layers
from hf_cod.scoring.allocation import LayerAllocation
from hf_cod.scoring.layer_scores import LayerScores
from hf_cod.training.owlore.sampling import check_model

DEFAULT_SPREAD = 0.5


@renamed(width="relative_spread")
@checked
def lora_ranks(
    model: nn.Module, scores: LayerScores | LayerAllocation, r: int = 16, relative_spread: float = DEFAULT_SPREAD
) -> dict[str, Any]:
    """What PEFT's LoraConfig takes to give layers that matter more a higher rank, at the cost of a uniform one.

        config = LoraConfig(**lora_ranks(model, scores, r=16), target_modules="all-linear")      # use_dora=True, too

    Scores are followed linearly within r -+ relative_spread r; of an allocation of "rank" layer l gets r x_l / mean(x).
    Ranks are whole and at least 1, and their mean over layers is r (up to half a rank in all). alpha
    grows with the rank, so that alpha / rank is 2 everywhere.

    Args:
        model: the model that the adapters are for, wrapped or not.
        scores: `LayerScores` of this model, or a `LayerAllocation` of kind "rank".
        r: mean rank.
        relative_spread: half the width of the interval, as a share of r; scores only.

    Returns:
        r, lora_alpha, rank_pattern, alpha_pattern: keyword arguments of LoraConfig.

    Raises:
        ValueError: scores of another model, an allocation of something else, a rank or spread out of range.
    """
    stack = find_decoder_layers(model)
    check_model(scores, stack)
    if r < 1:
        raise ValueError(f"r: expected at least 1, got {r}")
    ranks = _ranks(scores, r, relative_spread)
    names = [rf"{re.escape(stack.path)}\.{index}\..*" for index in range(len(stack))]
    return {
        "r": r,
        "lora_alpha": 2 * r,
        "rank_pattern": dict(zip(names, ranks, strict=True)),
        "alpha_pattern": {name: 2 * rank for name, rank in zip(names, ranks, strict=True)},
    }


def _ranks(scores: LayerScores | LayerAllocation, r: int, relative_spread: float) -> list[int]:
    values, alike = torch.tensor(scores.values, dtype=torch.float64), torch.ones(len(scores.values))
    if isinstance(scores, LayerAllocation):
        if scores.kind != "rank" or not values.mean() > 0:
            raise ValueError(f"scores: expected an allocation of rank above 0, got one of {scores.kind}")
        wanted = r * values / values.mean()
    else:
        if not 0 <= relative_spread <= 1:
            raise ValueError(f"relative_spread: expected a share between 0 and 1, got {relative_spread}")
        ends = (1 - relative_spread) * r, (1 + relative_spread) * r
        wanted = spread(values, alike, r, *ends, falling=False)
    choices = [float(n) for n in range(1, int(wanted.max()) + 2)]
    return [int(rank) for rank in round_to(wanted.clamp(min=1), choices, alike)]
