"""LnsAnnealing: raises the factors of LayerNorm Scaling during a training that starts from a stock checkpoint."""

from __future__ import annotations

from typing import Any

from hf_cod.io.arguments import checked
from hf_cod.io.bitsandbytes_advice import advice_silenced
from hf_cod.models.placements import LNS_EXPONENT

with advice_silenced():  # of bitsandbytes, which is imported with PEFT
    from transformers.trainer_callback import TrainerCallback


class LnsAnnealing(TrainerCallback):
    """Anneals LNS in: `Trainer(model=to_lns(stock, exponent=0), ..., callbacks=[LnsAnnealing()])`.

    After step t the factor of layer l (from 1) is l^-e(t), e(t) = end min(1, t / warmup_steps). The function of the
    stock model, which e = 0 leaves as it is, changes step by step, while the weights adapt. Checkpoints store the
    exponent in their config, and a resumed training continues with it. A compiled model is compiled again when the
    factors change.

    Args:
        warmup_steps: optimizer steps until the exponent is `end`; None: the warm-up of the learning rate.
        end: the last exponent, from 0 to 1; the paper's is 1/2.

    Raises:
        ValueError: a number out of range; when training begins: a model without LNS, or no warm-up.
    """

    @checked
    def __init__(self, warmup_steps: int | None = None, end: float = LNS_EXPONENT) -> None:
        if warmup_steps is not None and warmup_steps < 1:
            raise ValueError(f"warmup_steps: expected at least 1, or None, got {warmup_steps}")
        if not 0 <= end <= 1:
            raise ValueError(f"end: expected a number from 0 to 1, got {end}")
        self._given, self._end = warmup_steps, float(end)
        self._steps = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **about: Any) -> None:
        """Sets the exponent of the step from which training starts or resumes."""
        self._steps = self._given or args.get_warmup_steps(state.max_steps)
        if self._steps < 1:
            raise ValueError(
                "warmup_steps: expected a number, or a warm-up of the learning rate, got none; set warmup_steps of "
                "LnsAnnealing or of TrainingArguments"
            )
        self._set(about["model"], state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **about: Any) -> None:
        """Sets the exponent with which the next step begins, and with which a checkpoint is saved."""
        self._set(about["model"], state.global_step)

    def _set(self, model: Any, step: int) -> None:
        found = [module for module in model.modules() if hasattr(module, "set_lns_exponent")]
        if not found:
            raise ValueError(f"model: expected one with LNS, such as of to_lns, got {type(model).__name__}")
        found[0].set_lns_exponent(self._end * min(1.0, step / self._steps))  # the outermost, which has the head
