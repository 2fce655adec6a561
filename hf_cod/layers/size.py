"""The size of a model: bytes of its tensors, number of its parameters and of weights in its layers' matrices."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from hf_cod.io.deprecation import renamed
from hf_cod.layers.stack import find_decoder_layers


@dataclass(frozen=True)
class ModelSize:
    """Size of a model.

    Attributes:
        bytes: bytes of all its tensors in memory.
        layer_bytes: bytes of the tensors inside its layers.
        layer_weights: number of weights in the layers' matrices, zeros included; packed and quantized matrices count
            with their original shape.
    """

    bytes: int
    layer_bytes: int
    layer_weights: int


@renamed(path="layers_path")
def size_of(model: nn.Module, layers_path: str | None = None) -> ModelSize:
    """Computes the size of a model.

    Args:
        model: a transformers model.
        layers_path: the stack's module name, if it cannot be found.
    """
    stack = find_decoder_layers(model, layers_path)
    weights = sum(stack.count_weights(index) for index in range(len(stack)))
    return ModelSize(bytes_of(stack.model), bytes_of(stack.module_list), weights)


def count_parameters(model: nn.Module) -> int:
    """Number of parameters of a model."""
    return sum(p.numel() for p in model.parameters())


def bytes_of(module: nn.Module) -> int:
    """Bytes of a module's tensors in memory, each storage counted once."""
    tensors = [*module.parameters(), *module.buffers()]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
