"""Saves a model with layers of equal width as a stock model: its config can hold the sizes, without code of hf_cod."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import Any

import torch

from hf_cod.layers.removal import first_difference
from hf_cod.layers.stack import DecoderLayers, find_decoder_layers, walk
from hf_cod.layers.units import CHANNELS, HEADS, find_units
from hf_cod.models.own_config import own_config
from hf_cod.models.shapes import ShapedModel

logger = logging.getLogger(__name__)

# Names of the number of MLP channels in configs.
_CHANNELS = ("intermediate_size", "ffn_dim", "n_inner")


def set_stock_config(stack: DecoderLayers) -> bool:
    """Writes the sizes of narrowed layers to the config, if a model built from it has exactly these shapes.

    Configs hold one size for all layers, and some families derive sizes: GPT-2 derives the size of a head from the
    number of heads, Llama refuses numbers of heads that do not divide the hidden size. Therefore a model is built from
    the config, and its shapes are compared.

    Returns:
        Whether the config now holds the sizes; it is then the model's own copy. If not, the config is unchanged.
    """
    model: Any = stack.model
    fields = _fields(stack)
    if isinstance(model, ShapedModel) or fields is None:
        return False
    own_config(model)
    stack = find_decoder_layers(model, stack.layers_path)
    before = dict(vars(stack.config))
    said = False
    try:
        for name, value in fields.items():
            setattr(stack.config, name, value)
        with torch.device("meta"):
            built = type(model)(type(model.config).from_dict(copy.deepcopy(model.config.to_dict())))
        said = first_difference(dict(walk(model, "model")), dict(walk(built, "model"))) is None
    except Exception:  # each family refuses sizes with another error
        logger.debug("the config cannot hold %s", dict(fields), exc_info=True)
    finally:
        if not said:
            vars(stack.config).clear()
            vars(stack.config).update(before)
    return said


def _fields(stack: DecoderLayers) -> Mapping[str, int] | None:
    """Config field -> size; None if layers differ."""
    found = []
    for index in range(len(stack)):
        units = find_units(stack, index)
        heads, channels = units[HEADS], units[CHANNELS]
        sizes = {}
        if heads is not None:
            queries = heads.count * heads.heads
            width = stack.input_shapes(index)[heads.writer][0]
            sizes = {"num_attention_heads": queries, "head_dim": width // queries}
            sizes |= {"num_key_value_heads": heads.count} if hasattr(stack.config, "num_key_value_heads") else {}
        if channels is not None:
            sizes |= {name: channels.count for name in _CHANNELS if hasattr(stack.config, name)}
        found.append(sizes)
    return found[0] if stack.config is not None and all(sizes == found[0] for sizes in found) else None
