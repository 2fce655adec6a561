"""What a model has outside of its layers by its config: output channels of matrices and tables, and plain settings."""

from __future__ import annotations

import copy
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_cod.layers.stack import DecoderLayers

Place = tuple[str, str]
"""Name of a module, and of its attribute."""
# Attributes of the present mode of a module, which no config determines.
MODES = ("training", "gradient_checkpointing")


@dataclass(frozen=True)
class Outside:
    """What a config builds outside of the layers.

    Attributes:
        channels: name of an embedding or Linear -> its output channels.
        settings: (name of a module, attribute) -> a number, string, list or dictionary of such.
    """

    channels: dict[str, int]
    settings: dict[Place, Any]


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
    settings = {(name, key): value for name, module in modules.items() for key, value in plain_settings(module).items()}
    # A size that a model computes with tensors is one on the meta device, which has no value.
    return Outside({name: size for name, size in channels.items() if isinstance(size, int)}, settings)


def plain_settings(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module that are numbers, strings, or lists and dictionaries of such."""
    own = {key: value for key, value in vars(module).items() if not key.startswith("_") and key not in MODES}
    return {key: value for key, value in own.items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_is_plain(each) for pair in value.items() for each in pair)
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def determined(model: nn.Module, before: Outside, excluded: Container[str]) -> set[Place]:
    """The settings that a model has as its config says; others it has changed itself. Without those of `excluded`."""
    own = {name: vars(module) for name, module in model.named_modules() if name not in excluded}
    return {
        (name, key)
        for (name, key), value in before.settings.items()
        if name in own and key in own[name] and own[name][key] == value
    }


def changed_settings(
    model: nn.Module, before: Outside, after: Outside, depth: int, kept: Sequence[int], excluded: Container[str]
) -> dict[Place, Any]:
    """What numbers and lists by layer of a model become where a changed config builds others; those of `excluded`
    modules are left out.

    Args:
        model: the model before the change.
        before: what its config builds.
        after: what the changed config builds.
        depth: its number of layers.
        kept: the layers of the changed model, by their old indices.
        excluded: names of modules.
    """
    found: dict[Place, Any] = {}
    for name, key in determined(model, before, excluded):
        mine, other = before.settings[name, key], after.settings.get((name, key))
        if mine == other:
            continue
        if type(mine) is int and type(other) is int:
            found[name, key] = other
        elif _is_by_layer(mine, depth) and _is_by_layer(other, len(kept)):
            found[name, key] = type(mine)(mine[old] for old in kept)
        elif (_are_stages(mine, depth) and _are_stages(other, len(kept))) or _is_kind_less(mine, other):
            found[name, key] = other
    return found


def _are_stages(value: Any, depth: int) -> bool:
    """Whether a list is that of a backbone, which begins with its input."""
    return _is_by_layer(value, depth + 1)


def _is_kind_less(value: Any, other: Any) -> bool:
    """Whether the last layer of its kind is gone from a list of kinds, or from a dictionary by kind."""
    if isinstance(value, dict) and isinstance(other, dict):
        return len(other) < len(value) and all(key in value and value[key] == other[key] for key in other)
    return _are_kinds(value) and _are_kinds(other) and {*other} < {*value}


def _are_kinds(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(each, str) for each in value)


def _is_by_layer(value: Any, depth: int) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == depth
