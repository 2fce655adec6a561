"""Settings from the command line: the dataclasses that hold them, as options; and where results go by default."""

from __future__ import annotations

import re
from argparse import SUPPRESS, HelpFormatter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, cast

from transformers import HfArgumentParser


class SettingsParser(HfArgumentParser):
    """transformers' parser of dataclasses with one spelling an option, and defaults named where there are some."""

    def __init__(self, dataclasses: Sequence[type], **options: Any) -> None:
        super().__init__(cast(Any, list(dataclasses)), formatter_class=HelpFormatter, **options)

    def add_argument(self, *names: str, **options: Any) -> Any:
        """Keeps the spelling with dashes; booleans take no value, and one that is on is offered as --no-... alone."""
        dashed = [name for name in names if "_" not in name] or [name.replace("_", "-") for name in names]
        default, text = options.get("default"), options.get("help")
        if options.get("nargs") == "?" and options.get("const") is True:
            # As transformers has it, the option would take the word behind it, the model's name, for its value.
            options = {"action": "store_true", "default": default, "help": text}
        if dashed[0].startswith("--no-"):
            options["help"] = f"without this option: {text}"
        elif default is True:
            options["help"] = SUPPRESS  # it is on already; --no-... switches it off
        elif text and default is not None and default is not False and default not in ([], SUPPRESS):
            options["help"] = f"{text} (default: {default})"
        return super().add_argument(*dashed, **options)

    def error(self, message: str) -> NoReturn:
        """An option of several values takes all words behind it, the model's name, too."""
        positional = "are required" in message and "--" not in message
        super().error(message + ("; put it in front of the options" if positional else ""))

    def parse(self, arguments: Sequence[str]) -> tuple[Any, ...]:
        """One object for each dataclass, then the namespace of all arguments.

        Options may stand between the other arguments. An unknown one ends the process with the usage, as argparse does,
        where transformers' parser raises.
        """
        found = self.parse_intermixed_args(list(arguments))
        return *self.parse_dict(vars(found), allow_extra_keys=True), found


def model_title(model: str) -> str:
    """What to call a model in a report: its Hub id, or the name of its directory or file."""
    path = Path(model).expanduser()
    return path.resolve().name if path.exists() else model


def default_directory(command: str, model: str) -> Path:
    """Where a command's results go if the user names no place."""
    return Path(f"hf-cod-{command}-{re.sub(r'[^A-Za-z0-9.]+', '-', model_title(model)).strip('-.')}")
