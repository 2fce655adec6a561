"""`owlore`: OwLoreAdamW as Trainer and TRL's trainers take an optimizer."""

from __future__ import annotations

from typing import Any

from torch import nn

from hf_cod.scoring.allocation import LayerAllocation
from hf_cod.scoring.layer_scores import LayerScores
from hf_cod.training.owlore.optimizer import OwLoreAdamW


class OwLoreFactory:
    """Makes an OwLoreAdamW of the model that Trainer trains; see `owlore`."""

    def __call__(self, model: nn.Module, **arguments: Any) -> OwLoreAdamW:
        """What Trainer calls."""
        return OwLoreAdamW(model, **arguments)


def owlore(
    scores: LayerScores | LayerAllocation | None = None, *, lr: float = 3e-4, **arguments: Any
) -> tuple[type, dict[str, Any]]:
    """What Trainer and TRL's trainers take as `optimizer_cls_and_kwargs`; the arguments are those of `OwLoreAdamW`.

    Trainer hands its own learning rate, decay and betas to optimizers that it knows alone, so they are given here.
    """
    return OwLoreFactory, {"scores": scores, "lr": lr, **arguments}
