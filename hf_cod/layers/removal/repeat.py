"""Runs a block of layers several times: temporarily within a `with` block (`repeated`), or permanently (`repeat`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn

from hf_cod.io.arguments import checked
from hf_cod.layers.modes import for_one_thread
from hf_cod.layers.removal.arranging import arrange, arranged, check_arranged
from hf_cod.layers.stack import DecoderLayers


@checked
@contextmanager
def repeated(model: nn.Module, start: int, end: int, times: int = 2, layers_path: str | None = None) -> Iterator[None]:
    """Runs the block with layers start to end - 1 run `times` times. At its end model and config are restored, also on
    an exception.

    Inside the block forward, generate with a KV cache and every metric work on the deeper model. No weight is copied.
    Each repetition has its own place in the KV cache.

    Args:
        model: a transformers model, wrapped or not.
        start: first layer of the block, counted from 0.
        end: the layer after its last one, as in Python's `range`.
        times: how often the block runs.
        layers_path: the stack's module name, if it cannot be found.

    Raises:
        ValueError: a block that does not exist, the model does something at a layer by its index, which would move to
            another layer, a layer computes something else at its new index, layers that share weights, a model that
            changes its weights in eval mode (RWKV), or another thread uses the model.
    """
    with arranged(model, partial(_order, start, end, times), layers_path):
        yield


@for_one_thread
@checked
def repeat(model: nn.Module, start: int, end: int, times: int = 2, layers_path: str | None = None) -> list[int]:
    """Runs layers start to end - 1 `times` times, permanently: after the block come its copies, then the other layers.

    The result is a stock model with (times - 1) (end - start) more layers. generate, save_pretrained and
    from_pretrained work on it, and each repetition has its own place in the KV cache. The config is adapted as by
    `drop`: layer indices, `num_hidden_layers`, `layer_types`, all other per-layer lists and layers for multi-token
    prediction. The norm placements of this package keep each layer's old depth. Where only the first layer computes
    something for all (T5's position biases), its copies take it from there. `drop` of the copies restores the model.
    The copies have weights of their own; `repeated` runs a block several times without them.

    Args:
        model: a transformers model, wrapped or not.
        start: first layer of the block, counted from 0.
        end: the layer after its last one, as in Python's `range`.
        times: how often the block runs.
        layers_path: the stack's module name, if it cannot be found.

    Returns:
        For each layer of the result, its old index.

    Raises:
        ValueError: a block that does not exist, the model does something at a layer by its index, which would move to
            another layer, a layer computes something else at its new index, a table by layer whose weight is no plain
            one in memory, quantized weights, layers that share weights, a model that changes its weights in eval mode
            (RWKV), or an architecture whose config cannot describe the result (a model from that config would differ).
            The model is unchanged in all these cases.
    """
    return arrange(model, partial(_order, start, end, times), layers_path)


@for_one_thread
def check_repeat(model: nn.Module, start: int, end: int, times: int = 2, layers_path: str | None = None) -> None:
    """Checks that `repeat` can repeat this block; the model is not changed.

    Raises:
        ValueError: in the same cases as `repeat`.
    """
    check_arranged(model, partial(_order, start, end, times), layers_path)


def check_block(start: int, end: int, times: int, depth: int | None = None) -> None:
    """Checks the block of a stack.

    Args:
        start, end, times: see `repeat`.
        depth: number of layers; None: unknown.

    Raises:
        ValueError: there is no such block.
    """
    if start < 0 or (depth is not None and start >= depth):
        raise ValueError(f"start: expected {'at least 0' if depth is None else f'0..{depth - 1}'}, got {start}")
    if end <= start or (depth is not None and end > depth):
        most = "" if depth is None else f", up to {depth}"
        raise ValueError(f"end: expected more than start ({start}){most}, got {end}")
    if times < 2:
        raise ValueError(f"times: expected at least 2, got {times}")


def _order(start: int, end: int, times: int, stack: DecoderLayers) -> list[int]:
    check_block(start, end, times, len(stack))
    return [*range(start), *[*range(start, end)] * times, *range(end, len(stack))]
