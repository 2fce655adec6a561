"""Command line options of dataclass fields: type, default, choices and help text of each."""

from __future__ import annotations

import argparse
import types
from dataclasses import MISSING, Field
from typing import Any, Literal, Union, get_args, get_origin


def add_field(parser: argparse._ActionsContainer, field: Field[Any], hint: Any) -> None:
    """Adds the option of one field: booleans take no value (see `_add_switch`), lists take several."""
    default = field.default if field.default_factory is MISSING else field.default_factory()
    required = default is MISSING
    told = str(field.metadata.get("help", "")).replace("%", "%%")
    name = "--" + field.name.replace("_", "-")
    kind, several = _kind(hint)
    if kind is bool:
        _add_switch(parser, name, field.name, bool(default), told)
        return
    if told and not required and default not in (None, [], ""):
        told = f"{told} (default: {default})"
    more: dict[str, Any] = {"nargs": field.metadata.get("nargs", "+")} if several else {}
    if kind is not str:  # by which argparse would convert a marked default to a plain string
        more["type"] = kind
    choices = field.metadata.get("choices") or (get_args(hint) if get_origin(hint) is Literal else None)
    parser.add_argument(
        name,
        dest=field.name,
        default=None if required else default,
        required=required,
        choices=None if choices is None else list(choices),
        metavar=field.name.upper(),
        help=told,
        **more,
    )


def _add_switch(parser: argparse._ActionsContainer, name: str, dest: str, default: bool, told: str) -> None:
    """Adds a boolean option: both forms if it is on by default, else the positive form; one text says what on does.

    The negative form of an option that is off by default is accepted, too: it overrides a config file.
    """
    if default:
        both = parser.add_argument(name, dest=dest, action=argparse.BooleanOptionalAction, default=True)
        both.help = told and f"{told} (default: on)"  # argparse would add "(default: True)" itself
        return
    off = f"--no-{name[2:]}"
    parser.add_argument(off, dest=dest, action="store_false", default=False, help=argparse.SUPPRESS)
    # Config files show the help text of the last option with the same name.
    told = told if not told or "default" in told else f"{told} (default: off)"
    parser.add_argument(name, dest=dest, action="store_true", default=False, help=told)


def _kind(hint: Any) -> tuple[type, bool]:
    """(type of one value, whether several are accepted) for `int | None`, `list[str]`, `Literal["a", "b"]`, ..."""
    if get_origin(hint) in (Union, types.UnionType):
        (hint,) = (each for each in get_args(hint) if each is not type(None))
    if get_origin(hint) is list:
        return get_args(hint)[0], True
    if get_origin(hint) is Literal:
        return type(get_args(hint)[0]), False
    return hint, False
