"""How errors about another order of layers name the change: a removal, or a repetition."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Wording:
    """Words of errors.

    Attributes:
        verb: what is done to layers.
        layers: the layers of the changed stack.
        by_index: what can be done where each layer holds its own index.
        temporary: the function that does the same within a `with` block.
    """

    verb: str
    layers: str
    by_index: str
    temporary: str


REMOVAL = Wording("remove", "kept layer", "only the last layers can be removed", "skip")
REPETITION = Wording("repeat", "layer", "layers cannot be repeated", "repeated")


def wording_of(order: Sequence[int]) -> Wording:
    """The words for an order: layers that occur twice are repeated, else others are removed."""
    return REMOVAL if len({*order}) == len(order) else REPETITION
