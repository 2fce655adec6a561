"""From shares and spectra to one rank per matrix. A matrix is not factorized (rank None) if that saves no weights.

Symbols: a matrix (m, n) has full rank f = min(m, n) and m n weights, its factors of rank r have r (m + n); e (f,) is
its spectrum: squares of singular values, largest first, so that a truncation at r loses sum_{i > r} e_i. The shape
(E, m, n) is that of E matrices, such as those of experts, with the same rank and the sum of their spectra.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

Shape = tuple[int, ...]
# Tolerance for rounding errors in sums of shares.
ROUNDING = 1e-9


def full_rank(shape: Shape) -> int:
    """f of a matrix, or of each of several."""
    return min(shape[-2:])


def weights_of_rank(shape: Shape) -> int:
    """Number of weights of the factors for each 1 of their rank."""
    return math.prod(shape[:-2]) * (shape[-2] + shape[-1])


def most_rank(shape: Shape) -> int:
    """The largest r with r (m + n) < m n; 0 if even rank 1 saves no weights."""
    return max(0, (math.prod(shape) - 1) // max(1, weights_of_rank(shape)))


def rank_of_share(shape: Shape, share: float) -> int | None:
    """The rank that keeps a share of the full rank, rounded down, at least 1; None if the matrix is not factorized."""
    r = max(1, math.floor(share * full_rank(shape) + ROUNDING))
    return r if r <= most_rank(shape) else None


def rank_of_weights(shape: Shape, share: float) -> int | None:
    """The rank whose factors have a share of the weights, rounded down, at least 1; None if it is not factorized."""
    r = max(1, math.floor(share * math.prod(shape) / max(1, weights_of_rank(shape)) + ROUNDING))
    return r if r <= most_rank(shape) and share < 1 else None


def count(shape: Shape, rank: int | None, nonzeros: int = 0) -> int:
    """Number of weights of a matrix of that rank plus a sparse part of `nonzeros`; rank None: not factorized."""
    return math.prod(shape) if rank is None else rank * weights_of_rank(shape) + nonzeros


def ranks_of_spectra(shapes: Sequence[Shape], spectra: Sequence[Tensor], budget: int) -> list[int | None]:
    """Ranks with a small total loss of all matrices, within the budget.

    All matrices start at rank 1, and steps are taken in falling order of their gain per weight. The gain per weight
    falls from rank to rank, except for the last step back to the full matrix, which has no error at all and can gain
    more per weight than the ranks before it. From the rank where it does, this step is taken at once. This follows the
    lower convex hull of losses over weights, and is optimal at each budget on a corner of it (Lagrange). If a step does
    not fit into the budget, smaller ones are tried. WeLore (Jaiswal et al. 2024, arXiv 2407.11239) instead truncates
    all matrices at one threshold of singular values.

    Args:
        shapes: shapes of the matrices that may be factorized; each has `most_rank` >= 1.
        spectra: (f,) each, in units in which losses of different matrices can be added up.
        budget: maximum number of weights of all of them together, at least that of rank 1 for all.

    Returns:
        One rank each; None: not factorized.
    """
    ranks: list[int | None] = [1] * len(shapes)
    left = budget - sum(count(shape, 1) for shape in shapes)
    assert left >= 0
    steps = [step for i in range(len(shapes)) for step in _steps(i, shapes[i], spectra[i])]
    blocked = set()
    # A stable sort keeps the steps of each matrix in order.
    for i, rank, cost, _ in sorted(steps, key=lambda step: -step[3]):
        if i in blocked:
            continue
        if cost <= left:
            ranks[i], left = rank, left - cost
        else:
            blocked.add(i)
    return _fill(ranks, shapes, left)


def _steps(i: int, shape: Shape, e: Tensor) -> list[tuple[int, int | None, int, float]]:
    """(matrix, rank after the step or None, weights that it costs, gain per weight)."""
    total, each = math.prod(shape), weights_of_rank(shape)
    e = e.double().cpu()
    lost = (e.sum() - e.cumsum(0)).clamp(min=0).tolist()  # lost[r - 1]: by a truncation at r
    steps: list[tuple[int, int | None, int, float]] = []
    for r in range(1, most_rank(shape) + 1):
        whole = lost[r - 1] / (total - r * each)
        if r == most_rank(shape) or whole >= (lost[r - 1] - lost[r]) / each:
            return [*steps, (i, None, total - r * each, whole)]
        steps.append((i, r + 1, each, (lost[r - 1] - lost[r]) / each))
    return steps


def _fill(ranks: list[int | None], shapes: Sequence[Shape], left: int) -> list[int | None]:
    """Spends the rest of the budget on matrices whose last step did not fit, the smallest matrices first."""
    for i in sorted(range(len(shapes)), key=lambda i: weights_of_rank(shapes[i])):
        rank = ranks[i]
        if rank is not None:
            each = weights_of_rank(shapes[i])
            more = min(left // each, most_rank(shapes[i]) - rank)
            ranks[i], left = rank + more, left - more * each
    return ranks
