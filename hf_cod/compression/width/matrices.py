"""Removes heads or channels from their matrices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_cod.layers.orientation import turned
from hf_cod.layers.stack import DecoderLayers
from hf_cod.layers.units import Changes, Units, kept_rows, set_units


@torch.no_grad()
def cut(stack: DecoderLayers, units: Units, kept: Tensor, W: Tensor, bias: Tensor | None) -> Changes:
    """Removes all other units from their matrices, and sets the number of kept units in the layer's modules.

    Args:
        stack: the layers.
        units: of one of them.
        kept: indices of the kept units, ascending.
        W: the new weight (out, in) of the writer.
        bias: (out,), added to the writer's bias, or None.

    Raises:
        ValueError: NaN or infinity; the layer is left unchanged.
    """
    tensors = kept_rows(stack.model, units, kept)
    writer: Any = stack.model.get_submodule(units.writer)
    tensors[f"{units.writer}.weight"] = turned(writer, W)
    if bias is not None:
        own = 0 if writer.bias is None else writer.bias.detach().to(bias)
        tensors[f"{units.writer}.bias"] = bias + own
    check_finite(tensors, units.kind)
    return set_units(stack.model, units, len(kept), tensors)


def check_finite(tensors: Mapping[str, Tensor], kind: str) -> None:
    """Checks new tensors of fewer units.

    Raises:
        ValueError: NaN or infinity.
    """
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise ValueError(f"weights: expected finite ones of fewer {kind}, got NaN or infinity in {broken[0]}")
