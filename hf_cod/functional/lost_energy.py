"""What a sparsity or a bit width costs a layer, estimated without running the model.

Weights are taken as normally distributed. The lost energy of a matrix is ||W - W'||^2 / ||W||^2: 0 for an unchanged
matrix, 1 for one that is zero. A layer whose matrices are all zero adds nothing to the residual stream, as if it were
removed, so its lost energy scales the measured effect of the removal.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def lost_by_sparsity(S: Tensor) -> Tensor:
    """Lost energy of normally distributed weights of which the smallest ones are zero.

        e(S) = S - 2 t phi(t),   t = sqrt(2) erfinv(S)

    phi is the density of the standard normal distribution, t the magnitude below which weights are zero.

    Args:
        S: share of zeros in each layer, in [0, 1].

    Returns:
        The same shape, float64, in [0, 1].
    """
    S = S.double()
    t = math.sqrt(2) * torch.special.erfinv(S)
    lost = S - math.sqrt(2 / math.pi) * t * torch.exp(-t * t / 2)
    return torch.where(S < 1, lost, torch.ones_like(S))


def lost_by_bits(B: Tensor) -> Tensor:
    """Lost energy of normally distributed weights after the best scalar quantization with B bits.

        e(B) = min(1, sqrt(3) pi / 2 * 4^-B)   (Panter and Dite 1951, for many bits)

    At three bits this is 0.043, and the exact value 0.035.

    Args:
        B: bits per weight of each layer, not negative.

    Returns:
        The same shape, float64, in [0, 1].
    """
    return (math.sqrt(3) * math.pi / 2 * 4 ** -B.double()).clamp(max=1)


def expected_loss(intact: float, without: Tensor, lost: Tensor) -> float:
    """Loss of a model of which each layer loses a share of its energy.

        loss = intact + sum_l e_l (without_l - intact)

    This is exact for e = 0 and for the removal of a single layer; it assumes that a loss is linear in the lost energy
    and that the effects of layers add up.

    Args:
        intact: loss of the intact model.
        without: (L,) loss without layer l.
        lost: (L,) e_l in [0, 1]; the loss without a layer with e_l = 0 may be unknown (NaN).

    Returns:
        The loss; NaN if that of a layer with e_l > 0 is unknown.
    """
    effect = lost.double() * (without.double() - intact)
    return intact + float(torch.where(lost > 0, effect, torch.zeros_like(effect)).sum())
