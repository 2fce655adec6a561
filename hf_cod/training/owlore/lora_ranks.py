"""Ranks of LoRA and DoRA adapters, layer by layer."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from hf_cod.functional.budget import round_to, spread
from hf_cod.io.arguments import checked
from hf_cod.io.deprecation import renamed
from hf_cod.io.settings import resolve
from hf_cod.layers.stack import find_decoder_layers
from hf_cod.scoring.allocation import LayerAllocation
from hf_cod.scoring.layer_scores import LayerScores
from hf_cod.training.owlore.sampling import check_model
from hf_cod.training.owlore.settings import LoraRankSettings


@renamed(width="relative_spread")
@checked
def lora_ranks(
    model: nn.Module,
    scores: LayerScores | LayerAllocation,
    r: int | None = None,
    relative_spread: float | None = None,
    *,
    settings: LoraRankSettings | None = None,
) -> dict[str, Any]:
    """Keyword arguments of PEFT's LoraConfig: layers with higher scores get a higher rank, with the same mean rank.

        config = LoraConfig(**lora_ranks(model, scores, r=16), target_modules="all-linear")      # use_dora=True, too

    Ranks are linear in the scores, between (1 - relative_spread) r and (1 + relative_spread) r. With an allocation x of
    kind "rank", layer l gets r x_l / mean(x). Ranks are integers of at least 1, and their mean over layers is r (their
    sum is exact up to half a rank). alpha is proportional to the rank: alpha / rank is 2 in every layer.

    Args:
        model: the model that the adapters are for, wrapped or not.
        scores: `LayerScores` of this model, or a `LayerAllocation` of kind "rank".
        r: mean rank; default: 16.
        relative_spread: half the width of the interval of ranks, as a share of r; scores only; default: 0.5.
        settings: `LoraRankSettings`, instead of single fields.

    Returns:
        r, lora_alpha, rank_pattern, alpha_pattern: keyword arguments of LoraConfig.

    Raises:
        ValueError: scores of another model, an allocation of another kind, a rank or spread out of range.
    """
    how = resolve(lora_ranks, LoraRankSettings, settings, {}, r=r, relative_spread=relative_spread)
    stack = find_decoder_layers(model)
    check_model(scores, stack)
    ranks = _ranks(scores, how.r, how.relative_spread)
    names = [rf"{re.escape(stack.layers_path)}\.{index}\..*" for index in range(len(stack))]
    return {
        "r": how.r,
        "lora_alpha": 2 * how.r,
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
        ends = (1 - relative_spread) * r, (1 + relative_spread) * r
        wanted = spread(values, alike, r, *ends, falling=False)
    choices = [float(n) for n in range(1, int(wanted.max()) + 2)]
    return [int(rank) for rank in round_to(wanted.clamp(min=1), choices, alike)]
