"""The plans that a search chooses from: parts of the model, and what each of them has of the budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from hf_cod.functional.bits import BITS
from hf_cod.functional.plan_moves import balanced, climbed, exchange_zeros, filled, switch_rungs, switch_widths
from hf_cod.layers.parts import Part

Plan = tuple[int, ...]
"""For each part its number of zeros, 1 for the larger of two widths, or a rung of its ladder of widths."""

# Shares of the zeros of a part, of which each change moves one.
SHARES = (1 / 32, 1 / 16, 1 / 8)
# The number of changes of a plan is the smaller of two random numbers up to this, as in EvoPress.
MOST_CHANGES = 3


class Space(Protocol):
    """Plans of one budget."""

    @property
    def names(self) -> list[str]:
        """The matrices of all parts."""

    def start(self, values: Mapping[str, float]) -> Plan:
        """The plan of the budget that is nearest to the values of matrices."""

    def values(self, plan: Plan) -> dict[str, float]:
        """The value of each matrix."""

    def changed(self, plan: Plan, generator: torch.Generator) -> Plan:
        """Another plan of the same budget."""


@dataclass(frozen=True)
class Zeros:
    """Sparsities of parts; the number of zeros of all parts together is kept exactly.

    Attributes:
        parts: the parts of the model.
        sizes: the number of weights of each.
        budget: the mean sparsity.
    """

    parts: Sequence[Part]
    sizes: Sequence[int]
    budget: float

    @property
    def names(self) -> list[str]:
        """The matrices of all parts."""
        return [name for part in self.parts for name in part.names]

    def start(self, values: Mapping[str, float]) -> Plan:
        """From the sparsity of each part's first matrix; the rounding error of their sum goes to the first parts."""
        zeros = [round(values[part.names[0]] * size) for part, size in zip(self.parts, self.sizes, strict=True)]
        return tuple(balanced(zeros, self.sizes, round(self.budget * sum(self.sizes))))

    def values(self, plan: Plan) -> dict[str, float]:
        """The sparsity of each matrix."""
        found = zip(self.parts, plan, self.sizes, strict=True)
        return {name: zeros / size for part, zeros, size in found for name in part.names}

    def changed(self, plan: Plan, generator: torch.Generator) -> Plan:
        """Moves zeros between one to three random pairs of parts."""
        found: Sequence[int] = plan
        for _ in range(_changes(generator)):
            share = SHARES[int(torch.randint(len(SHARES), (), generator=generator))]
            found = exchange_zeros(found, self.sizes, share, generator)
        return tuple(found)


@dataclass(frozen=True)
class Widths:
    """Three or four bits of parts, within a budget of stored bits.

    Attributes:
        parts: the parts of the model.
        prices: the stored bits that four bits cost more than three, of each.
        budget: of these.
    """

    parts: Sequence[Part]
    prices: Sequence[int]
    budget: int

    @property
    def names(self) -> list[str]:
        """The matrices of all parts."""
        return [name for part in self.parts for name in part.names]

    def start(self, values: Mapping[str, float]) -> Plan:
        """Four bits for the parts of which all matrices have four, then for the first ones that fit."""
        whole = [int(all(values[name] == max(BITS) for name in part.names)) for part in self.parts]
        return tuple(filled(whole, self.prices, self.budget, range(len(whole))))

    def values(self, plan: Plan) -> dict[str, float]:
        """The bits of each matrix."""
        return {name: float(BITS[width]) for part, width in zip(self.parts, plan, strict=True) for name in part.names}

    def changed(self, plan: Plan, generator: torch.Generator) -> Plan:
        """Switches the widths of one to three random parts, and of as many others as the budget requires."""
        found: Sequence[int] = plan
        for _ in range(_changes(generator)):
            found = switch_widths(found, self.prices, self.budget, generator)
        return tuple(found)


@dataclass(frozen=True)
class Rungs:
    """Widths of parts, each from a ladder of its own, within a budget of stored bits.

    Attributes:
        parts: the parts of the model.
        widths: of each part, rising.
        prices: the stored bits of each part with each of its widths, rising.
        budget: of their sum.
    """

    parts: Sequence[Part]
    widths: Sequence[Sequence[int]]
    prices: Sequence[Sequence[int]]
    budget: int

    @property
    def names(self) -> list[str]:
        """The matrices of all parts."""
        return [name for part in self.parts for name in part.names]

    def start(self, values: Mapping[str, float]) -> Plan:
        """The largest width up to that of each part's first matrix; the rest of the budget goes to the first parts."""
        rungs = [
            max((rung for rung, width in enumerate(own) if width <= values[part.names[0]]), default=0)
            for part, own in zip(self.parts, self.widths, strict=True)
        ]
        return tuple(climbed(rungs, self.prices, self.budget, range(len(rungs))))

    def values(self, plan: Plan) -> dict[str, float]:
        """The width of each matrix."""
        found = zip(self.parts, plan, self.widths, strict=True)
        return {name: float(own[rung]) for part, rung, own in found for name in part.names}

    def changed(self, plan: Plan, generator: torch.Generator) -> Plan:
        """Moves one to three random parts up a rung, and as many others down as the budget requires."""
        found: Sequence[int] = plan
        for _ in range(_changes(generator)):
            found = switch_rungs(found, self.prices, self.budget, generator)
        return tuple(found)


def _changes(generator: torch.Generator) -> int:
    return int(torch.randint(1, MOST_CHANGES + 1, (2,), generator=generator).min())
