"""Performance drop for the removal of each single layer, from hidden states that are computed once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cache, partial
from typing import Any

import torch
from torch import nn

from hf_cod.analysis.evaluation.metrics import Metric, check_rows
from hf_cod.analysis.evaluation.outputs import run_for_metric
from hf_cod.io.deprecation import renamed
from hf_cod.io.display import one_line
from hf_cod.io.journal import Journal
from hf_cod.io.text import Batch
from hf_cod.layers.devices import execution_device, to_device
from hf_cod.layers.independence import check_independent, reads_several_states, runs_several_times
from hf_cod.layers.inputs import check_inputs
from hf_cod.layers.partial_forward import State, check_finite, layer_states, passed_over, returned_beside, running_only
from hf_cod.layers.removal.drop import skip
from hf_cod.layers.removal.refusals import why_not_skipped
from hf_cod.layers.running import evaluation_mode, progress
from hf_cod.layers.stack import DecoderLayers, find_decoder_layers


@renamed(path="layers_path")
def measure_layer_drop(
    model: nn.Module,
    batches: Sequence[Batch],
    metric: Metric,
    journal: Journal | None = None,
    *,
    layers_path: str | None = None,
    show_progress: bool = False,
    why_not: Callable[[int], str | None] | None = None,
) -> tuple[float, list[float | None]]:
    """The metric of the intact model, and of the model without each single layer.

        Delta P^(l) = P_without_layer_l - P_intact            (arXiv 2502.05795, performance drop)

    For each batch the intact model runs once, and the hidden state before each layer is kept. The model without layer l
    then starts from this state at layer l + 1. So L removals cost about L (L - 1) / 2 layers instead of L (L - 1), plus
    the head. The result is exact, since the layers before do not change.

    A layer that runs several times in a forward pass is removed from each of its runs. Then the whole model runs for
    each removal, as it does if the model reads the states of several layers (LLaVA those of its vision tower).

    Args:
        model: a transformers model, wrapped or not.
        batches: dicts for the model's forward.
        metric: from `find_metric`.
        journal: stores each (batch, layer); stored entries are not computed again.
        layers_path: the stack's module name, if it cannot be found.
        show_progress: show a progress bar.
        why_not: layer -> why the model cannot be run without it, or None; cached, for a caller that also asks. Default:
            `why_not_skipped`.

    Returns:
        P_intact, and P_without_layer_l for each layer; None for a layer without which the model cannot be run.

    Raises:
        ValueError: the metric failed; says for which batch and layer. The journal keeps earlier results. Layers that
            depend on earlier ones by more than what the layer before returns.
    """
    stack = find_decoder_layers(model, layers_path)
    check_inputs(stack.model, batches)
    check_independent(stack, "layer_drop", batches)
    journal = Journal(None, "") if journal is None else journal
    whole = reads_several_states(stack, batches)
    why_not = why_not or cache(partial(why_not_skipped, stack))
    measure = _measure_loops if runs_several_times(stack, batches) else partial(_measure_batch, whole, why_not)
    device = execution_device(stack.model)
    bar = progress(range(len(batches) * (len(stack) + 1)), "layer drop", show_progress)
    with torch.no_grad(), evaluation_mode(stack), bar:
        for number, batch in enumerate(batches):
            sound = partial(check_rows, metric, batch=batch)
            if all([journal.is_sound(_key(number, layer), sound) for layer in range(-1, len(stack))]):
                bar.update(len(stack) + 1)
            else:
                measure(stack, number, to_device(batch, device), metric, journal, bar)
    intact = _value(journal, metric, len(batches), -1)
    known = [_key(0, layer) in journal for layer in range(len(stack))]
    return intact, [_value(journal, metric, len(batches), i) if has else None for i, has in enumerate(known)]


def _measure_batch(
    whole: bool,
    why_not: Callable[[int], str | None],
    stack: DecoderLayers,
    number: int,
    batch: Batch,
    metric: Metric,
    journal: Journal,
    bar: Any,
) -> None:
    """Runs the intact model, then each removal that the journal lacks, from the hidden states of the intact model, or
    the whole model. A removal that requires `skip` is left out where `skip` refuses it."""
    with layer_states(stack) as states:
        intact, read = run_for_metric(stack, metric, batch)
    check_finite(states, number)
    _record(journal, metric, number, -1, intact, read, intact)
    reference = intact if metric.compares else None
    del intact  # logits are large
    bar.update()
    for layer in range(len(stack)):
        possible = not _requires_skip(layer, states[layer]) or why_not(layer) is None
        if possible and _key(number, layer) not in journal:
            with _without(stack, layer, states[layer], whole):
                outputs, read = run_for_metric(stack, metric, batch)
            _record(journal, metric, number, layer, outputs, read, reference)
        states[layer] = None
        bar.update()


def _measure_loops(stack: DecoderLayers, number: int, batch: Batch, metric: Metric, journal: Journal, bar: Any) -> None:
    """The same for layers that run several times: there is no state to start from."""
    with returned_beside(stack) as rests:
        intact, read = run_for_metric(stack, metric, batch)
    _record(journal, metric, number, -1, intact, read, intact)
    reference = intact if metric.compares else None
    del intact
    bar.update()
    for layer in range(len(stack)):
        if _key(number, layer) not in journal:
            with passed_over(stack, {layer: rests.get(layer)}):
                outputs, read = run_for_metric(stack, metric, batch)
            _record(journal, metric, number, layer, outputs, read, reference)
        bar.update()


def _without(stack: DecoderLayers, layer: int, before: State, whole: bool) -> AbstractContextManager[Any]:
    """Within the block the model runs without a layer, from the state before it or as a whole."""
    if _requires_skip(layer, before):
        return skip(stack.model, layer, stack.layers_path)
    if whole:
        return passed_over(stack, {layer: before[1]})
    return running_only(stack, range(layer + 1, len(stack)), before, layer)


def _requires_skip(layer: int, before: State) -> bool:
    """Whether later layers get what only the first one returns beside its hidden state."""
    return layer == 0 and before[1] is not None


def _key(batch: int, layer: int) -> str:
    return f"drop {batch} {layer}"


def keys_of(layer: int, n_batches: int) -> list[str]:
    """Keys of a removed layer's rows in a journal of `measure_layer_drop`; layer -1 is the intact model."""
    return [_key(number, layer) for number in range(n_batches)]


def _value(journal: Journal, metric: Metric, n_batches: int, layer: int) -> float:
    rows = [row for key in keys_of(layer, n_batches) for row in journal.result(key, list[Any])]
    try:
        return metric.value(rows)
    except Exception as error:
        raise ValueError(f"metric: {metric.name} failed {_where(layer)}: {one_line(error)}") from error


def _where(layer: int) -> str:
    return "with the intact model" if layer < 0 else f"with layer {layer} removed"


def _record(journal: Journal, metric: Metric, number: int, layer: int, outputs: Any, batch: Batch, intact: Any) -> None:
    try:
        rows = metric.rows(outputs, batch, intact)
    except Exception as error:
        raise ValueError(
            f"metric: {metric.name} failed on batch {number} {_where(layer)}: {one_line(error)}"
        ) from error
    journal.add(_key(number, layer), rows)
