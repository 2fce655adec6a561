"""Checks of names and types of arguments when public functions are called.

An error is one line, "field: expected ..., got ...", before anything is loaded or measured. `checked` reads the type
annotations of the signature, so that nothing is written twice.
"""

from __future__ import annotations

import functools
import inspect
import os
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from difflib import get_close_matches
from numbers import Real
from typing import Annotated, Any, Literal, TypeVar, Union, Unpack, cast, get_args, get_origin, get_type_hints

from hf_cod.io.stack_argument import documented, path_of_stack, takes_stack, with_stack

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

# Class -> its name in errors.
CLASSES = {
    bool: "True or False",
    int: "an integer",
    float: "a number",
    str: "a string",
    type(None): "None",
    os.PathLike: "a path",
}
# Classes of torch and transformers by name, so that this file does not import them.
NAMED = {"Module": "a loaded model", "PreTrainedModel": "a loaded transformers model", "Tensor": "a tensor"}
WAYS_OUT = {
    "Module": "load it by from_pretrained of an Auto class",
    "PreTrainedModel": "load it by from_pretrained of an Auto class",
}
# Arguments that take a settings object, whose defaults are also those of the keyword fields.
HOLDERS = ("settings", "config", "how", "samples")
# Maximum number of characters of a value in an error.
LONGEST = 80


def checked(thing: Decorated) -> Decorated:
    """Decorator of a function, or of a class for its constructor, that checks arguments against their annotations.

    Fields of `**fields: Unpack[...]` are checked in the same way, and listed in the signature by name. An annotation
    `Annotated[..., check]` has a check of its own, which raises its own errors. A field with "alone" in its metadata is
    a list that also accepts a single string.

    Raises:
        ValueError: a call has an unknown name (the error gives the closest one) or a value of another type.
    """
    if isinstance(thing, type):
        constructed: Any = thing
        constructed.__init__ = _checking(constructed.__init__, thing.__name__, thing if is_dataclass(thing) else None)
        return cast(Decorated, thing)
    title = thing.__qualname__.removesuffix(".__init__").rpartition(".<locals>.")[2]
    return cast(Decorated, _checking(thing, title, None))


def _checking(function: Callable[..., Any], title: str, owner: type | None) -> Callable[..., Any]:
    signature = _opened(function)
    named = takes_stack(signature)
    if named:
        signature = with_stack(signature)
    names = list(dict.fromkeys([*_options(function), *signature.parameters]))

    @functools.cache
    def hints() -> dict[str, Any]:
        found = get_type_hints(owner if owner is not None else function, include_extras=True)
        opened = [get_args(hint)[0] for hint in found.values() if get_origin(hint) is Unpack]
        return {
            **found,
            **{name: hint for fields_ in opened for name, hint in get_type_hints(fields_, include_extras=True).items()},
        }

    @functools.cache
    def alone() -> set[str]:
        found = _options(function).values() if owner is None else fields(owner)
        return {f.name for f in found if f.metadata.get("alone")}

    @functools.wraps(function)
    def with_checks(*arguments: Any, **options: Any) -> Any:
        check_names(title, options, signature, names)
        try:
            bound = signature.bind(*arguments, **options).arguments
        except TypeError:  # an argument is missing, or passed twice: Python's own error is clear
            return function(*arguments, **options)
        if named:
            options = path_of_stack(bound, options)
        for name, value in bound.items():
            default = signature.parameters[name].default
            if name in hints() and value is not default and not (name in alone() and isinstance(value, str)):
                check_value(name, value, hints()[name])
        return function(*arguments, **options)

    with_checks.__signature__ = signature  # type: ignore[attr-defined]
    if named:
        with_checks.__doc__ = documented(function)
    return with_checks


def _opened(function: Callable[..., Any]) -> inspect.Signature:
    """The signature, with `**fields: Unpack[...]` replaced by its fields."""
    signature = inspect.signature(function)
    rest = next((p for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD), None)
    if rest is None:
        return signature
    annotation = _evaluated(function, rest.annotation)
    if get_origin(annotation) is not Unpack:
        return signature
    named = [p for p in signature.parameters.values() if p is not rest]
    defaults = {f.name: f.default for f in _options(function).values() if f.default is not MISSING}
    more = [
        inspect.Parameter(
            name, rest.KEYWORD_ONLY, default=defaults.get(name), annotation=getattr(hint, "__forward_arg__", hint)
        )
        for name, hint in get_args(annotation)[0].__annotations__.items()
    ]
    return signature.replace(parameters=[*named, *more])


def _evaluated(function: Callable[..., Any], annotation: Any) -> Any:
    return eval(annotation, getattr(function, "__globals__", {})) if isinstance(annotation, str) else annotation


def _options(function: Callable[..., Any]) -> dict[str, Any]:
    """The fields of a function's settings dataclasses by name; empty if it has none."""
    found: dict[str, Any] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if name in HOLDERS:
            kinds = [part for part in _parts(_evaluated(function, parameter.annotation)) if is_dataclass(part)]
            found |= {f.name: f for kind in kinds for f in fields(kind) if f.init and f.name not in found}
    return found


def check_names(title: str, given: Iterable[str], signature: inspect.Signature, names: Sequence[str]) -> None:
    """Checks that a function has arguments with all these names; errors list them in the order of `names`.

    Raises:
        ValueError: a name is unknown; gives the closest known name, then all of them.
    """
    parameters = signature.parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    unknown = next((name for name in given if name not in parameters), None)
    if unknown is not None:
        raise ValueError(unknown_name(title, unknown, [name for name in names if name != "self"]))


def unknown_name(field: str, unknown: Any, names: Collection[Any]) -> str:
    """The error text for an unknown name or choice: the closest known one, then all of them.

    Args:
        field: the argument or function, for which the names are known.
        unknown: what was given.
        names: what is known.
    """
    known = [*map(str, names)]
    near = did_you_mean([unknown], known) if isinstance(unknown, str) else ""
    return f"{field}: {near and near + ' '}expected one of {', '.join(known)}, got {unknown!r}"


def did_you_mean(unknown: Iterable[str], names: Collection[str]) -> str:
    """A question with the known name closest to each unknown one; empty if none is close."""
    near = [name for word in unknown for name in get_close_matches(word, names, 1)]
    return f"did you mean {', '.join(near)}?" if near else ""


def check_value(name: str, value: Any, hint: Any) -> None:
    """Checks a value against an annotation.

    Raises:
        ValueError: the value has another type.
    """
    own = [check for part in _parts(hint) if get_origin(part) is Annotated for check in part.__metadata__]
    for check in own:
        if value is not None or type(None) not in _parts(hint):
            check(value)
    if not own and not matches(value, hint):
        raise ValueError(f"{name}: expected {described(hint)}, got {shown(value)}{_way_out(value, hint)}")


def _way_out(value: Any, hint: Any) -> str:
    """The end of an error text: what to do about this value; empty if nothing is known."""
    kinds = [getattr(part, "__name__", "") for part in _parts(hint)]
    if any(kind in WAYS_OUT for kind in kinds):
        return f"; {next(WAYS_OUT[kind] for kind in kinds if kind in WAYS_OUT)}"
    if "OwlBnbConfig" in kinds and matches(value, float):
        return f"; pass OwlBnbConfig(bits={value})"
    return "; pass tokenizer=..., texts=..." if hasattr(value, "convert_tokens_to_ids") else ""


def matches(value: Any, hint: Any) -> bool:
    """Whether a value matches an annotation; True if this cannot be determined."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(matches(value, part) for part in inner)
    if origin is Literal:
        # The type only: allowed values are checked by the function's own table.
        return isinstance(value, tuple({type(one) for one in inner}))
    kind = origin or hint
    if not isinstance(kind, type):
        return kind is not None or value is None  # Any, a TypeVar
    if kind is float:
        return (isinstance(value, Real) or hasattr(value, "__index__")) and not isinstance(value, bool)
    if kind is int:
        return hasattr(value, "__index__") and not isinstance(value, bool)
    if kind is tuple and inner and Ellipsis not in inner:
        return _plain(value, tuple) and len(value) == len(inner) and all(map(matches, value, inner))
    if kind is tuple or not issubclass(kind, Iterable) or kind is str or not inner:
        return _plain(value, kind)
    return _collection(value, kind, inner)


def _plain(value: Any, kind: type) -> bool:
    if kind in (list, tuple):
        return isinstance(value, Sequence) and not isinstance(value, (str, bytes))
    try:
        return isinstance(value, kind)
    except TypeError:  # a protocol or a TypedDict, for which isinstance is not supported
        return True


def _collection(value: Any, kind: type, inner: tuple[Any, ...]) -> bool:
    if issubclass(kind, Mapping):
        return isinstance(value, Mapping)
    if isinstance(value, (str, bytes, Mapping)):
        return False  # iterating over characters or keys is never intended
    if issubclass(kind, Sequence):  # tuples and sets are accepted like lists
        if not isinstance(value, (Sequence, set, frozenset)) and not hasattr(value, "__getitem__"):
            return False
    elif not isinstance(value, kind) and not hasattr(value, "__getitem__"):
        return False
    # Elements of iterators are checked when they are read.
    plain = isinstance(value, (list, tuple, set, frozenset, range)) and len(inner) == 1
    return not plain or all(matches(one, inner[0]) for one in value)


def _parts(hint: Any) -> Iterator[Any]:
    if get_origin(hint) in (Union, types.UnionType):
        for part in get_args(hint):
            yield from _parts(part)
    else:
        yield hint


def described(hint: Any) -> str:
    """Description of an annotation for errors."""
    parts = list(dict.fromkeys(_word(part) for part in _parts(hint)))
    if "a path" in parts and "a string" in parts:
        parts.remove("a string")
    return " or ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def _word(hint: Any) -> str:
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(map(str, inner))}"
    kind = origin or hint
    if not isinstance(kind, type):
        return str(hint)
    if kind in CLASSES:
        return CLASSES[kind]
    if issubclass(kind, os.PathLike):
        return CLASSES[os.PathLike]
    if issubclass(kind, Mapping):
        return "a dict"
    if origin is not None and issubclass(kind, Iterable):
        return f"a list of {_plural(inner[0])}" if inner else "a list"
    if kind.__module__ == "collections.abc" and kind.__name__ == "Callable":
        return "a function"
    return NAMED.get(kind.__name__, kind.__name__)


def _plural(hint: Any) -> str:
    names = {int: "integers", float: "numbers", str: "strings"}
    if hint in names:
        return names[hint]
    word = " or ".join(_word(part).removeprefix("a ").removeprefix("an ") for part in _parts(hint))
    return f"{word}{'' if word.endswith('s') else 's'}" if " " not in word else f"({word})"


def shown(value: Any) -> str:
    """A value for an error: its repr if it is a simple value, else its type."""
    if value is None or isinstance(value, (str, bytes, bool, int, float, os.PathLike)):
        told = repr(value)
        return told if len(told) <= LONGEST else f"{told[:LONGEST]}..."
    if isinstance(value, (list, tuple)) and value:
        return f"a {type(value).__name__} of {type(value[0]).__name__}"
    return f"{type(value).__name__}"
