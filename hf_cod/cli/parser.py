"""Command line options from dataclass fields by argparse, with help texts from field metadata; YAML config files.

Imports only the standard library and modules that import nothing else, so that `hf-cod COMMAND --help` is fast.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from hf_cod.io.arguments import did_you_mean
from hf_cod.io.deprecation import warn_renamed
from hf_cod.io.reading import read_yaml

# Option name in other tools -> name in hf-cod.
ALIASES = {"--output-dir": "--output"}
# Option name in an earlier version -> current name; accepted for one release, with a warning.
RENAMED = {"--multiple": "--channel-multiple", "--parameters": "--parameter-share"}
# Type of an option's value -> its name in errors.
_TYPES: dict[Any, str] = {int: "a whole number", float: "a number"}
# Options of every command that are not part of a config file.
_COMMON = ("help", "config", "print_config", "quiet", "debug")


class SettingsParser(argparse.ArgumentParser):
    """A parser with one option per dataclass field, written with dashes (underscores are accepted, too).

    Every command also takes `--config FILE` (YAML, option names as keys; the command line wins), `--print-config`
    (prints such a file and exits), `--quiet` and `--debug`.

    Args:
        settings: dataclasses; the metadata of a field has "help" and, optionally, "choices" and "nargs".
        **options: options of `argparse.ArgumentParser`.
    """

    def __init__(self, settings: Sequence[type] = (), **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)
        self.settings = list(settings)
        for each in self.settings:
            hints = get_type_hints(each)
            for found in fields(each):
                if found.init:
                    _add_field(self, found, hints[found.name])
        common = self.add_argument_group("common options")
        common.add_argument("--config", metavar="FILE", help="YAML file of options; the command line takes precedence")
        common.add_argument("--print-config", action="store_true", help="print all options as a YAML file, and exit")
        common.add_argument(
            "--quiet", action="store_true", help="print warnings and errors only: no progress bars, no tables"
        )
        common.add_argument("--debug", action="store_true", help="also print the traceback of an error")

    def error(self, message: str) -> NoReturn:
        """Prints one line and exits with status 2.

        If a positional is missing, a hint is added: an option with several values consumes all words after it.
        """
        positional = "are required" in message and "--" not in message
        hint = "; put it before the options" if positional else ""
        self.exit(2, f"{self.prog}: error: {message}{hint}\n")

    def parse(self, arguments: Sequence[str]) -> tuple[Any, ...]:
        """Returns one object per dataclass, then the namespace of all arguments; options and positionals may be mixed.

        A leading ~ is expanded to the home directory, also in config files and after `--output=`, where shells do not
        expand it.

        Raises:
            ValueError: a setting is out of range, or a config file has unknown or invalid entries.
            SystemExit: an unknown option (status 2), `--help` or `--print-config` (0).
        """
        spelled = [_spelled(argument) for argument in arguments]
        early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        early.add_argument("--config")
        early.add_argument("--print-config", action="store_true")
        known, _ = early.parse_known_args(spelled)
        if known.config is not None:
            self._read(Path(_in_home(known.config)))
        if known.print_config:
            for action in self._options().values():
                _make_optional(action)
        found, unknown = self.parse_known_intermixed_args(spelled)
        if unknown:
            options = [f"--{word.lstrip('-').partition('=')[0]}" for word in unknown if word.startswith("-")]
            known_options = [name for name in self._option_string_actions if name.startswith("--")]
            self.error(f"unrecognized arguments: {' '.join(unknown)}{did_you_mean(options, known_options)}")
        if known.print_config:
            print(self._as_config(found))
            self.exit()
        for name, value in vars(found).items():
            setattr(found, name, _in_home(value))
        made = [each(**{f.name: getattr(found, f.name) for f in fields(each) if f.init}) for each in self.settings]
        return *made, found

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Checks choices; the error has the same form as that of a setting.

        Raises:
            ValueError: the value is not one of the choices.
        """
        if action.choices is not None and value not in action.choices:
            raise ValueError(f"{action.dest}: expected one of {', '.join(map(str, action.choices))}, got {value!r}")

    def _get_value(self, action: argparse.Action, text: str) -> Any:
        """Converts a value; the error has the same form as that of a setting.

        Raises:
            ValueError: the value is not a number where one is expected.
        """
        try:
            return super()._get_value(action, text)
        except argparse.ArgumentError as error:
            if action.type not in _TYPES:
                raise
            raise ValueError(f"{action.dest}: expected {_TYPES[action.type]}, got {text!r}") from error

    def _options(self) -> dict[str, argparse.Action]:
        """Name in a config file -> argparse action of the option or positional argument."""
        return {action.dest: action for action in self._actions if action.dest not in _COMMON}

    def _read(self, path: Path) -> None:
        """Reads a config file; its values become the defaults."""
        content = read_yaml(path, "config") or {}
        if not isinstance(content, Mapping):
            raise ValueError(f"config: expected option names with values, got {content!r} in {str(path)!r}")
        options, seen = self._options(), set()
        for key, value in content.items():
            name = _spelled(f"--{key}")[2:].replace("-", "_")
            if name not in options:
                told = did_you_mean([name], options)
                raise ValueError(f"config: expected one of {', '.join(options)}, got {key!r} in {str(path)!r}{told}")
            if name in seen:
                raise ValueError(f"config: expected each option once, got {key!r} twice in {str(path)!r}")
            seen.add(name)
            read = _converted(options[name], value, str(key))
            # The same value as the default is not one that a user set: `--print-config` writes all options.
            if read != options[name].default:
                self.set_defaults(**{name: read})
            if value is not None:
                _make_optional(options[name])

    def words(self, values: Mapping[str, Any]) -> list[str]:
        """Command line arguments for these values: positionals, then options whose values differ from the default."""
        positional: list[str] = []
        options: list[str] = []
        for name, action in self._options().items():
            value = values.get(name)
            if value is None or value == [] or value == action.default:
                continue
            several = value if isinstance(value, list) else [] if isinstance(value, bool) else [value]
            if action.option_strings:
                # The last form of an option that is on by default is the negative one.
                options.append(action.option_strings[-1 if value is False else 0])
            (options if action.option_strings else positional).extend(map(str, several))
        return [*positional, *options]

    def _as_config(self, found: argparse.Namespace) -> str:
        """The options as YAML, each preceded by its help text as a comment."""
        lines = [f"# {self.prog}"]
        for name, action in self._options().items():
            told = "" if action.help in (None, argparse.SUPPRESS) else str(action.help).replace("%%", "%")
            lines += ["", *([f"# {told}"] if told else [])]
            lines.append(f"{name}: {json.dumps(getattr(found, name))}")  # JSON is valid YAML
        return "\n".join(lines)


def _make_optional(action: argparse.Action) -> None:
    """Makes an argument optional on the command line."""
    action.required = False
    if not action.option_strings:
        action.nargs = "*" if action.nargs == "+" else "?"


def _in_home(value: Any) -> Any:
    """A value, or each value of a list, with a leading ~ expanded; only paths begin with ~."""
    if isinstance(value, list):
        return [_in_home(each) for each in value]
    return os.path.expanduser(value) if isinstance(value, str) else value


def _spelled(argument: str) -> str:
    """An option with its current name, with dashes: `--learning_rate=1` becomes `--learning-rate=1`."""
    if not argument.startswith("--") or argument == "--":
        return argument
    name, equals, value = argument.partition("=")
    name = name.replace("_", "-")
    if name in RENAMED:
        warn_renamed("option", name, RENAMED[name])
        name = RENAMED[name]
    return ALIASES.get(name, name) + equals + value


def _add_field(parser: argparse.ArgumentParser, field: Field[Any], hint: Any) -> None:
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


def _add_switch(parser: argparse.ArgumentParser, name: str, dest: str, default: bool, told: str) -> None:
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


def _converted(action: argparse.Action, value: Any, key: str) -> Any:
    """A value of a config file, converted as on the command line.

    Raises:
        ValueError: the value has another type or is not one of the choices.
    """
    if value is None and action.default is None:
        return None
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ValueError(f"{key}: expected true or false, got {value!r}")
        return value
    several = action.nargs in ("+", "*")
    if several != isinstance(value, list):
        raise ValueError(f"{key}: expected {'a list' if several else 'one value'}, got {value!r}")
    kind: Any = action.type or str
    read = []
    for each in value if several else [value]:
        try:
            if isinstance(each, (bool, dict, list)):
                raise ValueError
            read.append(kind(each) if kind is str else kind(str(each)))
        except ValueError:
            raise ValueError(f"{key}: expected {kind.__name__}, got {each!r}") from None
        if action.choices is not None and read[-1] not in action.choices:
            raise ValueError(f"{key}: expected one of {', '.join(map(str, action.choices))}, got {each!r}")
    return read if several else read[0]


def model_title(model: str) -> str:
    """The name of a model in reports: its Hub id, or the name of its directory or file."""
    path = Path(model).expanduser()
    return path.resolve().name if path.exists() else model


def default_directory(command: str, model: str) -> Path:
    """The default output directory of a command."""
    return Path(f"hf-cod-{command}-{re.sub(r'[^A-Za-z0-9.]+', '-', model_title(model)).strip('-.')}")
