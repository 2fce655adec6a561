"""Zeros of a pruned student that stay zeros while its own weights train."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hf_cod.decoder_layers import DecoderLayers


def matrices_with_zeros(stack: DecoderLayers) -> list[nn.Parameter]:
    """Weights of the layers' matrices, banks of experts included, that hold a zero."""
    found = [p for layer in stack for p in layer.parameters() if p.dim() > 1 and p.is_floating_point()]
    return [p for p in found if bool((p == 0).any())]


@contextmanager
def kept_at_zero(parameters: list[nn.Parameter]) -> Iterator[Callable[[], None]]:
    """Inside the block gradients of entries that are 0 now are 0; what it gives, called behind a step, sets them back.

    Either alone would not do: without the former zeros would take part in projections and in the norm that gradients
    are clipped to, without the latter an update out of a low-rank space would fill them. A byte is held for each entry.
    """
    zeros = [p.detach() == 0 for p in parameters]

    def masked(mask: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda gradient: gradient.masked_fill(mask, 0)

    @torch.no_grad()
    def set_back() -> None:
        for parameter, mask in zip(parameters, zeros, strict=True):
            parameter.masked_fill_(mask, 0)

    trained = [(p, mask) for p, mask in zip(parameters, zeros, strict=True) if p.requires_grad]
    handles = [p.register_hook(masked(mask)) for p, mask in trained]
    try:
        yield set_back
    finally:
        for handle in handles:
            handle.remove()
