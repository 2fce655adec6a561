"""Saves a model with layers of equal width as a stock model: its config can hold the sizes, without code of hf_cod."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from hf_cod.layers.expert_units import ExpertUnits
from hf_cod.layers.modules import walk
from hf_cod.layers.removal.rebuilding import differences
from hf_cod.layers.stack import DecoderLayers, find_decoder_layers
from hf_cod.layers.units import CHANNELS, EXPERTS, HEADS, LayerUnits
from hf_cod.models.own_config import own_config
from hf_cod.models.shapes import ShapedModel

logger = logging.getLogger(__name__)

# Names of the number of MLP channels in configs.
_CHANNELS = ("intermediate_size", "ffn_dim", "n_inner")
_OVERRIDES = "_heterogeneity_spec"  # where configs of transformers keep overrides by layer
_ANY_CHANNELS = re.compile("intermediate_size|ffn_dim|n_inner|ffn_hidden_size")

Sizes = dict[tuple[str, int], int]
"""(kind, number of units of a layer) -> number of kept ones."""


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
    sizes = _sizes(units, kept)
    if isinstance(model, ShapedModel) or stack.config is None or sizes is None:
        return False
    own_config(model)
    stack = find_decoder_layers(model, stack.layers_path)
    before = dict(vars(stack.config))
    said = False
    for fields in _choices(stack.config, units, sizes):
        adopted: list[tuple[nn.Module, str, int]] = []
        try:
            for name, value in fields.items():
                setattr(stack.config, name, value)
            with torch.device("meta"):
                built = type(model)(type(model.config).from_dict(copy.deepcopy(model.config.to_dict())))
            adopted = _adopt(units, kept, model, built)
            alike = not any(differences(dict(walk(model, "model")), dict(walk(built, "model"))))
            said = alike and _buffers(model) == _buffers(built)
        except Exception:  # each family refuses sizes with another error
            logger.debug("the config cannot hold %s", fields, exc_info=True)
        finally:
            if not said:
                for module, key, value in adopted:
                    setattr(module, key, value)
                vars(stack.config).clear()
                vars(stack.config).update(before)
        if said:
            break
    if said:
        _without_views(model)
    return said


def layer_overrides(
    stack: DecoderLayers, units: Sequence[LayerUnits], kept: Sequence[Mapping[str, int]]
) -> dict[str, dict[str, int]] | None:
    """The sizes of narrowed layers as overrides of the config, one set for each narrowed layer: `per_layer_config` of
    transformers, which records them, while most of its models do not build them (as of 5.24).

    Each set is tried: a model with these sizes in all layers is built, and has to have this layer.

    Args:
        stack: the narrowed layers of a stock model.
        units, kept: see `set_stock_config`.

    Returns:
        Index of a layer -> config field -> value; None if the config cannot say the sizes of a layer, or if it has
        overrides of its own.
    """
    model: Any = stack.model
    plain = stack.config is not None and stack.config is model.config and not vars(model.config).get(_OVERRIDES)
    if isinstance(model, ShapedModel) or not plain:
        return None
    found: dict[str, dict[str, int]] = {}
    built: dict[tuple[Any, ...], DecoderLayers | None] = {}
    for index, (layer, less) in enumerate(zip(units, kept, strict=True)):
        if not less:
            continue
        sizes = _sizes([layer], [less])
        for fields in () if sizes is None else _choices(stack.config, [layer], sizes):
            key = tuple(sorted(fields.items()))
            if key not in built:
                built[key] = _built(stack, fields)
            other = built[key]
            if other is not None and not any(differences(_parts(stack[index]), _parts(other[index]))):
                found[str(index)] = fields
                break
        else:
            return None
    return found


def _parts(layer: nn.Module) -> dict[str, nn.Module]:
    return dict(walk(layer, "layer"))


def _built(stack: DecoderLayers, fields: Mapping[str, int]) -> DecoderLayers | None:
    """The layers of a model with these sizes in all layers, without memory for weights; None if the family refuses."""
    model: Any = stack.model
    try:
        with torch.device("meta"):
            made = type(model)(type(model.config).from_dict({**copy.deepcopy(model.config.to_dict()), **fields}))
        return find_decoder_layers(made, stack.layers_path)
    except Exception:  # each family refuses sizes with another error
        logger.debug("the config cannot hold %s", fields, exc_info=True)
        return None


def _without_views(model: Any) -> None:
    """Modules read the config itself again, which now holds the numbers that their views had."""
    for module in model.modules():
        viewed = getattr(type(vars(module).get("config")), "viewed", None)
        if viewed is not None:
            module.config = viewed


def _adopt(
    units: Sequence[LayerUnits], kept: Sequence[Mapping[str, int]], model: nn.Module, built: nn.Module
) -> list[tuple[nn.Module, str, int]]:
    """Sets numbers of modules with experts that the config determines and that no forward pass needs, such as the size
    of a matrix beside the matrix; fewer channels equal zeroed ones without them. Only numbers that have fallen as the
    channels have are set: others would be differences of other kinds.

    Returns:
        (module, attribute, value before) of each.
    """
    banks: dict[str, tuple[int, int]] = {}
    for layer, less in zip(units, kept, strict=True):
        for own in (own for own in layer.found if isinstance(own, ExpertUnits) and own.kind in less):
            places = {name.rpartition(".")[0] for name in own.matrices}
            places |= {name.rpartition(".")[0] for name in places}
            banks |= dict.fromkeys(places, (own.count, less[own.kind]))
    before: list[tuple[nn.Module, str, int]] = []
    for name, (count, number) in banks.items():
        mine, other = model.get_submodule(name), built.get_submodule(name)
        for key, value in [*vars(mine).items()]:
            there = vars(other).get(key)
            if type(value) is int and type(there) is int and value != there and value * number == there * count:
                before.append((mine, key, value))
                setattr(mine, key, there)
    return before


def _sizes(units: Sequence[LayerUnits], kept: Sequence[Mapping[str, int]]) -> Sizes | None:
    """The sizes that all layers have; None if they differ."""
    sizes: Sizes = {}
    for layer, less in zip(units, kept, strict=True):
        for own in layer.found:
            number = less.get(own.kind, own.count)
            if sizes.setdefault((own.kind, own.count), number) != number:
                return None
    return sizes


def _choices(config: Any, units: Sequence[LayerUnits], sizes: Sizes) -> Iterator[dict[str, int]]:
    """Config field -> size, without and with a size of heads."""
    changed = {key: number for key, number in sizes.items() if number != key[1]}
    found = [_by_value(config, sizes)]
    numbers = [number for (kind, _), number in changed.items() if kind == CHANNELS]
    if len(numbers) == 1 and not any(kind == EXPERTS for kind, _ in sizes):
        found.insert(0, {name: numbers[0] for name in _CHANNELS if _has(config, name)})
    heads = next((own for layer in units for own in layer.found if own.kind == HEADS), None)
    if heads is None or (HEADS, heads.count) not in changed:
        yield from found
        return
    kept = changed[HEADS, heads.count]
    for fields in found:
        fields["num_attention_heads"] = kept * heads.heads
        if _has(config, "num_key_value_heads") and config.num_key_value_heads == heads.count:
            fields["num_key_value_heads"] = kept
        yield fields
        yield {**fields, "head_dim": len(heads.columns) // (heads.count * heads.heads)}


def _has(config: Any, name: str) -> bool:
    """Whether a config has one value of that name for all layers; transformers raises where layers have their own."""
    try:
        return hasattr(config, name)
    except RuntimeError:
        return False


def _by_value(config: Any, sizes: Sizes) -> dict[str, int]:
    """Fields for numbers of channels whose values are those of the intact layers."""
    fields = {}
    for name, value in vars(config).items():
        if not _ANY_CHANNELS.search(name) or type(value) is not int:
            continue
        kinds = (CHANNELS, EXPERTS) if "shared" in name else (EXPERTS, CHANNELS)
        number = next((sizes[kind, value] for kind in kinds if (kind, value) in sizes), value)
        if number != value:
            fields[name] = number
    return fields


def _buffers(model: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of tables such as the frequencies of rotary positions, which depend on sizes of heads."""
    return {name: tuple(buffer.shape) for name, buffer in model.named_buffers()}
