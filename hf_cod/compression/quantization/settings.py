"""What `quantize` and `plan_bits` can be told, but for what needs torch (`config.OwlBnbConfig`)."""

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
        default=True, metadata={"help": "store scales in eight bits: 0.13 bits a weight instead of 0.5 at block 64"}
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
    """How many bits, which matrices, and how they are stored."""

    bits: float = field(
        default=3.5,
        metadata={
            "help": "stored bits a weight, scales included: from 3.13, all layers in 3 bits, to 4.13, all in 4; "
            "a plain 3 or 4 means all in that width"
        },
    )
    skip: list[str] = field(
        default_factory=list,
        metadata={"help": "parts of names of matrices to leave as they are, such as down_proj", "nargs": "*"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bits(self.bits)


def check_bits(bits: float) -> None:
    """Makes sure that `bits` can be meant; whether a model can be stored in so few is `plan.plan_bits`'s to say.

    Raises:
        ValueError: it cannot.
    """
    if not min(BITS) <= bits < math.inf:
        raise ValueError(f"bits: expected 3, 4, or stored bits between them, such as 3.5, got {bits}")
