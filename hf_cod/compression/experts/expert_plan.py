"""ExpertPlan: the experts to remove, and the scores by which they were selected."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hf_cod.io.files import JsonFile
from hf_cod.io.schema import limits
from hf_cod.layers.checks import check_sizes
from hf_cod.layers.removal.experts import mixtures_of
from hf_cod.layers.stack import DecoderLayers

GIVEN = "given"  # experts that the user named


@dataclass(frozen=True)
class ExpertPlan(JsonFile):
    """The experts to remove.

    The keys of all tables are names of experts, as in `ExpertScores`.

    Attributes:
        model: the model's name.
        method: the method of `EXPERT_METHODS` that selected them, or "given".
        removed: the experts to remove, in ascending order, counted from 0; equally many in all layers.
        layers: the layer that they are in.
        count: number of experts in each layer before.
        parameters: weights in the matrices of each of the model's layers.
        values: the scores of all experts; empty if they were given.
        tokens: number of tokens that were routed to each expert; empty if nothing was measured.
        settings: settings of the method (threshold).
    """

    FIELD = "expert_plan"

    model: str
    method: str
    removed: dict[str, list[int]] = field(metadata=limits(least=0))
    layers: dict[str, int] = field(metadata=limits(least=0))
    count: int = field(metadata=limits(least=1))
    parameters: list[int] = field(metadata=limits(least=0))
    values: dict[str, list[float]] = field(default_factory=dict)
    tokens: dict[str, list[int]] = field(default_factory=dict, metadata=limits(least=0))
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.removed:
            raise ValueError("removed: expected experts of at least one layer, got none")
        if list(self.layers) != list(self.removed):
            raise ValueError(f"layers: expected those of {', '.join(self.removed)}, got {', '.join(self.layers)}")
        for name, experts in self.removed.items():
            if experts != sorted({e for e in experts if 0 <= e < self.count}):
                raise ValueError(
                    f"removed: expected experts from 0 to {self.count - 1} in ascending order, got {experts} for {name}"
                )
        numbers = sorted({len(experts) for experts in self.removed.values()})
        if len(numbers) > 1:
            raise ValueError(
                f"removed: expected equally many experts in all layers, as a config counts them once, got {numbers}"
            )
        if numbers[0] >= self.count:
            raise ValueError(f"removed: expected at least one of {self.count} experts to be left, got all of them")

    def check_read(self) -> None:
        """Checks that scores and tokens fit the experts, and that the layers exist."""
        for name, layer in self.layers.items():
            if layer >= len(self.parameters):
                raise ValueError(f"layers: expected at most {len(self.parameters) - 1}, got {layer} for {name}")
        tables: dict[str, dict[str, Any]] = {"values": self.values, "tokens": self.tokens}
        for title, table in tables.items():
            if table and list(table) != list(self.removed):
                raise ValueError(f"{title}: expected those of {', '.join(self.removed)}, got {', '.join(table)}")
            for name, numbers in table.items():
                if len(numbers) != self.count:
                    raise ValueError(f"{title}: expected {self.count} for {name}, got {len(numbers)}")

    @property
    def kept(self) -> dict[str, list[int]]:
        """Name of experts -> those that are kept."""
        return {name: [e for e in range(self.count) if e not in set(gone)] for name, gone in self.removed.items()}

    @property
    def n_removed(self) -> int:
        """Number of experts to remove in each layer."""
        return len(next(iter(self.removed.values())))

    def removed_token_shares(self) -> dict[str, float]:
        """Name of experts -> share of the tokens' routes that lead to removed experts; empty if not measured."""
        return {
            name: sum(tokens[e] for e in self.removed[name]) / max(1, sum(tokens))
            for name, tokens in self.tokens.items()
        }

    def check(self, stack: DecoderLayers) -> None:
        """Checks that this is a plan for that model; warns if only the model's name differs.

        Raises:
            ValueError: the experts, the number of layers, or their sizes differ.
        """
        found = mixtures_of(stack)
        names = {name: stack.index_of(name) for name in found}
        if names != self.layers or next(iter(found.values())).count != self.count:
            raise ValueError(
                f"plan: expected {next(iter(found.values())).count} experts in {', '.join(names)}, got {self.count} in "
                f"{', '.join(self.layers)} ({self.model})"
            )
        check_sizes("plan", self.model, self.parameters, stack)
