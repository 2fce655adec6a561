"""Removes layers from a model: temporarily within a `with` block (`skip`), or permanently (`drop`).

Both shorten the stack, renumber the kept layers and update the config. A model with a gap in its `layer_idx` fails in
its KV cache, and a config that still counts the removed layers builds another model (transformers issue 30508).
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from hf_cod.io.arguments import checked
from hf_cod.io.deprecation import renamed
from hf_cod.io.quantized import check_unquantized
from hf_cod.layers.capturing import capturing_restored
from hf_cod.layers.checks import name_of
from hf_cod.layers.direct_use import check_unwritten
from hf_cod.layers.modes import for_one_thread, one_thread
from hf_cod.layers.removal.cache import check_attended, check_cache
from hf_cod.layers.removal.config_surgery import (
    Changes,
    building_errors,
    derived_lists,
    mend_config,
    pin_lists,
    write_out,
)
from hf_cod.layers.removal.handed_on import mend_features, mend_handed_on
from hf_cod.layers.removal.key_sharing import SHARING_MODES, check_sources, mend_sharing, sharing_modes
from hf_cod.layers.removal.layer_tables import LayerTables, find_layer_tables
from hf_cod.layers.removal.marked_runs import MarkedRuns
from hf_cod.layers.removal.rebuilding import MODES, check_config_builds, scale_numbers
from hf_cod.layers.stack import DecoderLayers, find_decoder_layers
from hf_cod.layers.stacks import DECODER, ENCODER, VISION, ancestors
from hf_cod.models.own_config import own_config
from hf_cod.models.shapes import LAYER_INDEX_ATTRIBUTES


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
            removed one, the model does something at a layer by its index, which would move to another layer, it changes
            its weights in eval mode (RWKV), or another thread uses the model.
    """
    stack = find_decoder_layers(model, layers_path)
    check_unwritten(stack.model)
    changes = Changes()
    with one_thread(model), capturing_restored(stack.model):
        try:
            lists, tables, runs = _shrink(stack, _kept(stack, layers), changes)
            if runs.possible and not runs.ran:  # then the config alone says whether the kept layers fit each other
                check_config_builds(stack, tables.shapes)
            pin_lists(stack.config, lists, changes)
            runs.check()
            yield
        finally:
            changes.undo()


@renamed(path="layers_path")
@for_one_thread
@checked
def drop(model: nn.Module, layers: int | Iterable[int], layers_path: str | None = None) -> list[int]:
    """Removes `layers` from the model permanently; generate, save_pretrained and from_pretrained work on the result.

    Renumbers all layer indices inside the kept layers, sets `num_hidden_layers`, and shortens `layer_types` and all
    other per-layer lists of the config. A model with a head first gets its own copy of the config, because another
    model may share it; a model without a head, such as `model.model`, keeps sharing its config with the full model. If
    a function depends on the layer's index (GPT-2 with `scale_attn_by_inverse_layer_idx`), it uses the new index, in
    memory and after a reload. The norm placements of this package keep each layer's old depth. Tables outside
    of the layers that have a block for each (Gemma 3n, 4) are cut. Layers for multi-token prediction are in the files
    only, not in the model: `num_nextn_predict_layers` stays as it is (`hf-cod drop-layers` sets it to 0, with a note).

    Returns:
        The old indices of the kept layers, in order.

    Raises:
        ValueError: a layer that does not exist, no layer would be left, a kept layer uses the keys and values of a
            removed one, the model does something at a layer by its index, which would move to another layer, a table by
            layer whose weight is no plain one in memory, quantized weights, a model that changes its weights in eval
            mode (RWKV), or an architecture whose config cannot describe the result (a model from that config would
            differ). The model is unchanged in all these cases.
    """
    stack = find_decoder_layers(model, layers_path)
    kept = _kept(stack, layers)
    check_unwritten(stack.model)
    own_config(model)
    stack = find_decoder_layers(model, layers_path)
    changes = Changes()
    try:
        tables, runs = _drop(stack, kept, changes)
        if tables.widths:
            tables.cut(changes)
            runs.check()
    except BaseException:
        changes.undo()
        raise
    return kept


@renamed(path="layers_path")
@for_one_thread
def check_drop(model: nn.Module, layers: int | Iterable[int], layers_path: str | None = None) -> None:
    """Checks that `drop` can remove these layers; the model is not changed.

    Raises:
        ValueError: in the same cases as `drop`.
    """
    stack = find_decoder_layers(model, layers_path)
    changes = Changes()
    try:
        _drop(stack, _kept(stack, layers), changes)
    finally:
        changes.undo()


def _drop(stack: DecoderLayers, kept: list[int], changes: Changes) -> tuple[LayerTables, MarkedRuns]:
    """All that `drop` does, but for the weights of the tables; returns these, and runs of the intact model."""
    if stack.config is None:
        raise ValueError(f"model: expected a config that counts the layers of {stack.layers_path}, got none; use skip")
    check_unquantized(stack.model, name_of(stack))
    if getattr(stack.config, "num_kv_shared_layers", 0) and sharing_modes(stack.config) is None:
        raise ValueError("model: expected layers with their own keys and values, got num_kv_shared_layers > 0")
    with building_errors(stack.model):
        lists, tables, runs = _shrink(stack, kept, changes)
        for name, wanted in lists.items():
            raise ValueError(
                f"layers: expected kept layers that the config of {type(stack.model).__name__} can describe, got "
                f"{wanted} for {name}, which it computes otherwise; remove whole periods of the pattern of layers, or "
                "use skip"
            )
    check_cache(stack)
    tables.check_plain()
    try:
        check_config_builds(stack, tables.shapes)
    except ValueError:
        if not scale_numbers(stack, changes):
            raise
        check_config_builds(stack, tables.shapes)
    runs.check()
    return tables, runs


def _kept(stack: DecoderLayers, layers: int | Iterable[int]) -> list[int]:
    removed = {layers} if isinstance(layers, int) else set(layers)
    wrong = sorted(i for i in removed if not 0 <= i < len(stack))
    if wrong:
        raise ValueError(f"layers: expected indices from 0 to {len(stack) - 1}, got {wrong}")
    kept = [i for i in range(len(stack)) if i not in removed]
    if not kept:
        raise ValueError(f"layers: expected at least one of {len(stack)} layers to be left, got all of them removed")
    return kept


def _check_unshared(stack: DecoderLayers) -> None:
    """Checks that no two layers have a weight in common: a model like Zamba2 finds such a block by their numbers."""
    owner: dict[int, int] = {}
    for index, layer in enumerate(stack):
        for name, weight in layer.named_parameters():
            if owner.setdefault(id(weight), index) != index:
                raise ValueError(
                    f"layers: expected layers with weights of their own, got {stack.layers_path}.{index}.{name}, which "
                    f"layer {owner[id(weight)]} shares"
                )


def _shrink(
    stack: DecoderLayers, kept: list[int], changes: Changes
) -> tuple[dict[str, list[Any]], LayerTables, MarkedRuns]:
    """Keeps some layers; returns the lists by layer that the config computes otherwise than for these, the tables
    outside of the layers, which select the blocks of the kept ones, and runs of the intact model."""
    _check_unshared(stack)
    check_attended(stack, kept)
    check_sources(stack.config, kept)
    modes = sharing_modes(stack.config)
    layers, depth, called = [stack[i] for i in kept], len(stack), stack.name  # found by the length of the whole stack
    tables = find_layer_tables(stack, kept, partial(_mend_configs, stack, kept, depth, called))
    runs = MarkedRuns(stack, kept, [*tables.widths])
    if runs.possible and runs.channels != tables.channels:
        tables = replace(tables, widths={})  # a table that does not run may have its blocks in any order
    computed = {} if stack.config is None else derived_lists(stack.config, depth)
    _hand_on(stack, kept, changes)
    changes.set(stack.module_list, "_modules", OrderedDict((str(i), layer) for i, layer in enumerate(layers)))
    for new, (old, layer) in enumerate(zip(kept, layers, strict=True)):
        for module in layer.modules():
            for name in LAYER_INDEX_ATTRIBUTES:
                if module.__dict__.get(name) == old:
                    changes.set(module, name, new)
    _mend_configs(stack, kept, depth, called, changes)
    tables.select(changes)
    if modes is not None:
        mend_sharing(stack, kept, modes, changes)
        computed.pop(SHARING_MODES, None)  # a layer that nobody shares with may hand on its keys and values
    return {} if stack.config is None else write_out(stack.config, computed, kept, changes), tables, runs


def _mend_configs(stack: DecoderLayers, kept: list[int], depth: int, called: str | None, changes: Changes) -> None:
    whole: Any = getattr(stack.model, "config", None)  # for a tower this is not the config that counts its layers
    side = called if called in (ENCODER, DECODER) else None
    if stack.config is not None:
        before = {name: value for name, value in vars(stack.config).items() if isinstance(value, (list, tuple))}
        mend_config(stack.config, depth, kept, changes, side if stack.config is whole else None)
        mend_handed_on(stack.config, depth, kept, changes)
        _mend_copies(stack, before, changes)
    if side is not None and stack.config is not whole:  # each side of T5 has a copy of the config
        mend_config(whole, depth, kept, changes, side)
    if called == VISION and whole is not None:
        mend_features(whole, depth, kept, changes)
    if getattr(whole, "module_shapes", None):
        changes.set(whole, "module_shapes", _renumbered(whole.module_shapes, stack, kept))


def _mend_copies(stack: DecoderLayers, before: dict[str, Any], changes: Changes) -> None:
    """Changes the copies of the config's lists in the modules around the stack, such as Mllama's indices of layers."""
    for module in ancestors(stack.model, stack.layers_path):
        for name, value in before.items():
            now = getattr(stack.config, name)
            if now != value and vars(module).get(name) == value:
                changes.set(module, name, now)


def _hand_on(stack: DecoderLayers, kept: list[int], changes: Changes) -> None:
    """Moves what only the first layer has to the layer that becomes the first.

    All layers of T5 use the position biases that the first one computes from its table. A first layer that lacks
    something that the others have is of another kind, and nothing is moved.
    """
    if kept[0] == 0:
        return
    (first, heir), others = (dict(stack[i].named_modules()) for i in (0, kept[0])), [*stack][1:]
    if any(name not in first or type(first[name]) is not type(module) for name, module in heir.items()):
        return
    elsewhere = {name for layer in others for name, _ in layer.named_modules()}
    for name in first.keys() - elsewhere:
        parent, _, child = name.rpartition(".")
        if parent in elsewhere:
            changes.set(heir[parent], "_modules", {**heir[parent]._modules, child: first[name]})
            for key, value in vars(first[parent]).items():
                if isinstance(value, bool) and key not in MODES and vars(heir[parent]).get(key) is (not value):
                    changes.set(heir[parent], key, value)


def _renumbered(shapes: dict[str, Any], stack: DecoderLayers, kept: list[int]) -> dict[str, Any]:
    """`module_shapes` for the kept layers; its names are those inside the base model."""
    model: Any = stack.model
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    path = stack.layers_path.removeprefix(prefix)
    found = {}
    for name, sizes in shapes.items():
        match = re.match(rf"({re.escape(path)}\.)(\d+)(\..+)", name)
        if match is None:
            found[name] = sizes
        elif int(match[2]) in kept:
            found[f"{match[1]}{kept.index(int(match[2]))}{match[3]}"] = sizes
    return found
