"""Confidence intervals of each layer's values over samples, by the percentile bootstrap."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hf_cod.analysis.evaluation.metrics import Metric
from hf_cod.functional.depth import bootstrap_interval
from hf_cod.io.journal import Journal

CONFIDENCE = 0.95
# With fewer samples the coverage of a percentile bootstrap is clearly below its confidence level.
LEAST_SAMPLES = 8

Ends = list[list[float]]


def ends_of(samples: Tensor, seed: int, statistic: Callable[[Tensor], Tensor] | None = None) -> Ends | None:
    """[low, high] of each layer's mean.

    Args:
        samples: (S, L), or (S, ...) with a `statistic`.
        seed: seed of the resamples.
        statistic: maps (draws, ...) means to (draws, L) values; default: the means themselves.

    Returns:
        L pairs; None if there are fewer than `LEAST_SAMPLES` samples.
    """
    if len(samples) < LEAST_SAMPLES:
        return None
    ends = bootstrap_interval(samples.double(), statistic or torch.clone, confidence=CONFIDENCE, seed=seed)
    return torch.stack(ends, -1).tolist()


def drop_ends(journal: Journal, keys: Sequence[Sequence[str]], metric: Metric, seed: int) -> Ends | None:
    """[low, high] of a metric for each removed layer.

    For means and for quotients of sums, the metric's value for all rows is that of their mean row. A metric with other
    rows (for example predictions) has no interval.

    Args:
        journal: journal of `measure_layer_drop`.
        keys: for each layer the journal's keys of its batches.
        metric: the measured metric.
        seed: seed of the resamples.

    Returns:
        One pair per layer; None if there is no interval.
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
