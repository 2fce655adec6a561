"""Settings of `pack_sparse`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypedDict

from hf_cod.io.arguments import checked


@checked
@dataclass(kw_only=True)
class PackSettings:
    """Which matrices are packed."""

    minimum: float = field(
        default=0.5, metadata={"help": "pack the matrices in which at least this share of the weights is zero, 0 to 1"}
    )

    def __post_init__(self) -> None:
        if not 0 <= self.minimum <= 1:
            raise ValueError(f"minimum: expected a share of zeros between 0 and 1, got {self.minimum}")


class PackFields(TypedDict, total=False):
    """Fields of `PackSettings` that `pack_sparse` takes by name; there are no others yet."""
