"""Low-rank factorization of the matrices of experts that have one basis in common.

Symbols: W_e the matrix (out, in) of expert e; H_e = X_e^T X_e (in, in) of the inputs X_e of its own tokens; r a rank;
B_e A_e near W_e, where either B (out, r) or A (r, in) is the same for all experts. `factorization.py` has the rest.
Everything is computed in float64, where the device has it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_cod.functional.damping import damped_cholesky
from hf_cod.functional.depth import wide
from hf_cod.functional.factorization import DAMPING, balanced
from hf_cod.functional.products import output_energy

Moments = Sequence[Tensor | None]
"""H_e (in, in) of each expert; None for one without tokens."""


def shared_expand(W: Tensor, r: int, H: Moments, damping: float = DAMPING) -> tuple[Tensor, Tensor]:
    """One B for all experts, which changes the sum of their outputs' energies least.

        min sum_e || X_e (W_e - B A_e)^T ||_F^2 + d_e || W_e - B A_e ||_F^2,   d_e = damping mean(diag H_e)

    The solution is B = U, the r leading eigenvectors of sum_e W_e (H_e + d_e I) W_e^T, and A_e = U^T W_e. An expert
    without tokens counts by the mean of the d_e of the others. If no expert has tokens, all H_e are 0 and all d_e 1.

    Args:
        W: (experts, out, in).
        r: 1..min(out, experts x in).
        H: see `Moments`.
        damping: > 0.

    Returns:
        B (out, r), A (experts, r, in), float64.
    """
    W = wide(W)
    U = _leading(_expand_gram(W, H, damping), r)
    B, A = balanced(U, torch.cat([*(U.mT @ W)], 1))
    return B, torch.stack([*A.chunk(len(W), 1)])


def shared_reduce(W: Tensor, r: int, H: Moments, damping: float = DAMPING) -> tuple[Tensor, Tensor]:
    """One A for all experts, and for each the B_e with the least error of its own outputs.

    There is no closed form of the best A if the H_e differ. Here A is the best one for inputs that all experts have in
    common, L L^T = sum_e H_e + damping, in which expert e counts by its share of the inputs' energy, w_e:

        min sum_e w_e || (W_e - B_e A) L ||_F^2,   w_e = tr H_e / sum tr H_e (`damping` / experts without tokens)

    B_e then is the least-squares fit to the outputs of the expert's own inputs, W_e H_e A^T (A H_e A^T)^-1, with H_e
    damped as in `factorization.factorize`; the common inputs stand in for those of an expert without tokens.

    Args:
        W: (experts, out, in).
        r: 1..min(experts x out, in).
        H: see `Moments`.
        damping: > 0.

    Returns:
        B (experts, out, r), A (r, in), float64.
    """
    W = wide(W)
    L, gram = _reduce_gram(W, H, damping)
    V = _leading(gram, r)
    A = V.mT if L is None else torch.linalg.solve_triangular(L, V.mT, upper=False, left=False)
    found = []
    for W_e, H_e in zip(W, H, strict=True):
        own = L if H_e is None or not H_e.any() else damped_cholesky(H_e.to(W), damping)
        C = A if own is None else A @ own  # (r, in)
        found.append(torch.linalg.lstsq(C.mT, (W_e if own is None else W_e @ own).mT).solution.mT)
    B, A = balanced(torch.cat(found), A)
    return torch.stack([*B.chunk(len(W))]), A


def expand_spectrum(W: Tensor, H: Moments, damping: float = DAMPING) -> Tensor:
    """(min(out, experts x in),) float64, largest first; the sum after the r-th is the minimum of `shared_expand`."""
    W = wide(W)
    most = min(W.shape[1], len(W) * W.shape[2])
    return _squares(_expand_gram(W, H, damping), most)


def reduce_spectrum(W: Tensor, H: Moments, damping: float = DAMPING) -> Tensor:
    """(min(experts x out, in),) float64, largest first; the sum after the r-th is the minimum over A that
    `shared_reduce` describes, before each B_e is fitted.
    """
    W = wide(W)
    most = min(len(W) * W.shape[1], W.shape[2])
    return _squares(_reduce_gram(W, H, damping)[1], most)


def lost_share(W: Tensor, B: Tensor, A: Tensor, H: Moments) -> float:
    """The share of the energy of the experts' outputs that factors lose: of the entries', if no expert has tokens.

    Args:
        W: (experts, out, in).
        B: (experts, out, r), or (out, r) for all experts.
        A: (experts, r, in), or (r, in).
        H: see `Moments`; experts without tokens do not count, unless all are.
    """
    W, lost, energy = wide(W), 0.0, 0.0
    without = all(each is None for each in H)
    for W_e, H_e, E_e in zip(W, H, W - B @ A, strict=True):
        if H_e is not None:
            lost, energy = lost + output_energy(E_e, H_e.to(W)), energy + output_energy(W_e, H_e.to(W))
        elif without:
            lost, energy = lost + float(E_e.square().sum()), energy + float(W_e.square().sum())
    return lost / energy if energy > 0 else 0.0


def _expand_gram(W: Tensor, H: Moments, damping: float) -> Tensor:
    """sum_e W_e (H_e + d_e I) W_e^T, (out, out)."""
    means = [None if H_e is None else wide(H_e).diagonal().mean() for H_e in H]
    known = [mean for mean in means if mean is not None]
    usual = damping * torch.stack(known).mean() if known else W.new_ones(())
    gram = W.new_zeros(W.shape[1], W.shape[1])
    for W_e, H_e, mean in zip(W, H, means, strict=True):
        gram += (usual if mean is None else damping * mean).to(W) * (W_e @ W_e.mT)
        gram += 0 if H_e is None else W_e @ H_e.to(W) @ W_e.mT
    return gram


def _reduce_gram(W: Tensor, H: Moments, damping: float) -> tuple[Tensor | None, Tensor]:
    """(L, or None if no expert has tokens; sum_e w_e L^T W_e^T W_e L (in, in))."""
    known = [wide(H_e) for H_e in H if H_e is not None and H_e.any()]
    if not known:
        return None, sum((W_e.mT @ W_e for W_e in W), W.new_zeros(()))
    L = damped_cholesky(torch.stack(known).sum(0).to(W), damping)
    energy = sum(float(H_e.trace()) for H_e in known)
    gram = W.new_zeros(len(L), len(L))
    for W_e, H_e in zip(W, H, strict=True):
        share = damping / len(W) if H_e is None else float(H_e.trace()) / energy
        C = W_e @ L
        gram += share * (C.mT @ C)
    return L, gram


def _leading(gram: Tensor, r: int) -> Tensor:
    """(n, r): its leading eigenvectors, largest first."""
    vectors: Tensor = torch.linalg.eigh(gram).eigenvectors
    return vectors.flip(1)[:, :r]


def _squares(gram: Tensor, most: int) -> Tensor:
    """The largest eigenvalues, largest first."""
    values: Tensor = torch.linalg.eigvalsh(gram)
    return values.flip(0).clamp(min=0)[:most]
