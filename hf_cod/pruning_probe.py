"""What plans of sparsity would cost, tried on a little text: Wanda by earlier statistics, one layer pruned at a time.

The model is never pruned as a whole: while a layer is run, its weights are masked, and put back afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hf_cod.calibration import Batch
from hf_cod.decoder_layers import DecoderLayers
from hf_cod.diagnostics.partial_pass import State, check_independent, run_layer, running_only
from hf_cod.diagnostics.running import evaluation_mode, execution_device, progress, to_device
from hf_cod.evaluation import Perplexity, model_inputs, task_of
from hf_cod.functional.sparsity import magnitude_mask, wanda_mask
from hf_cod.statistics import LayerStatistics
from hf_cod.writable_weights import check_writable


class PruningProbe:
    """Losses of pruned forms of a language model, in nats a token.

    Args:
        stack: the layers of a language model with weights in memory.
        statistics: of this model.
        batches: the text to try on.
        show_progress: show progress bars.

    Raises:
        ValueError: not a language model, layers that share keys and values, or weights that cannot be masked in place.
    """

    def __init__(
        self, stack: DecoderLayers, statistics: LayerStatistics, batches: Sequence[Batch], show_progress: bool
    ) -> None:
        task = task_of(stack.model, batches)
        if task not in ("causal_lm", "masked_lm"):
            raise ValueError(f"model: expected a language model to probe, got {type(stack.model).__name__}")
        check_independent(stack, "auto")
        check_writable(stack)
        self.stack, self.statistics, self.show_progress = stack, statistics, show_progress
        device = execution_device(stack.model)
        self.batches = [to_device(batch, device) for batch in batches]
        self.metric = Perplexity(task)

    @torch.no_grad()
    def plans(self, plans: Sequence[Sequence[float]]) -> list[float]:
        """The loss with all layers pruned, for each plan of one sparsity a layer.

        All plans walk through the layers together, so that no more than one layer's weights are copied.
        """
        L = len(self.stack)
        states: list[list[State | None]] = [[None] * len(self.batches) for _ in plans]
        rows: list[list[Any]] = [[] for _ in plans]
        with evaluation_mode(self.stack):
            for layer in progress(range(L), "trying plans", self.show_progress):
                for plan, before, found in zip(plans, states, rows, strict=True):
                    with self._masked(layer, plan[layer]):
                        for number, batch in enumerate(self.batches):
                            if layer < L - 1:
                                before[number] = run_layer(self.stack, layer, model_inputs(batch), before[number])
                            else:
                                found += self._rows(range(layer, L), batch, before[number])
        return [math.log(self.metric.value(found)) for found in rows]

    @torch.no_grad()
    def single_layers(self, S: float) -> list[float]:
        """By how much the loss grows when one layer alone is pruned to sparsity S, for each layer.

        Layer l starts from the intact model's hidden state in front of it, so that L layers cost about L / 2 passes.
        """
        L = len(self.stack)
        before: list[State | None] = [None] * len(self.batches)
        grown = []
        with evaluation_mode(self.stack):
            rows = [row for batch in self.batches for row in self._rows(range(L), batch, None)]
            intact = math.log(self.metric.value(rows))
            for layer in progress(range(L), "pruning single layers", self.show_progress):
                rows = []
                with self._masked(layer, S):
                    for batch, state in zip(self.batches, before, strict=True):
                        rows += self._rows(range(layer, L), batch, state)
                grown.append(math.log(self.metric.value(rows)) - intact)
                for number, batch in enumerate(self.batches):
                    before[number] = run_layer(self.stack, layer, model_inputs(batch), before[number])
        return grown

    def _rows(self, layers: range, batch: Batch, before: State | None) -> list[Any]:
        with running_only(self.stack, layers, before):
            return self.metric.rows(self.stack.model(**model_inputs(batch)), batch, None)

    @contextmanager
    def _masked(self, layer: int, S: float) -> Iterator[None]:
        """Within the block the layer is pruned to sparsity S."""
        kept: list[tuple[Tensor, Tensor]] = []
        try:
            for name, W in self.stack.matrices(layer):
                kept.append((W, W.clone()))
                parts = [(None, W)] if W.dim() == 2 else [(expert, W[expert]) for expert in range(len(W))]
                for expert, part in parts:
                    part.masked_fill_(self._mask(name, expert, part, S), 0)
            yield
        finally:
            for W, intact in kept:
                W.copy_(intact)

    def _mask(self, name: str, expert: int | None, W: Tensor, S: float) -> Tensor:
        squares = self.statistics.of(name, expert)
        return magnitude_mask(W, S) if squares is None else wanda_mask(W, squares.sqrt().to(W.device), S)
