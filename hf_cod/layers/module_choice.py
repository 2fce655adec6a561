"""The matrices of the layers that a function changes, by the settings `include` and `exclude`."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from hf_cod.io.module_names import given_names, matching
from hf_cod.layers.modules import is_linear_like, is_norm
from hf_cod.layers.orientation import shape_of
from hf_cod.layers.stack import DecoderLayers
from hf_cod.layers.stacks import inside_another, module_lists, named_stacks


@dataclass(frozen=True)
class ModuleChoice:
    """The chosen matrices.

    Attributes:
        stack: the layers, of whose matrices only the chosen ones are listed.
        excluded: name of each matrix that is not chosen -> its number of weights.
        given: the settings by which the matrices were chosen; empty if all were.
    """

    stack: DecoderLayers
    excluded: Mapping[str, int] = field(default_factory=dict)
    given: Mapping[str, Any] = field(default_factory=dict)

    def notes(self, done: str) -> list[str]:
        """A sentence for a report that counts and names what is excluded; none if nothing is.

        Args:
            done: what is not done to them, such as "pruned".
        """
        if not self.excluded:
            return []
        how = " and ".join(f"{name} {value!r}" for name, value in self.given.items())
        count = "1 matrix" if len(self.excluded) == 1 else f"{len(self.excluded)} matrices"
        return [
            f"{count} of {sum(self.excluded.values()):,} weights are not {done}, by {how}: "
            f"{'; '.join(by_place(self.excluded))}"
        ]

    @property
    def identity(self) -> list[Any]:
        """What the fingerprint of a journal has in addition; empty if all matrices are chosen."""
        return [sorted(self.excluded)] if self.excluded else []


def choose_modules(stack: DecoderLayers, settings: Any) -> ModuleChoice:
    """The matrices that `settings.include` and `settings.exclude` leave; where both match, exclude wins.

    A bank of experts can be named as a whole, or by one of its parameters.

    Raises:
        ValueError: a name or an expression that matches no matrix, or a choice of no matrix.
    """
    given = given_names(settings)
    if not given:
        return ModuleChoice(stack)
    names = _names(stack)
    included = matching("include", given["include"], names) if "include" in given else set()
    chosen = included or {*names}
    if "exclude" in given:
        chosen = chosen - matching("exclude", given["exclude"], names)
    if not chosen:
        raise ValueError(f"exclude: expected names that leave some of the included matrices, got {given['exclude']!r}")
    excluded = {name: weights for name, weights in matrix_sizes(stack).items() if name not in chosen}
    view = replace(stack, excluded=frozenset(excluded), included=frozenset(included & chosen))
    return ModuleChoice(view, excluded, given)


def other_notes(stack: DecoderLayers, done: str) -> list[str]:
    """Sentences for a report on what is left out: weights of the layers that are in no matrix, and other stacks.

    Args:
        stack: the layers.
        done: what is not done to them, such as "pruned".
    """
    notes = other_stacks(stack, done)
    found = sum((stack.other_weights(index) for index in range(len(stack))), Counter[str]())
    kinds = ", ".join(f"{name} ({weights:,})" for name, weights in sorted(found.items()))
    told = f"{found.total():,} weights of the layers are not {done}, because they are in no matrix: {kinds}"
    return [*notes, told] if found else notes


def other_stacks(stack: DecoderLayers, done: str) -> list[str]:
    """A sentence for a report on each other stack of a model that has several; see `other_notes`."""
    named = {other.path: other for other in named_stacks(stack.model)}
    notes = [
        f"the {other.depth} layers of {other.name!r} ({other.path}) are not {done}; stack={other.name!r} names them"
        for other in named.values()
        if other.path != stack.layers_path
    ]
    lists = module_lists(stack.model)
    for path, layers in lists.items():
        around = f"{stack.layers_path}.".startswith(f"{path}.")
        if path not in named and not around and not inside_another(path, lists) and _are_layers(layers):
            notes.append(f"the {len(layers)} layers of {path} are not {done}; stack={path!r} names them")
    return notes


def _are_layers(modules: nn.ModuleList) -> bool:
    """Whether several modules in a list each have matrices and a norm, as layers without a name do (V-JEPA 2)."""
    inside = [[*module.modules()] for module in modules]
    return len(inside) > 1 and all(any(map(is_linear_like, found)) and any(map(is_norm, found)) for found in inside)


def by_place(names: Iterable[str]) -> list[str]:
    """Names of matrices in short: one for all layers that have it, with their numbers."""
    places: dict[str, list[int]] = {}
    for name in names:
        number = re.search(r"\.(\d+)\.", name)
        place = name if number is None else f"{name[: number.start()]}.*.{name[number.end() :]}"
        places.setdefault(place, []).append(-1 if number is None else int(number[1]))
    return [place if layers == [-1] else f"{place} ({in_layers(layers)})" for place, layers in places.items()]


def in_layers(layers: list[int]) -> str:
    """The numbers of layers in words, such as "layers 0 to 3"."""
    first, last = layers[0], layers[-1]
    if len(layers) == 1:
        return f"layer {first}"
    if layers == [*range(first, last + 1)]:
        return f"layers {first} to {last}"
    return f"layers {', '.join(map(str, layers))}"


def _names(stack: DecoderLayers) -> dict[str, set[str]]:
    """Matrix -> the names that it can be called by: its own, and that of its bank of experts."""
    found: dict[str, set[str]] = {}
    for index in range(len(stack)):
        found |= {name: {name} for name in stack.input_shapes(index)}
        found |= {matrix.name: {matrix.name, matrix.bank} for matrix in stack.expert_matrices(index)}
    return found


def matrix_sizes(stack: DecoderLayers) -> dict[str, int]:
    """Matrix -> its number of weights, those of all experts together; nothing is loaded or decoded."""
    found: dict[str, int] = {}
    for index in range(len(stack)):
        found |= {name: math.prod(shape_of(module)) for name, module in stack.linears(index).items()}
        found |= {matrix.name: matrix.parameter.numel() for matrix in stack.expert_matrices(index)}
    return found
