"""Which layers cannot be removed, found before anything is measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from hf_cod.layers.removal.drop import check_drop, skip
from hf_cod.layers.stack import DecoderLayers


def refused_layers(stack: DecoderLayers, layers: Sequence[int], n_removed: int) -> dict[int, str]:
    """Layer -> why `drop` refuses to remove it: alone, and in each block of `n_removed` consecutive layers.

    A config with a pattern of layers may describe a stack without a whole period of it, but not without one layer.
    Empty if all layers are refused that way and more than one is to be removed, because other sets may be possible.

    Args:
        stack: the layers.
        layers: those that may be removed, in ascending order.
        n_removed: the number of layers to remove.
    """
    # Without layer 0 all others move, and without the last one none. If both can be removed, nothing depends on the
    # index of a layer between them, counted from either end.
    if all(why_refused(stack, [end]) is None for end in (0, len(stack) - 1)):
        return {}
    found = {i: why for i in layers if (why := why_refused(stack, [i])) is not None}
    for start in range(len(stack) - n_removed + 1) if n_removed > 1 else ():
        block = range(start, start + n_removed)
        free = all(i in layers for i in block)
        if free and any(i in found for i in block) and why_refused(stack, block) is None:
            found = {i: why for i, why in found.items() if i not in block}
    return {} if n_removed > 1 and len(found) == len(layers) else found


def why_not_skipped(stack: DecoderLayers, layer: int) -> str | None:
    """Why `skip` cannot run the model without this layer; None if it can."""
    try:
        with skip(stack.model, layer, stack.layers_path):
            return None
    except ValueError as error:
        return str(error)


def why_refused(stack: DecoderLayers, layers: Iterable[int]) -> str | None:
    """Why `drop` refuses to remove these layers together; None if it does not."""
    try:
        check_drop(stack.model, layers, stack.layers_path)
    except ValueError as error:
        return str(error)
    return None
