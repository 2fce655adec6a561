"""Removes heads or channels from their matrices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_cod.functional.channels import rows_of
from hf_cod.layers.orientation import set_shape, shape_of, turned
from hf_cod.layers.stack import DecoderLayers
from hf_cod.layers.units import Units

Changes = dict[str, dict[str, int]]
"""Module's name -> its changed sizes, as in `models/shapes.py`."""


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
    tensors: dict[str, Tensor] = {}
    for name, parts in units.readers.items():
        reader: Any = stack.model.get_submodule(name)
        old = turned(reader, reader.weight.detach())
        rows = rows_of(kept.to(old.device), units.count, len(old), parts)
        tensors[f"{name}.weight"] = turned(reader, old[rows])
        if reader.bias is not None:
            tensors[f"{name}.bias"] = reader.bias.detach()[rows]
    writer: Any = stack.model.get_submodule(units.writer)
    tensors[f"{units.writer}.weight"] = turned(writer, W)
    if bias is not None:
        own = 0 if writer.bias is None else writer.bias.detach().to(bias)
        tensors[f"{units.writer}.bias"] = bias + own
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise ValueError(f"weights: expected finite ones of fewer {units.kind}, got NaN or infinity in {broken[0]}")
    return put_back(stack, units, len(kept), tensors)


def tensors_of(stack: DecoderLayers, units: Units) -> dict[str, Tensor]:
    """The weights and biases of the matrices."""
    modules = {name: stack.model.get_submodule(name) for name in (*units.readers, units.writer)}
    return {f"{n}.{key}": p.detach() for n, m in modules.items() for key, p in m.named_parameters(recurse=False)}


@torch.no_grad()
def put_back(stack: DecoderLayers, units: Units, kept: int, tensors: dict[str, Tensor]) -> Changes:
    """Sets the weights and biases of an intact layer to those of `kept` units; a bias not in `tensors` is kept.

    Raises:
        ValueError: a tensor has another shape; the layer is left unchanged.
    """
    changes: Changes = {}
    _check_shapes(stack, units, kept, tensors)
    for name in (*units.readers, units.writer):
        module: Any = stack.model.get_submodule(name)
        had_bias = module.bias is not None
        old = module.weight
        for key in ("weight", "bias"):
            if f"{name}.{key}" in tensors:
                values = tensors[f"{name}.{key}"].to(device=old.device, dtype=old.dtype).contiguous()
                setattr(module, key, nn.Parameter(values, requires_grad=old.requires_grad))
        rows, columns = turned(module, module.weight).shape
        set_shape(module, rows, columns)
        changes[name] = {"in_features": columns} if name == units.writer else {"out_features": rows}
        if module.bias is not None and not had_bias:
            changes[name]["bias"] = 1
    for name, numbers in units.numbers.items():
        changes[name] = {key: each * kept for key, each in numbers.items()}
        for key, value in changes[name].items():
            setattr(stack.model.get_submodule(name), key, value)
    return changes


def _check_shapes(stack: DecoderLayers, units: Units, kept: int, tensors: dict[str, Tensor]) -> None:
    for name in (*units.readers, units.writer):
        module: Any = stack.model.get_submodule(name)
        rows, columns = shape_of(module)
        if name == units.writer:
            columns = columns * kept // units.count
        else:
            rows = rows * kept // units.count
        for key, shape in (("weight", (rows, columns)), ("bias", (rows,))):
            tensor = tensors.get(f"{name}.{key}")
            if tensor is None:
                continue
            found = tuple(turned(module, tensor).shape) if tensor.dim() == 2 else tuple(tensor.shape)
            if found != shape:
                raise ValueError(f"{name}.{key}: expected shape {shape}, got {found}")
