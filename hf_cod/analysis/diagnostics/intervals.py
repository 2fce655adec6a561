"""Intervals of each layer's figure over samples: the percentile bootstrap."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hf_cod.analysis.evaluation.metrics import Metric
from hf_cod.functional.depth import bootstrap_interval
from hf_cod.io.files import Journal

CONFIDENCE = 0.95
# A percentile bootstrap from fewer samples covers clearly less than it says.
LEAST_SAMPLES = 8

Ends = list[list[float]]


def ends_of(samples: Tensor, seed: int, statistic: Callable[[Tensor], Tensor] | None = None) -> Ends | None:
    """[low, high] of each layer's mean.

    Args:
        samples: (S, L), or what `statistic` turns a mean of into (L,).
        seed: of the draws.
        statistic: maps (draws, ...) means to (draws, L).

    Returns:
        L pairs; None from fewer than `LEAST_SAMPLES` samples.
    """
    if len(samples) < LEAST_SAMPLES:
        return None
    ends = bootstrap_interval(samples.double(), statistic or torch.clone, confidence=CONFIDENCE, seed=seed)
    return torch.stack(ends, -1).tolist()


def drop_ends(journal: Journal, keys: Sequence[Sequence[str]], metric: Metric, seed: int) -> Ends | None:
    """[low, high] of a metric for each layer that was removed.

    The metric's figure of all rows is that of their mean row, for means and for quotients of sums. A metric whose rows
    are something else (predictions, say) has no interval.

    Args:
        journal: of `measure_layer_drop`.
        keys: for each layer the journal's keys of its batches.
        metric: the one that was measured.
        seed: of the draws.

    Returns:
        One pair a layer; None where there is no interval.
    """
    by_layer = [[row for key in layer for row in journal[key]] for layer in keys]
    try:
        rows = torch.tensor(by_layer, dtype=torch.float64).transpose(0, 1)  # (S, L) or (S, L, sums)
    except (TypeError, ValueError):
        return None

    def figures(means: Tensor) -> Tensor:
        return means.new_tensor([[metric.value([row]) for row in draw] for draw in means.tolist()])

    if rows.dim() == 2:
        return ends_of(rows, seed)
    return ends_of(rows, seed, figures) if rows.dim() == 3 and rows.shape[-1] == 2 else None
