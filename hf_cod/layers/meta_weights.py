"""Runs a model on the meta device, for what does not depend on its weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_cod.layers.watched_experts import watch_experts


def is_on_meta(model: nn.Module) -> bool:
    """Whether a parameter has no data."""
    return any(parameter.is_meta for parameter in model.parameters())


@contextmanager
def on_zeros(model: nn.Module) -> Iterator[dict[str, str]]:
    """In the block, tensors on the meta device are zeros on the CPU that take no memory, and the matrices of banks of
    experts, whose kernels require memory for each weight, are watched ones: yields what `watch_experts` returns.

    Some models read a value, such as that of a mask, which the meta device does not have.
    """
    before = [(vars(module), dict(vars(module))) for module in model.modules()]
    for module in model.modules():
        vars(module)["_modules"] = dict(vars(module)["_modules"])
        for kind in ("_parameters", "_buffers"):
            vars(module)[kind] = {name: _zeros(tensor) for name, tensor in vars(module)[kind].items()}
    try:
        yield watch_experts(model)
    finally:
        for attributes, values in before:
            attributes.clear()
            attributes.update(values)


def _zeros(tensor: Tensor | None) -> Any:
    if tensor is None or not tensor.is_meta:
        return tensor
    made = torch.zeros((), dtype=tensor.dtype, device="cpu").expand(tensor.shape)
    return nn.Parameter(made, requires_grad=False) if isinstance(tensor, nn.Parameter) else made
