"""Divergence of a model's predictions when one part of it is pruned or quantized."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_cod.functional.distillation import logit_loss
from hf_cod.io.text import Batch
from hf_cod.layers.partial_forward import State, run_layer, running_only
from hf_cod.layers.parts import Part
from hf_cod.layers.running import evaluation_mode, progress
from hf_cod.layers.task import model_inputs
from hf_cod.scoring.pruning_probe import PruningProbe


class DivergenceProbe(PruningProbe):
    """KL divergences from the intact language model, in nats per token; see `PruningProbe` for the arguments."""

    @torch.no_grad()
    def divergences(self, parts: Sequence[Part], value: float) -> list[float]:
        """For each part, the divergence of the model in which this part alone is changed to `value`.

            1 / |K| sum_{i in K} KL(p_i || q_i)

        p and q are the distributions of the next token of the intact and the changed model, K all real tokens. The
        divergence is computed in float32, a few positions at a time. Layers before the part run once for all parts; for
        parts all over the model, this takes about half as many forward passes as there are parts. Memory holds the
        hidden states of two layers, and the logits of one batch twice.

        Args:
            parts: in the order of the model.
            value: a sparsity, or bits.
        """
        L, found = len(self.stack), []
        with evaluation_mode(self.stack):
            intact = self._until(range(L - 1), [None] * len(self.batches))
            before, reached = [None] * len(self.batches), 0
            for part in progress(parts, "divergence of each part", self.show_progress):
                before, reached = self._until(range(reached, part.layer), before), part.layer
                found.append(self._divergence(part, value, before, intact))
        return found

    def _divergence(
        self, part: Part, value: float, before: Sequence[State | None], intact: Sequence[State | None]
    ) -> float:
        """Of one part; `before` are the states before its layer, `intact` those before the last layer."""
        L = len(self.stack)
        after = None
        if part.layer < L - 1:
            with self._changed(part.layer, value, part.names):
                after = self._until(range(part.layer, part.layer + 1), before)
            after = self._until(range(part.layer + 1, L - 1), after)
        total = tokens = 0.0
        for place, batch in enumerate(self.batches):
            teacher = self._logits(batch, intact[place])
            if after is None:
                with self._changed(part.layer, value, part.names):
                    student = self._logits(batch, before[place])
            else:
                student = self._logits(batch, after[place])
            keep = self.stack.mask(model_inputs(batch))
            keep = torch.ones(teacher.shape[:-1], device=teacher.device) if keep is None else keep
            number = float(keep.sum())
            total += number * float(logit_loss(student, teacher, keep=keep.bool()))
            tokens += number
        return total / max(tokens, 1)

    def _until(self, layers: range, states: Sequence[State | None]) -> list[Any]:
        """The state of each batch after these layers."""
        for layer in layers:
            states = [self._moved(layer, batch, state) for batch, state in zip(self.batches, states, strict=True)]
        return [*states]

    def _moved(self, layer: int, batch: Batch, before: State | None) -> State:
        hidden, rest = run_layer(self.stack, layer, model_inputs(batch), before)
        return hidden.cpu(), rest

    def _logits(self, batch: Batch, before: State | None) -> Tensor:
        last = len(self.stack) - 1
        with running_only(self.stack, range(last, last + 1), before):
            logits: Tensor = self.stack.model(**model_inputs(batch)).logits
        return logits
