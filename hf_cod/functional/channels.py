"""Heads and channels: how much each matters, and what the ones that stay do for those that go.

Symbols: a unit (a head group, a channel) owns rows of the matrices that read the hidden state and columns of the one
that writes to it; W a weight matrix (out, in); X the inputs of the writing matrix (tokens, in), each unit's columns
side by side; M = [X, 1]^T [X, 1] (in + 1, in + 1), so that its last column holds sums and the number of tokens n;
k and r the columns of units that are kept and removed. Everything is computed in float64, where the device has it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_cod.functional.damping import damped_cholesky
from hf_cod.functional.depth import wide

DAMPING = 0.01  # of each column's own energy

Rows = Sequence[tuple[Tensor, int]]
"""For each reading matrix: something (out, ...), and of how many parts it is made, each with the rows of all units."""


def rows_of(units: Tensor, count: int, size: int, parts: int = 1) -> Tensor:
    """Positions of the rows (or columns) that units own.

    Args:
        units: (kept,) numbers of units, rising.
        count: of all units.
        size: of all rows.
        parts: see `Rows`.

    Returns:
        (kept size / count,) rising.
    """
    return torch.arange(size, device=units.device).view(parts, count, -1)[:, units].flatten()


def per_unit(rows: Rows, columns: Tensor, count: int) -> Tensor:
    """Sums over what each unit owns.

    Args:
        rows: a number a row, (out,) of each reading matrix.
        columns: a number a column of the writing matrix, (in,).
        count: of units.

    Returns:
        (count,) float64.
    """
    total = wide(columns).view(count, -1).sum(1)
    for values, parts in rows:
        total += wide(values).view(parts, count, -1).sum((0, 2)).to(total)
    return total


def magnitude(readers: Rows, W: Tensor, count: int) -> Tensor:
    """Norm of a unit's weights: I_u = sqrt( sum_{w in u} w^2 ).

    Args:
        readers: their weights (out, in).
        W: of the writing matrix.
        count: of units.

    Returns:
        (count,) float64.
    """
    rows = [(wide(R).square().sum(1), parts) for R, parts in readers]
    return per_unit(rows, wide(W).square().sum(0), count).sqrt()


def fluctuation(W: Tensor, M: Tensor, count: int) -> Tensor:
    """What a unit's outputs vary around their mean, which a bias could replace: I_u = sum_{j in u} Var(X_j) ||W_:j||^2.

    FLAP (An et al. 2023, arXiv 2312.11983, equation 5).

    Args:
        W: of the writing matrix.
        M: of its inputs.
        count: of units.

    Returns:
        (count,) float64.
    """
    M = wide(M)
    n = M[-1, -1]
    mean = M[:-1, -1] / n
    variance = (M.diagonal()[:-1] / n - mean.square()).clamp(min=0)
    return per_unit([], variance * wide(W).square().sum(0).to(M), count)


def largest(importance: Tensor, kept: int) -> Tensor:
    """The units that stay: those of most importance, of equal ones the first.

    Returns:
        (kept,) rising.
    """
    return importance.argsort(descending=True, stable=True)[:kept].sort().values


def drop(W: Tensor, M: Tensor | None, k: Tensor) -> tuple[Tensor, Tensor | None]:
    """The kept columns as they are."""
    return W[:, k], None


def mean_bias(W: Tensor, M: Tensor | None, k: Tensor) -> tuple[Tensor, Tensor | None]:
    """The kept columns as they are, and a bias that stands for the mean of the others: b = W_:r mean(X_r).

    FLAP, equation 4.
    """
    assert M is not None
    M = wide(M)
    mean = M[:-1, -1] / M[-1, -1]
    mean[k] = 0
    return W[:, k], wide(W).to(M) @ mean


def least_squares(W: Tensor, M: Tensor | None, k: Tensor, damping: float = DAMPING) -> tuple[Tensor, Tensor | None]:
    """The kept columns, changed so that outputs change least, without a bias.

        W' = W_:k + W_:r H_rk (H_kk + damping diag H_kk)^-1,   H = X^T X

    which is the minimum of || X_k (W' - W_:k)^T - X_r W_:r^T ||_F^2 with ridge regression's penalty on the change, in
    units of each column's energy; undamped it is W H_:k H_kk^-1. Where W_:r or X_r is 0, W' is W_:k.

    Args:
        W: (out, in).
        M: (in + 1, in + 1).
        k: (kept,) columns.
        damping: > 0.

    Returns:
        W' (out, kept) float64, and no bias.
    """
    assert M is not None
    H = wide(M)[:-1, :-1]
    W = wide(W).to(H)
    gone = torch.ones(len(H), dtype=torch.bool, device=H.device)
    gone[k] = False
    scale = H.diagonal()[k].sqrt()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    L = damped_cholesky(H[k][:, k] / scale / scale[:, None], damping)
    cross = W[:, gone] @ H[gone][:, k] / scale  # (out, kept)
    return W[:, k] + torch.cholesky_solve(cross.mT, L).mT / scale, None


def lost_energy(W: Tensor, M: Tensor, k: Tensor, kept: Tensor, bias: Tensor | None) -> float:
    """Share of the outputs' energy that differs: || X W^T - X_k W'^T - b ||_F^2 / || X W^T ||_F^2.

    Args:
        W: (out, in).
        M: (in + 1, in + 1).
        k: (kept,) columns.
        kept: W' (out, kept).
        bias: b (out,), or None.
    """
    M = wide(M)
    W = wide(W).to(M)
    E = torch.cat([W, W.new_zeros(len(W), 1)], 1)
    E[:, k] -= kept.to(M)
    if bias is not None:
        E[:, -1] = -bias.to(M)
    before = float(((W @ M[:-1, :-1]) * W).sum())
    return max(0.0, float(((E @ M) * E).sum())) / before if before > 0 else 0.0
