"""Settings of `pack_sparse`."""

from __future__ import annotations

from dataclasses import dataclass, field

from hf_cod.io.arguments import checked
from hf_cod.io.deprecation import OldAttribute, renamed


@renamed(minimum="min_sparsity")
@checked
@dataclass(kw_only=True)
class PackSettings:
    """Which matrices are packed."""

    min_sparsity: float = field(
        default=0.5, metadata={"help": "pack the matrices in which at least this share of the weights is zero, 0 to 1"}
    )
    minimum = OldAttribute("min_sparsity")

    def __post_init__(self) -> None:
        if not 0 <= self.min_sparsity <= 1:
            raise ValueError(f"min_sparsity: expected a share of zeros between 0 and 1, got {self.min_sparsity}")
