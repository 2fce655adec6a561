"""RepeatPlan: the block of layers to repeat, and the losses of its search."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypedDict

from hf_cod.compression.depth.depth_plan import GIVEN
from hf_cod.io.files import JsonFile
from hf_cod.io.report import format_number
from hf_cod.io.schema import check_value, limits
from hf_cod.layers.checks import check_sizes
from hf_cod.layers.removal.repeat import check_block
from hf_cod.layers.stack import DecoderLayers

SEARCH = "search"


class Candidate(TypedDict):
    """A block that a search tried, and its loss."""

    start: int
    end: int
    loss: float


@dataclass(frozen=True)
class RepeatPlan(JsonFile):
    """The block of layers to repeat.

    Attributes:
        model: the model's name.
        start: first layer of the block, counted from 0.
        end: the layer after its last one, as in Python's `range`.
        parameters: weights in the matrices of each of the model's layers.
        times: how often the block runs.
        criterion: "search", or "given" for a block that the user named.
        candidates: of a search, {"start", "end", "loss"} of each block, best first: losses on the first half of the
            samples.
        losses: of a search, losses on the second half, which the search did not use: "intact" and "repeated"; on the
            first half "searched", that of the intact model.
        interval: 95 % bootstrap interval of the loss with the repeated block minus that of the intact model, both on
            the same samples of the second half; empty if there are fewer than eight, or the metric has none.
        metric: the unit of the losses: "loss", in nats a token, or the name of another metric.
    """

    FIELD = "repeat_plan"

    model: str
    start: int = field(metadata=limits(least=0))
    end: int = field(metadata=limits(least=1))
    parameters: list[int] = field(metadata=limits(least=0))
    times: int = field(default=2, metadata=limits(least=2))
    criterion: str = field(default=GIVEN, metadata=limits(choices=(GIVEN, SEARCH)))
    candidates: list[dict[str, Any]] = field(default_factory=list)
    losses: dict[str, float] = field(default_factory=dict)
    interval: list[float] = field(default_factory=list)
    metric: str = "loss"

    def __post_init__(self) -> None:
        check_block(self.start, self.end, self.times, len(self.parameters))

    def check_read(self) -> None:
        """Checks that candidates, losses and interval fit the search."""
        check_value(self.candidates, list[Candidate], "candidates")
        for found in self.candidates:
            check_block(found["start"], found["end"], self.times, len(self.parameters))
        wanted = {"intact", "repeated", "searched"} if self.criterion == SEARCH else set()
        if {*self.losses} != wanted:
            raise ValueError(f"losses: expected {sorted(wanted)}, got {sorted(self.losses)}")
        if len(self.interval) not in (0, 2):
            raise ValueError(f"interval: expected two ends, or none, got {len(self.interval)}")

    @property
    def order(self) -> list[int]:
        """The layers in the order in which they run."""
        return [*range(self.end), *[*range(self.start, self.end)] * (self.times - 1), *range(self.end, self.depth)]

    @property
    def depth(self) -> int:
        """The number of layers before."""
        return len(self.parameters)

    @property
    def gains(self) -> bool:
        """Whether the whole interval is below 0: the block lowers the loss of samples that the search did not use."""
        return len(self.interval) == 2 and self.interval[1] < 0

    def check(self, stack: DecoderLayers) -> None:
        """Checks that this is a plan for that model; warns if only the model's name differs.

        Raises:
            ValueError: the number of layers or their sizes differ.
        """
        check_sizes("plan", self.model, self.parameters, stack)

    def summary(self) -> list[str]:
        """Sentences on the search; none for a given block."""
        if self.criterion == GIVEN:
            return []
        best, before, name = self.candidates[0], self.losses["searched"], self.metric.replace("_", " ")
        lower = sum(found["loss"] < before for found in self.candidates)
        change = self.losses["repeated"] - self.losses["intact"]
        ends = " to ".join(f"{end:+.4f}" for end in self.interval)
        told = f"95 % interval {ends}" if ends else "no interval, which requires 16 samples"
        return [
            f"On the samples of the search, {lower} of {len(self.candidates)} blocks have a lower {name} than the "
            f"intact model ({format_number(before)}); the best is {_block(best['start'], best['end'])} "
            f"({format_number(best['loss'])}).",
            f"With {_block(self.start, self.end)} run {self.times} times, the {name} on samples that the search did "
            f"not use changes by {change:+.4f}, from {format_number(self.losses['intact'])} to "
            f"{format_number(self.losses['repeated'])} ({told}).",
            f"This block lowers the {name}." if self.gains else f"No block was found that lowers the {name}.",
        ]


def _block(start: int, end: int) -> str:
    return f"layer {start}" if end - start == 1 else f"layers {start} to {end - 1}"
