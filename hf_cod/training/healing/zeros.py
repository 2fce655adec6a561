"""Keeps the zeros of a pruned student at 0 while its weights train."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_cod.layers.modes import gradients_restored


@contextmanager
def kept_at_zero(parameters: list[nn.Parameter]) -> Iterator[Callable[[], None]]:
    """Masks gradients inside the block; yields a function that resets the zeros and must be called after each step.

    Entries that are 0 at the start have a gradient of 0 inside the block. Both parts are required: without the masked
    gradients, zeros would contribute to projections and to the clipped norm; without the reset, an update from a
    low-rank space would fill them. The masks take one byte per entry.
    """
    zeros = [p.detach() == 0 for p in parameters]

    @torch.no_grad()
    def set_back() -> None:
        for parameter, mask in zip(parameters, zeros, strict=True):
            parameter.masked_fill_(mask, 0)

    handles = [_mask_gradient(p, mask) for p, mask in zip(parameters, zeros, strict=True)]
    try:
        yield set_back
    finally:
        for handle in handles:
            handle.remove()


def _mask_gradient(parameter: nn.Parameter, mask: Tensor) -> RemovableHandle:
    """Attaches the hook to a frozen parameter, too, which may train later; attaching requires `requires_grad`."""
    with gradients_restored([parameter]):
        return parameter.requires_grad_(True).register_hook(lambda gradient: gradient.masked_fill(mask, 0))
