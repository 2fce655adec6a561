"""Massive activations: entries of the hidden state that are thousands of times the others."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_cod.analysis.diagnostics.changed_layers import token_rows
from hf_cod.io.journal import Journal
from hf_cod.io.schema import check_value, limits
from hf_cod.io.text import Batch
from hf_cod.layers.devices import execution_device, to_device
from hf_cod.layers.inputs import check_inputs
from hf_cod.layers.running import evaluation_mode, hidden_output, progress
from hf_cod.layers.stack import DecoderLayers, find_decoder_layers
from hf_cod.layers.task import model_inputs

# An entry is massive if its magnitude exceeds both (arXiv 2402.17762, section 2).
LEAST_MAGNITUDE, TIMES_MEDIAN = 100.0, 1000.0

Row = tuple[float, float, float]
"""Sum over samples of the ratio, of the number of massive entries, and number of samples."""


@torch.no_grad()
def measure_massive_activations(
    model: nn.Module,
    batches: Sequence[Batch],
    journal: Journal | None = None,
    *,
    layers_path: str | None = None,
    show_progress: bool = False,
) -> tuple[list[float | None], list[float | None]]:
    """How far the largest entry of each layer's output exceeds the others, and the number of massive entries.

        massive_ratio = max |x| / median |x|,    massive_activations = number of |x| > max(100, 1000 median |x|)

    of the hidden state x (T, d) after the layer, mean over samples; arXiv 2402.17762. One forward pass for each batch,
    without the head.

    Args:
        model: a transformers model, wrapped or not.
        batches: dicts for the model's forward.
        journal: stores each batch; stored entries are not computed again.
        layers_path: the stack's module name, if it cannot be found.
        show_progress: show a progress bar.

    Returns:
        Ratios and numbers by layer; None for layers that do not run on these inputs, or whose median is 0.

    Raises:
        ValueError: a hidden state of several streams.
    """
    stack = find_decoder_layers(model, layers_path)
    check_inputs(stack.model, batches)
    journal = Journal(None, "") if journal is None else journal
    device = execution_device(stack.model)
    sound = partial(_check, layers=len(stack))
    with evaluation_mode(stack):
        for number, batch in enumerate(progress(batches, "massive activations", show_progress)):
            if not journal.is_sound(str(number), sound):
                journal.add(str(number), _rows(stack, to_device(batch, device)))
    by_batch = [journal[str(number)] for number in range(len(batches))]
    rows = torch.tensor([[row or [0.0, 0.0, 0.0] for row in found] for found in by_batch], dtype=torch.float64).sum(0)
    ratios, counts = rows[:, 0] / rows[:, 2], rows[:, 1] / rows[:, 2]
    return [_known(value) for value in ratios.tolist()], [_known(value) for value in counts.tolist()]


def _known(value: float) -> float | None:
    return value if value == value else None


def _rows(stack: DecoderLayers, batch: Batch) -> list[Row | None]:
    """A row for each layer; of several runs the last one counts."""
    inputs = model_inputs(stack.model, batch)
    mask = stack.mask(inputs)
    found: dict[int, Row | None] = {}

    def hook_of(index: int) -> Any:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            hidden = hidden_output(output)
            samples = [token_rows(x[None], None if mask is None else mask[i : i + 1]) for i, x in enumerate(hidden)]
            found[index] = _row(samples)

        return keep

    with ExitStack() as block:
        for index, layer in enumerate(stack):
            block.callback(layer.register_forward_hook(hook_of(index)).remove)
        stack.trunk(**inputs)
    return [found.get(index) for index in range(len(stack))]


def _row(samples: list[Tensor]) -> Row | None:
    """The row of one layer, from the hidden states (tokens, d) of each sample."""
    ratio, count = 0.0, 0.0
    for sample in samples:
        sizes = sample.float().abs().flatten()
        largest, median = float(sizes.max()), float(sizes.median())
        if median == 0:
            return None
        ratio += largest / median
        count += float((sizes > max(LEAST_MAGNITUDE, TIMES_MEDIAN * median)).sum())
    return ratio, count, float(len(samples))


def _check(value: Any, layers: int) -> None:
    check_value(value, list[tuple[float, float, float] | None], "massive_activations", limits(least=0))
    if len(value) != layers:
        raise ValueError(f"massive_activations: expected {layers} layers, got {len(value)}")
