"""What `plan_depth` and `drop_layers` can be told."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypedDict

from hf_cod.io.arguments import checked
from hf_cod.io.settings import check_choice

# Criterion -> which layers go; `plan_depth` has more.
CRITERIA = {
    "search": "those that the whole remaining model misses least, tried together",
    "layer_drop": "those whose removal alone costs least",
    "block_influence": "those whose output is nearest to their input (ShortGPT)",
    "angular": "the run of layers that turns the hidden state least",
}
# Replacement -> what stands in the place of layers.
REPLACEMENTS = {
    "none": "nothing",
    "linear": "a linear map, folded into the matrix in front",
    "measured": "the same, where it lowers the loss on samples that it was not fitted to",
}
# Layers that each step of the search tries.
SEARCH_WIDTH = 8


@checked
@dataclass
class DepthSettings:
    """Which layers go, and by what the choices are compared."""

    criterion: str = field(
        default="search",
        metadata={
            "help": f"what decides which layers go: one of {', '.join(CRITERIA)}",
            "choices": list(CRITERIA),
        },
    )
    replacement: str = field(
        default="none",
        metadata={
            "help": "linear maps in the place of layers, folded into the matrices that are there: none, linear, or "
            "measured (where they lower the loss on samples that they were not fitted to)",
            "choices": list(REPLACEMENTS),
        },
    )
    protect: bool | int | Iterable[int] = field(
        default=True, metadata={"help": "never remove a layer where massive activations arise"}
    )
    search_width: int = field(default=SEARCH_WIDTH, metadata={"help": "layers that each step of the search tries"})

    def __post_init__(self) -> None:
        check_choice("criterion", self.criterion, CRITERIA)
        check_choice("replacement", self.replacement, REPLACEMENTS)
        if self.search_width < 1:
            raise ValueError(f"search_width: expected at least 1, got {self.search_width}")


class DepthFields(TypedDict, total=False):
    """Fields of `DepthSettings` that `plan_depth` takes by name."""

    replacement: str
    protect: bool | int | Iterable[int]
    search_width: int


@checked
@dataclass
class DropLayersSettings:
    """What stands in the place of layers that go."""

    replacement: str | None = field(
        default=None,
        metadata={
            "help": f"what stands in the place of layers: {', '.join(REPLACEMENTS)}; default: what the plan's "
            "candidates were compared with, of layers none",
            "choices": list(REPLACEMENTS),
        },
    )

    def __post_init__(self) -> None:
        if self.replacement is not None:
            check_choice("replacement", self.replacement, REPLACEMENTS)


class DropLayersFields(TypedDict, total=False):
    """Fields of `DropLayersSettings` that `drop_layers` takes by name; there are no others yet."""
