"""What a list of a config says about layers: an entry for each, their indices, or nothing.

A list with as many entries as there are layers may have so many by chance (Vivit's `tubelet_size` of a model of three
layers), and [0, 1, 2, 3] may be four indices (Molmo2's `rope_scaling_layers`) or an entry for each of four layers. The
class of the config tells: it makes such a list for other numbers of layers, too. Where it makes none, readings are
tried until the model that the config builds is that in memory.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from hf_cod.layers.removal.changes import Changes, Reading, increasing
from hf_cod.layers.stacks import counts

# Lists by layer whatever their entries are: kinds of layers, and this package's depths, which stay those of before.
PER_LAYER_FIELDS = ("layer_types", "layer_depths")


class Meanings:
    """What the lists of a config mean, by configs of the same class with other numbers of layers.

    Args:
        config: the config.
        counting: the fields that count the layers.
        depth: their number.
        excluded: fields that mean something else.
    """

    def __init__(self, config: Any, counting: Sequence[str], depth: int, excluded: Sequence[str]) -> None:
        self._config, self._depth = config, depth
        self._counting = [getattr(config, "attribute_map", {}).get(name, name) for name in counting]
        self._excluded = excluded
        self._made: list[Any] | None = None

    def possible(self, value: Any) -> bool:
        """Whether a list may say something about single layers: an entry for each, or ascending indices."""
        if not isinstance(value, (list, tuple)) or not value:
            return False
        return len(value) == self._depth or (increasing(value) and value[-1] < self._depth)

    def reading(self, name: str, value: Any, kept: list[int]) -> Reading | None:
        """What a list becomes for the kept layers; None if it says nothing about them."""
        by_layer = len(value) == self._depth
        cut = [value[i] for i in kept] if by_layer else [*value]
        if name in PER_LAYER_FIELDS:
            return Reading(self._config, name, value, [cut], False)
        lists = [vars(made).get(name) for made in self._others()]
        known = bool(lists) and all(isinstance(each, (list, tuple)) and len(each) for each in lists)
        follows = known and all(len(each) == self._depth + more for more, each in enumerate(lists, start=1))
        numbers = all(type(each) is int and 0 <= each < self._depth for each in value)
        if follows and numbers and all([*each] == [*range(len(each))] for each in lists):
            return Reading(self._config, name, value, [_moved(name, value, kept)], False)
        if not by_layer:
            return None
        whole, indices = [*value], increasing(value) and value[-1] < self._depth
        listed = [[new for new, old in enumerate(kept) if old in value]] if indices else []
        if follows:
            return Reading(self._config, name, value, [cut, *listed], False)
        if known and not indices:  # one of another length than the class makes was given for these layers (Reformer)
            usual = len(lists[0]) == len(value)
            return Reading(self._config, name, value, [whole, cut] if usual else [cut, whole], False)
        return Reading(self._config, name, value, [*listed, cut, whole], True)

    def _others(self) -> list[Any]:
        """Configs for one and for two layers more, with the lists that the class makes; none if it makes no config."""
        if self._made is None:
            self._made = []
            plain = {
                name: value
                for name, value in self._config.to_dict().items()
                if name in self._excluded or not self.possible(value)
            }
            try:
                for more in (1, 2):
                    depth = self._depth + more
                    values = copy.deepcopy(plain) | dict.fromkeys(self._counting, depth) | self._kinds(more)
                    self._made.append(type(self._config).from_dict(values))
                    if not self._counting or any(counts(self._made[-1], name) != depth for name in self._counting):
                        self._made = []
                        break
            except Exception:  # whatever a class raises for values that do not fit each other
                self._made = []
        return self._made

    def _kinds(self, more: int) -> dict[str, list[Any]]:
        """The lists that are known to be by layer, which some classes require, with more entries."""
        own = {name: vars(self._config).get(name) for name in PER_LAYER_FIELDS}
        return {name: [*value, *value[-1:] * more] for name, value in own.items() if value}


def apply(reading: Reading, changes: Changes) -> None:
    """Gives a config the likeliest value of a list that it accepts; other meanings are tried later."""
    for value in reading.values:
        try:
            changes.set(reading.config, reading.name, type(reading.before)(value))
        except StrictDataclassError:
            if value is reading.values[-1]:
                raise
        else:
            break
    changes.readings.append(reading)


def settle(changes: Changes, check: Callable[[], None], unread: Callable[[Reading], bool], way_out: str) -> None:
    """Chooses readings with which the changed config describes the model in memory.

    Args:
        changes: of the config; what is chosen is added.
        check: raises a ValueError if the config does not describe the model.
        unread: whether the model does not use a list.
        way_out: for an error.

    Raises:
        ValueError: that of `check` with the likeliest readings, or a list has several that fit.
    """
    for reading in (each for each in changes.readings if each.unknown):
        if unread(reading):
            _choose(reading, [*reading.before], changes)
        elif reading.ambiguous:
            _choose(reading, _only(reading, check, way_out), changes)
        elif reading.copies:  # a list by layer has no place in each layer
            _choose(reading, [*reading.before], changes)
    check_readings(changes, check)


def check_readings(changes: Changes, check: Callable[[], None]) -> None:
    """Checks the config as it is; if the check fails, with each other meaning of one list.

    Raises:
        ValueError: that of the first check, if all fail.
    """
    try:
        check()
    except ValueError:
        for reading, value in ((each, value) for each in changes.readings for value in each.values):
            if _fits(reading, value, check):
                _choose(reading, value, changes)
                return
        raise


def _only(reading: Reading, check: Callable[[], None], way_out: str) -> list[Any]:
    """The one value of a list with which the check passes; the first one if it fails with each."""
    fitting = [value for value in reading.values if _fits(reading, value, check)]
    if any(value != fitting[0] for value in fitting):
        raise ValueError(
            f"layers: expected lists of the config with one meaning, got {reading.name} = {reading.before!r}, which "
            f"may be indices of layers or one number for each, so that it may become "
            f"{' or '.join(str(value) for value in fitting)}; {way_out}"
        )
    return (fitting or reading.values)[0]


def _fits(reading: Reading, value: list[Any], check: Callable[[], None]) -> bool:
    attempt = Changes()
    try:
        _choose(reading, value, attempt)
        check()
    except Exception:  # ValueErrors of the check, and what a config raises for a value
        return False
    finally:
        attempt.undo()
    return True


def _choose(reading: Reading, value: list[Any], changes: Changes) -> None:
    for owner in (reading.config, *reading.copies):
        changes.set(owner, reading.name, type(reading.before)(value))


def _moved(name: str, value: Any, kept: list[int]) -> list[int]:
    """Indices of layers at their new places: of those listed, or for each layer that of another one or its own
    (Mistral Large 4's `kv_source_layers`)."""
    if increasing(value):
        return [new for new, old in enumerate(kept) if old in value]
    lost = next((old for old in kept if value[old] not in kept), None)
    if lost is not None:
        raise ValueError(
            f"layers: expected to keep layer {value[lost]}, which {name} names for layer {lost}, got it removed; "
            f"remove layer {lost} as well"
        )
    return [new if value[old] == old else kept.index(value[old]) for new, old in enumerate(kept)]
