"""Command line options from dataclass fields by argparse, with help texts from field metadata; YAML config files.

Imports only the standard library and modules that import nothing else, so that `hf-cod COMMAND --help` is fast.
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

from hf_cod.cli.field_options import add_field
from hf_cod.cli.option_groups import FIRST, group_of, in_order
from hf_cod.cli.option_names import ALIASES, ELSEWHERE, RENAMED
from hf_cod.io.arguments import did_you_mean, unknown_name
from hf_cod.io.deprecation import warn_renamed
from hf_cod.io.inputs import check_inputs
from hf_cod.io.reading import naming_file, read_yaml

# Type of an option's value -> its name in errors.
_TYPES: dict[Any, str] = {int: "a whole number", float: "a number"}
# Options of every command that are not part of a config file.
_COMMON = ("help", "config", "print_config", "quiet", "debug")


class SettingsParser(argparse.ArgumentParser):
    """A parser with one option per dataclass field, written with dashes (underscores are accepted, too).

    Help lists the options in the groups of `option_groups`, below a usage line that has required arguments only.

    Every command also takes `--config FILE` (YAML, option names as keys; the command line wins), `--print-config`
    (prints such a file and exits), `--quiet` and `--debug`.

    Args:
        settings: dataclasses; the metadata of a field has "help" and, optionally, "choices" and "nargs".
        **options: options of `argparse.ArgumentParser`.
    """

    def __init__(self, settings: Sequence[type] = (), **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)
        self.settings = list(settings)
        hints = {name: hint for each in self.settings for name, hint in get_type_hints(each).items()}
        settable = [found for each in self.settings for found in fields(each) if found.init]
        groups: dict[str, Any] = {FIRST: self}
        for found in sorted(settable, key=lambda found: in_order(found.name)):
            title = group_of(found.name)
            if title not in groups:
                groups[title] = self.add_argument_group(title)
            add_field(groups[title], found, hints[found.name])
        common = self.add_argument_group("common options")
        common.add_argument("--config", metavar="FILE", help="YAML file of options; the command line takes precedence")
        common.add_argument("--print-config", action="store_true", help="print all options as a YAML file, and exit")
        common.add_argument(
            "--quiet", action="store_true", help="print warnings and errors only: no progress bars, no tables"
        )
        common.add_argument("--debug", action="store_true", help="also print the traceback of an error")

    def add_model(self, name: str = "model") -> None:
        """Adds the positional argument of the model that a command reads."""
        self.add_argument(name, help="Hub id, directory, or GGUF file")

    def format_usage(self) -> str:
        """A line with the required arguments; the help text lists the options in groups below it."""
        if self.usage is not None:
            return super().format_usage()
        formatter = self.formatter_class(prog=f"{self.prog} [options]")
        formatter.add_usage(None, [each for each in self._actions if each.required or not each.option_strings], [])
        return formatter.format_help()

    def format_help(self) -> str:
        """The help text."""
        usage = self.usage
        try:
            self.usage = self.format_usage().removeprefix("usage: ").strip()
            return super().format_help()
        finally:
            self.usage = usage

    def error(self, message: str) -> NoReturn:
        """Prints one line and exits with status 2.

        If a positional is missing, a hint is added: an option with several values consumes all words after it.
        """
        positional = "are required" in message and "--" not in message
        hint = "; put it before the options" if positional else ""
        self.exit(2, f"{self.prog}: error: {message}{hint}\n")

    def parse(self, arguments: Sequence[str], inputs: bool = True) -> tuple[Any, ...]:
        """Returns one object per dataclass, then the namespace of all arguments; options and positionals may be mixed.

        A leading ~ is expanded to the home directory, also in config files and after `--output=`, where shells do not
        expand it.

        Args:
            arguments: the words of the command line after the command.
            inputs: whether the paths of inputs are checked, before torch is imported for reading them.

        Raises:
            ValueError: a setting is out of range, or empty (such as "$OUT" where it is not set), a config file has
                unknown or invalid entries, or the path of an input does not exist.
            SystemExit: an unknown option (status 2), `--help` or `--print-config` (0).
        """
        spelled = [self._spelled(argument) for argument in arguments]
        early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        early.add_argument("--config")
        early.add_argument("--print-config", action="store_true")
        known, _ = early.parse_known_args(spelled)
        may_be_empty = [name for name, action in self._options().items() if action.default == ""]
        if known.config is not None:
            self._read(Path(_in_home(known.config)))
        if known.print_config:
            for action in self._options().values():
                _make_optional(action)
        found, unknown = self.parse_known_intermixed_args(spelled)
        if unknown:
            words = [word.lstrip("-").partition("=")[0] for word in unknown if word.startswith("-")]
            options = [f"--{word.replace('_', '-')}" for word in words]
            known_options = [name for name in self._option_string_actions if name.startswith("--")]
            meant = [ELSEWHERE[each] if ELSEWHERE.get(each) in known_options else each for each in options]
            near = did_you_mean(meant, known_options)
            self.error(f"unrecognized arguments: {' '.join(unknown)}{near and '; ' + near}")
        if known.print_config:
            print(self._as_config(found))
            self.exit()
        for name, value in vars(found).items():
            if name not in may_be_empty and "" in (value if isinstance(value, list) else [value]):
                raise ValueError(f"{name}: expected a value, got an empty one")
            setattr(found, name, _in_home(value))
        if inputs:  # before the settings, of which some import torch to check their values
            check_inputs(vars(found))
        made = [each(**{f.name: getattr(found, f.name) for f in fields(each) if f.init}) for each in self.settings]
        return *made, found

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Checks choices; the error has the same form as that of a setting.

        Raises:
            ValueError: the value is not one of the choices.
        """
        if action.choices is not None and value not in action.choices:
            raise ValueError(unknown_name(action.dest, value, [*action.choices]))

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

    def _spelled(self, argument: str) -> str:
        """An option with its current name, with dashes: `--learning_rate=1` becomes `--learning-rate=1`."""
        if not argument.startswith("--") or argument == "--":
            return argument
        name, equals, value = argument.partition("=")
        name = name.replace("_", "-")
        current = self._current(name)
        if current != name:
            warn_renamed("option", name, current)
        return ALIASES.get(current, current) + equals + value

    def _current(self, option: str) -> str:
        """The current name of an option of an earlier version; other options are returned as they are."""
        known, new = self._option_string_actions, RENAMED.get(option, option)
        return new if new in known and option not in known else option

    def current_names(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Settings in a report of an earlier version by their current names."""
        current = {name: self._current("--" + name.replace("_", "-"))[2:].replace("-", "_") for name in values}
        return {current[name] if current[name] not in values else name: value for name, value in values.items()}

    def _read(self, path: Path) -> None:
        """Reads a config file; its values become the defaults."""
        content = read_yaml(path, "config") or {}
        with naming_file(path):
            self._take(content)

    def _take(self, content: Any) -> None:
        """Takes the content of a config file as defaults."""
        if not isinstance(content, Mapping):
            raise ValueError(f"config: expected option names with values, got {content!r}")
        options, seen = self._options(), set()
        for key, value in content.items():
            name = self._spelled(f"--{key}")[2:].replace("-", "_")
            if name not in options:
                near = did_you_mean([name], [other for other, action in options.items() if action.option_strings])
                expected = f"{near} expected an option" if near else f"expected one of {', '.join(options)}"
                raise ValueError(f"config: {expected}, got {key!r}")
            if name in seen:
                raise ValueError(f"config: expected each option once, got {key!r} twice")
            seen.add(name)
            read = _converted(options[name], value, str(key))
            # The same value as the default is not one that a user set: `--print-config` writes all options. Without
            # words a positional argument of several is empty, too.
            if read != options[name].default and (read != [] or options[name].option_strings):
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
        action.nargs = "*" if action.nargs in ("+", "*") else "?"


def _in_home(value: Any) -> Any:
    """A value, or each value of a list, with a leading ~ expanded; only paths begin with ~."""
    if isinstance(value, list):
        return [_in_home(each) for each in value]
    return os.path.expanduser(value) if isinstance(value, str) else value


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
            raise ValueError(f"{key}: expected {_TYPES.get(kind, kind.__name__)}, got {each!r}") from None
        if action.choices is not None and read[-1] not in action.choices:
            raise ValueError(unknown_name(key, each, [*action.choices]))
    return read if several else read[0]


def model_title(model: str) -> str:
    """The name of a model in reports: its Hub id, or the name of its directory or file."""
    path = Path(model).expanduser()
    return path.resolve().name if path.exists() else model


def default_directory(command: str, model: str) -> Path:
    """The default output directory of a command."""
    return Path(f"hf-cod-{command}-{re.sub(r'[^A-Za-z0-9.]+', '-', model_title(model)).strip('-.')}")
