"""What public functions are given, checked as they are called: names that there are, and values of the right kind.

A mistake is reported in one line, "field: expected ..., got ...", before anything is loaded or measured. The signature
says what is expected: `checked` reads the annotations, so that nothing is written twice.
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

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

# Class -> what errors call it, and the way to one.
CLASSES = {
    bool: "True or False",
    int: "an integer",
    float: "a number",
    str: "a string",
    type(None): "None",
    os.PathLike: "a path",
}
# Names of classes of torch, which this file need not import.
NAMED = {"Module": "a loaded model", "PreTrainedModel": "a loaded transformers model", "Tensor": "a tensor"}
WAYS_OUT = {
    "Module": "load it by from_pretrained of an Auto class",
    "PreTrainedModel": "load it by from_pretrained of an Auto class",
}
# Arguments that take a settings object; its defaults are those of the fields by name.
HOLDERS = ("settings", "config", "how")
# What is said of a value is not longer than this.
LONGEST = 80


def checked(thing: Decorated) -> Decorated:
    """Lets a function, or the constructor of a class, check its arguments by their annotations when it is called.

    What `**fields: Unpack[...]` takes is checked alike, and stands in the signature by name. An annotation
    `Annotated[..., check]` has a check of its own, which raises what it has to say. A field with "alone" in its
    metadata is a list of which one string may be given alone.

    Raises:
        ValueError: in a call with an unknown name (says the nearest one) or a value of another kind.
    """
    if isinstance(thing, type):
        constructed: Any = thing
        constructed.__init__ = _checking(constructed.__init__, thing.__name__, thing if is_dataclass(thing) else None)
        return cast(Decorated, thing)
    title = thing.__qualname__.removesuffix(".__init__").rpartition(".<locals>.")[2]
    return cast(Decorated, _checking(thing, title, None))


def _checking(function: Callable[..., Any], title: str, owner: type | None) -> Callable[..., Any]:
    signature = _opened(function)
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
        except TypeError:  # one is missing, or given twice: Python's own words are the best
            return function(*arguments, **options)
        for name, value in bound.items():
            default = signature.parameters[name].default
            if name in hints() and value is not default and not (name in alone() and isinstance(value, str)):
                check_value(name, value, hints()[name])
        return function(*arguments, **options)

    with_checks.__signature__ = signature  # type: ignore[attr-defined]
    return with_checks


def _opened(function: Callable[..., Any]) -> inspect.Signature:
    """The signature, with the fields of `**fields: Unpack[...]` by name in its place."""
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
    """The fields of the dataclass that a function takes its settings as; none where it takes no such object."""
    for name, parameter in inspect.signature(function).parameters.items():
        if name in HOLDERS:
            kinds = [part for part in _parts(_evaluated(function, parameter.annotation)) if is_dataclass(part)]
            return {f.name: f for kind in kinds for f in fields(kind) if f.init}
    return {}


def check_names(title: str, given: Iterable[str], signature: inspect.Signature, names: Sequence[str]) -> None:
    """Makes sure that a function has arguments of all those names; errors list them in the order of `names`.

    Raises:
        ValueError: it lacks one; says which there are, and the nearest.
    """
    parameters = signature.parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    unknown = next((name for name in given if name not in parameters), None)
    if unknown is not None:
        raise ValueError(unknown_name(title, unknown, [name for name in names if name != "self"]))


def unknown_name(title: str, unknown: str, names: Collection[str]) -> str:
    """The sentence for a name that a function does not have."""
    near = get_close_matches(unknown, names, 1)
    told = f"; did you mean {near[0]}?" if near else ""
    return f"{title}: expected one of {', '.join(names)}, got {unknown!r}{told}"


def check_value(name: str, value: Any, hint: Any) -> None:
    """Makes sure that a value is what an annotation says.

    Raises:
        ValueError: it is of another kind.
    """
    own = [check for part in _parts(hint) if get_origin(part) is Annotated for check in part.__metadata__]
    for check in own:
        if value is not None:
            check(value)
    if not own and not matches(value, hint):
        ways = [WAYS_OUT[part.__name__] for part in _parts(hint) if getattr(part, "__name__", "") in WAYS_OUT]
        told = f"; {ways[0]}" if ways else ""
        raise ValueError(f"{name}: expected {described(hint)}, got {shown(value)}{told}")


def matches(value: Any, hint: Any) -> bool:
    """Whether a value is what an annotation says; what cannot be told passes."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(matches(value, part) for part in inner)
    if origin is Literal:
        return isinstance(value, tuple({type(one) for one in inner}))  # the function's own table says which there are
    kind = origin or hint
    if not isinstance(kind, type):
        return kind is not None or value is None  # Any, a TypeVar
    if kind is float:
        return (isinstance(value, Real) or hasattr(value, "__index__")) and not isinstance(value, bool)
    if kind is int:
        return hasattr(value, "__index__") and not isinstance(value, bool)
    if kind is tuple or not issubclass(kind, Iterable) or kind is str or not inner:
        return _plain(value, kind)
    return _collection(value, kind, inner)


def _plain(value: Any, kind: type) -> bool:
    if kind in (list, tuple):
        return isinstance(value, Sequence) and not isinstance(value, (str, bytes))
    try:
        return isinstance(value, kind)
    except TypeError:  # a protocol or a TypedDict, which no value can be tried for
        return True


def _collection(value: Any, kind: type, inner: tuple[Any, ...]) -> bool:
    if issubclass(kind, Mapping):
        return isinstance(value, Mapping)
    if isinstance(value, (str, bytes, Mapping)):
        return False  # letters, or keys, are never meant one by one
    if issubclass(kind, Sequence):  # a tuple or a set is as good as a list
        if not isinstance(value, (Sequence, set, frozenset)) and not hasattr(value, "__getitem__"):
            return False
    elif not isinstance(value, kind) and not hasattr(value, "__getitem__"):
        return False
    if not issubclass(kind, Collection):
        return True  # what is read one by one is checked so
    plain = isinstance(value, (list, tuple, set, frozenset, range)) and len(inner) == 1
    return not plain or all(matches(one, inner[0]) for one in value)


def _parts(hint: Any) -> Iterator[Any]:
    if get_origin(hint) in (Union, types.UnionType):
        for part in get_args(hint):
            yield from _parts(part)
    else:
        yield hint


def described(hint: Any) -> str:
    """What errors say an annotation expects."""
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
    return f"{word}s" if word.isidentifier() or " " not in word else f"({word})"


def shown(value: Any) -> str:
    """A value in an error: itself where it is short, else of which kind it is."""
    if value is None or isinstance(value, (str, bytes, bool, int, float, os.PathLike)):
        told = repr(value)
        return told if len(told) <= LONGEST else f"{told[:LONGEST]}..."
    if isinstance(value, (list, tuple)) and value:
        return f"a {type(value).__name__} of {type(value[0]).__name__}"
    return f"{type(value).__name__}"
