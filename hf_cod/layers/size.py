"""The size of a model: bytes of tensors and files, number of parameters and of weights in the layers' matrices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from hf_cod.io.deprecation import renamed
from hf_cod.io.offloaded import view_of
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


def size_results(sizes: Mapping[str, ModelSize]) -> dict[str, dict[str, int]]:
    """Entries of a report's `results`: "memory_bytes", "layer_bytes" and "layer_weights" of each state of a model."""
    names = {"memory_bytes": "bytes", "layer_bytes": "layer_bytes", "layer_weights": "layer_weights"}
    return {key: {state: getattr(size, name) for state, size in sizes.items()} for key, name in names.items()}


def count_parameters(model: nn.Module) -> int:
    """Number of parameters of a model."""
    in_files = _in_files(model)
    own = (p for p in model.parameters() if not (p.is_meta and in_files))
    return sum(p.numel() for p in (*own, *in_files.values()))


def bytes_of(module: nn.Module) -> int:
    """Bytes of a module's tensors in memory, each storage counted once; weights that stay in files count as if read."""
    tensors = [*module.parameters(), *module.buffers()]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if not t.is_meta}
    return sum(storages.values()) + sum(tensor.nbytes for tensor in _in_files(module).values())


def _in_files(module: nn.Module) -> dict[Any, Tensor]:
    """Place in a file -> parameter of the tensors that stay in files; tied ones have one place."""
    found: dict[Any, Tensor] = {}
    for each, view in ((each, view_of(each)) for each in module.modules()):
        for name, tensor in each.named_parameters(recurse=False):
            if tensor.is_meta and view is not None:
                found[view.dataset.place(view.prefix + name)] = tensor
    return found


def disk_bytes(directory: str | Path) -> int:
    """Bytes of the weights that are saved in a directory, without those in its subdirectories."""
    return sum(path.stat().st_size for path in Path(directory).glob("*.safetensors"))
