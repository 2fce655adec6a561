"""Validation of file contents against dataclasses: types from annotations, ranges and lengths from field metadata.

Metadata of a field that applies to each number in it: `least`, `most`, `choices`, `nan` (whether non-finite numbers are
allowed). Metadata for its length: `one_for_each`, the name of another field with the same number of entries.
"""

from __future__ import annotations

import math
import types
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints, is_typeddict

Record = TypeVar("Record")

SHOWN = 60  # characters of a wrong value that an error shows
# Type -> its name in errors.
_WORDS = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text", type(None): "nothing"}


def limits(
    *,
    least: float | None = None,
    most: float | None = None,
    choices: Collection[Any] | None = None,
    one_for_each: str | None = None,
) -> dict[str, Any]:
    """Field metadata with these limits."""
    told = {"least": least, "most": most, "choices": choices, "one_for_each": one_for_each}
    return {name: value for name, value in told.items() if value is not None}


def brief(value: Any) -> str:
    """A value for an error message: `repr`, cut at `SHOWN` characters."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def read_record(kind: type[Record], content: Any, field: str, extra: bool = False) -> Record:
    """Makes a dataclass instance from parsed JSON.

    Args:
        kind: a dataclass.
        content: name -> value; names with a default may be missing.
        field: the name of the record in errors.
        extra: whether unknown entries are ignored instead of refused.

    Raises:
        ValueError: "field: expected ..., got ...", for unknown or missing entries and values of another type, out of
            range, not finite or of the wrong length; also errors of the dataclass's own checks.
    """
    return kind(**_entries(kind, content, field, extra))


def check_value(value: Any, annotation: Any, name: str, metadata: Mapping[str, Any] | None = None) -> Any:
    """Checks a value against a type annotation; returns it, with ints converted to floats where floats are expected.

    Supports None, bool, int, float, str, list, tuple, dict, Literal, Any, their unions, TypedDicts and dataclasses.

    Raises:
        ValueError: the value does not match; begins with `name` and the position inside it.
    """
    limited = metadata or {}
    if annotation is Any:
        return value
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        return _one_of(value, get_args(annotation), name, limited)
    if is_typeddict(annotation) or is_dataclass(annotation):
        return _nested(value, annotation, name, limited)
    if origin is Literal:
        limited, annotation = {"choices": get_args(annotation)}, str
    if origin in (list, Sequence):
        if not isinstance(value, list | tuple):
            raise _wrong(name, "a list", value)
        (inner,) = get_args(annotation)
        return [check_value(item, inner, f"{name}[{place}]", limited) for place, item in enumerate(value)]
    if origin is tuple:
        return _tuple(value, get_args(annotation), name, limited)
    if origin is dict:
        if not isinstance(value, dict):
            raise _wrong(name, "named entries", value)
        _check_names(value, name)
        inner = get_args(annotation)[1]
        return {key: check_value(item, inner, f"{name}[{brief(key)}]", limited) for key, item in value.items()}
    return _plain(value, annotation, name, limited)


def check_fields(record: Any) -> None:
    """Checks the fields of a dataclass instance against their annotations and metadata.

    Raises:
        ValueError: a field does not match.
    """
    hints = _hints(cast(Any, type(record)))
    for entry in fields(record):
        check_value(getattr(record, entry.name), hints[entry.name], entry.name, entry.metadata)


def check_known(kind: Any, content: Mapping[str, Any], field: str, advice: str) -> None:
    """Checks that all entries are fields of a dataclass.

    Raises:
        ValueError: there are unknown entries; ends with `advice`.
    """
    known = {entry.name for entry in fields(kind)}
    unknown = sorted(set(content) - known)
    if unknown:
        raise ValueError(f"{field}: expected {', '.join(sorted(known))}, got {brief(', '.join(unknown))}; {advice}")


@cache
def _hints(kind: Hashable) -> dict[str, Any]:
    return get_type_hints(cast(Any, kind))


def _entries(kind: Any, content: Any, field: str, extra: bool) -> dict[str, Any]:
    """Checked constructor arguments of a record from parsed JSON."""
    if not isinstance(content, dict):
        raise _wrong(field, "named entries", content)
    entries = {entry.name: entry for entry in fields(kind) if entry.init}
    needed = {name for name, e in entries.items() if e.default is MISSING and e.default_factory is MISSING}
    _check_keys(content, entries, needed, field, extra)
    hints = _hints(kind)
    found = {
        name: check_value(content[name], hints[name], name, entry.metadata)
        for name, entry in entries.items()
        if name in content
    }
    _check_lengths({name: entry.metadata for name, entry in entries.items()}, found)
    return found


def _check_keys(content: dict[str, Any], known: Iterable[str], needed: set[str], field: str, extra: bool) -> None:
    unknown = [] if extra else [name for name in content if name not in known]
    missing = [name for name in known if name in needed and name not in content]
    if unknown or missing:
        got = brief(unknown[0]) if unknown else f"no {missing[0]}"
        raise ValueError(f"{field}: expected {', '.join(known)}, got {got}")


def _check_lengths(told: Mapping[str, Mapping[str, Any]], found: Mapping[str, Any]) -> None:
    for name, metadata in told.items():
        other = metadata.get("one_for_each")
        if other is None or found.get(name) is None or found.get(other) is None:
            continue
        if len(found[name]) != len(found[other]):
            raise ValueError(f"{name}: expected {len(found[other])} entries, as {other} has, got {len(found[name])}")


def _one_of(value: Any, options: tuple[Any, ...], name: str, metadata: Mapping[str, Any]) -> Any:
    if value is None and type(None) in options:
        return None
    rest = [option for option in options if option is not type(None)]
    for option in rest[:-1]:
        try:
            return check_value(value, option, name, metadata)
        except ValueError:
            continue
    return check_value(value, rest[-1], name, metadata)


def _nested(value: Any, kind: Any, name: str, metadata: Mapping[str, Any]) -> Any:
    if is_dataclass(kind):
        if isinstance(value, cast(type, kind)):
            return value
        return read_record(cast(Any, kind), value, name)
    if not isinstance(value, dict):
        raise _wrong(name, "named entries", value)
    hints = _hints(kind)
    _check_keys(value, hints, set(kind.__required_keys__), name, extra=False)
    return {key: check_value(item, hints[key], f"{name}.{key}", metadata) for key, item in value.items()}


def _tuple(value: Any, kinds: tuple[Any, ...], name: str, metadata: Mapping[str, Any]) -> Any:
    if not isinstance(value, list | tuple) or len(value) != len(kinds):
        raise _wrong(name, f"a list of {len(kinds)}", value)
    return type(value)(check_value(item, kinds[i], f"{name}[{i}]", metadata) for i, item in enumerate(value))


def _check_names(value: dict[Any, Any], name: str) -> None:
    """Checks that keys are names (of modules, measures or settings) and not paths, which could be malicious."""
    for key in value:
        if not isinstance(key, str) or not key:
            raise _wrong(name, "names", key)
        if is_path(key):
            raise ValueError(f"{name}: expected names, got {brief(key)}, which is a path")


def is_path(name: str) -> bool:
    """Whether a name, used in a file name, would lead out of its directory or cut the file name short (NUL)."""
    return name.startswith(("/", "\\", "~")) or ".." in name.replace("\\", "/").split("/") or "\0" in name


def _plain(value: Any, kind: Any, name: str, metadata: Mapping[str, Any]) -> Any:
    expected = _expected(kind, metadata)
    if kind is float:
        if type(value) not in (int, float):
            raise _wrong(name, expected, value)
        try:
            value = float(value)
        except OverflowError as error:
            raise _wrong(name, expected, value) from error
        if not math.isfinite(value) and not metadata.get("nan"):
            raise _wrong(name, expected, value)
    elif type(value) is not kind:
        raise _wrong(name, expected, value)
    choices, least, most = (metadata.get(key) for key in ("choices", "least", "most"))
    if choices is not None and value not in choices:
        raise _wrong(name, expected, value)
    if kind in (int, float) and ((least is not None and value < least) or (most is not None and value > most)):
        raise _wrong(name, expected, value)
    return value


def _expected(kind: Any, metadata: Mapping[str, Any]) -> str:
    """Description of the expected plain value, for errors."""
    if metadata.get("choices") is not None:
        return "one of " + ", ".join(map(str, metadata["choices"]))
    word = _WORDS.get(kind) or str(getattr(kind, "__name__", kind))
    least, most = metadata.get("least"), metadata.get("most")
    if kind not in (int, float) or (least is None and most is None):
        return word
    if most is None:
        return f"{word} of at least {least:g}"
    return f"{word} up to {most:g}" if least is None else f"{word} in {least:g}..{most:g}"


def _wrong(name: str, expected: str, got: Any) -> ValueError:
    return ValueError(f"{name}: expected {expected}, got {brief(got)}")
