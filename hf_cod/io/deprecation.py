"""Arguments, attributes and values that have a new name: the old one is taken for one release, with a warning."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

Decorated = TypeVar("Decorated", bound=Callable[..., Any])


def renamed(**names: str) -> Callable[[Decorated], Decorated]:
    """Lets a function, or the constructor of a class, take arguments by their old names, too: `renamed(old="new")`.

    Signature and docstring stay those of the new names.

    Raises:
        ValueError: in a call with both.
    """

    def decorate(thing: Decorated) -> Decorated:
        if isinstance(thing, type):
            constructed: Any = thing
            constructed.__init__ = _taking(constructed.__init__, names, thing.__name__)
            return thing
        return cast(Decorated, _taking(thing, names, thing.__name__))

    return decorate


class OldAttribute:
    """In the body of a class: an attribute by its old name, which is read with a warning.

    Args:
        new: its new name.
    """

    def __init__(self, new: str) -> None:
        self.new = new

    def __set_name__(self, owner: type, name: str) -> None:
        self.title, self.old = owner.__name__, name

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if instance is None:
            return self
        warn_renamed(self.title, self.old, self.new)
        return getattr(instance, self.new)


def current_value(title: str, value: Any, names: Mapping[str, str], above: int = 0) -> Any:
    """A value by its name of today, with a warning where an old one was given.

    Args:
        title: the argument, for the message.
        value: what was given.
        names: old name -> new one.
        above: calls between the function that calls this and the one that is warned, such as a decorator's.
    """
    if not isinstance(value, str) or value not in names:
        return value
    warn_renamed(title, value, names[value], above + 1)
    return names[value]


def warn_renamed(title: str, old: str, new: str, above: int = 0) -> None:
    """Warns whoever called the function that calls this, `above` calls further up, that a thing has a new name."""
    warnings.warn(
        f"{title}: {old} is now called {new}; the old name goes with the next release",
        DeprecationWarning,
        stacklevel=3 + above,
    )


def _taking(function: Callable[..., Any], names: dict[str, str], title: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def with_old_names(*arguments: Any, **options: Any) -> Any:
        for old in names.keys() & options.keys():
            new = names[old]
            if new in options:
                raise ValueError(f"{old}: expected {new} alone, which is its new name, got both")
            warn_renamed(title, old, new)
            options[new] = options.pop(old)
        return function(*arguments, **options)

    return with_old_names
