"""Cholesky factors of sums of products, which are rank-deficient if there are few tokens."""

from __future__ import annotations

import torch
from torch import Tensor

# Sums of products of fewer tokens than this share of the channels are not used: the least share for which error
# compensation gains (`examples/benchmarks/few_tokens.py`).
LEAST_TOKENS = 1 / 16
# How many times damping is raised tenfold before the factorization fails.
MORE_DAMPING = 6


def damped_diagonal(H: Tensor, damping: float) -> Tensor:
    """damping mean(diag H) I (n, n), by which sums of products are damped; for H = 0 the mean counts as 1."""
    mean = H.diagonal().mean()
    return torch.where(mean > 0, damping * mean, torch.ones_like(mean)).expand(len(H)).diag()


def damped_cholesky(H: Tensor, damping: float, own: bool = False) -> Tensor:
    """The lower triangular L with L L^T = H + damping mean(diag H) I.

    If rounding makes that matrix not positive definite, damping is raised tenfold. For H = 0 the mean counts as 1.

    Args:
        H: (n, n), symmetric; not modified unless `own`.
        damping: > 0.
        own: whether H may be modified, which saves the memory of a copy.

    Returns:
        (n, n).

    Raises:
        ValueError: not positive definite with any damping.
    """
    H = H if own else H.clone()
    diagonal = H.diagonal()  # a view
    mean = diagonal.mean()
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))
    before = diagonal.clone()
    for power in range(MORE_DAMPING + 1):
        diagonal.copy_(before + damping * 10**power * mean)
        L: Tensor
        L, info = torch.linalg.cholesky_ex(H)
        if not info:
            return L
    raise ValueError(
        "activations: expected finite sums of products, got a matrix that is not positive definite with any damping"
    )


def shrunk(H: Tensor, tokens: int) -> Tensor:
    """H + (K / n) diag(H): the sum of products of n tokens, with K channels, moved towards uncorrelated channels.

    Of few tokens, H has correlations that other tokens lack, and error compensation (GPTQ) with it loses more on these
    than rounding without it. `examples/benchmarks/few_tokens.py` measures both.

    Args:
        H: (K, K), symmetric; not modified.
        tokens: n, at least 1.
    """
    return H + torch.diag(H.diagonal() * (len(H) / tokens))
