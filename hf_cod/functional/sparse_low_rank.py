"""A matrix as the sum of a sparse one and the product of two thin ones, with little change of its outputs.

Symbols: W a weight matrix (m, n); X the inputs of its module (tokens, n), H = X^T X (n, n); D (n,) the root of the
inputs' second moments, one number per channel; S a matrix (m, n) with k nonzero entries; B (m, r), A (r, n); s the
share of the m n weights that S, B and A hold together (the paper's 1 - rho), kappa the part of it in B and A.
Everything is computed in float64, where the device has it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_cod.functional.depth import wide
from hf_cod.functional.factorization import balanced, factorize
from hf_cod.functional.products import output_energy
from hf_cod.functional.ranks import ROUNDING, Shape, most_rank
from hf_cod.functional.sparsity import lowest, zero_counts

ITERATIONS = 80  # N, as in arXiv 2409.13652
# Least entry of D, as a share of its mean, so that divisions by D are finite where a channel is always zero.
LEAST_SCALE = 1e-3


def sizes_of_weights(shape: Shape, share: float, factor_share: float) -> tuple[int, int] | None:
    """(r, k) for which a matrix keeps a share s of its weights; None if it is left unchanged.

        r = floor(kappa s m n / (m + n)),   k = floor(s m n) - r (m + n)     (arXiv 2409.13652, algorithm 2)

    The paper rounds k = (1 - kappa) s m n separately; here k also gets the weights that rounding r down leaves. r is at
    least 1, so a share below that of rank 1 gives (1, 0), which may be more than the requested share.
    """
    m, n = shape
    if share >= 1 or not most_rank(shape):
        return None
    r = max(1, math.floor(factor_share * share * m * n / (m + n) + ROUNDING))
    return r, max(0, math.floor(share * m * n + ROUNDING) - r * (m + n))


def decompose(
    W: Tensor, r: int, k: int, H: Tensor | None = None, iterations: int = ITERATIONS
) -> tuple[Tensor, Tensor, Tensor, float]:
    """OATS (Zhang & Papyan 2024, arXiv 2409.13652, algorithms 1 and 2): S + B A near W, by alternating thresholding.

        min || (W - S) D - B A D ||_F,   from S = 0:   B A D = SVD_r((W - S) D),   S D = HT_k((W - B A) D)

    HT_k keeps the entries of largest magnitude, the same number in each row (or one more in some), as in the paper.
    Only the diagonal of H is used, D_j = H_jj^(1/2); without H all D_j are 1.

    Two deviations from the paper:

    - Only the first decomposition is an exact SVD. Each later one improves the previous one by a step of subspace
      iteration, B = orth(M A^T), A = B^T M for M = (W - S) D, which takes 4 m n r operations. As in the paper, the norm
      above never grows. On matrices of SmolLM2-135M the final norm is within 0.5 % of that with an SVD in each
      iteration (tests/low_rank).
    - D has a least entry, 0.001 of its mean, because channels that are always zero would be divided by 0.

    Args:
        W: (m, n).
        r: 1..min(m, n).
        k: 0..m n.
        H: (n, n), or None.
        iterations: N, at least 1.

    Returns:
        S (m, n), B (m, r) and A (r, n), float64; and the lost share of the outputs' energy,
        || X (W - S - B A)^T ||_F^2 / || X W^T ||_F^2 (without H, of the weights' energy).
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
    """HT_k: sets the `zeros` (m,) entries of least magnitude of each row to zero."""
    return M.masked_fill(lowest(M.abs(), zeros), 0)


def _energy(E: Tensor, H: Tensor | None) -> float:
    """|| X E^T ||_F^2; without H || E ||_F^2."""
    return float((E * E).sum()) if H is None else output_energy(E, H)
