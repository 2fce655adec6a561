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
        by_place: what can be done where a number follows from the place of a layer.
        by_number: what can be done where it follows from the number of layers.
        temporary: the function that does the same within a `with` block.
    """

    verb: str
    layers: str
    by_index: str
    by_place: str
    by_number: str
    temporary: str


REMOVAL = Wording(
    verb="remove",
    layers="kept layer",
    by_index="only the last layers can be removed",
    by_place="at most the last layers can be removed",
    by_number="none can be removed",
    temporary="skip",
)
_NONE = "layers cannot be repeated"
REPETITION = Wording("repeat", "layer", by_index=_NONE, by_place=_NONE, by_number=_NONE, temporary="repeated")


def wording_of(order: Sequence[int]) -> Wording:
    """The words for an order: layers that occur twice are repeated, else others are removed."""
    return REMOVAL if len({*order}) == len(order) else REPETITION
