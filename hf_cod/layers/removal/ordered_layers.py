"""The layers of a changed stack: copies where they repeat, and what only the first layer of a stack has."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from hf_cod.layers.removal.changes import Changes
from hf_cod.layers.removal.outside import MODES
from hf_cod.layers.stack import DecoderLayers


def hand_on(stack: DecoderLayers, order: list[int], changes: Changes) -> None:
    """Moves what only the first layer has to the layer that becomes the first.

    All layers of T5 use the position biases that the first one computes from its table. A first layer that lacks
    something that the others have is of another kind, and nothing is moved.
    """
    if order[0] == 0:
        return
    first, heir = (dict(stack[i].named_modules()) for i in (0, order[0]))
    if any(name not in first or type(first[name]) is not type(module) for name, module in heir.items()):
        return
    for name, parent, child in _only_in_first(stack):
        if parent in heir:
            changes.set(heir[parent], "_modules", {**heir[parent]._modules, child: first[name]})
            for key, value in vars(first[parent]).items():
                if isinstance(value, bool) and key not in MODES and vars(heir[parent]).get(key) is (not value):
                    changes.set(heir[parent], key, value)


def _only_in_first(stack: DecoderLayers) -> list[tuple[str, str, str]]:
    """The modules that only the first layer has: (name, that of the module around it, its name there)."""
    elsewhere = {name for layer in [*stack][1:] for name, _ in layer.named_modules()}
    only = [name for name, _ in stack[0].named_modules() if name not in elsewhere]
    split = [(name, *name.rpartition(".")) for name in only]
    return [(name, parent, child) for name, parent, _, child in split if parent in elsewhere]


def layers_of(stack: DecoderLayers, order: list[int]) -> list[nn.Module]:
    """The layers in this order; those that occur several times are copies, which have their weights in common."""
    again = repetitions(order)
    return [_copy_of(stack, old) if new in again else stack[old] for new, old in enumerate(order)]


def repetitions(order: list[int]) -> set[int]:
    """The places in an order at which a layer occurs again."""
    return {new for new, old in enumerate(order) if old in order[:new]}


def _copy_of(stack: DecoderLayers, index: int) -> nn.Module:
    """A layer with the weights, buffers and configs of another one, but with modules of its own. A copy of the first
    layer lacks what only the first one has, and gets it from there, as all others do."""
    layer: nn.Module = stack[index]
    kept: list[Any] = [*layer.parameters(), *layer.buffers()]
    kept += [v for m in layer.modules() for v in vars(m).values() if isinstance(v, PreTrainedConfig)]
    made = copy.deepcopy(layer, {id(thing): thing for thing in kept})
    if index == 0 and len(stack) > 1:
        own, other = dict(made.named_modules()), dict(stack[1].named_modules())
        for _, parent, child in _only_in_first(stack):
            if parent in other:
                del own[parent]._modules[child]
                flags = {key: on for key, on in vars(other[parent]).items() if type(on) is bool and key not in MODES}
                own[parent].__dict__.update(flags)
    return made
