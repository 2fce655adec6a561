"""A linear map that replaces a block of layers.

Symbols: m (d,) the output of the last matrix before the block, which is added to a token's hidden state, as a row;
y (d,) the hidden state before it and x (d,) after it, x = y + m; z (d,) the target: the output of the block for the
input x; M (tokens, d) and R (tokens, d) the rows m and r = z - x; T (d, d) the map, D = T - I.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_cod.functional.damping import damped_cholesky
from hf_cod.functional.depth import wide

DAMPING = 0.1  # share of the mean of the diagonal of M^T M


class MapSums:
    """Sums over tokens that determine the map: M^T M, M^T R and ||R||_F^2, in float64 where the device has it."""

    def __init__(self) -> None:
        self.MM: Tensor | None = None
        self.MR: Tensor | None = None
        self.RR = 0.0

    def add(self, m: Tensor, r: Tensor) -> None:
        """Adds the rows m and r, (tokens, d) each."""
        m, r = wide(m), wide(r)
        self.MM = m.mT @ m if self.MM is None else self.MM + m.mT @ m
        self.MR = m.mT @ r if self.MR is None else self.MR + m.mT @ r
        self.RR += float(r.square().sum())

    def solve(self, damping: float = DAMPING) -> tuple[Tensor, float]:
        """The T that reproduces the output of the block best, by least squares with damping towards the identity.

            min || y + M T - z ||_F^2 + lam || T - I ||_F^2 = min || M D - R ||_F^2 + lam || D ||_F^2
            D = (M^T M + lam I)^-1 M^T R,    lam = damping mean(diag M^T M)

        ReplaceMe (Shopkhoev et al. 2025, arXiv 2505.02819) solves the same least squares, without damping or with
        lam ||T||^2. Here damping pulls T towards the identity, which is the plain removal of the block, and not towards
        zero, which would remove the last matrix as well. With few tokens the map then stays close to plain removal.

        Returns:
            T (d, d) for rows, m T; and the share of ||R||_F^2 that it explains on these tokens, 0 to 1.
        """
        assert self.MM is not None and self.MR is not None, "no tokens were added"
        D = torch.cholesky_solve(self.MR, damped_cholesky(self.MM, damping))
        # || R ||^2 - || M D - R ||^2 = 2 <D, M^T R> - <D, M^T M D>
        gain = float(2 * (D * self.MR).sum() - (D * (self.MM @ D)).sum())
        return D + torch.eye(len(D), dtype=D.dtype, device=D.device), gain / self.RR if self.RR else 0.0


def fold(weight: Tensor, T: Tensor) -> Tensor:
    """(out, in): the weight whose outputs are those of `weight` times T: W' = T^T W. A bias b folds as a column."""
    return T.mT @ weight.to(T)
