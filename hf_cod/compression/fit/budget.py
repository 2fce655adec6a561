"""Budgets: their units, and whether they can be met."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from hf_cod.compression.fit.knobs import EXCLUSIVE, REMOVING
from hf_cod.compression.fit.settings import KINDS
from hf_cod.io.settings import check_choice
from hf_cod.layers.size import ModelSize

# A budget of memory of fewer bytes probably lacks its unit.
UNLIKELY = 1e5


def check_budget(kind: str, value: float) -> None:
    """Checks the kind and the value of a budget.

    Raises:
        ValueError: an unknown kind, a value of 0 or less, or a share of parameters above 1.
    """
    check_choice("kind", kind, KINDS)
    if kind == "parameter_share" and not 0 < value <= 1:
        raise ValueError(f"parameter_share: expected a share between 0 and 1, got {value}")
    if not 0 < value < math.inf:
        raise ValueError(f"{kind}: expected a finite number above 0, got {value}")


@dataclass(frozen=True)
class Budget:
    """The largest allowed size of a model.

    Attributes:
        kind: one of `settings.KINDS`.
        value: the largest allowed size, in the unit of `kind`.
        intact: the size of the intact model.
        exclusive: pairs of knobs of which a plan has at most one.
        fixed: the share of the layers that only knobs of `REMOVING` reduce.
    """

    kind: str
    value: float
    intact: ModelSize
    exclusive: Sequence[tuple[str, str]] = EXCLUSIVE
    fixed: float = 0.0

    @property
    def most(self) -> float:
        """The largest share of the layers within the budget."""
        size = self.intact
        if self.kind == "parameter_share":
            return self.value
        if self.kind == "bits":
            return self.value * size.layer_weights / 8 / size.layer_bytes
        return (self.value - (size.bytes - size.layer_bytes)) / size.layer_bytes

    def left(self, size: ModelSize) -> float:
        """The remaining share of the layers, in the unit of the budget."""
        if self.kind == "parameter_share":
            return size.layer_weights / self.intact.layer_weights
        return size.layer_bytes / self.intact.layer_bytes

    def used(self, size: ModelSize) -> float:
        """The size of a model in the unit of the budget."""
        if self.kind == "parameter_share":
            return size.layer_weights / self.intact.layer_weights
        if self.kind == "bits":
            return 8 * size.layer_bytes / self.intact.layer_weights
        return size.bytes

    def is_met_by(self, size: ModelSize) -> bool:
        """Whether a model of this size is within the budget, without tolerance."""
        return self.used(size) <= self.value

    def check_met_by(self, size: ModelSize) -> None:
        """Checks that a model is within the budget.

        Raises:
            ValueError: it is not.
        """
        if not self.is_met_by(size):
            raise ValueError(
                f"{self.kind}: expected at most {self.value:.9g} with the plan's steps, got {self.used(size):.9g}; the "
                "methods gave other sizes than when the plan was measured: repeat the command in a new directory"
            )

    def check_reach(
        self,
        left: Mapping[str, float],
        within: float = 1.0,
        notes: Sequence[str] = (),
        combined: bool = True,
    ) -> None:
        """Checks that the knobs can meet the budget, on the assumption that their savings multiply where they apply.

        Args:
            left: knob -> the least remaining share of the layers with this knob alone.
            within: a factor on the least share, as a tolerance for rounding.
            notes: the reasons why other knobs, or levels, are excluded.
            combined: whether combinations of knobs are measured, or only each alone.

        Raises:
            ValueError: they cannot; says the least possible.
        """
        least = _least_together(left, self.exclusive, self.fixed) if combined else min(left.values())
        if self.most < within * least:
            how = "" if len(left) == 1 else " together" if combined else " alone"
            more = [] if combined or len(left) == 1 else ["n_verified of 1 or more also measures combinations"]
            if self.kind == "memory" and self.value < UNLIKELY:
                more.insert(0, f"a number without a unit is in bytes, {self.value:g}MB would be {self.value:g} * 10^6")
            raise ValueError(
                f"{self.kind}: expected at least {self.told(self._in_unit(least))}, the least that {', '.join(left)} "
                f"can reach{how}, got {self.told(self.value)}{''.join(f'; {note}' for note in [*more, *notes])}"
            )

    def told(self, value: float) -> str:
        """A budget in the notation of the command line."""
        return f"{value / 1e6:.4g}MB" if self.kind == "memory" else f"{value:.4g}"

    def _in_unit(self, left: float) -> float:
        """The budget that corresponds to a share of the layers."""
        size = self.intact
        if self.kind == "parameter_share":
            return left
        if self.kind == "bits":
            return left * size.layer_bytes * 8 / size.layer_weights
        return left * size.layer_bytes + size.bytes - size.layer_bytes


def _least_together(left: Mapping[str, float], exclusive: Sequence[tuple[str, str]], fixed: float) -> float:
    """The least share that several knobs leave; of knobs that exclude each other, at most one is used.

    Args:
        left: knob -> the share that it leaves alone.
        exclusive: see `Budget`.
        fixed: the share f that only knobs of `REMOVING` reduce: the product of theirs, times f + (1 - f) times the
            product of what the others leave of the rest.
    """
    sets = [set(used) for number in range(len(left) + 1) for used in combinations(left, number)]
    allowed = [used for used in sets if not any(used.issuperset(pair) for pair in exclusive)]
    least = 1.0
    for used in allowed:
        share = math.prod(left[knob] for knob in used if knob in REMOVING)
        others = [left[knob] for knob in used if knob not in REMOVING]
        if others and fixed < 1:
            share *= fixed + (1 - fixed) * math.prod(max(x - fixed, 0) / (1 - fixed) for x in others)
        least = min(least, share)
    return least
