"""The targets of `prune`: of each layer, each matrix or each expert, as the plan has them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hf_cod.compression.pruning.methods import Target
from hf_cod.functional.sparsity import Pattern
from hf_cod.layers.checks import check_sizes
from hf_cod.layers.stack import DecoderLayers
from hf_cod.scoring.allocation import LayerAllocation
from hf_cod.scoring.part_plans import check_names_of_matrices, values_of_parts


@dataclass(frozen=True)
class Targets:
    """What is to be zero.

    Attributes:
        layers: the target of each layer.
        matrices: name -> target of a matrix that differs from its layer.
        parts: (name of a matrix, expert or None) -> the target in a plan by expert.
    """

    layers: list[Target]
    matrices: Mapping[str, Target] = field(default_factory=dict)
    parts: Mapping[tuple[str, int | None], Target] = field(default_factory=dict)

    def of(self, index: int, name: str, expert: int | None) -> Target:
        """The target of a matrix of a layer, or of one expert of a bank."""
        found = self.parts.get((name, expert)) or self.parts.get((name, None))
        return found or self.matrices.get(name, self.layers[index])

    @property
    def all(self) -> list[Target]:
        """All of them."""
        return [*self.layers, *self.matrices.values(), *self.parts.values()]

    @property
    def of_parts(self) -> list[Any]:
        """The identity of the targets of parts, for a journal; empty without any."""
        matrices = sorted((name, t.sparsity, t.pattern) for name, t in self.matrices.items())
        parts = sorted((*place, t.sparsity, t.pattern) for place, t in self.parts.items())
        return [found for found in (matrices, parts) if found]


def targets_of(plan: LayerAllocation | float | str, stack: DecoderLayers) -> Targets:
    """The checked targets of a plan.

    Raises:
        ValueError: a plan of another kind, for another model or out of range.
    """
    if isinstance(plan, str):
        N, M = parse_pattern(plan)
        return Targets([Target(1 - N / M, (N, M))] * len(stack))
    if not isinstance(plan, LayerAllocation):
        if isinstance(plan, bool) or not isinstance(plan, (int, float)) or not 0 <= plan <= 1:
            raise ValueError(f"plan: expected a sparsity in 0..1, a pattern or an allocation, got {plan!r}")
        return Targets([Target(float(plan))] * len(stack))
    if plan.kind != "sparsity":
        raise ValueError(f"plan: expected an allocation of sparsity, got one of {plan.kind}")
    if len(plan.values) != len(stack):
        raise ValueError(f"plan: expected {len(stack)} values, one a layer, got {len(plan.values)}")
    check_sizes("plan", plan.model, plan.sizes, stack)
    if plan.modules:
        check_names_of_matrices(plan.modules, stack)
        matrices = {name: _target(plan, value, name) for name, value in plan.modules.items()}
        return Targets([Target(value) for value in plan.values], matrices)
    if plan.experts:
        values = values_of_parts(plan.experts, plan.common, stack)
        parts = {place: _target(plan, value, place[0]) for place, value in values.items()}
        return Targets([Target(value) for value in plan.values], parts=parts)
    return Targets([_target(plan, value, f"layer {index}") for index, value in enumerate(plan.values)])


def parse_pattern(text: str) -> Pattern:
    """(N, M) of "N:M".

    Raises:
        ValueError: not two integers with 0 < N <= M.
    """
    found = re.fullmatch(r"(\d+):(\d+)", text)
    if not found or not 0 < int(found[1]) <= int(found[2]):
        raise ValueError(f"pattern: expected N:M with 0 < N <= M, such as 2:4, got {text!r}")
    return int(found[1]), int(found[2])


def _target(plan: LayerAllocation, value: float, where: str) -> Target:
    if not 0 <= value <= 1:
        raise ValueError(f"plan: expected sparsities in 0..1, got {value} in {where}")
    return Target(value, None if plan.group is None else plan.pattern(value))
