"""Removes experts from all mixtures of a model: their matrices, rows of routers, biases, and the counts of the config.

The config is changed first, and a model is built from it on the meta device. Where its weights have fewer rows, those
of the removed experts go; what else differs is an error. The result is the model that a reload gives.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from hf_cod.io.display import one_line
from hf_cod.io.quantized import check_unquantized
from hf_cod.layers.checks import check_writable, name_of
from hf_cod.layers.expert_counts import counts_experts, is_top_k
from hf_cod.layers.expert_discovery import expert_sets, listed_experts
from hf_cod.layers.experts import ExpertSet
from hf_cod.layers.modules import walk
from hf_cod.layers.removal.changes import Changes
from hf_cod.layers.removal.expert_cuts import Cut, Mixing, find_cuts, mix_listed
from hf_cod.layers.removal.rebuilding import differences, rebuilt_from_config
from hf_cod.layers.stack import DecoderLayers, find_decoder_layers
from hf_cod.layers.stacks import DECODER, ENCODER, named_stacks
from hf_cod.models.own_config import own_config

# Config fields that count groups of experts: a token goes to the experts of the best groups only (DeepSeek-V3).
GROUP_FIELDS = ("n_group", "num_expert_group")
CHOSEN_GROUPS = "topk_group"
# Routers sum the scores of the best two experts of a group.
LEAST_OF_GROUP = 2


def mixtures_of(stack: DecoderLayers) -> dict[str, ExpertSet]:
    """Name -> experts, of all experts among which a router chooses, in the order of the layers.

    Raises:
        ValueError: there are none, or not equally many everywhere; some have no weights; no config counts the layers;
            encoder and decoder have experts.
    """
    sets = [experts for index in range(len(stack)) for experts in stack.expert_sets(index) if not experts.shared]
    if not sets:
        raise ValueError(f"model: expected a mixture of experts, got {name_of(stack)}, whose layers have no experts")
    if stack.config is None:
        raise ValueError(f"model: expected a config that counts the layers of {stack.layers_path}, got none")
    _check_other_side(stack)
    for experts in sets:
        counts = sorted({matrix.experts for matrix in experts.matrices})
        if len(counts) > 1:
            raise ValueError(
                f"model: expected experts that all have weights, got {counts[-1]} in {experts.name}, {counts[0]} of "
                "which have all matrices"
            )
    odd = next((experts for experts in sets if experts.count != sets[0].count), None)
    if odd is not None:
        raise ValueError(
            f"model: expected equally many experts in all layers, as a config counts them once, got {sets[0].count} in "
            f"{sets[0].name} and {odd.count} in {odd.name}"
        )
    return {experts.name: experts for experts in sets}


def _check_other_side(stack: DecoderLayers) -> None:
    """Checks that the other side of an encoder-decoder has no experts: one config field counts those of both."""
    for other in named_stacks(stack.model) if stack.name in (ENCODER, DECODER) else []:
        path = other.path
        layers: Any = stack.model.get_submodule(path)
        if path != stack.layers_path and any(
            not experts.shared for i, layer in enumerate(layers) for experts in expert_sets(layer, f"{path}.{i}")
        ):
            raise ValueError(
                f"model: expected experts in {stack.name} alone, as the config of {type(stack.model).__name__} counts "
                f"those of encoder and decoder once, got some in {other.name}; experts of one side are not removed"
            )


def groups_of(config: Any) -> int:
    """The number of groups among which a router chooses before it chooses experts; 1 without groups."""
    found = [vars(config).get(name) for name in GROUP_FIELDS]
    return max([value for value in found if type(value) is int], default=1)


def check_left(left: int, groups: int) -> None:
    """Checks that a number of experts can be routed to.

    Raises:
        ValueError: none is left, or they do not fill the groups.
    """
    if left < 1:
        raise ValueError("experts: expected at least one expert to be left in each layer, got all of them removed")
    if groups > 1 and (left % groups or left < LEAST_OF_GROUP * groups):
        raise ValueError(
            f"experts: expected a multiple of {groups} experts to be left, and at least {LEAST_OF_GROUP * groups}, as "
            f"the router chooses among {groups} groups by their best {LEAST_OF_GROUP} experts, got {left}"
        )


def remove_experts(
    model: nn.Module,
    kept: Mapping[str, Sequence[int]],
    layers_path: str | None = None,
    mixing: Mapping[str, Mixing] | None = None,
) -> list[str]:
    """Removes experts; the model is unchanged after any error.

    Args:
        model: a transformers model, wrapped or not.
        kept: name of each mixture -> the experts that are kept, ascending; equally many in all.
        layers_path: module name of the layer stack, if it cannot be found automatically.
        mixing: name of a mixture -> how its tensors (experts, ...) become those of the kept ones; default: by index.

    Returns:
        Notes: other changes of the config.

    Raises:
        ValueError: weights that are not plain and in memory, experts that the config does not count, or that it would
            build otherwise.
    """
    stack = find_decoder_layers(model, layers_path)
    check_removable(stack)
    own_config(model)
    stack = find_decoder_layers(model, layers_path)
    changes = Changes()
    try:
        for name, experts in mixtures_of(stack).items():
            if experts.modules and name in (mixing or {}) and name in kept:
                mix_listed(experts, kept[name], (mixing or {})[name], changes)
        notes, cuts = _prepare(stack, kept, changes)
        for cut in cuts:
            cut.apply(kept[cut.experts], (mixing or {}).get(cut.experts) if cut.mixed else None, changes)
    except BaseException:
        changes.undo()
        raise
    return notes


def check_removal(model: nn.Module, kept: Mapping[str, Sequence[int]], layers_path: str | None = None) -> None:
    """Checks that `remove_experts` can remove these; the model is not changed.

    Raises:
        ValueError: in the same cases.
    """
    stack = find_decoder_layers(model, layers_path)
    check_removable(stack)
    changes = Changes()
    try:
        _prepare(stack, kept, changes)
    finally:
        changes.undo()


def check_removable(stack: DecoderLayers) -> None:
    """Checks that the weights are plain ones in memory.

    Raises:
        ValueError: they are not, or no config counts the layers.
    """
    if stack.config is None:
        raise ValueError(f"model: expected a config that counts the layers of {stack.layers_path}, got none")
    check_unquantized(stack.model, name_of(stack))
    check_writable(stack)


def _prepare(stack: DecoderLayers, kept: Mapping[str, Sequence[int]], changes: Changes) -> tuple[list[str], list[Cut]]:
    """Changes config, lists of experts and numbers in modules; returns notes, and the tensors to be cut."""
    sets = mixtures_of(stack)
    count, left = next(iter(sets.values())).count, _check_kept(stack, sets, kept)
    notes = _change_config(stack, sets, left, changes)
    try:
        rebuilt = rebuilt_from_config(stack)
    except Exception as error:  # whatever a model raises that cannot be built from its config
        raise ValueError(
            f"experts: expected a number that the config of {type(stack.model).__name__} can describe, got {left}: "
            f"{type(error).__name__}: {one_line(str(error))}"
        ) from error
    for name, experts in sets.items():
        if experts.modules:
            _shorten(stack.model.get_submodule(name), kept[name], changes)
    cuts = [*find_cuts(stack, rebuilt, sets, left)]
    _change_numbers(stack, rebuilt, count / left, changes)
    _check_alike(stack, rebuilt, cuts)
    return notes, cuts


def _check_kept(stack: DecoderLayers, sets: Mapping[str, ExpertSet], kept: Mapping[str, Sequence[int]]) -> int:
    """Checks which experts are kept; returns how many in each mixture."""
    if kept.keys() != sets.keys():
        raise ValueError(f"experts: expected those of {', '.join(sets)}, got {', '.join(kept)}")
    count, groups = next(iter(sets.values())).count, groups_of(stack.config)
    numbers = {len(each) for each in kept.values()}
    if len(numbers) > 1:
        raise ValueError(
            f"experts: expected equally many to be left in all layers, as the config counts them once, got {numbers}"
        )
    left = numbers.pop()
    check_left(left, groups)
    for name, experts in kept.items():
        if [*experts] != sorted({e for e in experts if 0 <= e < count}):
            raise ValueError(f"experts: expected indices from 0 to {count - 1} in ascending order, got {experts}")
        in_groups = {sum(e * groups // count == group for e in experts) for group in range(groups)}
        if len(in_groups) > 1:
            raise ValueError(
                f"experts: expected equally many to be left in each of {groups} groups of {name}, got "
                f"{sorted(in_groups)}"
            )
    return left


def _change_config(stack: DecoderLayers, sets: Mapping[str, ExpertSet], left: int, changes: Changes) -> list[str]:
    """Sets all fields that count the experts, and lowers those of the experts of a token if fewer are left."""
    count, config = next(iter(sets.values())).count, stack.config
    counting = [(owner, name) for owner, name, value in _numbers(config) if counts_experts(name) and value == count]
    if not counting:
        raise ValueError(
            f"model: expected a config of {type(stack.model).__name__} that counts its {count} experts, got none"
        )
    groups = groups_of(config)
    chosen = vars(config).get(CHOSEN_GROUPS) if groups > 1 else None
    reachable = left if chosen is None else chosen * left // groups
    used = {experts.top_k for experts in sets.values()} - {None}
    lowered = [
        (owner, name, v) for owner, name, v in _numbers(config) if is_top_k(name) and v in used and v > reachable
    ]
    for owner, name in counting:
        changes.set(owner, name, left)
    for owner, name, _ in lowered:
        changes.set(owner, name, reachable)
    return [f"{name} was {value} and is now {reachable}: a token reaches no more experts" for _, name, value in lowered]


def _numbers(config: Any) -> Iterator[tuple[Any, str, int]]:
    """(config, name, value) of each whole number in a config and in those inside it."""
    for name, value in [*vars(config).items()]:
        if type(value) is int and not name.startswith("_"):
            yield config, name, value
        elif isinstance(value, PreTrainedConfig):
            yield from _numbers(value)


def _shorten(module: nn.Module, kept: Sequence[int], changes: Changes) -> None:
    """Keeps some experts of a list or dict, under the first keys."""
    experts = listed_experts(module)
    left = dict(zip(experts, ([*experts.values()][e] for e in kept), strict=False))
    rest = {key: child for key, child in module._modules.items() if key not in experts}
    changes.set(module, "_modules", OrderedDict({**left, **rest}))


def _change_numbers(stack: DecoderLayers, rebuilt: DecoderLayers, ratio: float, changes: Changes) -> None:
    """Gives the modules the numbers that those of the built model have, where these depend on the number of experts."""
    others = dict(rebuilt.model.named_modules())
    for name, module in stack.model.named_modules():
        there = vars(others[name]) if name in others else {}
        for key, value in [*vars(module).items()]:
            new = there.get(key)
            if type(value) is not int or type(new) is not int or value == new:
                continue
            if is_top_k(key) or math.isclose(value, new * ratio):
                changes.set(module, key, new)


def _check_alike(stack: DecoderLayers, rebuilt: DecoderLayers, cuts: Sequence[Cut]) -> None:
    """Checks that nothing but the tensors to be cut differs from the built model."""
    places = {id(cut.owner): {c.key for c in cuts if c.owner is cut.owner} for cut in cuts}
    for index, (mine, other) in enumerate(zip(stack, rebuilt, strict=True)):
        modules = dict(walk(mine, "layer"))
        for found in differences(modules, dict(walk(other, "layer"))):
            name, _, key = found.place.rpartition(".")
            if key not in places.get(id(modules.get(name)), ()):
                raise ValueError(
                    f"experts: expected kept experts that the config of {type(stack.model).__name__} can describe, got "
                    f"ones with which it would build layer {index} differently ({found})"
                )
