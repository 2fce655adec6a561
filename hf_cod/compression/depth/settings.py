"""Settings of `plan_depth` and `drop_layers`, and of `plan_repeat`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from hf_cod.io.arguments import checked
from hf_cod.io.settings import SampleFields, check_choice, check_least

# Criterion -> which layers it removes; `plan_depth` has the details.
CRITERIA = {
    "search": "those whose joint removal costs least",
    "layer_drop": "those whose removal alone costs least",
    "block_influence": "those whose output is nearest to their input (ShortGPT)",
    "angular": "the consecutive layers that change the angle of the hidden state least (Gromov et al.)",
}
# Replacement -> what replaces removed layers.
REPLACEMENTS = {
    "none": "nothing",
    "linear": "a linear map, folded into the last matrix before them",
    "measured": "the same map, if it lowers the loss on samples to which it was not fitted",
}
# Number of layers that each step of the search tries.
SEARCH_WIDTH = 8


@checked
@dataclass
class DepthSettings:
    """How layers are selected, and how candidates are compared."""

    criterion: str = field(
        default="search",
        metadata={
            "help": "which layers are removed. " + "; ".join(f"{name}: {layers}" for name, layers in CRITERIA.items()),
            "choices": list(CRITERIA),
        },
    )
    replacement: str = field(
        default="none",
        metadata={
            "help": "what replaces removed layers. none: nothing; linear: a linear map, folded into the last matrix "
            "before them; measured: such a map if it lowers the loss on samples that were not used to fit it",
            "choices": list(REPLACEMENTS),
        },
    )
    protect: bool | int | Iterable[int] = field(
        default=True, metadata={"help": "never remove a layer in which massive activations arise"}
    )
    search_width: int = field(default=SEARCH_WIDTH, metadata={"help": "number of layers tried in each search step"})

    def __post_init__(self) -> None:
        check_choice("criterion", self.criterion, CRITERIA)
        check_choice("replacement", self.replacement, REPLACEMENTS)
        check_least(self, search_width=1)


class DepthFields(SampleFields, total=False):
    """Fields of `DepthSettings`, and of samples, that `plan_depth` takes by name."""

    replacement: str
    protect: bool | int | Iterable[int]
    search_width: int


@checked
@dataclass
class DropLayersSettings:
    """The replacement of removed layers."""

    replacement: str | None = field(
        default=None,
        metadata={
            "help": f"replacement of removed layers: {', '.join(REPLACEMENTS)}; default: the one with which the plan's "
            "candidates were compared, or none",
            "choices": list(REPLACEMENTS),
        },
    )

    def __post_init__(self) -> None:
        if self.replacement is not None:
            check_choice("replacement", self.replacement, REPLACEMENTS)


class DropLayersFields(SampleFields, total=False):
    """Fields of `DropLayersSettings`, and of samples, that `drop_layers` takes by name."""


@checked
@dataclass
class RepeatSettings:
    """Which blocks of layers are tried, and by what they are judged."""

    length: int | list[int] = field(
        default=4, metadata={"help": "number of layers of a block that the search tries, or several numbers"}
    )
    times: int = field(default=2, metadata={"help": "how often the block runs"})
    metric: Any = field(
        default=None,
        metadata={
            "help": "by what blocks are judged: perplexity, accuracy (share of correct predictions), loss (of a head), "
            "or a function of outputs and batch that returns one score per sample; default: that of the model's task"
        },
    )

    def __post_init__(self) -> None:
        check_least(self, times=2)
        wrong = [length for length in self.lengths if length < 1]
        if wrong or not self.lengths:
            raise ValueError(f"length: expected at least 1, got {wrong[0] if wrong else 'none'}")

    @property
    def lengths(self) -> list[int]:
        """The numbers of layers of a block."""
        return [self.length] if isinstance(self.length, int) else [*self.length]


class RepeatFields(SampleFields, total=False):
    """Fields of `RepeatSettings`, and of samples, that `plan_repeat` takes by name."""

    times: int
    metric: Any
