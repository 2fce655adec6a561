"""What `plan_fit` can be told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypedDict

from hf_cod.io.arguments import checked

# What a budget counts -> what its number means.
KINDS = {
    "memory": "bytes of the whole model",
    "parameter_share": "share of the weights of the layers' matrices",
    "bits": "stored bits for each weight that those have",
}
# Knob -> what it does, in the order in which knobs are applied.
KNOBS = {
    "depth": "removes layers",
    "width": "removes attention heads and MLP channels",
    "rank": "makes matrices products of two thin ones",
    "sparsity": "makes weights zero, and packs them",
    "bits": "stores weights in three and four bits",
}


@checked
@dataclass
class FitSettings:
    """What a plan chooses from, and how well it is checked."""

    knobs: Sequence[str] | None = field(
        default=None,
        metadata={"help": f"what to choose from: {', '.join(KNOBS)}; default: all that can help", "nargs": "*"},
    )
    verify: int = field(
        default=3, metadata={"help": "combinations that are measured as a whole, beside each knob alone"}
    )

    def __post_init__(self) -> None:
        unknown = [knob for knob in self.knobs or () if knob not in KNOBS]
        if unknown:
            raise ValueError(f"knobs: expected some of {', '.join(KNOBS)}, got {unknown[0]!r}")
        if self.verify < 0:
            raise ValueError(f"verify: expected at least 0, got {self.verify}")


class FitFields(TypedDict, total=False):
    """Fields of `FitSettings` that `plan_fit` takes by name."""

    knobs: Sequence[str] | None
    verify: int
