"""Saves a model with layers of equal width as a stock model: its config can hold the sizes, without code of hf_cod."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from hf_cod.layers.modules import walk
from hf_cod.layers.removal.rebuilding import differences
from hf_cod.layers.stack import DecoderLayers, find_decoder_layers
from hf_cod.layers.units import CHANNELS, HEADS, LayerUnits
from hf_cod.models.own_config import own_config
from hf_cod.models.shapes import ShapedModel

logger = logging.getLogger(__name__)

# Names of the number of MLP channels in configs.
_CHANNELS = ("intermediate_size", "ffn_dim", "n_inner")


def set_stock_config(stack: DecoderLayers, units: Sequence[LayerUnits], kept: Sequence[Mapping[str, int]]) -> bool:
    """Writes the sizes of narrowed layers to the config, if a model built from it has exactly these shapes.

    Configs hold one size for all layers, and some families derive sizes: GPT-2 derives the size of a head from the
    number of heads, Llama refuses numbers of heads that do not divide the hidden size. Therefore a model is built from
    the config, and its shapes are compared.

    Args:
        stack: the narrowed layers.
        units: of the intact layers.
        kept: of each layer: kind -> number of kept units, for the kinds of which some are removed.

    Returns:
        Whether the config now holds the sizes; it is then the model's own copy. If not, the config is unchanged.
    """
    model: Any = stack.model
    equal = all((found.found == [] or own == kept[0]) for found, own in zip(units, kept, strict=True))
    if isinstance(model, ShapedModel) or stack.config is None or not equal:
        return False
    own_config(model)
    stack = find_decoder_layers(model, stack.layers_path)
    before = dict(vars(stack.config))
    said = False
    for fields in _choices(stack.config, units[0], kept[0]):
        try:
            for name, value in fields.items():
                setattr(stack.config, name, value)
            with torch.device("meta"):
                built = type(model)(type(model.config).from_dict(copy.deepcopy(model.config.to_dict())))
            alike = not any(differences(dict(walk(model, "model")), dict(walk(built, "model"))))
            said = alike and _buffers(model) == _buffers(built)
        except Exception:  # each family refuses sizes with another error
            logger.debug("the config cannot hold %s", fields, exc_info=True)
        finally:
            if not said:
                vars(stack.config).clear()
                vars(stack.config).update(before)
        if said:
            break
    if said:
        _without_views(model)
    return said


def _without_views(model: Any) -> None:
    """Modules read the config itself again, which now holds the numbers that their views had."""
    for module in model.modules():
        viewed = getattr(type(vars(module).get("config")), "viewed", None)
        if viewed is not None:
            module.config = viewed


def _choices(config: Any, units: LayerUnits, kept: Mapping[str, int]) -> Iterator[dict[str, int]]:
    """Config field -> size, without and with a size of heads."""
    heads, channels = units[HEADS], units[CHANNELS]
    sizes: dict[str, int] = {}
    if channels is not None and CHANNELS in kept:
        sizes |= {name: kept[CHANNELS] for name in _CHANNELS if hasattr(config, name)}
    if heads is None or HEADS not in kept:
        yield sizes
        return
    sizes["num_attention_heads"] = kept[HEADS] * heads.heads
    if getattr(config, "num_key_value_heads", None) == heads.count:
        sizes["num_key_value_heads"] = kept[HEADS]
    yield sizes
    yield {**sizes, "head_dim": len(heads.columns) // (heads.count * heads.heads)}


def _buffers(model: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of tables such as the frequencies of rotary positions, which depend on sizes of heads."""
    return {name: tuple(buffer.shape) for name, buffer in model.named_buffers()}
