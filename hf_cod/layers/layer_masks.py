"""The mask that layers get, where the model makes it from one of its inputs: that of sound has samples, not tokens."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class _Reached(Exception):
    """Ends a forward pass at the first layer, whose mask is known then."""


@torch.no_grad()
def mask_at(layer: nn.Module, run: Callable[[], Any], name: str = "attention_mask") -> Tensor | None:
    """(S, T): the tokens that a layer may read, by the mask that the model passes to it; None if it passes none.

    The model reduces the mask of sound, one number per sample of the wave, as its convolutions do. Its own mask is read
    off a forward pass that ends at the layer, before it runs.

    Args:
        layer: the first layer.
        run: runs the model.
        name: of the layer's argument. A mask (S, T), or one of each token for each (S, heads, T, T): booleans, or
            numbers to add to the products.
    """
    found: list[Tensor] = []

    def stop(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments.get(name)
        if isinstance(given, Tensor):
            found.append(given)
        raise _Reached

    handle = layer.register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
    try:
        run()
    except _Reached:
        pass
    finally:
        handle.remove()
    return _by_token(found[0]) if found else None


def _by_token(mask: Tensor) -> Tensor:
    if mask.is_floating_point() and mask.dim() > 2:
        mask = mask > torch.finfo(mask.dtype).min / 2
    return mask.bool() if mask.dim() == 2 else mask.bool().flatten(1, -2).any(1)
