"""Compares a shortened model with the one that its config builds, so that a reload gives the same model."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_cod.layers.modules import walk
from hf_cod.layers.removal.changes import Changes
from hf_cod.layers.removal.config_surgery import building_errors
from hf_cod.layers.removal.layer_tables import LayerTables
from hf_cod.layers.removal.outside import plain_settings
from hf_cod.layers.removal.wording import Wording
from hf_cod.layers.stack import DecoderLayers, find_decoder_layers
from hf_cod.layers.stacks import inside_another, module_lists


def check_config_builds(stack: DecoderLayers, tables: LayerTables, wording: Wording) -> None:
    """Checks that a model built from the updated config has the kept layers, so that a reload gives the same model.

    Args:
        stack: the kept layers.
        tables: what depends on the number of layers outside of them.
        wording: of errors.
    """
    with building_errors(stack.model, wording):
        rebuilt = rebuilt_from_config(stack)
    if len(rebuilt) != len(stack):
        raise ValueError(
            f"layers: expected a config of {type(stack.model).__name__} that counts the layers of {stack.layers_path}, "
            f"got one that would build {len(rebuilt)} instead of {len(stack)}; use {wording.temporary}"
        )
    _check_outside(stack, rebuilt, tables.shapes, wording)
    _check_settings(stack, rebuilt, tables, wording)
    for index, found in enumerate(_by_layer(stack, rebuilt)):
        told = next(found, None)
        if told:
            raise ValueError(
                f"layers: expected {wording.layers}s that the config of {type(stack.model).__name__} can describe, got "
                f"ones of which it would build layer {index} differently ({told}); "
                f"{_way_out(told, index, stack, rebuilt, wording)}, or use {wording.temporary}"
            )


def _way_out(told: Difference, index: int, stack: DecoderLayers, rebuilt: DecoderLayers, wording: Wording) -> str:
    """Which layers can be removed where a kept layer at `index` differs from the one that the config builds."""
    if type(told.mine) is int and told.other == index and told.mine != index:
        return f"each layer holds its own index there, so {wording.by_index}"
    mine, others = (_values(layers, told.place) for layers in (stack, rebuilt))
    if told.other in mine:
        return f"{wording.verb} whole periods of the pattern of layers"
    if told.other is None and not others:
        return f"no layer that it builds has that, so {wording.by_number}"
    if told.other is None or told.mine is None:
        return f"keep the layers {'without' if told.other is None else 'with'} {told.place}"
    if type(told.other) not in (int, float):
        return f"keep the layers in which it is {told.other!r}"
    if {*mine} == {told.mine} and {*others} == {told.other}:
        return f"it follows from the number of layers, so {wording.by_number}"
    return f"it follows from the place of a layer, so {wording.by_place}"


def _values(stack: DecoderLayers, place: str) -> list[Any]:
    """What the layers have at the place of a difference, without those that have nothing there."""
    name, _, key = place.rpartition(".")
    modules = [found for layer in stack if (found := dict(walk(layer, "layer")).get(name)) is not None]
    values = [_kind(module) if key == "class" else _description(module).get(key) for module in modules]
    return [value for value in values if value is not None]


def scale_numbers(stack: DecoderLayers, changes: Changes) -> bool:
    """Multiplies a number of the config so that it describes the kept layers; returns whether there is such a number.

    MiniCPM3's `residual_scale` is `scale_depth`, divided by the root of the number of layers.
    """
    ratios = _ratios(stack)
    if len(ratios) != 1:
        return False
    for name, value in [*vars(stack.config).items()]:
        if type(value) is float and value and not name.startswith("_"):
            attempt = Changes()
            attempt.set(stack.config, name, value * next(iter(ratios)))
            try:
                alike = not any(any(found) for found in _by_layer(stack, rebuilt_from_config(stack)))
            except Exception:  # whatever a model raises for a number that means something else
                alike = False
            written = getattr(stack.config, name)
            attempt.undo()
            if alike:
                changes.set(stack.config, name, written)
                return True
    return False


def _ratios(stack: DecoderLayers) -> set[float]:
    """The ratios of numbers of the layers and of those that would be built; empty if something else differs."""
    try:
        rebuilt = rebuilt_from_config(stack)
    except Exception:  # whatever a model raises that cannot be built from its config; `check_config_builds` tells
        return set()
    found: set[float] = set()
    for difference in (each for layer in _by_layer(stack, rebuilt) for each in layer):
        mine, other = difference.mine, difference.other
        if type(mine) is not float or type(other) is not float or not other or len(rebuilt) != len(stack):
            return set()
        found.add(round(mine / other, 12))
    return found


def rebuilt_from_config(stack: DecoderLayers) -> DecoderLayers:
    """The layers of a model built from the config of the model of these layers, on the meta device."""
    config: Any = stack.model.config
    with torch.device("meta"):
        # By way of a dictionary, as in a reload, so that derived values of the config are computed again.
        built: Any = type(stack.model)(type(config).from_dict(copy.deepcopy(config.to_dict())))
        return find_decoder_layers(built, stack.layers_path)


def _by_layer(stack: DecoderLayers, rebuilt: DecoderLayers) -> Iterator[Iterator[Difference]]:
    return (
        differences(dict(walk(mine, "layer")), dict(walk(other, "layer")))
        for mine, other in zip(stack, rebuilt, strict=False)
    )


def _check_outside(
    stack: DecoderLayers, rebuilt: DecoderLayers, cut: Mapping[str, tuple[int, ...]], wording: Wording
) -> None:
    """Checks the weights outside of the layers: some models keep a table for all layers there."""
    inside = f"{stack.layers_path}."
    lists, built = module_lists(stack.model), module_lists(rebuilt.model)
    for name in (name for name in lists.keys() & built.keys() if not inside_another(name, lists)):
        if len(lists[name]) != len(built[name]):
            raise ValueError(
                f"layers: expected a config of {type(stack.model).__name__} that counts the layers of {name} apart, "
                f"got one that would build {len(built[name])} instead of {len(lists[name])}; use {wording.temporary}"
            )
    shapes = {name: tuple(p.shape) for name, p in rebuilt.model.named_parameters() if not name.startswith(inside)}
    for name, parameter in stack.model.named_parameters():
        # Adapters and packed weights have other names or types than the weights of the built model.
        shape = cut.get(name, tuple(parameter.shape))
        if name in shapes and parameter.is_floating_point() and shape != shapes[name]:
            raise ValueError(
                f"layers: expected weights outside of the layers that do not depend on their number, got {name} of "
                f"shape {tuple(parameter.shape)}, which would be {shapes[name]} for the {wording.layers}s"
            )


def _check_settings(stack: DecoderLayers, rebuilt: DecoderLayers, tables: LayerTables, wording: Wording) -> None:
    """Checks the plain settings outside of the layers that the config determines, such as lists by layer."""
    own, built = dict(stack.model.named_modules()), dict(rebuilt.model.named_modules())
    for name, key in sorted(tables.determined):
        if name in own and key in vars(built.get(name, nn.Identity())):  # else nothing reads it after a reload
            mine, other = (plain_settings(modules[name]).get(key) for modules in (own, built))
            if not _equal(mine, other):
                raise ValueError(
                    f"layers: expected settings outside of the layers that the config of {type(stack.model).__name__} "
                    f"can describe, got {f'{name}.{key}'.lstrip('.')} = {mine!r}, which would be {other!r} for the "
                    f"{wording.layers}s; use {wording.temporary}"
                )


@dataclass(frozen=True)
class Difference:
    """A weight or plain setting in which two layers differ; reads as a sentence.

    Attributes:
        place: name of the module and of the weight or setting.
        mine: shape of the weight, value of the setting, or None if there is none.
        other: that of the other layer.
    """

    place: str
    mine: Any
    other: Any

    def __str__(self) -> str:
        return f"{self.place} is {self.mine!r}, would be {self.other!r}"


def differences(mine: Mapping[str, nn.Module], other: Mapping[str, nn.Module]) -> Iterator[Difference]:
    """The modules, weights and plain settings in which two layers differ; adapters do not count, nor modules that
    return their input in eval mode, such as dropout of paths, whose rate is a matter of training.
    """
    for name in dict.fromkeys([*other, *mine]):
        if returns_input(mine.get(name)) and returns_input(other.get(name)):
            continue
        here = _description(mine[name]) if name in mine else {}
        there = _description(other[name]) if name in other else {}
        for key in dict.fromkeys([*here, *there]):
            if not _equal(here.get(key), there.get(key)):
                yield Difference(f"{name}.{key}", here.get(key), there.get(key))
        kinds = (_kind(mine.get(name)), _kind(other.get(name)))
        if None not in kinds and kinds[0] != kinds[1]:
            yield Difference(f"{name}.class", *kinds)


def returns_input(module: nn.Module | None) -> bool:
    """Whether a module without weights and parts returns its input in eval mode: each number of a tensor, the smallest
    and the largest ones included, so that a limit would be found.
    """
    if module is None or any(True for _ in (*module.parameters(), *module.buffers(), *module.children())):
        return False
    powers = 10.0 ** torch.arange(-30, 31, dtype=torch.float32)
    numbers = torch.cat([powers, -powers]).view(1, 2, -1)
    try:
        with torch.no_grad():
            returned = copy.deepcopy(module).eval()(numbers)
    except Exception:  # whatever a module raises that takes no single tensor
        return False
    return isinstance(returned, torch.Tensor) and torch.equal(returned, numbers)


def _equal(one: Any, other: Any) -> bool:
    """Computed numbers are rounded, and a list read from a file may be a tuple."""
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_equal, one, other))
    both = type(one) is float and type(other) is float
    return math.isclose(one, other, rel_tol=1e-12) if both else bool(one == other)


def _description(module: nn.Module) -> dict[str, Any]:
    """Shapes of a module's own floating-point weights, and its plain settings but for what is None."""
    weights = {n: tuple(p.shape) for n, p in module.named_parameters(recurse=False) if p.is_floating_point()}
    settings = {key: value for key, value in plain_settings(module).items() if value is not None}
    return {**settings, **weights}


def _kind(module: nn.Module | None) -> str | None:
    """The class of a model's own module; None for others, such as packed weights in place of a Linear."""
    return type(module).__name__ if type(module).__module__.startswith("transformers.models.") else None
