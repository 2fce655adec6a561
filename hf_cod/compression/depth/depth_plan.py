"""DepthPlan: which layers go, and what was measured of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, TypedDict

from hf_cod.io.deprecation import OldAttribute, renamed
from hf_cod.io.files import JsonFile
from hf_cod.io.schema import check_value, limits
from hf_cod.layers.checks import check_sizes
from hf_cod.layers.stack import DecoderLayers

GIVEN = "given"  # layers that somebody named
MASSIVE = "massive"  # layers where massive activations arise


class Candidate(TypedDict):
    """What a search found, and what it costs."""

    layers: list[int]
    loss: float
    maps: int


@renamed(method="criterion")
@dataclass(frozen=True)
class DepthPlan(JsonFile):
    """The layers that a model can do without.

    Attributes:
        model: the model's name.
        criterion: which of `CRITERIA` found them, or "given".
        layers: the layers that go, in ascending order, counted from 0.
        parameters: weights in the matrices of each of the model's layers.
        costs: what the criterion measured of each layer (None where it could not be removed so); empty where nothing
            was measured. `CRITERIA` says in which unit.
        protected: layers that no criterion was free to remove.
        protection: why: "massive", because massive activations arise there, or "given", because somebody named them;
            empty where none are.
        candidates: of a search, name -> {"layers", "loss", "maps"} of each plan that it ended with ("exchanges" is what
            its own last step found): the loss on text that the search did not see, and the number of maps that stood in
            the place of layers; "intact" is the model itself.
        replacement: which of `REPLACEMENTS` the candidates were compared with.
        metric: what the candidates' losses are: "loss", in nats a token, or the name of the task's own metric.
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
        """Makes sure that costs, protected layers and candidates are of these layers."""
        depth = len(self.parameters)
        if len(self.costs) not in (0, depth):
            raise ValueError(f"costs: expected one for each of {depth} layers, or none, got {len(self.costs)}")
        check_value(self.candidates, dict[str, Candidate], "candidates")
        named = {f"candidates[{name!r}].layers": found["layers"] for name, found in self.candidates.items()}
        for name, layers in {"protected": self.protected, **named}.items():
            check_value(layers, list[int], name, limits(least=0, most=depth - 1))

    @property
    def kept(self) -> list[int]:
        """The layers that stay."""
        return [i for i in range(len(self.parameters)) if i not in self.layers]

    @property
    def chosen(self) -> list[str]:
        """The names of the candidates, of a search, whose layers go."""
        return [name for name, found in self.candidates.items() if found["layers"] == self.layers]

    def check(self, stack: DecoderLayers) -> None:
        """Makes sure that this is a plan for that model; warns where only its name is another.

        Raises:
            ValueError: another number of layers, or layers of other sizes.
        """
        check_sizes("plan", self.model, self.parameters, stack)


def check_count(count: int, depth: int, name: str) -> None:
    """Makes sure that so many of `depth` layers can go.

    Raises:
        ValueError: none, or all of them; begins with `name`.
    """
    if type(count) is not int or not 1 <= count < depth:
        raise ValueError(f"{name}: expected 1..{depth - 1} of {depth} layers to remove, got {count}")
