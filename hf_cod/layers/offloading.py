"""Layers of a model whose weights stay in files (`io/offloaded.py`): held in memory while they are run or changed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module
from accelerate.utils import PrefixedDataset
from torch import Tensor, nn

from hf_cod.io.offloaded import OffloadedWeights, Place, offloaded_weights, view_of
from hf_cod.layers.finished_layers import FinishedLayers
from hf_cod.layers.stack import DecoderLayers


@contextmanager
def in_memory(module: nn.Module) -> Iterator[None]:
    """Holds the weights of a module and its submodules in memory within the block, if they stay in files otherwise.

    Changes are lost at its end, unless they are in a file, see `changed_in_memory`.
    """
    hooks: list[tuple[Any, Any]] = [(m, m._hf_hook) for m in module.modules() if view_of(m) is not None]
    try:
        for each, hook in hooks:
            hook.pre_forward(each)
            each._hf_hook = ModelHook()  # a forward pass neither loads nor drops them
        yield
    finally:
        for each, hook in hooks:
            each._hf_hook = hook
            hook.post_forward(each, None)


@contextmanager
def changed_in_memory(stack: DecoderLayers, index: int, finished: FinishedLayers) -> Iterator[None]:
    """Holds a layer in memory within the block, which finishes it; afterwards its weights are in the journal's file.

    Does nothing for a model in memory.
    """
    weights = offloaded_weights(stack.model)
    with in_memory(stack[index]):
        yield
        if weights is not None:
            _keep(stack, index, finished, weights)
    if weights is not None:
        _offload_new(stack, index, weights)


def _keep(stack: DecoderLayers, index: int, finished: FinishedLayers, weights: OffloadedWeights) -> None:
    """Replaces the weights of a layer that are in the file of the finished layer by those."""
    file, kept = finished.kept(index)
    places = {tensor.data_ptr(): (key, tensor) for key, tensor in kept.items() if tensor.numel()}
    for name, tensor in _own_tensors(stack, index):
        key, found = places.get(tensor.data_ptr(), (None, tensor))
        if key is not None:
            weights.replace(name, Place(file, key, transposed=found.stride() != tensor.stride()))


def _offload_new(stack: DecoderLayers, index: int, weights: OffloadedWeights) -> None:
    """Drops the weights of modules that were added to a layer from memory; they are in its file."""
    device = torch.device("cpu")
    for name, module in stack[index].named_modules(prefix=f"{stack.layers_path}.{index}"):
        own = dict(module.named_parameters(recurse=False))
        if own and view_of(module) is None and all(f"{name}.{key}" in weights for key in own):
            # A parameter of bitsandbytes refers to scales, which would stay in memory.
            plain = {key: p.data.as_subclass(Tensor) for key, p in own.items() if type(p) is not nn.Parameter}
            module._parameters.update({k: nn.Parameter(p, requires_grad=False) for k, p in plain.items()})
            view = PrefixedDataset(weights, f"{name}.")
            add_hook_to_module(module, AlignDevicesHook(device, offload=True, weights_map=view))


def _own_tensors(stack: DecoderLayers, index: int) -> Iterator[tuple[str, Tensor]]:
    yield from stack[index].named_parameters(prefix=f"{stack.layers_path}.{index}")
