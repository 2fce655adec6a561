"""Choice of matrices by name: the settings `include` and `exclude`, with the rules of PEFT's `target_modules`.

A list holds names: a matrix matches if its name is one of them, or ends in "." and one of them. A string is a regular
expression that must match the whole name (`re.fullmatch`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, TypedDict

from hf_cod.io.arguments import checked

Names = str | list[str] | None

_RULE = "names (down_proj matches each name that ends in .down_proj), or one regular expression for the whole name"
FIELDS = ("include", "exclude")
# Settings that earlier versions did not write.
NEWER = (*FIELDS, "chat_template", "experts")


@checked
@dataclass
class ModuleSettings:
    """The matrices of the layers that a function changes."""

    include: str | list[str] | None = field(
        default=None, metadata={"help": f"matrices of the layers to change: {_RULE}; default: all"}
    )
    exclude: str | list[str] | None = field(
        default=None,
        metadata={"help": f"matrices to leave unchanged, even if --include matches them: {_RULE}; default: none"},
    )

    def __post_init__(self) -> None:
        check_names(self)


class ModuleFields(TypedDict, total=False):
    """Fields of `ModuleSettings` that functions take by name."""

    include: str | list[str] | None
    exclude: str | list[str] | None


def check_names(settings: Any) -> None:
    """Checks `include` and `exclude` of a settings object; for the `__post_init__` of its class.

    A list of one string that cannot be a name, as the command line passes an expression, becomes that string. An empty
    list to exclude becomes None.

    Raises:
        ValueError: an empty list to include, an empty string, or an invalid regular expression.
    """
    for name in FIELDS:
        given = getattr(settings, name)
        if given is None:
            continue
        given = given if isinstance(given, str) else [*given]
        if isinstance(given, list) and len(given) == 1 and not re.fullmatch(r"[\w.-]*", given[0]):
            given = given[0]
        if name == "exclude" and given == []:
            given = None
        elif name == "include" and given == []:
            raise ValueError("include: expected at least one name, got [], which selects no matrix; None selects all")
        elif not given or (isinstance(given, list) and "" in given):
            raise ValueError(f"{name}: expected {_RULE}, got {given!r}")
        if isinstance(given, str):
            _compiled(name, given)
        setattr(settings, name, given)


def given_names(settings: Any) -> dict[str, Any]:
    """Those of `include` and `exclude` that a user set, for reports and fingerprints."""
    return {name: getattr(settings, name) for name in FIELDS if getattr(settings, name) is not None}


def without_unset(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without unset ones of `NEWER`, so that runs of an earlier version have the same identity."""
    return {name: value for name, value in settings.items() if name not in NEWER or value is not None}


def matching(field_name: str, given: str | list[str], names: Mapping[str, Collection[str]]) -> set[str]:
    """The matrices that names or an expression match.

    Args:
        field_name: "include" or "exclude", for errors.
        given: names, or a regular expression.
        names: matrix -> the names that it can be called by.

    Raises:
        ValueError: a name, or the expression, matches no matrix; gives the nearest known names.
    """
    found: set[str] = set()
    for pattern in [given] if isinstance(given, str) else given:
        expression = _compiled(field_name, given) if isinstance(given, str) else _of_name(pattern)
        hits = {name for name, called in names.items() if any(expression.fullmatch(one) for one in called)}
        if not hits:
            raise ValueError(_no_match(field_name, pattern, names, isinstance(given, str)))
        found |= hits
    return found


def _compiled(field_name: str, text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise ValueError(f"{field_name}: expected a regular expression, got {text!r}: {error}") from error


def _of_name(name: str) -> re.Pattern[str]:
    return re.compile(rf"(?:.*\.)?{re.escape(name)}")


def _no_match(field_name: str, pattern: str, names: Iterable[str], whole: bool) -> str:
    known = [*names]
    ends = list(dict.fromkeys(name.rpartition(".")[2] for name in known))
    word = re.sub(r"[^\w.]|^\.|\.$", "", pattern)
    near = get_close_matches(word, known, 3) or get_close_matches(word.rpartition(".")[2], ends, 3) or ends[:8]
    told = f"{field_name}: expected names of the layers' matrices, such as {', '.join(near)}, got {pattern!r}"
    if whole and any(_of_name(pattern).fullmatch(name) for name in known):
        return f"{told}, which as a regular expression must match whole names; pass the list [{pattern!r}]"
    if whole or re.fullmatch(r"[\w.-]*", pattern):
        return f"{told}, which matches none"
    return f"{told}, which matches none: a list holds names; join expressions by | to one"
