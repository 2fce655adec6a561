"""ExpertScores: one number per expert of a mixture, the higher the more the expert matters."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from hf_cod.io.arguments import checked
from hf_cod.io.files import JsonFile
from hf_cod.io.schema import limits
from hf_cod.layers.checks import warn_of_other_name
from hf_cod.layers.stack import DecoderLayers


@checked
@dataclass(frozen=True)
class ExpertScores(JsonFile):
    """How much each expert of a model matters.

    The keys of all tables are names of experts, such as "model.layers.3.mlp.experts", in the order of the layers. A
    layer may have several (JetMoe has experts in attention, too), or none.

    Attributes:
        model: the model's name.
        method: the method of `EXPERT_METHODS` that computed them.
        values: one score per expert; finite, the higher the more the expert matters; 0 without tokens.
        layers: the layer that they are in.
        tokens: number of tokens that were routed to each expert.
        parameters: number of weights of each expert.
        settings: settings of the method (threshold).
    """

    FIELD = "expert_scores"

    model: str
    method: str
    values: dict[str, list[float]]
    layers: dict[str, int] = field(metadata=limits(least=0))
    tokens: dict[str, list[int]] = field(metadata=limits(least=0))
    parameters: dict[str, list[int]] = field(metadata=limits(least=0))
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError("values: expected scores of at least one mixture, got none")
        for name, table in (("layers", self.layers), ("tokens", self.tokens), ("parameters", self.parameters)):
            if list(table) != list(self.values):
                raise ValueError(f"{name}: expected those of {', '.join(self.values)}, got {', '.join(table)}")
        for experts, values in self.values.items():
            counts = len(values), len(self.tokens[experts]), len(self.parameters[experts])
            if not values or len({*counts}) > 1:
                raise ValueError(f"values: expected as many for {experts} as tokens and parameters, got {counts}")
            wrong = [expert for expert, value in enumerate(values) if not math.isfinite(value)]
            if wrong:
                raise ValueError(f"values: expected finite scores, got {values[wrong[0]]} for {experts}, {wrong[0]}")

    @property
    def unseen(self) -> dict[str, list[int]]:
        """Name of experts -> those that no token was routed to."""
        found = {name: [e for e, count in enumerate(counts) if not count] for name, counts in self.tokens.items()}
        return {name: experts for name, experts in found.items() if experts}

    def check(self, stack: DecoderLayers) -> None:
        """Checks that these are scores of that model; warns if only its name differs.

        Raises:
            ValueError: experts, or their sizes, differ.
        """
        sets = [experts for index in range(len(stack)) for experts in stack.expert_sets(index) if not experts.shared]
        expected = {experts.name: experts.sizes() for experts in sets}
        for name in (*expected, *self.parameters):
            mine, theirs = self.parameters.get(name), expected.get(name)
            if mine != theirs:
                raise ValueError(f"expert_scores: expected {_told(theirs)} in {name}, got {_told(mine)} ({self.model})")
        warn_of_other_name("expert_scores", self.model, stack)


def _told(sizes: list[int] | None) -> str:
    return "no experts" if sizes is None else f"{len(sizes)} experts of {sizes[0]} weights"
