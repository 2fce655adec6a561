"""Which models' matrices can be written in place: plain ones, in memory, each its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from hf_cod.decoder_layers import DecoderLayers

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_writable(stack: DecoderLayers) -> None:
    """Makes sure, before anything is changed, that each matrix can be pruned in place.

    Raises:
        ValueError: adapters, quantized, offloaded or sharded weights; a weight that two matrices share (or a matrix
            and an embedding); NaN or infinity. Says in which module.
    """
    names = _names_of_weights(stack.model)
    for index in range(len(stack)):
        adapter = next((n for n, m in stack[index].named_modules() if hasattr(m, "base_layer")), None)
        if adapter is not None:
            raise ValueError(
                f"model: expected plain weights, got an adapter at {stack.path}.{index}.{adapter}; merge_and_unload it "
                "first, or prune the model below it"
            )
        for name, weight in _parameters(stack, index):
            _check_plain(name, weight)
            shared = [other for other in names[id(weight)] if other != names[id(weight)][0]]
            if shared:
                raise ValueError(
                    f"model: expected weights of one matrix each, got {names[id(weight)][0]}, which is {shared[0]}, too"
                )
            if not weight.isfinite().all():
                raise ValueError(f"weights: expected finite numbers, got NaN or infinity in {name}")


def _parameters(stack: DecoderLayers, index: int) -> Iterator[tuple[str, Any]]:
    for name, module in stack.linears(index).items():
        yield name, getattr(module, "weight", None)
    for name, bank in stack.experts(index).items():
        yield from ((f"{name}.{key}", p) for key, p in bank.named_parameters(recurse=False) if p.dim() == 3)


def _check_plain(name: str, weight: Any) -> None:
    if type(weight) is not nn.Parameter or weight.dtype not in _FLOATS:
        kind = f"{type(weight).__name__} {getattr(weight, 'dtype', '')}".strip()
        raise ValueError(f"model: expected plain floating-point weights, got {kind} in {name}; prune before quantizing")
    if weight.device.type == "meta":
        raise ValueError(f"model: expected weights in memory, got offloaded ones in {name}; load the model whole")


def _names_of_weights(model: nn.Module) -> dict[int, list[str]]:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names
