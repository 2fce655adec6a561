"""What a model has outside of its layers by its config: output channels of matrices and tables, and plain numbers."""

from __future__ import annotations

import copy
from collections.abc import Container
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_cod.layers.stack import DecoderLayers


@dataclass(frozen=True)
class Outside:
    """What a config builds outside of the layers.

    Attributes:
        channels: name of an embedding or Linear -> its output channels.
        numbers: (name of a module, attribute) -> a whole number.
    """

    channels: dict[str, int]
    numbers: dict[tuple[str, str], int]


def build_outside(stack: DecoderLayers) -> Outside:
    """Builds the model on the meta device from its config as it is now.

    Raises:
        Exception: whatever the model raises for a config that it cannot be built from.
    """
    make: Any = type(stack.model)
    # Not by way of a dictionary, as in a reload: `skip` also keeps layers that a class of configs would not accept.
    config: Any = copy.deepcopy(stack.model.config)
    config._attn_implementation = None  # that of the model may require a device
    with torch.device("meta"):
        built: nn.Module = make(config)
    inside = f"{stack.layers_path}."
    modules = {name: m for name, m in built.named_modules() if not f"{name}.".startswith(inside)}
    channels = {name: m.embedding_dim for name, m in modules.items() if isinstance(m, nn.Embedding)}
    channels |= {name: m.out_features for name, m in modules.items() if isinstance(m, nn.Linear)}
    numbers = {
        (name, key): value
        for name, module in modules.items()
        for key, value in vars(module).items()
        if type(value) is int and not key.startswith("_")
    }
    # A size that a model computes with tensors is one on the meta device, which has no value.
    return Outside({name: size for name, size in channels.items() if isinstance(size, int)}, numbers)


def changed_numbers(
    model: nn.Module, before: Outside, after: Outside, excluded: Container[str]
) -> dict[tuple[str, str], int]:
    """The numbers of a model that a changed config builds otherwise; those of `excluded` modules are left out."""
    own, found = dict(model.named_modules()), {}
    for (name, key), number in before.numbers.items():
        now = after.numbers.get((name, key))
        if now not in (None, number) and name in own and name not in excluded and vars(own[name]).get(key) == number:
            found[name, key] = now
    return found
