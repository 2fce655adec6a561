"""Settings of `quantize` and `plan_bits`; those that require torch are in `config.OwlBnbConfig`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TypedDict

from hf_cod.functional.bits import BITS, SCALE_BITS
from hf_cod.io.arguments import checked
from hf_cod.io.module_names import ModuleSettings, Names, check_names
from hf_cod.io.settings import as_in

BLOCKS = (32, 64, 128, 256)
# Complete blocks store at most 5 bits (four, and a scale of 32 bits for each 32 weights), padded rows of small matrices
# more. The exact limits depend on the shapes of the model and are checked after loading; 8 bits are refused at once.
MOST_BITS = 7.99
TOLERANCE = 0.02  # for rounded values


@checked
@dataclass(kw_only=True)
class StorageSettings:
    """How codes and scales are stored."""

    block: int = field(
        default=64,
        metadata={
            "help": "number of adjacent weights of a row that share a scale: 32, 64, 128 or 256",
            "choices": list(BLOCKS),
        },
    )
    double_quant: bool = field(
        default=True,
        metadata={"help": "store scales in 8 instead of 32 bits: 0.13 instead of 0.5 bits per weight at block 64"},
    )

    def __post_init__(self) -> None:
        if self.block not in BLOCKS:
            raise ValueError(f"block: expected one of {', '.join(map(str, BLOCKS))}, got {self.block}")


class StorageFields(TypedDict, total=False):
    """Fields of `StorageSettings` that `plan_bits` takes by name."""

    block: int
    double_quant: bool


@checked
@dataclass(kw_only=True)
class QuantizeSettings(StorageSettings):
    """The number of bits, the matrices to quantize, and how they are stored."""

    bits: float = field(
        default=3.5,
        metadata={
            "help": "mean of the stored bits per weight, scales included, from 3.13 (all layers in 3 bits) to 4.13 "
            "(all in 4 bits); both limits are higher for models with rows whose length is not a multiple of --block. 3 "
            "or 4: all layers in this width"
        },
    )
    skip: list[str] = field(
        default_factory=list,
        metadata={
            "help": "do not quantize matrices whose names contain one of these strings, such as down_proj; default: "
            "none",
            "nargs": "*",
        },
    )
    include: Names = as_in(ModuleSettings, "include")  # noqa: RUF009 - as_in makes a field
    exclude: Names = as_in(ModuleSettings, "exclude")  # noqa: RUF009 - as_in makes a field

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bits(self.bits)
        check_names(self)


def check_bits(bits: float) -> None:
    """Checks the range of `bits`; `plan.plan_bits` checks whether the model can be stored in that many.

    Raises:
        ValueError: `bits` is out of range.
    """
    if not min(BITS) <= bits < math.inf:
        raise ValueError(f"bits: expected 3, 4, or stored bits between them, such as 3.5, got {bits}")


def check_mixture(bits: float, storage: StorageSettings) -> None:
    """Checks that some model can be stored in `bits`, before the shapes of the model are known.

    Raises:
        ValueError: `bits` is less than the scales of a 3-bit model require, or far above all layers in 4 bits.
    """
    least = min(BITS) + (64 * SCALE_BITS if storage.double_quant else 32) / storage.block  # SCALE_BITS is of block 64
    if bits > MOST_BITS or min(BITS) < bits < least - TOLERANCE:
        raise ValueError(
            f"bits: expected 3, 4, or stored bits per weight (including scales) from {least:.2f} to {least + 1:.2f} "
            f"(more with rows whose length is not a multiple of {storage.block}), got {bits:g}"
        )
