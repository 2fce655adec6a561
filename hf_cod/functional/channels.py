"""Heads and channels: importance, and the update of the kept weights that compensates the removed ones.

Symbols: a unit (a head group, a channel) owns rows of the matrices that read the hidden state and columns of the matrix
that writes to it; W a weight matrix (out, in); X the inputs of the writing matrix (tokens, in), each unit's columns
contiguous; M = [X, 1]^T [X, 1] (in + 1, in + 1), whose last column holds sums and the number of tokens n; k and r the
columns of kept and removed units. Everything is computed in float64, where the device has it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_cod.functional.damping import damped_cholesky
from hf_cod.functional.depth import wide
from hf_cod.functional.products import output_energy

DAMPING = 0.01  # share of each column's energy

Rows = Sequence[tuple[Tensor, Tensor]]
"""For each reading matrix: a tensor (out, ...), and the unit of each row (out,), -1 for rows that all units share."""


def rows_of(units: Tensor, owners: Tensor) -> Tensor:
    """Indices of the rows (or columns) that remain if only these units are kept: theirs, and those that all share.

    Args:
        units: (kept,) indices of units.
        owners: (size,) the unit of each row, or -1.

    Returns:
        (remaining,) rising.
    """
    return ((owners < 0) | torch.isin(owners, units)).nonzero().flatten()


def per_unit(rows: Rows, count: int) -> Tensor:
    """Sums over the rows and columns of each unit.

    Args:
        rows: one number for each row or column, and the unit of each.
        count: number of units.

    Returns:
        (count,) float64.
    """
    total = wide(rows[0][0]).new_zeros(count)
    for values, owners in rows:
        owned = owners >= 0
        total.index_add_(0, owners[owned].to(total.device), wide(values)[owned.to(values.device)].to(total))
    return total


def magnitude(readers: Rows, W: Tensor, columns: Tensor, count: int) -> Tensor:
    """Norm of a unit's weights: I_u = sqrt( sum_{w in u} w^2 ).

    Args:
        readers: weights (out, in) of the reading matrices.
        W: weight of the writing matrix.
        columns: unit of each of its columns.
        count: number of units.

    Returns:
        (count,) float64.
    """
    rows = [(wide(R).square().sum(1), owners) for R, owners in readers]
    return per_unit([(wide(W).square().sum(0), columns), *rows], count).sqrt()


def fluctuation(W: Tensor, M: Tensor, columns: Tensor, count: int) -> Tensor:
    """Variance of a unit's outputs around their mean: I_u = sum_{j in u} Var(X_j) ||W_:j||^2.

    A bias can replace the mean (`mean_bias`), but not the variance. FLAP (An et al. 2023, arXiv 2312.11983, equation
    5).

    Args:
        W: weight of the writing matrix.
        M: products of its inputs.
        columns: unit of each of its columns.
        count: number of units.

    Returns:
        (count,) float64.
    """
    M = wide(M)
    n = M[-1, -1]
    mean = M[:-1, -1] / n
    variance = (M.diagonal()[:-1] / n - mean.square()).clamp(min=0)
    return per_unit([(variance * wide(W).square().sum(0).to(M), columns)], count)


def largest(importance: Tensor, kept: int) -> Tensor:
    """The units that are kept: those of largest importance; of equal ones the first.

    Returns:
        (kept,) rising.
    """
    return importance.argsort(descending=True, stable=True)[:kept].sort().values


def drop(W: Tensor, M: Tensor | None, k: Tensor) -> tuple[Tensor, Tensor | None]:
    """The kept columns, unchanged."""
    return W[:, k], None


def mean_bias(W: Tensor, M: Tensor | None, k: Tensor) -> tuple[Tensor, Tensor | None]:
    """The kept columns, unchanged, and a bias that replaces the mean of the removed ones: b = W_:r mean(X_r).

    FLAP, equation 4.
    """
    assert M is not None
    M = wide(M)
    mean = M[:-1, -1] / M[-1, -1]
    mean[k] = 0
    return W[:, k], wide(W).to(M) @ mean


def least_squares(W: Tensor, M: Tensor | None, k: Tensor, damping: float = DAMPING) -> tuple[Tensor, Tensor | None]:
    """The kept columns, updated so that the outputs change least, without a bias.

        W' = W_:k + W_:r H_rk (H_kk + damping diag H_kk)^-1,   H = X^T X

    This minimizes || X_k (W' - W_:k)^T - X_r W_:r^T ||_F^2 plus a ridge penalty on the change, in units of each
    column's energy. Without damping it is W H_:k H_kk^-1. Where W_:r or X_r is 0, W' is W_:k.

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
    """Share of the outputs' energy that is lost: || X W^T - X_k W'^T - b ||_F^2 / || X W^T ||_F^2.

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
    before = output_energy(W, M[:-1, :-1])
    return max(0.0, output_energy(E, M)) / before if before > 0 else 0.0
