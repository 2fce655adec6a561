"""From scores to one value a layer under a budget: sparsities, bits, ranks.

Symbols: D (L,) scores, the higher the more a layer matters; w (L,) its parameters; S the budget, which is the mean of
the values weighted by w; lam half the width of the interval [S - lam, S + lam] of the values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def spread(D: Tensor, w: Tensor, S: float, low: float, high: float, falling: bool) -> Tensor:
    """Values that follow the scores linearly, within [low, high], with the weighted mean S.

        x_l = clamp( c -+ (high - low) u_l, low, high ),   u_l = (D_l - min D) / (max D - min D)

    The level c is the one for which sum_l w_l x_l / sum_l w_l = S. The slope is that of OWL (arXiv 2310.05175), whose
    range is 2 lam wide; OWL's own formula is `authors_sparsity`. Equal scores give S for all layers.

    Args:
        D: (L,).
        w: (L,), not negative, not all zero.
        S: low <= S <= high.
        low, high: ends of the interval.
        falling: high scores get low values (sparsity), else high ones (bits, ranks).

    Returns:
        (L,) float64.
    """
    u = _unit_range(D) * (high - low)
    return _clamped_to_mean(u if falling else -u, w.double(), S, low, high)


def raised_to(least: Tensor, x: Tensor, w: Tensor) -> Tensor:
    """Shares of at least `least`, at the cost of all others: clamp(c + x_l, least_l, 1) with the weighted mean of x.

    Args:
        least: (L,), in [0, 1], with a weighted mean of at most that of `x`.
        x: (L,), in [0, 1].
        w: (L,), not negative, not all zero.

    Returns:
        (L,) float64; `x` itself where it is nowhere below `least`.
    """
    x, w = x.double(), w.double()
    return _clamped_to_mean(-x, w, float(x @ w / w.sum()), least.double(), 1.0) if (x < least).any() else x


def authors_sparsity(D: Tensor, S: float, lam: float) -> Tensor:
    """Sparsities as OWL's released code computes them.

        1 - x_l = d_l - mean(d) + (1 - S),   d_l = 2 lam (D_l - min D) / (max D - min D)

    The range is 2 lam wide but need not lie in [S - lam, S + lam]: with one layer far above the others it spans from
    about S - 2 lam to S, and it may leave [0, 1]. The mean over layers is not weighted by parameters. For equal scores
    that code divides by zero; this function returns S for all layers.

    Args:
        D: (L,).
        S: mean sparsity.
        lam: half the width of the range.

    Returns:
        (L,) float64.
    """
    d = 2 * lam * _unit_range(D)
    return S - d + d.mean()


def round_to(x: Tensor, choices: Sequence[float], w: Tensor, first: Tensor | None = None) -> Tensor:
    """Rounds each value to a neighbouring choice. Keeps the order of the values and, approximately, the weighted mean.

    1. All values are rounded down to the next choice.
    2. Layers are raised by one choice, in falling order of their rounding error, while the mean does not exceed that
       of `x`. A layer that cannot be raised, because its weight is too large, blocks the smaller values between the
       same two choices, so that y_i <= y_j wherever x_i < x_j. Another set of layers may come nearer to the mean.
    3. One more layer is raised if that brings the mean nearer, by more than rounding errors.

    Args:
        x: (L,), between the least and the largest choice.
        choices: rising.
        w: (L,).
        first: (L,), breaks ties: of equal values those with a larger entry are raised first; default: layer order.

    Returns:
        (L,) float64, each one of `choices`, less than a step from `x`. The error of the mean is at most half the
        largest w_l step_l / sum(w): half a step over L for equal weights and steps.
    """
    grid = torch.tensor(choices, dtype=torch.float64)
    x, w = x.double(), w.double()
    # A value that differs from a choice by a rounding error counts as that choice.
    below = (torch.searchsorted(grid, x + 1e-9, right=True) - 1).clamp(0, len(grid) - 1)
    above = (below + 1).clamp(max=len(grid) - 1)
    step = w * (grid[above] - grid[below])
    gap = float((w * (x - grid[below])).sum())
    place = below.clone()
    fell = (x - grid[below]).tolist()
    ties = torch.zeros_like(x).tolist() if first is None else first.double().tolist()
    held: dict[int, int] = {}  # choice -> the layer between it and the next choice that would be raised first
    for i in sorted(range(len(x)), key=lambda i: (-fell[i], -ties[i])):
        if int(below[i]) not in held and step[i] <= gap * (1 + 1e-9):
            place[i] = above[i]
            gap -= float(step[i])
        else:
            held.setdefault(int(below[i]), i)
    nearest = min(held.values(), key=lambda i: abs(gap - float(step[i])), default=None)
    if nearest is not None and abs(gap - float(step[nearest])) < abs(gap) * (1 - 1e-9):
        place[nearest] = above[nearest]
    return grid[place]


def _clamped_to_mean(z: Tensor, w: Tensor, mean: float, low: Tensor | float, high: float) -> Tensor:
    """clamp(c - z, low, high) with the weighted mean `mean`; `low` is one number, or one for each layer.

    The mean grows with c, linearly between the levels where a layer reaches an end of the interval, so c is exact.
    """
    least = torch.as_tensor(low, dtype=torch.float64).expand_as(z)
    most = torch.full_like(z, high)
    levels = torch.cat([z + least, z + most]).sort().values  # (2L,)
    means = (levels[:, None] - z).clamp(least, most) @ w / w.sum()  # (2L,)
    end = int(torch.searchsorted(means, mean).clamp(1, len(levels) - 1))
    start_mean, end_mean = float(means[end - 1]), float(means[end])
    share = (mean - start_mean) / (end_mean - start_mean) if end_mean > start_mean else 0.0
    c = levels[end - 1] + min(max(share, 0.0), 1.0) * (levels[end] - levels[end - 1])
    return (c - z).clamp(least, most)


def _unit_range(D: Tensor) -> Tensor:
    """(D - min) / (max - min), zero for equal scores. Scaled first, so that no difference overflows."""
    D = D.double()
    largest = float(D.abs().max())
    D = D / largest if largest > 0 else D
    width = float(D.max() - D.min())
    return (D - D.min()) / width if width > 0 and math.isfinite(width) else torch.zeros_like(D)
