"""Usefulness: the loss of a model in which a linear map stands in the place of a layer."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from hf_cod.analysis.diagnostics.changed_layers import measure_changed_layers, token_rows
from hf_cod.analysis.evaluation.metrics import Metric
from hf_cod.functional.linear_map import MapSums
from hf_cod.io.journal import Journal
from hf_cod.io.text import Batch
from hf_cod.layers.devices import execution_device, to_device
from hf_cod.layers.inputs import check_inputs
from hf_cod.layers.partial_forward import State, check_finite, layer_states, running_only
from hf_cod.layers.running import progress
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
    journal: Journal | None = None,
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
        journal: stores each (batch, layer); stored entries are not computed again.
        layers_path: the stack's module name, if it cannot be found.
        show_progress: show progress bars.

    Returns:
        The loss (`as_loss`) of the intact model, and that for each replaced layer.

    Raises:
        ValueError: layers that depend on earlier ones by more than what the layer before returns, or a hidden state of
            several streams.
    """
    stack = find_decoder_layers(model, layers_path)
    check_inputs(stack.model, fitting)
    device = execution_device(stack.model)
    maps: list[Tensor] = []

    def change(layer: int, states: Sequence[Any]) -> AbstractContextManager[Any]:
        if not maps:  # a finished run does not need them
            maps.extend(_fitted(stack, [to_device(batch, device) for batch in fitting], show_progress))
        T, hidden, (after, rest) = maps[layer], states[layer][0], states[layer + 1]
        replaced: State = (hidden.to(T.device, T.dtype) @ T).to(after), rest
        return running_only(stack, range(layer + 1, len(stack)), replaced)

    options: Any = {"field": "usefulness", "journal": journal, "show_progress": show_progress}
    intact, replaced = measure_changed_layers(stack, batches, metric, range(len(stack)), change, **options)
    return intact, [loss for loss in replaced if loss is not None]


def _fitted(stack: DecoderLayers, batches: Sequence[Batch], show_progress: bool) -> list[Tensor]:
    """T (d, d) of each layer."""
    sums = [MapSums() for _ in range(len(stack))]
    for number, batch in enumerate(progress(batches, "linear maps", show_progress)):
        with layer_states(stack) as states:
            stack.trunk(**model_inputs(stack.model, batch))
        check_finite(states, number)
        mask = stack.mask(model_inputs(stack.model, batch))
        rows = [token_rows(hidden, mask) for hidden, _ in states]
        for layer, found in enumerate(sums):
            found.add(rows[layer], rows[layer + 1].to(rows[layer].device) - rows[layer])
    return [found.solve(DAMPING)[0] for found in sums]
