"""Settings of `quantize` and `plan_bits`; those that require torch are in `config.OwlBnbConfig`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TypedDict

from hf_cod.functional.bits import BITS
from hf_cod.io.arguments import checked

BLOCKS = (32, 64, 128, 256)


@checked
@dataclass(kw_only=True)
class StorageSettings:
    """How codes and scales are stored."""

    block: int = field(
        default=64, metadata={"help": "weights of a row that share a scale, 32 to 256", "choices": list(BLOCKS)}
    )
    double_quant: bool = field(
        default=True, metadata={"help": "store scales in 8 bits: 0.13 bits a weight instead of 0.5 at block 64"}
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
            "help": "stored bits a weight, scales included: from 3.13 (all layers in 3 bits) to 4.13 (all in 4); "
            "exactly 3 or 4 means all layers in that width"
        },
    )
    skip: list[str] = field(
        default_factory=list,
        metadata={"help": "parts of names of matrices that are not quantized, such as down_proj", "nargs": "*"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bits(self.bits)


def check_bits(bits: float) -> None:
    """Checks the range of `bits`; `plan.plan_bits` checks whether the model can be stored in that many.

    Raises:
        ValueError: `bits` is out of range.
    """
    if not min(BITS) <= bits < math.inf:
        raise ValueError(f"bits: expected 3, 4, or stored bits between them, such as 3.5, got {bits}")
