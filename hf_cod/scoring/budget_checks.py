"""Checks of the budget and of the settings of `allocate`."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from hf_cod.scoring.expert_scores import ExpertScores
from hf_cod.scoring.layer_scores import LayerScores
from hf_cod.scoring.settings import EXPERT, AllocationSettings

logger = logging.getLogger(__name__)

DEFAULT_BITS = (3.0, 4.0)
# Kinds of budgets whose plans can have a value for each expert.
OF_EXPERTS = ("sparsity", "parameter_share", "rank")


def granularity_of(
    scores: LayerScores,
    chosen: AllocationSettings,
    layer_parameters: Sequence[int] | None,
    expert_scores: ExpertScores | None,
) -> str:
    """What gets a value of its own: as given, else what has a score of its own.

    Raises:
        ValueError: it has no score of its own, or the kind of budget has no values of experts.
    """
    granularity = chosen.granularity or (scores.granularity if expert_scores is None else EXPERT)
    if expert_scores is not None:
        _check_experts(scores, granularity, chosen.kind, expert_scores)
    elif granularity == EXPERT:
        raise ValueError("expert_scores: expected some with granularity expert, from score_experts, got none")
    elif granularity not in ("layer", scores.granularity):
        raise ValueError(
            f"granularity: expected {scores.granularity} with these scores, got {granularity}; "
            f"score_layers(..., granularity={granularity!r}) scores parts, with a method that measures them"
        )
    if granularity != "layer" and layer_parameters is not None:
        raise ValueError(f"layer_parameters: expected none with granularity {granularity}, got {layer_parameters}")
    return granularity


def _check_experts(scores: LayerScores, granularity: str, kind: str, expert_scores: ExpertScores) -> None:
    if granularity != EXPERT:
        raise ValueError(f"expert_scores: expected none with granularity {granularity}, got some")
    if scores.parts:
        raise ValueError(f"expert_scores: expected none with scores of granularity {scores.granularity}, got some")
    if kind not in OF_EXPERTS:
        more = "; plan_bits and OwlBnbConfig take them" if kind == "bits" else ""
        raise ValueError(f"expert_scores: expected none for {kind}, got some{more}")
    inside = dict.fromkeys(expert_scores.layers.values(), 0)
    for name, layer in expert_scores.layers.items():
        inside[layer] += sum(expert_scores.parameters[name])
    for layer, weights in inside.items():
        most = scores.parameters[layer] if layer < len(scores.parameters) else 0
        if weights > most:
            raise ValueError(
                f"expert_scores: expected those of {scores.model}, with at most {most:,} weights in layer {layer}, "
                f"got {weights:,} ({expert_scores.model})"
            )


def weights_of(scores: LayerScores, parameters: Sequence[int] | None) -> Tensor:
    """The weight of each layer in the mean, (L,) float64."""
    found = scores.parameters if parameters is None else list(parameters)
    if len(found) != len(scores.values) or min(found) < 0 or not 0 < sum(found) < math.inf:
        raise ValueError(f"layer_parameters: expected {len(scores.values)} counts, one per layer, got {found}")
    return torch.tensor(found, dtype=torch.float64)


def choices_of(kind: str, budget: float, choices: Sequence[float] | None, group: int | None) -> list[float] | None:
    """The allowed discrete values, None for any; checks them and the budget."""
    if group is not None:
        if kind != "sparsity" or choices is not None or type(group) is not int or group < 2:
            raise ValueError(f"group: expected at least 2, for sparsity without choices, got {group} for {kind}")
        choices = [n / group for n in range(group)]  # not 1, which would remove all weights of a layer
    if kind == "bits":
        choices = choices or DEFAULT_BITS
    if choices is not None and (not choices or any(not a < b for a, b in pairwise(choices))):
        raise ValueError(f"choices: expected rising values, got {choices}")
    low, high = (choices[0], choices[-1]) if choices else (0.0, 1.0)
    if kind != "bits" and (low < 0 or high > 1):
        raise ValueError(f"choices: expected values in 0..1, got {choices}")
    if not low <= budget <= high:
        more = "" if group is None else f" (one weight of {group} is kept in each layer); use a larger group"
        raise ValueError(f"budget: expected {kind} in {low:g}..{high:g}, got {budget}{more}")
    return None if choices is None else list(choices)


def check_target(scores: LayerScores, kind: str, budget: float) -> None:
    """Warns if the scores were measured around another sparsity than the budget."""
    target = scores.settings.get("target")
    if kind == "sparsity" and target is not None and abs(target - budget) > 1e-6:
        logger.warning("scores: %s measured them at sparsity %g, but the budget is %g", scores.method, target, budget)


def spread_within(budget: float, spread: float | None, default: float, low: float, high: float) -> float:
    """The largest difference from the budget, checked; the default is reduced to what the ends leave."""
    room = min(budget - low, high - budget)
    if spread is None:
        return min(default, room)
    # A tolerance for rounding errors: in floats 1 - 0.7 is less than 0.3.
    if not 0 <= spread <= room + 1e-9:
        bounds = f"{low:g}..{high:g}"
        raise ValueError(f"spread: expected 0..{room:.4g}, so that {budget} -+ spread is in {bounds}, got {spread}")
    return min(spread, room)
