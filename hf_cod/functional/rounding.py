"""Rounding to bfloat16 that loses nothing on average."""

from __future__ import annotations

import torch
from torch import Tensor


def round_stochastically(x: Tensor, generator: torch.Generator) -> Tensor:
    """float32 to bfloat16, up or down with probabilities that make the mean exact.

        P(up) = (x - down) / (up - down)

    A weight in bfloat16 has 8 bits: an update below 1/512 of it is lost by rounding to nearest, each time. (Zamirai et
    al. 2020, arXiv 2010.06192, section 4.) Infinities and NaN stay what they are.

    Args:
        x: float32.
        generator: on x's device.
    """
    noise = torch.randint(0, 1 << 16, x.shape, generator=generator, dtype=torch.int32, device=x.device)
    bits = x.contiguous().view(torch.int32)
    rounded = ((bits + noise) & -(1 << 16)).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).to(torch.bfloat16)
