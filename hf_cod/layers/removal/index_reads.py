"""Whether layers compute with their own index, or with the number of layers: ImageGPT divides attention by the index.

A layer that moves to another index has to compute the same there. One layer of each kind runs on random hidden states
while reads of its index, of the number of layers and of the lists of its config are recorded. Only layers of a kind
that reads one of these are run at their old and their new index, and compared.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from hf_cod.layers.devices import random_state_restored
from hf_cod.layers.modules import walk
from hf_cod.layers.removal.wording import wording_of
from hf_cod.layers.running import Place, hidden_input, tensors_of
from hf_cod.layers.stacks import COUNT_FIELDS
from hf_cod.models.shapes import LAYER_INDEX_ATTRIBUTES

# Units in the last place of the largest value: both runs have the same shapes, but a GPU may add in another order.
ROUNDINGS = 16


class IndexReads:
    """Which kinds of layers read their index, found when the first layer of each kind runs.

    Attributes:
        names: what they read.
    """

    def __init__(self) -> None:
        self.names: set[str] = set()
        self._kinds: dict[tuple[type, ...], bool] = {}

    def computed(self, layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> dict[Place, Tensor]:
        """What a layer computes of random hidden states, with the other arguments that it got; nothing for layers that
        do not read their index, or do not run alone.
        """
        _, layer = next(walk(layer, ""))
        kind = tuple(type(module) for _, module in walk(layer, ""))
        if not self._kinds.get(kind, True):
            return {}
        read: set[str] = set()
        with suppress(Exception):  # whatever a layer raises that misses the states of other layers
            with recorded_reads(layer, read) if kind not in self._kinds else ExitStack():
                returned = _run(layer, args, kwargs)
            self._learn(kind, read)
            return {at: t.cpu() for at, t in tensors_of(returned)} if self._kinds[kind] else {}
        self._learn(kind, read)
        return {}

    def _learn(self, kind: tuple[type, ...], read: set[str]) -> None:
        self._kinds.setdefault(kind, bool(read))
        self.names |= read


def check_computed(
    model: nn.Module,
    before: Sequence[Mapping[Place, Tensor]],
    now: Sequence[Mapping[Place, Tensor]],
    kept: Sequence[int],
) -> None:
    """Checks that the layers of a changed stack compute alone what they computed before.

    Args:
        model: the model, for the error.
        before: what each layer computed in the intact model, from `IndexReads.computed`.
        now: the same in the changed one.
        kept: the old indices of its layers.

    Raises:
        ValueError: a layer computes something else.
    """
    for new, old in enumerate(kept):
        if not all(_same(now[new][at], before[old][at]) for at in before[old].keys() & now[new].keys()):
            wording = wording_of(kept)
            way = wording.by_number if old == new else wording.by_place
            raise ValueError(
                f"layers: expected layers of {type(model).__name__} that compute the same at their new index, got "
                f"layer {old}, which reads its index or the number of layers, and computes something else as layer "
                f"{new} of {len(kept)} layers; {way}"
            )


def _same(got: Tensor, expected: Tensor) -> bool:
    if got.shape != expected.shape or not expected.is_floating_point():
        return torch.equal(got, expected)
    finite = expected[expected.isfinite()].abs()
    largest = float(finite.max()) if finite.numel() else 0.0
    most = ROUNDINGS * torch.finfo(expected.dtype).eps * largest
    return torch.allclose(got.double(), expected.double(), rtol=0, atol=most, equal_nan=True)


def _run(layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
    """What a layer returns for random hidden states in the place of those that it got, without its hooks."""
    hidden = hidden_input(args, kwargs)
    drawn = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0), device="cpu").to(hidden)

    def given(value: Any) -> Any:  # in copies, because layers hand on keys and values in a dictionary
        return drawn if value is hidden else copy.copy(value) if type(value) in (dict, list) else value

    with random_state_restored(layer, seed=0):
        return layer.forward(*map(given, args), **{name: given(value) for name, value in kwargs.items()})


@contextmanager
def recorded_reads(layer: nn.Module, read: set[str]) -> Iterator[None]:
    """Adds to `read` the names of what the layer reads inside the block: its index, or the number or a list of layers
    of its config.
    """
    modules = [module for _, module in walk(layer, "")]
    configs = {id(v): v for m in modules for v in vars(m).values() if isinstance(v, PreTrainedConfig)}
    with ExitStack() as block:
        for config in configs.values():
            lists = (name for name, value in vars(config).items() if isinstance(value, (list, tuple)))
            watch(config, {*COUNT_FIELDS, *lists, *_properties(type(config))}, read, block)
        for module in modules:
            watch(module, {*LAYER_INDEX_ATTRIBUTES} & vars(module).keys(), read, block)
        yield


def _properties(kind: type) -> set[str]:
    """The names of what a class of configs computes, such as Jamba's list of kinds of layers."""
    found = inspect.getmembers(kind, lambda value: isinstance(value, property))
    return {name for name, _ in found if not hasattr(PreTrainedConfig, name)}


def watch(owner: Any, names: set[str], read: set[str], block: ExitStack) -> None:
    """Records reads of these attributes of an object until the end of `block`."""
    own: Any = type(owner)

    def get(self: Any, name: str) -> Any:
        if name in names:
            read.add(name)
        return own.__getattribute__(self, name)

    if names:
        owner.__class__ = type(own)(own.__name__, (own,), {"__getattribute__": get, "__module__": own.__module__})
        block.callback(object.__setattr__, owner, "__class__", own)
