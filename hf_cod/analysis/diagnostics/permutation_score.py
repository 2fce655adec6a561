"""Permutation score: the loss of a model in which two neighbouring layers have changed places."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from hf_cod.analysis.diagnostics.changed_layers import measure_changed_layers
from hf_cod.analysis.evaluation.metrics import Metric
from hf_cod.io.journal import Journal
from hf_cod.io.text import Batch
from hf_cod.layers.exchange import why_not_exchangeable
from hf_cod.layers.partial_forward import running_from
from hf_cod.layers.stack import find_decoder_layers


@torch.no_grad()
def measure_permutation_score(
    model: nn.Module,
    batches: Sequence[Batch],
    metric: Metric,
    journal: Journal | None = None,
    *,
    layers_path: str | None = None,
    show_progress: bool = False,
) -> tuple[float, list[float | None]]:
    """The loss of the intact model, and of the model with layers l and l + 1 in each other's place.

        P_l = loss(..., f_(l+1), f_l, ...) - loss(..., f_l, f_(l+1), ...)

    A layer whose order does not matter computes what its neighbours compute, or nothing (arXiv 2603.15389 swaps layers
    of any two places; here neighbours alone, L - 1 pairs instead of L (L - 1) / 2). The hidden states of the intact
    model are computed once for each batch, so that the swaps cost about L (L + 1) / 2 layers, plus the head.

    Args:
        model: a transformers model, wrapped or not; it is not changed.
        batches: dicts for the model's forward.
        metric: from `find_metric`.
        journal: stores each (batch, layer); stored entries are not computed again.
        layers_path: the stack's module name, if it cannot be found.
        show_progress: show a progress bar.

    Returns:
        The loss (`as_loss`) of the intact model, and that for each layer and the next one swapped; None for the last
        layer, and for two layers of different kinds (`why_not_exchangeable`).

    Raises:
        ValueError: no two neighbours of a kind, or layers that depend on earlier ones by more than what the layer
            before returns.
    """
    stack = find_decoder_layers(model, layers_path)
    pairs = range(len(stack) - 1)
    layers = [layer for layer in pairs if why_not_exchangeable(stack, layer, stack, layer + 1) is None]
    if not layers:
        raise ValueError("permutation_score: expected neighbouring layers of one kind, got none")

    def change(layer: int, states: Sequence[Any]) -> AbstractContextManager[Any]:
        swapped = {layer: stack[layer + 1], layer + 1: stack[layer]}
        return running_from(stack, layer, states[layer], swapped)

    options: Any = {"field": "permutation_score", "journal": journal, "show_progress": show_progress}
    return measure_changed_layers(stack, batches, metric, layers, change, **options)
