"""Gives a stack other layers of its own: fewer, or some of them several times, with all that depends on their number.

An *order* lists, for each layer of the changed stack, its index before: [0, 1, 3] is a stack without layer 2, and
[0, 1, 1, 2] one that runs layer 1 twice. Layers are renumbered and the config is updated. A model with a gap in its
`layer_idx` fails in its KV cache, where two layers of one index would overwrite each other, and a config that counts
other layers builds another model (transformers issue 30508).
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from hf_cod.io.quantized import check_unquantized
from hf_cod.layers.capturing import capturing_restored
from hf_cod.layers.checks import name_of
from hf_cod.layers.direct_use import check_unwritten
from hf_cod.layers.layer_copies import own_weights
from hf_cod.layers.modes import one_thread
from hf_cod.layers.removal.cache import check_attended, check_cache
from hf_cod.layers.removal.changes import Changes, Reading
from hf_cod.layers.removal.config_surgery import (
    building_errors,
    derived_lists,
    mend_config,
    pin_lists,
    write_out,
)
from hf_cod.layers.removal.handed_on import mend_features, mend_handed_on
from hf_cod.layers.removal.index_reads import watch
from hf_cod.layers.removal.key_sharing import SHARING_MODES, check_sources, mend_sharing, sharing_modes
from hf_cod.layers.removal.layer_tables import LayerTables, find_layer_tables
from hf_cod.layers.removal.list_readings import check_readings, settle
from hf_cod.layers.removal.marked_runs import MarkedRuns
from hf_cod.layers.removal.ordered_layers import hand_on, layers_of, repetitions
from hf_cod.layers.removal.outside import build_outside
from hf_cod.layers.removal.rebuilding import check_config_builds, scale_numbers
from hf_cod.layers.removal.wording import wording_of
from hf_cod.layers.stack import DecoderLayers, find_decoder_layers
from hf_cod.layers.stacks import DECODER, ENCODER, VISION, ancestors
from hf_cod.models.own_config import own_config
from hf_cod.models.shapes import LAYER_INDEX_ATTRIBUTES

# A stack -> the order of the changed one.
Ordering = Callable[[DecoderLayers], list[int]]


@contextmanager
def arranged(model: nn.Module, ordering: Ordering, layers_path: str | None) -> Iterator[None]:
    """Runs the block with the layers in another order. At its end model and config are restored, also on an exception.

    Layers that occur several times have their weights in common.

    Raises:
        ValueError: see `skip` and `repeated`.
    """
    stack = find_decoder_layers(model, layers_path)
    order = ordering(stack)
    check_unwritten(stack.model)
    changes = Changes()
    with one_thread(model), capturing_restored(stack.model):
        try:
            with building_errors(stack.model, wording_of(order)):
                lists, tables, runs = _arrange(stack, order, changes)
            if runs.possible and not runs.ran:  # then the config alone says whether the layers fit each other
                check_config_builds(stack, tables, wording_of(order))
            pin_lists(stack.config, lists, changes)
            check_readings(changes, runs.check)
            yield
        finally:
            changes.undo()


def arrange(model: nn.Module, ordering: Ordering, layers_path: str | None) -> list[int]:
    """Puts the layers into another order permanently; returns it.

    A model with a head first gets its own copy of the config. Weights of layers that occur several times are copied at
    the very end, when nothing can be refused.

    Args:
        model: a transformers model, wrapped or not.
        ordering: the order.
        layers_path: the stack's module name.

    Raises:
        ValueError: see `drop` and `repeat`. The model is unchanged.
    """
    stack = find_decoder_layers(model, layers_path)
    order = ordering(stack)
    check_unwritten(stack.model)
    own_config(model)
    stack = find_decoder_layers(model, layers_path)
    changes = Changes()
    try:
        tables, runs = _describe(stack, order, changes)
        if tables.widths:
            tables.cut(changes)
            runs.check()
        for new in repetitions(order):
            own_weights(stack[new])
    except BaseException:
        changes.undo()
        raise
    return order


def check_arranged(model: nn.Module, ordering: Ordering, layers_path: str | None) -> None:
    """Checks that `arrange` can put the layers into this order; the model is not changed.

    Raises:
        ValueError: in the same cases as `arrange`.
    """
    stack = find_decoder_layers(model, layers_path)
    order = ordering(stack)
    check_unwritten(stack.model)
    changes = Changes()
    try:
        _describe(stack, order, changes)
    finally:
        changes.undo()


def _describe(stack: DecoderLayers, order: list[int], changes: Changes) -> tuple[LayerTables, MarkedRuns]:
    """All that `arrange` does, but for the weights of tables and of repeated layers; returns these tables, and runs of
    the intact model."""
    wording = wording_of(order)
    if stack.config is None:
        raise ValueError(
            f"model: expected a config that counts the layers of {stack.layers_path}, got none; use {wording.temporary}"
        )
    check_unquantized(stack.model, name_of(stack))
    if getattr(stack.config, "num_kv_shared_layers", 0) and sharing_modes(stack.config) is None:
        raise ValueError("model: expected layers with their own keys and values, got num_kv_shared_layers > 0")
    with building_errors(stack.model, wording):
        lists, tables, runs = _arrange(stack, order, changes)
        for name, wanted in lists.items():
            raise ValueError(
                f"layers: expected {wording.layers}s that the config of {type(stack.model).__name__} can describe, got "
                f"{wanted} for {name}, which it computes otherwise; {wording.verb} whole periods of the pattern of "
                f"layers, or use {wording.temporary}"
            )
    check_cache(stack, wording)
    tables.check_plain(wording)

    def check() -> None:
        check_config_builds(stack, tables, wording)
        runs.check()

    with building_errors(stack.model, wording):
        try:
            settle(changes, check, partial(_is_unread, stack, runs), f"use {wording.temporary}")
        except ValueError:
            if not scale_numbers(stack, changes):
                raise
            check()
    return tables, runs


def _is_unread(stack: DecoderLayers, runs: MarkedRuns, reading: Reading) -> bool:
    """Whether the model reads a list of its config neither where it is built nor where it runs."""
    if not runs.ran or reading.name in runs.read:
        return False
    read: set[str] = set()
    with ExitStack() as block:
        watch(reading.config, {reading.name}, read, block)
        try:
            build_outside(stack)
            runs.difference()
        except Exception:  # whatever a model raises for a config that does not fit it; `drop` reports the reason
            return False
    return not read


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


def _arrange(
    stack: DecoderLayers, order: list[int], changes: Changes
) -> tuple[dict[str, list[Any]], LayerTables, MarkedRuns]:
    """Changes the layers; returns the lists by layer that the config computes otherwise than for these, the tables
    outside of the layers, which select the blocks of these, and runs of the intact model."""
    _check_unshared(stack)
    check_attended(stack, order)
    check_sources(stack.config, order)
    modes = sharing_modes(stack.config)
    layers, depth, called = layers_of(stack, order), len(stack), stack.name  # found by the length of the whole stack
    tables = find_layer_tables(stack, order, partial(_mend_configs, stack, order, depth, called))
    runs = MarkedRuns(stack, order, [*tables.widths])
    if runs.possible and runs.channels != tables.channels:
        tables = replace(tables, widths={})  # a table that does not run may have its blocks in any order
    computed = {} if stack.config is None else derived_lists(stack.config, depth)
    hand_on(stack, order, changes)
    changes.set(stack.module_list, "_modules", OrderedDict((str(i), layer) for i, layer in enumerate(layers)))
    for new, (old, layer) in enumerate(zip(order, layers, strict=True)):
        for module in layer.modules():
            for name in LAYER_INDEX_ATTRIBUTES:
                if module.__dict__.get(name) == old:
                    changes.set(module, name, new)
    _mend_configs(stack, order, depth, called, changes)
    tables.select(changes)
    if modes is not None:
        mend_sharing(stack, order, modes, changes)
        computed.pop(SHARING_MODES, None)  # a layer that nobody shares with may hand on its keys and values
    return {} if stack.config is None else write_out(stack.config, computed, order, changes), tables, runs


def _mend_configs(stack: DecoderLayers, order: list[int], depth: int, called: str | None, changes: Changes) -> None:
    whole: Any = getattr(stack.model, "config", None)  # for a tower this is not the config that counts its layers
    side = called if called in (ENCODER, DECODER) else None
    if stack.config is not None:
        before = {name: value for name, value in vars(stack.config).items() if isinstance(value, (list, tuple))}
        mend_config(stack.config, depth, order, changes, side if stack.config is whole else None)
        mend_handed_on(stack.config, depth, order, changes)
        _mend_copies(stack, before, changes)
    if side is not None and stack.config is not whole:  # each side of T5 has a copy of the config
        mend_config(whole, depth, order, changes, side)
    if called == VISION and whole is not None:
        mend_features(whole, depth, order, changes)
    if getattr(whole, "module_shapes", None):
        changes.set(whole, "module_shapes", _renumbered(whole.module_shapes, stack, order))
    overrides = getattr(whole, "layer_overrides", None)
    if overrides:
        kept = {str(new): overrides[str(old)] for new, old in enumerate(order) if str(old) in overrides}
        changes.set(whole, "layer_overrides", kept)


def _mend_copies(stack: DecoderLayers, before: dict[str, Any], changes: Changes) -> None:
    """Changes the copies of the config's lists in and around the layers, such as Mllama's indices of layers."""
    inside = [module for layer in stack for module in layer.modules()]
    unknown = {reading.name: reading for reading in changes.readings if reading.unknown}
    for name, value in before.items():
        now = getattr(stack.config, name)
        for module in (*ancestors(stack.model, stack.layers_path), *inside):
            if now == value or vars(module).get(name) != value:
                continue
            if name in unknown and module in inside:
                unknown[name].copies.append(module)
            else:
                changes.set(module, name, now)


def _renumbered(shapes: dict[str, Any], stack: DecoderLayers, order: list[int]) -> dict[str, Any]:
    """`module_shapes` for the layers in this order; its names are those inside the base model."""
    model: Any = stack.model
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    path = stack.layers_path.removeprefix(prefix)
    found = {}
    for name, sizes in shapes.items():
        match = re.match(rf"({re.escape(path)}\.)(\d+)(\..+)", name)
        if match is None:
            found[name] = sizes
        else:
            places = (new for new, old in enumerate(order) if old == int(match[2]))
            found |= {f"{match[1]}{new}{match[3]}": sizes for new in places}
    return found
