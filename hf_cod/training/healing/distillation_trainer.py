"""Trainer for distillation.

Imported only where it is used, because importing transformers' Trainer takes longer than importing this package.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hf_cod.io.bitsandbytes_advice import advice_silenced
from hf_cod.training.healing.objective import Objective

with advice_silenced():  # of bitsandbytes, which is imported with PEFT
    from transformers import Trainer
    from transformers.trainer_callback import TrainerCallback


class DistillationTrainer(Trainer):
    """Minimizes an `Objective`, a mean over the tokens of a micro-batch; all micro-batches have the same size.

    Args:
        objective: the loss.
        **options: arguments of Trainer.
    """

    objective: Objective
    loss_is_scaled_for_ga = False

    def __init__(self, objective: Objective, **options: Any) -> None:
        super().__init__(**options)
        self.objective = objective
        self.model_accepts_loss_kwargs = False  # for versions without loss_is_scaled_for_ga

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The objective's loss."""
        assert not return_outputs, "called for training only"
        return self.objective(model, inputs)


class AfterEachStep(TrainerCallback):
    """Calls a function after each update, before the step is logged or saved."""

    def __init__(self, function: Callable[[], None]) -> None:
        self.function = function

    def on_optimizer_step(self, *args: Any, **about: Any) -> None:
        """Calls the function."""
        self.function()
