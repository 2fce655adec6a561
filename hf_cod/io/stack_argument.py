"""`stack`, the name of one of several stacks of layers, wherever a function takes `layers_path`.

Both say where the layers are, and `layers_path` also accepts such a name; no function takes both. `checked` adds the
argument to the signature and to the documentation, so that no function repeats it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

NAME, PATH = "stack", "layers_path"
_DOCUMENTED = (
    "        stack: instead of layers_path: the name of one of several stacks of layers, such as encoder or vision;\n"
    "            see `find_decoder_layers`.\n"
)


def takes_stack(signature: inspect.Signature) -> bool:
    """Whether a function looks up layers, so that it takes `stack`."""
    found = signature.parameters.get(PATH)
    return found is not None and found.default is None and NAME not in signature.parameters


def with_stack(signature: inspect.Signature) -> inspect.Signature:
    """The signature with `stack` as its last keyword."""
    more = inspect.Parameter(NAME, inspect.Parameter.KEYWORD_ONLY, default=None, annotation="str | None")
    own = [*signature.parameters.values()]
    at = len(own) - (bool(own) and own[-1].kind is inspect.Parameter.VAR_KEYWORD)
    return signature.replace(parameters=[*own[:at], more, *own[at:]])


def path_of_stack(given: Mapping[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """The keywords of a call with `layers_path` in place of `stack`.

    Args:
        given: all arguments of the call.
        options: its keywords.

    Raises:
        ValueError: both, or a stack that is no name.
    """
    if options.get(NAME) is None:
        return {name: value for name, value in options.items() if name != NAME}
    stack = options[NAME]
    if not isinstance(stack, str):
        raise ValueError(f"stack: expected a string or None, got {type(stack).__name__}")
    if given.get(PATH) not in (None, stack):
        raise ValueError(f"stack: expected none with layers_path {given[PATH]!r}, got {stack!r}; pass one of them")
    return {**{name: value for name, value in options.items() if name != NAME}, PATH: stack}


def documented(function: Callable[..., Any]) -> str | None:
    """The documentation of a function with `stack` after `layers_path`."""
    text = function.__doc__
    found = re.search(rf"^        {PATH}: .*\n(?:            .*\n)*", text, re.MULTILINE) if text else None
    return text if text is None or found is None else text[: found.end()] + _DOCUMENTED + text[found.end() :]
