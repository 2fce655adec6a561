"""What `prune` can be told."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypedDict

from hf_cod.io.arguments import checked
from hf_cod.io.settings import check_choice

# Method -> which weights go; `prune` has the formulas.
METHODS = {
    "magnitude": "by |W_ij|, within the matrix; needs no text",
    "wanda": "by |W_ij| ||X_j||, within a row",
    "sparsegpt": "by (W_ij / U_jj)^2, within 128 columns, and the row's other weights make up for them",
}


@checked
@dataclass
class PruneSettings:
    """How weights are chosen that become zero."""

    method: str = field(
        default="wanda",
        metadata={"help": f"which weights go: by {', '.join(METHODS)}", "choices": list(METHODS)},
    )

    def __post_init__(self) -> None:
        check_choice("method", self.method, METHODS)


class PruneFields(TypedDict, total=False):
    """Fields of `PruneSettings` that `prune` takes by name."""
