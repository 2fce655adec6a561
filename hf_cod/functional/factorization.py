"""Low-rank factorization: a matrix as the product of two thin ones with the least change of its outputs.

Symbols: W a weight matrix (out, in), f = min(out, in) its full rank; r a rank; X the inputs of its module (tokens, in);
H = X^T X (in, in); L lower triangular with L L^T = H + damping mean(diag H) I; B (out, r), A (r, in), B A near W.
Everything is computed in float64, where the device has it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_cod.functional.damping import damped_cholesky
from hf_cod.functional.depth import wide

DAMPING = 0.01  # share of the mean of H's diagonal


def factorize(W: Tensor, r: int, H: Tensor | None = None, damping: float = DAMPING) -> tuple[Tensor, Tensor, float]:
    """The product B A of rank r that changes the outputs least.

        min || X (W - B A)^T ||_F^2 + damping mean(diag H) || W - B A ||_F^2

    The solution is the truncated SVD of W L. ASVD (Yuan et al. 2023, arXiv 2312.05821) scales channels for the same
    purpose. SVD-LLM (Wang et al. 2024, arXiv 2403.07378) whitens by L without damping, and fails if few tokens make H
    singular. Without H, or if H is 0, this is the plain SVD of W. If W is not tall, neither L nor its inverse is
    needed: with U the r leading eigenvectors of W H W^T, B A = U U^T W. B and A get equal norms in each direction.

    Args:
        W: (out, in).
        r: 1..f.
        H: (in, in), or None.
        damping: > 0.

    Returns:
        B (out, r) and A (r, in), float64; and the lost share of the spectrum, 0 to 1.
    """
    W = wide(W)
    squares, vectors, L = _decompose(W, H, damping)
    V = vectors[:, :r]
    if _is_tall(W):
        B = _whitened(W, L) @ V
        A = V.mT if L is None else torch.linalg.solve_triangular(L, V.mT, upper=False, left=False)
    else:
        B, A = V, V.mT @ W
    lost = float(squares[r:].sum() / squares.sum()) if squares.any() else 0.0
    return (*balanced(B, A), lost)


def spectrum(W: Tensor, H: Tensor | None = None, damping: float = DAMPING) -> Tensor:
    """(f,) float64: squares of the singular values of W L (of W without H), largest first.

    The sum of the values after the r-th is the minimum that `factorize` reaches. The sum of all values is
    || X W^T ||_F^2 plus the damping term.
    """
    return _decompose(wide(W), H, damping)[0]


def _decompose(W: Tensor, H: Tensor | None, damping: float) -> tuple[Tensor, Tensor, Tensor | None]:
    """Squares of the singular values (f,) of W L, its singular vectors on the shorter side (f, f), and L for a tall W
    with H.
    """
    H = None if H is None or not H.any() else H.to(W)
    L = damped_cholesky(H, damping) if H is not None and _is_tall(W) else None
    if _is_tall(W):
        C = _whitened(W, L)
        gram = C.mT @ C
    elif H is None:
        gram = W @ W.mT
    else:
        gram = W @ H @ W.mT + damping * H.diagonal().mean() * (W @ W.mT)
    squares, vectors = torch.linalg.eigh(gram)
    return squares.flip(0).clamp(min=0), vectors.flip(1), L


def _is_tall(W: Tensor) -> bool:
    return W.shape[0] > W.shape[1]


def _whitened(W: Tensor, L: Tensor | None) -> Tensor:
    return W if L is None else W @ L


def balanced(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with ||B_:k|| = ||A_k:||, so that rounding and weight decay affect both factors equally."""
    b, a = B.norm(dim=0), A.norm(dim=1)
    scale = torch.where((b > 0) & (a > 0), (a / b).sqrt(), torch.ones_like(a))
    return B * scale, A / scale[:, None]
