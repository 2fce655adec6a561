"""Causal score: how much later layers add differently without a layer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_cod.analysis.diagnostics.changed_layers import token_rows
from hf_cod.io.journal import Journal
from hf_cod.io.schema import check_value, limits
from hf_cod.io.text import Batch
from hf_cod.layers.devices import execution_device, to_device
from hf_cod.layers.independence import check_independent
from hf_cod.layers.inputs import check_inputs
from hf_cod.layers.partial_forward import check_finite, layer_states, running_only
from hf_cod.layers.running import evaluation_mode, progress
from hf_cod.layers.stack import DecoderLayers, find_decoder_layers
from hf_cod.layers.task import model_inputs


@torch.no_grad()
def measure_causal_score(
    model: nn.Module,
    batches: Sequence[Batch],
    journal: Journal | None = None,
    *,
    layers_path: str | None = None,
    show_progress: bool = False,
) -> list[float | None]:
    """How much of what later layers add to the hidden state changes if a layer is skipped.

        C_l = mean over tokens t and later layers m of || c_m,t - c_m,t^(-l) || / || c_m,t ||,    c_m = x^(m+1) - x^m

    c^(-l) is what layer m adds in the model without layer l. The measure of arXiv 2603.15389, by the relative change of
    arXiv 2505.13898 ("skipping layers"), which takes the maximum over tokens where this takes the mean. It is near 0
    if later layers do not read what layer l writes. The hidden states of the intact model are computed once for each
    batch, so that L skips cost about L (L - 1) / 2 layers.

    Args:
        model: a transformers model, wrapped or not.
        batches: dicts for the model's forward.
        journal: stores each batch; stored entries are not computed again.
        layers_path: the stack's module name, if it cannot be found.
        show_progress: show a progress bar.

    Returns:
        One value per layer; None for the last one, which no layer follows.

    Raises:
        ValueError: layers that depend on earlier ones by more than what the layer before returns, or a hidden state of
            several streams.
    """
    stack = find_decoder_layers(model, layers_path)
    check_inputs(stack.model, batches)
    check_independent(stack, "causal_score", batches)
    if len(stack) < 2:
        raise ValueError("causal_score: expected at least two layers, got one")
    journal = Journal(None, "") if journal is None else journal
    device = execution_device(stack.model)
    sound = partial(_check, layers=len(stack))
    with evaluation_mode(stack):
        for number, batch in enumerate(progress(batches, "causal score", show_progress)):
            if not journal.is_sound(str(number), sound):
                journal.add(str(number), _sums(stack, to_device(batch, device), number))
    rows = torch.tensor([journal[str(number)] for number in range(len(batches))], dtype=torch.float64).sum(0)
    return [*(rows[:, 0] / rows[:, 1]).tolist(), None]


def _sums(stack: DecoderLayers, batch: Batch, number: int) -> list[list[float]]:
    """For each layer but the last one: the sum of relative changes, and the number of summands."""
    inputs = model_inputs(stack.model, batch)
    with layer_states(stack) as states:
        stack.trunk(**inputs)
    check_finite(states, number)
    mask = stack.mask(inputs)
    added = [_added(states, layer, mask) for layer in range(len(stack))]
    sums = []
    for layer in range(len(stack) - 1):
        # Hooks first, so that they are on the layers and not on what stands in their place.
        with layer_states(stack) as others, running_only(stack, range(layer + 1, len(stack)), states[layer]):
            stack.trunk(**inputs)
        total, count = 0.0, 0
        for later in range(layer + 1, len(stack)):
            changes = (added[later] - _added(others, later, mask)).norm(dim=-1) / added[later].norm(dim=-1)
            known = changes[changes.isfinite()]  # a layer that adds nothing to a token has no relative change
            total, count = total + float(known.double().sum()), count + len(known)
        sums.append([total, max(count, 1)])
    return sums


def _added(states: Sequence[Any], layer: int, mask: Any) -> Tensor:
    """(tokens, d): what a layer adds."""
    after, before = (token_rows(states[place][0], mask) for place in (layer + 1, layer))
    return after.float() - before.to(after.device).float()


def _check(value: Any, layers: int) -> None:
    check_value(value, list[tuple[float, float]], "causal_score", limits(least=0))
    if len(value) != layers - 1:
        raise ValueError(f"causal_score: expected {layers - 1} layers, got {len(value)}")
