"""`owlore`: OwLoreAdamW in the form in which Trainer and TRL's trainers take an optimizer."""

from __future__ import annotations

from typing import Any

from torch import nn

from hf_cod.scoring.allocation import LayerAllocation
from hf_cod.scoring.layer_scores import LayerScores
from hf_cod.training.owlore.optimizer import OwLoreAdamW


class OwLoreFactory:
    """Creates an OwLoreAdamW for the model that Trainer trains; see `owlore`."""

    def __call__(self, model: nn.Module, **arguments: Any) -> OwLoreAdamW:
        """Creates the optimizer; called by Trainer."""
        return OwLoreAdamW(model, **arguments)


def owlore(
    scores: LayerScores | LayerAllocation | None = None, *, lr: float = 3e-4, **arguments: Any
) -> tuple[type, dict[str, Any]]:
    """The argument `optimizer_cls_and_kwargs` of Trainer and TRL's trainers; takes the arguments of `OwLoreAdamW`.

    Set learning rate, weight decay and betas here: Trainer passes its own values to its built-in optimizers only.
    """
    return OwLoreFactory, {"scores": scores, "lr": lr, **arguments}
