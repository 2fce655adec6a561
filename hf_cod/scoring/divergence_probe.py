"""Divergence of a model's predictions when one part of it is pruned or quantized."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_cod.functional.distillation import logit_loss
from hf_cod.io.display import say
from hf_cod.io.files import fingerprint
from hf_cod.io.journal import Journal
from hf_cod.io.schema import check_value, limits
from hf_cod.io.text import Batch, describe_batches
from hf_cod.layers.partial_forward import State, run_layer, running_only
from hf_cod.layers.parts import Part
from hf_cod.layers.running import evaluation_mode, progress
from hf_cod.layers.task import model_inputs
from hf_cod.scoring.pruning_probe import PruningProbe


class DivergenceProbe(PruningProbe):
    """KL divergences from the intact language model, in nats per token; see `PruningProbe` for the arguments."""

    @torch.no_grad()
    def divergences(self, parts: Sequence[Part], value: float, journal: Journal | None = None) -> list[float]:
        """For each part, the divergence of the model in which this part alone is changed to `value`.

            1 / |K| sum_{i in K} KL(p_i || q_i)

        p and q are the distributions of the next token of the intact and the changed model, K all real tokens. The
        divergence is computed in float32, a few positions at a time. Layers before the part run once for all parts; for
        parts all over the model, this takes about half as many forward passes as there are parts. Memory holds the
        hidden states of two layers, and the logits of one batch twice.

        Args:
            parts: in the order of the model.
            value: a sparsity, or bits.
            journal: stores the divergence of each part; stored ones are not computed again.
        """
        journal = Journal(None, "") if journal is None else journal
        left = [part for part in parts if not journal.is_sound(_key(part, value), _check)]
        if self.show_progress and left:
            say(self._cost(left))
        if left:
            with evaluation_mode(self.stack):
                self._measure(left, value, journal)
        return [journal.result(_key(part, value), float) for part in parts]

    def _measure(self, parts: Sequence[Part], value: float, journal: Journal) -> None:
        L = len(self.stack)
        intact = self._until(range(L - 1), [None] * len(self.batches))
        before, reached = [None] * len(self.batches), 0
        for part in progress(parts, "divergence of each part", self.show_progress):
            before, reached = self._until(range(reached, part.layer), before), part.layer
            journal.add(_key(part, value), self._divergence(part, value, before, intact))

    def _cost(self, parts: Sequence[Part]) -> str:
        samples = describe_batches(self.batches)["samples"]
        passes = divergence_cost(len(self.stack), [part.layer for part in parts])
        return (
            f"kl: {len(parts)} parts on {samples} samples take as long as {passes:.0f} forward passes of these samples"
        )

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
            found = self._compared(batch, teacher, student)
            total += found[0]
            tokens += found[1]
        return total / max(tokens, 1)

    def _compared(self, batch: Batch, teacher: Tensor, student: Tensor) -> tuple[float, float]:
        """(sum of the divergences of the real tokens of a batch, their number)."""
        keep = self.stack.mask(model_inputs(self.stack.model, batch))
        keep = torch.ones(teacher.shape[:-1], device=teacher.device) if keep is None else keep
        number = float(keep.sum())
        return number * float(logit_loss(student, teacher, keep=keep.bool())), number

    def _until(self, layers: range, states: Sequence[State | None]) -> list[Any]:
        """The state of each batch after these layers."""
        for layer in layers:
            states = [self._moved(layer, batch, state) for batch, state in zip(self.batches, states, strict=True)]
        return [*states]

    def _moved(self, layer: int, batch: Batch, before: State | None) -> State:
        hidden, rest = run_layer(self.stack, layer, model_inputs(self.stack.model, batch), before)
        return hidden.cpu(), rest

    def _logits(self, batch: Batch, before: State | None) -> Tensor:
        last = len(self.stack) - 1
        with running_only(self.stack, range(last, last + 1), before):
            logits: Tensor = self.stack.model(**model_inputs(self.stack.model, batch)).logits
        return logits


def divergence_cost(depth: int, layers: Sequence[int]) -> float:
    """Forward passes through all layers that the divergences take for each sample.

    Args:
        depth: number of layers.
        layers: the layer of each part.
    """
    # For each part the layers from its own on, and the last one of the intact model; once, two times all others.
    return (2 * (depth - 1) + sum(depth - layer + 1 for layer in layers)) / depth


def _key(part: Part, value: float) -> str:
    return f"part {part.layer} {fingerprint(part.names)} {value:g}"


def _check(value: Any) -> None:
    """Checks a divergence from the journal, which may be another one's file."""
    check_value(value, float, "divergence", limits(least=-1e-3))  # up to rounding
