"""Which rows of matrices act on which columns of a later one, by gradients."""

from __future__ import annotations

import torch
from torch import Tensor

SHARED = -1
"""The unit of rows that all units share, or that act on none."""


def owners_of(X: Tensor, sources: list[Tensor], count: int) -> list[Tensor] | None:
    """The unit of each row of each source; None if a row belongs to some units only, or units own unequal numbers."""
    units = torch.arange(X.shape[-1], device=X.device) // (X.shape[-1] // count)
    noise = torch.randn(X.shape, generator=torch.Generator().manual_seed(1)).to(X.device)
    found = [torch.zeros(source.shape[-1], dtype=torch.long) for source in sources]
    shared: list[Tensor] = []
    bits = range(max(1, (count - 1).bit_length()))
    # The highest and the lowest bit first: rows of wider units have one value of the former, and both of the latter.
    for bit in sorted(bits, key=lambda bit: min(bit, bits[-1] - bit)):
        has = (units >> bit) & 1 == 1
        active = [_active(X, sources, noise * mask) for mask in (has, ~has)]
        # A row that acts in neither has no unit; one that acts in both for each bit belongs to all of them.
        both = [one == zero for one, zero in zip(*active, strict=True)]
        if shared and not all(map(torch.equal, shared, both)):
            return None
        shared = both
        for rows, one in zip(found, active[0], strict=True):
            rows += one.long() << bit
    for i, rows in enumerate(found):
        rows[shared[i]] = SHARED
        counts = torch.bincount(rows[rows >= 0], minlength=count)
        if (counts != counts[0]).any():
            return None
    return found


def _active(X: Tensor, sources: list[Tensor], seed: Tensor) -> list[Tensor]:
    gradients = torch.autograd.grad(X, sources, seed, retain_graph=True, allow_unused=True)
    found = []
    for source, gradient in zip(sources, gradients, strict=True):
        nothing = torch.zeros(source.shape[-1], dtype=torch.bool)
        found.append(nothing if gradient is None else gradient.reshape(-1, len(nothing)).ne(0).any(0).cpu())
    return found


def mixes_tokens(X: Tensor, outputs: list[Tensor]) -> bool:
    """Whether the input of a matrix at odd tokens depends on even ones."""
    if X.dim() < 2 or not outputs:
        return False
    seed = torch.zeros_like(X)
    _of_tokens(seed)[1::2] = 1
    gradients = torch.autograd.grad(X, outputs, seed, retain_graph=True, allow_unused=True)
    return any(g is not None and g.dim() > 1 and bool(_of_tokens(g)[::2].ne(0).any()) for g in gradients)


def _of_tokens(x: Tensor) -> Tensor:
    """A view that begins with the tokens: samples come first, but not of packed images (tokens, d)."""
    return x if x.dim() == 2 else x.transpose(0, 1)
