"""Changes of a model and its config that can be undone."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Reading:
    """A list of a config that says something about the layers, or may do.

    Attributes:
        config: the config, with the first of `values`.
        name: the field.
        before: the list before the change.
        values: what it becomes by each meaning that it may have, the likelier one first.
        unknown: whether the class of the config does not tell its meaning.
        copies: modules of the layers that have the list, too.
    """

    config: Any
    name: str
    before: Any
    values: list[list[Any]]
    unknown: bool
    copies: list[nn.Module] = field(default_factory=list)

    @property
    def ambiguous(self) -> bool:
        """Whether it may be a list of all indices, or one by layer."""
        return self.unknown and increasing(self.before) and self.before[-1] < len(self.before)


class Changes:
    """Attribute assignments that can be undone in reverse order.

    Attributes:
        readings: the lists of configs that have been changed by a meaning that is likely.
    """

    def __init__(self) -> None:
        self.readings: list[Reading] = []
        self._undo: list[Callable[[], None]] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Assigns an attribute that exists. One that the owner refuses is as before, so it is not undone."""
        before = getattr(owner, name)
        try:
            setattr(owner, name, value)
        except Exception:  # whatever a config raises for a value that it does not take, or that it only reads
            with suppress(Exception):
                setattr(owner, name, before)
            raise
        self._undo.append(partial(setattr, owner, name, before))

    def add(self, owner: Any, name: str, value: Any) -> None:
        """Assigns an attribute that the object itself does not have."""
        self._undo.append(partial(delattr, owner, name))
        setattr(owner, name, value)

    def call(self, undo: Callable[[], None]) -> None:
        """Records how a change that was made elsewhere is undone."""
        self._undo.append(undo)

    def undo(self) -> None:
        """Assigns the earlier values."""
        while self._undo:
            self._undo.pop()()


def increasing(value: Any) -> bool:
    """Whether a list may be one of layers by index."""
    numbers = all(type(each) is int and each >= 0 for each in value)
    return numbers and all(one < other for one, other in pairwise(value))
