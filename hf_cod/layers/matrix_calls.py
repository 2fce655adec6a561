"""The matrices that run in a forward pass of a layer, with tensors whose gradients can be asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hf_cod.layers.modules import is_norm
from hf_cod.layers.orientation import is_linear, multiplies, shape_of


@dataclass
class MatrixCall:
    """A matrix in a forward pass."""

    name: str
    module: Any
    input: Tensor
    output: Tensor


def _lists_of_alike(layer: nn.Module) -> list[str]:
    """Names of lists with two modules of one class, such as experts, or several attentions of which a layer runs one.

    A list of the different parts of a layer (T5) is none of these.
    """
    lists = [(name, m) for name, m in layer.named_modules() if isinstance(m, (nn.ModuleList, nn.ModuleDict))]
    return [name for name, m in lists if len({type(child) for child in m.children()}) < len(m)]


@contextmanager
def recorded_calls(layer: nn.Module, plain_norms: bool) -> Iterator[list[MatrixCall]]:
    """Appends each call of a Linear or Conv1D to the list, with tensors whose gradients can be asked for."""
    calls: list[MatrixCall] = []

    def record(name: str) -> Any:
        def hook(module: Any, args: tuple[Any, ...], output: Any) -> Any:
            if not multiplies(module, args, output):
                return None
            kept = output * 1
            calls.append(MatrixCall(name, module, args[0], kept))
            return kept * 1  # the model may change it in place

        return hook

    def multiply(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        weight = getattr(module, "weight", None)
        over_all = any(
            shape_of(call.module)[0] == len(weight) == args[0].shape[-1] for call in calls if weight is not None
        )
        return args[0] * weight if over_all else None

    lists = _lists_of_alike(layer)
    handles = []
    for name, module in layer.named_modules():
        if is_linear(module) and not any(name.startswith(f"{each}.") for each in lists):
            handles.append(module.register_forward_hook(record(name)))
        elif plain_norms and is_norm(module):
            handles.append(module.register_forward_hook(multiply))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
