"""A matrix as a sparse one plus the product of two thin ones, so that what it computes changes little.

Symbols: W a weight matrix (m, n); X the inputs of its module (tokens, n), H = X^T X (n, n); D (n,) the root of the
inputs' second moments, a number a channel; S a matrix of k entries that are not zero (m, n); B (m, r), A (r, n); s the
share of the m n weights that S, B and A hold together (the paper's 1 - rho), kappa the part of them that B and A have.
Everything is computed in float64, where the device has it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_cod.functional.depth import wide
from hf_cod.functional.factorization import balanced, factorize
from hf_cod.functional.ranks import ROUNDING, Shape, most_rank
from hf_cod.functional.sparsity import lowest, zero_counts

ITERATIONS = 80  # N, as there
# D's least entry, of its mean: what is divided by it stays finite where a channel is always zero.
LEAST_SCALE = 1e-3


def sizes_of_weights(shape: Shape, share: float, rank_share: float) -> tuple[int, int] | None:
    """(r, k) by which a matrix keeps a share s of its weights; None where it stays whole.

        r = floor(kappa s m n / (m + n)),   k = floor(s m n) - r (m + n)     (arXiv 2409.13652, algorithm 2)

    The paper rounds k = (1 - kappa) s m n on its own; here it gets what rounding r down leaves. r is at least 1, so
    that a share below that of rank 1 gives (1, 0), which may be more than was asked for.
    """
    m, n = shape
    if share >= 1 or not most_rank(shape):
        return None
    r = max(1, math.floor(rank_share * share * m * n / (m + n) + ROUNDING))
    return r, max(0, math.floor(share * m * n + ROUNDING) - r * (m + n))


def decompose(
    W: Tensor, r: int, k: int, H: Tensor | None = None, iterations: int = ITERATIONS
) -> tuple[Tensor, Tensor, Tensor, float]:
    """OATS (Zhang & Papyan 2024, arXiv 2409.13652, algorithms 1 and 2): S + B A near W, by alternating thresholding.

        min || (W - S) D - B A D ||_F,   from S = 0:   B A D = SVD_r((W - S) D),   S D = HT_k((W - B A) D)

    HT_k keeps the entries of greatest magnitude, equally many in each row (or one more in some), as the paper does. Of
    H only the diagonal is read, D_j = H_jj^(1/2); without H all D_j are 1.

    Two deviations. The first decomposition is exact; those behind it improve the one before by a step of subspace
    iteration, B = orth(M A^T), A = B^T M for M = (W - S) D, which takes 4 m n r operations instead of an SVD a time.
    The norm above never grows by it, as it does not by the paper's, and on matrices of SmolLM2-135M it ends within
    0.5 % of that by an SVD a time (tests/low_rank). And D has a least entry, 0.001 of its mean, or channels that are
    always zero could not be divided by it.

    Args:
        W: (m, n).
        r: 1..min(m, n).
        k: 0..m n.
        H: (n, n), or None.
        iterations: N, at least 1.

    Returns:
        S (m, n), B (m, r) and A (r, n), float64; and the share of the outputs' energy that is lost,
        || X (W - S - B A)^T ||_F^2 / || X W^T ||_F^2 (of the weights' without H).
    """
    W = wide(W)
    H = None if H is None else H.to(W)
    D = _scale(W, H)
    scaled = W * D
    zeros = zero_counts(len(W), W.shape[1], 1 - k / W.numel())
    B, A, _ = factorize(scaled, r)
    S = _threshold(scaled - B @ A, zeros)
    for _ in range(iterations - 1):
        M = scaled - S
        B = torch.linalg.qr(M @ A.mT).Q
        A = B.mT @ M
        S = _threshold(scaled - B @ A, zeros)
    S, (B, A) = S / D, balanced(B, A / D)
    whole = _energy(W, H)
    return S, B, A, _energy(W - S - B @ A, H) / whole if whole else 0.0


def _scale(W: Tensor, H: Tensor | None) -> Tensor:
    if H is None or not H.diagonal().any():
        return W.new_ones(W.shape[1])
    D = H.diagonal().sqrt()
    return D.clamp(min=LEAST_SCALE * float(D.mean()))


def _threshold(M: Tensor, zeros: Tensor) -> Tensor:
    """HT_k: the entries of least magnitude of each row become zero, `zeros` of them (m,)."""
    return M.masked_fill(lowest(M.abs(), zeros), 0)


def _energy(E: Tensor, H: Tensor | None) -> float:
    """|| X E^T ||_F^2; without H || E ||_F^2."""
    return float((E * (E if H is None else E @ H)).sum())
