"""Pruning of a matrix: masks by importance, N:M masks, and SparseGPT's weight update.

Symbols: W a weight matrix (out, in); X the inputs of its module (tokens, in), s_j = ||X_j||_2 the norm of input channel
j over all tokens (in,); H = X^T X (in, in); U upper triangular with H^-1 = U^T U; S the sparsity, share of zeros;
N:M keeps N of every M consecutive weights in a row. A mask is true where a weight becomes zero.
Everything is computed in float32, or in float64 where the weights are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_cod.functional.damping import damped_cholesky

Pattern = tuple[int, int]
"""(N, M): N of every M consecutive weights in a row are kept."""

DAMPING = 0.01  # SparseGPT (arXiv 2301.00774), percdamp in its code
BLOCK = 128  # columns, as in SparseGPT's code
# Weights whose importance is in memory at a time.
CHUNK = 1 << 22
# Columns of a triangular matrix that are inverted at a time.
COLUMNS = 2048


def magnitude_mask(W: Tensor, S: float, pattern: Pattern | None = None) -> Tensor:
    """Marks the round(S out in) weights of least |W_ij| in the matrix (Han et al. 2015, arXiv 1506.02626).

    Args:
        W: (out, in).
        S: sparsity; has no effect if a pattern is given.
        pattern: keep the N largest of every M instead.

    Returns:
        (out, in) bool.
    """
    scores = _high(W).abs()
    if pattern is not None:
        return lowest_in_groups(scores, pattern)
    return lowest(scores.flatten()[None], zero_counts(1, W.numel(), S)).view(W.shape)


def wanda_mask(W: Tensor, s: Tensor, S: float, pattern: Pattern | None = None) -> Tensor:
    """Marks the weights of least importance in each row.

        A_ij = |W_ij| ||X_j||_2,  compared within row i        (Wanda, Sun et al. 2023, arXiv 2306.11695, eq. 1)

    The numbers of zeros in the rows differ by at most one, so that the matrix has round(S out in) of them. Wanda's code
    rounds each row down instead, which gives up to 1 / in less than the requested sparsity.

    Args:
        W: (out, in).
        s: (in,).
        S: sparsity; has no effect if a pattern is given.
        pattern: keep the N most important of every M instead.

    Returns:
        (out, in) bool.
    """
    mask = torch.empty_like(W, dtype=torch.bool)
    counts, rows = zero_counts(W.shape[0], W.shape[1], S), max(1, CHUNK // max(1, W.shape[1]))
    for part, marks, zeros in zip(W.split(rows), mask.split(rows), counts.split(rows), strict=True):
        A = _high(part).abs().mul_(s.to(_high(s.new_empty(0)).dtype))
        marks.copy_(lowest_in_groups(A, pattern) if pattern is not None else lowest(A, zeros))
    return mask


def zero_counts(rows: int, columns: int, S: float) -> Tensor:
    """(rows,) int64: the number of zeros of each row; they differ by at most one, and sum to round(S rows columns)."""
    ends = torch.arange(rows + 1, dtype=torch.float64) * (columns * S)
    return (ends + 0.5).floor().diff().long()


def lowest(scores: Tensor, counts: Tensor) -> Tensor:
    """Marks the counts[i] lowest scores of each row i; of equal scores the first ones.

    Args:
        scores: (rows, n), finite.
        counts: (rows,) int64, in 0..n.

    Returns:
        (rows, n) bool.
    """
    mask = torch.zeros_like(scores, dtype=torch.bool)
    for k in counts.unique().tolist():
        if k:
            rows = (counts == k).nonzero().flatten().to(scores.device)
            mask[rows] = _lowest(scores[rows], k)
    return mask


def lowest_in_groups(scores: Tensor, pattern: Pattern) -> Tensor:
    """Marks the M - N lowest of every M consecutive scores in a row; of equal scores the first ones.

    Args:
        scores: (out, in), with `in` a multiple of M.
        pattern: (N, M).

    Returns:
        (out, in) bool.
    """
    N, M = pattern
    groups = scores.reshape(-1, M)  # (out in / M, M)
    mask = torch.zeros_like(groups, dtype=torch.bool)
    for part, marks in zip(groups.split(CHUNK // M), mask.split(CHUNK // M), strict=True):
        marks.scatter_(1, part.argsort(dim=1, stable=True)[:, : M - N], True)
    return mask.view(scores.shape)


def sparsegpt(
    W: Tensor, H: Tensor, S: float, pattern: Pattern | None = None, damping: float = DAMPING, block: int = BLOCK
) -> Tensor:
    """Prunes W with little change of X W^T: from left to right, each error is compensated by the columns after it.

        w_p -> 0,   w_j -> w_j - (w_p / U_pp) U_pj   for j > p,   cost of pruning: (w_p / U_pp)^2

    SparseGPT (Frantar & Alistarh 2023, arXiv 2301.00774, algorithm 1). U_pp^2 is the first entry on the diagonal of the
    inverse of H without the columns before p, so this is the Optimal Brain Surgeon's update with those columns frozen.
    Each block of columns loses its weights of least cost over all rows. With a pattern, the weights of each group of M
    are chosen when its first column is reached. `damping` times the mean of the diagonal of H is added to the diagonal.

    Two deviations from the authors' code: channels that are always zero cost nothing and are pruned first, but not
    beyond S (that code clears them entirely); and the number of zeros is exact (that code prunes one more per block).

    Args:
        W: (out, in); not modified.
        H: (in, in); not modified.
        S: sparsity; has no effect if a pattern is given.
        pattern: (N, M).
        damping: > 0.
        block: number of columns whose weights are compared with each other.

    Returns:
        (out, in), the pruned weights.

    Raises:
        ValueError: H is not positive definite, whatever the damping.
    """
    V = _high(W).mT.clone(memory_format=torch.contiguous_format)  # (in, out): columns of W as contiguous rows
    dead = H.diagonal() == 0
    U = inverse_factor(H.to(V), damping)
    width = block if pattern is None else max(1, block // pattern[1]) * pattern[1]
    starts = range(0, len(V), width)
    for start, count in zip(starts, _block_counts(V, starts, width, S), strict=True):
        here = slice(start, start + width)
        errors = _prune_block(V[here], U[here, here], dead[here], count, pattern)  # (block, out)
        V[start + width :].addmm_(U[here, start + width :].mT, errors, alpha=-1)
    return V.mT


def inverse_factor(H: Tensor, damping: float) -> Tensor:
    """The upper triangular U with (H + damping mean(diag H) I)^-1 = U^T U.

    Computed from the Cholesky factor of H with rows and columns reversed, J H J = L L^T, so that U = (J L J)^-1,
    without the inverse of H. Channels that are always zero get the mean of the others as their diagonal. If H is not
    positive definite in float32, damping is raised tenfold.

    Args:
        H: (in, in), symmetric.
        damping: > 0.

    Returns:
        (in, in).

    Raises:
        ValueError: not positive definite with any damping.
    """
    diagonal = H.diagonal()
    live = diagonal > 0
    mean = diagonal[live].mean() if live.any() else torch.ones_like(diagonal[0])
    J = H.flip(0, 1)  # a copy
    J.diagonal()[~live.flip(0)] = mean
    L = damped_cholesky(J, damping, own=True)
    del J  # memory holds H, one factor and a copy of it
    R = L.flip(0, 1)
    del L
    return _inverse(R)


def _inverse(R: Tensor) -> Tensor:
    """R^-1 of an upper triangular R (n, n), in the place of R; the memory beside it is that of a block of columns.

    Columns s..e of R^-1 depend on the columns before e of R alone, so they are computed from right to left.
    """
    for start in reversed(range(0, len(R), COLUMNS)):
        end = min(start + COLUMNS, len(R))
        identity = torch.zeros(end, end - start, dtype=R.dtype, device=R.device)
        identity[start:].fill_diagonal_(1)
        R[:end, start:end] = torch.linalg.solve_triangular(R[:end, :end], identity, upper=True)
    return R


def _prune_block(V: Tensor, U: Tensor, dead: Tensor, count: int, pattern: Pattern | None) -> Tensor:
    """Prunes a block V (block, out) of columns of W in place; returns w_p / U_pp of each pruned weight, else 0."""
    d = U.diagonal()[:, None]
    errors = torch.empty_like(V)
    mask = torch.empty_like(V, dtype=torch.bool)
    if pattern is None:
        mask = lowest(_cost(V, d, dead).flatten()[None], torch.tensor([count])).view(V.shape)
    for i in range(len(V)):
        if pattern is not None and i % pattern[1] == 0:
            group = slice(i, i + pattern[1])
            mask[group] = lowest_in_groups(_cost(V[group], d[group], dead[group]).mT, pattern).mT
        torch.mul(V[i], mask[i], out=errors[i]).div_(d[i])
        V[i + 1 :].addr_(U[i, i + 1 :], errors[i], alpha=-1)
    V.masked_fill_(mask, 0)
    return errors


def _cost(V: Tensor, d: Tensor, dead: Tensor) -> Tensor:
    return (V / d).square().masked_fill(dead[:, None], 0)


def _block_counts(V: Tensor, starts: range, width: int, S: float) -> list[int]:
    """The number of zeros of each block: proportional to its width; they sum to round(S out in)."""
    columns, rows = V.shape
    ends = torch.tensor([0, *(min(start + width, columns) for start in starts)], dtype=torch.float64)
    return (ends * (rows * S) + 0.5).floor().diff().long().tolist()


def _lowest(scores: Tensor, k: int) -> Tensor:
    bound = scores.kthvalue(k, -1, keepdim=True).values
    mask, equal = scores < bound, scores == bound
    missing = k - mask.sum(-1, keepdim=True)
    tied = (equal.sum(-1, keepdim=True) > missing).flatten()
    if tied.any():
        equal[tied] &= equal[tied].cumsum(-1, dtype=torch.int32) <= missing[tied]
    return mask | equal


def _high(W: Tensor) -> Tensor:
    return W.to(torch.promote_types(W.dtype, torch.float32))
