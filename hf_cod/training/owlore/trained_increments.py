"""Increments: the increments of a model's OwLore adapters that an optimizer trains, by layer."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from hf_cod.training.owlore.increment import Increment
from hf_cod.training.owlore.settings import OwLoreSettings

# Settings that an adapter has itself, or that do not apply to adapters.
_NOT_OURS = {
    "rank": "set OwLoreConfig(r=...)",
    "scale": "updates of adapters are not scaled; set lr",
    "train_embeddings": "name them in OwLoreConfig(modules_to_save=...)",
    "include": "set OwLoreConfig(target_modules=...)",
    "exclude": "set OwLoreConfig(exclude_modules=...)",
    "deselected": "moments are always dropped when an increment is folded, because its basis is gone",
}


def check_beside_adapters(settings: OwLoreSettings, but: Collection[str] = ()) -> None:
    """Makes sure that settings leave to OwLore adapters what those decide.

    Args:
        settings: of the optimizer.
        but: names of settings that the caller takes for the adapters.

    Raises:
        ValueError: they were given something else than the default.
    """
    for name, reason in _NOT_OURS.items():
        value = getattr(settings, name)
        if name not in but and value != OwLoreSettings.__dataclass_fields__[name].default:
            raise ValueError(f"{name}: expected none with an OwLore adapter, got {value!r}; {reason}")


class Increments:
    """The increments of OwLore adapters whose N an optimizer trains; empty if the model has no such adapters.

    Args:
        layers: the model's layers.
        trained: for each layer, the parameters that are trained.
    """

    def __init__(self, layers: Sequence[nn.Module], trained: Sequence[Sequence[nn.Parameter]]) -> None:
        self._layers: list[list[Increment]] = []
        for layer, parameters in zip(layers, trained, strict=True):
            ours = {id(p) for p in parameters}
            self._layers.append([m for m in layer.modules() if isinstance(m, Increment) and id(m.N) in ours])

    def __iter__(self) -> Iterator[Increment]:
        return (increment for layer in self._layers for increment in layer)

    def settings(self, settings: OwLoreSettings) -> OwLoreSettings:
        """The settings of the optimizer, with rank None if there are adapters, whose N is trained in full rank.

        Raises:
            ValueError: settings that an adapter has itself, or that do not apply to adapters.
        """
        if not any(self):
            return settings
        check_beside_adapters(settings)
        return replace(settings, rank=None)

    def described(self) -> dict[str, Any]:
        """The settings of adapters that must be the same when a run is resumed."""
        found = [*self]
        if not found:
            return {}
        return {"r": max(m.rank for m in found), "max_rank": max(m.max_rank for m in found)}

    def shapes(self, parameters: Iterable[nn.Parameter]) -> dict[nn.Parameter, list[int]]:
        """Parameter -> shape; for an N, its shape while it trains."""
        known = {increment.N: increment.shape for increment in self}
        return {p: list(known.get(p, p.shape)) for p in parameters}

    def begin(self, active: Sequence[int], seed: int, draw: int) -> None:
        """Starts training the increments of these layers, and stops training the others."""
        number = 0
        for index, layer in enumerate(self._layers):
            for increment in layer:
                if index in active:
                    increment.begin(seed, draw, number)
                else:
                    increment.rest()
                number += 1

    def settle(self) -> None:
        """Must be called after each step."""
        for increment in self:
            increment.settle()

    def fold(self) -> None:
        """Ends a sampling round: folds the update of each increment into its B A."""
        for increment in self:
            increment.fold()
