"""FitPlan: which steps make a model meet a budget, and what was measured on the way to it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hf_cod.files import read_json, write_json

FORMAT_VERSION = 1
KINDS = ("memory", "parameters", "bits")


@dataclass(frozen=True)
class FitPlan:
    """What is done to a model.

    Attributes:
        kind: what the budget counts: "memory" (bytes of the whole model), "parameters" (share of the weights of the
            layers' matrices) or "bits" (stored bits for each weight that those had).
        budget: the most that is allowed.
        steps: knob -> level, in the order of application.
        loss: nats a token with these steps, on the samples that the plan was chosen on.
        intact_loss: of the intact model on them.
        size: bytes, layer_bytes and layer_weights with these steps.
        alone: knob -> {"levels", "losses", "left"}: what each level that was tried alone costs, and leaves of the
            layers.
        tried: combinations that were measured, each {"steps", "expected", "loss", "left"}.
        curve: the least loss that is expected with each share left, as [share, nats a token, steps].
    """

    kind: str
    budget: float
    steps: dict[str, float]
    loss: float
    intact_loss: float
    size: dict[str, int]
    alone: dict[str, dict[str, list[float]]]
    tried: list[dict[str, Any]]
    curve: list[list[Any]]

    def save(self, path: str | Path) -> Path:
        """Writes a JSON file; returns its path."""
        return write_json(path, {"format": FORMAT_VERSION, **asdict(self)})

    @classmethod
    def load(cls, path: str | Path) -> FitPlan:
        """Reads what `save` wrote.

        Raises:
            ValueError: no such file, or not one of ours.
        """
        return cls(**read_json(path, "fit_plan", FORMAT_VERSION, cls.__dataclass_fields__))
