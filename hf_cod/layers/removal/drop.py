"""Removes layers from a model: temporarily within a `with` block (`skip`), or permanently (`drop`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn

from hf_cod.io.arguments import checked
from hf_cod.io.deprecation import renamed
from hf_cod.layers.modes import for_one_thread
from hf_cod.layers.removal.arranging import arrange, arranged, check_arranged
from hf_cod.layers.stack import DecoderLayers


@renamed(path="layers_path")
@checked
@contextmanager
def skip(model: nn.Module, layers: int | Iterable[int], layers_path: str | None = None) -> Iterator[None]:
    """Runs the block with `layers` removed. At its end model and config are restored, also on an exception.

    Inside the block forward, generate with a KV cache and every metric work on the shorter model. Tables outside
    of the layers that have a block for each (Gemma 3n, 4) return those of the kept layers; no weight is copied.

    Args:
        model: a transformers model, wrapped or not.
        layers: the layers to remove, counted from 0.
        layers_path: the stack's module name, if it cannot be found.

    Raises:
        ValueError: a layer that does not exist, no layer would be left, a kept layer uses the keys and values of a
            removed one, the model does something at a layer by its index, which would move to another layer, a kept
            layer computes something else at its new index (ImageGPT with `scale_attn_by_inverse_layer_idx`), the model
            changes its weights in eval mode (RWKV), or another thread uses the model.
    """
    with arranged(model, partial(_kept, layers), layers_path):
        yield


@renamed(path="layers_path")
@for_one_thread
@checked
def drop(model: nn.Module, layers: int | Iterable[int], layers_path: str | None = None) -> list[int]:
    """Removes `layers` from the model permanently; generate, save_pretrained and from_pretrained work on the result.

    Renumbers all layer indices inside the kept layers, sets `num_hidden_layers`, and shortens `layer_types` and all
    other per-layer lists of the config. A model with a head first gets its own copy of the config, because another
    model may share it; a model without a head, such as `model.model`, keeps sharing its config with the full model.
    The norm placements of this package keep each layer's old depth. Tables outside of the layers that have a block for
    each (Gemma 3n, 4) are cut. Layers for multi-token prediction are in the files only, not in the model: fields that
    promise them, such as `num_nextn_predict_layers`, are set to 0.

    Returns:
        The old indices of the kept layers, in order.

    Raises:
        ValueError: a layer that does not exist, no layer would be left, a kept layer uses the keys and values of a
            removed one, the model does something at a layer by its index, which would move to another layer, a kept
            layer computes something else at its new index (as in `skip`), a table by layer whose weight is no plain one
            in memory, quantized weights, a model that changes its weights in eval mode (RWKV), or an architecture whose
            config cannot describe the result (a model from that config would differ). The model is unchanged in all
            these cases.
    """
    return arrange(model, partial(_kept, layers), layers_path)


@renamed(path="layers_path")
@for_one_thread
def check_drop(model: nn.Module, layers: int | Iterable[int], layers_path: str | None = None) -> None:
    """Checks that `drop` can remove these layers; the model is not changed.

    Raises:
        ValueError: in the same cases as `drop`.
    """
    check_arranged(model, partial(_kept, layers), layers_path)


def _kept(layers: int | Iterable[int], stack: DecoderLayers) -> list[int]:
    removed = {layers} if isinstance(layers, int) else set(layers)
    wrong = sorted(i for i in removed if not 0 <= i < len(stack))
    if wrong:
        raise ValueError(f"layers: expected indices from 0 to {len(stack) - 1}, got {wrong}")
    kept = [i for i in range(len(stack)) if i not in removed]
    if not kept:
        raise ValueError(f"layers: expected at least one of {len(stack)} layers to be left, got all of them removed")
    return kept
