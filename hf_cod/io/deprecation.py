"""Arguments that have a new name: the old one is taken for one release, with a warning."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
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


def _taking(function: Callable[..., Any], names: dict[str, str], title: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def with_old_names(*arguments: Any, **options: Any) -> Any:
        for old in names.keys() & options.keys():
            new = names[old]
            if new in options:
                raise ValueError(f"{old}: expected {new} alone, which is its new name, got both")
            warnings.warn(
                f"{title}: {old} is now called {new}; the old name goes with the next release",
                DeprecationWarning,
                stacklevel=2,
            )
            options[new] = options.pop(old)
        return function(*arguments, **options)

    return with_old_names
