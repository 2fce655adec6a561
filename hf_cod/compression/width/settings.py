"""What `narrow` and `plan_width` can be told."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypedDict

from hf_cod.io.arguments import checked
from hf_cod.io.settings import as_in, check_choice

# Method -> which heads and channels stay; `narrow` has more.
METHODS = {
    "fluctuation": "those whose outputs vary most (FLAP)",
    "taylor": "those that the loss needs, to first order (LLM-Pruner)",
    "magnitude": "those of largest weights; needs no text",
}
# Compensation -> what those that stay do for the others.
COMPENSATIONS = {
    "least_squares": "their columns are fitted to the outputs",
    "bias": "a bias takes over the mean of what is gone",
    "none": "nothing; needs no text",
}
CHANNEL_MULTIPLE = 32  # what matrix units of GPUs and the registers of processors like


@checked
@dataclass
class WidthSettings:
    """To what numbers of channels are rounded."""

    channel_multiple: int = field(
        default=CHANNEL_MULTIPLE, metadata={"help": "numbers of channels are multiples of this"}
    )

    def __post_init__(self) -> None:
        check_channel_multiple(self.channel_multiple)


class WidthFields(TypedDict, total=False):
    """Fields of `WidthSettings` that `plan_width` takes by name; there are no others yet."""


@checked
@dataclass
class NarrowSettings:
    """Which heads and channels go, and what makes up for them."""

    method: str = field(
        default="fluctuation",
        metadata={
            "help": "which heads and channels stay: those whose outputs vary most (fluctuation), that the loss needs "
            "to first order (taylor), or of largest weights (magnitude)",
            "choices": list(METHODS),
        },
    )
    compensation: str = field(
        default="least_squares",
        metadata={
            "help": f"what makes up for the others: {', '.join(COMPENSATIONS)}",
            "choices": list(COMPENSATIONS),
        },
    )
    channel_multiple: int = as_in(WidthSettings, "channel_multiple")

    def __post_init__(self) -> None:
        check_choice("method", self.method, METHODS)
        check_choice("compensation", self.compensation, COMPENSATIONS)
        check_channel_multiple(self.channel_multiple)


class NarrowFields(TypedDict, total=False):
    """Fields of `NarrowSettings` that `narrow` takes by name."""

    channel_multiple: int


def check_channel_multiple(value: int) -> None:
    """Makes sure that numbers can be multiples of it.

    Raises:
        ValueError: they cannot.
    """
    if type(value) is not int or value < 1:
        raise ValueError(f"channel_multiple: expected a whole number above 0, got {value!r}")
