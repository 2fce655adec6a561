"""Losses of plans of sparsity or bits, measured on a few samples.

The model is not changed permanently: the weights of a layer are masked or rounded while it runs, and restored after it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from hf_cod.analysis.evaluation.metrics import Perplexity
from hf_cod.analysis.statistics.layer_statistics import LayerStatistics
from hf_cod.functional import codebook
from hf_cod.functional.sparsity import magnitude_mask, wanda_mask
from hf_cod.io.text import Batch
from hf_cod.layers.checks import check_writable
from hf_cod.layers.devices import execution_device, to_device
from hf_cod.layers.independence import check_independent, check_last_state
from hf_cod.layers.partial_forward import State, run_layer, running_only
from hf_cod.layers.running import evaluation_mode, progress
from hf_cod.layers.stack import DecoderLayers
from hf_cod.layers.task import LANGUAGE_MODELS, model_inputs, task_of
from hf_cod.scoring.settings import CODEBOOK


class PruningProbe:
    """Losses of pruned or quantized versions of a language model, in nats per token.

    Args:
        stack: the layers of a language model with weights in memory.
        pruner: one of `settings.PRUNERS`; its values are sparsities, for "codebook" bits.
        statistics: statistics of this model; required unless the pruner is magnitude.
        batches: the samples to measure on.
        show_progress: show progress bars.

    Raises:
        ValueError: not a language model, layers that share keys and values, or weights that cannot be masked in place.
    """

    def __init__(
        self,
        stack: DecoderLayers,
        pruner: str,
        statistics: LayerStatistics | None,
        batches: Sequence[Batch],
        show_progress: bool,
    ) -> None:
        task = task_of(stack.model, batches)
        if task not in LANGUAGE_MODELS:
            raise ValueError(f"model: expected a language model to probe, got {type(stack.model).__name__}")
        check_independent(stack, "auto", batches)
        check_last_state(stack, "auto", batches)
        check_writable(stack)
        self.stack, self.pruner, self.statistics, self.show_progress = stack, pruner, statistics, show_progress
        device = execution_device(stack.model)
        self.batches = [to_device(batch, device) for batch in batches]
        self.metric = Perplexity(task)

    @torch.no_grad()
    def plans(self, plans: Sequence[Sequence[float]]) -> list[float]:
        """The loss of each plan (one value per layer), with all layers changed.

        All plans run through the layers together. Each layer is changed once for each of its values, at most one
        layer's weights are copied, and plans with equal values up to a layer share their hidden states.

        Raises:
            ValueError: a loss that is not finite (says for which plan).
        """
        L = len(self.stack)
        place = [0] * len(plans)  # index of each plan's state
        states: list[list[Any]] = [[None] * len(self.batches)]
        with evaluation_mode(self.stack):
            for layer in progress(range(L), "trying plans", self.show_progress):
                steps = sorted({(plan[layer], at) for plan, at in zip(plans, place, strict=True)})
                after: list[list[Any]] = []
                for value, group in groupby(steps, key=itemgetter(0)):
                    with self._changed(layer, value):
                        after += [self._step(layer, states[at]) for _, at in group]
                found = {step: number for number, step in enumerate(steps)}
                place = [found[plan[layer], at] for plan, at in zip(plans, place, strict=True)]
                states = after
        losses = [math.log(self.metric.value([row for rows in batches for row in rows])) for batches in states]
        wrong = [number for number, at in enumerate(place) if not math.isfinite(losses[at])]
        if wrong:
            S = ", ".join(f"{value:g}" for value in plans[wrong[0]])
            raise ValueError(f"plans: expected a finite loss, got {losses[place[wrong[0]]]} with sparsities {S}")
        return [losses[at] for at in place]

    def sensitivity(self, good: float, rest: float, bad: float) -> list[float]:
        """Increase of the loss if one layer changes from the value `good` to `bad`, while all others have `rest`.

        One value per layer, in nats per token. With sparsities around the target of all layers this is the slope of the
        loss at the pruned model. For L layers it costs about as much as L forward passes.
        """
        L = len(self.stack)
        alone = [[value if i == layer else rest for i in range(L)] for layer in range(L) for value in (good, bad)]
        losses = self.plans(alone)
        return [more - less for less, more in zip(losses[::2], losses[1::2], strict=True)]

    def _step(self, layer: int, before: Sequence[State | None]) -> list[Any]:
        """The state of each batch after the layer; after the last layer the rows of the metric."""
        if layer == len(self.stack) - 1:
            return [self._rows(layer, batch, state) for batch, state in zip(self.batches, before, strict=True)]
        after = []
        for batch, state in zip(self.batches, before, strict=True):
            hidden, rest = run_layer(self.stack, layer, model_inputs(self.stack.model, batch), state)
            after.append((hidden.cpu(), rest))
        return after

    def _rows(self, layer: int, batch: Batch, before: State | None) -> list[Any]:
        with running_only(self.stack, range(layer, layer + 1), before):
            return self.metric.rows(self.stack.model(**model_inputs(self.stack.model, batch)), batch, None)

    @contextmanager
    def _changed(self, layer: int, value: float, names: Collection[str] | None = None) -> Iterator[None]:
        """Within the context the layer is pruned to that sparsity, or rounded to that number of bits; with names, these
        matrices of it.
        """
        kept: list[tuple[Tensor, Tensor]] = []
        try:
            for name, W in self.stack.matrices(layer):
                if names is not None and name not in names:
                    continue
                kept.append((W, W.clone()))
                parts = [(None, W)] if W.dim() == 2 else [(expert, W[expert]) for expert in range(len(W))]
                for expert, part in parts:
                    squares = None if self.statistics is None else self.statistics.of(name, expert)
                    self._change(part, squares, value)
            yield
        finally:
            for W, intact in kept:
                W.copy_(intact)

    def _change(self, W: Tensor, squares: Tensor | None, value: float) -> None:
        if self.pruner == CODEBOOK:
            W.copy_(codebook.rounded(W, int(value), squares))
        elif self.pruner == "magnitude" or squares is None:
            W.masked_fill_(magnitude_mask(W, value), 0)
        else:
            W.masked_fill_(wanda_mask(W, squares.sqrt().to(W.device), value), 0)
