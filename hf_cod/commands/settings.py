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
        """Keeps the spelling with dashes; what is on by default is offered as --no-..., the rest as it is."""
        dashed = [name for name in names if "_" not in name] or [name.replace("_", "-") for name in names]
        default, text = options.get("default"), options.get("help")
        if dashed[0].startswith("--no-"):
            options["help"] = f"switch off: {text}"
        elif default is True:
            options["help"] = SUPPRESS  # it is on already; --no-... switches it off
        elif text and default is not None and default is not False and default != SUPPRESS:
            options["help"] = f"{text} (default: {default})"
        return super().add_argument(*dashed, **options)

    def error(self, message: str) -> NoReturn:
        """An option of several values takes all words behind it, the model's name, too."""
        super().error(message + ("; put it in front of the options" if "are required" in message else ""))

    def parse(self, arguments: Sequence[str]) -> tuple[Any, ...]:
        """One object for each dataclass, then the namespace of the other arguments.

        An unknown option ends the process with the usage, as argparse does, where transformers' parser raises.
        """
        self.parse_args(list(arguments))
        return self.parse_args_into_dataclasses(list(arguments), look_for_args_file=False)


def model_title(model: str) -> str:
    """What to call a model in a report: its Hub id, or the name of its directory or file."""
    path = Path(model).expanduser()
    return path.resolve().name if path.exists() else model


def default_directory(command: str, model: str) -> Path:
    """Where a command's results go if the user names no place."""
    return Path(f"hf-cod-{command}-{re.sub(r'[^A-Za-z0-9.]+', '-', model_title(model)).strip('-.')}")
