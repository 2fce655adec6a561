"""LayerScores: one number per layer, the higher the more the layer matters."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from hf_cod.io.arguments import checked
from hf_cod.io.files import JsonFile
from hf_cod.io.schema import check_value, limits
from hf_cod.layers.checks import check_sizes
from hf_cod.layers.stack import DecoderLayers


@checked
@dataclass(frozen=True)
class LayerScores(JsonFile):
    """How much each layer of a model matters.

    Attributes:
        model: the model's name.
        method: the method of `METHODS` that computed them.
        values: one score per layer, starting with layer 0; finite, the higher the more the layer matters.
        parameters: number of weights in each layer's matrices, by which a budget is weighted.
        settings: settings of the method (threshold, seed, ...).
    """

    FIELD = "scores"

    model: str
    method: str
    values: list[float] = field(metadata=limits(one_for_each="parameters"))
    parameters: list[int] = field(metadata=limits(least=0))
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.values or len(self.values) != len(self.parameters):
            raise ValueError(
                f"values: expected one per layer as parameters, got {len(self.values)} and {len(self.parameters)}"
            )
        wrong = [i for i, value in enumerate(self.values) if not math.isfinite(value)]
        if wrong:
            raise ValueError(f"values: expected finite scores, got {self.values[wrong[0]]} in layer {wrong[0]}")

    def check_read(self) -> None:
        """Checks the types of the settings that other steps read."""
        for name, kind in (("spread", float), ("target", float), ("chosen", str)):
            if name in self.settings:
                check_value(self.settings[name], kind | None, f"settings[{name!r}]")

    @property
    def remarks(self) -> list[str]:
        """Remarks of a method in addition to its scores: the choice of auto."""
        if "chosen" not in self.settings:
            return []
        spread = f" with lambda {self.settings['spread']:g}" if "spread" in self.settings else ""
        return [f"{self.method} chose {self.settings['chosen']}{spread}."]

    def check(self, stack: DecoderLayers) -> None:
        """Checks that these are scores of that model; warns if only its name differs.

        Raises:
            ValueError: the number of layers or the size of a layer differs.
        """
        check_sizes("scores", self.model, self.parameters, stack)
