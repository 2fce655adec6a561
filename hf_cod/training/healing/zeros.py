"""Zeros of a pruned student that stay zeros while its own weights train."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_cod.layers.modes import gradients_restored


@contextmanager
def kept_at_zero(parameters: list[nn.Parameter]) -> Iterator[Callable[[], None]]:
    """Inside the block gradients of entries that are 0 now are 0; what it gives, called behind a step, sets them back.

    Either alone would not do: without the former zeros would take part in projections and in the norm that gradients
    are clipped to, without the latter an update out of a low-rank space would fill them. A byte is held for each entry.
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
    """Of a frozen parameter, too, which may train later: hooks outlast freezing, but need a gradient to be attached."""
    with gradients_restored([parameter]):
        return parameter.requires_grad_(True).register_hook(lambda gradient: gradient.masked_fill(mask, 0))
