"""Logit lens: the loss of a model whose head reads the output of an earlier layer."""

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
from hf_cod.layers.partial_forward import running_only
from hf_cod.layers.stack import find_decoder_layers
from hf_cod.layers.task import task_of


@torch.no_grad()
def measure_logit_lens(
    model: nn.Module,
    batches: Sequence[Batch],
    metric: Metric,
    journal: Journal | None = None,
    *,
    layers_path: str | None = None,
    show_progress: bool = False,
) -> tuple[float, list[float]]:
    """The loss of the intact model, and of the model that ends after each layer.

        lens_l = loss(head(norm(x^(l+1))))

    The logit lens (nostalgebraist 2020, "interpreting GPT: the logit lens"), here as a loss. Norm and head are those of
    the model's own forward, so that models of any kind with a head are read as they read their last layer. One forward
    pass for each batch, and norm and head L times.

    Args:
        model: a transformers model with a head, wrapped or not.
        batches: dicts for the model's forward.
        metric: from `find_metric`.
        journal: stores each (batch, layer); stored entries are not computed again.
        layers_path: the stack's module name, if it cannot be found.
        show_progress: show a progress bar.

    Returns:
        The loss (`as_loss`) of the intact model, and that after each layer; the last one is that of the intact model.

    Raises:
        ValueError: a model without a head, or layers that depend on earlier ones by more than what the layer before
            returns.
    """
    stack = find_decoder_layers(model, layers_path)
    if task_of(stack.model, batches) == "headless":
        raise ValueError(f"logit_lens: expected a model with a head, got {type(stack.model).__name__}, which has none")

    def change(layer: int, states: Sequence[Any]) -> AbstractContextManager[Any]:
        return running_only(stack, range(len(stack), len(stack)), states[layer + 1])

    options: Any = {"field": "logit_lens", "journal": journal, "show_progress": show_progress}
    intact, losses = measure_changed_layers(stack, batches, metric, range(len(stack)), change, **options)
    return intact, [loss for loss in losses if loss is not None]
