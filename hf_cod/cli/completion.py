"""Shell completion: the parsers of all commands, as scripts that shtab makes of them."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Mapping, Sequence


def print_completion(arguments: Sequence[str], commands: Mapping[str, tuple[str, str]]) -> int:
    """Prints the script for one shell; returns the exit status.

    Args:
        arguments: the shell's name.
        commands: command -> (module, help), as in `main.COMMANDS`.
    """
    import shtab

    if len(arguments) != 1 or arguments[0] not in shtab.SUPPORTED_SHELLS:
        expected = ", ".join(shtab.SUPPORTED_SHELLS)
        print(
            f"hf-cod: --print-completion: expected one of {expected}, got {' '.join(arguments) or 'none'}",
            file=sys.stderr,
        )
        return 2
    parser = argparse.ArgumentParser(prog="hf-cod")
    parser.add_argument("--version", action="store_true", help="print the version")
    choices = parser.add_subparsers()
    for name, (module, text) in commands.items():
        made = importlib.import_module(f"hf_cod.cli.commands.{module}").make_parser()
        choices.add_parser(name, help=text, parents=[made], add_help=False, conflict_handler="resolve")
    try:
        print(shtab.complete(parser, arguments[0]), flush=True)
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
