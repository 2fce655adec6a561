"""Renamed arguments, attributes and values: the old name is accepted for one release, with a DeprecationWarning."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

Decorated = TypeVar("Decorated", bound=Callable[..., Any])


def renamed(**names: str) -> Callable[[Decorated], Decorated]:
    """Makes a function, or the constructor of a class, also accept old argument names: `renamed(old="new")`.

    Signature and docstring show the new names only.

    Raises:
        ValueError: a call passes both names.
    """

    def decorate(thing: Decorated) -> Decorated:
        if isinstance(thing, type):
            constructed: Any = thing
            constructed.__init__ = _taking(constructed.__init__, names, thing.__name__)
            return thing
        return cast(Decorated, _taking(thing, names, thing.__name__))

    return decorate


class OldAttribute:
    """Descriptor for the old name of an attribute; reading it warns and returns the new attribute.

    Args:
        new: the new name of the attribute.
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
    """Returns the current name of a value; warns if an old name was passed.

    Args:
        title: the argument, for the message.
        value: the value that was passed.
        names: old name -> new name.
        above: stack frames between the caller of this function and the frame to warn, such as those of a decorator.
    """
    if not isinstance(value, str) or value not in names:
        return value
    warn_renamed(title, value, names[value], above + 1)
    return names[value]


def warn_renamed(title: str, old: str, new: str, above: int = 0) -> None:
    """Issues a DeprecationWarning for the caller's caller, or `above` frames further up the stack."""
    warnings.warn(
        f"{title}: {old} is now called {new}; the old name is removed in the next release",
        DeprecationWarning,
        stacklevel=3 + above,
    )


def _taking(function: Callable[..., Any], names: dict[str, str], title: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def with_old_names(*arguments: Any, **options: Any) -> Any:
        for old in names.keys() & options.keys():
            new = names[old]
            if new in options:
                raise ValueError(f"{old}: expected only the new name {new}, got both names")
            warn_renamed(title, old, new)
            options[new] = options.pop(old)
        return function(*arguments, **options)

    return with_old_names
