"""Settings of `narrow` and `plan_width`."""

from __future__ import annotations

from dataclasses import dataclass, field

from hf_cod.io.arguments import checked
from hf_cod.io.module_names import ModuleFields, ModuleSettings, Names, check_names
from hf_cod.io.settings import Default, SampleFields, as_in, check_choice

# Method -> which heads and channels are kept; `narrow` has the details.
METHODS = {
    "fluctuation": "those whose outputs vary most (FLAP)",
    "taylor": "those of largest first-order effect on the loss (LLM-Pruner)",
    "magnitude": "those of largest weights (requires no dataset)",
}
# Compensation -> how the kept heads and channels compensate the error.
COMPENSATIONS = {
    "least_squares": "the weights of the kept ones are fitted to the original outputs",
    "bias": "the mean of the removed outputs is added to the bias",
    "none": "no compensation (requires no dataset)",
}
CHANNEL_MULTIPLE = 32  # fits the matrix units of GPUs and the vector registers of CPUs
FEW_CHANNELS = 512  # of an expert: multiples of 32 would be over 6 % of them


@checked
@dataclass
class WidthSettings:
    """The rounding of numbers of channels."""

    channel_multiple: int = field(
        default=Default(CHANNEL_MULTIPLE),
        metadata={
            "help": "round the number of channels of each layer to a multiple of this number; kernels are faster for "
            f"multiples; the default is 8 for experts of fewer than {FEW_CHANNELS} channels"
        },
    )
    include: Names = as_in(ModuleSettings, "include")  # noqa: RUF009 - as_in makes a field
    exclude: Names = as_in(ModuleSettings, "exclude")  # noqa: RUF009 - as_in makes a field

    def __post_init__(self) -> None:
        check_channel_multiple(self.channel_multiple)
        check_names(self)


@checked
@dataclass
class NarrowSettings:
    """How heads and channels are selected, and the error compensation."""

    method: str = field(
        default="fluctuation",
        metadata={
            "help": "which heads and channels are kept. "
            + "; ".join(f"{name}: {kept}" for name, kept in METHODS.items()),
            "choices": list(METHODS),
        },
    )
    compensation: str = field(
        default="least_squares",
        metadata={
            "help": "error compensation for removed heads and channels. "
            + "; ".join(f"{name}: {effect}" for name, effect in COMPENSATIONS.items()),
            "choices": list(COMPENSATIONS),
        },
    )
    channel_multiple: int = as_in(WidthSettings, "channel_multiple")
    include: Names = as_in(ModuleSettings, "include")  # noqa: RUF009 - as_in makes a field
    exclude: Names = as_in(ModuleSettings, "exclude")  # noqa: RUF009 - as_in makes a field

    def __post_init__(self) -> None:
        check_choice("method", self.method, METHODS)
        check_choice("compensation", self.compensation, COMPENSATIONS)
        check_channel_multiple(self.channel_multiple)
        check_names(self)


class NarrowFields(ModuleFields, SampleFields, total=False):
    """Fields of `NarrowSettings`, and of samples, that `narrow` takes by name."""

    channel_multiple: int


def check_channel_multiple(value: int) -> None:
    """Checks that the value is an integer above 0.

    Raises:
        ValueError: it is not.
    """
    if type(value) not in (int, Default) or value < 1:
        raise ValueError(f"channel_multiple: expected a whole number above 0, got {value!r}")
