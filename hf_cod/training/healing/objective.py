"""What a student minimizes: what it says otherwise than its teacher."""

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
from hf_cod.layers.running import hidden_output
from hf_cod.layers.stack import DecoderLayers
from hf_cod.layers.task import model_inputs, targets


@dataclass(frozen=True)
class Objective:
    """The loss of a batch: `logit_loss`, and with a weight `hidden_loss`, mean over the matched layers.

    Attributes:
        student: its layers; inside whatever wraps it.
        teacher: its layers.
        temperature, labels: of the logits' loss.
        hidden: weight of the hidden states' loss.
        teacher_layers: for each layer of the student the teacher's; empty without that weight.
    """

    student: DecoderLayers
    teacher: DecoderLayers
    temperature: float = 1.0
    labels: float = 0.0
    hidden: float = 0.0
    teacher_layers: Sequence[int] = ()

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        """The loss, in nats a token, plus the weighted share of squares.

        Args:
            model: the student, as it is called.
            batch: input_ids (S, T), attention_mask (S, T), labels (S, T) where they are not the inputs.
        """
        with self._states(self.student, range(len(self.teacher_layers))) as mine:
            logits = model(**model_inputs(batch)).logits
        wanted, theirs = self._teach(batch, logits.device)
        mask = batch.get("attention_mask")
        keep = None if mask is None else mask.bool()
        labels = targets(batch, "causal_lm") if self.labels else None
        loss = logit_loss(logits, wanted, self.temperature, keep, labels, self.labels)
        if self.hidden:
            errors = []
            for x, y in zip(mine, theirs, strict=True):  # each layer on the device that it is on
                kept = None if keep is None else keep.to(x.device)
                errors.append(hidden_loss(x, y.to(x.device), kept).to(loss.device))
            loss = loss + self.hidden * torch.stack(errors).mean()
        return loss

    @torch.no_grad()
    def _teach(self, batch: Batch, device: torch.device) -> tuple[Tensor, list[Tensor]]:
        """The teacher's logits, on the student's device, and its hidden states."""
        model: Any = self.teacher.model
        inputs = to_device(model_inputs(batch), execution_device(model))
        with self._states(self.teacher, self.teacher_layers) as states:
            logits = model(**inputs).logits
        return logits.to(device), states

    @contextmanager
    def _states(self, stack: DecoderLayers, layers: Sequence[int]) -> Iterator[list[Tensor]]:
        """What leaves these layers, in their order, of the forward pass inside the block."""
        found: list[Tensor] = []

        def note(module: nn.Module, args: Any, output: Any) -> None:
            found.append(hidden_output(output))

        with ExitStack() as hooks:
            for index in layers:
                hooks.callback(stack[index].register_forward_hook(note).remove)
            yield found
