"""The loss of healing: the difference between the predictions of student and teacher."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_cod.functional.distillation import hidden_loss, logit_loss
from hf_cod.io.text import Batch
from hf_cod.layers.devices import execution_device, to_device
from hf_cod.layers.layer_calls import check_first_call
from hf_cod.layers.running import hidden_output
from hf_cod.layers.stack import DecoderLayers
from hf_cod.layers.task import model_inputs, targets


@dataclass(frozen=True)
class Objective:
    """The loss of a batch: `logit_loss` + `hidden_weight` * `hidden_loss`, the latter mean over the matched layers.

    Attributes:
        student: the student's layers, without the student's wrappers.
        teacher: the teacher's layers.
        temperature, label_weight: settings of `logit_loss`.
        hidden_weight: weight of `hidden_loss`.
        teacher_layers: for each layer of the student, the teacher's layer; empty if `hidden_weight` is 0.
    """

    student: DecoderLayers
    teacher: DecoderLayers
    temperature: float = 1.0
    label_weight: float = 0.0
    hidden_weight: float = 0.0
    teacher_layers: Sequence[int] = ()

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss: nats per token, plus the weighted relative squared error of the hidden states.

        Args:
            model: the student, wrapped or not.
            batch: input_ids (S, T), attention_mask (S, T), labels (S, T) if they differ from the inputs.
        """
        with self._states(self.student, range(len(self.teacher_layers))) as mine:
            logits = model(**model_inputs(model, batch)).logits
        wanted, theirs = self._teach(batch, logits.device)
        mask = batch.get("attention_mask")
        keep = None if mask is None else mask.bool()
        labels = targets(batch, "causal_lm") if self.label_weight else None
        loss = logit_loss(logits, wanted, self.temperature, keep, labels, self.label_weight)
        if self.hidden_weight:
            errors = []
            for x, y in zip(mine, theirs, strict=True):  # each layer on its own device
                kept = None if keep is None else keep.to(x.device)
                errors.append(hidden_loss(x, y.to(x.device), kept).to(loss.device))
            loss = loss + self.hidden_weight * torch.stack(errors).mean()
        return loss

    @torch.no_grad()
    def _teach(self, batch: Batch, device: torch.device) -> tuple[Tensor, list[Tensor]]:
        """The teacher's logits, on the student's device, and its hidden states."""
        model: Any = self.teacher.model
        inputs = to_device(model_inputs(model, batch), execution_device(model))
        with self._states(self.teacher, self.teacher_layers) as states:
            logits = model(**inputs).logits
        return logits.to(device), states

    @contextmanager
    def _states(self, stack: DecoderLayers, layers: Sequence[int]) -> Iterator[list[Tensor]]:
        """The hidden states after these layers, in their order, of the forward pass inside the block."""
        found: list[Tensor] = []
        called: set[int] = set()

        def note(index: int, output: Any) -> None:
            check_first_call(stack, index, called)
            found.append(hidden_output(output))

        def hook_of(index: int) -> Any:
            return lambda module, args, output: note(index, output)

        with ExitStack() as hooks:
            for index in layers:
                hooks.callback(stack[index].register_forward_hook(hook_of(index)).remove)
            yield found
