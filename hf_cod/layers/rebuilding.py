"""Compares a shortened model with the one that its config builds, so that a reload gives the same model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from hf_cod.layers.config_surgery import building_errors
from hf_cod.layers.stack import DecoderLayers, find_decoder_layers, walk
from hf_cod.layers.stacks import inside_another, module_lists

# Attributes of the present mode of a module, which no config determines.
MODES = ("training", "gradient_checkpointing")


def check_config_builds(stack: DecoderLayers, cut: Mapping[str, tuple[int, ...]]) -> None:
    """Checks that a model built from the updated config has the kept layers, so that a reload gives the same model.

    Args:
        stack: the kept layers.
        cut: name -> shape of the weights outside of them that will be cut.
    """
    config: Any = stack.model.config
    with building_errors(stack.model), torch.device("meta"):
        # By way of a dictionary, as in a reload, so that derived values of the config are computed again.
        built: Any = type(stack.model)(type(config).from_dict(copy.deepcopy(config.to_dict())))
        rebuilt = find_decoder_layers(built, stack.layers_path)
    if len(rebuilt) != len(stack):
        raise ValueError(
            f"layers: expected a config of {type(stack.model).__name__} that counts the layers of {stack.layers_path}, "
            f"got one that would build {len(rebuilt)} instead of {len(stack)}; use skip"
        )
    _check_outside(stack, rebuilt, cut)
    for index, (mine, other) in enumerate(zip(stack, rebuilt, strict=True)):
        difference = first_difference(dict(walk(mine, "layer")), dict(walk(other, "layer")))
        if difference:
            raise ValueError(
                f"layers: expected kept layers that the config of {type(stack.model).__name__} can describe, got ones "
                f"of which it would build layer {index} differently ({difference}); remove whole periods of the "
                "pattern of layers, or use skip"
            )


def _check_outside(stack: DecoderLayers, rebuilt: DecoderLayers, cut: Mapping[str, tuple[int, ...]]) -> None:
    """Checks the weights outside of the layers: some models keep a table for all layers there."""
    inside = f"{stack.layers_path}."
    lists, built = module_lists(stack.model), module_lists(rebuilt.model)
    for name in (name for name in lists.keys() & built.keys() if not inside_another(name, lists)):
        if len(lists[name]) != len(built[name]):
            raise ValueError(
                f"layers: expected a config of {type(stack.model).__name__} that counts the layers of {name} apart, "
                f"got one that would build {len(built[name])} instead of {len(lists[name])}; use skip"
            )
    shapes = {name: tuple(p.shape) for name, p in rebuilt.model.named_parameters() if not name.startswith(inside)}
    for name, parameter in stack.model.named_parameters():
        # Adapters and packed weights have other names or types than the weights of the built model.
        shape = cut.get(name, tuple(parameter.shape))
        if name in shapes and parameter.is_floating_point() and shape != shapes[name]:
            raise ValueError(
                f"layers: expected weights outside of the layers that do not depend on their number, got {name} of "
                f"shape {tuple(parameter.shape)}, which would be {shapes[name]} for the kept layers"
            )


def first_difference(mine: Mapping[str, nn.Module], other: Mapping[str, nn.Module]) -> str | None:
    """The first module, weight or plain setting in which two layers differ; adapters do not count."""
    for name in [*other, *mine]:
        here = _description(mine[name]) if name in mine else {}
        there = _description(other[name]) if name in other else {}
        for key in here.keys() | there.keys():
            if here.get(key) != there.get(key):
                return f"{name}.{key} is {here.get(key)!r}, would be {there.get(key)!r}"
    return None


def _description(module: nn.Module) -> dict[str, Any]:
    """Shapes of a module's own floating-point weights, and its plain settings."""
    weights = {n: tuple(p.shape) for n, p in module.named_parameters(recurse=False) if p.is_floating_point()}
    settings = {
        key: value
        for key, value in vars(module).items()
        if isinstance(value, (int, float, str)) and key not in MODES and not key.startswith("_")
    }
    return {**settings, **weights}
