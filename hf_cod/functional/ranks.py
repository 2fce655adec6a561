"""From shares and spectra to one rank a matrix. A matrix whose factors would be no smaller than itself stays whole.

Symbols: a matrix (m, n) has full rank f = min(m, n) and m n weights, its factors of rank r have r (m + n); e (f,) is
its spectrum: squares of singular values, largest first, so that a truncation at r loses sum_{i > r} e_i.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

Shape = tuple[int, int]
# Sums of shares are off by rounding errors that nobody means.
ROUNDING = 1e-9


def most_rank(shape: Shape) -> int:
    """The largest r with r (m + n) < m n; 0 where not even rank 1 saves."""
    m, n = shape
    return max(0, (m * n - 1) // (m + n))


def rank_of_share(shape: Shape, share: float) -> int | None:
    """The rank that keeps a share of the full rank, rounded down, at least 1; None where the matrix stays whole."""
    r = max(1, math.floor(share * min(shape) + ROUNDING))
    return r if r <= most_rank(shape) else None


def rank_of_weights(shape: Shape, share: float) -> int | None:
    """The rank whose factors have a share of the weights, rounded down, at least 1; None where it stays whole."""
    m, n = shape
    r = max(1, math.floor(share * m * n / (m + n) + ROUNDING))
    return r if r <= most_rank(shape) and share < 1 else None


def count(shape: Shape, rank: int | None, nonzeros: int = 0) -> int:
    """Weights of a matrix with that rank, and with a sparse part of so many beside it; rank None: whole."""
    m, n = shape
    return m * n if rank is None else rank * (m + n) + nonzeros


def ranks_of_spectra(shapes: Sequence[Shape], spectra: Sequence[Tensor], budget: int) -> list[int | None]:
    """Ranks for which the losses of all matrices together are little, within the budget.

    From rank 1 everywhere, steps are taken in the order of what they win a weight. Rank by rank that falls, but the
    last step, from some rank back to the whole matrix, which has no error at all, wins more than the ranks before it:
    from the rank on where it does, it is taken as one. So this follows the lower convex hull of losses over weights,
    and is optimal at each budget that falls on its corners (Lagrange); where a step does not fit, smaller ones follow.
    WeLore (Jaiswal et al. 2024, arXiv 2407.11239) instead cuts all matrices at one threshold of singular values.

    Args:
        shapes: of the matrices that may be factorized; each has `most_rank` >= 1.
        spectra: (f,) each, in units in which losses of different matrices may be added up.
        budget: weights that all of them together may have, at least those of rank 1 everywhere.

    Returns:
        A rank each; None: whole.
    """
    ranks: list[int | None] = [1] * len(shapes)
    left = budget - sum(count(shape, 1) for shape in shapes)
    assert left >= 0
    steps = [step for i in range(len(shapes)) for step in _steps(i, shapes[i], spectra[i])]
    blocked = set()
    # A stable sort keeps each matrix's own steps in their order.
    for i, rank, cost, _ in sorted(steps, key=lambda step: -step[3]):
        if i in blocked:
            continue
        if cost <= left:
            ranks[i], left = rank, left - cost
        else:
            blocked.add(i)
    return _fill(ranks, shapes, left)


def _steps(i: int, shape: Shape, e: Tensor) -> list[tuple[int, int | None, int, float]]:
    """(matrix, rank after the step or None, weights it costs, what it wins for each of them)."""
    m, n = shape
    e = e.double().cpu()
    lost = (e.sum() - e.cumsum(0)).clamp(min=0).tolist()  # lost[r - 1]: by a truncation at r
    steps: list[tuple[int, int | None, int, float]] = []
    for r in range(1, most_rank(shape) + 1):
        whole = lost[r - 1] / (m * n - r * (m + n))
        if r == most_rank(shape) or whole >= (lost[r - 1] - lost[r]) / (m + n):
            return [*steps, (i, None, m * n - r * (m + n), whole)]
        steps.append((i, r + 1, m + n, (lost[r - 1] - lost[r]) / (m + n)))
    return steps


def _fill(ranks: list[int | None], shapes: Sequence[Shape], left: int) -> list[int | None]:
    """Spends what is left on the ranks of matrices whose last step did not fit, the smallest matrices first."""
    for i in sorted(range(len(shapes)), key=lambda i: sum(shapes[i])):
        rank = ranks[i]
        if rank is not None:
            more = min(left // sum(shapes[i]), most_rank(shapes[i]) - rank)
            ranks[i], left = rank + more, left - more * sum(shapes[i])
    return ranks
