"""Losses of a model without some of its layers, for many sets of layers at once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from hf_cod.analysis.evaluation.metrics import Metric, as_loss, check_rows
from hf_cod.analysis.evaluation.outputs import run_for_metric
from hf_cod.io.journal import Journal
from hf_cod.io.text import Batch
from hf_cod.layers.devices import execution_device, to_device
from hf_cod.layers.independence import check_independent, reads_several_states
from hf_cod.layers.partial_forward import layer_states, passed_over, run_layer, running_only
from hf_cod.layers.removal.drop import skip
from hf_cod.layers.running import evaluation_mode, progress
from hf_cod.layers.stack import DecoderLayers
from hf_cod.layers.task import model_inputs

Removed = tuple[int, ...]
"""The removed layers, in ascending order."""


class RemovalProbe:
    """Measures the losses after removals, all on the same batches.

    Removals share the hidden states up to the first layer in which they differ, which are computed once. Memory holds
    one hidden state for each layer at which removals branch. If the model reads the states of several layers, the whole
    model runs for each removal.

    Args:
        stack: the layers.
        metric: from `find_metric`.
        batches: dicts for the model's forward.
        journal: saves the rows of each (batch, removal); saved rows are not computed again.
        show_progress: show progress bars.

    Raises:
        ValueError: layers that share keys and values.
    """

    def __init__(
        self,
        stack: DecoderLayers,
        metric: Metric,
        batches: Sequence[Batch],
        journal: Journal | None = None,
        show_progress: bool = False,
    ) -> None:
        check_independent(stack, "layers", batches)
        self._stack, self._metric, self._batches, self._show = stack, metric, batches, show_progress
        self._whole = reads_several_states(stack, batches)
        self._journal = Journal(None, "") if journal is None else journal
        self._device = execution_device(stack.model)

    @torch.no_grad()
    def losses(self, removals: Sequence[Iterable[int]], title: str = "removals") -> list[float]:
        """The loss without each of these sets of layers: nats a token of a language model, else the metric's own
        (`as_loss`).

        Raises:
            ValueError: a loss that is not finite; says without which layers.
        """
        wanted = [tuple(sorted(removal)) for removal in removals]
        with evaluation_mode(self._stack):
            for number, batch in enumerate(progress(self._batches, title, self._show)):
                sound = partial(check_rows, self._metric, batch=batch)
                left = {removed for removed in wanted if not self._journal.is_sound(_key(number, removed), sound)}
                if left:
                    self._measure(number, to_device(batch, self._device), left)
        return [self._loss(removed) for removed in wanted]

    def _measure(self, number: int, batch: Batch, removals: set[Removed]) -> None:
        intact = run_for_metric(self._stack, self._metric, batch)[0] if self._metric.compares else None
        for removed, (outputs, read) in self._outputs(batch, sorted(removals)):
            self._journal.add(_key(number, removed), self._metric.rows(outputs, read, intact))

    def _outputs(self, batch: Batch, removals: list[Removed]) -> Iterator[tuple[Removed, tuple[Any, Batch]]]:
        """Yields (removal, what `run_for_metric` returns without it), depth first. Removals of a layer come before
        those that keep it, so that few states are stored.
        """
        stack, inputs = self._stack, model_inputs(self._stack.model, batch)
        with layer_states(stack) as states:
            run_layer(stack, 0, inputs, None)
        if states[0][1] is not None:
            yield from self._without_first(batch, [removed for removed in removals if 0 in removed])
            removals = [removed for removed in removals if 0 not in removed]
        if self._whole:
            yield from self._by_whole_runs(batch, removals)
            return
        # (next layer, state, layers after which it was taken, removals)
        waiting: list[tuple[int, Any, int, list[Removed]]] = [(0, states[0], 0, removals)] if removals else []
        del states
        while waiting:
            layer, state, finished, together = waiting.pop()
            while layer < len(stack):
                without = [removed for removed in together if layer in removed]
                if without and len(without) < len(together):
                    others = [removed for removed in together if layer not in removed]
                    waiting.append((layer, state, finished, others))
                    together = without
                if not without:
                    state, finished = run_layer(stack, layer, inputs, state, finished), layer + 1
                layer += 1
            (removed,) = together
            with running_only(stack, range(layer, layer), state, finished):
                yield removed, run_for_metric(stack, self._metric, batch)

    def _without_first(self, batch: Batch, removals: list[Removed]) -> Iterator[tuple[Removed, tuple[Any, Batch]]]:
        """For layers that return more than their hidden state, of which the model determines the first."""
        for removed in removals:
            with skip(self._stack.model, removed, self._stack.layers_path):
                yield removed, run_for_metric(self._stack, self._metric, batch)

    def _by_whole_runs(self, batch: Batch, removals: list[Removed]) -> Iterator[tuple[Removed, tuple[Any, Batch]]]:
        with layer_states(self._stack) as states:
            self._stack.trunk(**model_inputs(self._stack.model, batch))
        beside = [rest for _, rest in states]
        del states
        for removed in removals:
            with passed_over(self._stack, {layer: beside[layer] for layer in removed}):
                yield removed, run_for_metric(self._stack, self._metric, batch)

    def _rows(self, batch: int, removed: Removed) -> list[Any]:
        found: list[Any] = self._journal.result(_key(batch, removed), list[Any])
        return found

    def _loss(self, removed: Removed) -> float:
        rows = [row for number in range(len(self._batches)) for row in self._rows(number, removed)]
        loss = as_loss(self._metric, self._metric.value(rows))
        if not math.isfinite(loss):
            where = f"without layers {', '.join(map(str, removed))}" if removed else "of the intact model"
            raise ValueError(f"model: expected a finite loss, got {loss} {where}")
        return loss


def _key(batch: int, removed: Removed) -> str:
    return f"without {batch} {','.join(map(str, removed))}"
