"""DepthPlan: the layers to remove, and the measurements of the criterion."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, TypedDict

from hf_cod.io.deprecation import OldAttribute, renamed
from hf_cod.io.files import JsonFile
from hf_cod.io.schema import check_value, limits
from hf_cod.layers.checks import check_sizes
from hf_cod.layers.stack import DecoderLayers

GIVEN = "given"  # layers that the user named
MASSIVE = "massive"  # layers in which massive activations arise


class Candidate(TypedDict):
    """A candidate of a search, and its loss."""

    layers: list[int]
    loss: float
    maps: int


@renamed(method="criterion")
@dataclass(frozen=True)
class DepthPlan(JsonFile):
    """The layers to remove.

    Attributes:
        model: the model's name.
        criterion: the criterion that selected them, one of `CRITERIA`, or "given".
        layers: the layers to remove, in ascending order, counted from 0.
        parameters: weights in the matrices of each of the model's layers.
        costs: the criterion's measure of each layer (None where it is not defined); empty if nothing was measured.
            `plan_depth` has the definitions.
        protected: layers that the criterion was not allowed to remove.
        protection: the reason: "massive", because massive activations arise in them, or "given", because the user named
            them; empty if there are none.
        candidates: of a search, name -> {"layers", "loss", "maps"} of each candidate ("exchanges" is the result of the
            last step of the search): its loss on samples that the search did not use, and the number of maps that
            replaced layers; "intact" is the model itself.
        replacement: the replacement with which candidates were compared, one of `REPLACEMENTS`.
        metric: the unit of the candidates' losses: "loss", in nats a token, or the name of the task's own metric.
    """

    FIELD = "depth_plan"
    RENAMED: ClassVar[dict[str, str]] = {"method": "criterion"}

    model: str
    criterion: str
    layers: list[int] = field(metadata=limits(least=0))
    parameters: list[int] = field(metadata=limits(least=0))
    costs: list[float | None] = field(default_factory=list)
    protected: list[int] = field(default_factory=list, metadata=limits(least=0))
    candidates: dict[str, dict[str, Any]] = field(default_factory=dict)
    protection: str = field(default="", metadata=limits(choices=("", GIVEN, MASSIVE)))
    replacement: str = "none"
    metric: str = "loss"

    method = OldAttribute("criterion")

    def __post_init__(self) -> None:
        depth = len(self.parameters)
        check_count(len(self.layers), depth, "layers")
        if self.layers != sorted({i for i in self.layers if 0 <= i < depth}):
            raise ValueError(f"layers: expected indices from 0 to {depth - 1} in ascending order, got {self.layers}")

    def check_read(self) -> None:
        """Checks that costs, protected layers and candidates fit the number of layers."""
        depth = len(self.parameters)
        if len(self.costs) not in (0, depth):
            raise ValueError(f"costs: expected one for each of {depth} layers, or none, got {len(self.costs)}")
        check_value(self.candidates, dict[str, Candidate], "candidates")
        named = {f"candidates[{name!r}].layers": found["layers"] for name, found in self.candidates.items()}
        for name, layers in {"protected": self.protected, **named}.items():
            check_value(layers, list[int], name, limits(least=0, most=depth - 1))

    @property
    def kept(self) -> list[int]:
        """The layers that are kept."""
        return [i for i in range(len(self.parameters)) if i not in self.layers]

    @property
    def chosen(self) -> list[str]:
        """The names of the candidates of a search with the chosen layers."""
        return [name for name, found in self.candidates.items() if found["layers"] == self.layers]

    def check(self, stack: DecoderLayers) -> None:
        """Checks that this is a plan for that model; warns if only the model's name differs.

        Raises:
            ValueError: the number of layers or their sizes differ.
        """
        check_sizes("plan", self.model, self.parameters, stack)


def check_count(count: int, depth: int, name: str) -> None:
    """Checks that `count` of `depth` layers can be removed.

    Raises:
        ValueError: `count` is less than 1, or all layers; begins with `name`.
    """
    if type(count) is not int or not 1 <= count < depth:
        raise ValueError(f"{name}: expected 1..{depth - 1} of {depth} layers to remove, got {count}")
