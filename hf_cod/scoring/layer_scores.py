"""LayerScores: one number per layer, the higher the more the layer matters."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from hf_cod.io.arguments import checked
from hf_cod.io.files import JsonFile
from hf_cod.io.schema import check_value, limits
from hf_cod.layers.checks import check_sizes
from hf_cod.layers.stack import DecoderLayers
from hf_cod.scoring.settings import GRANULARITIES, LOGARITHMS


@dataclass(frozen=True)
class PartScore:
    """How much a part of a layer matters.

    Attributes:
        layer: its layer, starting with 0.
        value: the higher the more it matters, per weight, so that parts of different sizes can be compared.
        sizes: name of each of its matrices -> number of weights.
    """

    layer: int = field(metadata=limits(least=0))
    value: float
    sizes: dict[str, int] = field(metadata=limits(least=0))

    @property
    def weights(self) -> int:
        """The number of weights of its matrices."""
        return sum(self.sizes.values())


def mean_score(method: str, counts: Iterable[tuple[float, int]], default: float) -> float:
    """The mean of (score, number of weights), weighted by these; of logarithms of costs that of the costs.

    Args:
        method: the method of the scores.
        counts: scores of parts.
        default: the score if there are no weights.
    """
    some = [(value, count) for value, count in counts if count]
    total = sum(count for _, count in some)
    if not total:
        return default
    if method not in LOGARITHMS:
        return sum(value * count for value, count in some) / total
    largest = max(value for value, _ in some)
    return largest + math.log(sum(math.exp(value - largest) * count for value, count in some) / total)


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
        granularity: what has a score of its own: "layer", "block" (attention, MLP) or "module" (each matrix).
        parts: the scores of blocks or matrices, in the order of the model; `values` are then their means, weighted by
            parameters. Empty if layers are scored.
    """

    FIELD = "scores"

    model: str
    method: str
    values: list[float] = field(metadata=limits(one_for_each="parameters"))
    parameters: list[int] = field(metadata=limits(least=0))
    settings: dict[str, Any] = field(default_factory=dict)
    granularity: str = field(default="layer", metadata=limits(choices=tuple(GRANULARITIES)))
    parts: list[PartScore] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.values or len(self.values) != len(self.parameters):
            raise ValueError(
                f"values: expected one per layer as parameters, got {len(self.values)} and {len(self.parameters)}"
            )
        wrong = [i for i, value in enumerate(self.values) if not math.isfinite(value)]
        if wrong:
            raise ValueError(f"values: expected finite scores, got {self.values[wrong[0]]} in layer {wrong[0]}")
        if (self.granularity == "layer") == bool(self.parts):
            got = f"{len(self.parts)} for {self.granularity}"
            raise ValueError(f"parts: expected some for block and module, none for layer, got {got}")
        for part in self.parts:
            if not math.isfinite(part.value) or part.layer >= len(self.values):
                got = f"{part.value} in layer {part.layer}"
                raise ValueError(f"parts: expected finite scores in {len(self.values)} layers, got {got}")

    def value_of(self, layer: int, names: Iterable[str]) -> float:
        """The score of some matrices of a layer: of their parts the mean, weighted by parameters; else of the layer.

        If scores are logarithms of costs per weight (fisher, kl), the mean is that of the costs.
        """
        wanted = {*names}
        counts = [
            (part.value, sum(size for name, size in part.sizes.items() if name in wanted))
            for part in self.parts
            if part.layer == layer
        ]
        return mean_score(self.method, counts, self.values[layer])

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
