"""FitPlan: the steps by which a model meets a budget, and the measurements of the search."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypedDict

from hf_cod.compression.fit.settings import KINDS
from hf_cod.io.deprecation import current_value
from hf_cod.io.files import JsonFile
from hf_cod.io.schema import brief, check_value, limits
from hf_cod.scoring.settings import OLD_KINDS


class _Size(TypedDict):
    bytes: int
    layer_bytes: int
    layer_weights: int


class _Alone(TypedDict):
    levels: list[float]
    losses: list[float]
    left: list[float]


class _Tried(TypedDict):
    steps: dict[str, float]
    expected: float
    loss: float
    left: float


_Point = tuple[float, float, dict[str, float]]


@dataclass(frozen=True)
class FitPlan(JsonFile):
    """The compression steps for a budget.

    Attributes:
        kind: unit of the budget: "memory" (bytes of the full model), "parameter_share" (of the weights of the layers'
            matrices) or "bits" (stored bits for each weight of the intact layers' matrices).
        budget: the largest allowed size.
        steps: knob -> level, in the order of application; empty if the intact model meets the budget.
        loss: nats a token with these steps, on the samples by which the plan was chosen.
        intact_loss: of the intact model on these samples.
        size: bytes, layer_bytes and layer_weights with these steps.
        alone: knob -> {"levels", "losses", "left"}: the loss and the remaining share of the layers of each level that
            was measured alone.
        tried: the measured combinations, each {"steps", "expected", "loss", "left"}.
        curve: the least expected loss for each remaining share, as [share, nats a token, steps]; estimates from
            `alone`, not measured (`measured_loss` of the steps tells which were).
        notes: the knobs and levels that could not be tried, with reasons; the knobs that do not meet the budget alone.
    """

    FIELD = "fit_plan"
    RENAMED_VALUES: ClassVar[dict[str, dict[str, str]]] = {"kind": OLD_KINDS}

    kind: str = field(metadata=limits(choices=KINDS))
    budget: float = field(metadata=limits(least=0))
    steps: dict[str, float] = field(metadata=limits(least=0))
    loss: float = field(metadata=limits(least=0))
    intact_loss: float = field(metadata=limits(least=0))
    size: dict[str, int] = field(metadata=limits(least=0))
    alone: dict[str, dict[str, list[float]]]
    tried: list[dict[str, Any]]
    curve: list[list[Any]]
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", current_value("kind", self.kind, OLD_KINDS, above=1))

    def measured_loss(self, steps: Mapping[str, float]) -> float | None:
        """The loss that was measured with exactly these steps; None if it was not measured."""
        for row in self.tried:
            if row["steps"] == steps:
                return float(row["loss"])
        if not steps:
            return self.intact_loss
        found = self.alone.get(next(iter(steps))) if len(steps) == 1 else None
        losses = {} if found is None else dict(zip(found["levels"], found["losses"], strict=True))
        return losses.get(next(iter(steps.values())))

    def check_read(self) -> None:
        """Checks that measurements are complete, with one loss for each level."""
        check_value(self.size, _Size, "size")
        check_value(self.alone, dict[str, _Alone], "alone")
        check_value(self.tried, list[_Tried], "tried")
        check_value(self.curve, list[_Point], "curve")
        for number, row in enumerate(self.tried):
            for name in ("loss", "left"):
                check_value(row[name], float, f"tried[{number}][{name!r}]", limits(least=0))
        for knob, found in self.alone.items():
            for name in ("losses", "left"):
                check_value(found[name], list[float], f"alone[{knob!r}][{name!r}]", limits(least=0))
            if not len(found["levels"]) == len(found["losses"]) == len(found["left"]):
                raise ValueError(f"alone[{knob!r}]: expected as many losses and left as levels, got {brief(found)}")
