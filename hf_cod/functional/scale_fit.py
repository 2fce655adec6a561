"""Scales of given codes by least squares: those with the least error of the outputs.

Symbols as in `codebook.py`: W (N, K); Z the values of the codes with scale 1 (N, K); B the block size, G = K / B blocks
in a row; s scales (N, G); H = X^T X (K, K). The rounded matrix is Q_ij = s_i,j/B Z_ij.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_cod.functional.damping import damped_diagonal

# Numbers of products that are held at a time.
CHUNK = 1 << 22
# Share of the mean of a system's diagonal that is added to it: a block of zeros has no equation.
RIDGE = 1e-6


def fitted_scales(W: Tensor, Z: Tensor, H: Tensor, block: int, damping: float) -> Tensor:
    """s (N, G) that minimizes the error of each row's output, damped as in GPTQ.

        (w - s Z) H' (w - s Z)^T,   H' = H + damping mean(diag H) I

    The derivative is zero where A s = b, with A_gh the sum of z_j H'_jk z_k over j in block g and k in block h, and b_g
    that of z_j (H' w)_j.

    Args:
        W: (N, K), float32 or float64.
        Z: (N, K), of the same dtype.
        H: (K, K), symmetric; not modified.
        block: B.
        damping: > 0.
    """
    H = H.to(W) + damped_diagonal(H.to(W), damping)
    groups = W.shape[1] // block
    rows = max(1, CHUNK // W.shape[1])
    found = [_solved(w, z, H, block, groups) for w, z in zip(W.split(rows), Z.split(rows), strict=True)]
    return torch.cat(found)


def _solved(W: Tensor, Z: Tensor, H: Tensor, block: int, groups: int) -> Tensor:
    A = torch.empty(len(W), groups, groups, dtype=W.dtype, device=W.device)
    for g in range(groups):
        here = slice(g * block, (g + 1) * block)
        A[:, g] = ((Z[:, here] @ H[here]) * Z).view(len(W), groups, block).sum(-1)
    b = ((W @ H) * Z).view(len(W), groups, block).sum(-1)
    diagonal = A.diagonal(dim1=-2, dim2=-1)  # a view
    ridge = RIDGE * diagonal.mean(-1, keepdim=True)
    diagonal += torch.where(ridge > 0, ridge, torch.ones_like(ridge))
    s: Tensor = torch.linalg.solve(A, b)
    return s
