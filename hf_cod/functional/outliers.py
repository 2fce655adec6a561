"""Outlier-weighed layerwise importance (OWL): the share of a layer's weights far above the layer's mean importance.

Symbols of OWL (arXiv 2310.05175): W a weight matrix (out, in); X the inputs of its module, s_j = ||X_j||_2 the norm of
input channel j over all tokens (in,); A_ij = s_j |W_ij|; M the threshold; D^l the outlier ratio of layer l.
A is never stored: W is read twice, in chunks of rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from hf_cod.functional.depth import wide

# Weights that are read at a time: 4 MiB of magnitudes, and enough work for all threads.
CHUNK = 1 << 20

Matrices = Iterable[tuple[str, Tensor, Tensor]]
"""(name, W (out, in), s (in,)) of each matrix of one layer; the name is used in messages only."""


def outlier_ratio(matrices: Callable[[], Matrices], M: float, per_module: bool = False) -> float:
    """Share of a layer's weights whose importance exceeds M times the layer's mean.

        D^l = sum_ij 1( A_ij > M mean(A^l) ) / #A^l,   A_ij = ||X_j||_2 |W_ij|        in [0, 1]

    arXiv 2310.05175, eq. 1, with A^l all matrices of the layer together. D does not change if all s of a layer are
    scaled by one factor, so sums over tokens give the same result as means. Means are in float64, comparisons are
    exact.

    Args:
        matrices: called twice, for the mean and for the count, so that weights can be loaded one at a time.
        M: threshold, > 0.
        per_module: compare each matrix with M times its own mean instead of the layer's.

    Returns:
        D^l; 0 for a layer of zeros.

    Raises:
        ValueError: no weights at all, or NaN or infinite ones (says in which matrix).
    """
    totals = [(W.numel(), _finite_sum(name, W, s)) for name, W, s in matrices()]
    mean = _mean(totals)
    above = 0
    for (_, W, s), (n, total) in zip(matrices(), totals, strict=True):
        above += count_above(W, s, M * (total / n if per_module else mean))
    return above / sum(n for n, _ in totals)


def mean_importance(matrices: Matrices) -> float:
    """mean_ij A_ij over all matrices of a layer; with s = 1 it is the mean of |W_ij|.

    Raises:
        ValueError: no weights at all, or NaN or infinite ones (says in which matrix).
    """
    return _mean([(W.numel(), _finite_sum(name, W, s)) for name, W, s in matrices])


def importance_sum(W: Tensor, s: Tensor) -> float:
    """sum_ij A_ij = ( sum_i |W_ij| ) . s, summed in float64 over chunks of rows.

    Args:
        W: (out, in).
        s: (in,).
    """
    columns = wide(torch.zeros(W.shape[1], device=W.device))
    for rows in _chunks(W):
        columns += rows.abs().sum(0, dtype=torch.promote_types(W.dtype, torch.float32))
    return float(columns @ s.to(columns))


def count_above(W: Tensor, s: Tensor, bound: float) -> int:
    """Number of A_ij above `bound`: |W_ij| > bound / s_j; none in a channel that is always zero.

    Args:
        W: (out, in).
        s: (in,).
        bound: not negative.
    """
    norms = s.cpu().double()
    limits = torch.where(norms > 0, bound / norms, math.inf)  # (in,)
    limits = _rounded_down(limits, torch.promote_types(W.dtype, torch.float32)).to(W.device)
    return sum(int((rows.abs() > limits).count_nonzero()) for rows in _chunks(W))


def _mean(totals: Sequence[tuple[int, float]]) -> float:
    count = sum(n for n, _ in totals)
    if count == 0:
        raise ValueError("matrices: expected at least one weight that tokens entered, got none")
    return math.fsum(total for _, total in totals) / count


def _finite_sum(name: str, W: Tensor, s: Tensor) -> float:
    total = importance_sum(W, s)
    if not math.isfinite(total):
        raise ValueError(f"weights: expected finite numbers, got NaN or infinity in {name}")
    return total


def _rounded_down(limits: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest numbers of `dtype` that do not exceed float64 `limits`, so that w > limit is the same in `dtype`."""
    near = limits.to(dtype)
    return torch.where(near.double() > limits, near.nextafter(torch.full_like(near, -math.inf)), near)


def _chunks(W: Tensor) -> Iterator[Tensor]:
    return iter(W.split(max(1, CHUNK // W.shape[1])))
