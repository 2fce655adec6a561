"""Unbiased (stochastic) rounding to bfloat16."""

from __future__ import annotations

import torch
from torch import Tensor


def round_stochastically(x: Tensor, generator: torch.Generator) -> Tensor:
    """Rounds float32 to bfloat16, up or down with probabilities for which the expected value is exact.

        P(up) = (x - down) / (up - down)

    A weight in bfloat16 has 8 significant bits: rounding to nearest loses every update below 1/512 of the weight
    (Zamirai et al. 2020, arXiv 2010.06192, section 4). Infinities and NaN are left unchanged.

    Args:
        x: float32.
        generator: on x's device.
    """
    noise = torch.randint(0, 1 << 16, x.shape, generator=generator, dtype=torch.int32, device=x.device)
    bits = x.contiguous().view(torch.int32)
    rounded = ((bits + noise) & -(1 << 16)).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).to(torch.bfloat16)
