"""Usefulness: the loss of a model in which a linear map stands in the place of a layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_cod.analysis.evaluation.metrics import Metric, as_loss
from hf_cod.analysis.evaluation.outputs import run_for_metric
from hf_cod.functional.linear_map import MapSums
from hf_cod.io.text import Batch
from hf_cod.layers.devices import execution_device, to_device
from hf_cod.layers.independence import check_independent, check_last_state
from hf_cod.layers.inputs import check_inputs
from hf_cod.layers.partial_forward import State, check_finite, layer_states, running_only
from hf_cod.layers.running import evaluation_mode, progress
from hf_cod.layers.stack import DecoderLayers, find_decoder_layers
from hf_cod.layers.task import model_inputs

# Share of the mean of the diagonal of X^T X by which least squares are damped, for fewer tokens than channels.
DAMPING = 1e-6


@torch.no_grad()
def measure_usefulness(
    model: nn.Module,
    fitting: Sequence[Batch],
    batches: Sequence[Batch],
    metric: Metric,
    *,
    layers_path: str | None = None,
    show_progress: bool = False,
) -> tuple[float, list[float]]:
    """The loss of the intact model, and of the model with each single layer replaced by the nearest linear map.

        T_l = argmin_T sum_i || x_i T - z_i ||^2,    x_i and z_i the hidden state of token i before and after layer l

    A layer is useful if this raises the loss (`functional.depth.usefulness`; arXiv 2603.15389): what it computes is
    then not linear in the hidden state of a token. Maps are fitted to other samples than the loss is measured on. The
    hidden states of the intact model are computed once for each batch, so that L replacements cost about L (L - 1) / 2
    layers, plus the head. Memory holds two (d, d) matrices in float64 for each layer.

    Args:
        model: a transformers model, wrapped or not.
        fitting: dicts for the model's forward, to which maps are fitted; all tokens that are not padding count.
        batches: dicts for the model's forward on which the loss is measured.
        metric: from `find_metric`.
        layers_path: the stack's module name, if it cannot be found.
        show_progress: show progress bars.

    Returns:
        The loss (`as_loss`) of the intact model, and that for each replaced layer.

    Raises:
        ValueError: layers that depend on earlier ones by more than what the layer before returns, or a hidden state of
            several streams.
    """
    stack = find_decoder_layers(model, layers_path)
    for part in (fitting, batches):
        check_inputs(stack.model, part)
    check_independent(stack, "usefulness", batches)
    check_last_state(stack, "usefulness", batches)
    device = execution_device(stack.model)
    with evaluation_mode(stack):
        maps = _fitted(stack, [to_device(batch, device) for batch in fitting], show_progress)
        rows: list[list[Any]] = [[] for _ in range(len(stack) + 1)]
        for number, batch in enumerate(progress(batches, "replaced layers", show_progress)):
            _measure(stack, to_device(batch, device), number, metric, maps, rows)
    losses = [as_loss(metric, metric.value(found)) for found in rows]
    return losses[0], losses[1:]


def _fitted(stack: DecoderLayers, batches: Sequence[Batch], show_progress: bool) -> list[Tensor]:
    """T (d, d) of each layer."""
    sums = [MapSums() for _ in range(len(stack))]
    for number, batch in enumerate(progress(batches, "linear maps", show_progress)):
        with layer_states(stack) as states:
            stack.trunk(**model_inputs(batch))
        check_finite(states, number)
        mask = stack.mask(batch)
        rows = [_rows(hidden, mask) for hidden, _ in states]
        for layer, found in enumerate(sums):
            found.add(rows[layer], rows[layer + 1].to(rows[layer].device) - rows[layer])
    return [found.solve(DAMPING)[0] for found in sums]


def _rows(hidden: Tensor, mask: Any) -> Tensor:
    """The hidden states (tokens, d) of tokens that are not padding."""
    if hidden.dim() != 3:
        raise ValueError(f"model: expected hidden states (samples, tokens, d), got {tuple(hidden.shape)}")
    return hidden.flatten(0, 1) if mask is None else hidden[mask.to(hidden.device).bool()]


def _measure(
    stack: DecoderLayers, batch: Batch, number: int, metric: Metric, maps: list[Tensor], rows: list[list[Any]]
) -> None:
    """Adds the metric's rows of the intact model, and of the model with each replaced layer."""
    with layer_states(stack) as states:
        intact, read = run_for_metric(stack, metric, batch)
    check_finite(states, number)
    rows[0].extend(metric.rows(intact, read, intact))
    reference = intact if metric.compares else None
    del intact  # logits are large
    for layer, T in enumerate(maps):
        hidden, (after, rest) = states[layer][0], states[layer + 1]
        replaced: State = (hidden.to(T.device, T.dtype) @ T).to(after), rest
        with running_only(stack, range(layer + 1, len(stack)), replaced):
            outputs, read = run_for_metric(stack, metric, batch)
        rows[layer + 1].extend(metric.rows(outputs, read, reference))
        states[layer] = (None, None)
