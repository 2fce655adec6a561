"""Attention sinks: how much of the attention of each layer goes to the first token."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_cod.io.journal import Journal
from hf_cod.io.schema import check_value, limits
from hf_cod.io.text import Batch
from hf_cod.layers.devices import execution_device, to_device
from hf_cod.layers.inputs import check_inputs
from hf_cod.layers.running import evaluation_mode, progress
from hf_cod.layers.stack import DecoderLayers, find_decoder_layers
from hf_cod.layers.task import model_inputs

# A head whose queries give the first token more than this has a sink there (arXiv 2410.10781).
THRESHOLD = 0.3
# Sums of rounded weights may exceed 1 by this.
ROUNDING = 0.02

Row = tuple[float, float, float]
"""Sum over samples of the attention, of the share of heads with a sink, and number of samples."""


@torch.no_grad()
def measure_attention_sinks(
    model: nn.Module,
    batches: Sequence[Batch],
    journal: Journal | None = None,
    *,
    layers_path: str | None = None,
    show_progress: bool = False,
) -> tuple[list[float | None], list[float | None]]:
    """How much attention the first token of a sample gets in each layer, and the share of heads with a sink there.

        a_h = 1/(T - 1) sum_(i > 1) A^h_(i, 1),    attention_sinks = mean of a_h,    sink_heads = share of a_h > 0.3

    over heads h and samples, A^h (T, T) the attention weights after the softmax. Sinks: arXiv 2309.17453; threshold and
    count of heads: arXiv 2410.10781, there with the query i = 1, which in a causal model has no other choice. Padding
    does not count. The weights are those of transformers' eager attention, one layer in memory at a time: S H T T
    numbers. Attention is found by what a module returns beside its hidden states: weights (S, H, T, T) of which no row
    sums to more than 1; of several in a layer the first counts.

    Args:
        model: a transformers model, wrapped or not; its attention implementation is restored.
        batches: dicts for the model's forward.
        journal: stores each batch; stored entries are not computed again.
        layers_path: the stack's module name, if it cannot be found.
        show_progress: show a progress bar.

    Returns:
        Both by layer; None for layers without attention.

    Raises:
        ValueError: no layer has attention weights of this form, or samples of a single token.
    """
    stack = find_decoder_layers(model, layers_path)
    check_inputs(stack.model, batches)
    journal = Journal(None, "") if journal is None else journal
    device = execution_device(stack.model)
    sound = partial(_check, layers=len(stack))
    with evaluation_mode(stack), _eager(stack.model):
        for number, batch in enumerate(progress(batches, "attention sinks", show_progress)):
            if not journal.is_sound(str(number), sound):
                journal.add(str(number), _rows(stack, to_device(batch, device)))
    rows = [[journal[str(number)][layer] for number in range(len(batches))] for layer in range(len(stack))]
    if not any(row for by_batch in rows for row in by_batch):
        raise ValueError(
            f"attention_sinks: expected layers with attention weights (samples, heads, tokens, tokens), got none in "
            f"{type(stack.model).__name__}"
        )
    return _means(rows, 0), _means(rows, 1)


def _means(rows: list[list[Row | None]], column: int) -> list[float | None]:
    found: list[float | None] = []
    for by_batch in rows:
        known = [row for row in by_batch if row is not None]
        samples = sum(row[2] for row in known)
        found.append(sum(row[column] for row in known) / samples if samples else None)
    return found


def _rows(stack: DecoderLayers, batch: Batch) -> list[Row | None]:
    """A row for each layer; None for one without attention."""
    inputs = model_inputs(stack.model, batch)
    mask = stack.mask(inputs)
    found: dict[int, Row] = {}

    def hook_of(index: int) -> Any:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            for value in output if isinstance(output, (tuple, list)) else ():
                if index not in found and _is_attention(value):
                    found[index] = _row(value, mask)

        return keep

    with ExitStack() as block:
        for index, layer in enumerate(stack):
            for module in layer.modules():
                block.callback(module.register_forward_hook(hook_of(index)).remove)
        stack.trunk(**inputs, **_asked(stack.trunk))
    return [found.get(index) for index in range(len(stack))]


def _asked(trunk: Any) -> dict[str, bool]:
    """The argument by which some models (MPNet) are asked for the weights; the others compute them anyway."""
    name = "output_attentions"
    return {name: True} if name in inspect.signature(trunk.forward).parameters else {}


def _is_attention(value: Any) -> bool:
    """Whether a tensor can be the attention of tokens to the same tokens."""
    if not isinstance(value, Tensor) or value.dim() != 4 or value.shape[2] != value.shape[3]:
        return False
    rows = value.float().sum(-1)
    return bool((value >= 0).all()) and bool((rows <= 1 + ROUNDING).all()) and bool((rows > 0).any())


def _row(weights: Tensor, mask: Any) -> Row:
    """The row of one layer, from its weights (S, H, T, T)."""
    S, _, T, _ = weights.shape
    known = torch.ones(S, T, dtype=torch.bool, device=weights.device)
    if mask is not None and mask.shape == known.shape:
        known = mask.to(weights.device).bool()
    first = known.long().argmax(-1)
    queries = known.scatter(1, first[:, None], False)
    counts = queries.sum(-1)
    if not bool(counts.all()):
        raise ValueError("attention_sinks: expected samples of at least two tokens, got one of a single token")
    to_first = weights.double().gather(-1, first.view(S, 1, 1, 1).expand(*weights.shape[:3], 1))[..., 0]  # (S, H, T)
    by_head = (to_first * queries[:, None]).sum(-1) / counts[:, None]  # (S, H)
    return float(by_head.mean(-1).sum()), float((by_head > THRESHOLD).double().mean(-1).sum()), float(S)


@contextmanager
def _eager(model: nn.Module) -> Iterator[None]:
    """Within the block the model computes attention by transformers' eager implementation, which returns weights."""
    configs = {
        id(config): config for module in model.modules() if (config := getattr(module, "config", None)) is not None
    }
    before = [(c, c._attn_implementation) for c in configs.values() if hasattr(c, "_attn_implementation")]
    try:
        for config, _ in before:
            config._attn_implementation = "eager"
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation = implementation


def _check(value: Any, layers: int) -> None:
    found: list[Row | None] = check_value(value, list[tuple[float, float, float] | None], "attention_sinks")
    if len(found) != layers:
        raise ValueError(f"attention_sinks: expected {layers} layers, got {len(found)}")
    for row in found:
        if row is not None:
            check_value(row[2], float, "attention_sinks", limits(least=1))
            for part in row[:2]:
                check_value(part, float, "attention_sinks", limits(least=0, most=row[2] * (1 + ROUNDING)))
