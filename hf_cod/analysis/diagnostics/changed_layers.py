"""The loss of a model with one layer changed, from hidden states of the intact model that are computed once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hf_cod.analysis.evaluation.metrics import Metric, as_loss, check_rows
from hf_cod.analysis.evaluation.outputs import run_for_metric
from hf_cod.io.journal import Journal
from hf_cod.io.text import Batch
from hf_cod.layers.devices import execution_device, to_device
from hf_cod.layers.independence import check_independent, check_last_state
from hf_cod.layers.inputs import check_inputs
from hf_cod.layers.partial_forward import check_finite, layer_states
from hf_cod.layers.running import evaluation_mode, progress
from hf_cod.layers.stack import DecoderLayers

Change = Callable[[int, Sequence[Any]], AbstractContextManager[Any]]
"""The change of a layer, from its number and the states of the intact model (see `layer_states`): a block in which the
model is changed."""
INTACT = -1


@torch.no_grad()
def measure_changed_layers(
    stack: DecoderLayers,
    batches: Sequence[Batch],
    metric: Metric,
    layers: Sequence[int],
    change: Change,
    *,
    field: str,
    journal: Journal | None = None,
    show_progress: bool = False,
) -> tuple[float, list[float | None]]:
    """The loss of the intact model, and of the model with each of these layers changed.

    Args:
        stack: the layers.
        batches: dicts for the model's forward.
        metric: from `find_metric`.
        layers: numbers of the layers that can be changed, in ascending order.
        change: the change.
        field: name of the measure, with which errors begin.
        journal: stores each (batch, layer); stored entries are not computed again.
        show_progress: show a progress bar.

    Returns:
        The loss (`as_loss`) of the intact model, and that for each layer of the stack; None for the other layers.

    Raises:
        ValueError: layers that depend on earlier ones by more than what the layer before returns.
    """
    check_inputs(stack.model, batches)
    check_independent(stack, field, batches)
    check_last_state(stack, field, batches)
    journal = Journal(None, "") if journal is None else journal
    device = execution_device(stack.model)
    everything = [INTACT, *layers]
    bar = progress(range(len(batches) * len(everything)), field.replace("_", " "), show_progress)
    with evaluation_mode(stack), bar:
        for number, batch in enumerate(batches):
            sound = partial(check_rows, metric, batch=batch)
            if not all([journal.is_sound(_key(number, layer), sound) for layer in everything]):
                _measure(stack, to_device(batch, device), number, metric, layers, change, journal)
            bar.update(len(everything))
    losses: list[float | None] = [None] * len(stack)
    for layer in layers:
        losses[layer] = _loss(journal, metric, len(batches), layer)
    return _loss(journal, metric, len(batches), INTACT), losses


def token_rows(hidden: Tensor, mask: Any) -> Tensor:
    """The hidden states (tokens, d) of tokens that are not padding.

    Args:
        hidden: (S, T, d).
        mask: (S, T), or None.

    Raises:
        ValueError: states of another shape, such as several residual streams.
    """
    if hidden.dim() != 3:
        raise ValueError(f"model: expected hidden states (samples, tokens, d), got {tuple(hidden.shape)}")
    return hidden.flatten(0, 1) if mask is None else hidden[mask.to(hidden.device).bool()]


def _measure(
    stack: DecoderLayers,
    batch: Batch,
    number: int,
    metric: Metric,
    layers: Sequence[int],
    change: Change,
    journal: Journal,
) -> None:
    """Records the metric's rows of the intact model, and of each change that the journal lacks."""
    with layer_states(stack) as states:
        intact, read = run_for_metric(stack, metric, batch)
    check_finite(states, number)
    journal.add(_key(number, INTACT), metric.rows(intact, read, intact))
    reference = intact if metric.compares else None
    del intact  # logits are large
    for layer in layers:
        if _key(number, layer) not in journal:
            with change(layer, states):
                outputs, read = run_for_metric(stack, metric, batch)
            journal.add(_key(number, layer), metric.rows(outputs, read, reference))
        states[layer] = None


def _key(batch: int, layer: int) -> str:
    return f"changed {batch} {layer}"


def _loss(journal: Journal, metric: Metric, n_batches: int, layer: int) -> float:
    rows = [row for number in range(n_batches) for row in journal.result(_key(number, layer), list[Any])]
    return as_loss(metric, metric.value(rows))
